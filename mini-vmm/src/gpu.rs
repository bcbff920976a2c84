//! The machine's GPU: host-proxy's device behind a virtio transport, its aperture in a memory slot.
//!
//! `vm` attaches it. Requests and responses pass between the guest and host-proxy without this module;
//! it must never look into them.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pvgpu_host_proxy::aperture::{Aperture, Reservation, Window};
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::monitor::Monitor;
use pvgpu_host_proxy::sandbox::{Allowed, DEVICE, Sandbox, THREAD};
use pvgpu_host_proxy::size;
use pvgpu_host_proxy::statistics::Statistics;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{self, Attachment};
use crate::kvm::{KvmError, Machine, Router};
use crate::memory::{Ram, Range};
use crate::msix::{self, Message, Msix};
use crate::pci::Function;
use crate::vhost_user::{self, FrontEnd, Guest, Link, LinkError};
use crate::virtio::{Backend, Line, SharedMemory, Virtio};
use crate::virtio_mmio::{VirtioMmio, register};
use crate::virtio_pci::{self, VirtioPci};
use crate::{cpuid, layout};

/// The GPU that a machine is to have.
pub enum Gpu {
    /// One whose device is in this process.
    InProcess {
        /// What performs the guest's operations.
        driver: Arc<dyn HostDriver>,
        /// Size of the aperture in bytes, a multiple of 4096; 0 for none (a guest then cannot map buffer objects).
        aperture: u64,
        /// Queues, doorbell, limits, trace.
        device: DeviceConfig,
    },
    /// One whose device is a `pvgpu-proxyd`, which knows all the rest.
    VhostUser {
        /// The socket that it listens on.
        socket: PathBuf,
        /// Whether the guest is to have the aperture that it offers.
        aperture: bool,
    },
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InProcess {
                driver,
                aperture,
                device,
            } => f
                .debug_struct("InProcess")
                .field("driver", driver.identity())
                .field("aperture", aperture)
                .field("device", device)
                .finish(),
            Self::VhostUser { socket, aperture } => f
                .debug_struct("VhostUser")
                .field("socket", socket)
                .field("aperture", aperture)
                .finish(),
        }
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
    /// The daemon.
    #[error(transparent)]
    Daemon(#[from] LinkError),
    /// KVM cannot interrupt the guest as PCI does.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The device behind the transport.
pub enum GpuDevice {
    /// In this process.
    InProcess(Box<Device>),
    /// In another one.
    VhostUser(FrontEnd),
}

impl GpuDevice {
    fn backend(&self) -> &dyn Backend {
        match self {
            Self::InProcess(device) => &**device,
            Self::VhostUser(front_end) => front_end,
        }
    }

    fn backend_mut(&mut self) -> &mut dyn Backend {
        match self {
            Self::InProcess(device) => &mut **device,
            Self::VhostUser(front_end) => front_end,
        }
    }

    /// What tells of the device, if it is in this process.
    pub fn monitor(&self) -> Option<Monitor> {
        match self {
            Self::InProcess(device) => Some(device.monitor()),
            Self::VhostUser(_) => None,
        }
    }

    /// What the device has counted, if it is in this process.
    pub fn statistics(&self) -> Option<Statistics> {
        match self {
            Self::InProcess(device) => Some(device.statistics()),
            Self::VhostUser(_) => None,
        }
    }
}

impl Backend for GpuDevice {
    fn device_id(&self) -> u32 {
        self.backend().device_id()
    }

    fn features(&self) -> u64 {
        self.backend().features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.backend().queue_max_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.backend().read_config(offset, data);
    }

    fn raises_interrupts(&self) -> bool {
        self.backend().raises_interrupts()
    }

    fn activate(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        features: u64,
        queues: Vec<Queue>,
        line: Arc<dyn Line>,
    ) -> Result<(), String> {
        self.backend_mut().activate(memory, features, queues, line)
    }

    fn notify(&self, queue: u16) {
        self.backend().notify(queue);
    }

    fn needs_reset(&self) -> bool {
        self.backend().needs_reset()
    }

    fn reset(&mut self) {
        self.backend_mut().reset();
    }
}

impl Guest for Virtio<GpuDevice> {
    fn device_lost(&self) {
        self.lose();
    }

    fn device_found(&self) {
        self.find();
    }
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
        line: Arc<dyn Line>,
    ) -> Result<(), String> {
        self.activate(memory, features, queues, line)
            .map_err(|error| error.to_string())
    }

    fn notify(&self, queue: u16) {
        self.notify(queue);
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset()
    }

    fn reset(&mut self) {
        self.reset();
    }
}

/// The GPU as the machine holds it.
pub(crate) struct Attached {
    /// The device, which its transport drives.
    pub device: Arc<Virtio<GpuDevice>>,
    /// What goes onto the bus.
    pub attachment: Attachment,
    /// What goes onto the PCI bus.
    pub function: Option<Arc<dyn Function>>,
    /// Where the aperture is in this process, if there is one, for its memory slot.
    pub aperture: Option<Arc<Reservation>>,
    /// Takes the vCPUs back from the device.
    pub off: Off,
    /// What the device does on the threads that call it.
    pub system_calls: Vec<Allowed>,
}

/// Takes the vCPUs back from a device that a guest keeps busy, or that does not answer.
#[derive(Clone)]
pub(crate) enum Off {
    /// [`Device::off_switch`].
    Device(Arc<AtomicBool>),
    /// Ends the connection too, and what looks after it.
    Link(Arc<Link>),
}

