//! mini-vmm's debug device (`pvgpu.debug=ADDRESS` on the command line): the exit code, and files of guest memory for the host.

use core::sync::atomic::Ordering;

use crate::physical::Registers;
use crate::{println, ring0};

/// Size of its register window.
pub const SIZE: u64 = 0x1000;
/// Write: the VM ends, and this is the process's exit code.
const EXIT: u64 = 0x00;
/// Write: nothing happens but the exit to the VMM.
const NOTHING: u64 = 0x04;
/// Guest-physical address of the memory to dump, low and high half.
const DUMP_ADDRESS: u64 = 0x08;
/// Length of the memory to dump in bytes.
const DUMP_LENGTH: u64 = 0x10;
/// Write 1: dump now. Read: 0, or the errno with which it failed.
const DUMP: u64 = 0x14;
/// Keyboard controller: command port, and its command that resets the machine.
const KEYBOARD_CONTROLLER: (u16, u8) = (0x64, 0xfe);

/// The debug device.
#[derive(Debug, Clone, Copy)]
pub struct DebugDevice(Registers);

impl DebugDevice {
    /// The device at `address`, from now on also [`exit`]'s; nothing when that is no device address.
    pub fn at(address: u64) -> Option<Self> {
        let registers = Registers::new(address, SIZE)?;
        ring0::exit_address().store(address, Ordering::Relaxed);
        Some(Self(registers))
    }

    /// Guest-physical address of the device.
    pub fn address(self) -> u64 {
        self.0.base()
    }

    /// One bare exit to the VMM, which does nothing: the floor of what a doorbell costs.
    pub fn do_nothing(self) {
        self.0.write(NOTHING, 0);
    }

    /// Has the VMM write `bytes` to the file of its `--dump FILE`. Err is the errno.
    pub fn dump(self, bytes: &[u8]) -> Result<(), u32> {
        let address = bytes.as_ptr().addr() as u64;
        self.0.write(DUMP_ADDRESS, (address & 0xffff_ffff) as u32);
        self.0.write(DUMP_ADDRESS + 4, (address >> 32) as u32);
        self.0
            .write(DUMP_LENGTH, u32::try_from(bytes.len()).map_err(|_| 7u32)?); // E2BIG
        self.0.write(DUMP, 1);
        match self.0.read(DUMP) {
            0 => Ok(()),
            errno => Err(errno),
        }
    }
}

/// Ends the VM with this exit code. Where no debug device answers, resets the machine, and then halts for ever.
pub fn exit(code: u32) -> ! {
    if let Some(registers) = Registers::new(ring0::exit_address().load(Ordering::Relaxed), SIZE) {
        registers.write(EXIT, code);
    }
    println!("no debug device took exit code {code}: resetting");
    ring0::port_write(KEYBOARD_CONTROLLER.0, KEYBOARD_CONTROLLER.1);
    let counter = &ring0::interrupts()[0];
    loop {
        ring0::sleep_while(counter, counter.load(Ordering::Relaxed));
    }
}
