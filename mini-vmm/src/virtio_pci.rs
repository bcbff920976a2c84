//! The virtio transport over PCI, without its legacy half: a function of the PCI bus whose BAR 0 has the registers, and whose
//! BAR 2 is the device's shared memory. Virtio 1.2, section 4.1.
//!
//! vCPU threads call it through the bus (BAR 0) and the configuration ports; what is behind it is a [`Virtio`] device.
//! Interrupts are MSI-X, a vector for the configuration and one for each queue; there is no interrupt pin.

use std::ops::Deref;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pvgpu_host_proxy::device::Interrupt;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioDevice;
use crate::layout;
use crate::msix::Msix;
use crate::pci::{Configuration, Function, Identity};
use crate::virtio::{
    Backend, INTERRUPT_CONFIG, INTERRUPT_QUEUE, Line, SharedMemory, Virtio, high, low, set_high,
    set_low,
};

/// Vendor of all virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// The PCI device number is this and the virtio device number.
pub const FIRST_DEVICE: u16 = 0x1040;

/// Where in BAR 0 what is: a page each.
pub mod region {
    #![allow(missing_docs)] // their names are the specification's
    pub const COMMON: u64 = 0x0000;
    pub const ISR: u64 = 0x1000;
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX_TABLE: u64 = 0x4000;
    pub const MSIX_PENDING: u64 = 0x5000;
    /// Bytes of each of them.
    pub const SIZE: u64 = 0x1000;
}

/// Offsets in the common configuration, section 4.1.4.3.
pub mod common {
    #![allow(missing_docs)] // their names are the specification's
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DESC_HIGH: u64 = 0x24;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x2c;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x34;
}

/// From one queue's doorbell to the next: each is written at an address of its own, so that KVM can tell them apart.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// No vector: the event does not interrupt.
pub const NO_VECTOR: u16 = 0xffff;
/// Which BAR is the shared memory.
pub const APERTURE_BAR: u8 = 2;

/// Where in BAR 0 the doorbell of a queue is.
pub fn doorbell(queue: u16) -> u64 {
    region::NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER)
}

/// Identifiers of capabilities.
const MSIX: u8 = 0x11;
const VENDOR_SPECIFIC: u8 = 0x09;
/// Types of virtio's capabilities, section 4.1.4.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const SHARED_MEMORY_CFG: u8 = 8;
/// In the capability MSI-X: where its control is, and its bits.
const CONTROL: usize = 2;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// In the capability PCI_CFG: where BAR, offset, length and data are.
const WINDOW_BAR: usize = 4;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// A display controller that is none of the known kinds.
const CLASS: [u8; 4] = [1, 0, 0x80, 0x03];

/// The interrupts of the transport: causes for the guest to read, and a vector for each event.
struct Vectors {
    causes: AtomicU32,
    msix: Msix,
    /// Those that the driver has chosen: for the configuration, then for each queue.
    chosen: Vec<AtomicU16>,
}

impl Vectors {
    /// The vector of an event: 0 is the configuration's, then come the queues.
    fn of(&self, event: usize) -> u16 {
        let chosen = self.chosen.get(event);
        chosen.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// A vector that there is not becomes none.
    fn choose(&self, event: usize, vector: u16) {
        if let Some(chosen) = self.chosen.get(event) {
            let exists = usize::from(vector) < self.msix.vectors();
            chosen.store(if exists { vector } else { NO_VECTOR }, Ordering::Relaxed);
        }
    }
}

impl Interrupt for Vectors {
    fn signal_queue(&self, queue: u16) {
        if !self.msix.enabled() {
            self.causes.fetch_or(INTERRUPT_QUEUE, Ordering::SeqCst);
        }
        self.msix.signal(self.of(usize::from(queue) + 1));
    }

