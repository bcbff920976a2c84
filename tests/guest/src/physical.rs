//! Guest-physical memory that is not Rust's: the boot loader's data below 1 MiB, and device registers from 3 GiB up.
//!
//! Everything is mapped one to one (`ring0/tables.s`), so an address is a pointer. The functions here are safe because
//! each of them refuses addresses outside of its own region, and no Rust object lives in any of these regions.
#![allow(unsafe_code)]

use core::ptr;

/// Where the boot loader's data may lie: above the null page, below the guard page of the stack.
const BOOT_DATA: core::ops::Range<u64> = 0x1000..0x10_0000;
/// Where device registers are.
const DEVICES: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;

/// The boot loader's data at `address`, or nothing when it does not lie below 1 MiB.
pub fn boot_data(address: u64, length: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(u64::try_from(length).ok()?)?;
    if address < BOOT_DATA.start || end > BOOT_DATA.end {
        return None;
    }
    let address = usize::try_from(address).ok()?;
    // SAFETY: the range is mapped RAM that nobody writes to once the guest runs: the heap starts behind the image, the
    // stack lies above 1 MiB, and no device is ever given an address down here.
    Some(unsafe { core::slice::from_raw_parts(ptr::with_exposed_provenance(address), length) })
}

/// The 32-bit registers of a device.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    base: u64,
    size: u64,
}

impl Registers {
    /// The registers at guest-physical `base`, `size` bytes long; nothing when they do not lie in `3 GiB..4 GiB`.
    pub const fn new(base: u64, size: u64) -> Option<Self> {
        let Some(end) = base.checked_add(size) else {
            return None;
        };
        if base < DEVICES.start || end > DEVICES.end || !base.is_multiple_of(4) {
            return None;
        }
        Some(Self { base, size })
    }

    /// Guest-physical address of the first register.
    pub fn base(self) -> u64 {
        self.base
    }

    fn register(self, offset: u64) -> *mut u32 {
        assert!(
            offset.is_multiple_of(4) && offset < self.size,
            "register {offset:#x} outside of the device"
        );
        ptr::with_exposed_provenance_mut((self.base + offset) as usize)
    }

    /// Reads the register at `offset`.
    pub fn read(self, offset: u64) -> u32 {
        // SAFETY: a mapped device register, as checked here and in `new`.
        unsafe { self.register(offset).read_volatile() }
    }

    /// Writes the register at `offset`.
    pub fn write(self, offset: u64, value: u32) {
        // SAFETY: a mapped device register, as checked here and in `new`; which guest memory a device may write to is
        // decided by whoever tells it the addresses.
        unsafe { self.register(offset).write_volatile(value) };
    }
}
