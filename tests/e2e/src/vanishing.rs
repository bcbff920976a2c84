//! A host driver whose memory goes away under the guest that has mapped it, as that of an unplugged GPU does.
//!
//! It is the embedded GPU, but for what its files map: a file of its own, which is cut off when the guest submits commands.

use crate::loopback_file::LoopbackFile;
use crate::{ensure, guest_vm};
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity, Mapping};
use pvgpu_host_proxy::sandbox::{Allowed, Sandbox};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_mini_vmm::Ending;
use pvgpu_protocol::family::soft::DRM_IOCTL_SOFT_SUBMIT;
use pvgpu_scenarios as scenarios;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// As the default, but drawing may be slow: the testbed computes everything by emulation, twice at a time here.
const PATIENT: SoftConfig = SoftConfig {
    memory: 1 << 30,
    buffers: 1024,
    engines: 1,
    watchdog: Duration::from_secs(60),
    sandbox: Sandbox::On,
};

/// The driver.
pub struct Vanishing(SoftDriver);

impl Vanishing {
    /// A GPU of the default size, but more patient.
    pub fn new() -> io::Result<Self> {
        SoftDriver::new(PATIENT).map(Self)
    }
}

impl HostDriver for Vanishing {
    fn identity(&self) -> &Identity {
        self.0.identity()
    }

    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        let mut calls = self.0.system_calls()?;
        calls.push(Allowed::any(libc::SYS_openat, "a file behind each mapping"));
        Ok(calls)
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Ok(Arc::new(Open {
            soft: self.0.open(flags)?,
            mapped: Mutex::default(),
        }))
    }
}

/// An open file.
struct Open {
    soft: Arc<dyn HostObject>,
    mapped: Mutex<Vec<File>>,
}

impl Open {
    /// The files that are behind its mappings.
    fn mapped(&self) -> std::sync::MutexGuard<'_, Vec<File>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostObject for Open {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        if call.command() == DRM_IOCTL_SOFT_SUBMIT {
            for file in self.mapped().iter() {
                file.set_len(0).map_err(|_| Errno::EIO)?;
            }
        }
        self.soft.ioctl(call, cancel)
    }

    fn mapping(&self, offset: u64, length: u64, _protection: u32) -> Result<Mapping, Errno> {
        let file = tempfile::tempfile().map_err(|_| Errno::ENOMEM)?;
        file.set_len(offset + length).map_err(|_| Errno::ENOMEM)?;
        let fd = file.try_clone().map_err(|_| Errno::EMFILE)?.into();
        self.mapped().push(file);
        Ok(Mapping { fd, offset })
    }

    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        self.soft.poll(events, timeout, cancel)
    }

    fn read(&self, buffer: &mut [u8], cancel: &Cancel) -> Result<usize, Errno> {
        self.soft.read(buffer, cancel)
    }

    fn size(&self) -> Result<u64, Errno> {
        self.soft.size()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.soft.fd()
    }
}

/// How long a guest may take to notice.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a test guest that loses what it has mapped beside one that does not: the first goes on with zeros and ends by its own
/// complaint about them, the second draws its picture as ever.
pub fn beside_another_guest(guest: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (done, ended) = channel();
    let (driver, path) = (Arc::new(Vanishing::new()?), guest.to_owned());
    let losing = thread::spawn(move || {
        let run = guest_vm::run(&path, "scenario=draw", driver, Doorbell::Worker, |_| ());
        done.send(()).unwrap_or(());
        run
    });

    let soft = || SoftDriver::new(PATIENT).map(Arc::new);
    let expected = scenarios::soft::draw(&mut LoopbackFile::open(soft()?)?, &mut |_, _| {})?;
    let other = guest_vm::run(guest, "scenario=draw", soft()?, Doorbell::Worker, |_| ())?;
    ensure!(
        other.picture.as_ref() == Some(&expected),
        "the other guest has not drawn its picture: {:?}",
        other.outcome.ending
    );

    let waited = ended.recv_timeout(PATIENCE);
    ensure!(
        waited.is_ok(),
        "the guest still stands where it touched what is gone"
    );
    let losing = losing.join().map_err(|_| "the VMM has panicked")??;
    let said = losing.lines.join("\n");
    ensure!(
        losing.outcome.ending == Ending::Exit { code: 1 } && said.contains(ZEROS),
        "the guest should have found zeros in its picture: {:?}, {said}",
        losing.outcome.ending
    );
    Ok(())
}

/// What the test guest says of a picture full of zeros.
const ZEROS: &str = "is [0, 0, 0, 0]";
