//! The zero page (`struct boot_params` of Linux's boot protocol): memory map and command line.
//!
//! Offsets are those of `Documentation/arch/x86/zero-page.rst` and `boot.rst`.

use crate::physical::boot_data;

/// Size of the zero page.
const SIZE: usize = 4096;
/// u8: number of entries in the memory map.
const E820_ENTRIES: usize = 0x1e8;
/// u32: address of the command line.
const CMD_LINE_PTR: usize = 0x228;
/// The memory map: entries of u64 address, u64 size, u32 type.
const E820_TABLE: usize = 0x2d0;
/// Size of an entry.
const E820_ENTRY: usize = 20;
/// Most entries that the zero page has room for.
const E820_MAX: usize = 128;
/// Type of an entry that is RAM.
const E820_RAM: u32 = 1;
/// Longest command line read.
const COMMAND_LINE_MAX: usize = 4096;

/// The boot loader's zero page.
#[derive(Debug, Clone, Copy)]
pub struct BootParams(&'static [u8]);

/// A piece of RAM.
#[derive(Debug, Clone, Copy)]
pub struct Ram {
    /// First guest-physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

impl BootParams {
    /// The zero page at `address`; nothing when it does not lie below 1 MiB.
    pub fn at(address: u64) -> Option<Self> {
        Some(Self(boot_data(address, SIZE)?))
    }

    /// The RAM of the machine, in the boot loader's order.
    pub fn ram(self) -> impl Iterator<Item = Ram> {
        let count = usize::from(self.0[E820_ENTRIES]).min(E820_MAX);
        self.0[E820_TABLE..E820_TABLE + count * E820_ENTRY]
            .chunks_exact(E820_ENTRY)
            .filter(|entry| u32_at(entry, 16) == E820_RAM)
            .map(|entry| Ram {
                start: u64_at(entry, 0),
                size: u64_at(entry, 8),
            })
    }

    /// The kernel command line, up to its terminating zero; what is not UTF-8 ends it.
    pub fn command_line(self) -> &'static str {
        let address = u64::from(u32_at(self.0, CMD_LINE_PTR));
        let room = usize::try_from(0x10_0000u64.saturating_sub(address)).unwrap_or(0);
        let Some(bytes) = boot_data(address, COMMAND_LINE_MAX.min(room)) else {
            return "";
        };
        let line = bytes.split(|byte| *byte == 0).next().unwrap_or(bytes);
        match core::str::from_utf8(line) {
            Ok(line) => line,
            Err(error) => core::str::from_utf8(&line[..error.valid_up_to()]).unwrap_or(""),
        }
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}
