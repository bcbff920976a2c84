//! The limit of this process on open files, which every buffer object of a guest counts against.
//!
//! Programs raise it before they make a GPU; the library never does that to a process that is not its own.

#![allow(unsafe_code)]

use std::io;

/// Raises the limit on open files to the most that this user may have, and returns it.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is an rlimit that the call may write.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a valid rlimit that the call only reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_once_and_stays() {
        let most = raise_open_files().unwrap();
        assert!(most >= 64);
        assert_eq!(raise_open_files().unwrap(), most);
    }
}
