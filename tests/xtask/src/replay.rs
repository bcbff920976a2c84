//! `cargo xtask replay FILE`: the requests of a trace once more, in front of a fresh GPU, and what is different this time. What
//! is compared is `tests/e2e/src/replay.rs`.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use crate::programs::{self, REPLAY};

/// Which trace, on what.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code 0: every request had the result of the trace. 1: some had another one. 2: there is no trace or no GPU."
)]
pub struct Arguments {
    /// What `mini-vmm run --trace FILE` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// `soft` or `drm:NODE`
    #[arg(long, value_name = "GPU", default_value = "soft")]
    gpu: String,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let built = match programs::build(&[REPLAY]) {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let status = built.first().map(|program| {
        let mut command = Command::new(&program.path);
        command.arg(&arguments.file).arg(&arguments.gpu).status()
    });
    match status {
        Some(Ok(status)) if status.success() => ExitCode::SUCCESS,
        Some(Ok(status)) if status.code() == Some(1) => ExitCode::FAILURE,
        _ => ExitCode::from(2),
    }
}
