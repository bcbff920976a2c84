//! What a program does with a DRM device file, written once and run twice: by the test guest through `guest-driver`,
//! and by a native program through the system's own ioctls. The two pictures must be equal byte for byte.
//!
//! - [`device`]: a DRM device file as a program sees it; the one thing that differs between the two sides.
//! - [`steps`]: calls on it that are timed, reported and checked.
//! - [`vgem`], [`virtio_gpu`], [`soft`]: a scenario for each host driver. [`virgl`] writes the commands of the second
//!   one, [`landscape`] with [`outline`] those of the last one.
//! - [`selftest`]: calls that must fail.
//! - [`mod@submission`]: one that changes while it is read.
//! - [`picture`]: what a scenario returns.
//! - [`mod@bench`]: the registers with which the benchmark measures its floors.
//!
//! Nothing here knows which side it runs on, and nothing here is part of what pvgpu offers to its users.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bench;
pub mod device;
pub mod landscape;
pub mod outline;
pub mod picture;
pub mod selftest;
pub mod soft;
pub mod steps;
pub mod submission;
pub mod vgem;
pub mod virgl;
pub mod virtio_gpu;

pub use device::{DeviceFile, Mapping};
pub use picture::Picture;
pub use steps::{Failure, Report, Steps};
