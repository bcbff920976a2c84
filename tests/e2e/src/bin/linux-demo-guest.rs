//! `/init` of the Linux guest of `linux-demo`: loads the guest driver, draws on its node with `gles` and a stock Mesa, hands
//! the last picture out through the debug device, and ends the VM. The console shows it as a shell would: a line `$ COMMAND`,
//! then what the command writes. `linux-demo` reads these lines and counts between them.
//!
//! The kernel's command line says what to draw (`tests/e2e/src/linux_demo.rs`).

use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use pvgpu_e2e::linux_demo::{self, Plan};
use pvgpu_e2e::{debug_device, modules, syscall};

/// Where `gles` leaves its picture.
const PICTURE: &str = "/tmp/picture.png";

/// The node that the module makes.
const NODE: &str = "/dev/dri/renderD128";

/// How long the node may take to appear after the module is loaded.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "linux-demo-guest: this is the first process of a guest: run `cargo xtask linux-demo` instead"
        );
        return ExitCode::from(2);
    }
    if let Err(error) = run() {
        println!("linux-demo-guest: {error}");
    }
    // The kernel panics when its first process ends, and resets the machine.
    let _ = syscall::drain_terminal(std::io::stdout().as_fd());
    ExitCode::FAILURE
}

fn run() -> Result<(), String> {
    for (kind, target) in [
        (c"devtmpfs", c"/dev"),
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
    ] {
        syscall::mount(kind, target, kind, c"")
            .map_err(|error| format!("cannot mount {}: {error}", target.to_string_lossy()))?;
    }
    let command_line = fs::read_to_string("/proc/cmdline")
        .map_err(|error| format!("cannot read /proc/cmdline: {error}"))?;
    let debug = debug_device::announced_address(&command_line)
        .ok_or("the command line does not say where the debug device is (pvgpu.debug=)")?;
    let plan = Plan::of_command_line(&command_line)
        .ok_or("the command line does not say what to draw (demo.scene=, ...)")?;

    modules::load_all()?;
    let where_it_is = modules::guest_driver_parameters(&command_line);
    println!("$ insmod pvgpu.ko {where_it_is}");
    let start = Instant::now();
    modules::load(modules::GUEST_DRIVER, &where_it_is)?;
    while !fs::exists(NODE).unwrap_or(false) {
        if start.elapsed() > PATIENCE {
            return Err(format!("the module is loaded and there is no {NODE}"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    println!("{NODE} is there after {} us", start.elapsed().as_micros());

    for arguments in plan.runs(NODE, PICTURE) {
        println!("$ gles {}", arguments.join(" "));
        let status = Command::new("/bin/gles")
            .args(&arguments)
            .envs(linux_demo::ENVIRONMENT)
            .status()
            .map_err(|error| format!("cannot start gles: {error}"))?;
        if !status.success() {
            return Err(format!("gles ended with {status}"));
        }
    }
    println!("$ poweroff");
    let picture = fs::read(PICTURE).map_err(|error| format!("cannot read {PICTURE}: {error}"))?;
    debug_device::dump(debug, &picture)
        .map_err(|error| format!("cannot hand the picture out: {error}"))?;
    // The VM ends at once; what the serial port has not sent by then is lost.
    syscall::drain_terminal(std::io::stdout().as_fd())
        .map_err(|error| format!("cannot drain the console: {error}"))?;
    debug_device::end_vm(debug, 0)
        .map_err(|error| format!("cannot write to the debug device: {error}"))?;
    Err("the debug device did not end the VM".to_owned())
}
