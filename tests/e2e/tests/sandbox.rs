//! Every kind of thread of a device that does what it must not ends the process: here because its host driver does it.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use pvgpu_e2e::device_channel::DeviceHost;
use pvgpu_guest_driver::session::Session;
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity};
use pvgpu_host_proxy::sandbox::Sandbox;

/// Which thread misbehaves: the value of this variable in a process of its own.
const CHILD: &str = "PVGPU_TEST_CHILD";

/// A host driver that opens a file on the thread of that name.
struct Opening {
    identity: Identity,
    thread: String,
}

struct OpeningFile(String);

/// What no thread of a device may do.
fn open_on(thread: &str) {
    if std::thread::current().name() == Some(thread) {
        println!("opened: {}", File::open("/dev/null").is_ok());
    }
}

impl HostDriver for Opening {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, _: u32) -> Result<Arc<dyn HostObject>, Errno> {
        open_on(&self.thread);
        Ok(Arc::new(OpeningFile(self.thread.clone())))
    }
}

impl HostObject for OpeningFile {
    fn poll(&self, _: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        open_on(&self.0);
        if timeout == Some(Duration::ZERO) {
            return Ok(0);
        }
        let (wake, woken) = channel();
        let thread = self.0.clone();
        let wake = Arc::new(move || {
            open_on(&thread);
            // The first one comes from the queue's thread, and is lost.
            if std::thread::current().name() == Some("pvgpu-cancel") {
                wake.send(()).unwrap_or(());
            }
        });
        let waited = cancel.interruptible(wake, || woken.recv_timeout(Duration::from_secs(20)));
        waited.map(|_| 0)
    }
}

#[test]
#[ignore = "the process that the tests of the sandbox start"]
fn the_child() {
    let Ok(thread) = std::env::var(CHILD) else {
        return;
    };
    let identity = Identity {
        name: "vgem".into(),
        version: [1, 0, 0],
        date: String::new(),
        description: String::new(),
    };
    let config = DeviceConfig {
        doorbell: Doorbell::Worker,
        sandbox: match thread.strip_prefix("free ") {
            Some(_) => Sandbox::Off,
            None => Sandbox::On,
        },
        ..DeviceConfig::default()
    };
    let thread = thread.trim_start_matches("free ").to_owned();
    let driver = Arc::new(Opening { identity, thread });
    let mut host = DeviceHost::new(driver, config).unwrap();
    {
        let mut session = Session::connect(host.activate().unwrap(), "test").unwrap();
        let file = session.open(2).unwrap();
        let watch = 1 << 40;
        session.watch(watch, file, 1).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        session.cancel(watch).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    host.reset();
    println!("the device has ended");
}

fn child(thread: &str) -> (Option<i32>, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_child", "--ignored", "--nocapture"])
        .env(CHILD, thread)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.signal(), said)
}

#[test]
fn a_device_thread_that_opens_a_file_ends_the_process_and_is_named() {
    for thread in ["pvgpu-queue0", "pvgpu-worker", "pvgpu-cancel"] {
        let (signal, said) = child(thread);
        assert_eq!(signal, Some(libc::SIGSYS), "{thread}: {said}");
        let line =
            format!("the sandbox ends this process: thread {thread} made system call 257 (openat)");
        assert!(said.contains(&line), "{thread}: {said}");
        assert!(!said.contains("opened"), "{thread}: {said}");

        let (signal, said) = child(&format!("free {thread}"));
        assert_eq!(signal, None, "{thread}: {said}");
        assert!(said.contains("opened: true"), "{thread}: {said}");
        assert!(said.contains("the device has ended"), "{thread}: {said}");
    }
}
