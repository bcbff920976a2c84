//! Descriptors that whoever started this process has left open for it.
//!
//! Programs take them by number from their command line or environment, before they open anything.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes the descriptor with this number, and closes it for programs that this one starts. Each may be taken once; the standard ones
/// are refused.
pub fn inherited(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: changes a flag of a descriptor, and touches no memory.
    if unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open; programs call this at their start, when they have opened nothing themselves that could have this number.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
