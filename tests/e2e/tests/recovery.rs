//! A guest whose GPU's daemon is killed hears of it and goes on with the next one, on this machine's KVM: whether its front end
//! tells it (`mini-vmm`) or not (`SilentFrontEnd`).
//!
//! Without /dev/kvm these tests fail, unless `PVGPU_WITHOUT_KVM=1` says that this is known.

mod guest_program;

use guest_program::{guest, proxyd, with_kvm};
use pvgpu_e2e::daemon::Daemon;
use pvgpu_e2e::guest_vm::{self, Run};
use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_e2e::silent_front_end::SilentFrontEnd;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_mini_vmm::Gpu;
use pvgpu_scenarios::{Picture, soft};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

fn expected() -> Picture {
    let driver = SoftDriver::new(SoftConfig::default()).unwrap();
    let mut file = LoopbackFile::open(Arc::new(driver)).unwrap();
    soft::draw(&mut file, &mut |_, _| {}).unwrap()
}

fn run(words: &str, socket: PathBuf, line: impl FnMut(&str) + Send + 'static) -> Run {
    let gpu = Gpu::VhostUser {
        socket,
        aperture: true,
    };
    guest_vm::run_with(guest(), words, gpu, line).unwrap()
}

/// The guest has ended well, with that picture.
fn drew(run: Run, expected: &Picture) {
    let said = run.lines.join("\n");
    assert_eq!(run.outcome.exit_code, 0, "{:?}\n{said}", run.outcome.ending);
    let picture = run.picture.expect("a picture");
    assert!(picture == *expected, "the pictures differ\n{said}");
}

/// Kills the daemon behind `socket` so often, each time some while after the guest has a new session.
fn lose(mut daemon: Daemon, losses: u32, socket: PathBuf) {
    let (say, sessions) = channel();
    // What is heard is heard on a vCPU's thread, which may kill nobody.
    let line = move |line: &str| {
        if line.starts_with("session ") {
            let _ = say.send(());
        }
    };
    let killer = std::thread::spawn(move || {
        for kill in 0..losses {
            sessions.recv().unwrap();
            std::thread::sleep(Duration::from_micros(u64::from(kill) * 7919 % 60_000));
            daemon.kill().unwrap();
            daemon.restart().unwrap();
        }
        daemon
    });
    let words = format!("scenario=recover losses={losses}");
    drew(run(&words, socket, line), &expected());
    drop(killer.join().unwrap());
}

#[test]
fn a_guest_that_is_told_goes_on_with_the_next_daemon_and_another_guest_notices_nothing() {
    if !with_kvm() {
        return;
    }
    let killed = Daemon::start(proxyd(), &[]).unwrap();
    let other = Daemon::start(proxyd(), &[]).unwrap();
    let socket = killed.socket();
    let killer = std::thread::spawn(move || lose(killed, 20, socket));
    let expected = expected();
    let mut pictures = 0;
    while !killer.is_finished() {
        drew(run("scenario=draw", other.socket(), |_| ()), &expected);
        pictures += 1;
    }
    killer.join().unwrap();
    assert!(pictures > 1, "only {pictures} pictures meanwhile");
}

#[test]
fn a_guest_that_nobody_tells_notices_the_next_daemon_by_itself() {
    if !with_kvm() {
        return;
    }
    let daemon = Daemon::start(proxyd(), &[]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let front_end = SilentFrontEnd::start(&socket, &daemon.socket()).unwrap();
    lose(daemon, 6, socket);
    assert_eq!(front_end.restarts(), 6);
}
