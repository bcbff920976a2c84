//! A host driver whose memory goes away under the guest that has mapped it, as that of an unplugged GPU does.
//!
//! It is the embedded GPU, but for what its files map: a file of its own, which is lost when the guest has waited for its
//! commands and is about to read.
#![allow(unsafe_code)]

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
use pvgpu_protocol::family::core::SYNCOBJ_WAIT;
use pvgpu_scenarios as scenarios;
use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
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

/// How memory is lost. KVM makes something else of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The file is cut off, so that touching it is a SIGBUS: KVM does not come back from such a page.
    CutOff,
    /// The mapping allows no access any more: `KVM_RUN` fails with `EFAULT`.
    NoAccess,
}

/// The driver.
pub struct Vanishing(SoftDriver, Loss);

impl Vanishing {
    /// A GPU of the default size, but more patient.
    pub fn new(loss: Loss) -> io::Result<Self> {
        SoftDriver::new(PATIENT).map(|soft| Self(soft, loss))
    }
}

impl HostDriver for Vanishing {
    fn identity(&self) -> &Identity {
        self.0.identity()
    }

    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        let mut calls = self.0.system_calls()?;
        calls.push(Allowed::any(libc::SYS_openat, "a file behind each mapping"));
        for call in [
            libc::SYS_read,
            libc::SYS_statx,
            libc::SYS_lseek,
            libc::SYS_mprotect,
        ] {
            calls.push(Allowed::any(call, "finding and locking its mapping"));
        }
        Ok(calls)
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Ok(Arc::new(Open {
            soft: self.0.open(flags)?,
            mapped: Mutex::default(),
            loss: self.1,
        }))
    }
}

/// An open file.
struct Open {
    soft: Arc<dyn HostObject>,
    mapped: Mutex<Vec<File>>,
    loss: Loss,
}

impl Open {
    fn lose(&self, file: &File) -> io::Result<()> {
        match self.loss {
            Loss::CutOff => file.set_len(0),
            Loss::NoAccess => forbid(&file.metadata()?),
        }
    }

    /// The files that are behind its mappings.
    fn mapped(&self) -> std::sync::MutexGuard<'_, Vec<File>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes all access from the mappings of this file: those in the aperture, there are no others. Files of other file systems may have
/// its number, those of this program's own code among them.
fn forbid(file: &fs::Metadata) -> io::Result<()> {
    let device = format!(
        "{:02x}:{:02x}",
        libc::major(file.dev()),
        libc::minor(file.dev())
    );
    let maps = fs::read_to_string("/proc/self/maps")?;
    // 7f00..-7f01.. rw-s 00000000 fe:00 1234 /tmp/..
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [range, _, _, on, number, ..] = words.as_slice() else {
            continue;
        };
        if *on != device || number.parse() != Ok(file.ino()) {
            continue;
        }
        let ends = range.split_once('-').map(|(start, end)| {
            let address = |text| usize::from_str_radix(text, 16).map_err(io::Error::other);
            Ok::<_, io::Error>((address(start)?, address(end)?))
        });
        let Some((start, end)) = ends.transpose()? else {
            continue;
        };
        let start_pointer = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: a mapping of this file lies in an aperture, whose memory no Rust reference ever points to.
        match unsafe { libc::mprotect(start_pointer, end - start, libc::PROT_NONE) } {
            0 => {}
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

impl HostObject for Open {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let result = self.soft.ioctl(call, cancel);
        if call.command() == SYNCOBJ_WAIT {
            for file in self.mapped().drain(..) {
                self.lose(&file).map_err(|_| Errno::EIO)?;
            }
        }
        result
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

/// Does `lose_beside_another_guest`; once more if the check of every second has replaced what was lost before the guest touched it.
pub fn beside_another_guest(guest: &Path, loss: Loss) -> Result<(), Box<dyn std::error::Error>> {
    for _ in 0..4 {
        let faults = lose_beside_another_guest(guest, loss)?;
        if loss == Loss::CutOff || faults > 0 {
            return Ok(());
        }
    }
    Err("KVM_RUN should have failed with EFAULT".into())
}

/// Runs a test guest that loses what it has mapped beside one that does not: the first goes on with zeros and ends by its own
/// complaint about them, the second draws its picture as ever. Gives how often KVM said so.
fn lose_beside_another_guest(guest: &Path, loss: Loss) -> Result<u64, Box<dyn std::error::Error>> {
    let (done, ended) = channel();
    let (driver, path) = (Arc::new(Vanishing::new(loss)?), guest.to_owned());
    let losing = thread::spawn(move || {
        let run = guest_vm::run(
            &path,
            "scenario=draw",
            driver,
            (Doorbell::Worker, guest_vm::APERTURE),
            |_| (),
        );
        done.send(()).unwrap_or(());
        run
    });

    let soft = || SoftDriver::new(PATIENT).map(Arc::new);
    let expected = scenarios::soft::draw(&mut LoopbackFile::open(soft()?)?, &mut |_, _| {})?;
    let other = guest_vm::run(
        guest,
        "scenario=draw",
        soft()?,
        (Doorbell::Worker, guest_vm::APERTURE),
        |_| (),
    )?;
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
    Ok(losing.outcome.exits.other)
}

/// What the test guest says of a picture full of zeros.
const ZEROS: &str = "is [0, 0, 0, 0]";
