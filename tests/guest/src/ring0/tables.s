// Descriptor tables, page tables and stacks of the CPL 0 stub. All of it is data that the linker places; nothing
// here is executed, since every instruction at CPL 0 may be emulated (about 120 ns each) on the hosts we meet.

    .section .data.tables, "aw"

// Page tables: everything one to one, readable and writable at CPL 3, in 2 MiB pages.
//   0 .. 4 GiB: RAM, then from 3 GiB up device registers (uncached)
//   64 .. 72 GiB: the aperture, virtio shared-memory region 0
// The first 2 MiB are in 4 KiB pages so that page 0 (null pointers) and the page below the stack are not mapped.
    .set PAGE_USER, 0x7         // present, writable, user
    .set PAGE_LARGE, 0x80
    .set PAGE_UNCACHED, 0x18    // PCD, PWT
    .set STACK_GUARD, 0x100000

    .balign 4096
page_map:
    .quad page_directories + PAGE_USER
    .fill 511, 8, 0

    .balign 4096
page_directories:
    .quad page_directory_0 + PAGE_USER
    .quad page_directory_0 + 0x1000 + PAGE_USER
    .quad page_directory_0 + 0x2000 + PAGE_USER
    .quad page_directory_0 + 0x3000 + PAGE_USER
    .fill 60, 8, 0
    .set offset, 0
    .rept 8
    .quad page_directory_aperture + offset + PAGE_USER
    .set offset, offset + 0x1000
    .endr
    .fill 440, 8, 0

    .balign 4096
page_directory_0:
    .quad page_table_0 + PAGE_USER
    .set address, 0x200000
    .rept 3 * 512 - 1
    .quad address + PAGE_USER + PAGE_LARGE
    .set address, address + 0x200000
    .endr
    .rept 512
    .quad address + PAGE_USER + PAGE_LARGE + PAGE_UNCACHED
    .set address, address + 0x200000
    .endr

    .balign 4096
page_table_0:
    .quad 0
    .set address, 0x1000
    .rept 255
    .quad address + PAGE_USER
    .set address, address + 0x1000
    .endr
    .quad 0                     // STACK_GUARD
    .set address, STACK_GUARD + 0x1000
    .rept 255
    .quad address + PAGE_USER
    .set address, address + 0x1000
    .endr

    .balign 4096
page_directory_aperture:
    .set address, 64 << 30
    .rept 8 * 512
    .quad address + PAGE_USER + PAGE_LARGE
    .set address, address + 0x200000
    .endr

// Segments. The selectors of the kernel are those of the Linux 64-bit boot protocol.
    .set KERNEL_CODE, 0x10
    .set KERNEL_DATA, 0x18
    .set USER_DATA, 0x28 + 3
    .set USER_CODE, 0x30 + 3
    .set TASK_STATE, 0x40

    .balign 16
segments:
    .quad 0, 0
    .quad 0x00af9b000000ffff    // KERNEL_CODE: 64-bit
    .quad 0x00cf93000000ffff    // KERNEL_DATA
    .quad 0
    .quad 0x00cff3000000ffff    // USER_DATA
    .quad 0x00affb000000ffff    // USER_CODE: 64-bit
    .quad 0
task_descriptor:
    .quad 0, 0                  // TASK_STATE, filled by entry.s
segments_end:

segments_pointer:
    .short segments_end - segments - 1
    .quad segments

// Task state: the stacks on which exceptions and interrupts from CPL 3 arrive.
    .balign 16
    .set TASK_STATE_SIZE, 104
task_state:
    .long 0
    .quad ring0_stack           // RSP0
    .quad 0, 0                  // RSP1, RSP2
    .quad 0
    .quad double_fault_stack    // IST1
    .quad 0, 0, 0, 0, 0, 0      // IST2..IST7
    .quad 0
    .short 0
    .short TASK_STATE_SIZE      // no I/O permission map

// Interrupt gates: exceptions 0..31, then interrupts. Each vector's stub (traps.s) takes STUB_SIZE bytes.
    .set VECTORS, 64
    .set STUB_SIZE, 16

interrupts_pointer:
    .short VECTORS * 16 - 1
    .quad interrupt_gates

// Address of the debug device's exit register (32 bits): the way out when nothing else works.
    .balign 8
    .global exit_register
exit_register:
    .quad 0xd0001000

    .section .bss
    .balign 16
interrupt_gates:
    .skip VECTORS * 16
    .balign 16
    .skip 16384
ring0_stack:
    .skip 4096
double_fault_stack:
    .skip 65536
exception_stack:
