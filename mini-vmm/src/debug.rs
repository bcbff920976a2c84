//! The debug device: how a test guest ends the machine, measures a bare exit and hands out a result.
//!
//! Registers are 32 bits wide, little-endian:
//!
//! | offset | write | read |
//! | --- | --- | --- |
//! | 0x00 | ends the machine with this code | 0 |
//! | 0x04 | nothing: the bare MMIO exit that benchmarks measure | 0 |
//! | 0x08 | low half of a guest-physical address | that half |
//! | 0x0c | high half of a guest-physical address | that half |
//! | 0x10 | length in bytes | that length |
//! | 0x14 | 1: dumps that range of RAM, replacing an earlier dump | errno of the last dump, 0 = done |
//!
//! vCPU threads call it through the bus. A guest may write anything: no access may panic, and the
//! size of what it can make the host store is bounded.

use std::fs::File;
use std::io::{Seek, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};

use crate::bus::MmioDevice;
use crate::stop::{Ending, Stop};

/// Register offsets.
pub mod register {
    /// Ends the machine.
    pub const EXIT: u64 = 0x00;
    /// Does nothing.
    pub const NOTHING: u64 = 0x04;
    /// Low half of the address to dump.
    pub const ADDRESS_LOW: u64 = 0x08;
    /// High half of the address to dump.
    pub const ADDRESS_HIGH: u64 = 0x0c;
    /// Number of bytes to dump.
    pub const LENGTH: u64 = 0x10;
    /// Dumps; reads the result.
    pub const DUMP: u64 = 0x14;
}

/// Longest dump kept in memory, in bytes: a picture, not the whole RAM.
pub const MAX_DUMP_IN_MEMORY: usize = 256 << 20;

/// Where a dump goes.
#[derive(Debug)]
pub enum DumpTarget {
    /// This file, open for writing; each dump replaces what is in it.
    File(File),
    /// The machine's outcome.
    Memory,
}

/// The device.
#[derive(Debug)]
pub struct Debug {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    stop: Stop,
    target: Option<DumpTarget>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    address: u64,
    length: u32,
    result: u32,
    warned: bool,
    dump: Option<Vec<u8>>,
}

impl Debug {
    /// A device that dumps ranges of `memory` to `target` and ends the machine through `stop`.
    pub fn new(
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        stop: Stop,
        target: Option<DumpTarget>,
    ) -> Self {
        Self {
            memory,
            stop,
            target,
            state: Mutex::default(),
        }
    }