    fn signal_config(&self) {
        self.causes.fetch_or(INTERRUPT_CONFIG, Ordering::SeqCst);
        self.msix.signal(self.of(0));
    }
}

impl Line for Vectors {
    fn event(&self, queue: u16) -> Option<EventFd> {
        let vector = self.of(usize::from(queue) + 1);
        self.msix.event(vector)?.try_clone().ok()
    }

    fn reset(&self) {
        self.causes.store(0, Ordering::SeqCst);
        for vector in &self.chosen {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.msix.forget();
    }
}

/// The transport in front of one device: BAR 0 is its [`MmioDevice`], configuration space its [`Function`].
pub struct VirtioPci<D> {
    virtio: Arc<Virtio<D>>,
    vectors: Arc<Vectors>,
    configuration: Mutex<Configuration>,
    /// Where the capabilities MSI-X and PCI_CFG are.
    msix: usize,
    window: usize,
}

impl<D> Deref for VirtioPci<D> {
    type Target = Arc<Virtio<D>>;

    fn deref(&self) -> &Self::Target {
        &self.virtio
    }
}

impl<D: Backend> VirtioPci<D> {
    /// A transport for `device`, whose queues lie in `memory`. `msix` has a vector for each queue and one more; shared memory is
    /// at a multiple of its size, rounded up to a power of two.
    pub fn new(
        device: D,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        shared_memory: Option<SharedMemory>,
        msix: Msix,
    ) -> Self {
        let device_id = u16::try_from(device.device_id()).unwrap_or(0);
        let queues = device.queue_max_sizes().len();
        let mut configuration = Configuration::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE.saturating_add(device_id),
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE.saturating_add(device_id),
        });
        let all = &mut configuration;
        all.add_bar(0, layout::GPU_BAR, layout::GPU_BAR_SIZE);
        let msix_at = add_msix(all, msix.vectors());
        let page = |at| [low(at), low(region::SIZE)];
        add_virtio(all, COMMON_CFG, [0, 0], page(region::COMMON), &[]);
        add_virtio(all, ISR_CFG, [0, 0], page(region::ISR), &[]);
        add_virtio(all, DEVICE_CFG, [0, 0], page(region::DEVICE), &[]);
        let doorbells = page(region::NOTIFY);
        add_virtio(all, NOTIFY_CFG, [0, 0], doorbells, &[NOTIFY_MULTIPLIER]);
        if let Some(SharedMemory { id, base, size }) = shared_memory {
            all.add_wide_bar(APERTURE_BAR.into(), base, size.next_power_of_two());
            let place = [APERTURE_BAR, u8::try_from(id).unwrap_or(0)];
            // Offset and length have 64 bits here; the upper halves follow.
            add_virtio(
                all,
                SHARED_MEMORY_CFG,
                place,
                [0, low(size)],
                &[0, high(size)],
            );
        }
        let window = add_virtio(all, PCI_CFG, [0, 0], [0, 0], &[0]);
        configuration.make_writable(window + WINDOW_BAR, &[0xff]);
        configuration.make_writable(window + WINDOW_OFFSET, &[0xff; 12]);
        let vectors = Arc::new(Vectors {
            causes: AtomicU32::new(0),
            msix,
            chosen: (0..=queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        });
        Self {
            virtio: Arc::new(Virtio::new(device, memory, Arc::clone(&vectors) as _)),
            vectors,
            configuration: Mutex::new(configuration),
            msix: msix_at,
            window,
        }
    }

