//! The virtio-mmio transport, version 2: the registers through which a guest finds, negotiates with and
//! notifies a device. Virtio 1.2, section 4.2.2.
//!
//! vCPU threads call it through the bus; what is behind it is a [`Backend`]. It trusts no register
//! write: values are kept as they came and judged when the driver says that it is ready; a driver that
//! breaks the rules gets DEVICE_NEEDS_RESET or is ignored, and may always start over with a reset.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pvgpu_host_proxy::device::Interrupt;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioDevice;

/// Register offsets of section 4.2.2; the device's configuration space follows at [`CONFIG`](register::CONFIG).
pub mod register {
    #![allow(missing_docs)] // their names are the specification's
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Value of MagicValue: "virt".
pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Value of Version: not legacy.
pub const NON_LEGACY: u32 = 2;
/// Value of VendorID: "PVGP".
pub const VENDOR: u32 = u32::from_le_bytes(*b"PVGP");

/// Interrupt cause: a queue has used buffers.
const INTERRUPT_QUEUE: u32 = 1 << 0;
/// Interrupt cause: the configuration or the status changed.
const INTERRUPT_CONFIG: u32 = 1 << 1;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// A device behind the transport.
pub trait Backend: Send + Sync {
    /// Virtio device number.
    fn device_id(&self) -> u32;
    /// Offered feature bits.
    fn features(&self) -> u64;
    /// Largest size of each queue.
    fn queue_max_sizes(&self) -> &[u16];
    /// Reads configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Whether it signals the interrupt line itself, past this transport: then any interrupt may be one of its queues.
    fn raises_interrupts(&self) -> bool {
        false
    }
    /// Starts work on the queues that are ready; the error says why it cannot.
    fn activate(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), String>;
    /// Queue `queue` of an active device was notified. Called from several threads at once.
    fn notify(&self, queue: u16);
    /// Whether an active device has given up until the driver resets it. The device interrupts when it does.
    fn needs_reset(&self) -> bool;
    /// Ends everything that `activate` and the driver started.
    fn reset(&mut self);
}

/// A shared-memory region of the device in guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// Its identifier.
    pub id: u32,
    /// Guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The interrupt line of the transport: causes for the guest to read and an irqfd to raise it.
#[derive(Debug)]
pub struct Line {
    causes: AtomicU32,
    event: Arc<EventFd>,
}

impl Line {
    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
        // A full counter is an interrupt that is pending already.
        let _ = self.event.write(1);
    }
}

impl Interrupt for Line {
    fn signal_queue(&self, _queue: u16) {
        self.raise(INTERRUPT_QUEUE);
    }

    fn signal_config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }
}

/// What the driver has written, as it came.
#[derive(Debug, Default)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    queues: Vec<QueueRegisters>,
}

#[derive(Debug, Default, Clone, Copy)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

/// The transport in front of one device.
#[derive(Debug)]
pub struct VirtioMmio<D> {
    device: RwLock<D>,
    registers: Mutex<Registers>,
    /// Whether the device works on queues: read without a lock on every notification.
    active: AtomicBool,
    /// [`Backend::raises_interrupts`].
    raises_interrupts: bool,
    line: Arc<Line>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    shared_memory: Option<SharedMemory>,
    notifications: AtomicU64,
    warned: AtomicBool,
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

impl<D: Backend> VirtioMmio<D> {
    /// A transport for `device`, whose queues lie in `memory` and whose interrupts signal `event`.
    pub fn new(
        device: D,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        shared_memory: Option<SharedMemory>,
        event: Arc<EventFd>,
    ) -> Self {
        let registers = Registers::new(device.queue_max_sizes().len());
        Self {
            raises_interrupts: device.raises_interrupts(),
            device: RwLock::new(device),
            registers: Mutex::new(registers),
            active: AtomicBool::new(false),
            line: Arc::new(Line {
                causes: AtomicU32::new(0),
                event,
            }),
            memory,
            shared_memory,
            notifications: AtomicU64::new(0),
            warned: AtomicBool::new(false),
        }
    }

