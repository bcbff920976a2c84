//! The port of the guest driver to a machine without an operating system, on `virtio-drivers` (feature `baremetal`).
//!
//! - [`mmio`]: the device's registers.
//! - [`queue`]: one request queue, its slots in memory that the device can reach, and when to notify whom.
//! - [`channel`]: both together, as the channel that a session talks through.
//!
//! What the machine has to bring is [`Platform`].

pub mod channel;
#[cfg(test)]
mod fake;
pub mod mmio;
pub mod queue;

pub use channel::{ChannelError, VirtioChannel, Wait};
pub use mmio::{MmioError, MmioTransport, SharedMemory};
pub use queue::Platform;
