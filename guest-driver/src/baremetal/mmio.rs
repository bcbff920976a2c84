//! The device's virtio-mmio registers (virtio 1.2, section 4.2.2), as a [`Transport`] of `virtio-drivers`.
//!
//! That crate's own MMIO transport refuses device ids that it has no driver for, and knows no shared-memory regions; this one
//! is for our device alone. Used by [`super::VirtioChannel`]. Version 2 ("modern") only.
#![allow(unsafe_code)]

use core::fmt;
use core::ptr::NonNull;

use pvgpu_protocol::wire::DEVICE_ID;
use safe_mmio::fields::{ReadPure, ReadPureWrite, WriteOnly};
use safe_mmio::{UniqueMmioPointer, field, field_shared};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// `"virt"`, the first register of every virtio-mmio device.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version of virtio-mmio since virtio 1.0.
const VERSION: u32 = 2;
/// Length and base that say that a shared-memory region does not exist.
const NO_REGION: u64 = u64::MAX;

/// The registers, at the offsets of table 4.1.
#[repr(C)]
#[derive(Debug, FromBytes, Immutable, IntoBytes)]
pub struct Registers {
    /// 0x000
    magic: ReadPure<u32>,
    version: ReadPure<u32>,
    device_id: ReadPure<u32>,
    vendor_id: ReadPure<u32>,
    /// 0x010
    device_features: ReadPure<u32>,
    device_features_select: WriteOnly<u32>,
    reserved_018: [u32; 2],
    /// 0x020
    driver_features: WriteOnly<u32>,
    driver_features_select: WriteOnly<u32>,
    reserved_028: [u32; 2],
    /// 0x030
    queue_select: WriteOnly<u32>,
    queue_size_max: ReadPure<u32>,
    queue_size: WriteOnly<u32>,
    reserved_03c: [u32; 2],
    /// 0x044
    queue_ready: ReadPureWrite<u32>,
    reserved_048: [u32; 2],
    /// 0x050: the doorbell
    queue_notify: WriteOnly<u32>,
    reserved_054: [u32; 3],
    /// 0x060
    interrupt_status: ReadPure<u32>,
    interrupt_acknowledge: WriteOnly<u32>,
    reserved_068: [u32; 2],
    /// 0x070
    status: ReadPureWrite<u32>,
    reserved_074: [u32; 3],
    /// 0x080
    queue_descriptors: [WriteOnly<u32>; 2],
    reserved_088: [u32; 2],
    /// 0x090
    queue_driver: [WriteOnly<u32>; 2],
    reserved_098: [u32; 2],
    /// 0x0a0
    queue_device: [WriteOnly<u32>; 2],
    reserved_0a8: u32,
    /// 0x0ac
    region_select: WriteOnly<u32>,
    /// 0x0b0
    region_length: [ReadPure<u32>; 2],
    /// 0x0b8
    region_base: [ReadPure<u32>; 2],
    reserved_0c0: [u32; 15],
    /// 0x0fc
    config_generation: ReadPure<u32>,
    /// 0x100: the configuration space
    config: [ReadPure<u32>; 2],
}

/// What is wrong with a device that was announced as ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmioError {
    /// The magic register holds this: there is no virtio-mmio device at that address.
    NoDevice(u32),
    /// The version register holds this: not version 2.
    Version(u32),
    /// A virtio device, but with this id.
    OtherDevice(u32),
}

impl fmt::Display for MmioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevice(magic) => write!(
                f,
                "no virtio-mmio device there (magic {magic:#x}): check virtio_mmio.device= on the command line"
            ),
            Self::Version(version) => write!(
                f,
                "virtio-mmio version {version} instead of {VERSION}: use a VMM with modern virtio"
            ),
            Self::OtherDevice(id) => write!(
                f,
                "virtio device id {id} instead of {DEVICE_ID}: give the VM a GPU"
            ),
        }
    }
}

impl core::error::Error for MmioError {}

/// A shared-memory region of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The device, through its registers. Dropping it resets the device.
#[derive(Debug)]
pub struct MmioTransport<'a> {
    registers: UniqueMmioPointer<'a, Registers>,
}

impl<'a> MmioTransport<'a> {
    /// The device whose registers are mapped at `registers`.
    ///
    /// # Safety
    ///
    /// The pointer must be aligned to 4 bytes, mapped for `'a` to a virtio-mmio register window of at least
    /// `size_of::<Registers>()` bytes, and not be used by anybody else meanwhile.
    pub unsafe fn new(registers: NonNull<Registers>) -> core::result::Result<Self, MmioError> {
        // SAFETY: what the caller promises is what this asks for; the field types of `Registers` say which registers
        // may be read and written.
        Self::from_registers(unsafe { UniqueMmioPointer::new(registers) })
    }

    /// The device behind these registers.
    pub fn from_registers(
        registers: UniqueMmioPointer<'a, Registers>,
    ) -> core::result::Result<Self, MmioError> {
        let magic = field_shared!(registers, magic).read();
        if magic != MAGIC {
            return Err(MmioError::NoDevice(magic));
        }
        let version = field_shared!(registers, version).read();
        if version != VERSION {
            return Err(MmioError::Version(version));
        }
        let id = field_shared!(registers, device_id).read();
        if id != DEVICE_ID {
            return Err(MmioError::OtherDevice(id));
        }
        Ok(Self { registers })
    }