    fn configuration(&self) -> MutexGuard<'_, Configuration> {
        self.configuration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A field of the common configuration; those that do not exist, or have another width, are zero.
    fn read_common(&self, offset: u64, width: usize) -> u32 {
        let registers = self.registers();
        let queue = registers.selected();
        match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, 4) => registers.device_features_sel,
            (common::DEVICE_FEATURE, 4) => self.device_features(&registers),
            (common::DRIVER_FEATURE_SELECT, 4) => registers.driver_features_sel,
            (common::DRIVER_FEATURE, 4) => registers.read_driver_features(),
            (common::CONFIG_MSIX_VECTOR, 2) => self.vectors.of(0).into(),
            (common::NUM_QUEUES, 2) => {
                let queues = self.device().queue_max_sizes().len();
                u32::try_from(queues).unwrap_or(0)
            }
            (common::DEVICE_STATUS, 1) => self.status(&registers),
            (common::QUEUE_SELECT, 2) => registers.queue_sel,
            (common::QUEUE_SIZE, 2) => queue.map_or(0, |queue| queue.size),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                self.vectors.of(event_of_queue(registers.queue_sel)).into()
            }
            (common::QUEUE_ENABLE, 2) => queue.is_some_and(|queue| queue.ready).into(),
            (common::QUEUE_NOTIFY_OFF, 2) => queue.map_or(0, |_| registers.queue_sel),
            (_, 4) => queue.map_or(0, |queue| match offset {
                common::QUEUE_DESC => low(queue.desc),
                common::QUEUE_DESC_HIGH => high(queue.desc),
                common::QUEUE_DRIVER => low(queue.driver),
                common::QUEUE_DRIVER_HIGH => high(queue.driver),
                common::QUEUE_DEVICE => low(queue.device),
                common::QUEUE_DEVICE_HIGH => high(queue.device),
                _ => 0,
            }),
            // The configuration never changes, so its generation is zero.
            _ => 0,
        }
    }

    fn write_common(&self, offset: u64, width: usize, value: u32) {
        match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.registers().device_features_sel = value,
            (common::DRIVER_FEATURE_SELECT, 4) => self.registers().driver_features_sel = value,
            (common::DRIVER_FEATURE, 4) => self.registers().write_driver_features(value),
            (common::CONFIG_MSIX_VECTOR, 2) => self.vectors.choose(0, low_half(value)),
            (common::DEVICE_STATUS, 1) => self.write_status(value),
            (common::QUEUE_SELECT, 2) => self.registers().queue_sel = value,
            (common::QUEUE_MSIX_VECTOR, 2) => {
                let event = event_of_queue(self.registers().queue_sel);
                self.vectors.choose(event, low_half(value));
            }
            (common::QUEUE_ENABLE, 2) => self.write_queue_ready(value),
            _ => {
                let mut registers = self.registers();
                let Some(queue) = registers.selected_for_setup() else {
                    return;
                };
                match (offset, width) {
                    (common::QUEUE_SIZE, 2) => queue.size = value,
                    (common::QUEUE_DESC, 4) => set_low(&mut queue.desc, value),
                    (common::QUEUE_DESC_HIGH, 4) => set_high(&mut queue.desc, value),
                    (common::QUEUE_DRIVER, 4) => set_low(&mut queue.driver, value),
                    (common::QUEUE_DRIVER_HIGH, 4) => set_high(&mut queue.driver, value),
                    (common::QUEUE_DEVICE, 4) => set_low(&mut queue.device, value),
                    (common::QUEUE_DEVICE_HIGH, 4) => set_high(&mut queue.device, value),
                    _ => {}
                }
            }
        }
    }

    /// The access to BAR 0 that the capability PCI_CFG describes: offset and length.
    fn described(&self, configuration: &Configuration) -> Option<(u64, usize)> {
        let word = |at| u32::from_le_bytes(configuration.get(self.window + at));
        let [bar] = configuration.get(self.window + WINDOW_BAR);
        let offset = word(WINDOW_OFFSET);
        let length = usize::try_from(word(WINDOW_LENGTH)).ok()?;
        let natural = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(word(WINDOW_LENGTH));
        (bar == 0 && natural && offset < layout::GPU_BAR_SIZE).then_some((offset.into(), length))
    }

    /// Whether an access to configuration space means the data of the capability PCI_CFG.
    fn is_window(&self, offset: usize) -> bool {
        offset & !3 == self.window + WINDOW_DATA
    }
}

