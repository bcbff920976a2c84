//! One machine of the benchmark: boots the test guest with a GPU and the yardstick, and reads what it prints.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::daemon::Daemon;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_mini_vmm::{Console, Ending, Gpu, Vm, VmConfig, VmError};

use super::Row;
use super::yardstick::{self, Yardstick};
use crate::drm_ioctl::Node;

/// A guest that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Bytes of the aperture.
const APERTURE: u64 = 64 << 20;
/// How long the proxy's thread polls when it is to poll: longer than any pause between two requests.
const POLL: Duration = Duration::from_millis(2);
/// After which time it certainly sleeps: it polls shorter and shorter.
const SETTLE: Duration = Duration::from_millis(6);

/// How the proxy hears of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// On the vCPU's thread, by the exit.
    Inline,
    /// On a thread that sleeps until the doorbell wakes it.
    Asleep,
    /// On a thread that polls.
    Polling,
    /// In another process, a thread that polls.
    Process,
}

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name.
    pub name: &'static str,
    /// Its proxy.
    pub proxy: Proxy,
}

/// What guests have measured of one thing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Operations of all batches.
    pub operations: u64,
    /// Doorbells of all batches.
    pub doorbells: u64,
    /// Whether requests were made.
    pub uses_gpu: bool,
    /// Nanoseconds of one operation, batch by batch.
    pub nanoseconds: Vec<f64>,
}

impl Sample {
    /// Nanoseconds of each part of an operation, batch by batch.
    pub fn each(&self, parts: u32) -> Vec<f64> {
        let times = self.nanoseconds.iter();
        times.map(|time| time / f64::from(parts)).collect()
    }

    /// Doorbells of one operation.
    pub fn doorbells_of_one(&self) -> f64 {
        self.doorbells as f64 / self.operations as f64
    }

    /// The batches of another guest, too.
    pub fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.doorbells += other.doorbells;
        self.uses_gpu |= other.uses_gpu;
        self.nanoseconds.extend(other.nanoseconds);
    }
}

/// Why there are no numbers.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The machine could not be had.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The host refused something.
    #[error("cannot {0}: {1}")]
    Host(&'static str, io::Error),
    /// The guest did not end well.
    #[error("the guest of the run '{run}' ended badly ({ending}): {said}")]
    Guest {
        /// Which run.
        run: &'static str,
        /// How.
        ending: String,
        /// Its last words.
        said: String,
    },
    /// The guest did not print a measurement.
    #[error(
        "the guest of the run '{run}' did not measure {measure}: are guest and benchmark of the same version?"
    )]
    Missing {
        /// Which run.
        run: &'static str,
        /// Which measurement.
        measure: String,
    },
}

/// Text of the guest's console.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The names of all measurements of these rows, floors included.
pub fn measures(rows: &[Row]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        for name in row.floor.iter().chain([&row.measure]) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    names
}

