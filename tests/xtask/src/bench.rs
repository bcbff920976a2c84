//! `cargo xtask bench`: measures round trips and bandwidths in a guest and prints a table, every number beside its floor. The
//! program `bench` measures, here on the embedded GPU and in the testbed on the real virtio_gpu driver; this file starts
//! it and draws the table. `docs/performance.md` explains it to people.

use std::fmt::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::command::{self, CommandError};
use crate::programs::{self, BuildError};
use crate::say::say;
use crate::testbed;

/// What `cargo xtask bench` can be told.
#[derive(clap::Args)]
#[command(
    after_help = "Boots the test guest and measures, with the guest's clock, what requests, copies and doorbells cost. \
Beside each number stands its floor, measured by the same guest in the same run: what any proxy could reach at best.\n\n\
Absolute times depend on the machine and on what else it does: compare ratios, on a machine that is quiet. No number \
makes this task fail; a missing one does.\n\n\
Exit code 0: everything was measured; 1: something was not. docs/performance.md says more; for what the proxy alone \
takes: `cargo bench -p pvgpu-host-proxy`."
)]
pub struct Arguments {
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,

    /// Measure only on this machine or only in the testbed
    #[arg(long, value_name = "WHERE")]
    only: Option<Place>,

    /// Batches of each measurement
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// Where to measure.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Place {
    /// On the KVM of this machine, with the embedded GPU
    Here,
    /// In a virtual machine with a real GPU driver and nested KVM, emulated by QEMU
    Testbed,
}

/// Most seconds that the testbed may take.
const TESTBED_LIMIT: Duration = Duration::from_secs(600);

/// All numbers of one machine.
#[derive(Serialize)]
struct Results {
    place: Place,
    host: Host,
    lines: Vec<Line>,
}

/// As `tests/e2e/src/bench/host.rs` writes it.
#[derive(Serialize, Deserialize)]
struct Host {
    processor: String,
    processors: usize,
    kernel: String,
    kvm: String,
    load: String,
}

/// As `tests/e2e/src/bench.rs` writes it.
#[derive(Serialize, Deserialize)]
struct Line {
    group: String,
    title: String,
    run: String,
    median_ns: f64,
    best_ns: f64,
    floor: Option<Floor>,
    ratio: Option<f64>,
    bytes: Option<u64>,
    doorbells: Option<f64>,
    goal: Option<Goal>,
}

#[derive(Serialize, Deserialize)]
struct Floor {
    title: String,
    best_ns: f64,
}

