//! Replays a trace of `mini-vmm run --trace` and says what was different (`cargo xtask replay` starts it).
//!
//! `replay FILE GPU`, GPU being `soft` or `drm:NODE`. Exit code 0: all results were those of the trace. 1: some were not.
//! 2: there is no trace or no GPU.

use std::process::ExitCode;
use std::sync::Arc;

use pvgpu_e2e::replay::replay;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::wire::Operation;

/// Differences that are printed; the others are counted.
const SHOWN: usize = 50;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("cargo xtask replay: {reason}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let [file, gpu] = arguments else {
        return Err("it is `cargo xtask replay` that starts this".into());
    };
    let trace = std::fs::read(file).map_err(|error| {
        format!("cannot read {file}: {error}; name a file that `mini-vmm run --trace FILE` wrote")
    })?;
    let driver: Arc<dyn HostDriver> = match gpu.strip_prefix("drm:") {
        Some(node) => Arc::new(DrmDriver::new(node).map_err(|error| error.to_string())?),
        None => {
            let soft = SoftDriver::new(SoftConfig::default());
            Arc::new(soft.map_err(|error| error.to_string())?)
        }
    };
    let replay = replay(&trace, &driver, Limits::default()).map_err(|error| error.to_string())?;
    for difference in replay.differences.iter().take(SHOWN) {
        let operation = match difference
            .operation
            .map(|number| (number, Operation::from_number(number)))
        {
            Some((_, Some(operation))) => operation.name().to_owned(),
            Some((number, None)) => format!("operation {number}"),
            None => "no request".to_owned(),
        };
        println!(
            "record {}, {operation}: {} when it was recorded, {} now",
            difference.record,
            result(difference.recorded),
            difference.replayed.map_or("no answer".into(), result)
        );
    }
    println!(
        "{} requests in {} sessions, {} with another result",
        replay.requests,
        replay.sessions,
        replay.differences.len()
    );
    Ok(match replay.differences.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// A result for people.
fn result(value: i32) -> String {
    match value {
        0.. => value.to_string(),
        _ => match Errno::new(value.saturating_neg()).name() {
            Some(name) => name.to_owned(),
            None => format!("error {}", value.unsigned_abs()),
        },
    }
}