    /// Takes the last dump kept in memory, if there was one.
    pub fn take_dump(&self) -> Option<Vec<u8>> {
        self.state().dump.take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs a dump; the error is an errno.
    fn dump(&self, state: &mut State) -> Result<(), i32> {
        let length = usize::try_from(state.length).map_err(|_| libc::E2BIG)?;
        let address = GuestAddress(state.address);
        let memory = self.memory.memory();
        if !GuestMemoryBackend::check_range(&*memory, address, length) {
            return Err(libc::EFAULT);
        }
        match &self.target {
            None => {
                if !std::mem::replace(&mut state.warned, true) {
                    log::warn!(
                        "the guest asked for a dump of its memory, but there is no --dump FILE to write it to"
                    );
                }
                Err(libc::ENODEV)
            }
            Some(DumpTarget::Memory) => {
                if length > MAX_DUMP_IN_MEMORY {
                    return Err(libc::E2BIG);
                }
                let mut bytes = vec![0; length];
                memory
                    .read_slice(&mut bytes, address)
                    .map_err(|_| libc::EFAULT)?;
                state.dump = Some(bytes);
                Ok(())
            }
            Some(DumpTarget::File(file)) => {
                let write = || -> std::io::Result<()> {
                    let mut file = file.try_clone()?;
                    file.set_len(0)?;
                    file.rewind()?;
                    memory
                        .write_all_volatile_to(address, &mut file, length)
                        .map_err(std::io::Error::other)?;
                    file.flush()
                };
                write().map_err(|error| {
                    if !std::mem::replace(&mut state.warned, true) {
                        log::warn!("cannot write the guest's dump to its file: {error}");
                    }
                    error.raw_os_error().unwrap_or(libc::EIO)
                })
            }
        }
    }
}

impl MmioDevice for Debug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        let value = match offset {
            register::ADDRESS_LOW => (state.address & 0xffff_ffff) as u32,
            register::ADDRESS_HIGH => (state.address >> 32) as u32,
            register::LENGTH => state.length,
            register::DUMP => state.result,
            _ => 0,
        };
        if data.len() == 4 {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::NOTHING => {}
            register::EXIT => self.stop.end(Ending::Exit { code: value }),
            register::ADDRESS_LOW => {
                let mut state = self.state();
                state.address = (state.address & !0xffff_ffff) | u64::from(value);
            }
            register::ADDRESS_HIGH => {
                let mut state = self.state();
                state.address = (state.address & 0xffff_ffff) | (u64::from(value) << 32);
            }
            register::LENGTH => self.state().length = value,
            register::DUMP if value == 1 => {
                let mut state = self.state();
                state.result = match self.dump(&mut state) {
                    Ok(()) => 0,
                    Err(errno) => errno.unsigned_abs(),
                };
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;

    fn device(target: Option<DumpTarget>) -> (Ram, Stop, Debug) {
        let ram = Ram::new(2 << 20).unwrap();
        let stop = Stop::new().unwrap();
        let debug = Debug::new(ram.map().clone(), stop.clone(), target);
        (ram, stop, debug)
    }

    fn dump(debug: &Debug, address: u64, length: u32) -> i32 {
        debug.write(register::ADDRESS_LOW, &(address as u32).to_le_bytes());
        debug.write(
            register::ADDRESS_HIGH,
            &((address >> 32) as u32).to_le_bytes(),
        );
        debug.write(register::LENGTH, &length.to_le_bytes());
        debug.write(register::DUMP, &1u32.to_le_bytes());
        let mut result = [0xff; 4];
        debug.read(register::DUMP, &mut result);
        i32::from_le_bytes(result)
    }

    #[test]
    fn a_write_to_the_exit_register_ends_the_machine_with_that_code() {
        let (_ram, stop, debug) = device(None);
        debug.write(register::NOTHING, &1u32.to_le_bytes());
        debug.write(register::EXIT, &[1]);
        assert_eq!(
            stop.ending(),
            None,
            "neither the idle register nor a byte access ends it"
        );
        debug.write(register::EXIT, &0x1234u32.to_le_bytes());
        assert_eq!(stop.ending(), Some(Ending::Exit { code: 0x1234 }));
    }

    #[test]
    fn a_dump_holds_the_bytes_of_the_range() {
        let (ram, _stop, debug) = device(Some(DumpTarget::Memory));
        ram.map()
            .memory()
            .write_slice(b"picture", GuestAddress(0x1ff000))
            .unwrap();
        assert_eq!(dump(&debug, 0x1ff000, 7), 0);
        assert_eq!(debug.take_dump().as_deref(), Some(&b"picture"[..]));
    }

    #[test]
    fn a_later_dump_replaces_the_file_of_an_earlier_one() {
        let path = std::env::temp_dir().join(format!("mini-vmm-dump-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        let (ram, _stop, debug) = device(Some(DumpTarget::File(file)));
        ram.map()
            .memory()
            .write_slice(b"first, long", GuestAddress(0x1000))
            .unwrap();
        assert_eq!(dump(&debug, 0x1000, 11), 0);
        assert_eq!(dump(&debug, 0x1000, 5), 0);
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_range_outside_ram_is_a_fault_and_no_target_is_no_device() {
        let (_ram, _stop, debug) = device(Some(DumpTarget::Memory));
        for (address, length) in [
            (2 << 20, 1),
            ((2 << 20) - 1, 2),
            (u64::MAX, 4),
            (0, u32::MAX),
            (1 << 36, 1),
        ] {
            assert_eq!(
                dump(&debug, address, length),
                libc::EFAULT,
                "{address:#x}+{length:#x}"
            );
        }
        let (_ram, _stop, debug) = device(None);
        assert_eq!(dump(&debug, 0, 1), libc::ENODEV);
    }
}
