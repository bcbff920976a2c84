//! Whole-VM fuzzing on the host's side: boots the test guest with `scenario=fuzz`, follows which case it plays, and sees what
//! it leaves behind. `fuzz-vm` and the end-to-end tests use it; the cases themselves are the guest's
//! (`tests/guest/src/scenario/fuzz`).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_mini_vmm::bus::{Attachment, MmioDevice};
use pvgpu_mini_vmm::{Console, Ending, Gpu, Vm, VmConfig, VmError, layout};

use crate::guest_vm::Lines;

/// Bytes of the aperture: what cases can map is limited to it.
const APERTURE: u64 = 64 << 20;
/// Request queues of the device; an event queue follows. The guest knows these numbers.
const REQUEST_QUEUES: u16 = 2;
/// A guest that has not begun another case for so long hangs, or its device does.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long threads may take to end once there is nothing for them to do: idle workers end after two seconds.
const SETTLE: Duration = Duration::from_secs(6);

/// What to play.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Decides over every case.
    pub seed: u64,
    /// Number of the first case.
    pub first: u32,
    /// How many cases.
    pub cases: u32,
    /// Longest time for them.
    pub seconds: Option<u64>,
    /// Who handles requests.
    pub doorbell: Doorbell,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Played {
    /// Cases that were played.
    pub cases: u32,
    /// Hash of all that they did: the same for the same cases.
    pub fingerprint: String,
    /// How long they took.
    pub time: Duration,
    /// Requests that the proxy has answered.
    pub completed: u64,
    /// Requests that it has refused.
    pub rejected: u64,
    /// Chains that were no requests, and broken rings.
    pub malformed: u64,
}

/// Why it did not come to a good end.
#[derive(Debug, thiserror::Error)]
pub enum FuzzError {
    /// There is no machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest or the device has stopped.
    #[error("case {case}: nothing more happened within {} s", PATIENCE.as_secs())]
    Hang {
        /// Where.
        case: u32,
    },
    /// The guest has ended otherwise than with success.
    #[error("case {case}: the guest ended badly ({ending}): {said}")]
    Guest {
        /// Where.
        case: u32,
        /// How.
        ending: String,
        /// Its last words.
        said: String,
    },
    /// Something is left.
    #[error("left behind by {cases} cases: {before:?} became {after:?}")]
    Left {
        /// How many.
        cases: u32,
        /// What the process had before.
        before: Footprint,
        /// What it had when the device had been reset.
        after: Footprint,
    },
}

/// What a process has.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Footprint {
    /// What its file descriptors are of, in order.
    pub descriptors: Vec<String>,
    /// Mappings of memory files, as buffer objects are.
    pub mappings: usize,
    /// Threads.
    pub threads: usize,
}

impl Footprint {
    /// What this process has now.
    pub fn now() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let open = fs::read_dir("/proc/self/fd").into_iter().flatten();
        let links = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let mut descriptors: Vec<_> = links.map(|link| link.display().to_string()).collect();
        descriptors.sort();
        Self {
            descriptors,
            mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
            threads: fs::read_dir("/proc/self/task").map_or(0, Iterator::count),
        }
    }

    /// Whether nothing is there that was not there `before`.
    pub fn is_within(&self, before: &Self) -> bool {
        self.descriptors.len() <= before.descriptors.len()
            && self.mappings <= before.mappings
            && self.threads <= before.threads
    }
}

/// The device that the guest tells of its progress.
struct Progress {
    case: AtomicU32,
    begun: Mutex<Instant>,
    /// What the process had each time when the device had been reset and had nothing to do.
    at_rest: Mutex<Vec<Footprint>>,
    /// Gets each case's number, for whoever outlives this process.
    file: Option<File>,
}

