//! The kernel's side of the machine: /dev/kvm, the VM with its interrupt controllers, memory slots,
//! interrupt and doorbell events.
//!
//! `vm` builds a machine with it and `check` reports on it. Everything a host may lack is one row of
//! [`CAPABILITIES`], so that both say the same.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Attachment;
use crate::layout;
use crate::memory::Range;
use crate::msix::Message;
use crate::virtio::{high, low};

/// Where KVM is found unless somebody says otherwise.
pub const DEVICE: &str = "/dev/kvm";

/// Something that a host's KVM may or may not do.
#[derive(Debug, Clone, Copy)]
pub struct Capability {
    /// Name without the `KVM_CAP_` prefix, as in the kernel's documentation.
    pub name: &'static str,
    /// How kvm-ioctls calls it.
    pub cap: Cap,
    /// Whether a machine cannot run without it.
    pub required: bool,
    /// What the machine does with it.
    pub purpose: &'static str,
}

/// Everything the machine uses.
pub const CAPABILITIES: &[Capability] = &[
    Capability {
        name: "USER_MEMORY",
        cap: Cap::UserMemory,
        required: true,
        purpose: "guest RAM and the aperture",
    },
    Capability {
        name: "IRQCHIP",
        cap: Cap::Irqchip,
        required: true,
        purpose: "interrupt controllers",
    },
    Capability {
        name: "PIT2",
        cap: Cap::Pit2,
        required: true,
        purpose: "timer",
    },
    Capability {
        name: "SET_TSS_ADDR",
        cap: Cap::SetTssAddr,
        required: true,
        purpose: "real mode on older Intel processors",
    },
    Capability {
        name: "EXT_CPUID",
        cap: Cap::ExtCpuid,
        required: true,
        purpose: "CPUID",
    },
    Capability {
        name: "IRQFD",
        cap: Cap::Irqfd,
        required: true,
        purpose: "interrupts from devices",
    },
    Capability {
        name: "IOEVENTFD",
        cap: Cap::Ioeventfd,
        required: true,
        purpose: "doorbells to worker threads",
    },
    Capability {
        name: "IMMEDIATE_EXIT",
        cap: Cap::ImmediateExit,
        required: true,
        purpose: "stopping vCPUs",
    },
    Capability {
        name: "IRQ_ROUTING",
        cap: Cap::IrqRouting,
        required: false,
        purpose: "interrupts of a GPU on PCI (--transport pci)",
    },
    Capability {
        name: "SET_IDENTITY_MAP_ADDR",
        cap: Cap::SetIdentityMapAddr,
        required: false,
        purpose: "real mode on older Intel processors",
    },
    Capability {
        name: "GET_TSC_KHZ",
        cap: Cap::GetTscKhz,
        required: false,
        purpose: "telling the guest the frequency of its clock",
    },
    Capability {
        name: "TSC_DEADLINE_TIMER",
        cap: Cap::TscDeadlineTimer,
        required: false,
        purpose: "precise guest timers",
    },
    Capability {
        name: "NR_MEMSLOTS",
        cap: Cap::NrMemslots,
        required: false,
        purpose: "number of memory slots (three are used)",
    },
];

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no such device.
    #[error("{} does not exist: load the module (modprobe kvm-intel or kvm-amd) or, if that fails, enable virtualization in the firmware or in the VM this system runs in", .0.display())]
    Missing(PathBuf),
    /// The device cannot be opened by this user.
    #[error("no permission to open {}: become a member of the group that owns it (usermod -aG kvm USER, then log in again) or run as root", .0.display())]
    Permission(PathBuf),
    /// The device cannot be opened for another reason.
    #[error("cannot open {}: {error}; see the kernel log for what KVM says", path.display())]
    Open {
        /// Which device.
        path: PathBuf,
        /// Why.
        error: kvm_ioctls::Error,
    },
    /// The file is something else than KVM.
    #[error("{} is not KVM (no answer to KVM_GET_API_VERSION): give the KVM device, normally /dev/kvm", .0.display())]
    NotKvm(PathBuf),
    /// KVM speaks another version of its interface.
    #[error(
        "this KVM has API version {0}, version {KVM_API_VERSION} is needed: use Linux 2.6.22 or newer"
    )]
    Version(i32),
    /// A capability that a machine needs is missing.
    #[error(
        "this KVM lacks KVM_CAP_{0} (for: {1}): use a newer kernel, or KVM on a host that is not a restricted container"
    )]
    Capability(&'static str, &'static str),
    /// An operation failed.
    #[error(
        "KVM refused to {what}: {error}; the kernel log may say why, 'mini-vmm check' shows what this host offers"
    )]
    Operation {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        error: kvm_ioctls::Error,
    },
}

