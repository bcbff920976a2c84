//! The trace: every request of a device with its result and duration, as bincode records in a file.
//!
//! Written by [`crate::device`] after each completion, read by whoever replays or inspects a run. Events of what is watched
//! are no requests: the trace has the watch, not what came of it. Format:
//! [`pvgpu_protocol::control::TraceRecord`], one after the other. A file that has reached its limit ends with the last
//! record that fits; how many requests it lacks is counted.

use crate::statistics::Counters;
use pvgpu_protocol::control::{TraceRecord, encode_trace};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Most bytes that a record takes beside its request.
const RECORD_HEADER: usize = 64;

/// A trace that is being written.
pub(crate) struct Trace {
    start: Instant,
    /// `None` when it has ended.
    output: Mutex<Option<Output>>,
    counters: Arc<Counters>,
}

struct Output {
    file: BufWriter<File>,
    /// Bytes that it may still take.
    room: u64,
}

impl Output {
    /// Appends a whole record or nothing: fails when there is no room for it.
    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let length = u64::try_from(record.len()).unwrap_or(u64::MAX);
        let room = self.room.checked_sub(length);
        self.room = room.ok_or_else(|| io::Error::other("it has reached its size limit"))?;
        self.file.write_all(record)
    }
}

impl Trace {
    /// A trace in `file` of at most `limit` bytes, which counts the requests that it lacks.
    pub(crate) fn new(file: File, limit: u64, counters: Arc<Counters>) -> Self {
        Self {
            start: Instant::now(),
            output: Mutex::new(Some(Output {
                file: BufWriter::new(file),
                room: limit,
            })),
            counters,
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
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let appended = output.as_mut().map(|output| output.append(&bytes));
        if let Some(Err(error)) = &appended {
            log::warn!("the trace ends here: {error}");
            *output = None;
        }
        if !matches!(appended, Some(Ok(()))) {
            self.counters.untraced.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvgpu_protocol::control::decode_trace;
    use std::io::Read;

    #[test]
    fn a_trace_ends_at_its_limit_with_a_whole_record_and_counts_what_it_lacks() {
        let path = std::env::temp_dir().join(format!("pvgpu-trace-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let mut reader = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let counters = Arc::new(Counters::default());
        let trace = Trace::new(file, 4096, counters.clone());
        for _ in 0..100 {
            trace.record(0, Instant::now(), &[7; 100], 0);
        }
        drop(trace);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() <= 4096 && bytes.len() > 3900, "{}", bytes.len());
        let mut rest = &bytes[..];
        let mut records = 0;
        while !rest.is_empty() {
            let (record, length) = decode_trace(rest).unwrap();
            assert_eq!(record.request, [7; 100]);
            rest = &rest[length..];
            records += 1;
        }
        assert_eq!(counters.read(None).untraced, 100 - records);
    }
}