impl MmioDevice for Progress {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = <[u8; 4]>::try_from(data).map_or(0, u32::from_le_bytes);
        match offset {
            0 => {
                self.case.store(value, Ordering::Relaxed);
                *lock(&self.begun) = Instant::now();
                if let Some(file) = &self.file {
                    // A case that cannot be recorded is played all the same.
                    let _ = file.write_all_at(&value.to_le_bytes(), 0);
                }
            }
            4 => {
                let mut at_rest = lock(&self.at_rest);
                let mut now = Footprint::now();
                // The machine's event loop may start after its guest; workers that are idle end by themselves.
                let settled = |now: &Footprint| match at_rest.first() {
                    Some(before) => now.is_within(before),
                    None => now.descriptors.iter().any(|of| of.contains("eventpoll")),
                };
                let deadline = Instant::now() + SETTLE;
                while !settled(&now) && Instant::now() < deadline {
                    thread::sleep(Duration::from_millis(50));
                    now = Footprint::now();
                }
                at_rest.push(now);
            }
            _ => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Plays the plan with the guest of that file on that driver. `progress` gets the number of the case that is played, in four
/// bytes. Nothing else of this process may open files or start threads meanwhile. A VM that cannot be stopped any more aborts
/// the process.
pub fn play(
    guest: &Path,
    driver: Arc<dyn HostDriver>,
    plan: Plan,
    progress: Option<File>,
) -> Result<Played, FuzzError> {
    let progress = Arc::new(Progress {
        case: AtomicU32::new(plan.first),
        begun: Mutex::new(Instant::now()),
        at_rest: Mutex::default(),
        file: progress,
    });
    let lines = Lines::new(|_| ());
    let seconds = plan.seconds.map(|seconds| format!(" seconds={seconds}"));
    let config = VmConfig {
        cmdline: format!(
            "scenario=fuzz seed={} first={} cases={} progress={:#x}{}",
            plan.seed,
            plan.first,
            plan.cases,
            layout::EXTRA_MMIO,
            seconds.unwrap_or_default(),
        ),
        gpu: Some(Gpu::InProcess {
            driver,
            aperture: APERTURE,
            device: DeviceConfig {
                request_queues: REQUEST_QUEUES,
                doorbell: plan.doorbell,
                limits: Limits {
                    objects: 64,
                    in_flight: 32,
                    mapped: APERTURE,
                    memory: APERTURE,
                    ..Limits::default()
                },
                ..DeviceConfig::default()
            },
        }),
        console: Console::output(lines.clone()),
        devices: vec![Attachment {
            base: layout::EXTRA_MMIO,
            size: 0x1000,
            device: Arc::clone(&progress) as _,
            doorbells: Vec::new(),
            interrupts: Vec::new(),
        }],
        // What is left behind is looked for on the vCPU's thread, in files of `/proc`.
        sandbox: Sandbox::Off,
        ..VmConfig::new(guest)
    };
    let vm = Vm::new(config)?;
    let hung = watch(&vm, &progress);
    let outcome = vm.run();
    let hung = hung();
    let outcome = outcome?;
    let case = progress.case.load(Ordering::Relaxed);
    if hung {
        return Err(FuzzError::Hang { case });
    }
    let said = lines.spoken();
    if outcome.ending != (Ending::Exit { code: 0 }) {
        return Err(FuzzError::Guest {
            case,
            ending: format!("{:?}", outcome.ending),
            said: said.last().cloned().unwrap_or_default(),
        });
    }
    let statistics = outcome.gpu.as_ref();
    let count = |counter: fn(&_) -> u64| statistics.map_or(0, counter);
    let played = said.iter().rev().find_map(|line| parse(line));
    let Some((cases, fingerprint, time)) = played else {
        return Err(FuzzError::Guest {
            case,
            ending: "it does not say what it has played".into(),
            said: said.last().cloned().unwrap_or_default(),
        });
    };
    match &lock(&progress.at_rest)[..] {
        [before, .., after] if !after.is_within(before) => {
            return Err(FuzzError::Left {
                cases,
                before: before.clone(),
                after: after.clone(),
            });
        }
        _ => {}
    }
    Ok(Played {
        cases,
        fingerprint,
        time,
        completed: count(|statistics| statistics.completed),
        rejected: count(|statistics| statistics.rejected),
        malformed: count(|statistics| statistics.malformed),
    })
}

/// Stops the machine when its guest no longer begins cases; what is returned tells whether that was so.
fn watch(vm: &Vm, progress: &Arc<Progress>) -> impl FnOnce() -> bool + use<> {
    let (stop, progress) = (vm.stop(), Arc::clone(progress));
    let (ended, end) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        let waits = |time| end.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        while waits(Duration::from_millis(200)) {
            if lock(&progress.begun).elapsed() < PATIENCE {
                continue;
            }
            stop.end(Ending::Stopped { signal: None });
            if waits(PATIENCE) {
                let case = progress.case.load(Ordering::Relaxed);
                eprintln!("case {case}: the machine cannot be stopped: its device is stuck");
                std::process::abort();
            }
            return true;
        }
        false
    });
    move || {
        drop(ended);
        watch.join().unwrap_or(true)
    }
}

/// `fuzz seed=S first=F cases=N fingerprint=X us=T`
fn parse(line: &str) -> Option<(u32, String, Duration)> {
    let words = line.trim().strip_prefix("fuzz ")?;
    let value = |key: &str| {
        let mut values = words.split(' ').filter_map(|word| word.split_once('='));
        values
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    };
    let time = Duration::from_micros(value("us")?.parse().ok()?);
    Some((
        value("cases")?.parse().ok()?,
        value("fingerprint")?.into(),
        time,
    ))
}

/// A file of this process's own for [`play`]'s progress.
pub fn progress_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_played_is_read_from_the_guests_line() {
        let line = "fuzz seed=1 first=0 cases=64 fingerprint=0x00ab us=1500\r";
        let expected = (64, "0x00ab".to_owned(), Duration::from_micros(1500));
        assert_eq!(parse(line), Some(expected));
        assert_eq!(
            parse("fuzz seed=1 first=0 cases=x fingerprint=0 us=1"),
            None
        );
        assert_eq!(parse("case 64"), None);
    }

    #[test]
    fn one_descriptor_more_is_left_behind_and_one_less_is_not() {
        let before = Footprint::now();
        let mut more = before.clone();
        more.descriptors.push("a file".into());
        assert!(before.is_within(&before) && before.is_within(&more));
        assert!(!more.is_within(&before));
    }
}