impl KvmError {
    /// Names a failed operation; for `map_err`.
    pub(crate) fn at(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Operation { what, error }
    }

    fn opening(path: &Path, error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Self::Missing(path.into()),
            libc::EACCES | libc::EPERM => Self::Permission(path.into()),
            _ => Self::Open {
                path: path.into(),
                error,
            },
        }
    }
}

/// Opens KVM and checks that it speaks the right version; capabilities are not checked.
///
/// # Errors
///
/// See [`KvmError`].
pub fn open(path: &Path) -> Result<Kvm, KvmError> {
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| KvmError::Missing(path.into()))?;
    let fd =
        Kvm::open_with_cloexec_at(name, true).map_err(|error| KvmError::opening(path, error))?;
    // SAFETY: `open_with_cloexec_at` just returned this descriptor and nothing else owns it.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    match kvm.get_api_version() {
        version if version < 0 => Err(KvmError::NotKvm(path.into())),
        version if version.unsigned_abs() != KVM_API_VERSION => Err(KvmError::Version(version)),
        _ => Ok(kvm),
    }
}

/// A VM without processors.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<VmFd>,
    supported: CpuId,
}

impl Machine {
    /// Creates a VM with interrupt controllers and timer.
    ///
    /// # Errors
    ///
    /// See [`KvmError`].
    pub fn new(path: &Path) -> Result<Self, KvmError> {
        let kvm = open(path)?;
        for capability in CAPABILITIES {
            if capability.required && !kvm.check_extension(capability.cap) {
                return Err(KvmError::Capability(capability.name, capability.purpose));
            }
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::at("list the CPUID leaves it supports"))?;
        let vm = kvm.create_vm().map_err(KvmError::at("create a VM"))?;
        vm.set_tss_address(layout::TSS)
            .map_err(KvmError::at("place the task-state segment"))?;
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(layout::IDENTITY_MAP_PAGE)
                .map_err(KvmError::at("place the identity-map page"))?;
        }
        vm.create_irq_chip()
            .map_err(KvmError::at("create interrupt controllers"))?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(KvmError::at("create a timer"))?;
        Ok(Self {
            vm: Arc::new(vm),
            supported,
        })
    }

    /// The CPUID leaves that KVM can give a guest.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported
    }

    /// Shows the guest `range` through memory slot `slot`.
    ///
    /// # Errors
    ///
    /// When KVM refuses, for example because the range is not mapped or overlaps another slot.
    ///
    /// # Safety
    ///
    /// The host side of `range` must be memory that this process may expose to the guest for as
    /// long as the machine exists: mapped, and referenced by no Rust value that assumes it to be
    /// unchanging.
    pub unsafe fn add_memory(&self, slot: u32, range: Range) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: range.guest,
            memory_size: range.size,
            userspace_addr: range.host,
        };
        // SAFETY: the caller's promise, which is word for word what KVM needs.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(KvmError::at("map memory into the guest"))
    }

    /// Lets `event` raise interrupt line `line`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn add_interrupt(&self, line: u32, event: &EventFd) -> Result<(), KvmError> {
        self.vm
            .register_irqfd(event, line)
            .map_err(KvmError::at("connect an interrupt event"))
    }

    /// Connects the doorbell and interrupt events of a device.
    ///
    /// # Errors
    ///
    /// When KVM refuses one of them.
    pub fn connect(&self, device: &Attachment) -> Result<(), KvmError> {
        for doorbell in &device.doorbells {
            let address = IoEventAddress::Mmio(device.base.saturating_add(doorbell.offset));
            match doorbell.value {
                Some(value) => self.vm.register_ioevent(&doorbell.event, &address, value),
                None => self
                    .vm
                    .register_ioevent(&doorbell.event, &address, NoDatamatch),
            }
            .map_err(KvmError::at("connect a doorbell event"))?;
        }
        for interrupt in &device.interrupts {
            self.add_interrupt(interrupt.line, &interrupt.event)?;
        }
        Ok(())
    }

    /// What tells KVM which messages the interrupts from [`layout::FIRST_MESSAGE`] on send, and when.
    ///
    /// # Errors
    ///
    /// When KVM cannot be told.
    pub fn router(&self) -> Result<Router, KvmError> {
        let router = Router(Arc::downgrade(&self.vm));
        router.route(&[])?;
        Ok(router)
    }

    /// Adds a processor.
    ///
    /// # Errors
    ///
    /// When KVM refuses, for example because there are too many.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.vm
            .create_vcpu(u64::from(index))
            .map_err(KvmError::at("create a vCPU"))
    }
}

