//! A PCI bus: configuration mechanism #1, a host bridge, and functions with a type 0 header. PCI Local Bus 3.0, sections 3.2.2.3
//! and 6.
//!
//! `ports` passes the two ports on. There is no firmware: functions have addresses from the start, as firmware would have given
//! them, and keep them. A guest can find out the size of a BAR, but what else it writes there changes nothing. Functions always
//! decode their addresses, whatever the guest writes into their command registers. There are no interrupt pins.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::layout;
use crate::virtio::{high, low};

/// Bytes of a function's configuration space.
pub const SIZE: usize = 256;

/// Offsets in the header, the same for all functions.
pub mod header {
    #![allow(missing_docs)] // their names are the specification's
    pub const VENDOR: usize = 0x00;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const BARS: usize = 0x10;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const CAPABILITIES: usize = 0x34;
}

/// Where capabilities begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;
/// Command: the function answers at its memory addresses.
const MEMORY: u8 = 1 << 1;
/// Command: it may send messages and use memory.
const MASTER: u8 = 1 << 2;
/// Status: there are capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;
/// Of a BAR: 64 bits, and prefetchable.
const WIDE_PREFETCHABLE: u32 = 1 << 2 | 1 << 3;

/// Who made a function and what it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision, then class code from its lowest byte: programming interface, subclass, class.
    pub class: [u8; 4],
    /// The vendor of the subsystem.
    pub subsystem_vendor: u16,
    /// The subsystem.
    pub subsystem: u16,
}

/// What the guest finds as device 0: of the kind that has no driver and no quirks.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: [0, 0, 0, 6],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// What answers for a device of the bus. Calls come from vCPU threads, with 1, 2 or 4 bytes within one aligned word.
pub trait Function: Send + Sync {
    /// Reads configuration space.
    fn read_configuration(&self, offset: usize, data: &mut [u8]);
    /// Writes it.
    fn write_configuration(&self, offset: usize, data: &[u8]);
}

/// The bytes of a configuration space, and which bits a guest can write.
#[derive(Debug)]
pub struct Configuration {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// What the BARs are while they do not tell their size, and which of their bits the size leaves.
    bars: [(u32, u32); 6],
    /// Where the next capability goes, and where its offset is written.
    next: (usize, usize),
}

impl Configuration {
    /// That of a function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut configuration = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [(0, 0); 6],
            next: (FIRST_CAPABILITY, header::CAPABILITIES),
        };
        configuration.set(header::VENDOR, &identity.vendor.to_le_bytes());
        configuration.set(header::VENDOR + 2, &identity.device.to_le_bytes());
        configuration.set(header::REVISION, &identity.class);
        configuration.set(header::SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        configuration.set(header::SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        configuration.set(header::COMMAND, &[MEMORY]);
        configuration.make_writable(header::COMMAND, &[MEMORY | MASTER]);
        configuration
    }

    /// Makes BAR `index` one of 32 bits with this address and size, a power of two from 16.
    pub fn add_bar(&mut self, index: usize, address: u32, size: u32) {
        self.set_bar(index, address, 0u32.wrapping_sub(size));
    }

    /// Makes BARs `index` and the next a prefetchable one of 64 bits with this address and size, a power of two from 16.
    pub fn add_wide_bar(&mut self, index: usize, address: u64, size: u64) {
        let mask = 0u64.wrapping_sub(size);
        self.set_bar(index, low(address) | WIDE_PREFETCHABLE, low(mask));
        self.set_bar(index + 1, high(address), high(mask));
    }

    fn set_bar(&mut self, index: usize, value: u32, mask: u32) {
        if let Some(bar) = self.bars.get_mut(index) {
            *bar = (value, mask);
            let offset = header::BARS + 4 * index;
            self.set(offset, &value.to_le_bytes());
        }
    }

    /// Adds a capability with that identifier and body, which follows the identifier and the link to the next. Gives its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let (offset, link) = self.next;
        self.set(header::STATUS, &[HAS_CAPABILITIES]);
        self.set(link, &[u8::try_from(offset).unwrap_or(0)]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.next = ((offset + 2 + body.len()).next_multiple_of(4), offset + 1);
        offset
    }

    /// Lets the guest write the bits of `mask`, which begins at `offset`.
    pub fn make_writable(&mut self, offset: usize, mask: &[u8]) {
        for (byte, mask) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *mask;
        }
    }

    /// Puts `data` at `offset`, whoever may write there.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, data) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *data;
        }
    }

    /// Reads what is there; beyond the end, zeros.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (data, byte) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *data = *byte;
        }
    }

    /// The `N` bytes at `offset`.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut data = [0; N];
        self.read(offset, &mut data);
        data
    }

    /// What the guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), data) in bytes.zip(data) {
            *byte = *byte & !writable | data & writable;
        }
        // A BAR has its address, but for a guest that has just written ones to find out the size.
        let bar = (offset / 4).checked_sub(header::BARS / 4);
        if let Some((value, mask)) = bar.and_then(|bar| self.bars.get(bar)) {
            let shown = if data == [0xff; 4] { mask } else { &0 } | value;
            self.set(offset & !3, &shown.to_le_bytes());
        }
    }
}

