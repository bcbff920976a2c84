//! Port I/O: the serial port, the PCI bus, the CMOS clock's few registers that kernels look at, and the reset line.
//!
//! vCPU threads call it for every port exit. KVM itself has the interrupt controllers and the timer.
//! Ports that nobody answers read as all ones, as on a PC.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::layout;
use crate::pci::PciBus;
use crate::serial::Port;
use crate::stop::{Ending, Stop};

/// Everything behind the machine's I/O ports.
pub struct Ports {
    serial: Port,
    pci: Option<PciBus>,
    stop: Stop,
    cmos_index: AtomicU8,
}

impl Ports {
    /// Ports with this serial port and PCI bus; a reset ends the machine through `stop`.
    pub fn new(serial: Port, pci: Option<PciBus>, stop: Stop) -> Self {
        Self {
            serial,
            pci,
            stop,
            cmos_index: AtomicU8::new(0),
        }
    }

    /// The register of the serial port that `port` is, if it is one.
    fn serial_register(port: u16) -> Option<u8> {
        let register = port.checked_sub(layout::SERIAL_PORT)?;
        u8::try_from(register)
            .ok()
            .filter(|_| register < layout::SERIAL_PORTS)
    }

    /// The PCI bus, if `port` is one of its ports.
    fn pci_bus(&self, port: u16) -> Option<&PciBus> {
        let ports = layout::PCI_ADDRESS_PORT..=layout::PCI_LAST_PORT;
        self.pci.as_ref().filter(|_| ports.contains(&port))
    }

    /// The guest wrote `data` to `port`. A string instruction's bytes all go to the same register.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some(register) = Self::serial_register(port) {
            for byte in data {
                self.serial.write(register, *byte);
            }
            return;
        }
        if let Some(pci) = self.pci_bus(port) {
            pci.write(port, data);
            return;
        }
        match (port, data.first()) {
            (layout::I8042_COMMAND_PORT, Some(&layout::I8042_RESET)) => {
                self.stop.end(Ending::Reset)
            }
            // The top bit masks the non-maskable interrupt; it is no part of the index.
            (layout::CMOS_INDEX_PORT, Some(index)) => {
                self.cmos_index.store(index & 0x7f, Ordering::Relaxed)
            }
            _ => {}
        }
    }

    /// The guest reads `data.len()` bytes from `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = Self::serial_register(port) {
            for byte in data {
                *byte = self.serial.read(register);
            }
            return;
        }
        if let Some(pci) = self.pci_bus(port) {
            pci.read(port, data);
            return;
        }
        data.fill(match port {
            layout::CMOS_DATA_PORT => cmos(self.cmos_index.load(Ordering::Relaxed)),
            _ => 0xff,
        });
    }
}

/// A CMOS clock that stands still at 2000-01-01: valid (a kernel that reads all ones here waits
/// seconds for an update to end), never updating.
fn cmos(index: u8) -> u8 {
    match index {
        0x07 | 0x08 => 1, // day of the month, month
        0x0b => 0x02,     // status B: 24-hour clock, BCD
        0x0d => 0x80,     // status D: the clock's battery is good
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> (Stop, Ports) {
        let stop = Stop::new().unwrap();
        let serial = Port::new(Box::new(std::io::sink())).unwrap();
        (stop.clone(), Ports::new(serial, None, stop))
    }

    #[test]
    fn the_keyboard_controllers_reset_command_resets_the_machine() {
        let (stop, ports) = ports();
        ports.write(layout::I8042_COMMAND_PORT, &[0x20]);
        assert_eq!(stop.ending(), None);
        ports.write(layout::I8042_COMMAND_PORT, &[layout::I8042_RESET]);
        assert_eq!(stop.ending(), Some(Ending::Reset));
    }

    #[test]
    fn unclaimed_ports_read_all_ones() {
        let (_stop, ports) = ports();
        for port in [0, 0x64, 0x3f7, 0x400, 0xcf8, 0xffff] {
            let mut data = [0; 4];
            ports.read(port, &mut data);
            assert_eq!(data, [0xff; 4], "{port:#x}");
        }
    }

    #[test]
    fn the_clock_never_reports_an_update_in_progress() {
        let (_stop, ports) = ports();
        for index in 0..=255 {
            ports.write(layout::CMOS_INDEX_PORT, &[index]);
            let mut data = [0xaa];
            ports.read(layout::CMOS_DATA_PORT, &mut data);
            if index & 0x7f == 0x0a {
                assert_eq!(data[0] & 0x80, 0);
            }
            assert_ne!(data[0], 0xff, "{index:#x}");
        }
    }
}
