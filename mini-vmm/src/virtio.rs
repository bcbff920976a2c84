//! A virtio device as a driver finds it behind any transport: features, status, the set-up of queues, activation and reset.
//! Virtio 1.2, sections 2.1 and 3.1.
//!
//! A transport ([`crate::virtio_mmio`], [`crate::virtio_pci`]) gives it registers; what is behind it is a [`Backend`]. It trusts
//! no register write: values are kept as they came and judged when the driver says that it is ready; a driver that
//! breaks the rules gets DEVICE_NEEDS_RESET or is ignored, and may always start over with a reset.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// Interrupt cause: a queue has used buffers.
pub(crate) const INTERRUPT_QUEUE: u32 = 1 << 0;
/// Interrupt cause: the configuration or the status changed.
pub(crate) const INTERRUPT_CONFIG: u32 = 1 << 1;

pub(crate) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(crate) const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
pub(crate) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(crate) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
pub(crate) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
pub(crate) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

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
    /// Whether it signals the events of the line itself, past this transport: then any interrupt may be one of its queues.
    fn raises_interrupts(&self) -> bool {
        false
    }
    /// Starts work on the queues that are ready; the error says why it cannot.
    fn activate(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        features: u64,
        queues: Vec<Queue>,
        line: Arc<dyn Line>,
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

/// How a transport interrupts the guest.
pub trait Line: Interrupt {
    /// What interrupts the guest for that queue when it is signalled, past this transport, if the driver wants that.
    fn event(&self, queue: u16) -> Option<EventFd>;
    /// The device was reset: no interrupt of before is left.
    fn reset(&self);
}

/// What the driver has written, as it came.
#[derive(Debug, Default)]
pub(crate) struct Registers {
    pub status: u32,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    driver_features: u64,
    pub queue_sel: u32,
    pub shm_sel: u32,
    queues: Vec<QueueRegisters>,
}

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct QueueRegisters {
    pub size: u32,
    pub ready: bool,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

/// A device and what its driver has set up.
pub struct Virtio<D> {
    device: RwLock<D>,
    registers: Mutex<Registers>,
    /// Whether the device works on queues: read without a lock on every notification.
    active: AtomicBool,
    line: Arc<dyn Line>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    notifications: AtomicU64,
    warned: AtomicBool,
}

pub(crate) fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

pub(crate) fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

pub(crate) fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

pub(crate) fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

impl<D: Backend> Virtio<D> {
    /// The device, whose queues lie in `memory` and whose interrupts go through `line`.
    pub fn new(device: D, memory: GuestMemoryAtomic<GuestMemoryMmap>, line: Arc<dyn Line>) -> Self {
        let registers = Registers::new(device.queue_max_sizes());
        Self {
            device: RwLock::new(device),
            registers: Mutex::new(registers),
            active: AtomicBool::new(false),
            line,
            memory,
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

    /// Whether the device works on queues.
    pub(crate) fn active(&self) -> bool {
        self.active.load(Ordering::SeqCst)
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

    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn reset_registers(&self, registers: &mut Registers) {
        self.active.store(false, Ordering::SeqCst);
        let mut device = self.device_mut();
        device.reset();
        *registers = Registers::new(device.queue_max_sizes());
        self.line.reset();
    }

    /// The half of the offered features that the driver has selected.
    pub(crate) fn device_features(&self, registers: &Registers) -> u32 {
        match registers.device_features_sel {
            0 => low(self.device().features()),
            1 => high(self.device().features()),
            _ => 0,
        }
    }

    /// The largest size of the selected queue; 0 if there is none.
    pub(crate) fn queue_max_size(&self, registers: &Registers) -> u16 {
        let queue = usize::try_from(registers.queue_sel).unwrap_or(usize::MAX);
        let device = self.device();
        let sizes = device.queue_max_sizes();
        sizes.get(queue).copied().unwrap_or(0)
    }

    /// The driver rang for that queue. No register lock, so that vCPUs with queues of their own never contend.
    pub(crate) fn notify(&self, queue: u32) {
        self.notifications.fetch_add(1, Ordering::Relaxed);
        if let Ok(queue) = u16::try_from(queue)
            && self.active()
        {
            self.device().notify(queue);
        }
    }

    /// The status as the driver reads it.
    pub(crate) fn status(&self, registers: &Registers) -> u32 {
        match self.device().needs_reset() {
            true => registers.status | NEEDS_RESET,
            false => registers.status,
        }
    }

    /// Status bits are only ever added; a write of zero takes them all back.
    pub(crate) fn write_status(&self, value: u32) {
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
    pub(crate) fn write_queue_ready(&self, value: u32) {
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
    /// Each queue has its largest size until the driver chooses another.
    fn new(sizes: &[u16]) -> Self {
        let queue = |size: &u16| QueueRegisters {
            size: (*size).into(),
            ..QueueRegisters::default()
        };
        Self {
            queues: sizes.iter().map(queue).collect(),
            ..Self::default()
        }
    }

    pub fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK (section 3.1.1).
    fn configurable(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK
    }

    /// The half of what the driver has accepted that it has selected.
    pub fn read_driver_features(&self) -> u32 {
        match self.driver_features_sel {
            0 => low(self.driver_features),
            1 => high(self.driver_features),
            _ => 0,
        }
    }

    /// Takes half of what the driver accepts, as long as that is not decided.
    pub fn write_driver_features(&mut self, value: u32) {
        if self.status & FEATURES_OK == 0 {
            match self.driver_features_sel {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            }
        }
    }

    /// The selected queue, while it may be set up: one that is ready is not changed any more (section 4.2.2.2).
    pub fn selected_for_setup(&mut self) -> Option<&mut QueueRegisters> {
        if !self.configurable() {
            return None;
        }
        self.selected_mut().filter(|queue| !queue.ready)
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

#[cfg(test)]
pub(crate) mod recorder {
    //! A device that tests put behind a transport.

    use super::*;

    pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
    pub const READY_TO_GO: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    /// Whether a queue is ready, its size, and its three addresses.
    pub type Ring = (bool, u16, u64, u64, u64);

    /// Records what the transport asks of it.
    #[derive(Default)]
    pub struct Recorder {
        pub refuse: bool,
        pub resets: u32,
        pub activations: Vec<(u64, Vec<Ring>)>,
        pub notified: Mutex<Vec<u16>>,
        pub broken: AtomicBool,
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
            _: Arc<dyn Line>,
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
}
