//! The bare-metal test guest: what mini-vmm boots in the demo, the end-to-end tests and the benchmarks.
//!
//! Build it with `cargo build -p pvgpu-test-guest --profile guest --features bare-metal`; the ELF is then
//! `target/guest/pvgpu-test-guest`. The kernel command line tells it what to do: `scenario=NAME` picks one of
//! [`scenario::ALL`], `virtio_mmio.device=` and `pvgpu.debug=` say where the devices are. It reports on the serial console
//! and by its exit code: 0 success, 1 the scenario failed, 2 it was asked for something unknown, 101 a panic in the
//! guest, 128 + N processor exception N. It must never hang without a word.
#![no_std]
#![no_main]

extern crate alloc;

mod boot_params;
mod clock;
mod command_line;
mod debug_device;
mod device_file;
mod dma;
mod exception;
mod flips;
mod gpu;
mod heap;
mod interrupts;
mod machine;
mod memory_functions;
mod panic;
mod physical;
mod ring0;
mod scenario;
mod serial;

use machine::Machine;

/// Exit code of a scenario that failed.
const EXIT_FAILED: u32 = 1;
/// Exit code of a command line that the guest does not understand.
const EXIT_UNKNOWN: u32 = 2;

/// The whole life of the guest.
fn run(zero_page: u64) -> ! {
    let machine = match Machine::discover(zero_page) {
        Ok(machine) => machine,
        Err(cause) => {
            println!("error: {cause}");
            debug_device::exit(EXIT_UNKNOWN);
        }
    };
    let name = machine.command_line.get("scenario").unwrap_or("hello");
    let Some(scenario) = scenario::find(name) else {
        println!("error: no scenario is called '{name}'; there are:");
        for scenario in scenario::ALL {
            println!("  scenario={:<12} {}", scenario.name, scenario.about);
        }
        debug_device::exit(EXIT_UNKNOWN);
    };
    let code = match (scenario.run)(&machine) {
        Ok(()) => 0,
        Err(cause) => {
            println!("error: scenario {name}: {cause}");
            EXIT_FAILED
        }
    };
    debug_device::exit(code)
}
