//! The program as an operator meets it: options, one-line errors with a remedy, exit status, terminal.

mod kernels;

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use kernels::{TempFile, with_kvm};
use pvgpu_host_proxy::control::{self, Reply, ask};

fn mini_vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mini-vmm"));
    command.stdin(Stdio::null());
    command
}

fn run(kernel: &Path, arguments: &[&str]) -> Output {
    mini_vmm()
        .arg("run")
        .arg("--kernel")
        .arg(kernel)
        .args(arguments)
        .output()
        .unwrap()
}

/// The run must fail as an error of usage or environment, in one line with all of `parts`.
fn refused(output: &Output, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(output.stdout.is_empty());
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
}

fn kernel(code: &[u8]) -> TempFile {
    TempFile::new(&kernels::elf(code))
}

#[test]
fn a_missing_kernel_is_named() {
    refused(
        &run(Path::new("/nonexistent/vmlinux"), &[]),
        &[
            "kernel /nonexistent/vmlinux",
            "No such file",
            "check the path",
        ],
    );
}

#[test]
fn a_file_that_is_no_kernel_is_refused_with_what_would_be_one() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 8192]] {
        refused(
            &run(TempFile::new(bytes).path(), &[]),
            &["is not a kernel", "vmlinux", "bzImage"],
        );
    }
}

#[test]
fn a_damaged_elf_kernel_is_refused_with_the_damage() {
    let good = kernels::elf(kernels::endless());
    let damaged = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    for (bytes, damage) in [
        (good[..40].to_vec(), "ends inside its ELF header"),
        (good[..good.len() - 1].to_vec(), "truncated"),
        (damaged(4, 1), "not for x86-64"),
        (damaged(18, 3), "not for x86-64"),
        (damaged(54, 1), "program headers"),
        (damaged(56, 200), "program headers"),
        (damaged(64, 2), "nothing to load"),
        (damaged(24 + 2, 0xff), "entry point"),
        (damaged(64 + 24 + 2, 0), "below 1 MiB"),
        (damaged(64 + 24 + 7, 0xff), "fit"),
    ] {
        let output = run(TempFile::new(&bytes).path(), &[]);
        let text = String::from_utf8_lossy(&output.stderr);
        if damage == "fit" {
            refused(&output, &["--memory"]);
        } else {
            assert!(text.contains(damage), "'{damage}' is missing in: {text}");
            refused(&output, &["is not a kernel"]);
        }
    }
}

#[test]
fn a_bzimage_without_a_64_bit_entry_point_is_refused() {
    let mut bytes = kernels::bzimage(kernels::endless(), 1 << 20);
    bytes[0x236] = 0;
    refused(
        &run(TempFile::new(&bytes).path(), &[]),
        &["64-bit entry point"],
    );
}

#[test]
fn a_kernel_that_needs_more_memory_says_how_much() {
    let elf = kernels::elf_of_size(kernels::endless(), 64 << 20);
    refused(
        &run(TempFile::new(&elf).path(), &["--memory", "32M"]),
        &["up to 65M", "has 32M", "--memory"],
    );
    let bzimage = kernels::bzimage(kernels::endless(), 64 << 20);
    refused(
        &run(TempFile::new(&bzimage).path(), &["--memory", "32M"]),
        &["up to 65M", "has 32M", "--memory"],
    );
    let mut long = kernels::bzimage(kernels::endless(), 1 << 20);
    long.resize(3 << 20, 0);
    refused(
        &run(TempFile::new(&long).path(), &["--memory", "2M"]),
        &["up to 4M", "has 2M", "--memory"],
    );
}

#[test]
fn impossible_memory_is_refused_with_the_possible_range() {
    let kernel = kernel(kernels::endless());
    for size in ["0", "1M", "4095K", "1T"] {
        refused(
            &run(kernel.path(), &["--memory", size]),
            &["--memory from 2M to 63G"],
        );
    }
}

#[test]
fn a_bad_size_is_refused_with_an_example() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--memory", "12Q"]),
        &["--memory", "'12Q' is not a size", "256M"],
    );
    refused(
        &run(kernel.path(), &["--aperture", "much"]),
        &["--aperture", "'much' is not a size"],
    );
}

#[test]
fn an_initrd_that_is_missing_or_does_not_fit_is_named() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--initrd", "/nonexistent"]),
        &["initrd /nonexistent", "check the path"],
    );
    refused(
        &run(kernel.path(), &["--initrd", "/dev/null"]),
        &["initrd /dev/null", "not a regular file"],
    );
    let initrd = TempFile::new(&vec![0; 4 << 20]);
    let path = initrd.path().to_str().unwrap();
    refused(
        &run(kernel.path(), &["--memory", "4M", "--initrd", path]),
        &["initrd", "does not fit", "--memory"],
    );
}

