//! A DRM device file as a program sees it. The test guest implements it over `guest-driver`, the native program over
//! the system calls; the scenarios use nothing else.

use pvgpu_protocol::Errno;
use zerocopy::{FromBytes, IntoBytes};

/// An open DRM device file. Dropping it closes the file.
pub trait DeviceFile: Sized {
    /// Memory of a buffer object in the caller's address space. Dropping it unmaps.
    type Mapping: Mapping;

    /// Opens the same device once more: a file with handles of its own.
    fn open_again(&self) -> Result<Self, Errno>;

    /// Issues the ioctl with that command number and gives its return value, zero or more.
    ///
    /// As in C, pointers in `argument` are addresses of the caller's own memory, and it is the caller who keeps
    /// that memory alive and large enough during the call.
    fn ioctl<T: FromBytes + IntoBytes>(
        &mut self,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno>;

    /// Maps `length` bytes, shared, readable and writable, from the offset that a MAP ioctl gave.
    fn map(&mut self, offset: u64, length: usize) -> Result<Self::Mapping, Errno>;

    /// Closes a file descriptor that an ioctl gave.
    fn close_fd(&mut self, fd: i32) -> Result<(), Errno>;

    /// A clock in nanoseconds that never goes back.
    fn now_ns(&self) -> u64;
}

/// Mapped memory of a buffer object. Ranges beyond [`Mapping::len`] panic: no scenario has a reason to ask for one.
#[allow(clippy::len_without_is_empty)] // a mapping is never empty
pub trait Mapping {
    /// Its length in bytes.
    fn len(&self) -> usize;

    /// Copies `bytes.len()` bytes at `offset` out of the memory.
    fn read(&self, offset: usize, bytes: &mut [u8]);

    /// Copies `bytes` into the memory at `offset`.
    fn write(&mut self, offset: usize, bytes: &[u8]);
}
