//! Request and response headers: the fixed little-endian layouts of the hot path.
//!
//! One request is one descriptor chain. Its device-readable bytes are a [`RequestHeader`], the body of its
//! operation and a payload; its device-writable bytes receive a [`ResponseHeader`] and a payload. The message's
//! length is the chain's length; there is no length field to disagree with it. `docs/protocol.md` is the
//! specification. Both sides use these structs; they must never hold a type with padding.

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `"PVGP"`: the first four bytes of the virtio configuration space.
pub const CONFIG_MAGIC: u32 = u32::from_le_bytes(*b"PVGP");
/// Version of this protocol, in the configuration space and in the hello.
pub const VERSION: u16 = 1;
/// Virtio device ID (experimental range, virtio 1.2 section 5).
pub const DEVICE_ID: u32 = 63;
/// Identifier of the shared-memory region that is the aperture.
pub const APERTURE_REGION: u8 = 0;
/// Granularity of the aperture in bytes: offsets and lengths of mappings are multiples of it.
pub const PAGE_SIZE: u64 = 4096;

/// The virtio configuration space.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct ConfigSpace {
    /// [`CONFIG_MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U16,
    /// Number of request queues; the event queue, which takes buffers for an [`Event`] each, follows them.
    pub request_queues: U16,
}

/// Bits of the features in the hello.
pub mod feature {
    /// [`super::Operation::MapPages`]: for a device without an aperture.
    pub const MAP_PAGES: u64 = 1;
}

/// What a request asks for. A number that is not here is answered with `ENOSYS`.
#[repr(u16)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Opens the session: payload [`crate::control::Hello`], answered by [`crate::control::HelloReply`].
    Hello = 0,
    /// Opens the device: body [`OpenRequest`]; the result is the new file's object id.
    Open = 1,
    /// Closes a file or another object.
    Close = 2,
    /// Performs an ioctl: body [`IoctlRequest`], then the argument struct and what its pointers reach.
    Ioctl = 3,
    /// Maps a range of the object into the aperture: body [`MapRequest`], payload [`MapResponse`].
    Map = 4,
    /// Removes a mapping: body [`UnmapRequest`].
    Unmap = 5,
    /// Waits until the object is ready: body [`PollRequest`]; the result is the set of ready events.
    Poll = 6,
    /// Reads from the file: body [`ReadRequest`]; the result is the number of bytes, the payload the bytes.
    Read = 7,
    /// Cancels a request in flight: body [`CancelRequest`]. `ENOENT` when there is none, which is no error.
    Cancel = 8,
    /// Does nothing: what a round trip costs, and whether the proxy is alive.
    Nop = 9,
    /// As [`Operation::Poll`], but what is not there yet is reported on the event queue: body [`WatchRequest`]; the result is
    /// the set of events that are there, or zero, and then exactly one [`Event`] follows.
    Watch = 10,
    /// Size of the object: payload [`SizeResponse`]. `ESPIPE` when it has none.
    Size = 11,
    /// Maps a range of the object with pages of the guest: body [`MapPagesRequest`], then its [`PageRange`]s, payload
    /// [`MapResponse`]. Only with [`feature::MAP_PAGES`]. [`Operation::Unmap`] removes the mapping.
    MapPages = 12,
}

impl Operation {
    /// The operation of that number.
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Hello,
            1 => Self::Open,
            2 => Self::Close,
            3 => Self::Ioctl,
            4 => Self::Map,
            5 => Self::Unmap,
            6 => Self::Poll,
            7 => Self::Read,
            8 => Self::Cancel,
            9 => Self::Nop,
            10 => Self::Watch,
            11 => Self::Size,
            12 => Self::MapPages,
            _ => return None,
        })
    }

    /// Its number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Its lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Open => "open",
            Self::Close => "close",
            Self::Ioctl => "ioctl",
            Self::Map => "map",
            Self::Unmap => "unmap",
            Self::Poll => "poll",
            Self::Read => "read",
            Self::Cancel => "cancel",
            Self::Nop => "nop",
            Self::Watch => "watch",
            Self::Size => "size",
            Self::MapPages => "map_pages",
        }
    }
}

/// The start of every request.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct RequestHeader {
    /// [`Operation`].
    pub operation: U16,
    /// No flag is defined: zero.
    pub flags: U16,
    /// The file or object it is about, zero where there is none.
    pub object: U32,
    /// Chosen by the guest, returned in the response, names the request to [`Operation::Cancel`].
    pub id: U64,
}

impl RequestHeader {
    /// The header of a request about `object`, zero where it is about none.
    pub fn new(operation: Operation, object: u32, id: u64) -> Self {
        Self {
            operation: operation.number().into(),
            flags: 0.into(),
            object: object.into(),
            id: id.into(),
        }
    }
}

/// The start of every response.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct ResponseHeader {
    /// The request's id.
    pub id: U64,
    /// Zero or more: success, the operation's value. Less: `-errno`.
    pub result: I32,
    /// Bytes of payload that follow.
    pub length: U32,
}

