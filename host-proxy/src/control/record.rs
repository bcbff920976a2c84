//! What goes over the control socket: one record each way, in bincode behind a byte with the version.
//!
//! Both sides are of this crate, but may be of different ages: the version is for every change of these types or of those
//! within ([`Statistics`]).

use crate::statistics::Statistics;
use pvgpu_protocol::control::{self, RECORD_LIMIT};
use serde::{Deserialize, Serialize};

/// The version of these records.
pub const VERSION: u8 = 1;

/// Most bytes of a request with its version.
pub(super) const REQUEST_LIMIT: usize = 64;

/// Most bytes of a reply with its version.
pub(super) const REPLY_LIMIT: usize = 1 + RECORD_LIMIT;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// What the device has counted, and what its session uses.
    Status,
    /// Record all requests from now on in the file whose descriptor comes along.
    StartTrace {
        /// Most bytes of that file.
        limit: u64,
    },
    /// Record no more.
    StopTrace,
}

/// What it gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// What it has asked for.
    Status(Box<Statistics>),
    /// It is done.
    Done,
    /// It is not done.
    Refused(Refusal),
}

/// Why a command is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Not one message with one request, or of another version.
    #[error("the proxy does not understand this request: use the pvgpu-ctl of its own version")]
    Malformed,
    /// A trace without a file.
    #[error("the file for the trace did not arrive: the proxy may have no descriptor left")]
    NoFile,
    /// A trace into something that could keep the device waiting.
    #[error("a trace goes into a regular file, not into a pipe, a socket or a device")]
    NotRegular,
    /// A trace into a file that was opened for reading.
    #[error("the file for the trace is not open for writing")]
    NotWritable,
    /// There is a trace.
    #[error("a trace is being recorded: stop it first (pvgpu-ctl trace stop)")]
    Busy,
    /// There is none.
    #[error("no trace is being recorded")]
    NoTrace,
    /// Its last requests could not be written.
    #[error("the trace has stopped, but its end could not be written: see the proxy's log")]
    TraceCut,
    /// The statistics are too long for a record: a defect.
    #[error("the proxy's answer does not fit into a record: please report this")]
    TooLong,
}

fn encode<T: Serialize, const LIMIT: usize>(record: &T) -> Option<Vec<u8>> {
    let mut bytes = vec![0; LIMIT];
    let (version, rest) = bytes.split_first_mut()?;
    *version = VERSION;
    let length = control::encode(record, rest).ok()?;
    bytes.truncate(1 + length);
    Some(bytes)
}

/// The bytes of a request.
pub(super) fn encode_request(command: &Command) -> Vec<u8> {
    encode::<_, REQUEST_LIMIT>(command).unwrap_or_default()
}

/// The request in a message.
pub(super) fn decode_request(bytes: &[u8]) -> Result<Command, Refusal> {
    match bytes.split_first() {
        Some((&VERSION, record)) if bytes.len() <= REQUEST_LIMIT => {
            control::decode(record).map_err(|_| Refusal::Malformed)
        }
        _ => Err(Refusal::Malformed),
    }
}

/// The bytes of a reply.
pub(super) fn encode_reply(reply: &Reply) -> Vec<u8> {
    encode::<_, REPLY_LIMIT>(reply)
        .or_else(|| encode::<_, REPLY_LIMIT>(&Reply::Refused(Refusal::TooLong)))
        .unwrap_or_default()
}

/// The reply in all that a proxy has sent; the version that it speaks if that is another.
pub(super) fn decode_reply(bytes: &[u8]) -> Result<Reply, Option<u8>> {
    match bytes.split_first() {
        Some((&VERSION, record)) => control::decode(record).map_err(|_| None),
        Some((other, _)) => Err(Some(*other)),
        None => Err(None),
    }
}
