//! `/init` of the Linux that the testbed boots in L2 under mini-vmm: says what machine it sees, draws on the GPU's node
//! if the command line has `l2.draw=DRIVER`, checks its descriptors if that has `l2.descriptors=DRIVER`, the rest of it if
//! that has `l2.semantics=DRIVER`, then ends the VM with the exit code of the command line's `l2.exit=N`.
//! `tests/e2e/src/testbed/boot.rs` and `linux.rs` read what it says.

use std::fs;
use std::os::fd::AsFd;
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
    ExitCode::FAILURE
}

/// The bits of `/proc/sys/kernel/tainted` that a module from outside of the kernel sets (`TAINT_OOT_MODULE`,
/// `TAINT_UNSIGNED_MODULE`); all others are the kernel's complaints.
const OUR_TAINT: u64 = 1 << 12 | 1 << 13;

/// Loads the guest driver, draws on its node by the program `native`, unloads the driver, and all that once more.
/// Fails if the kernel has complained of anything.
fn draw(driver: &str, command_line: &str) -> Result<(), String> {
    let device = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("virtio_mmio.device="))
        .ok_or("the command line does not say where the GPU is (virtio_mmio.device=)")?;
    modules::load_all()?;
    for _ in 0..2 {
        modules::load("pvgpu.ko", &format!("mmio={device}"))?;
        let open = fs::File::open("/dev/dri/renderD128")
            .map_err(|error| format!("cannot open the GPU's node: {error}"))?;
        if syscall::unload_module(c"pvgpu").is_ok() {
            return Err("the module was unloaded while its node was open".to_owned());
        }
        drop(open);
        let status = Command::new("/bin/native")
            .args(["--driver", driver])
            .status()
            .map_err(|error| format!("cannot start native: {error}"))?;
        if !status.success() {
            return Err(format!("native ended with {status}"));
        }
        syscall::unload_module(c"pvgpu")
            .map_err(|error| format!("cannot unload the module: {error}"))?;
        if fs::exists("/dev/dri/renderD128").unwrap_or(true) {
            return Err("the node is still there without its module".to_owned());
        }
    }
    no_complaint()
}

/// Fails if the kernel has complained of anything.
fn no_complaint() -> Result<(), String> {
    let tainted = fs::read_to_string("/proc/sys/kernel/tainted")
        .map_err(|error| format!("cannot read /proc/sys/kernel/tainted: {error}"))?;
    match tainted.trim().parse::<u64>() {
        Ok(bits) if bits & !OUR_TAINT == 0 => Ok(()),
        _ => Err(format!("the kernel is tainted: {}", tainted.trim())),
    }
}

/// Loads the guest driver, checks the descriptors of its node by the program `node-descriptors`, and unloads the driver.
/// Fails if the kernel has complained of anything.
fn check_descriptors(driver: &str, command_line: &str) -> Result<(), String> {
    let device = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("virtio_mmio.device="))
        .ok_or("the command line does not say where the GPU is (virtio_mmio.device=)")?;
    syscall::mount(c"sysfs", c"/sys", c"sysfs", c"")
        .map_err(|error| format!("cannot mount /sys: {error}"))?;
    modules::load_all()?;
    modules::load("pvgpu.ko", &format!("mmio={device}"))?;
    let status = Command::new("/bin/node-descriptors")
        .args(["--driver", driver, "--guest"])
        .status()
        .map_err(|error| format!("cannot start node-descriptors: {error}"))?;
    if !status.success() {
        return Err(format!("node-descriptors ended with {status}"));
    }
    syscall::unload_module(c"pvgpu")
        .map_err(|error| format!("cannot unload the module: {error}"))?;
    no_complaint()
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
    let driver = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("l2.draw="));
    if let Some(driver) = driver {
        draw(driver, &command_line)?;
    }
    let driver = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("l2.descriptors="));
    if let Some(driver) = driver {
        check_descriptors(driver, &command_line)?;
    }
    let semantics = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("l2.semantics="));
    if let Some(driver) = semantics {
        guest::run(driver, &command_line)?;
    }
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
