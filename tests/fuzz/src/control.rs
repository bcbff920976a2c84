//! The control records in bincode: the hello and its answer, and what clients of the control socket ask.
//!
//! Decoding any bytes gives a record or `EPROTO`; a record encodes to at most as many bytes, which decode to it again.

use pvgpu_host_proxy::control::Command;
use pvgpu_protocol::Errno;
use pvgpu_protocol::control::{Hello, HelloReply, Limits, RECORD_LIMIT, decode, encode};

/// Holds a record of that type against its promises. A macro, since what a record borrows from differs.
macro_rules! judge {
    ($record:ty, $bytes:expr) => {
        match decode::<$record>($bytes) {
            Ok(record) => {
                assert!($bytes.len() <= RECORD_LIMIT, "a record over the limit");
                let mut buffer = [0; RECORD_LIMIT];
                let length = encode(&record, &mut buffer).expect("no longer than it came");
                assert!(length <= $bytes.len(), "not the shortest form");
                assert_eq!(decode::<$record>(&buffer[..length]), Ok(record));
                let longer = [$bytes, &[0]].concat();
                assert_eq!(decode::<$record>(&longer), Err(Errno::EPROTO));
            }
            Err(errno) => assert_eq!(errno, Errno::EPROTO),
        }
    };
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    judge!(Hello<'_>, bytes);
    judge!(HelloReply<'_>, bytes);
    judge!(Limits, bytes);
    judge!(Command, bytes);
}
