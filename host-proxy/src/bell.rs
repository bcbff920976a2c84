//! What wakes a queue's thread: its doorbell, an eventfd that the device owns, and any other descriptor that a VMM in another
//! process rings.
//!
//! Used by [`crate::device`]. Both are watched for the moment at which they become ready, so neither is ever read: what another
//! process does to its descriptor (its counter, its flags) cannot keep a thread from waiting, nor from waking.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// One doorbell and who rings it.
pub(crate) struct Bell {
    epoll: Epoll,
    own: EventFd,
    other: Mutex<Option<File>>,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = Self {
            epoll: Epoll::new()?,
            own: EventFd::new(0)?,
            other: Mutex::default(),
        };
        bell.change(ControlOperation::Add, bell.own.as_raw_fd())?;
        Ok(bell)
    }

    /// The eventfd that the device owns.
    pub(crate) fn eventfd(&self) -> &EventFd {
        &self.own
    }

    /// Watches this descriptor instead of the one before.
    pub(crate) fn watch(&self, ring: Option<File>) -> io::Result<()> {
        let mut other = self.other.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = other.take() {
            self.change(ControlOperation::Delete, before.as_raw_fd())?;
        }
        if let Some(ring) = ring {
            self.change(ControlOperation::Add, ring.as_raw_fd())?;
            *other = Some(ring);
        }
        Ok(())
    }

    /// Waits until one of them was rung since the last time.
    pub(crate) fn wait(&self) {
        // It fails only when a signal interrupts it, and then the thread looks at its ring for nothing.
        let _ = self.epoll.wait(-1, &mut [EpollEvent::default()]);
    }

    fn change(&self, operation: ControlOperation, fd: RawFd) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(operation, fd, EpollEvent::new(events, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn each_of_both_descriptors_wakes_and_one_that_is_always_ready_wakes_once() {
        let bell = Arc::new(Bell::new().unwrap());
        let (mut reader, mut writer) = std::io::pipe().map(|(r, w)| (Some(r), w)).unwrap();
        std::io::Write::write_all(&mut writer, b"never read").unwrap();
        let ring = std::os::fd::OwnedFd::from(reader.take().unwrap());
        bell.watch(Some(ring.into())).unwrap();
        let (woken, wakes) = channel();
        let waiting = Arc::clone(&bell);
        std::thread::spawn(move || {
            loop {
                waiting.wait();
                if woken.send(()).is_err() {
                    break;
                }
            }
        });
        let in_time = Duration::from_secs(10);
        wakes.recv_timeout(in_time).unwrap();
        assert!(wakes.recv_timeout(Duration::from_millis(100)).is_err());
        std::io::Write::write_all(&mut writer, b"more").unwrap();
        wakes.recv_timeout(in_time).unwrap();
        bell.eventfd().write(1).unwrap();
        wakes.recv_timeout(in_time).unwrap();
        bell.watch(None).unwrap();
        std::io::Write::write_all(&mut writer, b"unwatched").unwrap_err();
        drop(wakes);
        bell.eventfd().write(1).unwrap();
    }

    #[test]
    fn a_file_that_is_always_ready_is_no_doorbell() {
        let bell = Bell::new().unwrap();
        assert!(bell.watch(Some(File::open("/dev/null").unwrap())).is_err());
        bell.watch(None).unwrap();
    }
}
