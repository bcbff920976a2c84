//! End-to-end tests of pvgpu: what they share. The programs of `src/bin` use it, on this machine and
//! inside the testbed (`cargo xtask testbed`). Nothing here is part of what pvgpu offers to its users.

pub mod bench;
pub mod conformance;
pub mod constants;
pub mod daemon;
pub mod debug_device;
pub mod descriptors;
pub mod device_channel;
pub mod double_fetch;
pub mod drm_ioctl;
pub mod footprint;
pub mod gate;
pub mod guest_vm;
pub mod inspection;
pub mod linux_demo;
pub mod live_heap;
pub mod loopback;
pub mod loopback_file;
pub mod modules;
pub mod picture_file;
pub mod recording;
pub mod recovery;
pub mod replay;
pub mod semantics;
pub mod session_states;
pub mod silent_front_end;
pub mod syscall;
pub mod testbed;
pub mod triple_fault;
pub mod vanishing;
pub mod vm_fuzz;