    /// The device, for reading.
    pub fn device(&self) -> RwLockReadGuard<'_, D> {
        self.device.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many notifications left the guest as exits (those that signalled an ioeventfd do not).
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    /// Resets the device as the driver would, and with it everything that the guest had open.
    pub fn reset(&self) {
        self.reset_registers(&mut self.registers());
    }

    /// The device is gone: it needs a reset, and the driver hears of that.
    pub fn lose(&self) {
        let mut registers = self.registers();
        self.active.store(false, Ordering::SeqCst);
        if registers.status & DRIVER_OK != 0 {
            registers.status |= NEEDS_RESET;
            self.line.signal_config();
        }
    }

    /// The device that was gone is there again: a driver that waits for that, or has tried before, can reset it now.
    pub fn find(&self) {
        // Without a lock: a vCPU may hold it that waits for the device.
        self.line.signal_config();
    }

    fn device_mut(&self) -> RwLockWriteGuard<'_, D> {
        self.device.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_registers(&self, registers: &mut Registers) {
        self.active.store(false, Ordering::SeqCst);
        self.device_mut().reset();
        *registers = Registers::new(registers.queues.len());
        self.line.causes.store(0, Ordering::SeqCst);
    }

    fn read_register(&self, offset: u64) -> u32 {
        if offset == register::INTERRUPT_STATUS {
            // Read in every interrupt: without the lock.
            let unknown = self.raises_interrupts && self.active.load(Ordering::SeqCst);
            let queue = if unknown { INTERRUPT_QUEUE } else { 0 };
            return self.line.causes.load(Ordering::SeqCst) | queue;
        }
        let registers = self.registers();
        let region = self
            .shared_memory
            .filter(|region| region.id == registers.shm_sel);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => NON_LEGACY,
            register::DEVICE_ID => self.device().device_id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match registers.device_features_sel {
                0 => low(self.device().features()),
                1 => high(self.device().features()),
                _ => 0,
            },
            register::QUEUE_NUM_MAX => {
                let queue = usize::try_from(registers.queue_sel).unwrap_or(usize::MAX);
                self.device()
                    .queue_max_sizes()
                    .get(queue)
                    .copied()
                    .map_or(0, u32::from)
            }
            register::QUEUE_READY => registers.selected().is_some_and(|queue| queue.ready).into(),
            register::STATUS if self.device().needs_reset() => registers.status | NEEDS_RESET,
            register::STATUS => registers.status,
            // A region that does not exist has length and base of all ones (section 4.2.2.1).
            register::SHM_LEN_LOW => region.map_or(u32::MAX, |region| low(region.size)),
            register::SHM_LEN_HIGH => region.map_or(u32::MAX, |region| high(region.size)),
            register::SHM_BASE_LOW => region.map_or(u32::MAX, |region| low(region.base)),
            register::SHM_BASE_HIGH => region.map_or(u32::MAX, |region| high(region.base)),
            // The configuration never changes. RING_RESET is not offered, so QueueReset reads 0 as all
            // write-only and unknown registers do.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            // The doorbell: no register lock, so that vCPUs with queues of their own never contend.
            register::QUEUE_NOTIFY => {
                self.notifications.fetch_add(1, Ordering::Relaxed);
                if let Ok(queue) = u16::try_from(value)
                    && self.active.load(Ordering::SeqCst)
                {
                    self.device().notify(queue);
                }
            }
            register::INTERRUPT_ACK => {
                self.line.causes.fetch_and(!value, Ordering::SeqCst);
            }
            register::STATUS => self.write_status(value),
            register::QUEUE_READY => self.write_queue_ready(value),
            _ => self.registers().write(offset, value),
        }
    }

    /// Status bits are only ever added; a write of zero takes them all back.
    fn write_status(&self, value: u32) {
        let mut registers = self.registers();
        if value == 0 {
            self.reset_registers(&mut registers);
            return;
        }
        let mut added =
            value & !registers.status & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if added & FEATURES_OK != 0 && !self.acceptable(registers.driver_features) {
            added &= !FEATURES_OK;
        }
        registers.status |= added & !DRIVER_OK;
        let negotiated = registers.status & (FEATURES_OK | FAILED | NEEDS_RESET) == FEATURES_OK;
        if added & DRIVER_OK != 0 && negotiated {
            registers.status |= DRIVER_OK;
            if let Err(reason) = self.activate(&registers) {
                // Once: a guest may try as often as it likes.
                if !self.warned.swap(true, Ordering::Relaxed) {
                    log::warn!("the guest's driver cannot start the GPU: {reason}");
                }
                registers.status |= NEEDS_RESET;
                drop(registers);
                self.line.signal_config();
            }
        }
    }

