//! The seam between the proxy and what performs a validated operation.
//!
//! The module `session` calls these traits, [`crate::drm`] (real ioctls) and [`crate::soft`] (the embedded GPU)
//! implement them. Whatever reaches a driver has been copied and checked against the schema; a driver must still
//! give an errno, never a panic, for values that only it can judge.

use crate::call::Call;
use crate::cancel::Cancel;
use crate::sandbox::Allowed;
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::{self, Family};
use std::any::Any;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Name and version of a host driver, as its `DRM_IOCTL_VERSION` gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Such as `virtio_gpu`; chooses the schemas.
    pub name: String,
    /// Major, minor and patch level.
    pub version: [i32; 3],
    /// Date.
    pub date: String,
    /// Description.
    pub description: String,
}

/// A GPU that the proxy can offer to guests.
pub trait HostDriver: Send + Sync {
    /// Who it is.
    fn identity(&self) -> &Identity;

    /// The ioctls that guests may use.
    fn families(&self) -> &'static [&'static Family] {
        family::of_driver(&self.identity().name)
    }

    /// The system calls that it makes on the threads of a device in the [sandbox](crate::sandbox), beyond
    /// [`THREAD`](crate::sandbox::THREAD) and [`DEVICE`](crate::sandbox::DEVICE). Asked once per device, before those
    /// threads exist: what they may not do, such as opening files, a driver gets ready for here.
    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        Ok(Vec::new())
    }

    /// The driver as a session of its own uses it: all files of one guest are opened through it. For a driver that shares
    /// what it has between guests rather than between files; the kernel's do not know of guests.
    fn for_session(&self) -> Option<Arc<dyn HostDriver>> {
        None
    }

    /// Opens the device once more; the flags are those of [`pvgpu_protocol::wire::open`].
    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno>;
}

/// An open file of the host driver, or an object that one of its ioctls gave out as a file descriptor (a dma-buf,
/// a sync file, a syncobj). It is released when the last reference goes.
///
/// Any method may be called from several threads at a time.
pub trait HostObject: Any + Send + Sync {
    /// Performs a validated ioctl and returns its non-negative result. An ioctl that waits must come back with
    /// `EINTR` soon after `cancel` is set. The call's bytes are returned to the guest even on error, as the kernel
    /// does.
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let _ = (call, cancel);
        Err(Errno::ENOTTY)
    }

    /// What to `mmap` for a mapping of that range. Every page of the range must be backed for as long as the
    /// descriptor's memory lives: touching it must never fault in the process that maps it.
    fn mapping(&self, offset: u64, length: u64, protection: u32) -> Result<Mapping, Errno> {
        let _ = (offset, length, protection);
        Err(Errno::ENODEV)
    }

    /// Waits until one of `events` (`POLLIN` and the like) or an error is there, for at most `timeout` (for ever
    /// if `None`), and returns what is there: zero when the time is over, `EINTR` when cancelled.
    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno>;

    /// Reads what `read(2)` would, waiting for it unless the file was opened non-blocking.
    fn read(&self, buffer: &mut [u8], cancel: &Cancel) -> Result<usize, Errno> {
        let _ = (buffer, cancel);
        Err(Errno::EINVAL)
    }

    /// Its size in bytes, as `lseek(2)` to its end gives it; `ESPIPE` when it has none.
    fn size(&self) -> Result<u64, Errno> {
        Err(Errno::ESPIPE)
    }

    /// The host file descriptor behind it, if there is one: what a real ioctl takes for it.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What backs a mapping: `mmap(.., MAP_SHARED, fd, offset)`.
#[derive(Debug)]
pub struct Mapping {
    /// A descriptor of its own, so that a concurrent close cannot change what is mapped.
    pub fd: OwnedFd,
    /// Offset in bytes, page aligned.
    pub offset: u64,
}
