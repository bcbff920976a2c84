//! `soak MINI_VMM GUEST MINUTES SEED text|json`: a mixed load on the embedded GPU, after which this process must have what it had
//! before, and nothing may be left of the others. `cargo xtask soak` builds and starts it.
//!
//! Four threads, each at random from its own seed: VMs in processes of their own, most of them killed; VMs in this process, most of
//! them stopped; sessions that end in every state; and pictures. Every picture that gets done must be the one that was drawn first.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_e2e::footprint::Footprint;
use pvgpu_e2e::guest_vm::{self, Lines};
use pvgpu_e2e::live_heap;
use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_e2e::session_states::{self as states, ENDS, STATES};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::rlimit;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_mini_vmm::Ending;
use pvgpu_mini_vmm::vm::Vm;
use pvgpu_scenarios::{Picture, soft};
use serde::Serialize;

#[global_allocator]
static COUNTED: live_heap::Counting = live_heap::Counting;

/// The load before the base line, in which all comes into being that comes once.
const WARM_UP: Duration = Duration::from_secs(10);
/// Between two lines of progress.
const PERIOD: Duration = Duration::from_secs(5);
/// Bytes of heap that are no leak: tables that have grown.
const HEAP: usize = 64 << 10;
/// What a guest is told, and its exit code if it comes to its end. `draw` hands out a picture.
const SCENARIOS: &[(&str, i32)] = &[
    ("scenario=draw", 0),
    ("scenario=draw wait=interrupts", 0),
    ("scenario=selftest", 0),
    ("scenario=device", 0),
    ("scenario=bench measure=nop,getparam rounds=1", 0),
    ("scenario=interrupts", 0),
    ("scenario=fault fault=panic", 101),
];
/// A VM that is killed or stopped is so within this time: most take longer to their end.
const LIFE: Duration = Duration::from_millis(400);
/// A VM that is left alone has ended by then.
const PATIENCE: Duration = Duration::from_secs(120);

/// Numbers that look random, the same ones for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    /// The next one, below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % limit as u64) as usize
    }

    fn one_of<T>(&mut self, all: &'static [T]) -> &'static T {
        &all[self.below(all.len())]
    }

    /// A moment in a VM's life.
    fn moment(&mut self) -> Duration {
        Duration::from_micros(self.below(LIFE.as_micros() as usize) as u64)
    }
}

/// What has been done.
#[derive(Default)]
struct Done {
    /// Processes of VMs that were started, and how many of them were killed before their end.
    started: AtomicU64,
    killed: AtomicU64,
    /// VMs in this process, and how many of them were stopped before their end.
    machines: AtomicU64,
    stopped: AtomicU64,
    sessions: AtomicU64,
    /// Pictures that were compared.
    pictures: AtomicU64,
}

/// The same, at one moment.
#[derive(Clone, Copy, Default, Serialize)]
struct Counts {
    vms_started: u64,
    vms_killed: u64,
    machines_started: u64,
    machines_stopped: u64,
    sessions: u64,
    pictures: u64,
}

