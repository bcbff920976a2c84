//! The guest-physical address map, the interrupt lines and the port numbers of the machine.
//!
//! Everything that a guest must find at a fixed place is a constant here, and nowhere else. Boot
//! structures, devices and the tests read it; it must never hold code that depends on a running VM.

/// RAM occupies guest-physical addresses from 0 up to here; what is left of it goes to [`RAM_HIGH`].
pub const RAM_LOW_END: u64 = 0xc000_0000;

/// Where RAM continues above the 32-bit hole for devices.
pub const RAM_HIGH: u64 = 0x1_0000_0000;

/// Registers of the virtio-mmio transport of the GPU.
pub const GPU_MMIO: u64 = 0xd000_0000;

/// Size of the virtio-mmio register window in bytes.
pub const GPU_MMIO_SIZE: u64 = 0x1000;

/// Interrupt line of the GPU: an ISA line, so that an MP table without PCI can describe it.
pub const GPU_IRQ: u32 = 5;

/// Registers of the debug device (see `debug`).
pub const DEBUG_MMIO: u64 = 0xd000_1000;

/// Size of the debug device's register window in bytes.
pub const DEBUG_MMIO_SIZE: u64 = 0x1000;

/// First address of device windows: extra devices of tests and benchmarks live between
/// [`EXTRA_MMIO`] and [`EXTRA_MMIO_END`].
pub const EXTRA_MMIO: u64 = 0xd000_2000;

/// End (exclusive) of the range for extra devices.
pub const EXTRA_MMIO_END: u64 = 0xe000_0000;

/// BAR 0 of the GPU on PCI: its registers ([`crate::virtio_pci`]), aligned to its size.
pub const GPU_BAR: u32 = 0xe000_0000;

/// Size of that BAR in bytes.
pub const GPU_BAR_SIZE: u32 = 0x8000;

/// The aperture: virtio shared-memory region 0 of the GPU, above all RAM this monitor can give.
pub const APERTURE_BASE: u64 = 0x10_0000_0000;

/// Largest aperture on PCI: a BAR, which is aligned to its size.
pub const APERTURE_BAR_MAX: u64 = APERTURE_BASE;

/// Identifier of the aperture among the GPU's virtio shared-memory regions.
pub const APERTURE_REGION: u32 = 0;

/// Address port of the PCI bus; its four data ports follow at [`PCI_DATA_PORT`].
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;

/// First data port of the PCI bus.
pub const PCI_DATA_PORT: u16 = 0xcfc;

/// The last data port of the PCI bus.
pub const PCI_LAST_PORT: u16 = 0xcff;

/// First interrupt number that is a message of the GPU on PCI: those below are inputs of the I/O interrupt controller.
pub const FIRST_MESSAGE: u32 = 24;

/// First port of the 16550 serial port.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Number of ports of the serial port.
pub const SERIAL_PORTS: u16 = 8;

/// Interrupt line of the serial port.
pub const SERIAL_IRQ: u32 = 4;

/// Command port of the keyboard controller; writing [`I8042_RESET`] to it resets the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// The keyboard controller's "pulse the reset line" command.
pub const I8042_RESET: u8 = 0xfe;

/// Index port of the CMOS clock.
pub const CMOS_INDEX_PORT: u16 = 0x70;

/// Data port of the CMOS clock.
pub const CMOS_DATA_PORT: u16 = 0x71;

/// Global descriptor table that the boot processor starts with.
pub const GDT: u64 = 0x500;

/// PVH start information (`hvm_start_info`), its memory map and module list.
pub const PVH_START_INFO: u64 = 0x6000;

/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;

/// PVH module list: one entry, the initial ramdisk.
pub const PVH_MODULES: u64 = 0x6800;

/// Linux zero page (`boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;

/// Stack pointer of the boot processor at its first instruction.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Top-level page table of the identity map; [`PAGE_DIRECTORIES`] and so on follow page by page.
pub const PML4: u64 = 0x9000;

