//! Records of the control path, in bincode 2 (standard configuration, with a size limit).
//!
//! The hello is the first request of a session; the trace records are what `mini-vmm --trace` writes. bincode is no
//! longer developed, so it appears in this module alone, and golden-bytes tests hold the format.

use crate::Errno;
use crate::wire::{VERSION, feature};
use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use serde::{Deserialize, Serialize};

/// Most bytes that one control record may take, trace payloads excepted.
pub const RECORD_LIMIT: usize = 4096;

const CONFIG: Configuration<LittleEndian, Varint, Limit<RECORD_LIMIT>> =
    bincode::config::standard().with_limit::<RECORD_LIMIT>();

/// What the guest says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello<'a> {
    /// Lowest protocol version that it speaks.
    pub version_min: u16,
    /// Highest protocol version that it speaks.
    pub version_max: u16,
    /// Features that it can use, of [`feature`].
    pub features: u64,
    /// Who it is, for the host's log: at most 64 characters are kept.
    pub guest: &'a str,
}

impl<'a> Hello<'a> {
    /// What a guest of that name says that speaks [`VERSION`] alone, with all of its features.
    pub const fn new(guest: &'a str) -> Self {
        Self {
            version_min: VERSION,
            version_max: VERSION,
            features: feature::MAP_PAGES,
            guest,
        }
    }
}

/// What the host answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply<'a> {
    /// The version both speak from here on.
    pub version: u16,
    /// The features both use from here on.
    pub features: u64,
    /// What this guest may use.
    pub limits: Limits,
    /// Size of the aperture in bytes, zero when there is none; then only mapping with pages of the guest is left, if that is
    /// among the features.
    pub aperture: u64,
    /// Who executes the operations.
    #[serde(borrow)]
    pub driver: DriverIdentity<'a>,
}

/// The host driver as its `DRM_IOCTL_VERSION` describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverIdentity<'a> {
    /// Name, such as `virtio_gpu`: chooses the schemas of both sides and Mesa's driver.
    pub name: &'a str,
    /// Major, minor and patch level.
    pub version: [i32; 3],
    /// Date, as the driver gives it.
    pub date: &'a str,
    /// Description, as the driver gives it.
    pub description: &'a str,
}

/// What one guest may use at a time. Reaching a limit is an errno for that guest and harms no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of one request with its header (a longer one is returned unanswered), of the payload of an ioctl with all
    /// its arrays, both ways (`E2BIG`), and of a read (`EINVAL`).
    pub message: u32,
    /// Open files and other objects (`EMFILE`).
    pub objects: u32,
    /// Requests in flight that may block (`EAGAIN`).
    pub in_flight: u32,
    /// Bytes mapped, into the aperture or with pages of the guest, of which the host then keeps a copy (`ENOMEM`).
    pub mapped: u64,
    /// Bytes of GPU memory held by handles (`ENOMEM`).
    pub memory: u64,
    /// GEM and syncobj handles of all files together (`ENOMEM`).
    pub handles: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message: 4 << 20,
            objects: 1024,
            in_flight: 256,
            mapped: 4 << 30,
            memory: 4 << 30,
            handles: 65_536,
        }
    }
}

/// One record of a trace: a request as it arrived and how it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRecord<'a> {
    /// Nanoseconds since the device was made.
    pub time_ns: u64,
    /// Nanoseconds from the request's copy to its completion.
    pub duration_ns: u64,
    /// Which request queue.
    pub queue: u16,
    /// Result of the response.
    pub result: i32,
    /// The request's bytes, header included.
    pub request: &'a [u8],
}

/// Writes a record into `buffer` and returns its length; `E2BIG` when it does not fit.
pub fn encode<T: Serialize>(record: &T, buffer: &mut [u8]) -> Result<usize, Errno> {
    bincode::serde::encode_into_slice(record, buffer, CONFIG).map_err(|_| Errno::E2BIG)
}

/// Reads a record that fills `bytes` exactly; `EPROTO` when they are anything else.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Errno> {
    match bincode::serde::borrow_decode_from_slice(bytes, CONFIG) {
        Ok((record, length)) if length == bytes.len() => Ok(record),
        _ => Err(Errno::EPROTO),
    }
}

/// Writes a trace record, whose request may be longer than [`RECORD_LIMIT`]; `E2BIG` when it does not fit.
pub fn encode_trace(record: &TraceRecord<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    bincode::serde::encode_into_slice(record, buffer, bincode::config::standard())
        .map_err(|_| Errno::E2BIG)
}

/// Reads the trace record at the start of `bytes` and returns it with its length; `EPROTO` when there is none.
pub fn decode_trace(bytes: &[u8]) -> Result<(TraceRecord<'_>, usize), Errno> {
    bincode::serde::borrow_decode_from_slice(bytes, bincode::config::standard())
        .map_err(|_| Errno::EPROTO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_has_its_golden_bytes() {
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            features: 0,
            guest: "test",
        };
        let mut buffer = [0; 32];
        let length = encode(&hello, &mut buffer).unwrap();
        assert_eq!(buffer[..length], [1, 1, 0, 4, b't', b'e', b's', b't']);
        assert_eq!(decode::<Hello>(&buffer[..length]), Ok(hello));
    }

    #[test]
    fn a_hello_reply_has_its_golden_bytes() {
        let reply = HelloReply {
            version: 1,
            features: 0,
            limits: Limits {
                message: 1,
                objects: 2,
                in_flight: 3,
                mapped: 4,
                memory: 5,
                handles: 6,
            },
            aperture: 1 << 20,
            driver: DriverIdentity {
                name: "soft",
                version: [1, 0, -1],
                date: "",
                description: "d",
            },
        };
        let mut buffer = [0; 64];
        let length = encode(&reply, &mut buffer).unwrap();
        let golden = [
            1, 0, 1, 2, 3, 4, 5, 6, 252, 0, 0, 16, 0, 4, b's', b'o', b'f', b't', 2, 0, 1, 0, 1,
            b'd',
        ];
        assert_eq!(buffer[..length], golden);
        assert_eq!(decode::<HelloReply>(&golden), Ok(reply));
    }

    #[test]
    fn bytes_after_a_record_are_a_protocol_violation() {
        assert_eq!(decode::<Hello>(&[1, 1, 0, 0, 9]), Err(Errno::EPROTO));
        assert_eq!(decode::<Hello>(&[1, 1]), Err(Errno::EPROTO));
    }

    #[test]
    fn a_trace_record_survives_the_round_trip() {
        let request = [7; 5000];
        let record = TraceRecord {
            time_ns: 1,
            duration_ns: 2,
            queue: 3,
            result: -22,
            request: &request,
        };
        let mut buffer = [0; 6000];
        let length = encode_trace(&record, &mut buffer).unwrap();
        assert_eq!(decode_trace(&buffer), Ok((record, length)));
    }
}