/// Boots the machine and gives what its guest has measured, by name.
pub fn measure(
    run: &Run,
    rows: &[Row],
    rounds: u32,
    guest: &Path,
    driver: Arc<dyn HostDriver>,
    node: Option<Node>,
    daemon: &Path,
) -> Result<HashMap<String, Sample>, BenchError> {
    let (doorbell, poll) = match run.proxy {
        Proxy::Inline => (Doorbell::Inline, Duration::ZERO),
        Proxy::Asleep => (Doorbell::Worker, Duration::ZERO),
        Proxy::Polling | Proxy::Process => (Doorbell::Worker, POLL),
    };
    let mut cmdline = format!(
        "scenario=bench {} rounds={rounds} measure={}",
        yardstick::announcement(),
        measures(rows).join(",")
    );
    if matches!(run.proxy, Proxy::Polling | Proxy::Process) {
        let _ = write!(cmdline, " settle_us={}", SETTLE.as_micros());
    }
    let text = Text::default();
    let daemon = (run.proxy == Proxy::Process)
        .then(|| {
            let gpu = node.as_ref();
            let gpu = gpu.map_or("soft".into(), |node| format!("drm:{}", node.path.display()));
            let (poll, aperture) = (POLL.as_micros().to_string(), APERTURE.to_string());
            let options = [
                "--gpu",
                &gpu,
                "--poll",
                &poll,
                "--aperture",
                &aperture,
                "--queues",
                "1",
            ];
            Daemon::start(daemon, &options)
        })
        .transpose()
        .map_err(|error| BenchError::Host("start the daemon", error))?;
    let yardstick = Yardstick::new(node)
        .map(Arc::new)
        .map_err(|error| BenchError::Host("start a thread", error))?;
    let vm = Vm::new(VmConfig {
        cmdline,
        gpu: Some(match &daemon {
            Some(daemon) => Gpu::VhostUser {
                socket: daemon.socket(),
                aperture: true,
            },
            None => Gpu::InProcess {
                driver,
                aperture: APERTURE,
                device: DeviceConfig {
                    doorbell,
                    poll,
                    ..DeviceConfig::default()
                },
            },
        }),
        console: Console::output(text.clone()),
        devices: vec![yardstick.attachment()],
        ..VmConfig::new(guest)
    })?;
    yardstick.set_memory(vm.memory().clone());
    drop(yardstick);
    let outcome = within_time_limit(vm)?;
    let text = text.0.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&text);
    if outcome != (Ending::Exit { code: 0 }) {
        let said: Vec<&str> = text.lines().rev().take(3).collect();
        return Err(BenchError::Guest {
            run: run.name,
            ending: format!("{outcome:?}"),
            said: said.into_iter().rev().collect::<Vec<_>>().join(" | "),
        });
    }
    Ok(text.lines().filter_map(parse).collect())
}

fn within_time_limit(vm: Vm) -> Result<Ending, BenchError> {
    let stop = vm.stop();
    let (ended, end) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        if end.recv_timeout(TIME_LIMIT) == Err(RecvTimeoutError::Timeout) {
            stop.end(Ending::Stopped { signal: None });
        }
    });
    let outcome = vm.run();
    drop(ended);
    let _ = watch.join();
    Ok(outcome?.ending)
}

/// `bench NAME operations=N doorbells=D ns=A,B,C,..`
fn parse(line: &str) -> Option<(String, Sample)> {
    let mut words = line.trim().strip_prefix("bench ")?.split(' ');
    let name = words.next()?.to_owned();
    let mut value = |key: &str| words.next()?.strip_prefix(key)?.strip_prefix('=');
    let operations: u32 = value("operations")?.parse().ok()?;
    let doorbells = value("doorbells")?.parse().ok()?;
    let nanoseconds = value("ns")?
        .split(',')
        .map(|batch| Some(batch.parse::<u64>().ok()? as f64 / f64::from(operations)))
        .collect::<Option<Vec<f64>>>()?;
    let uses_gpu = ["nop", "getparam", "pipeline", "payload"]
        .iter()
        .any(|start| name.starts_with(start));
    let sample = Sample {
        operations: u64::from(operations) * nanoseconds.len() as u64,
        doorbells,
        uses_gpu,
        nanoseconds,
    };
    Some((name, sample))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_guests_have_measured_is_one_sample() {
        let (_, mut sample) = parse("bench nop operations=20 doorbells=3 ns=100,200").unwrap();
        let (_, other) = parse("bench nop operations=10 doorbells=2 ns=300").unwrap();
        sample.add(other);
        assert_eq!(sample.nanoseconds, [5.0, 10.0, 30.0]);
        assert_eq!(sample.doorbells_of_one(), 0.1);
        assert!(sample.uses_gpu);
    }

    #[test]
    fn a_line_of_the_guest_is_read_and_a_damaged_one_is_not() {
        let (name, sample) = parse("bench nop operations=20 doorbells=3 ns=100,200\r").unwrap();
        assert_eq!(name, "nop");
        assert_eq!(sample.nanoseconds, [5.0, 10.0]);
        assert_eq!(sample.each(5), [1.0, 2.0]);
        assert_eq!(sample.doorbells_of_one(), 0.075);
        for line in [
            "bench nop operations=20 ns=100",
            "bench nop operations=20 doorbells=0 ns=100,x",
            "bench nop operations=20 doorbells=0 ns=",
            "nop operations=20 doorbells=0 ns=1",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
