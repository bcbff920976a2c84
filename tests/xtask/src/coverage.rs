//! `cargo xtask coverage`: which lines the tests run of the code that a guest's bytes go through first. For whoever changes
//! that code, or its tests. rustc counts (`-C instrument-coverage`), the `llvm-cov` of Debian reads.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::command::{self, CommandError};
use crate::packages::{self, PackageError};
use crate::say::say;
use crate::test_programs::{Build, TestBuildError};

/// What is measured: files, and folders of that name beside them.
const MODULES: &[&str] = &[
    "protocol/src/control",
    "protocol/src/layout",
    "protocol/src/schema",
    "protocol/src/wire",
    "host-proxy/src/aperture",
    "host-proxy/src/call",
    "host-proxy/src/descriptor",
    "host-proxy/src/device",
    "host-proxy/src/event",
    "host-proxy/src/session",
    "host-proxy/src/shadow",
    "host-proxy/src/virtqueue",
];

/// Which tests run: all but those that run none of these modules in their own process.
const TESTS: &[&str] = &[
    "--workspace",
    "--exclude=xtask",
    "--exclude=pvgpu-gles",
    "--exclude=pvgpu-test-guest",
    "--lib",
    "--bins",
    "--tests",
];

/// How the result is shown.
#[derive(clap::Args)]
#[command(
    after_help = "Not counted: files of tests, the modules `tests` at the end of files, and each `const fn` that no test calls: the \
compiler runs those, to make the tables.\n\n\
Exit code 0: the goal is reached. 1: it is not, or a test failed. 2: it could not be measured."
)]
pub struct Arguments {
    /// Show each line that no test runs
    #[arg(long)]
    uncovered: bool,
    /// Print one JSON object in place of the table
    #[arg(long)]
    json: bool,
    /// Percent of all lines together that tests should run
    #[arg(long, value_name = "PERCENT", default_value_t = 95.0)]
    goal: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
enum CoverageError {
    #[error(transparent)]
    Build(#[from] TestBuildError),
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("`rustc -vV` does not say which LLVM it has: is it rustup's?")]
    Llvm,
    #[error("cannot use {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "no file of {0} was measured: is it still there? see MODULES in tests/xtask/src/coverage.rs"
    )]
    Missing(&'static str),
}

/// A file's lines of code, and how often each was run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lines(BTreeMap<u32, u64>);

impl Lines {
    fn run(&self) -> usize {
        self.0.values().filter(|count| **count > 0).count()
    }

    fn percent(&self) -> f64 {
        percent(self.run(), self.0.len())
    }

    /// The lines that were not run, neighbours together.
    fn uncovered(&self) -> Vec<RangeInclusive<u32>> {
        let mut ranges: Vec<RangeInclusive<u32>> = Vec::new();
        for line in self
            .0
            .iter()
            .filter(|(_, count)| **count == 0)
            .map(|(line, _)| *line)
        {
            match ranges.last_mut() {
                Some(last) if *last.end() + 1 == line => *last = *last.start()..=line,
                _ => ranges.push(line..=line),
            }
        }
        ranges
    }
}

fn percent(part: usize, whole: usize) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let measured = fs::canonicalize(&workspace)
        .map_err(|source| file_error(&workspace, source))
        .and_then(|workspace| Ok((measure(&workspace)?, workspace)));
    let ((files, failed), workspace) = match measured {
        Ok(measured) => measured,
        Err(error) => {
            eprintln!("cargo xtask coverage: {error}");
            return ExitCode::from(2);
        }
    };
    let all: usize = files.values().map(|lines| lines.0.len()).sum();
    let ran: usize = files.values().map(Lines::run).sum();
    match arguments.json {
        true => say!("{}", json(&files, all, ran)),
        false => {
            table(&files, all, ran);
            if arguments.uncovered {
                list_uncovered(&files, &workspace);
            }
        }
    }
    for name in &failed {
        eprintln!("FAILED {name}: run `cargo test` to see why");
    }
    let short = percent(ran, all) < arguments.goal;
    if short {
        eprintln!(
            "below the goal of {} %: --uncovered shows what is missing",
            arguments.goal
        );
    }
    match short || !failed.is_empty() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

fn table(files: &BTreeMap<String, Lines>, all: usize, ran: usize) {
    say!("{:42} {:>6} {:>6} {:>7}", "file", "lines", "run", "%");
    for (file, lines) in files {
        say!(
            "{file:42} {:6} {:6} {:7.1}",
            lines.0.len(),
            lines.run(),
            lines.percent()
        );
    }
    say!("{:42} {all:6} {ran:6} {:7.1}", "all", percent(ran, all));
}

