//! mini-vmm's debug device from a Linux program: ends the VM with an exit code, or hands bytes out to its host. The first
//! processes of Linux guests call it; the machine announces where the device is on the kernel's command line.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

/// Size of the device's registers in guest-physical memory.
const SIZE: usize = 0x1000;

/// Offsets of its registers, as `mini-vmm/src/debug.rs` has them.
mod register {
    pub const EXIT: usize = 0x00;
    pub const ADDRESS_LOW: usize = 0x08;
    pub const ADDRESS_HIGH: usize = 0x0c;
    pub const LENGTH: usize = 0x10;
    pub const DUMP: usize = 0x14;
}

/// Where `pvgpu.debug=0xADDRESS` on a kernel command line says that the device is.
pub fn announced_address(command_line: &str) -> Option<u64> {
    let address = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pvgpu.debug=0x"))?;
    u64::from_str_radix(address, 16).ok()
}

/// Writes `code` to the device at guest-physical `address`, which ends the VM. Returns only if it does not.
pub fn end_vm(address: u64, code: u32) -> io::Result<()> {
    Mapping::of_registers(address)?.write(register::EXIT, code);
    Ok(())
}

/// Hands `bytes` out to the host as the VM's dump, which replaces an earlier one. At most [`HUGE_PAGE`] bytes.
pub fn dump(address: u64, bytes: &[u8]) -> io::Result<()> {
    let registers = Mapping::of_registers(address)?;
    let page = Mapping::of_huge_page(bytes)?;
    let physical = page.physical_address()?;
    registers.write(register::ADDRESS_LOW, physical as u32);
    registers.write(register::ADDRESS_HIGH, (physical >> 32) as u32);
    registers.write(
        register::LENGTH,
        u32::try_from(bytes.len()).map_err(io::Error::other)?,
    );
    registers.write(register::DUMP, 1);
    match registers.read(register::DUMP) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
    }
}

/// Size of a huge page of x86-64, the largest piece of memory that a program can have in one piece: 2 MiB.
pub const HUGE_PAGE: usize = 2 << 20;

/// Size of a page.
const PAGE: u64 = 4096;

/// Memory that was mapped here and is unmapped with this value.
struct Mapping {
    start: *mut libc::c_void,
    size: usize,
}

impl Mapping {
    /// The device's registers.
    fn of_registers(address: u64) -> io::Result<Mapping> {
        let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
        let offset = i64::try_from(address).map_err(io::Error::other)?;
        Mapping::new(SIZE, libc::MAP_SHARED, memory.as_raw_fd(), offset)
    }

    /// A huge page that starts with `bytes`. The kernel is asked for one, and has it soon after it has booted.
    fn of_huge_page(bytes: &[u8]) -> io::Result<Mapping> {
        if bytes.len() > HUGE_PAGE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        fs::write("/proc/sys/vm/nr_hugepages", "1")?;
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
        let page = Mapping::new(HUGE_PAGE, how, -1, 0)?;
        // SAFETY: the mapping has HUGE_PAGE writable bytes, at least as many as are copied, and nothing else uses it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.start.cast(), bytes.len());
        }
        Ok(page)
    }

    fn new(size: usize, how: libc::c_int, file: RawFd, offset: i64) -> io::Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), size, protection, how, file, offset) };
        match start == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Mapping { start, size }),
        }
    }

    fn register(&self, offset: usize) -> *mut u32 {
        assert!(offset.is_multiple_of(4) && offset < self.size);
        self.start.wrapping_byte_add(offset).cast()
    }

    fn write(&self, offset: usize, value: u32) {
        // SAFETY: within the mapping, aligned, and a register, which nothing but the device sees.
        unsafe { self.register(offset).write_volatile(value) };
    }

    fn read(&self, offset: usize) -> u32 {
        // SAFETY: as above.
        unsafe { self.register(offset).read_volatile() }
    }

    /// Where the mapping's first page is in guest-physical memory, by `/proc/self/pagemap` (Linux,
    /// Documentation/admin-guide/mm/pagemap.rst).
    fn physical_address(&self) -> io::Result<u64> {
        let mut entry = [0; 8];
        let place = self.start as u64 / PAGE * 8;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, place)?;
        match u64::from_le_bytes(entry) & ((1 << 55) - 1) {
            0 => Err(io::Error::other(
                "the kernel does not say where a page is: is this the superuser?",
            )),
            number => Ok(number * PAGE),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, used no more.
        unsafe { libc::munmap(self.start, self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_the_command_line() {
        let line = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 pvgpu.debug=0xd0001000\n";
        assert_eq!(announced_address(line), Some(0xd000_1000));
        assert_eq!(announced_address("console=ttyS0"), None);
    }
}
