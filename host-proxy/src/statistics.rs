//! What the proxy counts, for operators and benchmarks.

use crate::limit::Limit;
use crate::session::Usage;
use pvgpu_protocol::wire::Operation;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a device and its sessions; they only grow.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) doorbells: AtomicU64,
    pub(crate) interrupts: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) untraced: AtomicU64,
    operations: [AtomicU64; OPERATIONS],
    limits: [AtomicU64; Limit::ALL.len()],
}

const OPERATIONS: usize = 13;

impl Counters {
    pub(crate) fn count(&self, operation: Operation) {
        if let Some(counter) = self.operations.get(usize::from(operation.number())) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The guest has reached a limit.
    pub(crate) fn reached(&self, limit: Limit) {
        if let Some(counter) = self.limits.get(limit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What they say now, beside what a session uses.
    pub(crate) fn read(&self, usage: Option<Usage>) -> Statistics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let operations = (0..).zip(&self.operations).filter_map(|(number, counter)| {
            let name = Operation::from_number(number)?.name();
            Some((name, load(counter)))
        });
        let limits = Limit::ALL.iter().zip(&self.limits);
        Statistics {
            doorbells: load(&self.doorbells),
            interrupts: load(&self.interrupts),
            completed: load(&self.completed),
            events: load(&self.events),
            rejected: load(&self.rejected),
            malformed: load(&self.malformed),
            untraced: load(&self.untraced),
            operations: operations.collect(),
            limits_reached: limits
                .map(|(limit, counter)| (limit.name(), load(counter)))
                .collect(),
            usage,
        }
    }
}

/// Counters of a device and of its session, at one moment.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Statistics {
    /// How often the doorbell reached the device.
    pub doorbells: u64,
    /// How often the guest was interrupted.
    pub interrupts: u64,
    /// Requests completed.
    pub completed: u64,
    /// Events that the guest has got.
    pub events: u64,
    /// Requests answered with an errno before any host driver was asked.
    pub rejected: u64,
    /// Descriptor chains that were no request: without room for an answer, too long, or broken. And buffers on the event
    /// queue that could not take an event.
    pub malformed: u64,
    /// Requests that the trace lacks, since it has reached its size limit or could not be written.
    pub untraced: u64,
    /// Requests of each operation.
    pub operations: Vec<(&'static str, u64)>,
    /// How often the guest has reached each of its limits, by name ([`Limit::name`]).
    pub limits_reached: Vec<(&'static str, u64)>,
    /// What the session uses now.
    pub usage: Option<Usage>,
}

impl Statistics {
    /// How often the guest has reached that limit.
    pub fn reached(&self, limit: Limit) -> u64 {
        let mut limits = self.limits_reached.iter();
        let found = limits.find(|(name, _)| *name == limit.name());
        found.map_or(0, |(_, count)| *count)
    }
}
