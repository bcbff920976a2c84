//! A trace file, as `cargo xtask trace` and the replayer read it: records one after the other, in bincode.
//!
//! Reading any bytes gives records up to the first that is none; each encodes to at most as many bytes, which decode to it
//! again.

use pvgpu_protocol::Errno;
use pvgpu_protocol::control::{decode_trace, encode_trace};

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let (record, length) = match decode_trace(rest) {
            Ok(found) => found,
            Err(errno) => return assert_eq!(errno, Errno::EPROTO),
        };
        assert!(length > record.request.len(), "a reader would not advance");
        let mut buffer = vec![0; length];
        let encoded = encode_trace(&record, &mut buffer).expect("no longer than it came");
        assert_eq!(decode_trace(&buffer[..encoded]), Ok((record, encoded)));
        rest = rest.get(length..).expect("a record within the bytes");
    }
}