/// See [`Machine::router`]. It does not keep the machine from ending.
#[derive(Debug)]
pub struct Router(Weak<VmFd>);

impl Router {
    /// Has each interrupt with a message send it, and the interrupt controllers' inputs go where KVM has them from the start.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn route(&self, messages: &[Option<Message>]) -> Result<(), KvmError> {
        let Some(vm) = self.0.upgrade() else {
            return Ok(());
        };
        let at = KvmError::at("route interrupts");
        match KvmIrqRouting::from_entries(&routes(messages)) {
            Ok(routing) => vm.set_gsi_routing(&routing).map_err(at),
            Err(_) => Err(at(kvm_ioctls::Error::new(libc::E2BIG))),
        }
    }

    /// Lets `event` send that message, also for what was signalled before, or takes it away.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn connect(&self, message: u32, event: &EventFd, connected: bool) -> Result<(), KvmError> {
        let Some(vm) = self.0.upgrade() else {
            return Ok(());
        };
        let line = layout::FIRST_MESSAGE.saturating_add(message);
        match connected {
            true => vm.register_irqfd(event, line),
            false => vm.unregister_irqfd(event, line),
        }
        .map_err(KvmError::at("connect an interrupt event"))
    }
}

/// KVM's routing table: lines 0 to 15 to both kinds of interrupt controller, those to 23 to the I/O interrupt controller, then
/// messages.
fn routes(messages: &[Option<Message>]) -> Vec<kvm_irq_routing_entry> {
    let input = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let pic = (0..16).map(|line| match line {
        0..8 => input(line, KVM_IRQCHIP_PIC_MASTER, line),
        _ => input(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
    });
    let io_apic = (0..layout::FIRST_MESSAGE).map(|line| input(line, KVM_IRQCHIP_IOAPIC, line));
    let messages = (layout::FIRST_MESSAGE..).zip(messages);
    let messages = messages.filter_map(|(gsi, message)| {
        let Message { address, data } = (*message)?;
        Some(kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: low(address),
                    address_hi: high(address),
                    data,
                    ..Default::default()
                },
            },
            ..Default::default()
        })
    });
    pic.chain(io_apic).chain(messages).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_for_not_opening_kvm_has_its_own_remedy() {
        let message =
            |errno| KvmError::opening(Path::new(DEVICE), kvm_ioctls::Error::new(errno)).to_string();
        assert!(message(libc::ENOENT).contains("modprobe"));
        assert!(message(libc::EACCES).contains("usermod -aG kvm"));
        assert!(message(libc::EMFILE).contains("kernel log"));
    }

    #[test]
    fn a_file_that_is_not_kvm_is_named() {
        let error = open(Path::new("/dev/null"))
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("/dev/null is not KVM"), "{error}");
    }
}