fn list_uncovered(files: &BTreeMap<String, Lines>, workspace: &Path) {
    for (file, lines) in files {
        let source = fs::read_to_string(workspace.join(file)).unwrap_or_default();
        let text = |line: u32| source.lines().nth(line as usize - 1).unwrap_or_default();
        for line in lines.uncovered().into_iter().flatten() {
            say!("{file}:{line}: {}", text(line).trim());
        }
    }
}

fn json(files: &BTreeMap<String, Lines>, all: usize, ran: usize) -> serde_json::Value {
    let file = |(name, lines): (&String, &Lines)| {
        let uncovered: Vec<[u32; 2]> = lines
            .uncovered()
            .iter()
            .map(|range| [*range.start(), *range.end()])
            .collect();
        serde_json::json!({
            "file": name, "lines": lines.0.len(), "run": lines.run(), "percent": lines.percent(), "uncovered": uncovered
        })
    };
    let files: Vec<_> = files.iter().map(file).collect();
    serde_json::json!({ "files": files, "lines": all, "run": ran, "percent": percent(ran, all) })
}

/// Builds and runs the tests; the measured files by their paths in the workspace, and the tests' programs that failed.
fn measure(workspace: &Path) -> Result<(BTreeMap<String, Lines>, Vec<String>), CoverageError> {
    let llvm = llvm()?;
    packages::install_missing(&[&format!("llvm-{llvm}")])?;
    let build = Build {
        folder: Some("coverage"),
        toolchain: None,
        flags: &["-Cinstrument-coverage"],
        which: TESTS,
    };
    let programs = build.run()?;

    let target = build.target()?;
    let profiles = target.join("profiles");
    let _ = fs::remove_dir_all(&profiles);
    fs::create_dir_all(&profiles).map_err(|source| file_error(&profiles, source))?;
    let mut failed = Vec::new();
    for program in programs.iter().filter(|program| program.tests) {
        // One file for each program, which its processes take turns to add to.
        let mut command = program.command(&[]);
        command
            .arg("--quiet")
            // The counters are written by the process itself.
            .env("PVGPU_SANDBOX", "off")
            .env("LLVM_PROFILE_FILE", profiles.join("%m.profraw"));
        if command::capture(&mut command).is_err() {
            failed.push(program.name.clone());
        }
    }

    let merged = target.join("tests.profdata");
    let raw = fs::read_dir(&profiles).map_err(|source| file_error(&profiles, source))?;
    let raw: Vec<PathBuf> = raw.flatten().map(|entry| entry.path()).collect();
    let mut merge = Command::new(format!("llvm-profdata-{llvm}"));
    merge
        .args(["merge", "-sparse", "-o"])
        .arg(&merged)
        .args(&raw);
    command::capture(&mut merge)?;
    let mut export = Command::new(format!("llvm-cov-{llvm}"));
    export
        .args(["export", "--format=lcov", "--instr-profile"])
        .arg(&merged);
    for program in &programs {
        export.arg("--object").arg(&program.path);
    }
    export.arg("--sources");
    export.args(["protocol/src", "host-proxy/src"].map(|folder| workspace.join(folder)));
    let exported = command::text(&mut export)?;

    let mut files = BTreeMap::new();
    for (path, mut lines) in lines_of(&exported) {
        let Some(file) = Path::new(&path)
            .strip_prefix(workspace)
            .ok()
            .and_then(Path::to_str)
        else {
            continue;
        };
        if module(file).is_none() {
            continue;
        }
        let source =
            fs::read_to_string(&path).map_err(|source| file_error(Path::new(&path), source))?;
        leave_out(&mut lines, &source);
        if !lines.0.is_empty() {
            files.insert(file.to_owned(), lines);
        }
    }
    for wanted in MODULES {
        if !files.keys().any(|file| module(file) == Some(wanted)) {
            return Err(CoverageError::Missing(wanted));
        }
    }
    Ok((files, failed))
}

fn file_error(path: &Path, source: io::Error) -> CoverageError {
    CoverageError::File {
        path: path.to_owned(),
        source,
    }
}

/// The version of LLVM whose tools understand what this rustc counts.
fn llvm() -> Result<u32, CoverageError> {
    let version = command::text(Command::new("rustc").arg("-vV"))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "));
    let major = llvm.and_then(|version| version.split('.').next()?.parse().ok());
    major.ok_or(CoverageError::Llvm)
}

