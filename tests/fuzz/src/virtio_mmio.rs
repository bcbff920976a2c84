//! The virtio-mmio registers in any order, with any width, before and after the device works.
//!
//! Input: steps. Each reads or writes a register, goes through a part of what a driver does, or writes guest memory. What the
//! registers show must follow a model of the specification: constants do not change, status bits are only added until a reset,
//! which gives all back, and without agreement on features nothing is ever started.

use crate::answering::Answering;
use crate::decode::{LIMITS, prelude};
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig, Doorbell};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_mini_vmm::bus::MmioDevice;
use pvgpu_mini_vmm::virtio::SharedMemory;
use pvgpu_mini_vmm::virtio_mmio::{MAGIC, NON_LEGACY, VENDOR, VirtioMmio, register};
use pvgpu_protocol::wire::CONFIG_MAGIC;
use std::sync::{Arc, LazyLock};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory.
pub(crate) const MEMORY: usize = 0x4000;
/// Most entries of a queue.
pub(crate) const SIZE: u16 = 16;

/// Bits of the status register.
pub(crate) const ACKNOWLEDGE: u32 = 1;
pub(crate) const DRIVER: u32 = 2;
pub(crate) const DRIVER_OK: u32 = 4;
pub(crate) const FEATURES_OK: u32 = 8;
pub(crate) const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
pub(crate) const KNOWN: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;

/// The guest's memory. Mapping it anew for each input would take longer than the input.
pub(crate) static GUEST: LazyLock<GuestMemoryAtomic<GuestMemoryMmap>> = LazyLock::new(|| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]);
    GuestMemoryAtomic::new(memory.expect("a few pages"))
});

/// A step of a hostile driver.
#[derive(Arbitrary, Debug)]
enum Step {
    /// Writes 32 bits to a register.
    Write { register: u8, value: u32 },
    /// Writes anything anywhere.
    WriteAny { offset: u16, bytes: Vec<u8> },
    /// Reads anything anywhere.
    ReadAny { offset: u16, length: u8 },
    /// Agrees on these features, or on those that are offered.
    Features(Option<u64>),
    /// Describes a queue, as it must be but for what is given here.
    Queue {
        queue: u8,
        size: Option<u16>,
        address: Option<u32>,
        ready: bool,
    },
    /// Adds a status bit.
    Status { bit: u8 },
    /// Offers a request on the first queue and rings.
    Request { what: u8, notify: u8 },
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
    let driver = Answering::new("virtio_gpu", 1, LIMITS.message);
    let config = DeviceConfig {
        queue_size: SIZE,
        doorbell: Doorbell::Inline,
        limits: LIMITS,
        sandbox: Sandbox::Off,
        ..DeviceConfig::default()
    };
    let device = Device::new(Arc::new(driver), None, config).expect("eventfds");
    let line = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let region = SharedMemory {
        id: 0,
        base: 1 << 40,
        size: 1 << 20,
    };
    let transport = VirtioMmio::new(device, GUEST.clone(), Some(region), Arc::new(line));
    let mut driver = Driver {
        transport,
        status: 0,
        offered: 0,
    };
    store(0, &[0; MEMORY]);
    driver.offered = driver.features();
    let mut offered: u16 = 0;
    for step in input.arbitrary_iter()? {
        match step? {
            Step::Write { register, value } => driver.write(u64::from(register) * 4, value),
            Step::WriteAny { offset, bytes } => {
                driver.transport.write(offset.into(), &bytes);
                if offset == 0x70 && bytes.len() == 4 {
                    driver.status_written(u32::from_le_bytes(bytes.try_into().expect("4 bytes")));
                }
            }
            Step::ReadAny { offset, length } => {
                let mut bytes = vec![0xa5; length.into()];
                driver.transport.read(offset.into(), &mut bytes);
                if u64::from(offset) < register::CONFIG && bytes.len() != 4 {
                    assert!(bytes.iter().all(|byte| *byte == 0), "half a register");
                }
            }
            Step::Features(features) => {
                driver.write(register::STATUS, ACKNOWLEDGE | DRIVER);
                let features = features.unwrap_or(driver.offered);
                for half in [0, 1] {
                    driver.write(register::DRIVER_FEATURES_SEL, half);
                    let bits = (features >> (32 * half)) as u32;
                    driver.write(register::DRIVER_FEATURES, bits);
                }
                driver.write(register::STATUS, FEATURES_OK);
            }
            Step::Queue {
                queue,
                size,
                address,
                ready,
            } => {
                driver.write(register::QUEUE_SEL, u32::from(queue % 3));
                driver.write(register::QUEUE_NUM, size.unwrap_or(SIZE).into());
                let base = address.unwrap_or(u32::from(queue % 3) * 0x1000);
                driver.write(register::QUEUE_DESC_LOW, base);
                driver.write(register::QUEUE_DRIVER_LOW, base.wrapping_add(0x400));
                driver.write(register::QUEUE_DEVICE_LOW, base.wrapping_add(0x800));
                driver.write(register::QUEUE_READY, ready.into());
            }
            Step::Status { bit } => driver.write(register::STATUS, 1 << (bit % 8)),
            Step::Request { what, notify } => {
                offer(what, offered);
                offered = offered.wrapping_add(1);
                driver.write(register::QUEUE_NOTIFY, notify.into());
            }
            Step::Memory { address, bytes } => {
                store(usize::from(address) % (MEMORY - 8), &bytes);
            }
            Step::Reset => driver.write(register::STATUS, 0),
        }
        driver.judge();
    }
    Ok(())
}

