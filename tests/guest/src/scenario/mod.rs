//! What the guest can be asked to do: one file and one row of [`ALL`] per scenario.

use alloc::string::String;

use crate::machine::Machine;

mod bench;
mod device;
mod double_fetch;
mod draw;
mod fault;
mod fuzz;
mod hello;
mod interrupts;
mod memory;
mod recover;
mod selftest;

/// Something to do.
#[derive(Debug)]
pub struct Scenario {
    /// What `scenario=` on the command line calls it.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// Does it. The error is a line for the console.
    pub run: fn(&Machine) -> Result<(), String>,
}

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "hello",
        about: "prints what the machine is",
        run: hello::run,
    },
    Scenario {
        name: "interrupts",
        about: "takes interrupts from timer and serial port",
        run: interrupts::run,
    },
    Scenario {
        name: "device",
        about: "talks to the GPU's proxy and times requests that do nothing",
        run: device::run,
    },
    Scenario {
        name: "draw",
        about: "draws a picture on the GPU and dumps it",
        run: draw::run,
    },
    Scenario {
        name: "recover",
        about: "loses its session losses= times, then draws",
        run: recover::run,
    },
    Scenario {
        name: "selftest",
        about: "makes the calls that the GPU's file must refuse",
        run: selftest::run,
    },
    Scenario {
        name: "memory",
        about: "checks copying, filling, comparing and allocating memory",
        run: memory::run,
    },
    Scenario {
        name: "fault",
        about: "breaks as fault= says; the exit code tells how",
        run: fault::run,
    },
    Scenario {
        name: "fuzz",
        about: "plays generated programs against the GPU's device",
        run: fuzz::run,
    },
    Scenario {
        name: "doublefetch",
        about: "changes requests from a second processor while the proxy reads them",
        run: double_fetch::run,
    },
    Scenario {
        name: "bench",
        about: "measures what measure= says",
        run: bench::run,
    },
];

/// The scenario with this name.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