#[test]
fn a_command_line_that_is_too_long_is_refused_with_the_limit() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--cmdline", &"x".repeat(2100)]),
        &["2048", "--cmdline"],
    );
}

#[test]
fn numbers_of_processors_out_of_range_are_refused() {
    let kernel = kernel(kernels::endless());
    for count in ["0", "33", "many"] {
        refused(&run(kernel.path(), &["--cpus", count]), &["--cpus"]);
    }
}

#[test]
fn a_gpu_that_cannot_be_opened_is_named() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--gpu", "drm:/dev/null"]),
        &["/dev/null is not a DRM node", "/dev/dri/renderD"],
    );
    refused(
        &run(kernel.path(), &["--gpu", "drm:/nonexistent"]),
        &["no /nonexistent", "ls /dev/dri"],
    );
    for value in ["banana", "drm:", "drm", "soft:x"] {
        refused(
            &run(kernel.path(), &["--gpu", value]),
            &["--gpu", "drm:NODE"],
        );
    }
}

#[test]
fn a_limit_that_cannot_be_is_refused_with_the_names_or_the_range() {
    let kernel = kernel(kernels::endless());
    for (value, remedy) in [
        ("files=3", "objects, in_flight"),
        ("memory", "memory=1G"),
        ("objects=1,memory=many", "256M"),
        ("worker_time=0", "from 1 to 1000000"),
    ] {
        refused(
            &run(kernel.path(), &["--limit", value]),
            &["--limit", remedy],
        );
    }
}

#[test]
fn a_trace_that_cannot_be_written_is_refused() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--trace", "/nonexistent/trace"]),
        &["trace /nonexistent/trace", "No such file", "--trace FILE"],
    );
    refused(
        &run(kernel.path(), &["--gpu", "none", "--trace", "/dev/null"]),
        &["--trace", "there is no GPU"],
    );
}

#[test]
fn a_dump_file_that_cannot_be_written_is_refused_before_the_guest_runs() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--dump", "/nonexistent/dump"]),
        &["dump /nonexistent/dump", "No such file", "--dump FILE"],
    );
}

#[test]
fn a_control_socket_that_cannot_be_is_refused() {
    let kernel = kernel(kernels::endless());
    let file = TempFile::new(b"mine");
    let path = file.path().to_str().unwrap();
    refused(
        &run(kernel.path(), &["--control", path]),
        &[path, "is no socket", "--control SOCKET"],
    );
    refused(
        &run(kernel.path(), &["--control", "/nonexistent/socket"]),
        &["/nonexistent/socket", "directory", "--control SOCKET"],
    );
    refused(
        &run(kernel.path(), &["--gpu", "none", "--control", path]),
        &["--control", "there is none"],
    );
    let daemon = ["--gpu", "vhost-user:/nonexistent/gpu", "--control", path];
    refused(
        &run(kernel.path(), &daemon),
        &["--control", "give it to the pvgpu-proxyd"],
    );
    // What is refused for another reason leaves no socket behind.
    let socket = std::env::temp_dir().join(format!("mini-vmm-refused-{}", std::process::id()));
    let control = ["--control", socket.to_str().unwrap()];
    refused(
        &run(Path::new("/nonexistent/vmlinux"), &control),
        &["/nonexistent/vmlinux"],
    );
    assert!(!socket.exists());
}

#[test]
#[allow(unsafe_code)]
fn the_control_socket_answers_while_the_machine_runs_and_is_gone_afterwards() {
    if !with_kvm() {
        return;
    }
    let kernel = kernel(kernels::endless());
    let path = std::env::temp_dir().join(format!("mini-vmm-control-{}", std::process::id()));
    // What a machine left behind that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    for sandbox in ["on", "off"] {
        let mut child = mini_vmm()
            .args(["run", "--sandbox", sandbox, "--kernel"])
            .arg(kernel.path())
            .arg("--control")
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut dot = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut dot).unwrap();
        let Ok(Reply::Status(statistics)) = ask(&path, &control::Command::Status, None) else {
            panic!("no status");
        };
        assert_eq!(statistics.driver.name, "soft");
        assert_eq!(
            statistics.session, None,
            "its guest has not started the GPU"
        );
        // SAFETY: the child is ours and has not been waited for.
        unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), &*said),
            (Some(128 + libc::SIGTERM), "")
        );
        assert!(!path.exists(), "--sandbox {sandbox}");
    }
}

