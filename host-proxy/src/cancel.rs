//! Cancelling a request that waits.
//!
//! Each request that may block has one [`Cancel`]. The session sets it when the guest asks, or when the session
//! ends; the driver that waits registers how to be woken ([`Cancel::interruptible`]). A wake-up may come just before
//! the wait begins and be lost, so `worker` repeats it until the request is done.

use pvgpu_protocol::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How to wake a waiting driver; may be called often and from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Whether a request is cancelled.
#[derive(Default)]
pub struct Cancel {
    cancelled: AtomicBool,
    wake: Mutex<Option<Wake>>,
}

impl Cancel {
    /// Not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Cancels the request and wakes it if it waits. Call it again until the request is done.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // The lock is held while waking: once `interruptible` has returned, no wake-up comes any more.
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wake) = wake.as_ref() {
            wake();
        }
    }

    /// Runs `wait`, which `wake` can interrupt. `EINTR` without running it when already cancelled.
    pub fn interruptible<R>(&self, wake: Wake, wait: impl FnOnce() -> R) -> Result<R, Errno> {
        self.set(Some(wake));
        let result = if self.is_cancelled() {
            Err(Errno::EINTR)
        } else {
            Ok(wait())
        };
        self.set(None);
        result
    }

    fn set(&self, wake: Option<Wake>) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = wake;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_cancelled_request_does_not_begin_to_wait() {
        let cancel = Cancel::new();
        cancel.cancel();
        let result = cancel.interruptible(Arc::new(|| ()), || panic!("waited"));
        assert_eq!(result, Err::<(), _>(Errno::EINTR));
    }

    #[test]
    fn cancelling_wakes_the_one_that_waits() {
        let cancel = Cancel::new();
        let (sender, receiver) = mpsc::channel();
        let (started, has_started) = mpsc::channel();
        std::thread::scope(|scope| {
            let cancel = &cancel;
            scope.spawn(move || {
                has_started.recv().unwrap();
                cancel.cancel();
            });
            let wake = Arc::new(move || sender.send(()).unwrap());
            cancel
                .interruptible(wake, || {
                    started.send(()).unwrap();
                    receiver.recv().unwrap();
                })
                .unwrap();
        });
        assert!(cancel.is_cancelled());
    }
}
