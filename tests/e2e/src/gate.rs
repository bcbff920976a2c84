//! A host driver whose files become ready when a test says so, for tests of what watches and polls.
//!
//! All files of a driver share one [`Gate`].

use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Events that are reported whether asked for or not: `POLLERR` and `POLLHUP`.
const ALWAYS: u32 = 8 | 16;

/// What the files of a [`GateDriver`] say.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ready: u32,
    error: Option<Errno>,
    open: usize,
    waiting: usize,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These events are there from now on.
    pub fn set(&self, ready: u32) {
        self.state().ready = ready;
        self.changed.notify_all();
    }

    /// Asking fails from now on.
    pub fn fail(&self, error: Errno) {
        self.state().error = Some(error);
        self.changed.notify_all();
    }

    /// How many files are open.
    pub fn open(&self) -> usize {
        self.state().open
    }

    /// How many callers wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting
    }
}

/// The driver.
pub struct GateDriver {
    identity: Identity,
    gate: Arc<Gate>,
}

impl Default for GateDriver {
    fn default() -> Self {
        Self {
            identity: Identity {
                name: "vgem".into(),
                version: [1, 0, 0],
                date: "0".into(),
                description: "gate".into(),
            },
            gate: Arc::default(),
        }
    }
}

impl GateDriver {
    /// The gate of its files.
    pub fn gate(&self) -> Arc<Gate> {
        Arc::clone(&self.gate)
    }
}

impl HostDriver for GateDriver {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, _flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        self.gate.state().open += 1;
        Ok(Arc::new(File(self.gate())))
    }
}

struct File(Arc<Gate>);

impl Drop for File {
    fn drop(&mut self) {
        self.0.state().open -= 1;
    }
}

impl HostObject for File {
    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let gate = Arc::clone(&self.0);
        cancel.interruptible(Arc::new(move || gate.changed.notify_all()), || {
            let mut state = self.0.state();
            state.waiting += 1;
            let result = loop {
                let ready = state.ready & (events | ALWAYS);
                if let Some(error) = state.error {
                    break Err(error);
                }
                if ready != 0 || deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                    break Ok(ready);
                }
                if cancel.is_cancelled() {
                    break Err(Errno::EINTR);
                }
                state = self
                    .0
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            state.waiting -= 1;
            result
        })?
    }
}