#[test]
fn an_aperture_that_cannot_be_is_refused() {
    if !with_kvm() {
        return;
    }
    let kernel = kernel(kernels::endless());
    for size in ["4097", "16777215T"] {
        refused(
            &run(kernel.path(), &["--aperture", size]),
            &["aperture of", "--aperture"],
        );
    }
}

#[test]
fn missing_kvm_is_named_with_a_remedy() {
    let kernel = kernel(kernels::endless());
    refused(
        &run(kernel.path(), &["--kvm", "/nonexistent/kvm"]),
        &["/nonexistent/kvm does not exist", "modprobe"],
    );
    refused(
        &run(kernel.path(), &["--kvm", "/dev/null"]),
        &["/dev/null is not KVM", "/dev/kvm"],
    );
}

#[test]
fn options_that_are_missing_or_unknown_are_one_line_errors() {
    refused(
        &mini_vmm().arg("run").output().unwrap(),
        &["--kernel", "see mini-vmm run --help"],
    );
    refused(
        &mini_vmm().args(["run", "--frob"]).output().unwrap(),
        &["--frob", "see mini-vmm run --help"],
    );
}

#[test]
fn help_names_the_exit_codes_and_version_the_version() {
    let output = mini_vmm().arg("--help").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(
        text.contains("Exit status of 'run'") && text.contains("3 when the guest crashed"),
        "{text}"
    );
    let output = mini_vmm().arg("--version").output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        concat!("mini-vmm ", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn without_a_command_the_commands_are_named() {
    refused(
        &mini_vmm().output().unwrap(),
        &["run or check", "see mini-vmm --help"],
    );
}

#[test]
fn a_report_that_cannot_be_written_is_an_error_and_one_that_nobody_reads_is_none() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    for arguments in [&["check"][..], &["check", "--json"]] {
        let output = mini_vmm()
            .args(arguments)
            .stdout(full.try_clone().unwrap())
            .output()
            .unwrap();
        refused(&output, &["standard output", "No space left"]);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let arguments = [arguments, &["--kvm", "/nonexistent"]].concat();
        let output = mini_vmm().args(arguments).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "as without a reader");
        assert!(output.stderr.is_empty());
    }
}

#[test]
fn check_fails_without_kvm_and_says_what_to_do() {
    let output = mini_vmm()
        .args(["check", "--kvm", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stdout).contains("modprobe"));
    let output = mini_vmm()
        .args(["check", "--json", "--kvm", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    assert!(
        report["kvm"]["problem"]
            .as_str()
            .unwrap()
            .contains("modprobe")
    );
}

#[test]
fn check_lists_the_capabilities_of_this_host() {
    if !with_kvm() {
        return;
    }
    let output = mini_vmm().args(["check", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["kvm"]["api_version"], 12);
    let capabilities = report["kvm"]["capabilities"].as_array().unwrap();
    assert!(
        capabilities
            .iter()
            .any(|c| c["name"] == "IRQFD" && c["value"] != 0)
    );
    assert!(report["kvm"]["tsc_khz"].as_u64().unwrap() > 0);
}

#[test]
fn the_guests_exit_code_becomes_the_programs() {
    if !with_kvm() {
        return;
    }
    let output = run(
        kernel(kernels::linux_reporter()).path(),
        &["--cmdline", "hello"],
    );
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "hello pvgpu.debug=0xd0001000 virtio_mmio.device=4K@0xd0000000:5\n"
    );
    assert!(output.stderr.is_empty());
}

#[test]
fn a_gpu_on_pci_is_not_announced() {
    if !with_kvm() {
        return;
    }
    let options = ["--cmdline", "hello", "--transport", "pci"];
    let output = run(kernel(kernels::linux_reporter()).path(), &options);
    assert_eq!(output.status.code(), Some(42));
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "hello pvgpu.debug=0xd0001000\n");
}

#[test]
fn with_json_standard_output_is_one_object_and_the_console_is_standard_error() {
    if !with_kvm() {
        return;
    }
    let output = run(
        kernel(kernels::linux_reporter()).path(),
        &[
            "--cmdline",
            "hello",
            "--json",
            "--limit",
            "memory=1G,objects=9",
        ],
    );
    assert_eq!(output.status.code(), Some(42));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("hello"));
    let outcome: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        outcome["ending"],
        serde_json::json!({"kind": "exit", "code": 42})
    );
    assert_eq!(outcome["exit_code"], 42);
    assert!(outcome["exits"]["pio"].as_u64().unwrap() > 5);
    let limits = outcome["gpu"]["limits_reached"].as_array().unwrap();
    assert!(limits.contains(&serde_json::json!(["worker_time", 0])));
}