    /// The shared-memory region of that identifier, where the device has one.
    pub fn shared_memory(&mut self, region: u8) -> Option<SharedMemory> {
        field!(self.registers, region_select).write(u32::from(region));
        let size = join(
            field_shared!(self.registers, region_length)
                .split()
                .map(|half| half.read()),
        );
        let address = join(
            field_shared!(self.registers, region_base)
                .split()
                .map(|half| half.read()),
        );
        (size != NO_REGION && size != 0 && address != NO_REGION)
            .then_some(SharedMemory { address, size })
    }

    /// Acknowledges both causes without asking which it was: one exit instead of two.
    pub fn acknowledge(&mut self) {
        field!(self.registers, interrupt_acknowledge).write(InterruptStatus::all().bits());
    }
}

impl Transport for MmioTransport<'_> {
    /// The nearest that `virtio-drivers` has a name for: it knows no experimental ids, and nothing here asks.
    fn device_type(&self) -> DeviceType {
        DeviceType::GPU
    }

    fn read_device_features(&mut self) -> u64 {
        join([0, 1].map(|half| {
            field!(self.registers, device_features_select).write(half);
            field_shared!(self.registers, device_features).read()
        }))
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        for (half, features) in (0..).zip(split(driver_features)) {
            field!(self.registers, driver_features_select).write(half);
            field!(self.registers, driver_features).write(features);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        field!(self.registers, queue_select).write(u32::from(queue));
        field_shared!(self.registers, queue_size_max).read()
    }

    fn notify(&mut self, queue: u16) {
        field!(self.registers, queue_notify).write(u32::from(queue));
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(field_shared!(self.registers, status).read())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        field!(self.registers, status).write(status.bits());
    }

    /// Nothing to do since virtio 1.0.
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        field!(self.registers, queue_select).write(u32::from(queue));
        field!(self.registers, queue_size).write(size);
        write_pair(
            field!(self.registers, queue_descriptors).split(),
            descriptors,
        );
        write_pair(field!(self.registers, queue_driver).split(), driver_area);
        write_pair(field!(self.registers, queue_device).split(), device_area);
        field!(self.registers, queue_ready).write(1);
    }

    fn queue_unset(&mut self, queue: u16) {
        field!(self.registers, queue_select).write(u32::from(queue));
        field!(self.registers, queue_ready).write(0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        field!(self.registers, queue_select).write(u32::from(queue));
        field_shared!(self.registers, queue_ready).read() != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = InterruptStatus::from_bits_truncate(
            field_shared!(self.registers, interrupt_status).read(),
        );
        if !status.is_empty() {
            field!(self.registers, interrupt_acknowledge).write(status.bits());
        }
        status
    }

    fn read_config_generation(&self) -> u32 {
        field_shared!(self.registers, config_generation).read()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut bytes = [0; size_of::<Registers>() - CONFIG_OFFSET];
        let words = field_shared!(self.registers, config).split();
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.read().to_le_bytes());
        }
        let value = bytes.get(offset..).ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_prefix(value)
            .map(|(value, _)| value)
            .map_err(|_| Error::ConfigSpaceTooSmall)
    }

    /// The device's configuration space is read-only.
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: T,
    ) -> Result<()> {
        Err(Error::Unsupported)
    }
}

impl Drop for MmioTransport<'_> {
    fn drop(&mut self) {
        self.set_status(DeviceStatus::empty());
    }
}

/// Where the configuration space starts.
const CONFIG_OFFSET: usize = core::mem::offset_of!(Registers, config);

