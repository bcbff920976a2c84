//! The CPL 0 stub: boots the machine into Rust at CPL 3 and does for it what only CPL 0 can do.
//!
//! The guest's Rust code runs at CPL 3 because there it runs natively on every KVM; at CPL 0 a KVM without
//! hardware virtualization emulates each instruction, and knows no SSE. The stub is assembly: `tables.s` (segments,
//! page tables, stacks), `entry.s` (boot), `traps.s` (exceptions, interrupts), `services.s` (what the
//! functions here call), `second.s` (boot of a second processor). Nothing else in the guest may execute a privileged instruction.
#![allow(unsafe_code)]

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64};

global_asm!(
    include_str!("tables.s"),
    include_str!("entry.s"),
    include_str!("traps.s"),
    include_str!("services.s"),
    include_str!("second.s"),
    options(raw)
);

/// Interrupt vectors that have a gate: 0..32 are exceptions, 32..63 interrupts, 63 the local APIC's spurious one.
pub const VECTORS: usize = 64;

/// What the processor said about an exception (`exception_frame` in `traps.s`).
#[repr(C)]
#[derive(Debug)]
pub struct ExceptionFrame {
    /// Exception vector, 0..32.
    pub vector: u64,
    /// Error code, or 0 where the vector has none.
    pub error_code: u64,
    /// Address of the instruction.
    pub rip: u64,
    /// Code segment: its low two bits are the privilege level it happened at.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Address that a page fault (vector 14) was about.
    pub cr2: u64,
}

unsafe extern "C" {
    static interrupt_counts: [AtomicU32; VECTORS];
    static exit_register: AtomicU64;
    static image_end: u8;
    static second_start: u8;
    static second_end: u8;

    /// Asks the stub for a service; `services.s` has the numbers and their arguments. Memory that it is pointed at must be
    /// valid for what the service does with it.
    fn ring0_service(number: u32, first: u64, second: u64, third: u64) -> u64;
}

/// Interrupts taken so far on each vector; element 0 counts them all.
pub fn interrupts() -> &'static [AtomicU32; VECTORS] {
    // SAFETY: the array lies in the image's .bss for ever (traps.s); the handler only ever increments its elements.
    unsafe { &interrupt_counts }
}

/// Where the stub finds the debug device's exit register when it has to end the VM by itself.
pub fn exit_address() -> &'static AtomicU64 {
    // SAFETY: the word lies in the image's .data for ever (tables.s); the stub only reads it.
    unsafe { &exit_register }
}

/// First guest-physical address behind the guest's image (page aligned).
pub fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

/// Writes bytes to the serial port (0x3f8). Each byte is one exit to the VMM.
pub fn serial_write(bytes: &[u8]) {
    // SAFETY: the service reads exactly these bytes.
    unsafe { ring0_service(0, bytes.as_ptr().addr() as u64, bytes.len() as u64, 0) };
}

/// Halts the processor until `counter` differs from `seen`; returns at once when it already does. Only an interrupt
/// ends the halt, so `counter` must be one of [`interrupts`].
pub fn sleep_while(counter: &AtomicU32, seen: u32) {
    // SAFETY: the service reads the counter through the pointer, aligned, while only the interrupt handler writes it.
    unsafe { ring0_service(1, counter.as_ptr().addr() as u64, u64::from(seen), 0) };
}

/// The CPUID instruction (at CPL 3 it may not be intercepted, and then tells about the host): eax, ebx, ecx, edx.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut registers = [0u32; 4];
    // SAFETY: the service writes exactly the four words of `registers`.
    unsafe {
        ring0_service(
            2,
            u64::from(leaf),
            u64::from(subleaf),
            registers.as_mut_ptr().addr() as u64,
        )
    };
    registers
}

/// Writes a byte to an I/O port.
pub fn port_write(port: u16, value: u8) {
    // SAFETY: no device of this machine reaches Rust's memory by a single port write.
    unsafe { ring0_service(3, u64::from(port), u64::from(value), 0) };
}

/// Reads a byte from an I/O port.
pub fn port_read(port: u16) -> u8 {
    // SAFETY: reading a port touches no memory.
    (unsafe { ring0_service(4, u64::from(port), 0, 0) } & 0xff) as u8
}

/// Writes a 32-bit register of an interrupt controller from CPL 0. `address` must lie in `0xfec0_0000..0xff00_0000`,
/// where the I/O APIC and the local APIC are; anything else is refused.
pub fn interrupt_controller_write(address: u32, value: u32) {
    assert!(
        is_interrupt_controller(address),
        "{address:#x} is not an interrupt controller's register"
    );
    // SAFETY: checked above: no RAM is there.
    unsafe { ring0_service(5, u64::from(address), u64::from(value), 0) };
}

/// Reads a 32-bit register of an interrupt controller, as [`interrupt_controller_write`] writes it.
pub fn interrupt_controller_read(address: u32) -> u32 {
    assert!(
        is_interrupt_controller(address),
        "{address:#x} is not an interrupt controller's register"
    );
    // SAFETY: checked above: no RAM is there.
    (unsafe { ring0_service(6, u64::from(address), 0, 0) } & 0xffff_ffff) as u32
}

/// Where a second processor starts in real mode: a free page below 640 KiB, between the boot loader's.
const SECOND_START: usize = 0x8000;
/// Interrupt command register of the local APIC, low and high half, and what starts processor 1 (Intel SDM volume 3, 10.6).
const INTERRUPT_COMMAND: u32 = 0xfee0_0300;
const INTERRUPT_TARGET: u32 = 0xfee0_0310;
const TARGET_1: u32 = 1 << 24;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600 | (SECOND_START >> 12) as u32;

/// Starts processor 1, which then runs `second_main`. Once, and where there is one.
pub fn start_second() {
    // SAFETY: the labels enclose the bytes that second.s has for this; the page is mapped RAM that nobody uses any more.
    unsafe {
        let (start, end) = (&raw const second_start, &raw const second_end);
        let length = end.addr() - start.addr();
        let page = core::ptr::with_exposed_provenance_mut::<u8>(SECOND_START);
        core::ptr::copy_nonoverlapping(start, page, length);
    }
    for command in [INIT, STARTUP] {
        interrupt_controller_write(INTERRUPT_TARGET, TARGET_1);
        interrupt_controller_write(INTERRUPT_COMMAND, command);
    }
}

/// Where `second.s` continues: all that a second processor does here.
#[unsafe(no_mangle)]
extern "C" fn second_main() -> ! {
    crate::flips::flip_for_ever()
}

fn is_interrupt_controller(address: u32) -> bool {
    (0xfec0_0000..0xff00_0000).contains(&address) && address.is_multiple_of(4)
}

/// Where `entry.s` continues: the first Rust at CPL 3. `zero_page` is the boot loader's `boot_params`.
#[unsafe(no_mangle)]
extern "C" fn guest_main(zero_page: u64) -> ! {
    crate::run(zero_page)
}

/// Where `traps.s` continues after an exception: at CPL 3, interrupts off, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn exception_raised(frame: &ExceptionFrame) -> ! {
    crate::exception::report(frame)
}
