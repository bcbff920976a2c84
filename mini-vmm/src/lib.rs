//! A small virtual machine monitor on KVM: the machine in which the paravirtual GPU is developed,
//! demonstrated, tested and measured.
//!
//! The program `mini-vmm` and the end-to-end tests and benchmarks use it. One file per part of the
//! machine: [`layout`] says where everything is, [`vm`] puts it together and runs it.
//!
//! ```no_run
//! use pvgpu_mini_vmm::{Vm, VmConfig};
//!
//! let outcome = Vm::new(VmConfig::new("guest.elf"))?.run()?;
//! assert_eq!(outcome.exit_code, 0);
//! # Ok::<(), pvgpu_mini_vmm::VmError>(())
//! ```

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation
    )
)]

pub mod boot;
pub mod bus;
pub mod check;
pub mod cpuid;
pub mod debug;
pub mod events;
pub mod gpu;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod mptable;
pub mod msix;
pub mod pci;
pub mod ports;
pub mod registers;
pub mod sandbox;
pub mod serial;
pub mod stop;
pub mod terminal;
pub mod vcpu;
pub mod vhost_user;
pub mod virtio;
pub mod virtio_mmio;
pub mod virtio_pci;
pub mod vm;

pub use debug::DumpTarget;
pub use gpu::{Gpu, Transport};
pub use serial::Console;
pub use stop::{Ending, Stop};
pub use vm::{Counters, Outcome, Vm, VmConfig, VmError};
