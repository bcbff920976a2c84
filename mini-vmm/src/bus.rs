//! The memory-mapped I/O bus: which device answers at which guest-physical address.
//!
//! `vm` fills it before the first vCPU runs; every vCPU thread then reads it without a lock. A device
//! takes `&self` and guards its own state, so that two vCPUs contend only where a device makes them.

use std::fmt;
use std::sync::Arc;

use pvgpu_host_proxy::sandbox::Allowed;
use vmm_sys_util::eventfd::EventFd;

/// A device with registers in guest-physical memory. Both methods run on the vCPU thread that made
/// the access and must neither block for long nor panic, whatever the guest writes.
pub trait MmioDevice: Send + Sync {
    /// Answers a read of `data.len()` bytes (1 to 8) at `offset` from the window's base.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data.len()` bytes (1 to 8) at `offset` from the window's base.
    fn write(&self, offset: u64, data: &[u8]);
    /// What these may ask of the kernel, beside what every device of mini-vmm may.
    fn system_calls(&self) -> &[Allowed] {
        &[]
    }
}

/// A device and the window it answers in.
#[derive(Clone)]
pub struct Attachment {
    /// Guest-physical address of the window's first byte.
    pub base: u64,
    /// Length of the window in bytes.
    pub size: u64,
    /// What answers.
    pub device: Arc<dyn MmioDevice>,
    /// Writes that signal an event in the kernel instead of leaving the guest.
    pub doorbells: Vec<Doorbell>,
    /// Events that raise an interrupt line when signalled.
    pub interrupts: Vec<Interrupt>,
}

/// An ioeventfd: a write at `offset` signals `event` and never reaches the device.
#[derive(Clone)]
pub struct Doorbell {
    /// Offset from the base of the device's window.
    pub offset: u64,
    /// Only 32-bit writes of this value, or every write that begins there.
    pub value: Option<u32>,
    /// What is signalled.
    pub event: Arc<EventFd>,
}

/// An irqfd: signalling `event` raises interrupt line `line`.
#[derive(Clone)]
pub struct Interrupt {
    /// Global interrupt number; 0 to 15 are the ISA lines that the MP table describes.
    pub line: u32,
    /// What raises it.
    pub event: Arc<EventFd>,
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device at {:#x}+{:#x}", self.base, self.size)
    }
}

/// Two devices claim the same address, or one claims none or too many.
#[derive(Debug, thiserror::Error)]
#[error("the device window {base:#x}+{size:#x} is empty or overlaps another device: move it")]
pub struct Overlap {
    base: u64,
    size: u64,
}

/// All attached devices, by ascending address.
#[derive(Debug, Default)]
pub struct Bus {
    devices: Vec<Attachment>,
}

impl Bus {
    /// Adds a device.
    ///
    /// # Errors
    ///
    /// [`Overlap`] when its window is empty, wraps around or overlaps another one.
    pub fn attach(&mut self, device: Attachment) -> Result<(), Overlap> {
        let overlap = Overlap {
            base: device.base,
            size: device.size,
        };
        let Some(end) = device
            .base
            .checked_add(device.size)
            .filter(|_| device.size != 0)
        else {
            return Err(overlap);
        };
        // Sums of attached windows do not overflow: they passed this check.
        if self
            .devices
            .iter()
            .any(|d| device.base < d.base + d.size && d.base < end)
        {
            return Err(overlap);
        }
        self.devices.push(device);
        self.devices.sort_by_key(|d| d.base);
        Ok(())
    }

    /// Every device, lowest address first.
    pub fn devices(&self) -> &[Attachment] {
        &self.devices
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn MmioDevice, u64)> {
        let device = self
            .devices
            .iter()
            .find(|d| address >= d.base && address - d.base < d.size)?;
        let offset = address - device.base;
        // An access across the end of a window belongs to nobody.
        let end = offset.checked_add(length as u64)?;
        (end <= device.size).then_some((device.device.as_ref(), offset))
    }

    /// Reads from the device at `address`; where there is none all bits read as one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; where there is none nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn window(base: u64, size: u64) -> (Arc<Recorder>, Attachment) {
        let device = Arc::new(Recorder::default());
        let attachment = Attachment {
            base,
            size,
            device: device.clone(),
            doorbells: vec![],
            interrupts: vec![],
        };
        (device, attachment)
    }

    #[test]
    fn an_access_reaches_the_device_whose_window_holds_it() {
        let mut bus = Bus::default();
        let (low, attachment) = window(0x1000, 0x100);
        bus.attach(attachment).unwrap();
        let (high, attachment) = window(0x1100, 0x100);
        bus.attach(attachment).unwrap();
        bus.write(0x1104, &[1, 2, 3, 4]);
        assert!(low.0.lock().unwrap().is_empty());
        assert_eq!(*high.0.lock().unwrap(), [(4, vec![1, 2, 3, 4])]);
        let mut data = [0; 4];
        bus.read(0x1008, &mut data);
        assert_eq!(data, [8; 4]);
    }

    #[test]
    fn an_address_without_a_device_reads_all_ones_and_swallows_writes() {
        let mut bus = Bus::default();
        let (device, attachment) = window(0x1000, 0x100);
        bus.attach(attachment).unwrap();
        let mut data = [0; 8];
        for address in [0, 0xfff, 0x1100, 0x10fc, u64::MAX] {
            data.fill(0);
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 8], "{address:#x}");
            bus.write(address, &data);
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_windows_are_refused() {
        let mut bus = Bus::default();
        bus.attach(window(0x1000, 0x100).1).unwrap();
        for (base, size) in [
            (0x10ff, 1),
            (0xfff, 2),
            (0x1000, 0x100),
            (0, 0x2000),
            (0x3000, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.attach(window(base, size).1).is_err(),
                "{base:#x}+{size:#x}"
            );
        }
        bus.attach(window(0x1100, 1).1).unwrap();
    }
}
