//! `pvgpu-ctl`: shows what running proxies do, and switches their traces, through their control sockets.
//!
//! `docs/operations.md` is its manual. Asking is the library's ([`pvgpu_host_proxy::control`]); here are only the options and
//! what people and programs read.

mod prometheus;
mod report;
mod units;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use pvgpu_host_proxy::command_line::{USAGE, usage};
use pvgpu_host_proxy::control::{AskError, Command, Reply, ask};
use pvgpu_host_proxy::statistics::Statistics;

/// Exit status when a proxy says no.
const REFUSED: u8 = 1;

/// Shows what running pvgpu proxies do, and switches their traces.
#[derive(Debug, Parser)]
#[command(
    name = "pvgpu-ctl",
    version,
    after_help = "\
Exit status: 0 when done, 1 when the proxy refuses, 2 for errors of usage and when a proxy does not answer.
What each number means is in docs/operations.md."
)]
struct Options {
    /// Control socket of a proxy ('mini-vmm run --control SOCKET'); several may be given, but for 'trace'.
    #[arg(long, value_name = "SOCKET", global = true)]
    socket: Vec<PathBuf>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show the session, what it uses, and what was counted and timed since the proxy's start.
    Status {
        /// Print one JSON object per proxy, a line each.
        #[arg(long)]
        json: bool,
    },
    /// Show a line per proxy again and again: what came in each interval.
    Watch {
        /// Seconds between two looks.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = units::seconds)]
        interval: Duration,
        /// End after so many looks; without it, when no proxy answers any more.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// Print one JSON object per proxy and look, a line each.
        #[arg(long)]
        json: bool,
    },
    /// Print everything in Prometheus' text format (0.0.4).
    Prometheus,
    /// Record every request of a proxy in a file, from now on or no more.
    #[command(subcommand)]
    Trace(Trace),
}

#[derive(Debug, Subcommand)]
enum Trace {
    /// Begin: `cargo xtask trace FILE` prints what was recorded.
    Start {
        /// A new file.
        file: PathBuf,
        /// Most bytes of that file: it lacks the requests after them, which are counted.
        #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::parse_size)]
        limit: u64,
    },
    /// End. The file is complete afterwards.
    Stop,
}

/// Why the program does not end well: its exit status and one line.
struct Failure(u8, String);

impl From<AskError> for Failure {
    fn from(error: AskError) -> Self {
        let status = match error {
            AskError::Refused(_) => REFUSED,
            _ => USAGE,
        };
        Self(status, error.to_string())
    }
}

/// Nobody reads the output any more: the end, but no error.
struct Unread;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let commands = ["status", "watch", "prometheus", "trace"];
            return usage(&error, "pvgpu-ctl", &commands);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(status, message)) => {
            eprintln!("pvgpu-ctl: {message}");
            ExitCode::from(status)
        }
    }
}

fn run(options: &Options) -> Result<(), Failure> {
    let sockets = &options.socket;
    let Some(first) = sockets.first() else {
        let message = "which proxy? Give its --socket SOCKET; see pvgpu-ctl --help";
        return Err(Failure(USAGE, message.into()));
    };
    match &options.action {
        Action::Status { json } => once(sockets, |answered| {
            let text = |(socket, statistics): &(&Path, Statistics)| match json {
                true => report::json(socket, statistics, None),
                false => report::text(socket, statistics),
            };
            answered.iter().map(text).collect()
        }),
        Action::Prometheus => once(sockets, |answered| {
            prometheus::exposition(sockets, answered)
        }),
        Action::Watch {
            interval,
            count,
            json,
        } => watch(sockets, *interval, *count, *json),
        Action::Trace(_) if sockets.len() > 1 => {
            let message = "a trace is of one proxy: give one --socket";
            Err(Failure(USAGE, message.into()))
        }
        Action::Trace(Trace::Start { file, limit }) => start_trace(first, file, *limit),
        Action::Trace(Trace::Stop) => {
            ask(first, &Command::StopTrace, None)?;
            Ok(())
        }
    }
}

fn statistics(socket: &Path) -> Result<Statistics, AskError> {
    match ask(socket, &Command::Status, None)? {
        Reply::Status(statistics) => Ok(*statistics),
        _ => Err(AskError::Malformed(socket.display().to_string())),
    }
}

/// Asks all proxies and prints what is to be said of those that answer; the first one that does not is the failure.
fn once(
    sockets: &[PathBuf],
    text: impl FnOnce(&[(&Path, Statistics)]) -> String,
) -> Result<(), Failure> {
    let mut answered = Vec::new();
    let mut failure = None;
    for socket in sockets {
        match statistics(socket) {
            Ok(statistics) => answered.push((socket.as_path(), statistics)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let printed = print(&text(&answered))?;
    match (printed, failure) {
        (Ok(()), Some(error)) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Looks again and again, until `count` looks are done or no proxy answers.
fn watch(
    sockets: &[PathBuf],
    interval: Duration,
    count: Option<u64>,
    json: bool,
) -> Result<(), Failure> {
    let live = !json && io::stdout().is_terminal();
    let mut before: Vec<Option<(Instant, Statistics)>> = vec![None; sockets.len()];
    let mut looks = 0;
    loop {
        let mut text = String::new();
        let mut failures = Vec::new();
        for (socket, before) in sockets.iter().zip(&mut before) {
            let now = Instant::now();
            match statistics(socket) {
                Ok(statistics) => {
                    if let Some((then, earlier)) = before {
                        let interval = report::Interval::between(now - *then, earlier, &statistics);
                        text += &match json {
                            true => report::json(socket, &statistics, Some(&interval)),
                            false => report::row(socket, &statistics, &interval),
                        };
                    }
                    *before = Some((now, statistics));
                }
                Err(error) => {
                    *before = None;
                    if !json {
                        text += &report::row_without_answer(socket, &error);
                    }
                    failures.push(error);
                }
            }
        }
        if failures.len() == sockets.len() {
            return failures
                .into_iter()
                .next()
                .map_or(Ok(()), |error| Err(error.into()));
        }
        // The first look has nothing to be compared with.
        if looks > 0 {
            let heading = match (live, looks) {
                _ if json => String::new(),
                (true, _) => format!("\x1b[H\x1b[J{}", report::heading()),
                (false, 1) => report::heading(),
                (false, _) => String::new(),
            };
            if print(&(heading + &text))?.is_err() {
                return Ok(());
            }
        }
        if count == Some(looks) {
            return Ok(());
        }
        looks += 1;
        thread::sleep(interval);
    }
}

/// Makes the file, since the proxy cannot open any, and hands it over.
fn start_trace(socket: &Path, path: &Path, limit: u64) -> Result<(), Failure> {
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let file = file.map_err(|error| {
        let path = path.display();
        let message = format!("cannot make the trace {path}: {error}; give a new FILE in a directory that you can write to");
        Failure(USAGE, message)
    })?;
    let command = Command::StartTrace { limit };
    ask(socket, &command, Some(&file)).inspect_err(|_| {
        // Nothing was written to it, and it was not there before.
        let _ = std::fs::remove_file(path);
    })?;
    Ok(())
}

/// Writes to standard output.
fn print(text: &str) -> Result<Result<(), Unread>, Failure> {
    let mut output = io::stdout().lock();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Ok(()) => Ok(Ok(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Err(Unread)),
        Err(error) => {
            let message = format!(
                "cannot write to standard output: {error}; send it to a file or a program that takes it"
            );
            Err(Failure(USAGE, message))
        }
    }
}
