//! Plays generated programs against the whole machine (`cargo xtask fuzz-vm` starts it): boots the test guest, once with the
//! doorbell inline and once with a worker, and prints what it has played.
//!
//! `fuzz-vm GUEST GPU SEED FIRST CASES SECONDS DOORBELL PROGRESS`: SECONDS 0 for no limit, DOORBELL `inline` or `worker`,
//! PROGRESS a file that gets the number of the case that is played. Exit code 0: nothing was found. 1: something was.
//! 2: there is no machine to play on.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pvgpu_e2e::vm_fuzz::{FuzzError, Plan, play, progress_file};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("fuzz-vm: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let [guest, gpu, seed, first, cases, seconds, doorbell, progress] = arguments else {
        return Err("it is `cargo xtask fuzz-vm` that starts this".into());
    };
    let number = |text: &String| {
        text.parse::<u64>()
            .map_err(|error| format!("{text}: {error}"))
    };
    let small = |text: &String| {
        text.parse::<u32>()
            .map_err(|error| format!("{text}: {error}"))
    };
    let plan = Plan {
        seed: number(seed)?,
        first: small(first)?,
        cases: small(cases)?,
        seconds: Some(number(seconds)?).filter(|seconds| *seconds > 0),
        doorbell: match doorbell.as_str() {
            "inline" => Doorbell::Inline,
            _ => Doorbell::Worker,
        },
    };
    let driver: Arc<dyn HostDriver> = match gpu.strip_prefix("drm:") {
        Some(node) => Arc::new(DrmDriver::new(node).map_err(|error| error.to_string())?),
        None => {
            let soft = SoftDriver::new(SoftConfig {
                watchdog: Duration::from_millis(200),
                ..SoftConfig::default()
            });
            Arc::new(soft.map_err(|error| error.to_string())?)
        }
    };
    let file =
        progress_file(Path::new(progress)).map_err(|error| format!("{progress}: {error}"))?;
    match play(Path::new(guest), driver, plan, Some(file)) {
        Ok(played) => {
            let minutes = played.time.as_secs_f64() / 60.0;
            println!(
                "{doorbell}: {} cases, {:.0} a minute, fingerprint {}; {} requests answered, {} of them refused, {} chains malformed",
                played.cases,
                f64::from(played.cases) / minutes,
                played.fingerprint,
                played.completed,
                played.rejected,
                played.malformed
            );
            Ok(ExitCode::SUCCESS)
        }
        Err(FuzzError::Vm(error)) => Err(error.to_string()),
        Err(finding) => {
            println!("{doorbell}: {finding}");
            Ok(ExitCode::FAILURE)
        }
    }
}
