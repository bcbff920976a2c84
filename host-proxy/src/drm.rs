//! Host driver `drm`: performs validated operations on a real DRM node of this machine.
//!
//! A VMM makes one [`DrmDriver`] per node that it offers to guests; the session opens files through it. One guest
//! file is one open file description, so handles and contexts of two files never meet: the kernel keeps them apart.
//! A guest's number never becomes an address or a file descriptor here: `ioctl` puts addresses of the call's own
//! buffer and descriptors of the session's objects in, and takes both out again.
//!
//! What waits in the kernel is ended by a signal to its thread (`interrupt`): `SIGRTMIN + 1` of this process
//! belongs to this driver.

mod interrupt;
mod ioctl;
mod opener;

pub use ioctl::perform_by;

use crate::call::Call;
use crate::cancel::Cancel;
use crate::driver::{HostDriver, HostObject, Identity, Mapping};
use crate::sandbox::Allowed;
pub use opener::OPENER;
use opener::Opener;
use pvgpu_protocol::family::Family;
use pvgpu_protocol::schema::command;
use pvgpu_protocol::{Errno, family, wire};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Major device number of all DRM nodes (`DRM_MAJOR` of the kernel).
const DRM_MAJOR: u32 = 226;

/// A DRM node of this machine.
#[derive(Debug)]
pub struct DrmDriver {
    path: PathBuf,
    identity: Identity,
    /// Opens the node for the threads of the sandbox, from when there is one.
    opener: Mutex<Option<Arc<Opener>>>,
}

/// What the threads of a device do with a node beside its ioctls.
static SYSTEM_CALLS: &[Allowed] = &[
    Allowed::any(libc::SYS_ppoll, "waits for what a guest waits for"),
    Allowed::any(libc::SYS_lseek, "the size of a dma-buf"),
    Allowed::equal(
        libc::SYS_fcntl,
        1,
        libc::F_SETFD.cast_unsigned(),
        "descriptors that the driver gives out do not survive exec",
    ),
];

/// What the threads of a device may do with a node whose driver speaks those families: their ioctls, in each of their
/// forms, and what goes with them.
pub fn system_calls(families: &[&'static Family]) -> Vec<Allowed> {
    let ioctls = families.iter().flat_map(|family| family.ioctls);
    let forms = ioctls.flat_map(|ioctl| {
        let older = ioctl.older_sizes.iter().copied();
        let older = older.map(|size| command::with_size(ioctl.command, size));
        let forms = std::iter::once(ioctl.command).chain(older);
        forms.map(|command| Allowed::ioctl(command, ioctl.name))
    });
    forms.chain(SYSTEM_CALLS.iter().copied()).collect()
}

/// Why a node cannot be offered to guests.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DrmError {
    /// There is no such file.
    #[error(
        "there is no {path}: `ls /dev/dri` shows the GPU nodes; with none, load the GPU's kernel driver"
    )]
    NotFound {
        /// The node.
        path: PathBuf,
    },
    /// It may not be opened.
    #[error(
        "no permission to open {path}: add this user to the node's group, `render` or `video`, and log in again"
    )]
    Permission {
        /// The node.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path} is not a DRM node: name one of /dev/dri/renderD* or /dev/dri/card*")]
    NotDrm {
        /// The file.
        path: PathBuf,
    },
    /// Its driver has no schemas.
    #[error(
        "the driver of {path} is {driver}, but pvgpu has schemas only for {known}: name another node"
    )]
    Unknown {
        /// The node.
        path: PathBuf,
        /// What the driver calls itself.
        driver: String,
        /// The drivers that have schemas.
        known: String,
    },
    /// It cannot be opened or asked.
    #[error("cannot use {path}: {error}; the kernel log may tell more")]
    Io {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The signal that ends waiting calls cannot be set up.
    #[error("cannot set up signal {signal}, which ends waiting calls: {error}; leave it to pvgpu")]
    Signal {
        /// Its number.
        signal: i32,
        /// What went wrong.
        error: io::Error,
    },
}

