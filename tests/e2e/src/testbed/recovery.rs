//! The GPU's daemon is killed in the midst of its guests' work and comes back: a Linux guest's calls end and what it opens
//! later works (`node-recovery`, `tests/e2e/src/recovery.rs`), whether its front end tells it or not; and the guest of another
//! daemon notices nothing.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::boot::EXIT_CODE;
use super::linux::Guest;
use super::mini_vmm::{self, Running};
use super::over::PROXYD;
use super::pictures::{Gpu, SOFT, VIRTIO_GPU, expected};
use super::{Failure, Test};
use crate::daemon::Daemon;
use crate::ensure;
use crate::recovery::{IDLE, LOST, WAITING};
use crate::silent_front_end::SilentFrontEnd;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_whose_daemon_is_killed_a_hundred_times_leaves_the_pictures_of_another_alone",
        run: a_hundred_kills,
    },
    Test {
        name: "a_linux_6_1_guest_loses_a_killed_daemons_gpu_and_draws_on_it_again",
        run: || recovers("6.1", &VIRTIO_GPU, FrontEnd::Tells),
    },
    Test {
        name: "a_linux_6_12_guest_loses_a_killed_daemons_gpu_and_draws_on_it_again",
        run: || recovers("6.12", &SOFT, FrontEnd::Tells),
    },
    Test {
        name: "a_linux_6_1_guest_that_nobody_tells_loses_a_killed_daemons_gpu_and_draws_on_it_again",
        run: || recovers("6.1", &SOFT, FrontEnd::IsSilent),
    },
    Test {
        name: "a_linux_6_12_guest_that_nobody_tells_loses_a_killed_daemons_gpu_and_draws_on_it_again",
        run: || recovers("6.12", &VIRTIO_GPU, FrontEnd::IsSilent),
    },
];

/// What the guest's front end does when the daemon is gone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FrontEnd {
    /// Gives the guest a device that needs a reset.
    Tells,
    /// Waits for another daemon and goes on with that.
    IsSilent,
}

/// Booting a Linux takes seconds, drawing some more.
const LIMIT: Duration = Duration::from_secs(240);
/// For what is to happen next.
const SOON: Duration = Duration::from_secs(120);
/// Bare-metal rounds: as many losses of the GPU.
const KILLS: u32 = 100;

/// A path that nobody else has.
fn new_path() -> PathBuf {
    static PATHS: AtomicU32 = AtomicU32::new(0);
    let number = PATHS.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("recovery-{number}"))
}

/// A daemon on that GPU.
fn start(gpu: &Gpu) -> Result<Daemon, Failure> {
    let gpu = (gpu.argument)()?;
    let options = ["--gpu", &gpu, "--queues", "1", "--watchdog", "60"];
    Daemon::start(Path::new(PROXYD), &options)
        .map_err(|error| format!("cannot start pvgpu-proxyd: {error}").into())
}

/// What mini-vmm is told.
fn argument(socket: &Path) -> String {
    format!("vhost-user:{}", socket.display())
}

fn recovers(kernel: &str, gpu: &Gpu, front_end: FrontEnd) -> Result<(), Failure> {
    let picture = expected(gpu)?;
    let mut daemon = start(gpu)?;
    let relay = match front_end {
        FrontEnd::Tells => None,
        FrontEnd::IsSilent => {
            let socket = new_path();
            Some((SilentFrontEnd::start(&socket, &daemon.socket())?, socket))
        }
    };
    let argument = match &relay {
        Some((_, socket)) => argument(socket),
        None => argument(&daemon.socket()),
    };
    let guest = Guest {
        kernel,
        memory: "512M",
        cpus: "1",
        parameters: &format!("l2.run=\"node-recovery --driver {}\"", gpu.name),
        gpu: &argument,
        options: &[],
    };
    let mut guest = guest.start()?;
    guest.wait_for(WAITING, SOON)?;
    // Whatever waits has begun to.
    thread::sleep(Duration::from_millis(500));
    daemon.kill()?;
    if front_end == FrontEnd::Tells {
        guest.wait_for(LOST, SOON)?;
    }
    daemon.restart()?;
    guest.wait_for(IDLE, SOON)?;
    daemon.kill()?;
    daemon.restart()?;
    if let Some((relay, _)) = &relay {
        let deadline = Instant::now() + SOON;
        while relay.restarts() < 2 {
            ensure!(Instant::now() < deadline, "the front end is stuck");
            thread::sleep(Duration::from_millis(1));
        }
    } else {
        // mini-vmm looks for its daemon now and then; a guest that opens the node before that gets ENODEV.
        thread::sleep(Duration::from_secs(1));
    }
    guest.type_line("go on")?;
    let ended = guest.wait(LIMIT)?;
    ended.expect(EXIT_CODE)?;
    let drawn = format!(
        "picture {}x{} {:016x}",
        picture.width,
        picture.height,
        picture.fingerprint()
    );
    let lines = ended.output.lines().map(str::trim);
    let count = lines.filter(|line| *line == drawn).count();
    ensure!(
        count == 2,
        "the guest has drawn `{drawn}` {count} times, not twice: {}",
        ended.tail()
    );
    if let Some((_, socket)) = relay {
        std::fs::remove_file(socket)?;
    }
    Ok(())
}

/// The test guest on a daemon's GPU, and where its picture goes.
fn start_guest(scenario: &str, daemon: &Daemon) -> Result<(Running, PathBuf), Failure> {
    let dump = new_path();
    let more = ["--dump", &dump.to_string_lossy()];
    let guest = mini_vmm::start_guest(scenario, &argument(&daemon.socket()), &more)?;
    Ok((guest, dump))
}

fn a_hundred_kills() -> Result<(), Failure> {
    let gpu = &VIRTIO_GPU;
    let picture = format!("fingerprint {:#018x}", expected(gpu)?.fingerprint());
    let (mut killed, other) = (start(gpu)?, start(gpu)?);
    let (mut guest, last) = start_guest(&format!("recover losses={KILLS}"), &killed)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut pictures = 0;
    let mut drawing = start_guest("draw", &other)?;
    for kill in 0..KILLS {
        guest.wait_for(&format!("session {kill} is open"), SOON)?;
        thread::sleep(Duration::from_micros(random.below(60_000)));
        killed.kill()?;
        killed.restart()?;
        if drawing.0.has_ended()? {
            ended_with(drawing, &picture)?;
            pictures += 1;
            drawing = start_guest("draw", &other)?;
        }
    }
    ended_with((guest, last), &picture)?;
    ended_with(drawing, &picture)?;
    ensure!(pictures > 0, "no picture was done between the kills");
    println!("{} pictures beside {KILLS} kills", pictures + 1);
    Ok(())
}

/// The test guest ends well, with that picture.
fn ended_with((guest, dump): (Running, PathBuf), picture: &str) -> Result<(), Failure> {
    let ended = guest.wait(SOON)?;
    ended.expect(0)?;
    std::fs::remove_file(dump)?;
    ensure!(
        ended.output.contains(picture),
        "no picture has {picture}: {}",
        ended.tail()
    );
    Ok(())
}

/// The same numbers each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
