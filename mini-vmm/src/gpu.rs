//! The machine's GPU: host-proxy's device behind the virtio-mmio transport, its aperture in a memory slot.
//!
//! `vm` attaches it. Requests and responses pass between the guest and host-proxy without this module;
//! it must never look into them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig, Interrupt};
use pvgpu_host_proxy::driver::HostDriver;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{self, Attachment};
use crate::memory::Range;
use crate::virtio::{Backend, SharedMemory, Virtio};
use crate::virtio_mmio::{VirtioMmio, register};
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
    /// The aperture's place, if there is one, for its memory slot.
    pub aperture: Option<Range>,
    /// Takes the vCPUs back from the device ([`Device::off_switch`]).
    pub off: Arc<AtomicBool>,
}

/// Makes the device and its transport.
pub(crate) fn attach(
    gpu: Gpu,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    supported: &kvm_bindings::CpuId,
) -> Result<Attached, GpuError> {
    let aperture = match gpu.aperture {
        0 => None,
        size => Some(reserve(size, cpuid::physical_address_bits(supported))?),
    };
    let range = aperture.as_ref().map(|aperture| Range {
        guest: layout::APERTURE_BASE,
        host: aperture.host_address(),
        size: aperture.size(),
    });
    let request_queues = gpu.device.request_queues;
    let device = Device::new(gpu.driver, aperture, gpu.device).map_err(GpuError::Events)?;
    let off = device.off_switch();
    // With a worker behind each queue the kernel itself passes the doorbell on, without an exit to us.
    let mut doorbells = Vec::new();
    for queue in 0..request_queues {
        if let Some(event) = device.doorbell(queue) {
            let event = event.try_clone().map_err(GpuError::Events)?;
            doorbells.push(bus::Doorbell {
                offset: register::QUEUE_NOTIFY,
                value: Some(queue.into()),
                event: Arc::new(event),
            });
        }
    }
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(GpuError::Events)?);
    let region = range.map(|range| SharedMemory {
        id: layout::APERTURE_REGION,
        base: range.guest,
        size: range.size,
    });
    let transport = VirtioMmio::new(device, memory.clone(), region, Arc::clone(&event));
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
    Ok(Attached {
        device,
        attachment,
        aperture: range,
        off,
    })
}

fn reserve(size: u64, bits: u32) -> Result<Aperture, GpuError> {
    if !size.is_multiple_of(4096) {
        return Err(GpuError::ApertureSize(size));
    }
    let end = layout::APERTURE_BASE.checked_add(size);
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
        let refused = |size, bits| reserve(size, bits).map(drop).unwrap_err().to_string();
        assert!(refused(4097, 46).contains("multiple of 4K"));
        assert!(refused(1 << 20, 36).contains("36 physical address bits"));
        assert!(refused(1 << 39, 39).contains("smaller --aperture"));
        assert!(refused(!0xfff, 52).contains("address bits"));
        assert!(refused(1 << 49, 52).contains("cannot reserve 512T"));
        assert_eq!(reserve(1 << 20, 37).unwrap().size(), 1 << 20);
    }
}
