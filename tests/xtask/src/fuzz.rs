//! `cargo xtask fuzz [TARGET]`: builds the fuzz targets of `tests/fuzz` with the nightly toolchain, and runs them.
//!
//! All programs are built at once, with AddressSanitizer, debug assertions and overflow checks. Each then runs for a while on
//! its own: libFuzzer, which every program contains, finds inputs that reach new code and keeps them in `target/fuzz`. What it
//! reports is gathered into one line per target. `docs/fuzzing.md` says what to do with a finding.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use crate::command::{self, CommandError};
use crate::packages;
use crate::programs;
use crate::say::say;

/// Which targets, and for how long.
#[derive(clap::Args)]
#[command(
    after_help = "Columns: inputs tried, and that per second; edges of the code that were reached (libFuzzer's cov) and how \
differently (ft); inputs kept for that; findings.\n\n\
Inputs start from tests/fuzz/corpus and tests/fuzz/regressions; new ones are kept in target/fuzz/corpus. The output of each run \
is in target/fuzz/log.\n\n\
Exit code 0: no finding. 1: there is one. 2: the targets could not be built or run. docs/fuzzing.md says more."
)]
pub struct Arguments {
    /// Which target; all of them, one after the other, if none is named
    #[arg(value_name = "TARGET")]
    target: Option<String>,
    /// List the targets and exit
    #[arg(long)]
    list: bool,
    /// How long to run each
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// How many targets to run at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Run one input, such as a finding, and say what happens
    #[arg(long, value_name = "FILE", requires = "target")]
    replay: Option<PathBuf>,
    /// Make a finding as small as it gets, within --seconds
    #[arg(
        long,
        value_name = "FILE",
        requires = "target",
        conflicts_with = "replay"
    )]
    minimize: Option<PathBuf>,
    /// Put a smallest set of the inputs found so far into tests/fuzz/corpus
    #[arg(long, conflicts_with_all = ["replay", "minimize"])]
    merge: bool,
    /// Print a JSON object per target instead of the table
    #[arg(long)]
    json: bool,
}

/// Why fuzzing could not begin.
#[derive(Debug, thiserror::Error)]
enum FuzzError {
    #[error("there is no target `{0}`: `cargo xtask fuzz --list` shows them")]
    Unknown(String),
    #[error(
        "fuzzing needs the nightly toolchain ({0}): `rustup toolchain install nightly --profile minimal`"
    )]
    Toolchain(CommandError),
    #[error(transparent)]
    Package(#[from] packages::PackageError),
    #[error("the targets do not build: see above")]
    Build,
    #[error(transparent)]
    Directory(#[from] programs::BuildError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("{0}: {1}; is the disk full, or not yours?")]
    File(PathBuf, std::io::Error),
}

/// What the compiler is told beside optimizing: libFuzzer's instrumentation (edges counted in place, the program counters of
/// all edges, comparisons reported), AddressSanitizer, and every check that the code has.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address \
    -Cdebug-assertions=yes -Coverflow-checks=yes --cfg fuzzing";

/// The sanitizers need to know it: nothing built for the host, such as build scripts, may be instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Most bytes of an input. Longer ones are slow, and every limit is reached with fewer.
const INPUT_MAX: u32 = 4096;

/// An input that takes this long in seconds is a finding: no guest may keep the proxy busy.
const PATIENCE: u32 = 20;

/// Memory in MiB beyond which a target has run away with it.
const MEMORY_MAX: u32 = 2048;

/// Most bytes of the inputs that the repository keeps for a target.
const CORPUS_MAX: u64 = 100 << 10;

/// Where everything of fuzzing is.
struct Places {
    /// `tests/fuzz`.
    sources: PathBuf,
    /// `target/fuzz`.
    output: PathBuf,
}

/// What a run of a target has shown.
#[derive(Default, serde::Serialize)]
struct Outcome {
    target: String,
    seconds: u64,
    executions: u64,
    executions_per_second: u64,
    /// Edges that were reached.
    coverage: u64,
    /// Edges by how often, and comparisons by how close.
    features: u64,
    /// Inputs kept.
    corpus: u64,
    /// Files with inputs that end in a crash, a leak, or take too long or too much memory.
    findings: Vec<PathBuf>,
    /// Why it ended without any.
    failure: Option<String>,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    match fuzz(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cargo xtask fuzz: {error}");
            ExitCode::from(2)
        }
    }
}

