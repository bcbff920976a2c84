//! The trace: every request of a device with its result and duration, as bincode records in a file.
//!
//! Written by [`crate::device`] after each completion, switched on and off at run time ([`crate::monitor`]), read by whoever replays or inspects a run. Events of what is watched
//! are no requests: the trace has the watch, not what came of it. Format:
//! [`pvgpu_protocol::control::TraceRecord`], one after the other. A file that has reached its limit ends with the last
//! record that fits; how many requests it lacks is counted.

use crate::statistics::Counters;
use pvgpu_protocol::control::{TraceRecord, encode_trace};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Most bytes that a record takes beside its request.
const RECORD_HEADER: usize = 64;

/// What becomes of a device's requests, and the switch of that.
pub(crate) struct Trace {
    start: Instant,
    /// Whether there is anything to be done for a request: read without the lock.
    on: AtomicBool,
    output: Mutex<Output>,
    counters: Arc<Counters>,
}

/// Whether requests are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recording {
    /// They are not.
    #[default]
    Off,
    /// They are.
    On,
    /// They were, until the trace had reached its size limit or could not be written; later ones are counted.
    Ended,
}

/// A trace is being recorded already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a trace is being recorded: stop it first")]
pub struct Busy;

enum Output {
    Off,
    On(Writer),
    Ended,
}

struct Writer {
    file: BufWriter<File>,
    /// Bytes that it may still take.
    room: u64,
}

impl Writer {
    /// Appends a whole record or nothing: fails when there is no room for it.
    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let length = u64::try_from(record.len()).unwrap_or(u64::MAX);
        let room = self.room.checked_sub(length);
        self.room = room.ok_or_else(|| io::Error::other("it has reached its size limit"))?;
        self.file.write_all(record)
    }
}

impl Trace {
    /// Without any file. It counts the requests that a trace lacks.
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self {
            start: Instant::now(),
            on: AtomicBool::new(false),
            output: Mutex::new(Output::Off),
            counters,
        }
    }

    /// Records every request that comes from now on in `file`, at most `limit` bytes.
    pub(crate) fn start(&self, file: File, limit: u64) -> Result<(), Busy> {
        let mut output = self.output();
        if matches!(*output, Output::On(_)) {
            return Err(Busy);
        }
        *output = Output::On(Writer {
            file: BufWriter::new(file),
            room: limit,
        });
        self.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Records no more, and closes the file; whether there was a trace.
    pub(crate) fn stop(&self) -> io::Result<bool> {
        let last = {
            let mut output = self.output();
            self.on.store(false, Ordering::Relaxed);
            std::mem::replace(&mut *output, Output::Off)
        };
        // What is written here keeps no request from its answer.
        match last {
            Output::On(mut writer) => writer.file.flush().map(|()| true),
            Output::Ended => Ok(true),
            Output::Off => Ok(false),
        }
    }

    /// Whether requests are recorded.
    pub(crate) fn recording(&self) -> Recording {
        match *self.output() {
            Output::Off => Recording::Off,
            Output::On(_) => Recording::On,
            Output::Ended => Recording::Ended,
        }
    }

    /// The arrival of a request that is to be recorded, or counted; `None` while there is no trace.
    pub(crate) fn arrival(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// Appends a record. A trace that can no longer be written ends with one warning.
    pub(crate) fn record(&self, queue: u16, arrival: Instant, request: &[u8], result: i32) {
        let nanoseconds =
            |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let record = TraceRecord {
            time_ns: nanoseconds(arrival.saturating_duration_since(self.start)),
            duration_ns: nanoseconds(arrival.elapsed()),
            queue,
            result,
            request,
        };
        let mut bytes = vec![0; request.len() + RECORD_HEADER];
        let Ok(length) = encode_trace(&record, &mut bytes) else {
            return;
        };
        bytes.truncate(length);
        let mut output = self.output();
        if let Output::On(writer) = &mut *output {
            let Err(error) = writer.append(&bytes) else {
                return;
            };
            log::warn!("the trace ends here: {error}");
            *output = Output::Ended;
        }
        if matches!(*output, Output::Ended) {
            self.counters.untraced.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvgpu_protocol::control::decode_trace;
    use std::io::Read;

    /// A file without a name, and another way to read it.
    fn file(name: &str) -> (File, File) {
        let path = std::env::temp_dir().join(format!("pvgpu-{name}-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        (file, reader)
    }

    /// The requests of a trace.
    fn requests(mut reader: File) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        let mut rest = &bytes[..];
        let mut requests = Vec::new();
        while !rest.is_empty() {
            let (record, length) = decode_trace(rest).unwrap();
            requests.push(record.request.to_vec());
            rest = &rest[length..];
        }
        requests
    }

    #[test]
    fn a_trace_ends_at_its_limit_with_a_whole_record_and_counts_what_it_lacks() {
        let (file, reader) = file("trace-limit");
        let counters = Arc::new(Counters::default());
        let trace = Trace::new(Arc::clone(&counters));
        trace.start(file, 4096).unwrap();
        for _ in 0..100 {
            trace.record(0, Instant::now(), &[7; 100], 0);
        }
        assert_eq!(trace.recording(), Recording::Ended);
        drop(trace);
        let length = reader.metadata().unwrap().len();
        assert!(length <= 4096 && length > 3900, "{length}");
        let requests = requests(reader);
        assert!(requests.iter().all(|request| *request == [7; 100]));
        let untraced = counters.read().untraced;
        assert_eq!(untraced, 100 - u64::try_from(requests.len()).unwrap());
    }

    #[test]
    fn a_trace_is_switched_on_and_off_and_has_what_came_in_between() {
        let counters = Arc::new(Counters::default());
        let trace = Trace::new(Arc::clone(&counters));
        let record = |byte| {
            if let Some(arrival) = trace.arrival() {
                trace.record(0, arrival, &[byte; 20], 0);
            }
        };
        record(1);
        assert!(!trace.stop().unwrap());
        let (first, first_reader) = file("trace-first");
        trace.start(first, 4096).unwrap();
        assert_eq!(trace.start(file("trace-busy").0, 4096), Err(Busy));
        record(2);
        let late = trace.arrival().unwrap();
        assert!(trace.stop().unwrap());
        record(3);
        trace.record(0, late, &[4; 20], 0);
        assert_eq!(trace.recording(), Recording::Off);
        assert_eq!(requests(first_reader), [[2; 20]]);
        let (second, second_reader) = file("trace-second");
        trace.start(second, 4096).unwrap();
        record(5);
        drop(trace);
        assert_eq!(requests(second_reader), [[5; 20]]);
        assert_eq!(counters.read().untraced, 0);
    }
}
