//! The machine's GPU: host-proxy's device behind a virtio transport, its aperture in a memory slot.
//!
//! `vm` attaches it. Requests and responses pass between the guest and host-proxy without this module;
//! it must never look into them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig, Interrupt};
use pvgpu_host_proxy::driver::HostDriver;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{self, Attachment};
use crate::kvm::{KvmError, Machine};
use crate::memory::Range;
use crate::msix::Msix;
use crate::pci::Function;
use crate::virtio::{Backend, SharedMemory, Virtio};
use crate::virtio_mmio::{VirtioMmio, register};
use crate::virtio_pci::{self, VirtioPci};
use crate::{cpuid, layout, size};

/// The GPU that a machine is to have.
pub struct Gpu {
    /// What performs the guest's operations.
    pub driver: Arc<dyn HostDriver>,
    /// Size of the aperture in bytes, a multiple of 4096; 0 for none (a guest then cannot map buffer objects).
    pub aperture: u64,
    /// Queues, doorbell, limits, trace.
    pub device: DeviceConfig,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("driver", self.driver.identity())
            .field("aperture", &self.aperture)
            .field("device", &self.device)
            .finish()
    }
}

/// How a guest finds the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// By virtio-mmio, which the kernel's command line announces ([`crate::virtio_mmio`]).
    #[default]
    Mmio,
    /// On the PCI bus, by itself ([`crate::virtio_pci`]).
    Pci,
}

/// Why a machine cannot have this GPU.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The aperture's size is impossible.
    #[error("an aperture of {} is not possible: choose --aperture as a multiple of 4K, or 0 for none", size::display(*.0))]
    ApertureSize(u64),
    /// The processor cannot address the aperture.
    #[error("an aperture of {} at {:#x} does not fit into this processor's {bits} physical address bits: choose a smaller --aperture, or 0 for none", size::display(*.size), layout::APERTURE_BASE)]
    AddressBits {
        /// The size asked for.
        size: u64,
        /// What the processor has.
        bits: u32,
    },
    /// On PCI, it would not be aligned to its size.
    #[error("an aperture of {} does not fit into a PCI BAR at {:#x}: choose --aperture {} or less, or --transport mmio", size::display(*.0), layout::APERTURE_BASE, size::display(layout::APERTURE_BAR_MAX))]
    ApertureBar(u64),
    /// The host has no address space for it.
    #[error("cannot reserve {} of address space for the aperture ({error}): choose a smaller --aperture", size::display(*.size))]
    Reserve {
        /// The size asked for.
        size: u64,
        /// The host's answer.
        error: std::io::Error,
    },
    /// The host has no events or threads left.
    #[error("cannot set the GPU up: {0}; check the limit on open files (ulimit -n)")]
    Events(std::io::Error),
    /// KVM cannot interrupt the guest as PCI does.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl Backend for Device {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        self.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.queue_max_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read_config(offset, data);
    }

    fn activate(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), String> {
        self.activate(memory, features, queues, interrupt)
            .map_err(|error| error.to_string())
    }

    fn notify(&self, queue: u16) {
        self.notify(queue);
    }

    fn reset(&mut self) {
        self.reset();
    }
}

/// The GPU as the machine holds it.
pub(crate) struct Attached {
    /// The device, which its transport drives.
    pub device: Arc<Virtio<Device>>,
    /// What goes onto the bus.
    pub attachment: Attachment,
    /// What goes onto the PCI bus.
    pub function: Option<Arc<dyn Function>>,
    /// The aperture's place, if there is one, for its memory slot.
    pub aperture: Option<Range>,
    /// Takes the vCPUs back from the device ([`Device::off_switch`]).
    pub off: Arc<AtomicBool>,
}

