//! The virtio-mmio transport, version 2: the registers through which a guest finds, negotiates with and
//! notifies a device. Virtio 1.2, section 4.2.2.
//!
//! vCPU threads call it through the bus; what is behind it is a [`Virtio`] device.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pvgpu_host_proxy::device::Interrupt;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::MmioDevice;
use crate::virtio::{
    Backend, INTERRUPT_CONFIG, INTERRUPT_QUEUE, Line, Registers, SharedMemory, Virtio, high, low,
    set_high, set_low,
};

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

/// The interrupt line of the transport: causes for the guest to read and an irqfd to raise it.
#[derive(Debug)]
pub struct IrqLine {
    causes: AtomicU32,
    event: Arc<EventFd>,
}

impl IrqLine {
    fn raise(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
        // A full counter is an interrupt that is pending already.
        let _ = self.event.write(1);
    }
}

impl Interrupt for IrqLine {
    fn signal_queue(&self, _queue: u16) {
        self.raise(INTERRUPT_QUEUE);
    }

    fn signal_config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }
}

impl Line for IrqLine {
    fn event(&self, _queue: u16) -> Option<EventFd> {
        self.event.try_clone().ok()
    }

    fn reset(&self) {
        self.causes.store(0, Ordering::SeqCst);
    }
}

/// The transport in front of one device.
pub struct VirtioMmio<D> {
    /// [`crate::virtio::Backend::raises_interrupts`].
    raises_interrupts: bool,
    virtio: Arc<Virtio<D>>,
    line: Arc<IrqLine>,
    shared_memory: Option<SharedMemory>,
}

impl<D> Deref for VirtioMmio<D> {
    type Target = Arc<Virtio<D>>;

    fn deref(&self) -> &Self::Target {
        &self.virtio
    }
}

impl<D: Backend> VirtioMmio<D> {
    /// A transport for `device`, whose queues lie in `memory` and whose interrupts signal `event`.
    pub fn new(
        device: D,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        shared_memory: Option<SharedMemory>,
        event: Arc<EventFd>,
    ) -> Self {
        let line = Arc::new(IrqLine {
            causes: AtomicU32::new(0),
            event,
        });
        Self {
            raises_interrupts: device.raises_interrupts(),
            virtio: Arc::new(Virtio::new(device, memory, Arc::clone(&line) as _)),
            line,
            shared_memory,
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        if offset == register::INTERRUPT_STATUS {
            // Read in every interrupt: without the lock.
            let unknown = self.raises_interrupts && self.active();
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
            register::DEVICE_FEATURES => self.device_features(&registers),
            register::QUEUE_NUM_MAX => self.queue_max_size(&registers).into(),
            register::QUEUE_READY => registers.selected().is_some_and(|queue| queue.ready).into(),
            register::STATUS => self.status(&registers),
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
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => {
                self.line.causes.fetch_and(!value, Ordering::SeqCst);
            }
            register::STATUS => self.write_status(value),
            register::QUEUE_READY => self.write_queue_ready(value),
            _ => write_value(&mut self.registers(), offset, value),
        }
    }
}

/// Registers without an effect beyond their value.
fn write_value(registers: &mut Registers, offset: u64, value: u32) {
    match offset {
        register::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
        register::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
        register::DRIVER_FEATURES => registers.write_driver_features(value),
        register::QUEUE_SEL => registers.queue_sel = value,
        register::SHM_SEL => registers.shm_sel = value,
        _ => {
            let Some(queue) = registers.selected_for_setup() else {
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
    use crate::virtio::recorder::{FEATURES, READY_TO_GO, Recorder};
    use crate::virtio::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
    use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

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
