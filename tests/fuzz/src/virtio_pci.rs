//! The PCI bus, a function's configuration space, and the registers of virtio over PCI in any order, with any width.
//!
//! Input: steps. Each accesses ports or BAR 0, goes through a part of what a driver does, sets a vector up, or writes guest memory.
//! What can be read must follow a model of the specifications: identity and capabilities do not change, a BAR has its address
//! or tells its size, status bits are only added until a reset, nothing is ever started without agreement on features, and no
//! vector interrupts before KVM knows its message.

use crate::answering::Answering;
use crate::decode::LIMITS;
use crate::virtio_mmio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, GUEST, KNOWN, MEMORY, NEEDS_RESET, SIZE, offer,
    store,
};
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig, Doorbell};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_mini_vmm::bus::MmioDevice;
use pvgpu_mini_vmm::layout;
use pvgpu_mini_vmm::msix::{ENTRY, Message, Msix, Sender};
use pvgpu_mini_vmm::pci::{self, PciBus, header};
use pvgpu_mini_vmm::virtio::SharedMemory;
use pvgpu_mini_vmm::virtio_pci::{
    FIRST_DEVICE, NO_VECTOR, VENDOR, VirtioPci, common, doorbell, region,
};
use pvgpu_protocol::wire::CONFIG_MAGIC;
use std::sync::{Arc, LazyLock, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Two queues and the configuration.
const VECTORS: usize = 3;

/// Bytes of shared memory; its BAR has 4 MiB.
const APERTURE: u64 = 3 << 20;
/// What the BARs are when they tell their sizes.
const SIZES: [u32; 6] = [
    0u32.wrapping_sub(layout::GPU_BAR_SIZE),
    0,
    0xffc0_000c,
    u32::MAX,
    0,
    0,
];

/// The vectors' events: making them anew would be system calls for each input.
static EVENTS: LazyLock<Vec<EventFd>> = LazyLock::new(|| {
    let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    std::iter::repeat_with(event).take(VECTORS).collect()
});

/// What KVM was told of the vectors.
#[derive(Default)]
struct Kvm(Mutex<[Vector; VECTORS]>);

#[derive(Default)]
struct Vector {
    message: Option<Message>,
    connected: bool,
}

impl Sender for Kvm {
    fn route(&self, messages: &[Option<Message>]) {
        let mut vectors = self.0.lock().expect("no panic");
        assert_eq!(messages.len(), VECTORS);
        for (vector, message) in vectors.iter_mut().zip(messages) {
            vector.message = *message;
        }
    }

    fn connect(&self, vector: usize, _event: &EventFd, connected: bool) {
        let vector = &mut self.0.lock().expect("no panic")[vector];
        assert_ne!(vector.connected, connected, "KVM refuses that");
        vector.connected = connected;
    }
}

/// A step of a hostile driver.
#[derive(Arbitrary, Debug)]
enum Step {
    /// Writes anything to a port of the bus.
    WritePort { port: u8, bytes: Vec<u8> },
    /// Reads as much as it wants from a port of the bus.
    ReadPort { port: u8, length: u8 },
    /// Writes a register of a device's configuration space.
    Configure {
        device: u8,
        register: u8,
        value: u32,
    },
    /// Writes anything to BAR 0.
    Write { offset: u16, bytes: Vec<u8> },
    /// Reads anything there.
    Read { offset: u16, length: u8 },
    /// Does the same by the capability PCI_CFG.
    Window {
        offset: u16,
        length: u8,
        value: Option<u32>,
    },
    /// Agrees on these features, or on those that are offered.
    Features(Option<u64>),
    /// Describes a queue, as it must be but for what is given here.
    Queue {
        queue: u8,
        size: Option<u16>,
        address: Option<u32>,
        vector: u16,
        ready: bool,
    },
    /// Adds a status bit.
    Status { bit: u8 },
    /// Switches MSI-X on or off.
    Msix { enabled: bool, masked: bool },
    /// Sets an entry of its table.
    Vector {
        vector: u8,
        address: u64,
        data: u32,
        masked: bool,
    },
    /// Offers a request on the first queue and rings.
    Request { what: u8, queue: u8 },
    /// Writes guest memory.
    Memory { address: u16, bytes: [u8; 8] },
    /// Resets the device.
    Reset,
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    // Too few bytes are no input.
    let _ = drive(Unstructured::new(bytes));
}

fn drive(mut input: Unstructured<'_>) -> Result<()> {
    let mut driver = Driver::new();
    store(0, &[0; MEMORY]);
    let mut offered: u16 = 0;
    for step in input.arbitrary_iter()? {
        match step? {
            Step::WritePort { port, bytes } => driver.bus.write(any_port(port), &bytes),
            Step::ReadPort { port, length } => {
                let mut bytes = vec![0xa5; length.into()];
                driver.bus.read(any_port(port), &mut bytes);
            }
            Step::Configure {
                device,
                register,
                value,
            } => driver.configure(device % 3, register & 0xfc, value),
            Step::Write { offset, bytes } => driver.write_bytes(offset.into(), &bytes),
            Step::Read { offset, length } => {
                let mut bytes = vec![0xa5; length.into()];
                let offset = u64::from(offset) % u64::from(layout::GPU_BAR_SIZE);
                driver.transport.read(offset, &mut bytes);
            }
            Step::Window {
                offset,
                length,
                value,
            } => driver.window(offset.into(), length.into(), value),
            Step::Features(features) => {
                driver.write(common::DEVICE_STATUS, ACKNOWLEDGE as u8);
                driver.write(common::DEVICE_STATUS, DRIVER as u8);
                let features = features.unwrap_or_else(|| driver.features());
                for half in [0u32, 1] {
                    driver.write(common::DRIVER_FEATURE_SELECT, half);
                    let bits = (features >> (32 * half)) as u32;
                    driver.write(common::DRIVER_FEATURE, bits);
                }
                driver.write(common::DEVICE_STATUS, FEATURES_OK as u8);
            }
            Step::Queue {
                queue,
                size,
                address,
                vector,
                ready,
            } => {
                let queue = u16::from(queue % 3);
                driver.write(common::QUEUE_SELECT, queue);
                driver.write(common::QUEUE_MSIX_VECTOR, vector);
                if let Some(size) = size {
                    driver.write(common::QUEUE_SIZE, size);
                }
                let base = address.unwrap_or(u32::from(queue) * 0x1000);
                driver.write(common::QUEUE_DESC, base);
                driver.write(common::QUEUE_DRIVER, base.wrapping_add(0x400));
                driver.write(common::QUEUE_DEVICE, base.wrapping_add(0x800));
                driver.write(common::QUEUE_ENABLE, u16::from(ready));
            }
            Step::Status { bit } => driver.write(common::DEVICE_STATUS, 1u8 << (bit % 8)),
            Step::Msix { enabled, masked } => {
                let control = u32::from(enabled) << 31 | u32::from(masked) << 30;
                driver.configure(1, driver.msix, control);
            }
            Step::Vector {
                vector,
                address,
                data,
                masked,
            } => {
                let at = region::MSIX_TABLE + u64::from(vector % 4) * ENTRY;
                driver.write_bytes(at, &address.to_le_bytes());
                driver.write(at + 8, data);
                driver.write(at + 12, u32::from(masked));
            }
            Step::Request { what, queue } => {
                offer(what, offered);
                offered = offered.wrapping_add(1);
                driver.write_bytes(doorbell(queue.into()), &[0; 2]);
            }
            Step::Memory { address, bytes } => {
                store(usize::from(address) % (MEMORY - 8), &bytes);
            }
            Step::Reset => {
                driver.write(common::DEVICE_STATUS, 0u8);
                assert_eq!(driver.status, 0);
            }
        }
        driver.judge();
    }
    Ok(())
}

/// One of the bus's ports, or one beside them.
fn any_port(port: u8) -> u16 {
    layout::PCI_ADDRESS_PORT - 1 + u16::from(port % 10)
}

/// The bytes of a register.
trait Bytes<const N: usize> {
    fn bytes(self) -> [u8; N];
}

impl Bytes<1> for u8 {
    fn bytes(self) -> [u8; 1] {
        self.to_le_bytes()
    }
}

impl Bytes<2> for u16 {
    fn bytes(self) -> [u8; 2] {
        self.to_le_bytes()
    }
}

impl Bytes<4> for u32 {
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

/// The guest's driver, and what it knows of the device.
struct Driver {
    bus: PciBus,
    transport: Arc<VirtioPci<Device>>,
    /// What KVM knows.
    kvm: Arc<Kvm>,
    /// Configuration space as it was at first.
    configuration: Vec<u32>,
    /// Where the capabilities MSI-X and PCI_CFG are.
    msix: u8,
    window: u8,
    /// The status as it was last seen.
    status: u32,
}

impl Driver {
    fn new() -> Self {
        let host = Answering::new("virtio_gpu", 1, LIMITS.message);
        let config = DeviceConfig {
            queue_size: SIZE,
            doorbell: Doorbell::Inline,
            limits: LIMITS,
            sandbox: Sandbox::Off,
            ..DeviceConfig::default()
        };
        let device = Device::new(Arc::new(host), None, config).expect("eventfds");
        let region = SharedMemory {
            id: 0,
            base: 1 << 40,
            size: APERTURE,
        };
        for event in EVENTS.iter() {
            let _ = event.read();
        }
        let kvm = Arc::<Kvm>::default();
        let events = EVENTS.iter().map(|event| event.try_clone());
        let events = events.collect::<Result<_, _>>().expect("descriptors");
        let msix = Msix::new(events, Arc::clone(&kvm) as _);
        let transport = Arc::new(VirtioPci::new(device, GUEST.clone(), Some(region), msix));
        let mut driver = Self {
            bus: PciBus::new(vec![Arc::clone(&transport) as _]),
            transport,
            kvm,
            configuration: Vec::new(),
            msix: 0,
            window: 0,
            status: 0,
        };
        driver.configuration = driver.registers();
        driver.find_capabilities();
        driver
    }

    /// Configuration space, a register after another.
    fn registers(&self) -> Vec<u32> {
        let registers = (0..pci::SIZE).step_by(4);
        registers.map(|at| self.configuration(at as u8)).collect()
    }

    fn find_capabilities(&mut self) {
        let mut next = self.configuration(header::CAPABILITIES as u8) as u8;
        while next != 0 {
            let [id, link, _, kind] = self.configuration(next).to_le_bytes();
            match (id, kind) {
                (0x11, _) => self.msix = next,
                (0x09, 5) => self.window = next,
                _ => {}
            }
            next = link;
        }
        assert!(
            self.msix != 0 && self.window != 0,
            "a capability is missing"
        );
    }

    fn select(&self, device: u8, register: u8) {
        let address = 1 << 31 | u32::from(device) << 11 | u32::from(register);
        let port = layout::PCI_ADDRESS_PORT;
        self.bus.write(port, &address.to_le_bytes());
    }

    /// A register of the GPU's configuration space.
    fn configuration(&self, register: u8) -> u32 {
        self.select(1, register);
        let mut bytes = [0; 4];
        self.bus.read(layout::PCI_DATA_PORT, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn configure(&self, device: u8, register: u8, value: u32) {
        self.select(device, register);
        self.bus.write(layout::PCI_DATA_PORT, &value.to_le_bytes());
    }

    fn window(&self, offset: u32, length: u32, value: Option<u32>) {
        self.configure(1, self.window + 8, offset);
        self.configure(1, self.window + 12, length);
        match value {
            Some(value) => self.configure(1, self.window + 16, value),
            None => drop(self.configuration(self.window + 16)),
        }
    }

    fn write_bytes(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset % u64::from(layout::GPU_BAR_SIZE);
        self.transport.write(offset, bytes);
        if offset == common::DEVICE_STATUS
            && let [written] = *bytes
        {
            let status = self.read::<1>(common::DEVICE_STATUS);
            let (least, most) = match written {
                0 => (0, 0),
                _ => (self.status, self.status | u32::from(written) | NEEDS_RESET),
            };
            let as_it_must = status & least == least && status & !most == 0;
            assert!(as_it_must, "status {status:#x} after {written:#x}");
            self.status = status;
        }
    }

    fn write<const N: usize>(&mut self, register: u64, value: impl Bytes<N>) {
        self.write_bytes(register, &value.bytes());
    }

    fn read<const N: usize>(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes[..N]);
        u32::from_le_bytes(bytes)
    }

    fn features(&mut self) -> u64 {
        let mut half = |half: u32| {
            self.write(common::DEVICE_FEATURE_SELECT, half);
            u64::from(self.read::<4>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Holds what always is so against what can be read.
    fn judge(&mut self) {
        let identity = (u32::from(FIRST_DEVICE) + DEVICE_ID) << 16 | u32::from(VENDOR);
        assert_eq!(self.configuration(0), identity);
        for (index, (now, first)) in self.registers().iter().zip(&self.configuration).enumerate() {
            let at = 4 * index;
            let changed = now ^ first;
            let window = usize::from(self.window);
            let bar = at.wrapping_sub(header::BARS) / 4;
            let size = SIZES.get(bar).is_some_and(|size| now == size);
            let allowed = if at == header::COMMAND {
                0x6
            } else if at == usize::from(self.msix) {
                0xc000_0000
            } else if at == window + 4 {
                0xff
            } else if size || (window + 8..window + 20).contains(&at) {
                u32::MAX
            } else {
                0
            };
            assert_eq!(changed & !allowed, 0, "{now:#x} at {at:#x}");
        }
        assert_eq!(self.read::<2>(common::NUM_QUEUES), 2);
        assert_eq!(self.read::<4>(region::DEVICE), CONFIG_MAGIC);
        for chosen in [common::CONFIG_MSIX_VECTOR, common::QUEUE_MSIX_VECTOR] {
            let vector = self.read::<2>(chosen);
            assert!(vector < 3 || vector == u32::from(NO_VECTOR), "{vector}");
        }
        let status = self.read::<1>(common::DEVICE_STATUS);
        assert_eq!(status & !KNOWN, 0, "a status bit that there is not");
        let kept = status & self.status == self.status;
        assert!(kept || status == 0, "a status bit is lost");
        self.status = status;
        let active = self.transport.device().statistics().usage.is_some();
        let agreed = status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK | DRIVER_OK;
        assert!(agreed || !active, "active with status {status:#x}");
        assert!(status & NEEDS_RESET == 0 || !active, "active, but broken");
        let vectors = self.kvm.0.lock().expect("no panic");
        for (event, vector) in EVENTS.iter().zip(&*vectors) {
            if vector.connected {
                assert!(vector.message.is_some(), "KVM knows no message");
                let _ = event.read();
            }
        }
    }
}
