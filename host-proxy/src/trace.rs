//! The trace: every request of a device with its result and duration, as bincode records in a file.
//!
//! Written by [`crate::device`] after each completion, read by whoever replays or inspects a run. Events of what is watched
//! are no requests: the trace has the watch, not what came of it. Format:
//! [`pvgpu_protocol::control::TraceRecord`], one after the other.

use pvgpu_protocol::control::{TraceRecord, encode_trace};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Most bytes that a record takes beside its request.
const RECORD_HEADER: usize = 64;

/// A trace that is being written.
pub(crate) struct Trace {
    start: Instant,
    /// `None` after a write has failed.
    file: Mutex<Option<BufWriter<File>>>,
}

impl Trace {
    pub(crate) fn new(file: File) -> Self {
        Self {
            start: Instant::now(),
            file: Mutex::new(Some(BufWriter::new(file))),
        }
    }

    /// Appends a record. A trace that can no longer be written ends with one warning.
    pub(crate) fn record(&self, queue: u16, arrival: Instant, request: &[u8], result: i32) {
        let nanoseconds =
            |duration: std::time::Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let record = TraceRecord {
            time_ns: nanoseconds(arrival.duration_since(self.start)),
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
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = file.as_mut()
            && let Err(error) = writer.write_all(&bytes)
        {
            log::warn!("the trace ends here: {error}");
            *file = None;
        }
    }
}
