//! The host side of pvgpu: copies a guest's request once, validates it by schema and performs it.
//!
//! Data flows one way: [`device`] takes a descriptor chain from a virtqueue, `session` decodes the copy,
//! [`call`] validates an ioctl by its schema, a [`driver::HostDriver`] performs it, and the response goes back.
//! Nothing of that knows about KVM, MMIO or sockets: a VMM links this crate and supplies guest memory, queues and
//! interrupts. For operators there is [`control`], a socket that shows a running device, which a VMM may offer or not.

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

pub mod aperture;
mod bell;
pub mod call;
pub mod cancel;
#[doc(hidden)]
pub mod choice;
#[doc(hidden)]
pub mod clock;
#[cfg(feature = "programs")]
#[doc(hidden)]
pub mod command_line;
pub mod control;
mod descriptor;
#[doc(hidden)]
pub mod descriptors;
pub mod device;
pub mod driver;
pub mod drm;
mod event;
#[cfg(feature = "landlock")]
#[doc(hidden)]
pub mod files;
mod latency;
pub mod limit;
pub mod logging;
pub mod monitor;
#[doc(hidden)]
pub mod privacy;
#[doc(hidden)]
pub mod rlimit;
pub mod sandbox;
#[doc(hidden)]
pub mod session;
#[doc(hidden)]
pub mod setting;
mod shadow;
#[doc(hidden)]
pub mod size;
pub mod soft;
pub mod statistics;
mod trace;
#[cfg(feature = "programs")]
pub mod vhost_user;
mod virtqueue;
mod worker;

pub use pvgpu_protocol::{Errno, control::Limits};
