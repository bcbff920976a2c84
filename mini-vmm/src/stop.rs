//! How a machine ends, and how whoever learns of it tells everybody else.
//!
//! Devices, vCPU threads, the signal thread and tests call [`Stop::end`]; the first ending wins. The
//! event loop wakes by the event inside and takes the machine down. Nothing here may block.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a machine stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Ending {
    /// The guest wrote this code to the debug device.
    Exit {
        /// The 32-bit value written.
        code: u32,
    },
    /// The guest reset the machine (keyboard controller, or a triple fault where `reboot=t` asked for it).
    Reset,
    /// The guest crashed so that the processor shut down.
    TripleFault {
        /// What is known of the place: vCPU, instruction pointer.
        place: String,
    },
    /// KVM could not go on with a vCPU.
    Failure {
        /// What is known of the cause and the place.
        cause: String,
    },
    /// Somebody outside the guest stopped the machine.
    Stopped {
        /// The signal that asked for it, if one did.
        signal: Option<i32>,
    },
}

/// Exit status of a process whose guest crashed or could not be run on.
pub const CRASH_STATUS: u8 = 3;

impl Ending {
    /// The process exit status that stands for this ending: the guest's code (255 where its low eight
    /// bits are zero but the code is not), 0 for a reset, [`CRASH_STATUS`], or 128 plus the signal
    /// (130 when a person or a program stopped the machine without one).
    pub fn status(&self) -> u8 {
        match self {
            Self::Exit { code: 0 } | Self::Reset => 0,
            Self::Exit { code } => match (code & 0xff) as u8 {
                0 => 255,
                low => low,
            },
            Self::TripleFault { .. } | Self::Failure { .. } => CRASH_STATUS,
            Self::Stopped { signal } => {
                u8::try_from(signal.unwrap_or(libc::SIGINT).saturating_add(128)).unwrap_or(255)
            }
        }
    }
}

/// The shared switch that ends a machine. Clones are the same switch.
#[derive(Debug, Clone)]
pub struct Stop(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stopped: AtomicBool,
    ending: Mutex<Option<Ending>>,
    event: EventFd,
}

impl Stop {
    /// A machine that is to run.
    ///
    /// # Errors
    ///
    /// When the host has no file descriptor left for the event.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            stopped: AtomicBool::new(false),
            ending: Mutex::new(None),
            event: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// Ends the machine. The first ending is the one reported; later ones change nothing.
    pub fn end(&self, ending: Ending) {
        let mut slot = self.0.ending.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(ending);
            self.0.stopped.store(true, Ordering::Release);
            // The counter cannot overflow: it is written once.
            let _ = self.0.event.write(1);
        }
    }

    /// Whether the machine has been told to stop.
    pub fn stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }

    /// The ending, once there is one.
    pub fn ending(&self) -> Option<Ending> {
        self.0
            .ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Becomes readable when the machine is told to stop, and stays so.
    pub(crate) fn event(&self) -> &EventFd {
        &self.0.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ending_is_the_one_reported() {
        let stop = Stop::new().unwrap();
        assert!(!stop.stopped());
        stop.end(Ending::Exit { code: 7 });
        stop.end(Ending::Reset);
        assert!(stop.stopped());
        assert_eq!(stop.ending(), Some(Ending::Exit { code: 7 }));
    }

    #[test]
    fn no_failing_guest_looks_like_success() {
        assert_eq!(Ending::Exit { code: 0 }.status(), 0);
        assert_eq!(Ending::Exit { code: 42 }.status(), 42);
        assert_eq!(Ending::Exit { code: 0x100 }.status(), 255);
        assert_eq!(Ending::Reset.status(), 0);
        assert_eq!(
            Ending::TripleFault {
                place: String::new()
            }
            .status(),
            3
        );
        assert_eq!(
            Ending::Stopped {
                signal: Some(libc::SIGTERM)
            }
            .status(),
            143
        );
        assert_eq!(Ending::Stopped { signal: None }.status(), 130);
    }
}
