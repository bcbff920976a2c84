//! What the proxy counts and times, for operators and benchmarks.

use crate::latency::Histogram;
use crate::limit::Limit;
use pvgpu_protocol::wire::Operation;
use pvgpu_protocol::{Errno, control::Limits};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::atomic::{AtomicU64, Ordering};

pub use crate::latency::Latency;
pub use crate::trace::{Busy, Recording};

/// Counters of a device and its sessions; they only grow.
pub(crate) struct Counters {
    pub(crate) doorbells: AtomicU64,
    pub(crate) interrupts: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) untraced: AtomicU64,
    /// Requests that were answered at once, one in [`TIMED`] of each operation.
    pub(crate) at_once: Histogram,
    /// Requests that may wait, all of them.
    pub(crate) waited: Histogram,
    operations: [AtomicU64; OPERATIONS],
    limits: [AtomicU64; Limit::ALL.len()],
    /// Answers with an errno, by its number; those of no such number are the first.
    errors: [AtomicU64; ERRNOS],
}

const OPERATIONS: usize = 13;

/// Linux has no greater error number than 133 for programs.
const ERRNOS: usize = 134;

/// One in so many requests of each operation is timed, beginning with the first: two looks at the clock take longer than
/// the proxy for the simplest request.
pub const TIMED: u64 = 16;

impl Default for Counters {
    fn default() -> Self {
        Self {
            doorbells: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            events: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            untraced: AtomicU64::new(0),
            at_once: Histogram::default(),
            waited: Histogram::default(),
            operations: [const { AtomicU64::new(0) }; OPERATIONS],
            limits: [const { AtomicU64::new(0) }; Limit::ALL.len()],
            errors: [const { AtomicU64::new(0) }; ERRNOS],
        }
    }
}

impl Counters {
    /// Counts a request; whether it is one of those that are timed.
    pub(crate) fn count(&self, operation: Operation) -> bool {
        let counter = self.operations.get(usize::from(operation.number()));
        counter.is_some_and(|counter| {
            counter
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(TIMED)
        })
    }

    /// The guest has reached a limit.
    pub(crate) fn reached(&self, limit: Limit) {
        if let Some(counter) = self.limits.get(limit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A request was answered with an errno.
    pub(crate) fn failed(&self, errno: Errno) {
        let number = usize::try_from(errno.number()).unwrap_or(0);
        let [other, ..] = &self.errors;
        let counter = self.errors.get(number).unwrap_or(other);
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What they say now; the rest is empty.
    pub(crate) fn read(&self) -> Statistics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let operations = (0..)
            .zip(&self.operations)
            .filter_map(|(number, counter)| Some((Operation::from_number(number)?, load(counter))));
        let limits = Limit::ALL.into_iter().zip(&self.limits);
        let errors = (0..).zip(&self.errors);
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
                .map(|(limit, counter)| (limit, load(counter)))
                .collect(),
            errors: errors
                .map(|(number, counter)| (ErrorKind(number), load(counter)))
                .filter(|(_, count)| *count > 0)
                .collect(),
            at_once: self.at_once.read(),
            waited: self.waited.read(),
            ..Statistics::default()
        }
    }
}

/// A device and its session at one moment.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Statistics {
    /// Who executes the operations.
    pub driver: Driver,
    /// The session, if the guest has started the device.
    pub session: Option<SessionStatus>,
    /// What the session uses now.
    pub usage: Option<Usage>,
    /// What a session may use at most; processor time of waiting requests is not among it.
    pub limits: Limits,
    /// Whether requests are recorded.
    pub trace: Recording,
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
    /// Requests that traces lack, since they had reached their size limit or could not be written.
    pub untraced: u64,
    /// Requests of each operation.
    pub operations: Vec<(Operation, u64)>,
    /// How often the guest has reached each of its limits.
    pub limits_reached: Vec<(Limit, u64)>,
    /// Requests answered with an errno, by errno, whoever it came from.
    pub errors: Vec<(ErrorKind, u64)>,
    /// How long the proxy took for requests that it answered at once: one in [`TIMED`] of each operation.
    pub at_once: Latency,
    /// How long requests took that may wait, from when they were handed to a worker thread: all of them. Watches are answered
    /// at once.
    pub waited: Latency,
}

