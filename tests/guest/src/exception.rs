//! Processor exceptions: one line on the serial console, and the end of the VM with exit code 128 + vector.

use crate::ring0::ExceptionFrame;
use crate::{debug_device, println};

/// Names by vector (Intel SDM volume 3, table 6-1).
const NAMES: [&str; 32] = [
    "divide error",
    "debug",
    "non-maskable interrupt",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor overrun",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "reserved",
    "x87 error",
    "alignment check",
    "machine check",
    "SIMD error",
    "virtualization",
    "control protection",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "hypervisor injection",
    "VMM communication",
    "security",
    "reserved",
];

/// Reports the exception and ends the VM.
pub fn report(frame: &ExceptionFrame) -> ! {
    let vector = usize::try_from(frame.vector).unwrap_or(usize::MAX);
    let name = NAMES.get(vector).unwrap_or(&"unknown");
    println!(
        "exception {vector} ({name}) at rip {:#x} CPL {}: error code {:#x}, cr2 {:#x}, rsp {:#x}, rflags {:#x}",
        frame.rip,
        frame.cs & 3,
        frame.error_code,
        frame.cr2,
        frame.rsp,
        frame.rflags
    );
    debug_device::exit(128 + (frame.vector as u32 & 0x1f))
}