impl Off {
    /// Does it, for ever.
    pub(crate) fn switch(&self) {
        match self {
            Self::Device(off) => off.store(true, Ordering::Relaxed),
            Self::Link(link) => link.end(),
        }
    }
}

/// A guest-physical place for a window.
pub(crate) fn range(window: &Reservation) -> Range {
    Range {
        guest: layout::APERTURE_BASE,
        host: window.host_address(),
        size: window.size(),
    }
}

/// Makes the device and its transport.
pub(crate) fn attach(
    gpu: Gpu,
    transport: Transport,
    ram: &Ram,
    sandbox: Sandbox,
    machine: &Machine,
) -> Result<Attached, GpuError> {
    let bits = cpuid::physical_address_bits(machine.supported_cpuid());
    let window = |size| match size {
        0 => Ok(None),
        size => reserve(size, transport, bits).map(Arc::new).map(Some),
    };
    let (device, window, doorbells, off, system_calls) = match gpu {
        Gpu::InProcess {
            driver,
            aperture,
            mut device,
        } => {
            device.sandbox = sandbox;
            let window = window(aperture)?;
            let aperture = window.clone().map(|window| Aperture::new(window));
            let queues = device.request_queues;
            let device = Device::new(driver, aperture, device).map_err(GpuError::Events)?;
            // With a worker behind each queue the kernel itself passes the doorbell on, without an exit to us.
            let doorbells: Vec<_> = (0..queues)
                .filter_map(|queue| device.doorbell(queue))
                .map(EventFd::try_clone)
                .collect();
            let (off, calls) = (device.off_switch(), device.system_calls().to_vec());
            let device = GpuDevice::InProcess(Box::new(device));
            (device, window, doorbells, Off::Device(off), calls)
        }
        Gpu::VhostUser { socket, aperture } => {
            let (connection, offer) = vhost_user::connect(&socket, aperture, |_| Ok(()))?;
            let window = window(offer.aperture)?;
            let link = Link::new(socket, connection, offer, window.clone());
            let link = Arc::new(link.map_err(GpuError::Events)?);
            let shared = ram
                .shared()
                .map(|(range, file)| Ok((range, file.try_clone()?)));
            let shared = shared.collect::<Result<_, _>>().map_err(GpuError::Events)?;
            let device = FrontEnd::new(Arc::clone(&link), shared).map_err(GpuError::Events)?;
            let doorbells = device.kicks().iter().map(EventFd::try_clone).collect();
            let device = GpuDevice::VhostUser(device);
            let calls = [THREAD, DEVICE, vhost_user::CALLS].concat();
            (device, window, doorbells, Off::Link(link), calls)
        }
    };
    let doorbells = (0..).zip(doorbells).map(|(queue, event)| {
        let (offset, value) = match transport {
            Transport::Mmio => (register::QUEUE_NOTIFY, Some(u32::from(queue))),
            Transport::Pci => (virtio_pci::doorbell(queue), None),
        };
        Ok(bus::Doorbell {
            offset,
            value,
            event: Arc::new(event.map_err(GpuError::Events)?),
        })
    });
    let doorbells = doorbells.collect::<Result<_, GpuError>>()?;
    let region = window.as_deref().map(range).map(|range| SharedMemory {
        id: layout::APERTURE_REGION,
        base: range.guest,
        size: range.size,
    });
    let memory = ram.map().clone();
    let (device, attachment, function): (_, _, Option<Arc<dyn Function>>) = match transport {
        Transport::Mmio => {
            let event = Arc::new(new_event()?);
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
            let msix = messages(device.queue_max_sizes().len() + 1, machine)?;
            let transport = Arc::new(VirtioPci::new(device, memory, region, msix));
            let device: Arc<Virtio<_>> = Arc::clone(&transport);
            let attachment = Attachment {
                base: layout::GPU_BAR.into(),
                size: layout::GPU_BAR_SIZE.into(),
                device: Arc::clone(&transport) as _,
                doorbells,
                interrupts: Vec::new(),
            };
            (device, attachment, Some(transport as _))
        }
    };
    Ok(Attached {
        device,
        attachment,
        function,
        aperture: window,
        off,
        system_calls,
    })
}

fn new_event() -> Result<EventFd, GpuError> {
    EventFd::new(EFD_NONBLOCK).map_err(GpuError::Events)
}

/// So many vectors.
fn messages(count: usize, machine: &Machine) -> Result<Msix, GpuError> {
    let events = (0..count).map(|_| new_event());
    let events = events.collect::<Result<Vec<_>, _>>()?;
    let sender = Messages {
        router: machine.router()?,
        warned: AtomicBool::new(false),
    };
    Ok(Msix::new(events, Arc::new(sender)))
}

/// KVM, as it sends the messages.
struct Messages {
    router: Router,
    warned: AtomicBool,
}

impl Messages {
    fn check(&self, told: Result<(), KvmError>) {
        // Once: a guest may change them as often as it likes.
        if let Err(error) = told
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            log::warn!("the guest misses interrupts of its GPU: {error}");
        }
    }
}

impl msix::Sender for Messages {
    fn route(&self, messages: &[Option<Message>]) {
        self.check(self.router.route(messages));
    }

    fn connect(&self, vector: usize, event: &EventFd, connected: bool) {
        let message = u32::try_from(vector).unwrap_or(u32::MAX);
        self.check(self.router.connect(message, event, connected));
    }
}

fn reserve(size: u64, transport: Transport, bits: u32) -> Result<Reservation, GpuError> {
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
    Reservation::new(size).map_err(|error| GpuError::Reserve { size, error })
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
