//! `cargo xtask linux-demo`: a stock Mesa in an unmodified Debian guest. Boots the testbed's machine, draws a scene there
//! natively and in a Linux guest on the same GPU, shows both consoles, and writes both pictures side by side. The program
//! `linux-demo` does it (`tests/e2e/src/bin/linux-demo.rs`); this file starts it and draws the table.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;

use crate::say::say;
use crate::testbed::{self, Ended};

/// What the demo can be told.
#[derive(clap::Args)]
#[command(
    after_help = "Needs neither a GPU nor KVM, but Debian: docs/testbed.md. The first run downloads and builds for some \
minutes.\n\n\
The rates are those of an emulated machine; what can be compared are ratios. docs/performance.md says more.\n\n\
Exit code 0: all frames of the guest are those drawn natively, and the picture is there. 1: they differ, or the guest \
failed. 2: this machine lacks something, or FILE cannot be written."
)]
pub struct Arguments {
    /// Where the picture goes: native on the left, the guest's on the right
    #[arg(long, value_name = "FILE", default_value = "linux-demo.png")]
    output: PathBuf,

    /// A scene of `gles --list`
    #[arg(long, value_name = "NAME", default_value = "framebuffers", value_parser = scene)]
    scene: String,

    /// How many frames are compared
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(2..=10000))]
    frames: u32,

    /// How long each of three measurements takes, natively and in the guest
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,

    /// Who handles the guest's requests
    #[arg(long, value_name = "HOW", default_value = "worker")]
    doorbell: Doorbell,

    /// The guest's kernel, one of those that the testbed has
    #[arg(long, value_name = "VERSION", default_value = "6.1", value_parser = clap::builder::PossibleValuesParser::new(testbed::GUESTS.iter().map(|(name, _)| *name)))]
    kernel: String,
}

/// As `mini-vmm run --doorbell` has it.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Doorbell {
    /// The vCPU that makes them
    Inline,
    /// A thread for each vCPU
    Worker,
}

/// Most seconds that the machine may take.
const LIMIT: Duration = Duration::from_secs(900);

/// A scene's name travels on kernel command lines.
fn scene(text: &str) -> Result<String, String> {
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase()) {
        true => Ok(text.to_owned()),
        false => Err("names of scenes are made of small letters".to_owned()),
    }
}

/// As `linux-demo` writes it.
#[derive(Deserialize)]
struct Report {
    native: Said,
    guest: Said,
    module_us: u64,
    frame: Frame,
}

#[derive(Deserialize)]
struct Said {
    renderer: String,
    frames: Vec<String>,
    rates: Rates,
}

#[derive(Deserialize)]
struct Rates {
    draw: f64,
    read: f64,
    processor: f64,
}

#[derive(Deserialize)]
struct Frame {
    requests: f64,
    doorbells: f64,
    interrupts: f64,
    exits: f64,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Testbed(#[from] testbed::Error),
    #[error("cannot write {path}: {source}; say with --output FILE where the picture may go")]
    Picture {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the demo failed: see above")]
    Failed,
    #[error("the demo did not end within {} s: {log} has the whole console", LIMIT.as_secs())]
    TimeLimit { log: PathBuf },
    #[error("the machine ended without a result ({reason}): {log} has the whole console")]
    NoResult { reason: String, log: PathBuf },
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    match demo(arguments) {
        Ok(report) => {
            say!("{}", table(&report));
            say!("The picture is in {}", arguments.output.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cargo xtask linux-demo: {error}");
            ExitCode::from(match error {
                Error::Testbed(_) | Error::Picture { .. } => 2,
                _ => 1,
            })
        }
    }
}

fn demo(arguments: &Arguments) -> Result<Report, Error> {
    let no_picture = |source| Error::Picture {
        path: arguments.output.clone(),
        source,
    };
    // Before a machine works for nobody.
    fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&arguments.output)
        .map_err(no_picture)?;
    let machine = testbed::prepare()?;
    let (frames, seconds) = (arguments.frames.to_string(), arguments.seconds.to_string());
    let doorbell = match arguments.doorbell {
        Doorbell::Inline => "inline",
        Doorbell::Worker => "worker",
    };
    let name = "linux-demo.png";
    let words = [
        "linux-demo",
        &arguments.scene,
        &frames,
        &seconds,
        doorbell,
        &arguments.kernel,
        &format!("/shared/{name}"),
    ];
    let mut report = None;
    let ended = machine.run(&words, LIMIT, LIMIT, |line| {
        if let Ok(found) = serde_json::from_str(line) {
            report = Some(found);
        } else if !testbed::is_kernel_message(line) {
            say!("{line}");
        }
    })?;
    let log = machine.console_log.clone();
    match (ended, report) {
        (Ended::Code(0), Some(report)) => {
            let picture = Path::new(&machine.shared).join(name);
            fs::copy(picture, &arguments.output).map_err(no_picture)?;
            Ok(report)
        }
        (Ended::Code(0), None) => Err(Error::NoResult {
            reason: "linux-demo said nothing".to_owned(),
            log,
        }),
        (Ended::Code(_), _) => Err(Error::Failed),
        (Ended::TimeLimit(_), _) => Err(Error::TimeLimit { log }),
        (Ended::NoCode(reason), _) => Err(Error::NoResult { reason, log }),
    }
}

/// The numbers, for people.
fn table(report: &Report) -> String {
    let (native, guest) = (&report.native.rates, &report.guest.rates);
    let mut text = format!(
        "\nAll {} frames are the same natively and in the guest, drawn by {}.\n\n{:34}{:>9}{:>9}{:>8}\n",
        report.guest.frames.len(),
        report.guest.renderer,
        "frames per second",
        "native",
        "guest",
        "ratio"
    );
    for (what, native, guest) in [
        ("drawn", native.draw, guest.draw),
        ("drawn, read back, fingerprinted", native.read, guest.read),
        (
            "the processor's part alone",
            native.processor,
            guest.processor,
        ),
    ] {
        let ratio = guest / native;
        text += &format!("{what:34}{native:9.1}{guest:9.1}{ratio:8.2}\n");
    }
    let frame = &report.frame;
    text += &format!(
        "\nA frame that is read back costs the guest {:.1} requests, {:.1} doorbells, {:.1} interrupts, {:.1} exits to the \
VMM.\nThe module's node was there after {:.1} ms.",
        frame.requests,
        frame.doorbells,
        frame.interrupts,
        frame.exits,
        report.module_us as f64 / 1e3
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_rate_with_its_ratio() {
        let said = |draw| Said {
            renderer: "virgl".to_owned(),
            frames: vec!["knot 0 a".to_owned()],
            rates: Rates {
                draw,
                read: 1.0,
                processor: 1.0,
            },
        };
        let report = Report {
            native: said(200.0),
            guest: said(150.0),
            module_us: 1234,
            frame: Frame {
                requests: 3.0,
                doorbells: 2.0,
                interrupts: 1.0,
                exits: 4.0,
            },
        };
        let text = table(&report);
        let words: Vec<&str> = text.split_whitespace().collect();
        assert!(
            words
                .windows(4)
                .any(|four| four == ["drawn", "200.0", "150.0", "0.75"])
        );
        assert!(text.contains("3.0 requests, 2.0 doorbells, 1.0 interrupts, 4.0 exits"));
        assert!(text.contains("after 1.2 ms"));
    }
}
