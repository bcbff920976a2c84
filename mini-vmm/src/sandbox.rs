//! What the machine's own threads may do beyond the GPU's device: tables for the filters of [`pvgpu_host_proxy::sandbox`].
//!
//! `vm` makes the filters; vCPU threads get theirs from it, the program's own threads from `main`. The reasons are in the rows;
//! `docs/sandbox.md` has it in words.

use kvm_bindings::{KVMIO, kvm_regs, kvm_translation};
use libc::{_IOC_NONE, _IOC_READ, _IOC_WRITE};
use pvgpu_host_proxy::sandbox::Allowed;

use crate::cast;
