//! Programs that tasks run: start one, wait for it, and turn every way it can fail into one line.
//! Every task uses it; it never prints anything itself.

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

/// Why a program did not do what a task needed of it.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program is not there, or may not be started.
    #[error("cannot start `{program}`: {source}; is it installed and in PATH?")]
    Start {
        /// The program's name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The program ran and failed.
    #[error("`{line}` failed ({status}): {reason}")]
    Failed {
        /// The whole command line.
        line: String,
        /// The exit status in words.
        status: std::process::ExitStatus,
        /// The last line that it wrote to its standard error, or to its standard output.
        reason: String,
    },
}

/// Runs `command` to its end with captured output. An exit status other than 0 is an error.
pub fn capture(command: &mut Command) -> Result<Output, CommandError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| not_started(command, source))?;
    check(command, output)
}

/// Runs `command` to its end with `input` as its standard input, and gives its standard output.
pub fn filter(command: &mut Command, input: &[u8]) -> Result<Vec<u8>, CommandError> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| not_started(command, source))?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // A program that stops reading says why by its exit status.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        child.wait_with_output()
    });
    let output = output.map_err(|source| not_started(command, source))?;
    Ok(check(command, output)?.stdout)
}

/// The output of a program that has ended, or the error if it failed.
fn check(command: &Command, output: Output) -> Result<Output, CommandError> {
    if output.status.success() {
        return Ok(output);
    }
    let last_line = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.lines()
            .rfind(|line| !line.trim().is_empty())
            .map(|line| line.trim().to_owned())
    };
    Err(CommandError::Failed {
        line: line(command),
        status: output.status,
        reason: last_line(&output.stderr)
            .or_else(|| last_line(&output.stdout))
            .unwrap_or_else(|| "it said nothing".to_owned()),
    })
}

/// Like [`capture`], but gives the standard output as text.
pub fn text(command: &mut Command) -> Result<String, CommandError> {
    Ok(String::from_utf8_lossy(&capture(command)?.stdout).into_owned())
}

/// The error for a program that could not be started at all.
pub fn not_started(command: &Command, source: io::Error) -> CommandError {
    CommandError::Start {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    }
}

/// The command line, as a person would type it.
fn line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