/// Body of [`Operation::Open`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct OpenRequest {
    /// `O_RDWR` or `O_RDONLY`, with or without `O_NONBLOCK` (values of x86-64 Linux).
    pub flags: U32,
    /// Zero.
    pub reserved: U32,
}

/// The open flags a guest may use.
pub mod open {
    /// Read only.
    pub const RDONLY: u32 = 0;
    /// Read and write.
    pub const RDWR: u32 = 2;
    /// Reads do not wait.
    pub const NONBLOCK: u32 = 0o4000;
}

/// Body of [`Operation::Ioctl`]. The payload's layout is computed from the schema by [`crate::layout`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct IoctlRequest {
    /// The whole command number: direction, size, type and number (`asm-generic/ioctl.h`).
    pub command: U32,
    /// Zero.
    pub reserved: U32,
}

/// Body of [`Operation::Map`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct MapRequest {
    /// Offset into the object as `mmap` takes it; for a DRM file, the offset that its MAP ioctl gave.
    pub offset: U64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub length: U64,
    /// `PROT_READ` and `PROT_WRITE`.
    pub protection: U32,
    /// Zero.
    pub reserved: U32,
}

/// The protections a guest may ask for.
pub mod protection {
    /// Pages may be read.
    pub const READ: u32 = 1;
    /// Pages may be written.
    pub const WRITE: u32 = 2;
}

/// Body of [`Operation::MapPages`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct MapPagesRequest {
    /// As in [`MapRequest`].
    pub offset: U64,
    /// As in [`MapRequest`].
    pub length: U64,
    /// As in [`MapRequest`].
    pub protection: U32,
    /// How many [`PageRange`]s follow, at most [`PAGE_RANGES_MAX`] (`E2BIG`).
    pub ranges: U32,
}

/// Most [`PageRange`]s of one mapping.
pub const PAGE_RANGES_MAX: u32 = 65_536;

/// Pages of the guest that show a part of a mapping.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct PageRange {
    /// Guest-physical address, a multiple of [`PAGE_SIZE`].
    pub address: U64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`] and not zero.
    pub length: U64,
}

/// Payload of the answer to [`Operation::Map`] and [`Operation::MapPages`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct MapResponse {
    /// Where in the aperture the mapping starts, in bytes. One with pages of the guest is nowhere there: it is a number that
    /// names the mapping.
    pub aperture_offset: U64,
    /// Its length in bytes.
    pub length: U64,
}

/// Body of [`Operation::Unmap`]: exactly one mapping, as it was made.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct UnmapRequest {
    /// As in [`MapResponse`].
    pub aperture_offset: U64,
    /// As in [`MapResponse`].
    pub length: U64,
}

/// Body of [`Operation::Poll`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct PollRequest {
    /// `POLLIN` and the like (values of x86-64 Linux).
    pub events: U32,
    /// Zero.
    pub reserved: U32,
    /// Nanoseconds to wait: zero asks only, less than zero waits for ever.
    pub timeout_ns: I64,
}

/// Body of [`Operation::Watch`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct WatchRequest {
    /// `POLLIN` and the like (values of x86-64 Linux).
    pub events: U32,
    /// Zero.
    pub reserved: U32,
}

/// What the host writes into a buffer of the event queue.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct Event {
    /// The id of the [`Operation::Watch`] that this ends.
    pub id: U64,
    /// The events that are there, `POLLERR` and `POLLHUP` included; zero when the watch was cancelled.
    pub events: U32,
    /// Zero.
    pub reserved: U32,
}

/// Payload of the answer to [`Operation::Size`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct SizeResponse {
    /// Size in bytes, as `lseek(.., SEEK_END)` gives it.
    pub size: U64,
}

/// Body of [`Operation::Read`]. Waits for data unless the file was opened with [`open::NONBLOCK`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct ReadRequest {
    /// Most bytes to return.
    pub length: U32,
    /// Zero.
    pub reserved: U32,
}

/// Body of [`Operation::Cancel`].
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub struct CancelRequest {
    /// The id of the request to cancel; it completes with `EINTR`, or as it would have if it is too late.
    pub id: U64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_keeps_its_number() {
        for number in 0..13 {
            assert_eq!(Operation::from_number(number).unwrap().number(), number);
        }
        assert_eq!(Operation::from_number(13), None);
    }

    #[test]
    fn ioctl_payload_starts_at_a_multiple_of_eight() {
        assert_eq!(
            (size_of::<RequestHeader>() + size_of::<IoctlRequest>()) % 8,
            0
        );
        assert_eq!(size_of::<ResponseHeader>() % 8, 0);
    }

    #[test]
    fn the_request_header_has_the_documented_bytes() {
        let header = RequestHeader {
            operation: 3.into(),
            flags: 0.into(),
            object: 7.into(),
            id: 0x0102_0304_0506_0708.into(),
        };
        assert_eq!(
            header.as_bytes(),
            [3, 0, 0, 0, 7, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]
        );
    }
}
