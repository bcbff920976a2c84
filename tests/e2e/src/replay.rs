//! Replays a trace (`mini-vmm run --trace`): the same requests in the same order in front of a fresh host driver, and compares
//! the results. For `replay`, and for whoever wants to see a guest's run again without the guest.
//!
//! A request that waits is answered in the replay before any request that came, when it was recorded, after its answer. Each
//! hello that succeeded begins a session; the one before ends there, as by a reset of the device.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::session::Session;
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::control::{TraceRecord, decode_trace};
use pvgpu_protocol::wire::{Operation, RequestHeader};
use zerocopy::FromBytes;

/// Size of the aperture: that of `mini-vmm` unless it is told otherwise.
const APERTURE: u64 = 1 << 30;
/// Room for a response: the trace does not say what the guest had. It is more than any response takes.
const ROOM: usize = 64 << 20;
/// How long a request that waits may take until it is said to have no answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why nothing can be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It is no trace, or a damaged one.
    #[error("no whole record at byte {0}: was the machine killed, or is it no trace?")]
    Record(usize),
    /// There is no aperture.
    #[error("cannot reserve {APERTURE} bytes of address space: {0}")]
    Aperture(#[from] std::io::Error),
}

/// A request that had another result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which record of the trace, from zero.
    pub record: usize,
    /// Its operation's number, if it had one.
    pub operation: Option<u16>,
    /// Its result in the trace.
    pub recorded: i32,
    /// Its result now; none when it had no answer in time.
    pub replayed: Option<i32>,
}

/// What a replay has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Requests.
    pub requests: usize,
    /// Sessions.
    pub sessions: usize,
    /// Those with other results, in the order in which that was seen.
    pub differences: Vec<Difference>,
}

/// A session that is replayed.
struct Player<'a> {
    session: Session,
    waiting: Vec<Waiting<'a>>,
    replay: Replay,
}

/// A request that has no answer yet.
struct Waiting<'a> {
    number: usize,
    record: &'a TraceRecord<'a>,
    answer: Receiver<i32>,
}

/// The result with which a request ends that waited when its session ended.
fn interrupted() -> i32 {
    -Errno::EINTR.number()
}

impl<'a> Player<'a> {
    fn request(&mut self, number: usize, record: &'a TraceRecord<'a>) {
        self.answered(|waiting| {
            let end = waiting
                .record
                .time_ns
                .saturating_add(waiting.record.duration_ns);
            end <= record.time_ns
        });
        self.replay.requests += 1;
        let (sender, answer) = channel();
        let response = self.session.perform(record.request, ROOM, || {
            Box::new(move |response| sender.send(response.result()).unwrap_or(()))
        });
        match response {
            Some(response) => self.compare(number, record, Some(response.result())),
            None => self.waiting.push(Waiting {
                number,
                record,
                answer,
            }),
        }
    }

    /// Takes the answers of those that are due.
    fn answered(&mut self, due: impl Fn(&Waiting<'a>) -> bool) {
        let (due, later) = std::mem::take(&mut self.waiting).into_iter().partition(due);
        self.waiting = later;
        let due: Vec<Waiting<'_>> = due;
        for waiting in due {
            let answer = waiting.answer.recv_timeout(PATIENCE).ok();
            self.compare(waiting.number, waiting.record, answer);
        }
    }

    fn compare(&mut self, record: usize, recorded: &TraceRecord<'_>, replayed: Option<i32>) {
        if replayed != Some(recorded.result) {
            self.replay.differences.push(Difference {
                record,
                operation: operation(recorded),
                recorded: recorded.result,
                replayed,
            });
        }
    }

    /// Ends the session; what waits then is interrupted.
    fn end(&mut self) {
        self.answered(|waiting| waiting.record.result != interrupted());
        self.session.end();
        self.answered(|_| true);
    }
}

fn operation(record: &TraceRecord<'_>) -> Option<u16> {
    let header = RequestHeader::read_from_prefix(record.request).ok()?;
    Some(header.0.operation.get())
}

/// The records of a trace, by the time at which the requests came.
fn records(trace: &[u8]) -> Result<Vec<(usize, TraceRecord<'_>)>, ReplayError> {
    let mut records = Vec::new();
    let mut rest = trace;
    while !rest.is_empty() {
        let (record, length) =
            decode_trace(rest).map_err(|_| ReplayError::Record(trace.len() - rest.len()))?;
        records.push((records.len(), record));
        rest = &rest[length..];
    }
    // They are written as they are answered.
    records.sort_by_key(|(_, record)| record.time_ns);
    Ok(records)
}

/// Replays a trace on that driver.
pub fn replay(
    trace: &[u8],
    driver: &Arc<dyn HostDriver>,
    limits: Limits,
) -> Result<Replay, ReplayError> {
    let records = records(trace)?;
    let session = || -> Result<Session, ReplayError> {
        let aperture = Arc::new(Aperture::reserve(APERTURE)?);
        // Events are the guest's to take; here nobody waits for them.
        let report = Arc::new(drop);
        let driver = Arc::clone(driver);
        Ok(Session::with_report(driver, Some(aperture), limits, report))
    };
    let mut player = Player {
        session: session()?,
        waiting: Vec::new(),
        replay: Replay::default(),
    };
    for (number, record) in &records {
        let hello = operation(record) == Some(Operation::Hello.number());
        if hello && record.result >= 0 {
            if player.replay.sessions > 0 {
                player.end();
                player.session = session()?;
            }
            player.replay.sessions += 1;
        }
        player.request(*number, record);
    }
    player.end();
    Ok(player.replay)
}
