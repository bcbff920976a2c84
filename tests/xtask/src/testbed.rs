//! `cargo xtask testbed`: boots a virtual machine (L1) with real GPU drivers and nested KVM, and runs the
//! end-to-end tests in it.

use std::process::ExitCode;

use clap::Args;

/// What `cargo xtask testbed` can be told.
#[derive(Args)]
pub struct Arguments {}

/// Runs the task.
pub fn run(_arguments: &Arguments) -> ExitCode {
    eprintln!("cargo xtask testbed: nothing is built yet");
    ExitCode::FAILURE
}