/// Page-directory-pointer table of the identity map.
pub const PDPT: u64 = 0xa000;

/// Page directories of the identity map: one per GiB.
pub const PAGE_DIRECTORIES: u64 = 0xb000;

/// Number of GiB from address 0 that the boot page tables map one to one.
pub const IDENTITY_MAP_GIB: u64 = 4;

/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;

/// Longest command line in bytes, its NUL included, where the kernel's header names no limit
/// (Linux' own `COMMAND_LINE_SIZE` on x86).
pub const COMMAND_LINE_SIZE: u64 = 2048;

/// End of conventional memory; the MP table stands from here to [`MP_TABLE_END`], where kernels look for it.
pub const MP_TABLE: u64 = 0x9_fc00;

/// End (exclusive) of the room for the MP table.
pub const MP_TABLE_END: u64 = 0xa_0000;

/// First address of memory above the legacy hole: kernels are loaded from here up.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Registers of the I/O interrupt controller.
pub const IOAPIC: u32 = 0xfec0_0000;

/// Registers of the local interrupt controllers.
pub const LAPIC: u32 = 0xfee0_0000;

/// Page that Intel's KVM needs for itself in real mode; three pages for the task-state segment follow it.
pub const IDENTITY_MAP_PAGE: u64 = 0xfffb_c000;

/// Three pages that Intel's KVM needs for a task-state segment.
pub const TSS: usize = 0xfffb_d000;

/// Hypervisor CPUID leaf whose EAX is the frequency of the time-stamp counter in kHz, as known from
/// other hypervisors.
pub const CPUID_TIMING_LEAF: u32 = 0x4000_0010;

/// Most vCPUs that the MP table's kilobyte can describe comfortably (20 bytes each).
pub const MAX_CPUS: u8 = 32;

/// Least RAM: the boot structures below 1 MiB and a little room for a kernel.
pub const MIN_MEMORY: u64 = 2 << 20;

/// KVM memory slots.
pub mod slot {
    /// RAM from address 0.
    pub const RAM_LOW: u32 = 0;
    /// RAM from 4 GiB.
    pub const RAM_HIGH: u32 = 1;
    /// The aperture.
    pub const APERTURE: u32 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_ranges_do_not_overlap() {
        let ranges = [
            (GDT, 32),
            (PVH_START_INFO, PVH_MEMORY_MAP - PVH_START_INFO),
            (PVH_MEMORY_MAP, PVH_MODULES - PVH_MEMORY_MAP),
            (PVH_MODULES, 0x100),
            (ZERO_PAGE, 0x1000),
            (PML4, 0x1000),
            (PDPT, 0x1000),
            (PAGE_DIRECTORIES, IDENTITY_MAP_GIB * 0x1000),
            (COMMAND_LINE, 0x1_0000),
            (MP_TABLE, MP_TABLE_END - MP_TABLE),
            (HIGH_MEMORY, RAM_LOW_END - HIGH_MEMORY),
            (GPU_MMIO, GPU_MMIO_SIZE),
            (DEBUG_MMIO, DEBUG_MMIO_SIZE),
            (EXTRA_MMIO, EXTRA_MMIO_END - EXTRA_MMIO),
            (u64::from(GPU_BAR), u64::from(GPU_BAR_SIZE)),
            (u64::from(IOAPIC), 0x1000),
            (u64::from(LAPIC), 0x1000),
            (IDENTITY_MAP_PAGE, 0x1000),
            (TSS as u64, 0x3000),
            (RAM_HIGH, APERTURE_BASE - RAM_HIGH),
        ];
        for pair in ranges.windows(2) {
            let [(base, size), (next, _)] = pair else {
                unreachable!()
            };
            assert!(
                base + size <= *next,
                "{base:#x}+{size:#x} reaches into {next:#x}"
            );
        }
    }
}
