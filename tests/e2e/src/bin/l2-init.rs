//! `/init` of the Linux that the testbed boots in L2 under mini-vmm: says what machine it sees, does with the GPU what the
//! command line asks for, then ends the VM with the exit code of the command line's `l2.exit=N` (under other VMMs, by a reset).
//!
//! `l2.draw=DRIVER` draws on the GPU's node with the program `native`, and loads and unloads the guest driver twice;
//! `l2.descriptors=DRIVER` checks the node's descriptors with the program `node-descriptors`, `l2.semantics=DRIVER` the rest of it
//! (both with `l2.no_aperture` if there is none);
//! `l2.run="COMMAND"` runs one command line of a shell with the guest driver loaded. `tests/e2e/src/testbed/` (`boot`,
//! `linux`, `descriptors`, `semantics`, `mesa`) reads what it says.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode};

use pvgpu_e2e::semantics::guest;
use pvgpu_e2e::{debug_device, modules, syscall};

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "l2-init: this is the first process of a guest in the testbed: run `cargo xtask testbed` instead"
        );
        return ExitCode::from(2);
    }
    if let Err(error) = report_and_end() {
        println!("l2-init: {error}");
    }
    // The kernel panics when its first process ends, and ends the VM; what the serial port has not sent by then is lost.
    let _ = syscall::drain_terminal(std::io::stdout().as_fd());
    ExitCode::FAILURE
}

/// What it says at last where the VMM is not mini-vmm, which has a device for exit codes; then it resets the machine.
const PASSED: &str = "l2-init: everything has passed";

/// The bits of `/proc/sys/kernel/tainted` that a module from outside of the kernel sets (`TAINT_OOT_MODULE`,
/// `TAINT_UNSIGNED_MODULE`); all others are the kernel's complaints.
const OUR_TAINT: u64 = 1 << 12 | 1 << 13;

/// The node that the guest driver makes.
const NODE: &str = "/dev/dri/renderD128";

/// The shell and its commands.
const BUSYBOX: &str = "/bin/busybox";

/// Loads the guest driver, draws on its node by the program `native`, unloads the driver, and all that once more.
fn draw(driver: &str) -> Result<(), String> {
    for _ in 0..2 {
        with_driver(|| {
            let open =
                fs::File::open(NODE).map_err(|error| format!("cannot open {NODE}: {error}"))?;
            if syscall::unload_module(c"pvgpu").is_ok() {
                return Err("the module was unloaded while its node was open".to_owned());
            }
            drop(open);
            succeed(Command::new("/bin/native").args(["--driver", driver]))
        })?;
    }
    Ok(())
}

/// Runs `line` by a shell with the guest driver loaded. The console has what it writes between two lines of ours.
fn run(line: &str) -> Result<(), String> {
    succeed(Command::new(BUSYBOX).args(["--install", "-s", "/bin"]))?;
    with_driver(|| {
        println!("l2-init: running");
        let result = succeed(
            Command::new(BUSYBOX)
                .args(["sh", "-c", line])
                .current_dir("/tmp")
                .env("PATH", "/bin")
                .env("HOME", "/"),
        );
        println!("l2-init: done");
        result
    })
}

/// Does `job` with the guest driver loaded, then unloads it, which fails if anything is left open.
fn with_driver(job: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    modules::load_guest_driver()?;
    loaded_by_itself()?;
    job()?;
    modules::unload_guest_driver()?;
    match fs::exists(NODE) {
        Ok(false) => Ok(()),
        _ => Err(format!("{NODE} is still there without its module")),
    }
}

/// Fails unless udev would load the guest driver for the GPU's device and, where that is on PCI, what finds it there, unless that
/// is part of the kernel.
fn loaded_by_itself() -> Result<(), String> {
    let device = guest::device().map_err(|error| error.to_string())?;
    let device = fs::canonicalize(format!("/sys/bus/virtio/devices/{device}"))
        .map_err(|error| format!("cannot find {device} in /sys: {error}"))?;
    match device.parent() {
        Some(parent) if parent.join("vendor").exists() && modules::exists("virtio_pci.ko") => {
            has_module("virtio_pci.ko", parent)
        }
        _ => Ok(()),
    }
}

