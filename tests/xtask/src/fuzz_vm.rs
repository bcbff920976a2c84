//! `cargo xtask fuzz-vm`: plays generated programs of register accesses, ring writes, doorbells and requests against the whole
//! machine on this machine's KVM, and names the seed and the case of what it finds. What a case does is
//! `tests/guest/src/scenario/fuzz`; what is looked at is `tests/e2e/src/vm_fuzz.rs`.

use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};

use crate::demo;
use crate::programs::{self, FUZZ_VM, TEST_GUEST};
use crate::say::say;

/// Cases unless there is a number or a time of them.
const CASES: u32 = 10_000;

/// What to play.
#[derive(clap::Args)]
#[command(
    after_help = "Half of the cases, or of the time, are played with the doorbell inline and half with a worker.\n\n\
Exit code 0: nothing was found. 1: a crash, a hang, a device that works no more, or something left behind; the command that \
plays it again is printed. 2: this machine cannot run it."
)]
pub struct Arguments {
    /// Decides over every case: the same seed, the same cases
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How many cases [default: 10,000, or as many as there is time for]
    #[arg(long, value_name = "N")]
    cases: Option<u32>,
    /// At most so many seconds
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    seconds: u64,
    /// Play this case only
    #[arg(long, value_name = "K")]
    case: Option<u32>,
    /// Begin with this case
    #[arg(long, value_name = "K", default_value_t = 0)]
    first: u32,
    /// `inline`, `worker` or both, one after the other
    #[arg(long, value_name = "HOW", default_value = "both", value_parser = ["inline", "worker", "both"])]
    doorbell: String,
    /// `soft` or `drm:NODE`
    #[arg(long, value_name = "GPU", default_value = "soft")]
    gpu: String,
}

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    if let Err(reason) = demo::kvm() {
        eprintln!("error: {reason}");
        return ExitCode::from(2);
    }
    let built = match programs::build(&[FUZZ_VM, TEST_GUEST]) {
        Ok(built) => built,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let [fuzz, guest] = &built[..] else {
        return ExitCode::from(2);
    };
    let doorbells: &[&str] = match arguments.doorbell.as_str() {
        "inline" => &["inline"],
        "worker" => &["worker"],
        _ => &["inline", "worker"],
    };
    let parts = doorbells.len() as u32;
    let (first, cases) = match arguments.case {
        Some(case) => (case, 1),
        None => {
            let default = if arguments.seconds > 0 {
                u32::MAX
            } else {
                CASES
            };
            let cases = arguments.cases.unwrap_or(default);
            (arguments.first, cases.div_ceil(parts))
        }
    };
    let seconds = arguments.seconds.div_ceil(parts.into());
    for (part, doorbell) in (0..).zip(doorbells) {
        // The two halves are different cases, unless a single one was asked for.
        let first = match arguments.case {
            Some(case) => case,
            None => first.wrapping_add(cases.wrapping_mul(part)),
        };
        let progress = guest.path.with_file_name("fuzz-vm-case");
        let mut command = Command::new(&fuzz.path);
        command.arg(&guest.path).arg(&arguments.gpu);
        let numbers = [arguments.seed, first.into(), cases.into(), seconds];
        command.args(numbers.map(|number| number.to_string()));
        command.arg(doorbell).arg(&progress);
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(status) if status.code() == Some(2) => return ExitCode::from(2),
            Ok(status) => {
                found(arguments, doorbell, first, status, &progress);
                return ExitCode::FAILURE;
            }
            Err(error) => {
                eprintln!("error: cannot start fuzz-vm: {error}");
                return ExitCode::from(2);
            }
        }
    }
    ExitCode::SUCCESS
}

/// Says how to play it again.
fn found(arguments: &Arguments, doorbell: &str, first: u32, status: ExitStatus, progress: &Path) {
    let case = std::fs::read(progress).ok();
    let case = case.and_then(|bytes| Some(u32::from_le_bytes(bytes.try_into().ok()?)));
    let case = case.unwrap_or(first);
    let (seed, gpu) = (arguments.seed, &arguments.gpu);
    say!("found something in case {case} of seed {seed} ({status}). Again:");
    say!("  cargo xtask fuzz-vm --seed {seed} --case {case} --doorbell {doorbell} --gpu {gpu}");
    say!("and if that case alone does not do it, with those before it:");
    let cases = case.wrapping_sub(first).saturating_add(1);
    say!(
        "  cargo xtask fuzz-vm --seed {seed} --first {first} --cases {cases} --doorbell {doorbell} --gpu {gpu}"
    );
}