/// The one of [`MODULES`] that a file belongs to. Files of tests belong to none.
fn module(file: &str) -> Option<&'static &'static str> {
    if file.ends_with("/tests.rs") || file.contains("/tests/") {
        return None;
    }
    MODULES.iter().find(|module| {
        let rest = file.strip_prefix(**module);
        rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    })
}

/// Leaves out a file's tests, and what the compiler runs.
fn leave_out(lines: &mut Lines, source: &str) {
    if let Some(tests) = tests_start(source) {
        lines.0.retain(|line, _| *line < tests);
    }
    for function in const_functions(source) {
        if lines
            .0
            .range(function.clone())
            .all(|(_, count)| *count == 0)
        {
            lines.0.retain(|line, _| !function.contains(line));
        }
    }
}

/// The line from which on a file has only its tests.
fn tests_start(source: &str) -> Option<u32> {
    let mut lines = source.lines().zip(1..).peekable();
    while let Some((line, number)) = lines.next() {
        let module = |next: &str| {
            next.trim_start_matches("pub(super) ")
                .starts_with("mod tests")
        };
        if line == "#[cfg(test)]" && lines.peek().is_some_and(|(next, _)| module(next)) {
            return Some(number);
        }
    }
    None
}

/// The lines of each `const fn`: rustfmt puts its last brace below its first letter.
fn const_functions(source: &str) -> Vec<RangeInclusive<u32>> {
    let mut functions = Vec::new();
    let mut open: Option<(u32, String)> = None;
    for (line, number) in source.lines().zip(1..) {
        let text = line.trim_start();
        let head = text
            .trim_start_matches("pub(super) ")
            .trim_start_matches("pub(crate) ");
        if head.trim_start_matches("pub ").starts_with("const fn ") {
            let indent = &line[..line.len() - text.len()];
            open = Some((number, format!("{indent}}}")));
        }
        if let Some((start, end)) = &open
            && (line == end || line.ends_with(" {}"))
        {
            functions.push(*start..=number);
            open = None;
        }
    }
    functions
}

/// The files in what `llvm-cov export --format=lcov` prints: `SF:` begins one, `DA:` is a line and its count.
fn lines_of(lcov: &str) -> BTreeMap<String, Lines> {
    let mut files: BTreeMap<String, Lines> = BTreeMap::new();
    let mut current = None;
    for line in lcov.lines() {
        if let Some(path) = line.strip_prefix("SF:") {
            current = Some(files.entry(path.to_owned()).or_default());
        } else if let (Some(data), Some(lines)) = (line.strip_prefix("DA:"), &mut current) {
            let mut numbers = data.split(',').map(str::parse::<u64>);
            if let (Some(Ok(line)), Some(Ok(count))) = (numbers.next(), numbers.next())
                && let Ok(line) = u32::try_from(line)
            {
                *lines.0.entry(line).or_default() += count;
            }
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_counts_are_read_and_neighbours_stand_together() {
        let files = lines_of(
            "SF:/w/a.rs\nFN:1,f\nDA:1,2\nDA:2,0\nDA:3,0\nDA:5,0\nend_of_record\nSF:/w/b.rs\nDA:1,1\n",
        );
        let a = &files["/w/a.rs"];
        assert_eq!((a.0.len(), a.run()), (4, 1));
        assert_eq!(a.uncovered(), [2..=3, 5..=5]);
        assert_eq!(files["/w/b.rs"].percent(), 100.0);
    }

    #[test]
    fn tests_are_not_counted() {
        assert_eq!(
            tests_start("fn f() {}\n#[cfg(test)]\nmod tests {\n"),
            Some(2)
        );
        assert_eq!(tests_start("#[cfg(test)]\nfn f() {}\n"), None);
        assert_eq!(module("host-proxy/src/session/tests.rs"), None);
        assert_eq!(
            module("host-proxy/src/session.rs"),
            Some(&"host-proxy/src/session")
        );
        assert_eq!(
            module("host-proxy/src/session/fair.rs"),
            Some(&"host-proxy/src/session")
        );
        assert_eq!(module("host-proxy/src/devices.rs"), None);
    }

    #[test]
    fn a_const_fn_is_counted_only_if_a_test_calls_it() {
        let source = "    pub const fn f(\n    ) {\n        if a {\n        }\n    }\nconst fn g() {\n}\nfn h() {\n}\n";
        assert_eq!(const_functions(source), [1..=5, 6..=7]);
        let mut lines = Lines((1..=9).map(|line| (line, u64::from(line == 7))).collect());
        leave_out(&mut lines, source);
        assert_eq!(lines.0.keys().copied().collect::<Vec<_>>(), [6, 7, 8, 9]);
    }
}