/// All targets for `seconds` each, two at a time: the step of `cargo xtask test`.
pub fn all(seconds: u64) -> ExitCode {
    run(&Arguments {
        target: None,
        list: false,
        seconds,
        jobs: 2,
        replay: None,
        minimize: None,
        merge: false,
        json: false,
    })
}

fn fuzz(arguments: &Arguments) -> Result<ExitCode, FuzzError> {
    let places = Places::find()?;
    let known = places.targets()?;
    if arguments.list {
        for (name, what) in &known {
            say!("{name:14} {what}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut names: Vec<String> = known.into_iter().map(|(name, _)| name).collect();
    if let Some(target) = &arguments.target {
        if !names.contains(target) {
            return Err(FuzzError::Unknown(target.clone()));
        }
        names = vec![target.clone()];
    }
    let start = Instant::now();
    places.build()?;
    eprintln!("built in {:.0} s", start.elapsed().as_secs_f64());
    match (&arguments.replay, &arguments.minimize) {
        (Some(input), _) => return places.replay(&names[0], input),
        (_, Some(input)) => return places.minimize(&names[0], input, arguments.seconds),
        _ if arguments.merge => return places.merge(&names),
        _ => {}
    }
    if !arguments.json {
        say!(
            "{:14} {:>12} {:>10} {:>8} {:>8} {:>8} {:>9}",
            "target",
            "executions",
            "per second",
            "cov",
            "ft",
            "corpus",
            "findings"
        );
    }
    let waiting = Mutex::new(VecDeque::from(names));
    let next = || waiting.lock().ok().and_then(|mut names| names.pop_front());
    let clean = Mutex::new(true);
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1) {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let outcome = places.run(&name, arguments.seconds);
                    let passed = outcome.report(arguments.json);
                    if let (false, Ok(mut clean)) = (passed, clean.lock()) {
                        *clean = false;
                    }
                }
            });
        }
    });
    match clean.into_inner() {
        Ok(true) => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

impl Places {
    fn find() -> Result<Self, FuzzError> {
        Ok(Self {
            sources: Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz"),
            output: programs::target_directory()?.join("fuzz"),
        })
    }

    /// The names of all targets, sorted, each with the first line of its module's documentation.
    fn targets(&self) -> Result<Vec<(String, String)>, FuzzError> {
        let folder = self.sources.join("fuzz_targets");
        let mut targets = Vec::new();
        for path in files(&folder)? {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            let module = self.sources.join(format!("src/{name}.rs"));
            let text = std::fs::read_to_string(&module)
                .map_err(|error| FuzzError::File(module.clone(), error))?;
            let first = text.lines().next().unwrap_or_default();
            let what = first.trim_start_matches("//!").trim();
            targets.push((name.into_owned(), what.to_owned()));
        }
        Ok(targets)
    }

    /// Builds all programs at once: what they share is most of it.
    fn build(&self) -> Result<(), FuzzError> {
        packages::install_missing(&["g++"])?;
        let rustup = || {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly"]);
            rustup
        };
        command::capture(rustup().args(["rustc", "--version"])).map_err(FuzzError::Toolchain)?;
        eprintln!("building the fuzz targets (the first time takes a few minutes)");
        let mut cargo = rustup();
        cargo
            .args(["cargo", "build", "--quiet", "--release", "--locked"])
            .args([
                "--package",
                "pvgpu-fuzz",
                "--features",
                "libfuzzer",
                "--bins",
            ])
            .args(["--target", TRIPLE, "--target-dir"])
            .arg(&self.output)
            .current_dir(&self.sources)
            .env("RUSTFLAGS", FLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        match cargo.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(_) => Err(FuzzError::Build),
            Err(error) => Err(command::not_started(&cargo, error).into()),
        }
    }

    /// The program of a target.
    fn program(&self, name: &str) -> Command {
        let mut program = Command::new(self.output.join(TRIPLE).join("release").join(name));
        program
            .arg(format!("-max_len={INPUT_MAX}"))
            // Long inputs from the start: short ones are no structured input at all.
            .arg("-len_control=0")
            .arg(format!("-timeout={PATIENCE}"))
            .arg(format!("-rss_limit_mb={MEMORY_MAX}"))
            .env("RUST_BACKTRACE", "1")
            // Freed memory is kept from reuse, which shows its users; with more of it, each new page costs a fault.
            .env("ASAN_OPTIONS", "quarantine_size_mb=16")
            .stdin(Stdio::null());
        program
    }

    /// A folder of `target/fuzz` for a target, made if it is not there.
    fn folder(&self, what: &str, name: &str) -> Result<PathBuf, FuzzError> {
        let folder = self.output.join(what).join(name);
        std::fs::create_dir_all(&folder).map_err(|error| FuzzError::File(folder.clone(), error))?;
        Ok(folder)
    }

    /// The inputs of a target that the repository keeps.
    fn kept(&self, name: &str) -> Vec<PathBuf> {
        ["corpus", "regressions"]
            .map(|what| self.sources.join(what).join(name))
            .into_iter()
            .filter(|folder| folder.is_dir())
            .collect()
    }

    /// Runs a target.
    fn run(&self, name: &str, seconds: u64) -> Outcome {
        let mut outcome = Outcome {
            target: name.to_owned(),
            ..Outcome::default()
        };
        let start = Instant::now();
        if let Err(error) = self.watch(name, seconds, &mut outcome) {
            outcome.failure = Some(error.to_string());
        }
        outcome.seconds = start.elapsed().as_secs();
        outcome
    }

    /// Runs a target to its end, and fills in what it says.
    fn watch(&self, name: &str, seconds: u64, outcome: &mut Outcome) -> Result<(), FuzzError> {
        let findings = self.folder("findings", name)?;
        let log = self.folder("log", name)?.join("latest.txt");
        let before = files(&findings)?;
        let mut program = self.program(name);
        program
            .arg(format!("-max_total_time={seconds}"))
            .arg("-print_final_stats=1")
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .arg(self.folder("corpus", name)?)
            .args(self.kept(name))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = program
            .spawn()
            .map_err(|error| command::not_started(&program, error))?;
        let mut text = Vec::new();
        let lines = BufReader::new(child.stderr.take().expect("it is piped")).split(b'\n');
        for line in lines.map_while(Result::ok) {
            outcome.read(&String::from_utf8_lossy(&line));
            text.extend_from_slice(&line);
            text.push(b'\n');
        }
        let status = child.wait();
        std::fs::write(&log, text).map_err(|error| FuzzError::File(log.clone(), error))?;
        outcome.findings = files(&findings)?;
        outcome.findings.retain(|file| !before.contains(file));
        if !status.is_ok_and(|status| status.success()) && outcome.findings.is_empty() {
            outcome.failure = Some(format!("it has failed: see {}", log.display()));
        }
        Ok(())
    }

    /// Runs one input and lets libFuzzer say what happens.
    fn replay(&self, name: &str, input: &Path) -> Result<ExitCode, FuzzError> {
        let mut program = self.program(name);
        program.arg(input);
        match program.status() {
            Ok(status) if status.success() => {
                say!("{name}: {} passes", input.display());
                Ok(ExitCode::SUCCESS)
            }
            Ok(status) => {
                say!("{name}: {} fails ({status}): see above", input.display());
                Ok(ExitCode::FAILURE)
            }
            Err(error) => Err(command::not_started(&program, error).into()),
        }
    }

    /// Makes a finding smaller, into a file beside it.
    fn minimize(&self, name: &str, input: &Path, seconds: u64) -> Result<ExitCode, FuzzError> {
        let smallest = input.with_extension("min");
        let mut program = self.program(name);
        program
            .args(["-minimize_crash=1", &format!("-max_total_time={seconds}")])
            .arg(format!("-exact_artifact_path={}", smallest.display()))
            .arg(input)
            .stderr(Stdio::null());
        program
            .status()
            .map_err(|error| command::not_started(&program, error))?;
        match std::fs::metadata(&smallest) {
            Ok(file) => {
                say!("{} bytes: {}", file.len(), smallest.display());
                Ok(ExitCode::SUCCESS)
            }
            Err(_) => {
                say!(
                    "{name}: {} does not fail, or gets no smaller",
                    input.display()
                );
                Ok(ExitCode::FAILURE)
            }
        }
    }

    /// Replaces the inputs that the repository keeps by the smallest set that reaches as much.
    fn merge(&self, names: &[String]) -> Result<ExitCode, FuzzError> {
        let mut within = true;
        for name in names {
            let kept = self.sources.join("corpus").join(name);
            let merged = self.output.join("merged").join(name);
            let _ = std::fs::remove_dir_all(&merged); // not there the first time
            let merged = self.folder("merged", name).map(|_| merged)?;
            let mut program = self.program(name);
            program
                .arg("-set_cover_merge=1")
                .arg(&merged)
                .arg(self.folder("corpus", name)?)
                .args(self.kept(name));
            command::capture(&mut program)?;
            let failed = |error| FuzzError::File(kept.clone(), error);
            std::fs::create_dir_all(&kept).map_err(failed)?;
            for old in files(&kept)? {
                std::fs::remove_file(old).map_err(failed)?;
            }
            let mut bytes = 0;
            let inputs = files(&merged)?;
            for new in &inputs {
                let name = new.file_name().unwrap_or_default();
                bytes += std::fs::copy(new, kept.join(name)).map_err(failed)?;
            }
            say!("{name:14} {} inputs, {bytes} bytes", inputs.len());
            if bytes > CORPUS_MAX {
                within = false;
                eprintln!(
                    "{name}: more than {CORPUS_MAX} bytes: take the largest ones out of {}",
                    kept.display()
                );
            }
        }
        Ok(if within {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

impl Outcome {
    /// Takes what a line of libFuzzer's output says: a status line every now and then, statistics at the end.
    fn read(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let statistic = line
            .strip_prefix("stat::")
            .and_then(|rest| rest.split_once(':'));
        if let Some((name, value)) = statistic {
            let value = value.trim().parse().unwrap_or(0);
            match name {
                "number_of_executed_units" => self.executions = value,
                "average_exec_per_sec" => self.executions_per_second = value,
                _ => {}
            }
        } else if line.starts_with('#') {
            while let Some(word) = words.next() {
                let number = words.clone().next().unwrap_or_default();
                let number = number
                    .split('/')
                    .next()
                    .and_then(|number| number.parse().ok());
                match (word, number) {
                    ("cov:", Some(number)) => self.coverage = number,
                    ("ft:", Some(number)) => self.features = number,
                    ("corp:", Some(number)) => self.corpus = number,
                    _ => {}
                }
            }
        }
    }

    /// Prints it, and says what to do with findings; whether there is none.
    fn report(&self, json: bool) -> bool {
        if json {
            match serde_json::to_string(self) {
                Ok(line) => say!("{line}"),
                Err(error) => eprintln!("cargo xtask fuzz: {error}"),
            }
        } else {
            say!(
                "{:14} {:12} {:10} {:8} {:8} {:8} {:9}",
                self.target,
                self.executions,
                self.executions_per_second,
                self.coverage,
                self.features,
                self.corpus,
                self.findings.len()
            );
        }
        for file in &self.findings {
            let (target, path) = (&self.target, file.display());
            eprintln!(
                "FINDING in {target}: {path}\n  \
                see it:        cargo xtask fuzz {target} --replay {path}\n  \
                make it small: cargo xtask fuzz {target} --minimize {path}\n  \
                then fix what it shows, and keep the input in tests/fuzz/regressions/{target} (docs/fuzzing.md)"
            );
        }
        if let Some(failure) = &self.failure {
            eprintln!("FAILED {}: {failure}", self.target);
        }
        self.findings.is_empty() && self.failure.is_none()
    }
}

/// The files of a folder, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>, FuzzError> {
    let failed = |error| FuzzError::File(folder.to_owned(), error);
    let mut files = std::fs::read_dir(folder)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_read() {
        let mut outcome = Outcome::default();
        for line in [
            "#2\tINITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 30Mb",
            "#4096\tpulse  cov: 123 ft: 456 corp: 78/9012b lim: 43 exec/s: 2048 rss: 41Mb",
            "stat::number_of_executed_units: 40960",
            "stat::average_exec_per_sec:     2000",
            "stat::new_units_added:          7",
        ] {
            outcome.read(line);
        }
        assert_eq!(
            (outcome.coverage, outcome.features, outcome.corpus),
            (123, 456, 78)
        );
        assert_eq!(
            (outcome.executions, outcome.executions_per_second),
            (40960, 2000)
        );
    }

    #[test]
    fn every_target_has_a_line_that_says_what_it_is_about() {
        let targets = Places::find().unwrap().targets().unwrap();
        assert!(targets.len() >= 8);
        assert!(targets.iter().all(|(_, what)| what.len() > 20));
    }
}
