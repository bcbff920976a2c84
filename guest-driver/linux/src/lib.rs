//! The Rust half of the Linux module: what the C files call for each operation of a device file.
//!
//! - [`entry`]: one function per operation, in C's calling convention.
//! - [`device`]: the device as a [`pvgpu_guest_driver::channel::Channel`], one for each call.
//! - [`process`]: the calling process: its memory and its file descriptors.
//!
//! No ioctl is known here: the schemas of `pvgpu-protocol` say what to copy.

#![no_std]

mod device;
pub mod entry;
mod kernel;
mod panic;
mod process;