impl Done {
    fn read(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            vms_started: read(&self.started),
            vms_killed: read(&self.killed),
            machines_started: read(&self.machines),
            machines_stopped: read(&self.stopped),
            sessions: read(&self.sessions),
            pictures: read(&self.pictures),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// This process under load, once in a while.
#[derive(Serialize)]
struct Sample {
    seconds: u64,
    #[serde(flatten)]
    counts: Counts,
    #[serde(flatten)]
    footprint: Footprint,
    heap: usize,
}

/// What came of it.
#[derive(Serialize)]
struct Report {
    minutes: u64,
    seed: u64,
    counts: Counts,
    /// This process without load, before and after, and its heap in bytes.
    base: Footprint,
    end: Footprint,
    base_heap: usize,
    end_heap: usize,
    samples: Vec<Sample>,
    /// What went wrong or is left; empty when all is as it was before.
    faults: Vec<String>,
}

/// What all threads use.
struct Load {
    mini_vmm: PathBuf,
    guest: PathBuf,
    /// Temporary and current directory of the VMs' processes.
    folder: PathBuf,
    /// The GPU of pictures and machines, and that of the sessions, which hang it.
    gpu: Arc<dyn HostDriver>,
    hung: Arc<dyn HostDriver>,
    picture: Picture,
    done: Done,
    over: AtomicBool,
    faults: Mutex<Vec<String>>,
}

type Failure = Box<dyn std::error::Error>;

/// What a thread does again and again.
type Task = fn(&Load, &mut Random) -> Result<(), Failure>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [mini_vmm, guest, minutes, seed, form] = words.as_slice() else {
        eprintln!("usage: soak MINI_VMM GUEST MINUTES SEED text|json");
        return ExitCode::from(2);
    };
    let (Ok(minutes), Ok(seed)) = (minutes.parse(), seed.parse()) else {
        eprintln!("soak: MINUTES and SEED are numbers");
        return ExitCode::from(2);
    };
    let json = form == "json";
    match run(Path::new(mini_vmm), Path::new(guest), minutes, seed, json) {
        Ok(report) => {
            if json {
                println!("{}", serde_json::to_string(&report).unwrap_or_default());
            }
            for fault in &report.faults {
                eprintln!("soak: {fault}");
            }
            ExitCode::from(u8::from(!report.faults.is_empty()))
        }
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(
    mini_vmm: &Path,
    guest: &Path,
    minutes: u64,
    seed: u64,
    json: bool,
) -> Result<Report, Failure> {
    let tell = |line: &str| match json {
        true => eprintln!("{line}"),
        // What the load is about is the verdict, whether or not anybody reads on.
        false => drop(writeln!(io::stdout(), "{line}")),
    };
    live_heap::steady();
    rlimit::raise_open_files()?;
    let folder = tempfile::tempdir()?;
    let gpu: Arc<dyn HostDriver> = Arc::new(SoftDriver::new(SoftConfig::default())?);
    let picture = soft::draw(&mut LoopbackFile::open(Arc::clone(&gpu))?, &mut |_, _| {})?;
    let mut load = Load {
        mini_vmm: mini_vmm.canonicalize()?,
        guest: guest.canonicalize()?,
        folder: folder.path().to_owned(),
        hung: Arc::new(SoftDriver::new(states::GPU)?),
        gpu,
        picture,
        done: Done::default(),
        over: AtomicBool::new(false),
        faults: Mutex::default(),
    };
    let shared_memory = entries("/dev/shm");

    tell(&format!(
        "{} s of load before the base line",
        WARM_UP.as_secs()
    ));
    load.run(WARM_UP, seed, |_| ());
    load.done = Done::default();
    thread::sleep(Duration::from_secs(1));
    let free = [
        states::free_memory(&load.hung),
        states::free_memory(&load.gpu),
    ];
    let (base, base_heap) = (Footprint::at_rest()?, live_heap::bytes());
    tell(&format!(
        "base line: {base}, {} KiB of heap",
        base_heap >> 10
    ));

    let mut samples = Vec::with_capacity(minutes as usize * 60);
    let long = Duration::from_secs(minutes * 60);
    load.run(long, seed.wrapping_add(1), |sample: Sample| {
        let Counts {
            vms_started,
            vms_killed,
            machines_started,
            machines_stopped,
            sessions,
            pictures,
        } = sample.counts;
        tell(&format!(
            "{:5} s: {vms_started} VMs started, {vms_killed} killed; {machines_started} in this process, {machines_stopped} stopped; \
             {sessions} sessions; {pictures} pictures; {}",
            sample.seconds, sample.footprint
        ));
        samples.push(sample);
    });

    let mut faults = std::mem::take(&mut *load.faults());
    let end = Footprint::settle(&base, Duration::from_secs(30)).unwrap_or_else(|leak| {
        faults.push(format!("did not return to the base line: {leak}"));
        Footprint::own().unwrap_or_default()
    });
    let samples_size = samples.capacity() * size_of::<Sample>();
    let end_heap = live_heap::bytes().saturating_sub(samples_size);
    if end_heap > base_heap + HEAP {
        faults.push(format!(
            "the heap went from {base_heap} to {end_heap} bytes"
        ));
    }
    if [
        states::free_memory(&load.hung),
        states::free_memory(&load.gpu),
    ] != free
    {
        faults.push("GPU memory is left behind".into());
    }
    let left = children();
    if !left.is_empty() {
        faults.push(format!("processes are left: {left:?}"));
    }
    let left = entries(folder.path());
    if !left.is_empty() {
        faults.push(format!("files are left in a VM's directory: {left:?}"));
    }
    let new: Vec<_> = entries("/dev/shm")
        .difference(&shared_memory)
        .cloned()
        .collect();
    if !new.is_empty() {
        faults.push(format!("there are new files in /dev/shm: {new:?}"));
    }
    let counts = load.done.read();
    tell(&format!("end:       {end}, {} KiB of heap", end_heap >> 10));
    tell(match faults.is_empty() {
        true => "everything returned to the base line",
        false => "NOT everything returned to the base line",
    });
    Ok(Report {
        minutes,
        seed,
        counts,
        base,
        end,
        base_heap,
        end_heap,
        samples,
        faults,
    })
}

/// Names in a directory; none if there is no such one.
fn entries(folder: impl AsRef<Path>) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Processes whose parent is this one.
fn children() -> Vec<String> {
    let own = format!("PPid:\t{}", std::process::id());
    let mut children = Vec::new();
    for process in entries("/proc") {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        if status.lines().any(|line| line == own) {
            children.push(status.lines().next().unwrap_or_default().to_owned());
        }
    }
    children
}

impl Load {
    fn faults(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all threads for so long, or until something goes wrong.
    fn run(&self, long: Duration, seed: u64, mut sampled: impl FnMut(Sample)) {
        self.over.store(false, Ordering::Relaxed);
        let tasks: [Task; 4] = [Self::vm, Self::machine, Self::session, Self::picture];
        thread::scope(|scope| {
            for (index, task) in (1..).zip(tasks) {
                let mut random = Random(seed.wrapping_mul(8).wrapping_add(index));
                scope.spawn(move || {
                    while !self.over.load(Ordering::Relaxed) {
                        if let Err(error) = task(self, &mut random) {
                            self.faults().push(error.to_string());
                            self.over.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
            let start = Instant::now();
            let mut next = PERIOD;
            while !self.over.load(Ordering::Relaxed) && start.elapsed() < long {
                thread::sleep(Duration::from_millis(100));
                if start.elapsed() < next {
                    continue;
                }
                next += PERIOD;
                sampled(Sample {
                    seconds: start.elapsed().as_secs(),
                    counts: self.done.read(),
                    footprint: Footprint::own().unwrap_or_default(),
                    heap: live_heap::bytes(),
                });
            }
            self.over.store(true, Ordering::Relaxed);
        });
    }

    /// A VM in a process of its own; nine of ten are killed, if they live long enough.
    fn vm(&self, random: &mut Random) -> Result<(), Failure> {
        let &(words, code) = random.one_of(SCENARIOS);
        let dump = self.folder.join("picture");
        let mut child = Command::new(&self.mini_vmm)
            .arg("run")
            .arg("--kernel")
            .arg(&self.guest)
            .args(["--cmdline", words, "--memory", "64M", "--doorbell"])
            .arg(random.one_of(&["inline", "worker"]))
            .arg("--dump")
            .arg(&dump)
            .current_dir(&self.folder)
            .env("TMPDIR", &self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        count(&self.done.started);
        let kill = random.below(10) > 0;
        let ended = wait(&mut child, if kill { random.moment() } else { PATIENCE })?;
        if ended.is_none() {
            child.kill()?;
        }
        let status = child.wait()?;
        let drawn = fs::read(&dump).unwrap_or_default();
        fs::remove_file(&dump).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        match ended {
            None if kill => count(&self.done.killed),
            None => return Err(format!("`{words}` did not end").into()),
            Some(ended) if ended != Some(code) => {
                let mut said = String::new();
                child
                    .stderr
                    .take()
                    .map(|mut pipe| pipe.read_to_string(&mut said));
                return Err(format!("`{words}` ended with {status}: {}", said.trim()).into());
            }
            Some(_) if words.contains("draw") => self.compare(words, &drawn)?,
            Some(_) => {}
        }
        Ok(())
    }

    /// A VM in this process; four of five are stopped, if they live long enough.
    fn machine(&self, random: &mut Random) -> Result<(), Failure> {
        let &(words, code) = random.one_of(SCENARIOS);
        let doorbell = *random.one_of(&[Doorbell::Inline, Doorbell::Worker]);
        let gpu = Arc::clone(&self.gpu);
        let lines = Lines::new(|_| ());
        let config = guest_vm::config(
            &self.guest,
            words,
            guest_vm::in_process(gpu, doorbell),
            lines,
        );
        let vm = Vm::new(config)?;
        count(&self.done.machines);
        let stop = vm.stop();
        let life = (random.below(5) > 0).then(|| random.moment());
        let (ended, has_ended) = std::sync::mpsc::channel::<()>();
        let outcome = thread::scope(|scope| {
            scope.spawn(move || {
                // An error says that the machine has ended by itself.
                if has_ended.recv_timeout(life.unwrap_or(PATIENCE))
                    == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    stop.end(Ending::Stopped { signal: None });
                }
            });
            let outcome = vm.run();
            drop(ended);
            outcome
        })?;
        match outcome.ending {
            Ending::Stopped { .. } if life.is_some() => {
                count(&self.done.stopped);
                Ok(())
            }
            _ if i32::from(outcome.exit_code) != code => {
                Err(format!("`{words}` in this process: {:?}", outcome.ending).into())
            }
            _ if words.contains("draw") => self.compare(words, &outcome.dump.unwrap_or_default()),
            _ => Ok(()),
        }
    }

    /// Some sessions that end in some state.
    fn session(&self, random: &mut Random) -> Result<(), Failure> {
        states::open_and_end(&self.hung, *random.one_of(STATES), *random.one_of(ENDS))?;
        count(&self.done.sessions);
        thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    /// A picture without a VM.
    fn picture(&self, random: &mut Random) -> Result<(), Failure> {
        let mut file = LoopbackFile::open(Arc::clone(&self.gpu))?;
        let picture = soft::draw(&mut file, &mut |_, _| {})?;
        thread::sleep(random.moment());
        self.compare("a picture without a VM", &picture.rgba)
    }

    fn compare(&self, who: &str, rgba: &[u8]) -> Result<(), Failure> {
        count(&self.done.pictures);
        match rgba == self.picture.rgba {
            true => Ok(()),
            false => Err(format!("{who}: the picture is not the same").into()),
        }
    }
}

/// Waits so long for a process; gives the exit code if it has ended, none of it if a signal has ended it.
fn wait(child: &mut Child, long: Duration) -> io::Result<Option<Option<i32>>> {
    let deadline = Instant::now() + long;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code()));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2).min(long));
    }
}