impl Statistics {
    /// How often the guest has reached that limit.
    pub fn reached(&self, limit: Limit) -> u64 {
        let mut limits = self.limits_reached.iter();
        let found = limits.find(|(other, _)| *other == limit);
        found.map_or(0, |(_, count)| *count)
    }
}

/// The host driver as operators see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Driver {
    /// Name, such as `virtio_gpu`, at most [`NAME_LIMIT`] bytes of it.
    #[serde(deserialize_with = "owned")]
    pub name: String,
    /// Major, minor and patch level.
    pub version: [i32; 3],
}

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// The guest has started the device, but has not said its hello.
    Waiting,
    /// The guest may do everything.
    Open,
    /// It is over, but for what the host driver still has to let go of.
    Ending,
}

/// A session as operators see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SessionStatus {
    /// How far it has come.
    pub state: SessionState,
    /// Who the guest says it is, at most [`NAME_LIMIT`] bytes of it; empty before the hello.
    #[serde(deserialize_with = "owned")]
    pub guest: String,
    /// When the guest started the device, in seconds since 1970.
    pub since: u64,
}

/// What a session uses now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Open files.
    pub files: usize,
    /// Open files and other objects.
    pub objects: usize,
    /// Bytes mapped, into the aperture or with pages of the guest.
    pub mapped: u64,
    /// Bytes of GPU memory that handles and exported objects keep.
    pub memory: u64,
    /// GEM and syncobj handles.
    pub handles: u64,
    /// Requests that may be waiting, watches among them.
    pub in_flight: usize,
    /// Watches.
    pub watches: usize,
}

/// Most bytes of a name that somebody else has chosen, in statistics.
pub const NAME_LIMIT: usize = 64;

/// The beginning of a name, at most [`NAME_LIMIT`] bytes, fit for any terminal.
pub(crate) fn shortened(name: &str) -> String {
    let end = name.floor_char_boundary(NAME_LIMIT);
    let beginning = name.get(..end).unwrap_or_default();
    beginning.replace(char::is_control, "?")
}

/// A text out of a record, which lends it.
pub(crate) fn owned<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    <&str>::deserialize(deserializer).map(str::to_owned)
}

/// An errno that requests were answered with: for people its name, or its number where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct ErrorKind(u16);

impl std::fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("other"),
            number => Errno::new(number.into()).fmt(f),
        }
    }
}

impl Serialize for ErrorKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => serializer.collect_str(self),
            false => serializer.serialize_newtype_struct("ErrorKind", &self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_counted_by_errno_and_those_without_a_place_together() {
        let counters = Counters::default();
        for errno in [Errno::EINVAL, Errno::new(17), Errno::EINVAL] {
            counters.failed(errno);
        }
        counters.failed(Errno::new(2000));
        let errors = counters.read().errors;
        let text: Vec<_> = errors
            .iter()
            .map(|(kind, count)| format!("{kind} {count}"))
            .collect();
        assert_eq!(text, ["other 1", "errno 17 1", "EINVAL 2"]);
    }

    #[test]
    fn operations_and_limits_are_called_in_json_as_everywhere() {
        let counters = Counters::default();
        let json = serde_json::to_value(counters.read()).unwrap();
        for (operation, _) in counters.read().operations {
            let entry = serde_json::json!([operation.name(), 0]);
            assert!(json["operations"].as_array().unwrap().contains(&entry));
        }
        for limit in Limit::ALL {
            let entry = serde_json::json!([limit.name(), 0]);
            assert!(json["limits_reached"].as_array().unwrap().contains(&entry));
        }
    }

    #[test]
    fn a_name_is_cut_between_characters_and_controls_no_terminal() {
        assert_eq!(shortened("soft"), "soft");
        assert_eq!(shortened("a\x1b[2J\nb"), "a?[2J?b");
        let long = "ü".repeat(100);
        assert_eq!(shortened(&long), "ü".repeat(32));
        assert_eq!(shortened(&format!("x{long}")).len(), 63);
    }
}