    fn acceptable(&self, driver_features: u64) -> bool {
        let offered = self.device().features();
        driver_features & !offered == 0 && driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&self, registers: &Registers) -> Result<(), String> {
        let mut device = self.device_mut();
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = registers
            .queues
            .iter()
            .zip(device.queue_max_sizes())
            .map(|(queue, max)| queue.build(*max, event_idx))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())?;
        let line = Arc::clone(&self.line);
        device.activate(self.memory.clone(), registers.driver_features, queues, line)?;
        self.active.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// While queues are being set up this makes one ready or not. In operation a driver may only stop a
    /// queue; the device has no use for fewer queues, so that ends its work until the next reset.
    fn write_queue_ready(&self, value: u32) {
        let mut registers = self.registers();
        let in_operation = registers.status & DRIVER_OK != 0;
        let configurable = registers.configurable();
        let Some(queue) = registers.selected_mut() else {
            return;
        };
        if in_operation && value == 0 && queue.ready {
            queue.ready = false;
            self.active.store(false, Ordering::SeqCst);
            self.device_mut().reset();
            registers.status |= NEEDS_RESET;
        } else if configurable {
            queue.ready = value & 1 != 0;
        }
    }
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self {
            queues: vec![QueueRegisters::default(); queues],
            ..Self::default()
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK (section 3.1.1).
    fn configurable(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// Registers without an effect beyond their value.
    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                match self.driver_features_sel {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    _ => {}
                }
            }
            register::QUEUE_SEL => self.queue_sel = value,
            register::SHM_SEL => self.shm_sel = value,
            _ if self.configurable() => {
                // A queue that is ready is not changed any more (section 4.2.2.2).
                let Some(queue) = self.selected_mut().filter(|queue| !queue.ready) else {
                    return;
                };
                match offset {
                    register::QUEUE_NUM => queue.size = value,
                    register::QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
                    register::QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
                    register::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
                    register::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
                    register::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
                    register::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

impl QueueRegisters {
    /// The queue that the registers describe, or what is wrong with them.
    fn build(&self, max: u16, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(max)?;
        if self.ready {
            queue.try_set_size(u16::try_from(self.size).unwrap_or(0))?;
            queue.try_set_desc_table_address(GuestAddress(self.desc))?;
            queue.try_set_avail_ring_address(GuestAddress(self.driver))?;
            queue.try_set_used_ring_address(GuestAddress(self.device))?;
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
        }
        Ok(queue)
    }
}

impl<D: Backend> MmioDevice for VirtioMmio<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.device().read_config(offset, data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Configuration space is read-only, and registers are 32 bits wide.
        if offset < register::CONFIG
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::register::*;
    use super::*;
    use crate::memory::Ram;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
    const READY_TO_GO: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    /// Whether a queue is ready, its size, and its three addresses.
    type Ring = (bool, u16, u64, u64, u64);

    /// Records what the transport asks of it.
    #[derive(Default)]
    struct Recorder {
        refuse: bool,
        resets: u32,
        activations: Vec<(u64, Vec<Ring>)>,
        notified: Mutex<Vec<u16>>,
        broken: AtomicBool,
    }

    impl Backend for Recorder {
        fn device_id(&self) -> u32 {
            63
        }
        fn features(&self) -> u64 {
            FEATURES
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[256, 64]
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            for (byte, value) in data.iter_mut().zip(offset..) {
                *byte = value as u8;
            }
        }
        fn activate(
            &mut self,
            _: GuestMemoryAtomic<GuestMemoryMmap>,
            features: u64,
            queues: Vec<Queue>,
            _: Arc<dyn Interrupt>,
        ) -> Result<(), String> {
            if self.refuse {
                return Err("the test says so".into());
            }
            let queues = queues
                .iter()
                .map(|q| {
                    (
                        q.ready(),
                        q.size(),
                        q.desc_table(),
                        q.avail_ring(),
                        q.used_ring(),
                    )
                })
                .collect();
            self.activations.push((features, queues));
            Ok(())
        }
        fn notify(&self, queue: u16) {
            self.notified.lock().unwrap().push(queue);
        }
        fn needs_reset(&self) -> bool {
            self.broken.load(Ordering::SeqCst)
        }
        fn reset(&mut self) {
            self.resets += 1;
            self.broken.store(false, Ordering::SeqCst);
        }
    }

    struct Guest {
        _ram: Ram,
        event: Arc<EventFd>,
        transport: VirtioMmio<Recorder>,
    }

    impl Guest {
        fn new() -> Self {
            Self::with(Recorder::default())
        }

        fn with(device: Recorder) -> Self {
            let ram = Ram::new(2 << 20).unwrap();
            let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let region = SharedMemory {
                id: 0,
                base: 0x10_0000_0000,
                size: 0x1_2345_6000,
            };
            let transport = VirtioMmio::new(device, ram.map().clone(), Some(region), event.clone());
            Self {
                _ram: ram,
                event,
                transport,
            }
        }

        fn read(&self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }

        fn accept_features(&self, features: u64) {
            self.write(STATUS, ACKNOWLEDGE);
            self.write(STATUS, ACKNOWLEDGE | DRIVER);
            for half in [0, 1] {
                self.write(DRIVER_FEATURES_SEL, half);
                self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
            }
            self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        }

        fn set_queue(&self, queue: u32, size: u32, address: u64) {
            self.write(QUEUE_SEL, queue);
            self.write(QUEUE_NUM, size);
            for (low, address) in [
                (QUEUE_DESC_LOW, address),
                (QUEUE_DRIVER_LOW, address + 0x1000),
                (QUEUE_DEVICE_LOW, address + 0x2000),
            ] {
                self.write(low, address as u32);
                self.write(low + 4, (address >> 32) as u32);
            }
            self.write(QUEUE_READY, 1);
        }

        /// Brings the device into operation with queue 0 of 128 entries.
        fn start(&self) {
            self.accept_features(FEATURES);
            self.set_queue(0, 128, 0x1_0000);
            self.write(STATUS, READY_TO_GO);
        }
    }

    #[test]
    fn the_device_identifies_itself() {
        let guest = Guest::new();
        assert_eq!(guest.read(MAGIC_VALUE), 0x7472_6976);
        assert_eq!(guest.read(VERSION), 2);
        assert_eq!(guest.read(DEVICE_ID), 63);
        assert_eq!(guest.read(CONFIG_GENERATION), 0);
        assert_eq!(guest.read(STATUS), 0);
    }

    #[test]
    fn both_halves_of_the_features_are_offered_and_nothing_beyond() {
        let guest = Guest::new();
        for (half, expected) in [(0, 1 << 29), (1, 1), (2, 0), (u32::MAX, 0)] {
            guest.write(DEVICE_FEATURES_SEL, half);
            assert_eq!(guest.read(DEVICE_FEATURES), expected, "half {half}");
        }
    }

    #[test]
    fn the_aperture_is_region_zero_and_there_is_no_other() {
        let guest = Guest::new();
        let region = |id| {
            guest.write(SHM_SEL, id);
            let wide = |low| u64::from(guest.read(low)) | u64::from(guest.read(low + 4)) << 32;
            (wide(SHM_BASE_LOW), wide(SHM_LEN_LOW))
        };
        assert_eq!(region(1), (u64::MAX, u64::MAX));
        assert_eq!(region(0), (0x10_0000_0000, 0x1_2345_6000));
    }

    #[test]
    fn a_driver_that_follows_the_rules_activates_the_device_with_its_queues() {
        let guest = Guest::new();
        guest.accept_features(FEATURES);
        assert_eq!(guest.read(STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        guest.write(QUEUE_SEL, 1);
        assert_eq!(
            (guest.read(QUEUE_NUM_MAX), guest.read(QUEUE_READY)),
            (64, 0)
        );
        guest.set_queue(0, 128, 0x1_0001_0000);
        assert_eq!(
            (guest.read(QUEUE_NUM_MAX), guest.read(QUEUE_READY)),
            (256, 1)
        );
        guest.write(STATUS, READY_TO_GO);
        assert_eq!(guest.read(STATUS), READY_TO_GO);
        let device = guest.transport.device();
        let (features, queues) = &device.activations[0];
        assert_eq!(*features, FEATURES);
        assert_eq!(
            queues[0],
            (true, 128, 0x1_0001_0000, 0x1_0001_1000, 0x1_0001_2000)
        );
        assert!(!queues[1].0, "queue 1 was not set up");
        assert_eq!(device.activations.len(), 1);
    }

    #[test]
    fn features_that_were_not_offered_are_not_accepted() {
        for features in [
            FEATURES | 1,
            FEATURES & !(1 << VIRTIO_F_VERSION_1),
            0,
            1 << 63 | FEATURES,
        ] {
            let guest = Guest::new();
            guest.accept_features(features);
            assert_eq!(guest.read(STATUS), ACKNOWLEDGE | DRIVER, "{features:#x}");
            guest.write(STATUS, READY_TO_GO);
            assert_eq!(guest.read(STATUS) & DRIVER_OK, 0, "{features:#x}");
            assert!(guest.transport.device().activations.is_empty());
        }
    }

    #[test]
    fn features_cannot_change_after_they_are_accepted() {
        let guest = Guest::new();
        guest.accept_features(FEATURES);
        guest.write(DRIVER_FEATURES_SEL, 0);
        guest.write(DRIVER_FEATURES, 0xffff_ffff);
        guest.write(STATUS, READY_TO_GO);
        assert_eq!(guest.transport.device().activations[0].0, FEATURES);
    }

    #[test]
    fn queues_cannot_be_set_up_before_negotiation_nor_changed_once_ready() {
        let guest = Guest::new();
        guest.set_queue(0, 128, 0x1_0000);
        assert_eq!(guest.read(QUEUE_READY), 0);
        guest.accept_features(FEATURES);
        guest.set_queue(0, 128, 0x1_0000);
        guest.set_queue(0, 64, 0x2_0000);
        guest.write(STATUS, READY_TO_GO);
        guest.set_queue(1, 64, 0x4_0000);
        assert_eq!(guest.read(QUEUE_READY), 0, "too late");
        let queues = &guest.transport.device().activations[0].1;
        assert_eq!(queues[0], (true, 128, 0x1_0000, 0x1_1000, 0x1_2000));
    }

    #[test]
    fn a_queue_that_cannot_exist_makes_the_device_need_a_reset() {
        for (size, address) in [(0, 0), (3, 0), (512, 0), (0x1_0080, 0), (128, 8)] {
            let guest = Guest::new();
            guest.accept_features(FEATURES);
            guest.set_queue(0, size, address);
            guest.write(STATUS, READY_TO_GO);
            assert_ne!(
                guest.read(STATUS) & NEEDS_RESET,
                0,
                "size {size:#x}, address {address:#x}"
            );
            assert_eq!(guest.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
            assert!(guest.transport.device().activations.is_empty());
            guest.write(STATUS, 0);
            guest.start();
            assert_eq!(
                guest.read(STATUS),
                READY_TO_GO,
                "a reset makes it usable again"
            );
        }
    }

    #[test]
    fn a_device_that_refuses_to_start_needs_a_reset_and_is_not_notified() {
        let guest = Guest::with(Recorder {
            refuse: true,
            ..Recorder::default()
        });
        guest.start();
        assert_eq!(guest.read(STATUS), READY_TO_GO | NEEDS_RESET);
        assert_eq!(guest.event.read().unwrap(), 1);
        guest.write(QUEUE_NOTIFY, 0);
        assert!(guest.transport.device().notified.lock().unwrap().is_empty());
    }

    #[test]
    fn a_device_that_gives_up_needs_a_reset_until_it_is_reset() {
        let guest = Guest::new();
        guest.start();
        guest
            .transport
            .device()
            .broken
            .store(true, Ordering::SeqCst);
        guest.transport.line.signal_config();
        assert_eq!(guest.read(STATUS), READY_TO_GO | NEEDS_RESET);
        assert_eq!(guest.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
        guest.write(STATUS, 0);
        assert_eq!(guest.read(STATUS), 0);
        guest.start();
        assert_eq!(guest.read(STATUS), READY_TO_GO);
    }

    #[test]
    fn notifications_reach_an_active_device_only() {
        let guest = Guest::new();
        guest.write(QUEUE_NOTIFY, 0);
        guest.start();
        guest.write(QUEUE_NOTIFY, 0);
        guest.write(QUEUE_NOTIFY, 1);
        guest.write(QUEUE_NOTIFY, 0x1_0000);
        assert_eq!(*guest.transport.device().notified.lock().unwrap(), [0, 1]);
        assert_eq!(guest.transport.notifications(), 4);
        guest.write(STATUS, 0);
        guest.write(QUEUE_NOTIFY, 0);
        assert_eq!(guest.transport.device().notified.lock().unwrap().len(), 2);
    }

    #[test]
    fn interrupts_accumulate_causes_until_they_are_acknowledged() {
        let guest = Guest::new();
        guest.start();
        guest.transport.line.signal_queue(0);
        guest.transport.line.signal_config();
        assert_eq!(guest.event.read().unwrap(), 2);
        assert_eq!(guest.read(INTERRUPT_STATUS), 3);
        guest.write(INTERRUPT_ACK, 1);
        assert_eq!(guest.read(INTERRUPT_STATUS), 2);
    }

    #[test]
    fn a_reset_forgets_everything() {
        let guest = Guest::new();
        guest.start();
        guest.transport.line.signal_queue(0);
        guest.write(STATUS, 0);
        assert_eq!(guest.read(STATUS), 0);
        assert_eq!(guest.read(INTERRUPT_STATUS), 0);
        assert_eq!(guest.read(QUEUE_READY), 0);
        assert_eq!(guest.transport.device().resets, 1);
        guest.write(STATUS, READY_TO_GO);
        assert_eq!(
            guest.read(STATUS),
            ACKNOWLEDGE | DRIVER,
            "its features are forgotten too"
        );
    }

    #[test]
    fn a_driver_that_stops_a_queue_stops_the_device_and_reads_the_queue_back_as_stopped() {
        let guest = Guest::new();
        guest.start();
        guest.write(QUEUE_READY, 0);
        assert_eq!(guest.read(QUEUE_READY), 0);
        assert_eq!(guest.transport.device().resets, 1);
        guest.write(QUEUE_NOTIFY, 0);
        assert!(guest.transport.device().notified.lock().unwrap().is_empty());
        assert_ne!(guest.read(STATUS) & NEEDS_RESET, 0);
    }

    #[test]
    fn configuration_space_is_readable_in_any_width_and_not_writable() {
        let guest = Guest::new();
        for width in [1, 2, 4, 8] {
            let mut data = vec![0xee; width];
            guest.transport.read(CONFIG + 4, &mut data);
            assert_eq!(data, (4..4 + width as u8).collect::<Vec<_>>());
        }
        guest.write(CONFIG, 0xffff_ffff);
        assert_eq!(guest.read(CONFIG), 0x0302_0100);
    }

    #[test]
    fn no_access_of_any_width_at_any_offset_panics() {
        let guest = Guest::new();
        for state in 0..3 {
            match state {
                1 => guest.accept_features(FEATURES),
                2 => guest.start(),
                _ => {}
            }
            for offset in 0..0x1000 {
                for width in 1..=8 {
                    let mut data = [0xff; 8];
                    guest.transport.read(offset, &mut data[..width]);
                    if width != 4 && offset < CONFIG {
                        assert_eq!(data[..width], [0; 8][..width], "{offset:#x}");
                    }
                    guest.transport.write(offset, &[0xff; 8][..width]);
                }
            }
            guest.write(STATUS, 0);
        }
    }
}
