//! Ending a system call that waits, from another thread: a signal whose handler does nothing.
//!
//! Used by [`super`] alone. A signal without `SA_RESTART` makes a sleeping call return `EINTR`. One that comes just
//! before the call begins to sleep is lost, so whoever cancels repeats it ([`crate::worker`]).

#![allow(unsafe_code)]

use crate::cancel::Cancel;
use pvgpu_protocol::Errno;
use std::sync::{Arc, OnceLock};
use std::{io, mem, ptr};

/// The signal. mini-vmm uses `SIGRTMIN` itself for its vCPU threads.
pub(super) fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Installs the handler, once in the life of the process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        // SAFETY: all zeros is a valid `sigaction`: no flags (so no SA_RESTART), an empty mask.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler has the type that `sa_flags` without SA_SIGINFO asks for, and may run at any time.
        match unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    };
    INSTALLED
        .get_or_init(install)
        .map_err(io::Error::from_raw_os_error)
}

/// Runs `wait` on this thread; cancelling sends the thread the signal until it has returned.
pub(super) fn interruptible<R>(cancel: &Cancel, wait: impl FnOnce() -> R) -> Result<R, Errno> {
    unblock();
    // SAFETY: always valid to ask.
    let thread = unsafe { libc::pthread_self() };
    let wake = move || {
        // SAFETY: `Cancel::interruptible` calls this only until it returns, so the thread is alive; the handler is
        // installed, since a file that waits comes from a driver (`DrmDriver::new`).
        unsafe { libc::pthread_kill(thread, signal()) };
    };
    cancel.interruptible(Arc::new(wake), wait)
}

/// A process that blocks signals in all its threads must not block this one.
fn unblock() {
    thread_local! {
        static DONE: () = {
            // SAFETY: a set that is emptied before use, with one valid signal in it.
            unsafe {
                let mut set: libc::sigset_t = mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, signal());
                libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
            }
        };
    }
    DONE.with(|()| ());
}
