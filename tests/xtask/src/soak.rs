//! `cargo xtask soak`: a mixed load for minutes or hours, after which everything must be as it was before. Builds the program that
//! makes it (`tests/e2e/src/bin/soak.rs`), the VMM and the test guest, and starts it.

use std::process::{Command, ExitCode};

use crate::demo;
use crate::programs::{self, MINI_VMM, SOAK, TEST_GUEST};

/// How long and how.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code 0: descriptors, mappings, threads and memory returned to the base line, every picture was the same. 1: not. \
2: this machine lacks something."
)]
pub struct Arguments {
    /// How long the load lasts
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: u32,
    /// What the random choices come from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object at the end; what goes on is told on standard error
    #[arg(long)]
    json: bool,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    if let Err(reason) = demo::kvm() {
        eprintln!("error: {reason}");
        return ExitCode::from(2);
    }
    eprintln!("Building the VMM, the test guest and the load ...");
    let built = match programs::build(&[SOAK, MINI_VMM, TEST_GUEST]) {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let [soak, mini_vmm, guest] = [0, 1, 2].map(|index| &built[index].path);
    let mut command = Command::new(soak);
    command.arg(mini_vmm).arg(guest);
    command.args([
        arguments.minutes.to_string(),
        arguments.seed.to_string(),
        if arguments.json { "json" } else { "text" }.to_owned(),
    ]);
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) if status.code() == Some(2) => ExitCode::from(2),
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: cannot start the load: {error}");
            ExitCode::from(2)
        }
    }
}
