//! The state in which the boot processor meets its kernel: registers, descriptor table, page tables.
//!
//! `vcpu` applies it to vCPU 0; the others wait for it to start them. Two ways in: 64-bit Linux boot
//! (long mode, addresses mapped one to one, RSI = zero page) and PVH (32-bit protected mode without
//! paging, EBX = start information).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout;

/// Where and how the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit entry point of the Linux boot protocol, at this guest-physical address.
    Linux64(u64),
    /// 32-bit entry point named by a PVH note, at this guest-physical address.
    Pvh(u64),
}

const CODE_SELECTOR: u16 = 0x10; // __BOOT_CS of the Linux boot protocol
const DATA_SELECTOR: u16 = 0x18; // __BOOT_DS
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10; // enabled, active

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;

/// RFLAGS with only its always-one bit: interrupts off.
const RFLAGS: u64 = 2;

/// Writes the descriptor table, and for 64-bit entry the page tables.
///
/// # Errors
///
/// When guest memory ends before the tables.
pub fn write_tables(memory: &GuestMemoryMmap, entry: Entry) -> Result<(), GuestMemoryError> {
    let code = match entry {
        Entry::Linux64(_) => CODE_64,
        Entry::Pvh(_) => CODE_32,
    };
    for (index, descriptor) in (0..).zip([0, 0, code, DATA]) {
        memory.write_obj::<u64>(descriptor, GuestAddress(layout::GDT + index * 8))?;
    }
    if let Entry::Pvh(_) = entry {
        return Ok(());
    }
    memory.write_obj(
        layout::PDPT | PAGE_PRESENT_WRITABLE,
        GuestAddress(layout::PML4),
    )?;
    for gib in 0..layout::IDENTITY_MAP_GIB {
        let directory = layout::PAGE_DIRECTORIES + gib * 0x1000;
        memory.write_obj(
            directory | PAGE_PRESENT_WRITABLE,
            GuestAddress(layout::PDPT + gib * 8),
        )?;
        for entry in 0..512 {
            let page = gib << 30 | entry << 21 | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            memory.write_obj(page, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

/// General registers at the kernel's first instruction.
pub fn general(entry: Entry) -> kvm_regs {
    let registers = kvm_regs {
        rflags: RFLAGS,
        rsp: layout::BOOT_STACK,
        ..Default::default()
    };
    match entry {
        Entry::Linux64(rip) => kvm_regs {
            rip,
            rsi: layout::ZERO_PAGE,
            ..registers
        },
        Entry::Pvh(rip) => kvm_regs {
            rip,
            rbx: layout::PVH_START_INFO,
            ..registers
        },
    }
}

/// Sets segments, control registers and descriptor-table registers; what KVM chose for the rest stays.
pub fn set_special(registers: &mut kvm_sregs, entry: Entry) {
    let long = matches!(entry, Entry::Linux64(_));
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0b1011, // execute, read, accessed
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0b0011,
        db: 1,
        l: 0,
        ..code
    };
    registers.cs = code;
    registers.ds = data;
    registers.es = data;
    registers.fs = data;
    registers.gs = data;
    registers.ss = data;
    registers.tr = kvm_segment {
        limit: 0x67,
        type_: 0b1011,
        present: 1,
        ..Default::default()
    };
    registers.gdt.base = layout::GDT;
    registers.gdt.limit = 4 * 8 - 1;
    registers.idt.base = 0;
    registers.idt.limit = 0;
    registers.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    registers.cr4 = 0;
    registers.efer = 0;
    if long {
        registers.cr0 |= CR0_NUMERIC_ERROR | CR0_PAGING;
        registers.cr3 = layout::PML4;
        registers.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
        registers.efer = EFER_LONG_MODE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddressSpace;

    #[test]
    fn the_boot_page_tables_map_the_first_four_gib_one_to_one() {
        let ram = crate::memory::Ram::new(2 << 20).unwrap();
        let memory = ram.map().memory();
        write_tables(&memory, Entry::Linux64(0)).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        let pdpt = read(layout::PML4) & !0xfff;
        for address in [0u64, 0x20_0000, 0x4000_0000, 0xd000_0000, 0xffe0_0000] {
            let directory = read(pdpt + (address >> 30) * 8) & !0xfff;
            let page = read(directory + (address >> 21 & 511) * 8);
            assert_eq!(page & !0x1f_ffff, address);
            assert_eq!(page & 0x83, 0x83);
        }
    }
}