/// The host bridge has nothing but a header.
impl Function for Mutex<Configuration> {
    fn read_configuration(&self, offset: usize, data: &mut [u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    fn write_configuration(&self, offset: usize, data: &[u8]) {
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }
}

/// Bus 0, the only one.
pub struct PciBus {
    /// What the guest has written last to the address port.
    address: AtomicU32,
    /// The functions 0 of all devices.
    functions: Vec<Arc<dyn Function>>,
}

impl PciBus {
    /// A bus with a host bridge and these functions, as devices 1 and up.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Self {
        let bridge = Mutex::new(Configuration::new(HOST_BRIDGE));
        let mut all: Vec<Arc<dyn Function>> = vec![Arc::new(bridge)];
        all.extend(functions);
        Self {
            address: AtomicU32::new(0),
            functions: all,
        }
    }

    /// The register that a data port means: a function and the offset in its configuration space.
    fn find(&self, port: u16, length: usize) -> Option<(&dyn Function, usize)> {
        const ENABLED: u32 = 1 << 31;
        let byte = usize::from(port.checked_sub(layout::PCI_DATA_PORT)?);
        // Within one register, and not what a string instruction makes of several accesses.
        if !matches!(length, 1 | 2 | 4) || byte + length > 4 {
            return None;
        }
        let address = self.address.load(Ordering::Relaxed);
        // Bits 23 to 16 are the bus, 15 to 11 the device, 10 to 8 the function.
        if address & ENABLED == 0 || address & 0xff_0700 != 0 {
            return None;
        }
        let device = usize::try_from(address >> 11 & 0x1f).ok()?;
        let register = usize::try_from(address & 0xfc).ok()?;
        let function = self.functions.get(device)?;
        Some((function.as_ref(), register + byte))
    }

    /// The guest reads one of the ports from [`layout::PCI_ADDRESS_PORT`] on.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == layout::PCI_ADDRESS_PORT && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((function, offset)) = self.find(port, data.len()) {
            function.read_configuration(offset, data);
        }
    }

    /// The guest writes one of them.
    pub fn write(&self, port: u16, data: &[u8]) {
        if port == layout::PCI_ADDRESS_PORT
            && let Ok(address) = <[u8; 4]>::try_from(data)
        {
            // The other bits are reserved, and read as zero.
            let address = u32::from_le_bytes(address) & 0x80ff_fffc;
            self.address.store(address, Ordering::Relaxed);
        } else if let Some((function, offset)) = self.find(port, data.len()) {
            function.write_configuration(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1234,
        device: 0x5678,
        class: [1, 0, 0x80, 3],
        subsystem_vendor: 0x9abc,
        subsystem: 0xdef0,
    };

    fn bus() -> PciBus {
        let mut function = Configuration::new(IDENTITY);
        function.add_bar(0, 0xe000_0000, 0x8000);
        function.add_wide_bar(2, 0x10_0000_0000, 1 << 30);
        function.add_wide_bar(4, 0x20_0000_0000, 8 << 30);
        PciBus::new(vec![Arc::new(Mutex::new(function))])
    }

    fn select(bus: &PciBus, device: u32, register: u32) {
        let address = 1 << 31 | device << 11 | register;
        bus.write(0xcf8, &address.to_le_bytes());
    }

    fn read(bus: &PciBus, device: u32, register: u32) -> u32 {
        select(bus, device, register);
        let mut data = [0; 4];
        bus.read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(bus: &PciBus, device: u32, register: u32, value: u32) {
        select(bus, device, register);
        bus.write(0xcfc, &value.to_le_bytes());
    }

    #[test]
    fn a_scan_finds_the_host_bridge_and_the_function_and_nothing_else() {
        let bus = bus();
        assert_eq!(read(&bus, 0, 8) >> 16, 0x0600, "a host bridge");
        assert_eq!(read(&bus, 1, 0), 0x5678_1234);
        assert_eq!(read(&bus, 1, 8), 0x0380_0001);
        assert_eq!(read(&bus, 1, 0x2c), 0xdef0_9abc);
        for device in 2..32 {
            assert_eq!(read(&bus, device, 0), u32::MAX, "device {device}");
        }
        for function in 1..8 {
            assert_eq!(
                read(&bus, 0, function << 8),
                u32::MAX,
                "function {function}"
            );
        }
        assert_eq!(read(&bus, 1 << 5, 0), u32::MAX, "bus 1");
    }

    #[test]
    fn linux_finds_mechanism_1_by_its_address_port() {
        let bus = bus();
        bus.write(0xcfb, &[1]);
        bus.write(0xcf8, &0x8000_0000u32.to_le_bytes());
        let mut data = [0; 4];
        bus.read(0xcf8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        bus.write(0xcf8, &0u32.to_le_bytes());
        bus.read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4], "not enabled");
    }

    #[test]
    fn a_bar_tells_its_size_and_keeps_its_address_whatever_is_written() {
        let bus = bus();
        let addresses = [0xe000_0000, 0, 0xc, 0x10, 0xc, 0x20];
        let sizes = [0xffff_8000, 0, 0xc000_000c, u32::MAX, 0xc, 0xffff_fffe];
        for value in [0, 0x1234_5678, 0xd000_0000, 0xe000_0001] {
            for (bar, (address, size)) in (0..).zip(addresses.into_iter().zip(sizes)) {
                let register = 0x10 + 4 * bar;
                assert_eq!(read(&bus, 1, register), address, "BAR {bar}");
                write(&bus, 1, register, u32::MAX);
                assert_eq!(read(&bus, 1, register), size, "BAR {bar}");
                write(&bus, 1, register, value);
                assert_eq!(read(&bus, 1, register), address, "BAR {bar}");
            }
        }
        write(&bus, 1, 0x30, u32::MAX);
        assert_eq!(read(&bus, 1, 0x30), 0, "no expansion ROM");
    }

    #[test]
    fn only_the_command_register_of_a_header_can_be_written() {
        let bus = bus();
        for register in (0..0x100)
            .step_by(4)
            .filter(|at| !(0x10..0x28).contains(at))
        {
            let before = read(&bus, 1, register);
            write(&bus, 1, register, !before);
            let expected = if register == 4 { 0x4 } else { before };
            assert_eq!(read(&bus, 1, register), expected, "{register:#x}");
        }
    }

    #[test]
    fn parts_of_a_register_are_read_and_written_at_their_own_ports() {
        let bus = bus();
        select(&bus, 1, 0);
        for (port, length, expected) in [
            (0xcfc, 1, &[0x34][..]),
            (0xcff, 1, &[0x56]),
            (0xcfe, 2, &[0x78, 0x56]),
            (0xcfd, 4, &[0xff; 4]),
            (0xcfc, 3, &[0xff; 3]),
            (0xcf9, 1, &[0xff]),
            (0xcfc, 8, &[0xff; 8]),
        ] {
            let mut data = vec![0; length];
            bus.read(port, &mut data);
            assert_eq!(data, expected, "{length} bytes at {port:#x}");
        }
        select(&bus, 1, 4);
        bus.write(0xcfc, &[0]);
        assert_eq!(read(&bus, 1, 4), 0, "decoding is off");
    }
}
