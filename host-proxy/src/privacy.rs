//! What other processes of the same user can see of this one: nothing of its memory, its descriptors and its files.
//!
//! Programs ask for it before they make anything; the library never does that to a process that is not its own.

#![allow(unsafe_code)]

use std::io;

/// From now on only the kernel and a privileged user see this process's memory and descriptors, it leaves no core dump, and
/// files that it creates are for its user alone (mode 0600).
pub fn hide() -> io::Result<()> {
    // SAFETY: changes attributes of this process, and touches no memory.
    let result = unsafe {
        libc::umask(0o077);
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