impl DrmDriver {
    /// The node at `path`, a `renderD*` or `card*` of `/dev/dri`. It is opened to ask who its driver is.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, DrmError> {
        let path = path.into();
        interrupt::install().map_err(|error| DrmError::Signal {
            signal: interrupt::signal(),
            error,
        })?;
        let refuse = |error: io::Error| {
            let path = path.clone();
            match error.kind() {
                io::ErrorKind::NotFound => DrmError::NotFound { path },
                io::ErrorKind::PermissionDenied => DrmError::Permission { path },
                _ => DrmError::Io { path, error },
            }
        };
        let metadata = fs::metadata(&path).map_err(refuse)?;
        let node = metadata.file_type().is_char_device();
        if !node || libc::major(metadata.rdev()) != DRM_MAJOR {
            return Err(DrmError::NotDrm { path });
        }
        let file = open(&path, wire::open::RDWR).map_err(refuse)?;
        let identity = ioctl::version(file.as_fd()).map_err(refuse)?;
        if family::of_driver(&identity.name).is_empty() {
            let known: Vec<_> = family::ALL
                .iter()
                .filter(|family| {
                    !family.header.is_empty() && !family::of_driver(family.name).is_empty()
                })
                .map(|family| family.name)
                .collect();
            return Err(DrmError::Unknown {
                path,
                driver: identity.name,
                known: known.join(", "),
            });
        }
        Ok(Self {
            path,
            identity,
            opener: Mutex::default(),
        })
    }
}

/// Opens a node with the flags of [`wire::open`].
fn open(path: &Path, flags: u32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(flags & wire::open::RDWR != 0);
    if flags & wire::open::NONBLOCK != 0 {
        options.custom_flags(libc::O_NONBLOCK);
    }
    options.open(path)
}

impl HostDriver for DrmDriver {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        let mut opener = self.opener.lock().unwrap_or_else(PoisonError::into_inner);
        if opener.is_none() {
            let started = Opener::new(self.path.clone(), &Opener::filter()?)?;
            *opener = Some(Arc::new(started));
        }
        Ok(system_calls(self.families()))
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        let opener = self.opener.lock().unwrap_or_else(PoisonError::into_inner);
        let opener = opener.clone();
        let file = match opener {
            Some(opener) => opener.open(flags),
            None => open(&self.path, flags),
        };
        let file = file.map_err(errno)?;
        Ok(Arc::new(DrmFile(file.into())))
    }
}

/// The errno of a failed system call. `ENOTCONN`, which no GPU driver gives, would tell the guest that its session is lost.
fn errno(error: io::Error) -> Errno {
    match Errno::new(error.raw_os_error().unwrap_or(0)) {
        Errno::ENOTCONN => Errno::EIO,
        errno => errno,
    }
}

/// Repeats a call that may wait until it is done or cancelled; other signals do not end it.
fn wait<T>(cancel: &Cancel, mut attempt: impl FnMut() -> io::Result<T>) -> Result<T, Errno> {
    interrupt::interruptible(cancel, || {
        loop {
            match attempt() {
                Err(error)
                    if error.kind() == io::ErrorKind::Interrupted && !cancel.is_cancelled() => {}
                result => return result.map_err(errno),
            }
        }
    })?
}

/// An open file of the node.
struct DrmFile(OwnedFd);

impl HostObject for DrmFile {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        if call.may_block() {
            wait(cancel, || ioctl::perform(self.0.as_fd(), call))
        } else {
            // It may still sleep for a moment, and a signal for somebody else may end that.
            loop {
                match ioctl::perform(self.0.as_fd(), call) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => return result.map_err(errno),
                }
            }
        }
    }

    fn mapping(&self, offset: u64, _length: u64, _protection: u32) -> Result<Mapping, Errno> {
        mapping(&self.0, offset)
    }

    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        poll(&self.0, events, timeout, cancel)
    }

    fn read(&self, buffer: &mut [u8], cancel: &Cancel) -> Result<usize, Errno> {
        wait(cancel, || ioctl::read(self.0.as_fd(), buffer))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// What an ioctl gave out as a file descriptor: a dma-buf, a sync file, a synchronization object.
struct DrmObject(OwnedFd);

impl HostObject for DrmObject {
    fn size(&self) -> Result<u64, Errno> {
        ioctl::size(self.0.as_fd()).map_err(errno)
    }

    fn mapping(&self, offset: u64, _length: u64, _protection: u32) -> Result<Mapping, Errno> {
        mapping(&self.0, offset)
    }

    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        poll(&self.0, events, timeout, cancel)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// The kernel itself refuses a mapping that is not wholly inside a buffer, when it is made.
fn mapping(fd: &OwnedFd, offset: u64) -> Result<Mapping, Errno> {
    let fd = fd.try_clone().map_err(errno)?;
    Ok(Mapping { fd, offset })
}

fn poll(
    fd: &OwnedFd,
    events: u32,
    timeout: Option<Duration>,
    cancel: &Cancel,
) -> Result<u32, Errno> {
    // Later than the clock can tell is for ever.
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    wait(cancel, || {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        ioctl::poll(fd.as_fd(), events, left)
    })
}

#[cfg(test)]
mod tests;
