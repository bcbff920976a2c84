//! What a running device tells about itself, and the switch of its trace: for any thread, without the device.
//!
//! [`crate::device::Device::monitor`] gives it out. It keeps no host driver, file or
//! memory of a guest alive, and never waits for a guest or for the host driver; nor does a device wait for whoever asks, but for
//! the moment of a copy.

use crate::driver::Identity;
use crate::session::Session;
use crate::statistics::{self, Counters, Driver, Statistics};
use crate::trace::{Busy, Trace};
use pvgpu_protocol::control::Limits;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A view of a device. It may outlive the device, and then has what was counted.
#[derive(Clone)]
pub struct Monitor(Arc<Inner>);

struct Inner {
    driver: Driver,
    limits: Limits,
    counters: Arc<Counters>,
    trace: Arc<Trace>,
    /// Held only while a session is read, which nobody takes out of here meanwhile: so a session never ends on the thread of
    /// somebody who only looks.
    session: Mutex<Option<Arc<Session>>>,
}

impl Monitor {
    /// Of a device without a session.
    pub(crate) fn new(
        identity: &Identity,
        limits: Limits,
        counters: &Arc<Counters>,
        trace: &Arc<Trace>,
    ) -> Self {
        Self(Arc::new(Inner {
            driver: Driver {
                name: statistics::shortened(&identity.name),
                version: identity.version,
            },
            limits,
            counters: Arc::clone(counters),
            trace: Arc::clone(trace),
            session: Mutex::default(),
        }))
    }

    /// The session to look at from now on. Its owner keeps it until there is another one, or none.
    pub(crate) fn watch(&self, session: Option<Arc<Session>>) {
        *self.session() = session;
    }

    /// What the device has counted since it was made, and what its session uses now.
    pub fn statistics(&self) -> Statistics {
        let session = self.session();
        let session = session.as_ref();
        Statistics {
            driver: self.0.driver.clone(),
            session: session.map(|session| session.status()),
            usage: session.map(|session| session.usage()),
            limits: self.0.limits,
            trace: self.0.trace.recording(),
            ..self.0.counters.read()
        }
    }

    /// Records every request from now on in `file`, at most `limit` bytes; the device's threads write to it, and wait where it
    /// makes them wait.
    pub fn start_trace(&self, file: File, limit: u64) -> Result<(), Busy> {
        self.0.trace.start(file, limit)
    }

    /// Records no more. Whether there was a trace, which is complete when this returns; an error says that its end is missing.
    pub fn stop_trace(&self) -> io::Result<bool> {
        self.0.trace.stop()
    }

    fn session(&self) -> MutexGuard<'_, Option<Arc<Session>>> {
        let session = self.0.session.lock();
        session.unwrap_or_else(PoisonError::into_inner)
    }
}
