//! The system calls that L1's first process needs and the standard library does not have.
//! `l1-init` calls them; they do nothing beside the one system call.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Mounts the file system `kind`, such as `proc`, on `target`; `source` is what it is told as its device, `options` are
/// its own.
pub fn mount(kind: &CStr, target: &CStr, source: &CStr, options: &CStr) -> io::Result<()> {
    // SAFETY: all four are C strings that live through the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    check(result)
}

/// Loads the kernel module in `file` with `parameters` (`name=value ...`).
pub fn load_module(file: &File, parameters: &CStr) -> io::Result<()> {
    // SAFETY: finit_module(fd, parameters, flags): the file is open, and the C string lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            0,
        )
    };
    check(if result < 0 { -1 } else { 0 })
}

/// Unloads the kernel module `name`; `EWOULDBLOCK` while it is in use.
pub fn unload_module(name: &CStr) -> io::Result<()> {
    // SAFETY: delete_module(name, flags): the C string lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    check(if result < 0 { -1 } else { 0 })
}

/// Lets the timer `hpet` (`/dev/hpet`) interrupt the machine `hertz` times a second, until the file is closed. No request is
/// needed for the next interrupt, nor need anybody read the file (`Documentation/timers/hpet.rst` of Linux).
pub fn start_periodic_interrupts(hpet: &File, hertz: libc::c_ulong) -> io::Result<()> {
    /// `HPET_IRQFREQ`, `HPET_EPI`, `HPET_IE_ON` (`linux/hpet.h`); the first takes its argument by value.
    const REQUESTS: [libc::Ioctl; 3] = [0x4008_6806, 0x6804, 0x6801];
    for (request, argument) in REQUESTS.into_iter().zip([hertz, 0, 0]) {
        // SAFETY: the file is open, and the three requests take no pointer.
        check(unsafe { libc::ioctl(hpet.as_raw_fd(), request, argument) })?;
    }
    Ok(())
}

/// Waits until everything written to the terminal `terminal` has left it.
pub fn drain_terminal(terminal: BorrowedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as it is borrowed.
    check(unsafe { libc::tcdrain(terminal.as_raw_fd()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
