//! What the guest driver and the host proxy of pvgpu agree on.
//!
//! Everything here is plain data and pure functions: no I/O, no allocation, no `unsafe`. The guest driver and the
//! host proxy both use it, so nothing that only one of them needs belongs here.
//!
//! - [`wire`]: request and response headers, the fixed layouts of the hot path.
//! - [`control`]: the records of the control path (hello, trace), in bincode.
//! - [`schema`]: the language that describes one ioctl; [`layout`] walks it over the bytes of a request.
//! - [`family`]: the tables, one file per host GPU family.
//! - [`errno`]: the error numbers that cross the boundary.

#![no_std]
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation
    )
)]

#[cfg(test)]
extern crate std;

pub mod control;
pub mod errno;
pub mod family;
pub mod layout;
pub mod schema;
pub mod wire;

pub use errno::Errno;
