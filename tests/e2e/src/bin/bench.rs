//! `bench`: runs the benchmark on the machine it is started on and prints JSON, an object per line: first the machine,
//! then one line of the table each. `cargo xtask bench` starts it here and in the testbed, and makes the table.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use pvgpu_e2e::bench::{self, host};
use pvgpu_e2e::drm_ioctl::{self, Kind, Node};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};

const USAGE: &str = "usage: bench --guest FILE --daemon FILE --driver soft|virtio_gpu [--rounds N]\n\
Boots the test guest with a GPU on that host driver, in process and in the daemon pvgpu-proxyd, and measures N batches (100 by default) of everything.";

struct Arguments {
    guest: PathBuf,
    daemon: PathBuf,
    driver: String,
    rounds: u32,
}

fn main() -> ExitCode {
    let Some(arguments) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Arguments> {
    let (mut guest, mut daemon, mut driver, mut rounds) = (None, None, None, 100);
    while let Some(word) = words.next() {
        let value = words.next()?;
        match word.as_str() {
            "--guest" => guest = Some(value.into()),
            "--daemon" => daemon = Some(value.into()),
            "--driver" => driver = Some(value),
            "--rounds" => rounds = value.parse().ok().filter(|rounds| *rounds > 0)?,
            _ => return None,
        }
    }
    Some(Arguments {
        guest: guest?,
        daemon: daemon?,
        driver: driver?,
        rounds,
    })
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    println!("{}", serde_json::to_string(&host::describe())?);
    let driver = arguments.driver.as_str();
    let mut machines = bench::machines(driver);
    for rounds in bench::turns(arguments.rounds) {
        for machine in &mut machines {
            let (host_driver, node) = open(driver)?;
            let samples = bench::machine::measure(
                &machine.run,
                &machine.rows,
                rounds,
                &arguments.guest,
                host_driver,
                node,
                &arguments.daemon,
            )?;
            machine.add(samples);
        }
    }
    for line in bench::lines(&machines)? {
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(())
}

/// A host driver, and the DRM node behind it.
type Opened = (Arc<dyn HostDriver>, Option<Node>);

/// The host driver of that name.
fn open(driver: &str) -> Result<Opened, Box<dyn std::error::Error>> {
    if driver == "soft" {
        return Ok((Arc::new(SoftDriver::new(SoftConfig::default())?), None));
    }
    let node = drm_ioctl::find(driver, Kind::Render).map_err(|error| {
        format!(
            "no DRM node of {driver} here ({error}): measure it in the testbed, or --driver soft"
        )
    })?;
    let host_driver = DrmDriver::new(&node.path)?;
    Ok((Arc::new(host_driver), Some(node)))
}