/// The guest's driver, and what it knows of the device.
struct Driver {
    transport: VirtioMmio<Device>,
    /// The status register as it was last seen.
    status: u32,
    /// Features that the device offers.
    offered: u64,
}

impl Driver {
    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
        if register == register::STATUS {
            self.status_written(value);
        }
    }

    /// Holds the status register against the value that was just written to it.
    fn status_written(&mut self, value: u32) {
        let status = self.read(register::STATUS);
        let expected = match value {
            0 => 0..=0,
            _ => self.status..=self.status | value | NEEDS_RESET,
        };
        assert!(
            expected.contains(&status) && status & !expected.end() == 0,
            "status {status:#x} after {value:#x} was written to {:#x}",
            self.status
        );
        if value == 0 {
            assert_eq!(self.read(register::INTERRUPT_STATUS), 0);
            assert_eq!(self.transport.device().statistics().usage, None);
        }
        self.status = status;
    }

    fn features(&mut self) -> u64 {
        let half = |half: u32| {
            let select = register::DEVICE_FEATURES_SEL;
            self.transport.write(select, &half.to_le_bytes());
            u64::from(self.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Holds what always is so against the registers.
    fn judge(&mut self) {
        assert_eq!(self.read(register::MAGIC_VALUE), MAGIC);
        assert_eq!(self.read(register::VERSION), NON_LEGACY);
        assert_eq!(self.read(register::DEVICE_ID), DEVICE_ID);
        assert_eq!(self.read(register::VENDOR_ID), VENDOR);
        assert_eq!(self.read(register::CONFIG), CONFIG_MAGIC);
        assert_eq!(self.read(register::INTERRUPT_STATUS) & !3, 0);
        let status = self.read(register::STATUS);
        assert_eq!(status & !KNOWN, 0, "a status bit that there is not");
        assert_eq!(status & self.status, self.status, "a status bit is lost");
        self.status = status;
        let device = self.transport.device();
        let active = device.statistics().usage.is_some();
        let broken = status & NEEDS_RESET != 0;
        let agreed = status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK | DRIVER_OK;
        assert!(agreed || !active, "active with status {status:#x}");
        assert!(
            !broken || !active || device.needs_reset(),
            "active, but broken"
        );
    }
}

/// Puts a request and room for its response into memory, as a chain of the queue at address 0.
pub(crate) fn offer(what: u8, number: u16) {
    let requests = prelude("virtio_gpu");
    let bytes = &requests[usize::from(what) % requests.len()];
    let head = number % (SIZE / 2) * 2;
    let place = 0x3000 + u64::from(head) * 0x80;
    let response = 0x2000 + u64::from(head) * 0x80;
    store(usize::try_from(place).expect("in memory"), bytes);
    let request = (
        place,
        u32::try_from(bytes.len()).expect("short"),
        1,
        head + 1,
    );
    let room = (response, 0x80, 2, 0);
    for (index, (address, length, flags, next)) in (head..).zip([request, room]) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&u64::to_le_bytes(address));
        descriptor[8..12].copy_from_slice(&u32::to_le_bytes(length));
        descriptor[12..14].copy_from_slice(&u16::to_le_bytes(flags));
        descriptor[14..].copy_from_slice(&u16::to_le_bytes(next));
        store(usize::from(index) * 16, &descriptor);
    }
    store(0x404 + usize::from(number % SIZE) * 2, &head.to_le_bytes());
    store(0x402, &number.wrapping_add(1).to_le_bytes());
}

pub(crate) fn store(address: usize, bytes: &[u8]) {
    let address = GuestAddress(u64::try_from(address).expect("64 bits"));
    let memory = GUEST.memory();
    memory.write_slice(bytes, address).expect("in memory");
}
