//! `/init` of the testbed's L1: mounts what programs expect, loads the drivers, keeps one KVM VM open and a timer running,
//! runs a program of `/bin` (`init run PROGRAM ARGUMENTS`) or a console (`init shell`), and ends the machine with an exit code
//! that `cargo xtask testbed` takes. It is the first process of a machine of its own and good for nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pvgpu_e2e::{modules, syscall};

/// QEMU's `isa-debug-exit`, and what is added to the exit code so that QEMU's own codes differ from it.
/// `tests/xtask/src/testbed/machine.rs` has the same numbers.
const EXIT_PORT: u64 = 0xf4;
const EXIT_CODE_BASE: u8 = 0x10;

/// How often L1 is interrupted at least, in a second.
const HEARTBEAT: u64 = 50;

/// Whether memory that a VMM shares with a daemon may have huge pages: without them a guest is slower, and an emulated one most of all.
const SHARED_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The commands of the console.
const BUSYBOX: &str = "/bin/busybox";

/// Exit codes beside those of `l1-tests`.
const CANNOT_START: u8 = 3;
const KILLED: u8 = 4;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "l1-init: this is the first process of the testbed's machine: run `cargo xtask testbed` instead"
        );
        return ExitCode::from(2);
    }
    let code = start().unwrap_or_else(|error| {
        eprintln!("l1-init: {error}");
        CANNOT_START
    });
    if let Err(error) = end_machine(code) {
        eprintln!("l1-init: cannot end the machine: {error}");
    }
    // The kernel panics when its first process ends, and then ends the machine.
    ExitCode::FAILURE
}

/// An error with the words that say what was tried.
fn because(what: &str) -> impl Fn(io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}

/// Everything up to the exit code.
fn start() -> Result<u8, String> {
    for (kind, target) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"debugfs", c"/sys/kernel/debug"),
        (c"tmpfs", c"/tmp"),
    ] {
        syscall::mount(kind, target, kind, c"")
            .map_err(because(&format!("mount {}", target.to_string_lossy())))?;
    }
    std::fs::write(SHARED_HUGE_PAGES, "advise")
        .map_err(because(&format!("write to {SHARED_HUGE_PAGES}")))?;
    code_of(Command::new(BUSYBOX).args(["--install", "-s", "/bin"]))?;
    modules::load_all()?;
    for (tag, target) in [(c"shared", c"/shared"), (c"boot", c"/boot")] {
        syscall::mount(
            c"9p",
            target,
            tag,
            c"trans=virtio,version=9p2000.L,msize=131072",
        )
        .map_err(because(&format!("mount {}", target.to_string_lossy())))?;
    }
    let _keeper = keep_a_vm()?;
    let _heartbeat = keep_a_heartbeat().map_err(because("start the timer /dev/hpet"))?;
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("run"), Some(program)) => code_of(
            Command::new(format!("/bin/{program}"))
                .args(arguments)
                .env("PATH", "/bin")
                .env("HOME", "/"),
        ),
        (Some("shell"), None) => shell(),
        other => Err(format!(
            "asked for {other:?}, which is neither `run PROGRAM` nor `shell`"
        )),
    }
}

/// A VM with one vCPU that stays open as long as L1 lives: when KVM's last VM closes, KVM switches SVM off on all
/// processors, and doing that again and again locks up an emulated machine with two of them.
fn keep_a_vm() -> Result<(VmFd, VcpuFd), String> {
    let keep = || {
        let vm = Kvm::new()?.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        Ok((vm, vcpu))
    };
    keep().map_err(|error: kvm_ioctls::Error| format!("cannot create a VM: {error}"))
}

/// Interrupts that come by themselves as long as the file is open. QEMU's emulation of SVM clears its request bit for virtual
/// interrupts without a lock at every exit of a guest (`do_vmexit`, before QEMU 10.2), and may undo the request that a timer makes
/// in the same nanoseconds: that interrupt waits in the local APIC until the next one comes. Linux has one timer, and starts it
/// anew only when it has rung, so L1 would stand still for good.
fn keep_a_heartbeat() -> io::Result<File> {
    let hpet = File::open("/dev/hpet")?;
    syscall::start_periodic_interrupts(&hpet, HEARTBEAT)?;
    Ok(hpet)
}

/// A console for people.
fn shell() -> Result<u8, String> {
    println!(
        "L1 of the testbed. `l1-tests --list` names the tests; `exit` or Ctrl-A x ends the machine."
    );
    let mut shell = Command::new(BUSYBOX);
    shell
        .args(["setsid", "-c", BUSYBOX, "sh", "-l"])
        .env("PATH", "/bin")
        .env("HOME", "/")
        .env("PS1", "L1:\\w# ");
    code_of(&mut shell)?;
    Ok(0)
}

/// Runs `command` and gives its exit code.
fn code_of(command: &mut Command) -> Result<u8, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .map_err(because(&format!("start {program}")))?;
    if let Some(code) = status.code().and_then(|code| u8::try_from(code).ok()) {
        return Ok(code);
    }
    println!("l1-init: {program} ended with {status}");
    Ok(KILLED)
}

/// Waits until the console has everything, then makes QEMU exit.
fn end_machine(code: u8) -> io::Result<()> {
    io::stdout().flush()?;
    syscall::drain_terminal(io::stdout().as_fd())?;
    let mut ports = OpenOptions::new().write(true).open("/dev/port")?;
    ports.seek(SeekFrom::Start(EXIT_PORT))?;
    ports.write_all(&[EXIT_CODE_BASE + code.min(0x5f)])
}