fn has_module(file: &str, device: &Path) -> Result<(), String> {
    let modalias = read(&device.join("modalias").to_string_lossy())?;
    match modules::is_for(file, modalias.trim())? {
        true => Ok(()),
        false => Err(format!("{file} has no alias for {}", modalias.trim())),
    }
}

/// Runs `command`, which has to succeed.
fn succeed(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{name} ended with {status}")),
        Err(error) => Err(format!("cannot start {name}: {error}")),
    }
}

/// Fails if the kernel has complained of anything. One that checks itself (docs/contributing.md) does not say all by a taint.
fn no_complaint() -> Result<(), String> {
    let tainted = read("/proc/sys/kernel/tainted")?;
    match tainted.trim().parse::<u64>() {
        Ok(bits) if bits & !OUR_TAINT == 0 => {}
        _ => return Err(format!("the kernel is tainted: {}", tainted.trim())),
    }
    // Lockdep stops at its first report.
    if fs::exists("/proc/lockdep_stats").is_ok_and(|there| there) {
        let statistics = read("/proc/lockdep_stats")?;
        let working = |line: &str| {
            line.trim_start()
                .strip_prefix("debug_locks:")
                .map(str::trim)
                == Some("1")
        };
        if !statistics.lines().any(working) {
            return Err("lockdep has reported something, see above".to_owned());
        }
    }
    const LEAKS: &str = "/sys/kernel/debug/kmemleak";
    // It may be there already.
    let _ = syscall::mount(c"debugfs", c"/sys/kernel/debug", c"debugfs", c"");
    if fs::exists(LEAKS).is_ok_and(|there| there) {
        // What is older than five seconds, and found twice, is lost.
        for _ in 0..2 {
            std::thread::sleep(std::time::Duration::from_secs(6));
            fs::write(LEAKS, "scan").map_err(|error| format!("cannot write {LEAKS}: {error}"))?;
        }
        let leaks = read(LEAKS)?;
        if !leaks.is_empty() {
            return Err(format!("the kernel has lost memory:\n{leaks}"));
        }
    }
    Ok(())
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// The value of `name=VALUE` or `name="VALUE"` on the kernel's command line.
fn parameter<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    let start = command_line.find(&format!(" {name}="))? + name.len() + 2;
    let value = command_line.get(start..)?;
    match value.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => value.split_whitespace().next(),
    }
}

/// Ends the VM; returning at all is a failure.
fn report_and_end() -> Result<(), String> {
    for (kind, target) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
    ] {
        syscall::mount(kind, target, kind, c"")
            .map_err(|error| format!("cannot mount {}: {error}", target.to_string_lossy()))?;
    }
    let processors = read("/proc/cpuinfo")?
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = read("/proc/meminfo")?;
    let kilobytes = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB"))
        .unwrap_or("0");
    println!("l2-init: {processors} processors, {} kB", kilobytes.trim());

    let command_line = read("/proc/cmdline")?;
    let [driver, checked, line] =
        ["l2.draw", "l2.descriptors", "l2.run"].map(|name| parameter(&command_line, name));
    if driver.or(checked).or(line).is_some() {
        modules::load_all()?;
        if let Some(driver) = driver {
            draw(driver)?;
        }
        if let Some(driver) = checked {
            with_driver(|| {
                succeed(Command::new("/bin/node-descriptors").args(["--driver", driver, "--guest"]))
            })?;
        }
        if let Some(line) = line {
            run(line)?;
        }
    }
    let semantics = parameter(&command_line, "l2.semantics");
    if let Some(driver) = semantics {
        guest::run(driver)?;
    }
    if driver.or(checked).or(line).or(semantics).is_some() {
        no_complaint()?;
    }
    let Some(address) = debug_device::announced_address(&command_line) else {
        println!("{PASSED}");
        return succeed(Command::new(BUSYBOX).args(["reboot", "-f"]));
    };
    let code = parameter(&command_line, "l2.exit")
        .and_then(|code| code.parse().ok())
        .ok_or("the command line has no l2.exit=N")?;
    // The VM ends at once; what the serial port has not sent by then is lost.
    syscall::drain_terminal(std::io::stdout().as_fd())
        .map_err(|error| format!("cannot drain the console: {error}"))?;
    debug_device::end_vm(address, code)
        .map_err(|error| format!("cannot write to the debug device: {error}"))?;
    Err("the debug device did not end the VM".to_owned())
}
