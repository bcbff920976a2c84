//! `scenario=hello`: prints what the machine is.

use alloc::string::String;

use crate::machine::Machine;
use crate::{clock, println};

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    println!(
        "pvgpu test guest {} at CPL {}",
        env!("CARGO_PKG_VERSION"),
        privilege_level()
    );
    println!(
        "hypervisor '{}', TSC {} kHz, clock {} us",
        machine.hypervisor,
        machine.tsc_khz,
        clock::now_ns() / 1000
    );
    for ram in &machine.ram {
        println!("RAM {:#x}..{:#x}", ram.start, ram.start + ram.size);
    }
    println!("heap {} KiB", machine.heap >> 10);
    println!("command line: {}", machine.command_line.0);
    match machine.debug {
        Some(debug) => println!("debug device at {:#x}", debug.address()),
        None => println!("no debug device"),
    }
    for device in &machine.virtio_mmio {
        println!(
            "virtio-mmio at {:#x}, {:#x} bytes, interrupt {}",
            device.address, device.size, device.irq
        );
    }
    Ok(())
}

/// The privilege level this code runs at: the low two bits of the code segment's selector.
#[expect(unsafe_code, reason = "reads the cs register")]
fn privilege_level() -> u16 {
    let selector: u16;
    // SAFETY: reading cs changes nothing.
    unsafe {
        core::arch::asm!("mov {:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags))
    };
    selector & 3
}
