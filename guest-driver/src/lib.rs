//! The guest side of pvgpu: turns operations on a DRM device file into requests, and their answers back.
//!
//! - [`session`]: one method per operation of the protocol.
//! - [`marshal`]: gathers an ioctl's argument by its schema, and writes back what comes out.
//! - [`constants`]: answers that cannot change, asked once; [`version`]: the one that the hello gave.
//! - [`channel`]: how bytes travel; `baremetal` (feature `baremetal`) is the port on virtio-mmio.
//! - [`flat`]: a caller in the driver's own address space.

#![no_std]

#[cfg(feature = "baremetal")]
extern crate alloc;
#[cfg(test)]
extern crate std;

#[cfg(feature = "baremetal")]
pub mod baremetal;
pub mod channel;
pub mod constants;
pub mod flat;
pub mod marshal;
pub mod session;
pub mod version;
