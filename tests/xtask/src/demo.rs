//! `cargo xtask demo`: the project in one command. Builds the VMM and the test guest, boots it on this machine's KVM with
//! the embedded GPU, and writes the picture that the guest has drawn.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::programs::{self, DEMO, TEST_GUEST};

/// What the demo can be told.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code 0: the picture is there. 1: the guest failed. 2: this machine lacks something, or FILE cannot be \
written."
)]
pub struct Arguments {
    /// Where the picture goes
    #[arg(long, value_name = "FILE", default_value = "demo.png")]
    output: PathBuf,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    if let Err(reason) = kvm() {
        eprintln!("error: {reason}");
        return ExitCode::from(2);
    }
    eprintln!("Building the VMM and the test guest ...");
    let built = match programs::build(&[DEMO, TEST_GUEST]) {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let path = |program| {
        let built = built.iter().find(|built| built.program == program);
        built.map(|built| built.path.clone()).unwrap_or_default()
    };
    let status = Command::new(path(DEMO))
        .arg(path(TEST_GUEST))
        .arg(&arguments.output)
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) if status.code() == Some(2) => ExitCode::from(2),
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: cannot start the demo: {error}");
            ExitCode::from(2)
        }
    }
}

/// Why this machine cannot run a VM, and what to do about it.
pub fn kvm() -> Result<(), String> {
    let testbed = "`cargo xtask testbed` needs no KVM: it brings its own machine";
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(format!(
            "this machine has no /dev/kvm: enable virtualization in its firmware, or nested virtualization in its host; {testbed}"
        )),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(format!(
            "you may not open /dev/kvm: join the group kvm (sudo usermod -aG kvm $USER, then log in again); {testbed}"
        )),
        Err(error) => Err(format!("cannot open /dev/kvm: {error}; {testbed}")),
    }
}
