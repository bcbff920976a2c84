//! A panic in the guest: its message on the serial console, and the end of the VM with exit code 101.

use core::panic::PanicInfo;

use crate::{debug_device, println};

/// Exit code of a panic, the one of Rust programs on any system.
const EXIT_PANIC: u32 = 101;

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    println!("{info}");
    debug_device::exit(EXIT_PANIC)
}