/// Makes the device and its transport.
pub(crate) fn attach(
    gpu: Gpu,
    transport: Transport,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    machine: &Machine,
) -> Result<Attached, GpuError> {
    let aperture = match gpu.aperture {
        0 => None,
        size => {
            let bits = cpuid::physical_address_bits(machine.supported_cpuid());
            Some(reserve(size, transport, bits)?)
        }
    };
    let range = aperture.as_ref().map(|aperture| Range {
        guest: layout::APERTURE_BASE,
        host: aperture.host_address(),
        size: aperture.size(),
    });
    let region = range.map(|range| SharedMemory {
        id: layout::APERTURE_REGION,
        base: range.guest,
        size: range.size,
    });
    let request_queues = gpu.device.request_queues;
    let device = Device::new(gpu.driver, aperture, gpu.device).map_err(GpuError::Events)?;
    let off = device.off_switch();
    // With a worker behind each queue the kernel itself passes the doorbell on, without an exit to us.
    let mut doorbells = Vec::new();
    for queue in 0..request_queues {
        if let Some(event) = device.doorbell(queue) {
            let event = event.try_clone().map_err(GpuError::Events)?;
            let (offset, value) = match transport {
                Transport::Mmio => (register::QUEUE_NOTIFY, Some(queue.into())),
                Transport::Pci => (virtio_pci::doorbell(queue), None),
            };
            doorbells.push(bus::Doorbell {
                offset,
                value,
                event: Arc::new(event),
            });
        }
    }
    let memory = memory.clone();
    let (device, attachment, function): (_, _, Option<Arc<dyn Function>>) = match transport {
        Transport::Mmio => {
            let event = new_event()?;
            let transport = VirtioMmio::new(device, memory, region, Arc::clone(&event));
            let device = Arc::clone(&transport);
            let attachment = Attachment {
                base: layout::GPU_MMIO,
                size: layout::GPU_MMIO_SIZE,
                device: Arc::new(transport),
                doorbells,
                interrupts: vec![bus::Interrupt {
                    line: layout::GPU_IRQ,
                    event,
                }],
            };
            (device, attachment, None)
        }
        Transport::Pci => {
            // One for the configuration, one for each queue.
            let (msix, interrupts) = messages(device.queue_max_sizes().len() + 1, machine)?;
            let transport = Arc::new(VirtioPci::new(device, memory, region, msix));
            let device: Arc<Virtio<_>> = Arc::clone(&transport);
            let attachment = Attachment {
                base: layout::GPU_BAR.into(),
                size: layout::GPU_BAR_SIZE.into(),
                device: Arc::clone(&transport) as _,
                doorbells,
                interrupts,
            };
            (device, attachment, Some(transport as _))
        }
    };
    Ok(Attached {
        device,
        attachment,
        function,
        aperture: range,
        off,
    })
}

fn new_event() -> Result<Arc<EventFd>, GpuError> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(GpuError::Events)?;
    Ok(Arc::new(event))
}

/// So many vectors, and the interrupts of KVM that send their messages.
fn messages(count: usize, machine: &Machine) -> Result<(Msix, Vec<bus::Interrupt>), GpuError> {
    let events = (0..count).map(|_| new_event());
    let events = events.collect::<Result<Vec<_>, _>>()?;
    let interrupts = (layout::FIRST_MESSAGE..).zip(events.iter().cloned());
    let interrupts = interrupts.map(|(line, event)| bus::Interrupt { line, event });
    let interrupts = interrupts.collect();
    let router = machine.router()?;
    let warned = AtomicBool::new(false);
    let route = move |messages: &[_]| {
        // Once: a guest may change them as often as it likes.
        if let Err(error) = router.route(messages)
            && !warned.swap(true, Ordering::Relaxed)
        {
            log::warn!("the guest misses interrupts of its GPU: {error}");
        }
    };
    Ok((Msix::new(events, Box::new(route)), interrupts))
}

fn reserve(size: u64, transport: Transport, bits: u32) -> Result<Aperture, GpuError> {
    if !size.is_multiple_of(4096) {
        return Err(GpuError::ApertureSize(size));
    }
    // A BAR has a power of two.
    let room = match transport {
        Transport::Mmio => size,
        Transport::Pci if size <= layout::APERTURE_BAR_MAX => size.next_power_of_two(),
        Transport::Pci => return Err(GpuError::ApertureBar(size)),
    };
    let end = layout::APERTURE_BASE.checked_add(room);
    if end.is_none_or(|end| bits < 64 && end > 1 << bits) {
        return Err(GpuError::AddressBits { size, bits });
    }
    Aperture::new(size).map_err(|error| GpuError::Reserve { size, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aperture_that_cannot_be_is_refused_with_a_remedy() {
        let on = |transport, size, bits| {
            reserve(size, transport, bits)
                .map(drop)
                .unwrap_err()
                .to_string()
        };
        let refused = |size, bits| on(Transport::Mmio, size, bits);
        assert!(refused(4097, 46).contains("multiple of 4K"));
        assert!(refused(1 << 20, 36).contains("36 physical address bits"));
        assert!(refused(1 << 39, 39).contains("smaller --aperture"));
        assert!(refused(!0xfff, 52).contains("address bits"));
        assert!(refused(1 << 49, 52).contains("cannot reserve 512T"));
        let refused_on_pci = |size, bits| on(Transport::Pci, size, bits);
        assert!(refused_on_pci((64 << 30) + 4096, 52).contains("--aperture 64G or less"));
        assert!(refused_on_pci((32 << 30) + 4096, 36).contains("address bits"));
        for transport in [Transport::Mmio, Transport::Pci] {
            assert_eq!(reserve(3 << 20, transport, 37).unwrap().size(), 3 << 20);
        }
    }
}