#[derive(Serialize, Deserialize)]
struct Goal {
    words: String,
    met: bool,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Testbed(#[from] testbed::Error),
    #[error("measuring failed: see above{0}")]
    Failed(&'static str),
    #[error("`bench` wrote no JSON ({0}): are it and xtask of the same version?")]
    Json(#[from] serde_json::Error),
    #[error("`bench` ended without a line of the table: see above")]
    Empty,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    let measure = || -> Result<Vec<Results>, Error> {
        let mut all = Vec::new();
        if arguments.only != Some(Place::Testbed) {
            all.push(here(arguments.rounds)?);
        }
        if arguments.only != Some(Place::Here) {
            all.push(in_testbed(arguments.rounds)?);
        }
        Ok(all)
    };
    match measure() {
        Ok(all) if arguments.json => {
            say!("{}", serde_json::json!({ "machines": all }));
            ExitCode::SUCCESS
        }
        Ok(all) => {
            all.iter().for_each(|results| say!("{}", table(results)));
            say!(
                "Times vary with the machine and with what else it does; ratios are what to compare. Best and median are of \
                 {} batches,\nratios are of the best. docs/performance.md says how each is measured.",
                arguments.rounds
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cargo xtask bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn here(rounds: u32) -> Result<Results, Error> {
    eprintln!("bench: building the guest and the program that measures");
    let built = programs::build(&[programs::BENCH, programs::TEST_GUEST, programs::PROXYD])?;
    let [bench, guest, daemon] = &built[..] else {
        return Err(Error::Empty);
    };
    eprintln!("bench: measuring on this machine");
    let mut command = Command::new(&bench.path);
    command.arg("--guest").arg(&guest.path);
    command.arg("--daemon").arg(&daemon.path).args([
        "--driver",
        "soft",
        "--rounds",
        &rounds.to_string(),
    ]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| command::not_started(&command, error))?;
    if !output.status.success() {
        return Err(Error::Failed(
            "; without KVM, `cargo xtask bench --only testbed` measures",
        ));
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    results(Place::Here, text.lines())
}

fn in_testbed(rounds: u32) -> Result<Results, Error> {
    let machine = testbed::prepare()?;
    eprintln!("bench: measuring in the testbed");
    let guest = format!("/boot/{}", programs::TEST_GUEST.name);
    let daemon = format!("/bin/{}", programs::PROXYD.name);
    let rounds = rounds.to_string();
    let words = [
        programs::BENCH.name,
        "--guest",
        &guest,
        "--daemon",
        &daemon,
        "--driver",
        "virtio_gpu",
        "--rounds",
        &rounds,
    ];
    let mut lines = Vec::new();
    let ended = machine.run(&words, TESTBED_LIMIT, TESTBED_LIMIT, |line| {
        if line.starts_with('{') {
            lines.push(line.to_owned());
        } else {
            eprintln!("{line}");
        }
    })?;
    match ended {
        testbed::Ended::Code(0) => results(Place::Testbed, lines.iter().map(String::as_str)),
        _ => Err(Error::Failed(
            "; `cargo xtask testbed --shell` gives a console there",
        )),
    }
}

/// Reads what `bench` wrote: the machine, then the lines.
fn results<'a>(place: Place, mut lines: impl Iterator<Item = &'a str>) -> Result<Results, Error> {
    let host = serde_json::from_str(lines.next().ok_or(Error::Empty)?)?;
    let lines: Vec<Line> = lines
        .map(serde_json::from_str)
        .collect::<Result<_, serde_json::Error>>()?;
    if lines.is_empty() {
        return Err(Error::Empty);
    }
    Ok(Results { place, host, lines })
}

/// The table: one heading per group, in the order in which they first appear.
fn table(results: &Results) -> String {
    let host = &results.host;
    let place = match results.place {
        Place::Here => "This machine, embedded GPU",
        Place::Testbed => {
            "Testbed, virtio_gpu driver of the kernel (QEMU emulates every processor)"
        }
    };
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{place}\n{} x {}, Linux {}, {}, load {}\n",
        host.processors,
        host.processor,
        host.kernel,
        kvm(&host.kvm),
        host.load
    );
    let width = results.lines.iter().map(|line| line.title.len()).max();
    let width = width.unwrap_or(0) + 2;
    let _ = writeln!(
        text,
        "{:width$} {:>11} {:>11} {:>11} {:>9} {:>9}  goal",
        "", "best", "median", "floor", "ratio", "doorbells"
    );
    let mut groups: Vec<&str> = Vec::new();
    for line in &results.lines {
        if !groups.contains(&line.group.as_str()) {
            groups.push(&line.group);
        }
    }
    for group in groups {
        let _ = writeln!(text, "{group}");
        for line in results.lines.iter().filter(|line| line.group == group) {
            let amount = |nanoseconds| match line.bytes {
                Some(bytes) => bandwidth(bytes as f64 / nanoseconds),
                None => time(nanoseconds),
            };
            let floor = line.floor.as_ref();
            let floor = floor.map_or_else(String::new, |floor| amount(floor.best_ns));
            let number = |value: Option<f64>| match value {
                Some(value) if value < 100.0 => format!("{value:.2}"),
                Some(value) => format!("{value:.0}"),
                None => String::new(),
            };
            let goal = line.goal.as_ref().map_or_else(String::new, |goal| {
                let verdict = if goal.met { "met" } else { "MISSED" };
                format!("  {}: {verdict}", goal.words)
            });
            let row = format!(
                "  {:width$}{:>10} {:>11} {floor:>11} {:>9} {:>9}{goal}",
                line.title,
                amount(line.best_ns),
                amount(line.median_ns),
                number(line.ratio),
                number(line.doorbells),
                width = width - 1,
            );
            let _ = writeln!(text, "{}", row.trim_end());
        }
    }
    text
}

fn kvm(module: &str) -> String {
    match module {
        "kvm_intel" => "KVM on VMX".to_owned(),
        "kvm_amd" => "KVM on SVM".to_owned(),
        "kvm_pvm" => "KVM in software (PVM)".to_owned(),
        other => format!("KVM of kind {other}"),
    }
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        0.0..1e3 => format!("{nanoseconds:.0} ns"),
        1e3..1e4 => format!("{:.2} us", nanoseconds / 1e3),
        1e4..1e6 => format!("{:.1} us", nanoseconds / 1e3),
        _ => format!("{:.2} ms", nanoseconds / 1e6),
    }
}

/// Bytes per nanosecond are gigabytes per second.
fn bandwidth(gigabytes: f64) -> String {
    match gigabytes {
        0.0..1.0 => format!("{:.0} MB/s", gigabytes * 1e3),
        _ => format!("{gigabytes:.1} GB/s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str =
        r#"{"processor":"P","processors":2,"kernel":"6","kvm":"kvm_amd","load":"0.1"}"#;

    #[test]
    fn the_table_has_every_line_under_its_group_with_its_floor_and_its_verdict() {
        let line = |group: &str, title: &str, met: bool| {
            format!(
                r#"{{"group":"{group}","title":"{title}","run":"r","median_ns":2500.0,"best_ns":2000.0,
                "floor":{{"title":"f","best_ns":500.0}},"ratio":4.0,"bytes":null,"doorbells":1.0,
                "goal":{{"words":"<= 3 x floor","met":{met}}}}}"#
            )
        };
        let lines = [
            line("one", "first", true),
            line("two", "second", false),
            line("one", "third", true),
        ];
        let lines = std::iter::once(HOST).chain(lines.iter().map(String::as_str));
        let table = table(&results(Place::Here, lines).unwrap());
        let place = |text: &str| {
            table
                .find(text)
                .unwrap_or_else(|| panic!("{text}: {table}"))
        };
        assert!(place("one") < place("first") && place("first") < place("third"));
        assert!(place("third") < place("two") && place("two") < place("second"));
        assert!(table.contains("KVM on SVM"), "{table}");
        let second = table.lines().find(|line| line.contains("second")).unwrap();
        for word in ["2.00 us", "2.50 us", "500 ns", "4.00", "MISSED"] {
            assert!(second.contains(word), "{word}: {second}");
        }
    }

    #[test]
    fn a_run_without_numbers_is_an_error() {
        assert!(results(Place::Here, std::iter::empty()).is_err());
        assert!(results(Place::Here, [HOST].into_iter()).is_err());
        assert!(results(Place::Here, [HOST, "{}"].into_iter()).is_err());
    }
}