/// Adds the capability MSI-X, whose table and pending bits are in BAR 0. Only its two switches can be written.
fn add_msix(configuration: &mut Configuration, vectors: usize) -> usize {
    let last = u16::try_from(vectors.saturating_sub(1)).unwrap_or(0);
    let places = [region::MSIX_TABLE, region::MSIX_PENDING].map(|at| low(at).to_le_bytes());
    let body = [&last.to_le_bytes()[..], &places.concat()].concat();
    let offset = configuration.add_capability(MSIX, &body);
    configuration.make_writable(offset + CONTROL, &(ENABLE | MASK_ALL).to_le_bytes());
    offset
}

/// Adds one of virtio's capabilities: BAR and identifier, offset and length there, and the words that follow.
fn add_virtio(
    configuration: &mut Configuration,
    kind: u8,
    [bar, id]: [u8; 2],
    place: [u32; 2],
    more: &[u32],
) -> usize {
    const LENGTH: usize = 16;
    let length = u8::try_from(LENGTH + 4 * more.len()).unwrap_or(0);
    let words = place.iter().chain(more).flat_map(|word| word.to_le_bytes());
    let body: Vec<u8> = [length, kind, bar, id, 0, 0]
        .into_iter()
        .chain(words)
        .collect();
    configuration.add_capability(VENDOR_SPECIFIC, &body)
}

/// Where the vector of that queue is among all.
fn event_of_queue(queue: u32) -> usize {
    usize::try_from(queue).map_or(usize::MAX, |queue| queue.saturating_add(1))
}

