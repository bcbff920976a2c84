//! Guest-physical memory that is not Rust's: the boot loader's data below 1 MiB, device registers from 3 GiB up, and the
//! aperture from 64 GiB up.
//!
//! Everything is mapped one to one (`ring0/tables.s`), so an address is a pointer. The functions here are safe because
//! each of them refuses addresses outside of its own region, and no Rust object lives in any of these regions.
#![allow(unsafe_code)]

use core::ptr::{self, NonNull};

use pvgpu_guest_driver::baremetal::mmio;
use pvgpu_guest_driver::baremetal::{MmioError, MmioTransport, SharedMemory};

use crate::dma::Pages;

/// Where the boot loader's data may lie: above the null page, below the guard page of the stack.
const BOOT_DATA: core::ops::Range<u64> = 0x1000..0x10_0000;
/// Where device registers are.
const DEVICES: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;

/// Where the aperture may be (`page_directory_aperture` in `ring0/tables.s`).
const APERTURE: core::ops::Range<u64> = 0x10_0000_0000..0x12_0000_0000;

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

    /// The virtio-mmio device with these registers, for this guest's one driver of it.
    pub fn virtio_mmio(self) -> Result<MmioTransport<'static>, MmioError> {
        assert!(self.size >= size_of::<mmio::Registers>() as u64);
        let registers = NonNull::new(self.register(0)).map(NonNull::cast);
        // SAFETY: mapped device registers for ever, as checked in `new`, and enough of them; only `gpu` calls this, and only for the
        // window that the command line announces.
        registers.map_or(Err(MmioError::NoDevice(0)), |registers| unsafe {
            MmioTransport::new(registers)
        })
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

/// Accesses that are not as wide as a register, for what a hostile driver does.
impl Registers {
    fn place(self, offset: u64, width: u64) -> usize {
        assert!(
            offset.is_multiple_of(width) && offset + width <= self.size,
            "{width} bytes at {offset:#x} outside of the device"
        );
        (self.base + offset) as usize
    }

    /// Writes 8 bits.
    pub fn write_byte(self, offset: u64, value: u8) {
        let place = ptr::with_exposed_provenance_mut::<u8>(self.place(offset, 1));
        // SAFETY: as for `write`.
        unsafe { place.write_volatile(value) };
    }

    /// Writes 16 bits.
    pub fn write_half(self, offset: u64, value: u16) {
        let place = ptr::with_exposed_provenance_mut::<u16>(self.place(offset, 2));
        // SAFETY: as for `write`.
        unsafe { place.write_volatile(value) };
    }

    /// Reads 64 bits.
    pub fn read_double(self, offset: u64) -> u64 {
        let place = ptr::with_exposed_provenance::<u64>(self.place(offset, 8));
        // SAFETY: as for `read`.
        unsafe { place.read_volatile() }
    }
}

/// Memory of a buffer object, a range of the aperture or pages that show it: the host may change it at any time, so it is only
/// ever copied.
#[derive(Debug)]
pub struct SharedRange {
    start: *mut u8,
    length: usize,
}

impl SharedRange {
    /// `length` bytes at `offset` of the aperture; nothing when that is not inside of it, or of what the guest has mapped.
    pub fn new(aperture: SharedMemory, offset: u64, length: u64) -> Option<Self> {
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= aperture.size)?;
        if aperture.address < APERTURE.start || aperture.address.checked_add(end)? > APERTURE.end {
            return None;
        }
        let start = usize::try_from(aperture.address + offset).ok()?;
        Some(Self {
            start: ptr::with_exposed_provenance_mut(start),
            length: usize::try_from(length).ok()?,
        })
    }

    /// All of these pages.
    pub fn of_pages(pages: &Pages) -> Self {
        Self {
            start: ptr::with_exposed_provenance_mut(pages.address() as usize),
            length: pages.len(),
        }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let inside = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.length);
        assert!(
            inside,
            "{length} bytes at {offset} are outside of a mapping of {} bytes",
            self.length
        );
        self.start.wrapping_add(offset)
    }

    /// Copies the bytes at `offset` out of it.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len());
        // SAFETY: checked above: mapped, inside of the aperture or of such pages, where no Rust object lives; a concurrent change of
        // the host's gives other bytes, as on any machine, and memcpy (`memory_functions.s`) does not mind.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes into it at `offset`.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: as for `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }
}
