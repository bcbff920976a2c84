//! The device in a process of its own: `pvgpu-proxyd` behind `mini-vmm`'s front end, on this machine's KVM.
//!
//! Without /dev/kvm these tests fail, unless `PVGPU_WITHOUT_KVM=1` says that this is known.

mod guest_program;

use guest_program::{guest, proxyd, with_kvm};
use pvgpu_e2e::daemon::Daemon;
use pvgpu_e2e::guest_vm;
use pvgpu_mini_vmm::Gpu;
use pvgpu_protocol::control::decode_trace;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// The GPU of that daemon.
fn gpu(daemon: &Daemon) -> Gpu {
    Gpu::VhostUser {
        socket: daemon.socket(),
        aperture: true,
    }
}

#[test]
fn a_daemon_serves_one_guest_after_the_other_and_forgets_each_of_them() {
    if !with_kvm() {
        return;
    }
    let daemon = Daemon::start(proxyd(), &[]).unwrap();
    let draw = || {
        let run = guest_vm::run_with(guest(), "scenario=draw", gpu(&daemon), |_| ()).unwrap();
        daemon.wait_for("the front end is gone").unwrap();
        assert_eq!(run.outcome.exit_code, 0, "{:?}", run.lines);
        run.picture.expect("a picture")
    };
    let first = draw();
    assert!(draw() == first, "the pictures differ");
}

#[test]
fn a_guest_whose_daemon_is_killed_in_the_middle_of_a_picture_hears_of_it_and_does_not_hang() {
    if !with_kvm() {
        return;
    }
    let mut daemon = Daemon::start(proxyd(), &[]).unwrap();
    let gpu = gpu(&daemon);
    let ((reached, middle), (killed, dead)) = (channel(), channel::<()>());
    // What is heard is heard on a vCPU's thread, which may kill nobody.
    let line = move |line: &str| {
        if line.starts_with("step GEM_MMAP") && reached.send(()).is_ok() {
            let _ = dead.recv();
        }
    };
    let killer = std::thread::spawn(move || {
        middle.recv().unwrap();
        drop(middle);
        daemon.kill().unwrap();
        drop(killed);
    });
    let run = guest_vm::run_with(guest(), "scenario=draw", gpu, line).unwrap();
    killer.join().unwrap();
    assert_eq!(run.outcome.exit_code, 1, "{:?}", run.lines);
    let last = run.lines.last().unwrap();
    assert!(last.starts_with("error:"), "{:?}", run.lines);
}

/// What pvgpu-ctl answers to these words about the proxy at `socket`.
fn ctl(socket: &Path, words: &[&str]) -> String {
    let mut ctl = Command::new(proxyd().with_file_name("pvgpu-ctl"));
    let output = ctl
        .arg("--socket")
        .arg(socket)
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// The session that it shows there.
fn session(control: &Path) -> serde_json::Value {
    let status = ctl(control, &["status", "--json"]);
    serde_json::from_str::<serde_json::Value>(&status).unwrap()["session"].clone()
}

#[test]
fn an_operator_sees_the_guest_of_a_daemon_come_and_go_and_records_what_it_asks() {
    if !with_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (control, trace) = (folder.path().join("control"), folder.path().join("trace"));
    let daemon = Daemon::start(proxyd(), &["--control", control.to_str().unwrap()]).unwrap();
    assert!(session(&control).is_null());
    ctl(&control, &["trace", "start", trace.to_str().unwrap()]);
    let ((reached, middle), (seen, go_on)) = (channel(), channel::<()>());
    let line = move |line: &str| {
        if line.starts_with("step GEM_MMAP") && reached.send(()).is_ok() {
            let _ = go_on.recv();
        }
    };
    let gpu = gpu(&daemon);
    let guest = std::thread::spawn(move || {
        guest_vm::run_with(guest(), "scenario=draw", gpu, line).unwrap()
    });
    middle.recv().unwrap();
    drop(middle);
    assert_eq!(session(&control)["state"], "open");
    drop(seen);
    let run = guest.join().unwrap();
    assert_eq!(run.outcome.exit_code, 0, "{:?}", run.lines);
    daemon.wait_for("the front end is gone").unwrap();
    assert!(session(&control).is_null());
    ctl(&control, &["trace", "stop"]);
    let trace = std::fs::read(trace).unwrap();
    let (mut rest, mut records) = (&trace[..], 0);
    while !rest.is_empty() {
        let (_, length) = decode_trace(rest).expect("a whole record");
        rest = &rest[length..];
        records += 1;
    }
    let completed = ctl(&control, &["prometheus"]);
    let completed = completed
        .lines()
        .find(|line| line.starts_with("pvgpu_requests_completed_total{"))
        .and_then(|line| line.rsplit(' ').next());
    assert_eq!(completed, Some(&*records.to_string()));
}

#[test]
fn an_operator_sees_the_end_of_a_killed_mini_vmm_and_asks_the_next_daemon_at_the_same_socket() {
    if !with_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control");
    let mut daemon = Daemon::start(proxyd(), &["--control", control.to_str().unwrap()]).unwrap();
    let mut vmm = Command::new(proxyd().with_file_name("mini-vmm"))
        .args(["run", "--kernel"])
        .arg(guest())
        .args(["--cmdline", "scenario=bench measure=nop rounds=100000000"])
        .arg("--gpu")
        .arg(format!("vhost-user:{}", daemon.socket().display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while session(&control)["state"] != "open" && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let seen = session(&control);
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    assert_eq!(seen["state"], "open");
    daemon.wait_for("the front end is gone").unwrap();
    assert!(session(&control).is_null());
    daemon.kill().unwrap();
    assert!(control.exists());
    daemon.restart().unwrap();
    assert!(session(&control).is_null());
}
