//! `cargo xtask qemu`: an unmodified Debian guest under an unmodified QEMU, whose generic vhost-user front end has the GPU of
//! `pvgpu-proxyd`. What works there works with more than our own front end.
//!
//! QEMU is Debian 13's backports' (11.1 or newer: it has the device `vhost-user-test-device-pci`), extracted into
//! `target/testbed`, not installed. It has no name for device number 63, so the guest's module is built for another one.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::packages::{self, Qemu};
use crate::programs::{self, NATIVE, PROXYD};
use crate::say::say;
use crate::testbed::{self, Process, bound};

/// Which guest.
#[derive(clap::Args)]
#[command(
    after_help = "Needs neither a GPU nor KVM nor root, but Debian: docs/testbed.md. The first run downloads and builds for some \
minutes.\n\n\
Exit code 0: the guest has found what it had to. 1: it has not. 2: this machine lacks something."
)]
pub struct Arguments {
    /// The guest's kernel, one of those that the testbed has
    #[arg(long, value_name = "VERSION", default_value = "6.1", value_parser = clap::builder::PossibleValuesParser::new(testbed::GUESTS.iter().map(|(name, _)| *name)))]
    kernel: String,

    /// A folder of Linux sources in which a kernel was built, instead of Debian's; docs/contributing.md has one that checks itself
    #[arg(long, value_name = "FOLDER", conflicts_with = "kernel")]
    guest_kernel: Option<PathBuf>,
}

/// A number of virtio's that QEMU has a name for, and that no driver in the guest is for (GPIO).
const DEVICE: u32 = 41;

/// A guest emulates two processors, and the GPU is emulated, too; minutes when the machine has other things to do.
const LIMIT: Duration = Duration::from_secs(600);

/// What the guest's first process says at last (`tests/e2e/src/bin/l2-init.rs`).
const PASSED: &str = "l2-init: everything has passed";

/// A test: its name, what the daemon and the guest are told, and how often it must draw the picture.
const TESTS: [(&str, &[&str], &str, usize); 5] = [
    (
        "draws_as_without_a_vm",
        &["--aperture", "256M"],
        "l2.draw=soft",
        2,
    ),
    (
        "draws_without_an_aperture",
        &["--aperture", "0"],
        "l2.draw=soft",
        2,
    ),
    (
        "has_the_descriptors_of_a_node",
        &["--aperture", "256M"],
        "l2.descriptors=soft",
        0,
    ),
    (
        "has_the_descriptors_of_a_node_without_an_aperture",
        &["--aperture", "0"],
        "l2.descriptors=soft l2.no_aperture",
        0,
    ),
    // With an aperture, QEMU 11.1 itself crashes when a guest resets the device while something is mapped.
    (
        "has_the_semantics_of_a_node_without_an_aperture",
        &["--aperture", "0", "--watchdog", "170"],
        "l2.semantics=soft l2.no_aperture",
        0,
    ),
];

/// Runs it with the first of the testbed's kernels.
pub fn check() -> ExitCode {
    run(&Arguments {
        kernel: testbed::GUESTS[0].0.to_owned(),
        guest_kernel: None,
    })
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    match tests(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cargo xtask qemu: {error}");
            ExitCode::from(2)
        }
    }
}

type Error = Box<dyn std::error::Error>;

fn tests(arguments: &Arguments) -> Result<bool, Error> {
    let folder = programs::target_directory()?.join("testbed");
    let guest = testbed::guest_for(&arguments.kernel, arguments.guest_kernel.as_deref(), DEVICE)?;
    let qemu = packages::qemu_of_trixie(&folder)?;
    let built = programs::build(&[PROXYD, NATIVE])?;
    let [proxyd, native] = [0, 1].map(|index: usize| &built[index].path);
    let drawn = crate::command::text(Command::new(native).args(["--driver", "embedded"]))?;
    let picture = drawn.lines().last().unwrap_or_default();
    let mut passed = true;
    for (name, options, parameters, pictures) in TESTS {
        let started = Instant::now();
        let socket = folder.join("qemu.sock");
        let _daemon = daemon(proxyd, &socket, options)?;
        let lines = boot(&qemu, &guest, &socket, parameters)?;
        let found = lines.iter().filter(|line| line.as_str() == picture).count();
        let wrong = lines.iter().find(|line| line.starts_with("WRONG"));
        let complete = lines.iter().any(|line| line == PASSED);
        if complete && wrong.is_none() && found == pictures {
            say!("ok {name} {:.1} s", started.elapsed().as_secs_f64());
        } else {
            passed = false;
            let said = |line: &&String| line.starts_with("l2-init:");
            let said = wrong.or(lines.iter().rfind(said)).or(lines.last());
            let said = said.map_or("nothing", String::as_str);
            say!("FAILED {name}: {found} pictures, {pictures} expected; the guest said `{said}`");
            let log = folder.join("qemu-console.log");
            std::fs::write(&log, lines.join("\n"))?;
            eprintln!("all that it said is in {}", log.display());
        }
    }
    Ok(passed)
}

fn daemon(program: &Path, socket: &Path, options: &[&str]) -> Result<Process, Error> {
    let mut command = bound(program);
    command.arg("--socket").arg(socket);
    command.args(["--queues", "2"]).args(options);
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut said = BufReader::new(child.stderr.take().ok_or("no pipe")?);
    let daemon = Process(child);
    let mut line = String::new();
    while !line.contains("waiting for a front end") {
        line.clear();
        if said.read_line(&mut line)? == 0 {
            return Err("pvgpu-proxyd has ended".into());
        }
    }
    // Whatever else it says must not fill the pipe up.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    Ok(daemon)
}

/// Boots the guest, and gives what it has written when QEMU ends.
fn boot(
    qemu: &Qemu,
    (kernel, initramfs): &(PathBuf, PathBuf),
    socket: &Path,
    parameters: &str,
) -> Result<Vec<String>, Error> {
    let mut command = bound("env");
    qemu.extend(&mut command);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args([
        "-machine",
        "q35,memory-backend=ram",
        "-m",
        "1G",
        "-accel",
        "tcg",
    ]);
    command.args(["-object", "memory-backend-memfd,id=ram,size=1G,share=on"]);
    command.args([
        "-cpu", "max", "-smp", "2", "-display", "none", "-serial", "stdio",
    ]);
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs);
    command.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 reboot=k mitigations=off {parameters}"
    ));
    let socket = format!("socket,id=gpu,path={}", socket.display());
    // Two request queues, and that for events.
    let device = format!(
        "vhost-user-test-device-pci,chardev=gpu,virtio-id={DEVICE},num_vqs=3,vq_size=256,config_size=12"
    );
    command.args(["-chardev", &socket, "-device", &device]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let console = BufReader::new(child.stdout.take().ok_or("no pipe")?);
    let _qemu = Process(child);
    let (say, said) = mpsc::channel();
    std::thread::spawn(move || {
        for line in console.split(b'\n').map_while(Result::ok) {
            let _ = say.send(String::from_utf8_lossy(&line).trim().to_owned());
        }
    });
    let deadline = Instant::now() + LIMIT;
    let mut lines = Vec::new();
    loop {
        match said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => lines.push(line),
            Err(RecvTimeoutError::Disconnected) => return Ok(lines),
            Err(RecvTimeoutError::Timeout) => {
                lines.push(format!("(and then nothing for {} s)", LIMIT.as_secs()));
                return Ok(lines);
            }
        }
    }
}
