//! What the programs' command lines have in common: `pvgpu-proxyd`, `pvgpu-ctl` and `mini-vmm`.

use crate::sandbox::Sandbox;
use std::process::ExitCode;

/// The exit status for errors of usage and environment.
pub const USAGE: u8 = 2;

/// A value of `--sandbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SandboxChoice {
    /// Always.
    On,
    /// For debugging alone.
    Off,
}

impl SandboxChoice {
    /// What the option says; without it, what the environment says.
    pub fn sandbox(choice: Option<Self>) -> Sandbox {
        match choice {
            Some(Self::On) => Sandbox::On,
            Some(Self::Off) => Sandbox::Off,
            None => Sandbox::default(),
        }
    }
}

/// Help and version as they are; an error in one line that names the help to read, of the command if there is one of `commands`.
/// The program's exit code.
pub fn usage(error: &clap::Error, program: &str, commands: &[&str]) -> ExitCode {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let (text, command) = match error.kind() {
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let (last, others) = commands.split_last().unwrap_or((&"", &[]));
            let text = format!("say what to do: {} or {last}", others.join(", "));
            (text, None)
        }
        _ => (error.to_string(), std::env::args().nth(1)),
    };
    let command = command.filter(|word| commands.contains(&word.as_str()));
    let command = command.map_or_else(String::new, |word| format!("{word} "));
    let cause = text.split("\n\n").next().unwrap_or_default();
    let cause: Vec<&str> = cause.lines().map(str::trim).collect();
    let cause = cause.join(" ");
    let cause = cause.trim_start_matches("error: ");
    eprintln!("{program}: {cause}; see {program} {command}--help");
    ExitCode::from(USAGE)
}
