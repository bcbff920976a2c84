//! `scenario=fault fault=KIND`: breaks on purpose, so that tests can see how a broken guest ends: a line on the console that
//! names the cause, and an exit code.
#![allow(unsafe_code)]

use alloc::format;
use alloc::string::String;
use core::hint::black_box;

use crate::machine::Machine;

/// Runs the scenario; comes back only when `fault=` is unknown.
pub fn run(machine: &Machine) -> Result<(), String> {
    match machine.command_line.get("fault") {
        Some("panic") => panic!("fault=panic asked for it"),
        // SAFETY: nothing is mapped at address 8: a page fault, after which this code does not continue.
        Some("null") => unsafe {
            black_box(black_box(core::ptr::without_provenance::<u8>(8)).read_volatile());
        },
        Some("stack") => descend(0),
        // SAFETY: an invalid instruction: an exception, after which this code does not continue.
        Some("invalid") => unsafe { core::arch::asm!("ud2") },
        // SAFETY: a privileged instruction: an exception, after which this code does not continue.
        Some("privileged") => unsafe { core::arch::asm!("cli") },
        other => {
            return Err(format!(
                "fault={} is none of panic, null, stack, invalid, privileged",
                other.unwrap_or("")
            ));
        }
    };
    Err(String::from("the guest survived the fault"))
}

/// Recurses until the stack ends at its guard page.
#[expect(unconditional_recursion, reason = "that is the point")]
fn descend(depth: u64) {
    let frame = black_box([depth; 64]);
    descend(frame[0] + 1);
    black_box(&frame);
}
