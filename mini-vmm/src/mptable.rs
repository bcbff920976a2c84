//! The Intel MultiProcessor table: how a kernel without ACPI learns of processors and interrupt lines.
//!
//! `boot` writes it below 640 KiB, where kernels look. Every ISA interrupt goes to the I/O interrupt
//! controller's input of the same number, as KVM's default routing has it. Layout: MultiProcessor
//! Specification 1.4, chapter 4.

use crate::layout;

/// Version byte of the floating pointer and the configuration table: specification 1.4.
const SPECIFICATION: u8 = 4;
/// Version of the local and I/O interrupt controllers (integrated APIC).
const APIC_VERSION: u8 = 0x14;
/// Length of the floating pointer structure in bytes.
const POINTER_LENGTH: u64 = 16;
/// Length of the configuration table's header in bytes.
const HEADER_LENGTH: usize = 44;

/// The floating pointer and the configuration table, to be written at [`layout::MP_TABLE`].
pub fn table(cpus: u8) -> Vec<u8> {
    let (entries, count) = entries(cpus);
    let length = u16::try_from(HEADER_LENGTH + entries.len()).unwrap_or(u16::MAX);

    let mut configuration = Vec::with_capacity(HEADER_LENGTH + entries.len());
    configuration.extend(b"PCMP");
    configuration.extend(length.to_le_bytes());
    configuration.extend([SPECIFICATION, 0]); // revision, checksum (below)
    configuration.extend(b"PVGPU   MINI-VMM    "); // vendor (8), product (12)
    configuration.extend(0u32.to_le_bytes()); // no vendor table,
    configuration.extend(0u16.to_le_bytes()); // of no size
    configuration.extend(count.to_le_bytes());
    configuration.extend(layout::LAPIC.to_le_bytes());
    configuration.extend(0u32.to_le_bytes()); // no extended table
    configuration.extend(entries);
    set_checksum(&mut configuration, 7);

    let mut pointer = Vec::with_capacity(16);
    pointer.extend(b"_MP_");
    #[allow(clippy::cast_possible_truncation)] // a constant below 1 MiB
    pointer.extend(((layout::MP_TABLE + POINTER_LENGTH) as u32).to_le_bytes());
    pointer.extend([1, SPECIFICATION, 0]); // length in 16-byte units, revision, checksum (below)
    pointer.extend([0; 5]); // a configuration table is present, no IMCR
    set_checksum(&mut pointer, 10);

    pointer.extend(configuration);
    pointer
}

/// The entries in the order that the specification demands, and their number.
fn entries(cpus: u8) -> (Vec<u8>, u16) {
    const PROCESSOR: u8 = 0;
    const BUS: u8 = 1;
    const IO_APIC: u8 = 2;
    const IO_INTERRUPT: u8 = 3;
    const LOCAL_INTERRUPT: u8 = 4;
    const ENABLED: u8 = 1;
    const BOOT_PROCESSOR: u8 = 2;
    const INT: u8 = 0;
    const NMI: u8 = 1;
    const EXT_INT: u8 = 3;
    const ISA_BUS: u8 = 0;
    const ALL: u8 = 0xff;

    let io_apic = cpus; // the first identifier that no processor has
    let mut bytes = Vec::new();
    let mut count = 0;
    let mut add = |entry: &[u8]| {
        bytes.extend(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = ENABLED | if cpu == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![PROCESSOR, cpu, APIC_VERSION, flags];
        entry.extend(0x600u32.to_le_bytes()); // family 6
        entry.extend(0x201u32.to_le_bytes()); // floating point unit, APIC
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    add(&[IO_APIC, io_apic, APIC_VERSION, ENABLED, a, b, c, d]);
    for line in 0..16 {
        add(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, line, io_apic, line]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, ALL, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL, 1]);
    (bytes, count)
}

/// Makes the bytes sum to zero by setting the one at `at`.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_parts_sum_to_zero_and_point_to_each_other() {
        for cpus in 1..=layout::MAX_CPUS {
            let table = table(cpus);
            let (pointer, configuration) = table.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(
                u32::from_le_bytes(pointer[4..8].try_into().unwrap()),
                0x9_fc10
            );
            assert_eq!(sum(pointer), 0);
            assert_eq!(&configuration[..4], b"PCMP");
            assert_eq!(
                usize::from(u16::from_le_bytes([configuration[4], configuration[5]])),
                configuration.len()
            );
            assert_eq!(sum(configuration), 0);
        }
    }

    #[test]
    fn every_processor_and_every_isa_line_is_listed_once() {
        let table = table(4);
        let mut entries = &table[16 + HEADER_LENGTH..];
        let mut kinds = [0; 5];
        while let Some(kind) = entries.first() {
            kinds[usize::from(*kind)] += 1;
            entries = &entries[if *kind == 0 { 20 } else { 8 }..];
        }
        assert_eq!(kinds, [4, 1, 1, 16, 2]);
        assert_eq!(u16::from_le_bytes([table[16 + 34], table[16 + 35]]), 24);
    }

    #[test]
    fn the_largest_table_fits_its_room() {
        let room = layout::MP_TABLE_END - layout::MP_TABLE;
        assert!(table(layout::MAX_CPUS).len() as u64 <= room);
    }
}
