//! mini-vmm's debug device from a Linux program: ends the VM with an exit code. `l2-init` calls it; the machine
//! announces where the device is on the kernel's command line.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

/// Size of the device's registers in guest-physical memory.
const SIZE: usize = 0x1000;

/// Where `pvgpu.debug=0xADDRESS` on a kernel command line says that the device is.
pub fn announced_address(command_line: &str) -> Option<u64> {
    let address = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("pvgpu.debug=0x"))?;
    u64::from_str_radix(address, 16).ok()
}

/// Writes `code` to the register at offset 0 of the device at guest-physical `address`, which ends the VM.
/// Returns only if it does not.
pub fn end_vm(address: u64, code: u32) -> io::Result<()> {
    let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
    let offset = i64::try_from(address).map_err(io::Error::other)?;
    // SAFETY: a new shared mapping at an address of the kernel's choice touches no other memory.
    let registers = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            protection,
            libc::MAP_SHARED,
            memory.as_raw_fd(),
            offset,
        )
    };
    if registers == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is SIZE bytes long and aligned to a page; nothing else uses it.
    unsafe { registers.cast::<u32>().write_volatile(code) };
    // SAFETY: mapped above, used no more.
    unsafe { libc::munmap(registers, SIZE) };
    Ok(())
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