#[test]
fn a_crash_is_one_line_and_exit_code_3() {
    if !with_kvm() {
        return;
    }
    let output = run(kernel(kernels::crash()).path(), &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains("the guest crashed (triple fault; vCPU 0 at rip 0x100000"),
        "{text}"
    );
}

#[test]
fn a_dump_goes_to_the_file_and_without_one_there_is_a_warning() {
    if !with_kvm() {
        return;
    }
    let kernel = kernel(kernels::timing());
    let dump = TempFile::new(b"something longer than the dump");
    let output = run(kernel.path(), &["--dump", dump.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0x10));
    assert_eq!(std::fs::read(dump.path()).unwrap().len(), 4);
    let output = run(kernel.path(), &[]);
    assert_eq!(
        output.status.code(),
        Some(libc::ENODEV),
        "the guest reads the errno and exits with it"
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("--dump FILE"));
}

#[test]
fn input_from_a_pipe_reaches_the_guest() {
    if !with_kvm() {
        return;
    }
    let kernel = kernel(kernels::echo());
    let mut child = mini_vmm()
        .args(["run", "--kernel"])
        .arg(kernel.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let text = "the lazy brown fox ".repeat(20);
    child
        .stdin
        .take()
        .unwrap()
        .write_all(format!("{text}q").as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stdout), text);
}

/// Tests with a pseudo-terminal as the operator's.
#[allow(unsafe_code)]
mod terminal {
    use super::*;
    use std::fs::File;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::process::Child;

    struct Terminal {
        master: File,
        slave: OwnedFd,
    }

    impl Terminal {
        fn new() -> Self {
            let (mut master, mut slave) = (-1, -1);
            let null = std::ptr::null_mut();
            // SAFETY: openpty writes two descriptors; the rest may be null.
            let result =
                unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) };
            assert_eq!(result, 0);
            // SAFETY: both were just opened and nothing else owns them.
            unsafe {
                Self {
                    master: File::from_raw_fd(master),
                    slave: OwnedFd::from_raw_fd(slave),
                }
            }
        }

        fn local_flags(&self) -> libc::tcflag_t {
            let mut settings = MaybeUninit::<libc::termios>::uninit();
            // SAFETY: tcgetattr fills the structure or fails, which is checked right after.
            let result = unsafe { libc::tcgetattr(self.slave.as_raw_fd(), settings.as_mut_ptr()) };
            assert_eq!(result, 0);
            // SAFETY: it succeeded.
            unsafe { settings.assume_init() }.c_lflag
        }

        fn start(&self, kernel: &Path) -> Child {
            let descriptor = || Stdio::from(self.slave.try_clone().unwrap());
            mini_vmm()
                .args(["run", "--kernel"])
                .arg(kernel)
                .stdin(descriptor())
                .stdout(descriptor())
                .stderr(descriptor())
                .spawn()
                .unwrap()
        }

        /// Waits until the guest has printed its dot.
        fn wait_for_dot(&mut self) {
            let mut byte = [0];
            self.master.read_exact(&mut byte).unwrap();
            assert_eq!(byte, *b".");
        }
    }

    const COOKED: libc::tcflag_t = libc::ECHO | libc::ICANON | libc::ISIG;

    fn ends_with(status: i32, end: impl FnOnce(&mut Terminal, &Child)) {
        let kernel = kernel(kernels::endless());
        let mut terminal = Terminal::new();
        let before = terminal.local_flags();
        assert_eq!(before & COOKED, COOKED);
        let mut child = terminal.start(kernel.path());
        terminal.wait_for_dot();
        assert_eq!(
            terminal.local_flags() & COOKED,
            0,
            "raw while the guest has it"
        );
        end(&mut terminal, &child);
        assert_eq!(child.wait().unwrap().code(), Some(status));
        assert_eq!(terminal.local_flags(), before, "restored");
    }

    #[test]
    fn ctrl_a_x_ends_the_machine_and_the_terminal_is_restored() {
        if with_kvm() {
            ends_with(130, |terminal, _| {
                terminal.master.write_all(b"\x01x").unwrap()
            });
        }
    }

    #[test]
    fn each_signal_that_ends_a_program_ends_the_machine_and_restores_the_terminal() {
        if !with_kvm() {
            return;
        }
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
            ends_with(128 + signal, |_, child| {
                // SAFETY: the child is ours and has not been waited for.
                let result = unsafe { libc::kill(i32::try_from(child.id()).unwrap(), signal) };
                assert_eq!(result, 0);
            });
        }
    }
}