fn low_half(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// A value of 1 to 4 bytes; zero for other lengths.
fn value(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    if data.len() <= bytes.len() {
        bytes
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
    }
    u32::from_le_bytes(bytes)
}

/// Puts a value of as many bytes there as there is room for.
fn put(value: u32, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

impl<D: Backend> MmioDevice for VirtioPci<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % region::SIZE;
        match offset - within {
            region::COMMON => put(self.read_common(within, data.len()), data),
            // Reading takes the causes back.
            region::ISR if within == 0 => put(self.vectors.causes.swap(0, Ordering::SeqCst), data),
            region::DEVICE => self.device().read_config(within, data),
            region::MSIX_TABLE => self.vectors.msix.read_table(within, data),
            region::MSIX_PENDING => self.vectors.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let within = offset % region::SIZE;
        match offset - within {
            region::COMMON => self.write_common(within, data.len(), value(data)),
            region::NOTIFY if within.is_multiple_of(NOTIFY_MULTIPLIER.into()) => {
                self.notify(low(within / u64::from(NOTIFY_MULTIPLIER)));
            }
            region::MSIX_TABLE => self.vectors.msix.write_table(within, data),
            _ => {}
        }
    }
}

impl<D: Backend> Function for VirtioPci<D> {
    fn read_configuration(&self, offset: usize, data: &mut [u8]) {
        if self.is_window(offset) {
            let described = self.described(&self.configuration());
            if let Some((at, length)) = described {
                let mut bytes = [0; 4];
                if let Some(bytes) = bytes.get_mut(..length) {
                    self.read(at, bytes);
                }
                self.configuration().set(self.window + WINDOW_DATA, &bytes);
            }
        }
        self.configuration().read(offset, data);
    }

    fn write_configuration(&self, offset: usize, data: &[u8]) {
        let mut configuration = self.configuration();
        configuration.write(offset, data);
        if self.is_window(offset)
            && let Some((at, length)) = self.described(&configuration)
        {
            let bytes: [u8; 4] = configuration.get(self.window + WINDOW_DATA);
            drop(configuration);
            if let Some(bytes) = bytes.get(..length) {
                self.write(at, bytes);
            }
            return;
        }
        let control = u16::from_le_bytes(configuration.get(self.msix + CONTROL));
        // With the lock, so that the last one to write is the one who is obeyed.
        let msix = &self.vectors.msix;
        msix.control(control & ENABLE != 0, control & MASK_ALL != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::common::*;
    use super::*;
    use crate::memory::Ram;
    use crate::msix;
    use crate::pci::header;
    use crate::virtio::recorder::{FEATURES, READY_TO_GO, Recorder};
    use crate::virtio::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const APERTURE: SharedMemory = SharedMemory {
        id: 0,
        base: 0x10_0000_0000,
        size: 0x1_2345_6000,
    };

    /// Nobody takes the events.
    struct NoKvm;

    impl msix::Sender for NoKvm {
        fn route(&self, _: &[Option<msix::Message>]) {}
        fn connect(&self, _: usize, _: &EventFd, _: bool) {}
    }

    struct Guest {
        _ram: Ram,
        transport: VirtioPci<Recorder>,
    }

    impl Guest {
        fn new() -> Self {
            Self::with(Some(APERTURE))
        }

        fn with(region: Option<SharedMemory>) -> Self {
            let ram = Ram::new(2 << 20).unwrap();
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            // The recorder has two queues.
            let events = std::iter::repeat_with(event).take(3).collect();
            let msix = Msix::new(events, Arc::new(NoKvm));
            let transport = VirtioPci::new(Recorder::default(), ram.map().clone(), region, msix);
            Self {
                _ram: ram,
                transport,
            }
        }

        fn read(&self, offset: u64, width: usize) -> u32 {
            let mut data = [0; 4];
            self.transport.read(offset, &mut data[..width]);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, width: usize, value: u32) {
            self.transport.write(offset, &value.to_le_bytes()[..width]);
        }

        fn configuration<const N: usize>(&self, offset: usize) -> [u8; N] {
            let mut data = [0; N];
            self.transport.read_configuration(offset, &mut data);
            data
        }

        fn word(&self, offset: usize) -> u32 {
            u32::from_le_bytes(self.configuration(offset))
        }

        /// All capabilities, as a driver walks them: identifier and offset.
        fn capabilities(&self) -> Vec<(u8, usize)> {
            let [status] = self.configuration(header::STATUS);
            assert_eq!(status & 1 << 4, 1 << 4, "there are capabilities");
            let mut found = Vec::new();
            let [mut next] = self.configuration(header::CAPABILITIES);
            while next != 0 {
                assert!(next >= 0x40 && next % 4 == 0, "{next:#x}");
                let [id, link] = self.configuration(next.into());
                found.push((id, usize::from(next)));
                next = link;
                assert!(found.len() < 20, "they go round in circles");
            }
            found
        }

        /// Where virtio's capability of that type is.
        fn capability(&self, kind: u8) -> usize {
            let of_kind = |at: usize| self.configuration(at + 3) == [kind];
            let mut found = self.capabilities().into_iter();
            let found = found.find(|(id, at)| *id == VENDOR_SPECIFIC && of_kind(*at));
            found.map(|(_, at)| at).unwrap()
        }

        fn accept_features(&self, features: u64) {
            self.write(DEVICE_STATUS, 1, ACKNOWLEDGE);
            self.write(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER);
            for half in [0, 1] {
                self.write(DRIVER_FEATURE_SELECT, 4, half);
                self.write(DRIVER_FEATURE, 4, (features >> (32 * half)) as u32);
            }
            self.write(DEVICE_STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        }

        fn set_queue(&self, queue: u32, address: u64) {
            self.write(QUEUE_SELECT, 2, queue);
            self.write(QUEUE_MSIX_VECTOR, 2, queue + 1);
            for (low, address) in [
                (QUEUE_DESC, address),
                (QUEUE_DRIVER, address + 0x1000),
                (QUEUE_DEVICE, address + 0x2000),
            ] {
                self.write(low, 4, address as u32);
                self.write(low + 4, 4, (address >> 32) as u32);
            }
            self.write(QUEUE_ENABLE, 2, 1);
        }

        /// Brings the device into operation with both queues, the first with 128 entries.
        fn start(&self) {
            self.accept_features(FEATURES);
            self.write(QUEUE_SIZE, 2, 128);
            self.set_queue(0, 0x1_0001_0000);
            self.set_queue(1, 0x2_0000);
            self.write(CONFIG_MSIX_VECTOR, 2, 0);
            self.write(DEVICE_STATUS, 1, READY_TO_GO);
        }

        /// Enables MSI-X and unmasks all vectors.
        fn enable_interrupts(&self) {
            let (_, at) = self.capabilities()[0];
            self.transport
                .write_configuration(at + 2, &ENABLE.to_le_bytes());
            for vector in 0..3 {
                self.write(region::MSIX_TABLE + vector * msix::ENTRY + 12, 4, 0);
            }
        }

        fn interrupts(&self) -> [u64; 3] {
            let event = |vector| self.transport.vectors.msix.event(vector).unwrap();
            [0, 1, 2].map(|vector| event(vector).read().unwrap_or(0))
        }
    }

    #[test]
    fn a_driver_finds_a_virtio_device_of_its_number() {
        let guest = Guest::new();
        assert_eq!(guest.word(header::VENDOR), 0x107f_1af4);
        assert_eq!(guest.word(header::REVISION), 0x0380_0001);
        assert_eq!(guest.word(header::SUBSYSTEM), 0x107f_1af4);
        assert_eq!(guest.word(0x3c), 0, "no interrupt pin");
    }

    #[test]
    fn a_driver_that_walks_the_capabilities_finds_each_within_its_bar() {
        let guest = Guest::new();
        let bars = [u64::from(layout::GPU_BAR_SIZE), 0, APERTURE.size];
        let mut kinds = Vec::new();
        let mut pages = Vec::new();
        for (id, at) in guest.capabilities() {
            if id == MSIX {
                assert_eq!(guest.configuration(at + 2), [2, 0], "three vectors, off");
                pages.extend([guest.word(at + 4), guest.word(at + 8)].map(u64::from));
                continue;
            }
            assert_eq!(id, VENDOR_SPECIFIC);
            let [length, kind, bar, id] = guest.configuration(at + 2);
            let mut place = [guest.word(at + 8), guest.word(at + 12)].map(u64::from);
            let expected = match kind {
                NOTIFY_CFG | PCI_CFG => 20,
                SHARED_MEMORY_CFG => 24,
                _ => 16,
            };
            assert_eq!(length, expected, "type {kind}");
            if kind == SHARED_MEMORY_CFG {
                place[0] |= u64::from(guest.word(at + 16)) << 32;
                place[1] |= u64::from(guest.word(at + 20)) << 32;
                assert_eq!((id, bar, place), (0, 2, [0, APERTURE.size]));
            } else {
                pages.push(place[0]);
            }
            assert!(place[0] + place[1] <= bars[usize::from(bar)], "type {kind}");
            kinds.push(kind);
        }
        kinds.sort();
        assert_eq!(kinds, [1, 2, 3, 4, 5, 8]);
        pages.sort();
        // The first twice: PCI_CFG points nowhere yet.
        assert_eq!(pages, [0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
        let notify = guest.capability(NOTIFY_CFG);
        assert_eq!(guest.word(notify + 16), NOTIFY_MULTIPLIER);
    }

    #[test]
    fn the_aperture_has_a_bar_of_a_power_of_two_and_none_without_an_aperture() {
        let sized = |guest: &Guest, bar: usize| {
            let at = header::BARS + 4 * bar;
            let address = guest.word(at);
            guest.transport.write_configuration(at, &[0xff; 4]);
            let size = guest.word(at);
            guest
                .transport
                .write_configuration(at, &address.to_le_bytes());
            assert_eq!(guest.word(at), address);
            (address, size)
        };
        let guest = Guest::new();
        assert_eq!(sized(&guest, 0), (layout::GPU_BAR, 0xffff_8000));
        assert_eq!(sized(&guest, 2), (0xc, 0xc), "64 bits, prefetchable");
        assert_eq!(sized(&guest, 3), (0x10, 0xffff_fffe), "8 GiB");
        let guest = Guest::with(None);
        assert_eq!(sized(&guest, 2), (0, 0));
        assert_eq!(guest.capabilities().len(), 6);
    }

    #[test]
    fn a_driver_that_follows_the_rules_activates_the_device_with_its_queues() {
        let guest = Guest::new();
        assert_eq!(guest.read(NUM_QUEUES, 2), 2);
        for (half, expected) in [(0, 1 << 29), (1, 1), (2, 0)] {
            guest.write(DEVICE_FEATURE_SELECT, 4, half);
            assert_eq!(guest.read(DEVICE_FEATURE, 4), expected, "half {half}");
        }
        for (queue, size, offset) in [(0, 256, 0), (1, 64, 1), (2, 0, 0)] {
            guest.write(QUEUE_SELECT, 2, queue);
            assert_eq!(guest.read(QUEUE_SIZE, 2), size, "queue {queue}");
            assert_eq!(guest.read(QUEUE_NOTIFY_OFF, 2), offset, "queue {queue}");
        }
        guest.write(QUEUE_SELECT, 2, 0);
        guest.start();
        assert_eq!(guest.read(DEVICE_STATUS, 1), READY_TO_GO);
        assert_eq!(guest.read(DRIVER_FEATURE, 4), 1, "the upper half, accepted");
        guest.write(QUEUE_SELECT, 2, 0);
        assert_eq!(guest.read(QUEUE_ENABLE, 2), 1);
        assert_eq!(guest.read(QUEUE_DESC + 4, 4), 1);
        assert_eq!(guest.read(QUEUE_DEVICE, 4), 0x1_2000);
        let device = guest.transport.device();
        let (features, queues) = &device.activations[0];
        assert_eq!(*features, FEATURES);
        assert_eq!(
            *queues,
            [
                (true, 128, 0x1_0001_0000, 0x1_0001_1000, 0x1_0001_2000),
                (true, 64, 0x2_0000, 0x2_1000, 0x2_2000),
            ]
        );
    }

    #[test]
    fn each_queue_has_a_doorbell_of_its_own_whatever_is_written_there() {
        let guest = Guest::new();
        guest.write(doorbell(0), 2, 0);
        guest.start();
        guest.write(doorbell(1), 2, 0);
        guest.write(doorbell(0), 4, 77);
        guest.write(doorbell(0) + 1, 2, 0);
        guest.write(doorbell(2), 2, 0);
        assert_eq!(
            *guest.transport.device().notified.lock().unwrap(),
            [1, 0, 2]
        );
        assert_eq!(guest.transport.notifications(), 4);
    }

    #[test]
    fn events_interrupt_by_the_vectors_that_the_driver_has_chosen() {
        let guest = Guest::new();
        guest.start();
        guest.enable_interrupts();
        let vectors = &guest.transport.vectors;
        vectors.signal_queue(0);
        vectors.signal_queue(1);
        vectors.signal_queue(1);
        assert_eq!(guest.interrupts(), [0, 1, 2]);
        assert_eq!(
            guest.read(region::ISR, 1),
            0,
            "MSI-X has no cause for queues"
        );
        vectors.signal_config();
        assert_eq!(guest.interrupts(), [1, 0, 0]);
        assert_eq!(guest.read(region::ISR, 1), INTERRUPT_CONFIG);
        assert_eq!(guest.read(region::ISR, 1), 0, "reading takes it back");
        guest.write(QUEUE_SELECT, 2, 1);
        guest.write(QUEUE_MSIX_VECTOR, 2, 0);
        assert_eq!(guest.read(QUEUE_MSIX_VECTOR, 2), 0);
        vectors.signal_queue(1);
        assert_eq!(guest.interrupts(), [1, 0, 0]);
        for nothing in [3, 0xfffe, 0xffff] {
            guest.write(QUEUE_MSIX_VECTOR, 2, nothing);
            assert_eq!(guest.read(QUEUE_MSIX_VECTOR, 2), u32::from(NO_VECTOR));
        }
        vectors.signal_queue(1);
        vectors.signal_queue(7);
        assert_eq!(guest.interrupts(), [0, 0, 0]);
    }

    #[test]
    fn a_reset_forgets_everything_but_the_pci_half() {
        let guest = Guest::new();
        guest.start();
        guest.enable_interrupts();
        guest.transport.vectors.signal_config();
        guest.write(DEVICE_STATUS, 1, 0);
        assert_eq!(guest.read(DEVICE_STATUS, 1), 0);
        assert_eq!(guest.read(region::ISR, 1), 0);
        assert_eq!(guest.read(CONFIG_MSIX_VECTOR, 2), u32::from(NO_VECTOR));
        assert_eq!(guest.read(QUEUE_MSIX_VECTOR, 2), u32::from(NO_VECTOR));
        assert_eq!(guest.read(QUEUE_ENABLE, 2), 0);
        assert_eq!(guest.read(QUEUE_SIZE, 2), 256, "the largest again");
        assert_eq!(guest.transport.device().resets, 1);
        guest.interrupts();
        guest.start();
        guest.transport.vectors.signal_queue(0);
        assert_eq!(guest.interrupts(), [0, 1, 0], "MSI-X is still enabled");
    }

    #[test]
    fn configuration_space_is_a_second_way_to_the_registers() {
        let guest = Guest::new();
        let at = guest.capability(PCI_CFG);
        let set = |offset: u32, length: u32| {
            let write = |at, value: u32| {
                guest
                    .transport
                    .write_configuration(at, &value.to_le_bytes())
            };
            write(at + WINDOW_OFFSET, offset);
            write(at + WINDOW_LENGTH, length);
        };
        set(DEVICE_STATUS as u32, 1);
        guest
            .transport
            .write_configuration(at + WINDOW_DATA, &[ACKNOWLEDGE as u8]);
        assert_eq!(guest.read(DEVICE_STATUS, 1), ACKNOWLEDGE);
        assert_eq!(guest.word(at + WINDOW_DATA), ACKNOWLEDGE);
        set(NUM_QUEUES as u32, 2);
        assert_eq!(guest.word(at + WINDOW_DATA), 2);
        // What names no register is no access: the data stays.
        for (offset, length) in [
            (NUM_QUEUES as u32, 0),
            (NUM_QUEUES as u32, 3),
            (NUM_QUEUES as u32 + 1, 2),
            (0, 8),
            (0, u32::MAX),
            (layout::GPU_BAR_SIZE, 4),
            (0xffff_fffc, 4),
        ] {
            set(offset, length);
            assert_eq!(guest.word(at + WINDOW_DATA), 2, "{offset:#x} {length}");
        }
        set(DEVICE_STATUS as u32, 1);
        guest
            .transport
            .write_configuration(at + WINDOW_BAR, &[APERTURE_BAR]);
        assert_eq!(guest.word(at + WINDOW_DATA), 2, "not through this window");
    }

    #[test]
    fn no_access_of_any_width_to_bar_or_configuration_panics() {
        for state in 0..3 {
            let guest = Guest::new();
            match state {
                1 => guest.accept_features(FEATURES),
                2 => guest.start(),
                _ => {}
            }
            for offset in 0..u64::from(layout::GPU_BAR_SIZE) {
                for width in 1..=8 {
                    let mut data = [0xff; 8];
                    guest.transport.read(offset, &mut data[..width]);
                    guest.transport.write(offset, &[0xff; 8][..width]);
                }
            }
            for register in (0..256).step_by(4) {
                for (byte, width) in [(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)] {
                    for value in [0xff, 0] {
                        let data = &mut [value; 4][..width];
                        let offset = register + byte;
                        guest.transport.write_configuration(offset, data);
                        guest.transport.read_configuration(offset, data);
                    }
                }
            }
            assert_eq!(guest.word(header::VENDOR), 0x107f_1af4);
        }
    }
}
