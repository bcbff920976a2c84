//! The system calls on a DRM node: `ioctl`, `ppoll`, `read`.
//!
//! Used by [`super`] alone, and by recording drivers. [`perform_by`] is the only place where a call's pointer fields hold addresses and its
//! descriptor fields hold numbers of this process; both are gone when it returns.

#![allow(unsafe_code)]

use super::DrmObject;
use crate::call::Call;
use crate::driver::Identity;
use pvgpu_protocol::family::core;
use pvgpu_protocol::layout::PRESENT;
use pvgpu_protocol::schema::command;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// No file descriptor.
const NONE: RawFd = -1;

/// Performs a validated call on the node. On success the descriptors that the kernel gave out are the call's
/// objects. It may be repeated after an error.
pub(super) fn perform(node: BorrowedFd<'_>, call: &mut Call) -> io::Result<i32> {
    perform_by(call, |command, argument| {
        // SAFETY: `perform_by` vouches for the argument and all that it points to.
        let result = unsafe { libc::ioctl(node.as_raw_fd(), command.into(), argument) };
        match result {
            0.. => Ok(result),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// Performs a validated call as on a node, by what stands for the kernel: it gets the command number and the argument's
/// address, where all of [`Call::bytes_mut`] lies. All its pointers are null or lead into these bytes, to as many as the
/// schema says, and all of it is writable until it returns. For drivers that record what a node would be given.
pub fn perform_by(
    call: &mut Call,
    kernel: impl FnOnce(u32, *mut u8) -> io::Result<i32>,
) -> io::Result<i32> {
    if call.argument().len() < usize::from(command::size(call.command())) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let command = call.command();
    let fds: Vec<(usize, RawFd)> = call
        .fds()
        .map(|(field, object)| match object {
            None => Ok((field, NONE)),
            Some(object) => match object.fd() {
                Some(fd) => Ok((field, fd.as_raw_fd())),
                None => Err(io::Error::from_raw_os_error(libc::EBADF)),
            },
        })
        .collect::<Result<_, _>>()?;
    let base = call.bytes_mut().as_mut_ptr();
    let address = base.expose_provenance();
    let pointers: Vec<(usize, usize, u64)> = call
        .arrays()
        .map(|(array, range)| {
            // What the guest sent: an address only says whether there is one.
            let present = u64::from(array.address != 0) * PRESENT;
            let target = if range.is_empty() {
                0
            } else {
                address + range.start
            };
            (array.field, target, present)
        })
        .collect();
    for (field, target, _) in &pointers {
        put(call, *field, (*target as u64).to_ne_bytes());
    }
    for (field, fd) in &fds {
        put(call, *field, fd.to_ne_bytes());
    }

    let result = kernel(command, call.bytes_mut().as_mut_ptr());

    if result.is_ok() {
        let given: Vec<_> = call.fds_out().collect();
        for field in given {
            let sent = fds.iter().find(|(sent, _)| *sent == field);
            let fd = get(call, field).map_or(NONE, RawFd::from_ne_bytes);
            if fd >= 0 && sent.is_none_or(|(_, sent)| *sent != fd) {
                // SAFETY: the kernel has just made this descriptor for this call and told nobody else.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                // A guest may ask for one that survives `exec`, but it is ours, not the guest's.
                // SAFETY: sets a flag of a descriptor that this function owns.
                unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
                call.put_object(field, Arc::new(DrmObject(fd)));
            }
        }
    }
    for (field, _, present) in &pointers {
        put(call, *field, present.to_ne_bytes());
    }
    for (field, _) in &fds {
        put(call, *field, NONE.to_ne_bytes());
    }
    result
}

/// Writes a field of the call; one that an older form of the struct lacks is none of its bytes.
fn put<const N: usize>(call: &mut Call, field: usize, value: [u8; N]) {
    if let Some(target) = call.bytes_mut().get_mut(field..field + N) {
        target.copy_from_slice(&value);
    }
}

/// Reads a field of the call.
fn get<const N: usize>(call: &mut Call, field: usize) -> Option<[u8; N]> {
    call.bytes_mut().get(field..field + N)?.try_into().ok()
}

/// Asks a node who its driver is. `ENOTTY` when it is no DRM node.
pub(super) fn version(node: BorrowedFd<'_>) -> io::Result<Identity> {
    let mut texts = [[0u8; 256]; 3];
    let [name, date, description] = &mut texts;
    let mut version = core::Version {
        name_len: name.len() as u64,
        name: name.as_mut_ptr().expose_provenance() as u64,
        date_len: date.len() as u64,
        date: date.as_mut_ptr().expose_provenance() as u64,
        desc_len: description.len() as u64,
        desc: description.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the argument is the struct that the command names, and each of its pointers leads to as many bytes as
    // the length beside it says, which live until the call returns.
    let result = unsafe { libc::ioctl(node.as_raw_fd(), core::VERSION.into(), &raw mut version) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let text = |bytes: &[u8; 256], length: u64| {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        String::from_utf8_lossy(bytes.get(..length).unwrap_or(bytes)).into_owned()
    };
    let [name, date, description] = &texts;
    Ok(Identity {
        name: text(name, version.name_len),
        version: [
            version.version_major,
            version.version_minor,
            version.version_patchlevel,
        ],
        date: text(date, version.date_len),
        description: text(description, version.desc_len),
    })
}

/// Waits once for `events`, for ever without a timeout; zero when the time is over.
pub(super) fn poll(fd: BorrowedFd<'_>, events: u32, timeout: Option<Duration>) -> io::Result<u32> {
    let mut asked = libc::pollfd {
        fd: fd.as_raw_fd(),
        // Bits beyond those of `poll` mean nothing.
        events: i16::from_ne_bytes(low_bytes(events)),
        revents: 0,
    };
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: one valid pollfd, a timeout that is null or lives until the call returns, no signal mask.
    let result = unsafe { libc::ppoll(&raw mut asked, 1, timeout, std::ptr::null()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u16::from_ne_bytes(asked.revents.to_ne_bytes()).into())
}

/// The lower 16 bits, as bytes.
fn low_bytes(value: u32) -> [u8; 2] {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b]).to_ne_bytes()
}

/// Reads once.
pub(super) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let result = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The end of what it holds; the position that this sets means nothing to a dma-buf.
pub(super) fn size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: takes no memory.
    let end = unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}