fn write_pair(pair: [UniqueMmioPointer<'_, WriteOnly<u32>>; 2], value: u64) {
    for (mut register, half) in pair.into_iter().zip(split(value)) {
        register.write(half);
    }
}

/// Low half, high half.
fn split(value: u64) -> [u32; 2] {
    [(value & 0xffff_ffff) as u32, (value >> 32) as u32]
}

fn join([low, high]: [u32; 2]) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use core::mem::offset_of;
    use zerocopy::FromZeros;

    /// A register window as plain memory: what the driver writes can be read, and the other way round.
    pub(in super::super) fn window() -> Registers {
        let mut registers = Registers::new_zeroed();
        registers.magic = ReadPure(u32::from_le_bytes(*b"virt"));
        registers.version = ReadPure(2);
        registers.device_id = ReadPure(63);
        registers.queue_size_max = ReadPure(128);
        registers
    }

    /// Gives the window what a driver looks at before it uses a device.
    pub(in super::super) fn offer(
        registers: &mut Registers,
        features: u32,
        queue_size: u32,
        config: [u32; 2],
    ) {
        registers.device_features = ReadPure(features);
        registers.queue_size_max = ReadPure(queue_size);
        registers.config = config.map(ReadPure);
    }

    pub(in super::super) fn words(registers: &Registers) -> &[u32] {
        <[u32]>::ref_from_bytes(registers.as_bytes()).unwrap()
    }

    #[test]
    fn registers_lie_at_the_offsets_of_the_specification() {
        assert_eq!(offset_of!(Registers, device_features_select), 0x14);
        assert_eq!(offset_of!(Registers, driver_features_select), 0x24);
        assert_eq!(offset_of!(Registers, queue_size_max), 0x34);
        assert_eq!(offset_of!(Registers, queue_size), 0x38);
        assert_eq!(offset_of!(Registers, queue_ready), 0x44);
        assert_eq!(offset_of!(Registers, queue_notify), 0x50);
        assert_eq!(offset_of!(Registers, interrupt_status), 0x60);
        assert_eq!(offset_of!(Registers, interrupt_acknowledge), 0x64);
        assert_eq!(offset_of!(Registers, status), 0x70);
        assert_eq!(offset_of!(Registers, queue_descriptors), 0x80);
        assert_eq!(offset_of!(Registers, queue_driver), 0x90);
        assert_eq!(offset_of!(Registers, queue_device), 0xa0);
        assert_eq!(offset_of!(Registers, region_select), 0xac);
        assert_eq!(offset_of!(Registers, region_length), 0xb0);
        assert_eq!(offset_of!(Registers, region_base), 0xb8);
        assert_eq!(offset_of!(Registers, config_generation), 0xfc);
        assert_eq!(CONFIG_OFFSET, 0x100);
    }

    #[test]
    fn a_device_that_is_not_ours_is_refused() {
        let refusal = |change: fn(&mut Registers)| {
            let mut registers = window();
            change(&mut registers);
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).err()
        };
        assert_eq!(refusal(|_| ()), None);
        assert_eq!(
            refusal(|r| r.magic = ReadPure(0)),
            Some(MmioError::NoDevice(0))
        );
        assert_eq!(
            refusal(|r| r.version = ReadPure(1)),
            Some(MmioError::Version(1))
        );
        assert_eq!(
            refusal(|r| r.device_id = ReadPure(16)),
            Some(MmioError::OtherDevice(16))
        );
    }

    #[test]
    fn a_queue_is_set_up_with_its_three_addresses() {
        let mut registers = window();
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        transport.queue_set(1, 128, 0x1_0000_2000, 0x2_0000_3000, 0x3_0000_4000);
        core::mem::forget(transport);
        let words = words(&registers);
        assert_eq!(words[0x30 / 4], 1);
        assert_eq!(words[0x38 / 4], 128);
        assert_eq!(words[0x80 / 4..0x88 / 4], [0x2000, 1]);
        assert_eq!(words[0x90 / 4..0x98 / 4], [0x3000, 2]);
        assert_eq!(words[0xa0 / 4..0xa8 / 4], [0x4000, 3]);
        assert_eq!(words[0x44 / 4], 1);
    }

    #[test]
    fn the_doorbell_rings_with_the_queue_number() {
        let mut registers = window();
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        transport.notify(3);
        drop(transport);
        assert_eq!(words(&registers)[0x50 / 4], 3);
    }

    #[test]
    fn the_aperture_is_found_and_its_absence_too() {
        let mut registers = window();
        registers.region_length = [ReadPure(0), ReadPure(1)];
        registers.region_base = [ReadPure(0x1000), ReadPure(0x10)];
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        let region = SharedMemory {
            address: 0x10_0000_1000,
            size: 1 << 32,
        };
        assert_eq!(transport.shared_memory(0), Some(region));
        drop(transport);
        assert_eq!(words(&registers)[0xac / 4], 0);

        registers.region_length = [const { ReadPure(u32::MAX) }; 2];
        registers.region_base = [const { ReadPure(u32::MAX) }; 2];
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        assert_eq!(transport.shared_memory(1), None);
        drop(transport);
        assert_eq!(words(&registers)[0xac / 4], 1);
    }

    #[test]
    fn exactly_the_pending_interrupts_are_acknowledged() {
        let mut registers = window();
        registers.interrupt_status = ReadPure(0xffff_fff2);
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        assert!(transport.ack_interrupt() == InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT);
        drop(transport);
        assert_eq!(words(&registers)[0x64 / 4], 2);
    }

    #[test]
    fn config_space_is_read_within_its_bounds() {
        let mut registers = window();
        registers.config = [ReadPure(0x5047_5650), ReadPure(0x0002_0001)];
        let transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        assert_eq!(transport.read_config_space::<u16>(6), Ok(2));
        assert_eq!(
            transport.read_config_space::<u64>(0),
            Ok(0x0002_0001_5047_5650)
        );
        assert_eq!(
            transport.read_config_space::<u64>(4),
            Err(Error::ConfigSpaceTooSmall)
        );
        assert_eq!(
            transport.read_config_space::<u8>(usize::MAX),
            Err(Error::ConfigSpaceTooSmall)
        );
    }

    #[test]
    fn a_dropped_device_is_reset() {
        let mut registers = window();
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        transport.set_status(DeviceStatus::DRIVER_OK);
        drop(transport);
        assert_eq!(words(&registers)[0x70 / 4], 0);
    }
}
