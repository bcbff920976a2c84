//! Fuzz targets: whatever a guest may send, in front of the code that reads it.
//!
//! One module per target, each with a `run` that takes the fuzzer's bytes and panics on a finding. `fuzz_targets` has a
//! program for each, which `cargo xtask fuzz` builds and runs; `tests/corpora.rs` replays what is kept in `corpus` and
//! `regressions` without a fuzzer. `docs/fuzzing.md` says what each asserts. A target must behave the same for the same
//! bytes, and neither sleep nor log.

pub mod answering;
pub mod control;
pub mod decode;
pub mod operations;
pub mod round_trip;
pub mod soft_commands;
pub mod trace;
pub mod vhost_user;
pub mod virtio_mmio;
pub mod virtio_pci;
pub mod virtqueue;

use pvgpu_host_proxy::session::{RESPONSE_HEADER, Response};
use pvgpu_protocol::control::{Hello, encode};
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader, ResponseHeader};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A target: its name, and what it does with the fuzzer's bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, in the order in which their code meets a request.
pub const TARGETS: &[Target] = &[
    ("vhost_user", vhost_user::run),
    ("virtio_mmio", virtio_mmio::run),
    ("virtio_pci", virtio_pci::run),
    ("virtqueue", virtqueue::run),
    ("decode", decode::run),
    ("round_trip", round_trip::run),
    ("operations", operations::run),
    ("soft_commands", soft_commands::run),
    ("control", control::run),
    ("trace", trace::run),
];

/// A request: its header, the body of its operation, and a payload.
fn request<B: IntoBytes + Immutable>(
    operation: Operation,
    object: i32,
    id: u64,
    body: &B,
    payload: &[u8],
) -> Vec<u8> {
    let header = RequestHeader::new(operation, object.cast_unsigned(), id);
    [header.as_bytes(), body.as_bytes(), payload].concat()
}

/// The request that opens a session.
fn hello() -> Vec<u8> {
    let hello = Hello::new("fuzz");
    let mut record = [0; 32];
    let length = encode(&hello, &mut record).expect("room for a short name");
    request(Operation::Hello, 0, 0, &(), &record[..length])
}

/// The request of an ioctl with this argument and arrays.
fn ioctl(object: i32, id: u64, command: u32, payload: &[u8]) -> Vec<u8> {
    let body = IoctlRequest {
        command: command.into(),
        reserved: 0.into(),
    };
    request(Operation::Ioctl, object, id, &body, payload)
}

/// The bytes of a response, with its result. Panics when its header, its length and its parts do not agree, or when it
/// needs more than `room`.
fn judge(response: &Response, id: u64, room: usize) -> (i32, Vec<u8>) {
    let mut bytes = vec![0; response.length()];
    assert!(bytes.len() <= room.max(RESPONSE_HEADER), "no room for it");
    let mut end = 0;
    let written: Result<(), std::convert::Infallible> = response.write(|offset, part| {
        assert!(offset >= end, "its parts overlap");
        end = offset + part.len();
        bytes[offset..end].copy_from_slice(part);
        Ok(())
    });
    let Ok(()) = written;
    let (header, payload) = ResponseHeader::read_from_prefix(&bytes).expect("a header");
    assert_eq!(header.id.get(), id, "answers another request");
    assert_eq!(usize::try_from(header.length.get()), Ok(payload.len()));
    let result = header.result.get();
    assert!(result >= -4095, "{result} is no errno");
    (result, payload.to_vec())
}
