//! The operator's terminal: raw while a guest uses it, as it was afterwards; and the signals that ask
//! the monitor to end.
//!
//! Only the program (`main`) uses it, never the library: signals and the terminal belong to a process.
//! However the machine ends (exit, error, panic, SIGINT, SIGTERM, SIGHUP, SIGQUIT), the terminal gets
//! its settings back.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::stop::{Ending, Stop};
use pvgpu_host_proxy::sandbox::Filter;

/// What must be restored, for the thread that ends the process on a second signal.
static SAVED: Mutex<Option<Settings>> = Mutex::new(None);

/// A terminal's settings and the terminal.
struct Settings {
    terminal: OwnedFd,
    original: libc::termios,
}

impl Settings {
    fn restore(&self) {
        // SAFETY: the descriptor is open and `original` was filled by tcgetattr.
        unsafe { libc::tcsetattr(self.terminal.as_raw_fd(), libc::TCSANOW, &self.original) };
    }
}

/// A terminal in raw mode; dropping it restores what was before.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal behind `fd` into raw mode (no echo, no line editing, no signals from keys;
    /// output is still processed, so that a line feed starts a new line). `None` if it is no terminal.
    ///
    /// # Errors
    ///
    /// When the terminal refuses its new settings.
    pub fn enter(fd: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let mut original = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills the structure or fails.
        if unsafe { libc::tcgetattr(fd.as_raw_fd(), original.as_mut_ptr()) } != 0 {
            return Ok(None);
        }
        // SAFETY: it did not fail.
        let original = unsafe { original.assume_init() };
        let settings = Settings {
            terminal: fd.try_clone_to_owned()?,
            original,
        };
        let mut raw = original;
        // SAFETY: cfmakeraw changes the structure it is given and nothing else.
        unsafe { libc::cfmakeraw(&mut raw) };
        raw.c_oflag = original.c_oflag;
        // SAFETY: the descriptor is open and `raw` is initialized.
        if unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings);
        Ok(Some(Self(())))
    }
}

/// Restores the terminal, if it is in raw mode.
fn restore() {
    if let Some(settings) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        settings.restore();
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// The signals that ask a program to end, held back from every thread.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Holds them back. Call it before any other thread exists, since threads inherit what is blocked.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the signal mask.
    pub fn block() -> io::Result<Self> {
        let mut signals = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the set; sigaddset then changes it.
        let signals = unsafe {
            libc::sigemptyset(signals.as_mut_ptr());
            let mut signals: libc::sigset_t = signals.assume_init();
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
                libc::sigaddset(&mut signals, signal);
            }
            signals
        };
        // SAFETY: the set is initialized and no old mask is asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut()) } {
            0 => Ok(Self(signals)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// From now on the first of them ends the machine in an orderly way and a second one the process
    /// at once. The thread that waits for them is under that filter.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a thread.
    pub fn end(self, stop: Stop, filter: &Filter) -> io::Result<()> {
        let serve = move || {
            loop {
                let mut signal = 0;
                // SAFETY: both arguments point to initialized values of the right type.
                if unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {
                    continue;
                }
                let ending = Ending::Stopped {
                    signal: Some(signal),
                };
                if stop.stopped() {
                    restore();
                    std::process::exit(i32::from(ending.status()));
                }
                stop.end(ending);
            }
        };
        filter.spawn("signals".into(), serve).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd};

    fn terminal() -> (OwnedFd, OwnedFd) {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: openpty writes two descriptors; the rest may be null.
        let result =
            unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) };
        assert_eq!(result, 0);
        // SAFETY: both were just opened and nothing else owns them.
        unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) }
    }

    fn local_flags(fd: &OwnedFd) -> libc::tcflag_t {
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure or fails, which is checked right after.
        let result = unsafe { libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) };
        assert_eq!(result, 0);
        // SAFETY: it succeeded.
        unsafe { settings.assume_init() }.c_lflag
    }

    // One test, since the settings to restore are the process's.
    #[test]
    fn the_terminal_is_raw_for_a_guest_and_restored_even_after_a_panic() {
        let (_master, slave) = terminal();
        let before = local_flags(&slave);
        assert_ne!(before & (libc::ECHO | libc::ICANON | libc::ISIG), 0);
        {
            let _raw = RawMode::enter(slave.as_fd()).unwrap().unwrap();
            assert_eq!(
                local_flags(&slave) & (libc::ECHO | libc::ICANON | libc::ISIG),
                0
            );
        }
        assert_eq!(local_flags(&slave), before);

        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _raw = RawMode::enter(slave.as_fd()).unwrap().unwrap();
            panic!("the monitor fails while a guest has the terminal");
        }));
        assert!(panic.is_err());
        assert_eq!(local_flags(&slave), before);

        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(
            RawMode::enter(file.as_fd()).unwrap().is_none(),
            "not a terminal"
        );
    }
}
