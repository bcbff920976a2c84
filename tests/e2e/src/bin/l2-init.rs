//! `/init` of the Linux that the testbed boots in L2 under mini-vmm: says what machine it sees, then ends the VM
//! with the exit code of the command line's `l2.exit=N`. `tests/e2e/src/testbed/boot.rs` reads both.

use std::fs;
use std::os::fd::AsFd;
use std::process::ExitCode;

use pvgpu_e2e::{debug_device, syscall};

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
    ExitCode::FAILURE
}

/// Ends the VM; returning at all is a failure.
fn report_and_end() -> Result<(), String> {
    for (kind, target) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc")] {
        syscall::mount(kind, target, kind, c"")
            .map_err(|error| format!("cannot mount {}: {error}", target.to_string_lossy()))?;
    }
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
    };
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
    let address = debug_device::announced_address(&command_line)
        .ok_or("the command line does not say where the debug device is (pvgpu.debug=)")?;
    let code = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("l2.exit=")?.parse().ok())
        .ok_or("the command line has no l2.exit=N")?;
    // The VM ends at once; what the serial port has not sent by then is lost.
    syscall::drain_terminal(std::io::stdout().as_fd())
        .map_err(|error| format!("cannot drain the console: {error}"))?;
    debug_device::end_vm(address, code)
        .map_err(|error| format!("cannot write to the debug device: {error}"))?;
    Err("the debug device did not end the VM".to_owned())
}
