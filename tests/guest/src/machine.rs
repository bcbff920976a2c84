//! What the guest knows about the machine it runs on: found once, at the start, and handed to the scenario.

use alloc::string::String;
use alloc::vec::Vec;

use crate::boot_params::{BootParams, Ram};
use crate::command_line::{CommandLine, VirtioMmioDevice};
use crate::debug_device::DebugDevice;
use crate::{clock, heap, interrupts, ring0};

/// The machine.
#[derive(Debug)]
pub struct Machine {
    /// The kernel command line.
    pub command_line: CommandLine,
    /// Its RAM.
    pub ram: Vec<Ram>,
    /// Bytes of it that the heap got.
    pub heap: usize,
    /// Frequency of the time-stamp counter.
    pub tsc_khz: u64,
    /// How the hypervisor calls itself in CPUID.
    pub hypervisor: String,
    /// The debug device, where there is one.
    pub debug: Option<DebugDevice>,
    /// The virtio-mmio devices.
    pub virtio_mmio: Vec<VirtioMmioDevice>,
}

impl Machine {
    /// Looks at the machine and starts what every scenario needs: heap, clock, interrupts.
    pub fn discover(zero_page: u64) -> Result<Self, &'static str> {
        let boot_params = BootParams::at(zero_page)
            .ok_or("the zero page is not below 1 MiB: boot with the Linux 64-bit protocol")?;
        let command_line = CommandLine(boot_params.command_line());
        let debug = match command_line.number("pvgpu.debug") {
            Some(address) => {
                Some(DebugDevice::at(address).ok_or("pvgpu.debug= is not an address in 3..4 GiB")?)
            }
            None => None,
        };
        let heap = heap::start(boot_params.ram())?;
        let tsc_khz = clock::start()?;
        interrupts::start();
        Ok(Self {
            command_line,
            ram: boot_params.ram().collect(),
            heap,
            tsc_khz,
            hypervisor: hypervisor(),
            debug,
            virtio_mmio: command_line.virtio_mmio_devices().collect(),
        })
    }
}

/// The hypervisor's signature: the twelve bytes of ebx, ecx, edx of CPUID leaf 0x4000_0000.
fn hypervisor() -> String {
    let [_, signature @ ..] = ring0::cpuid(0x4000_0000, 0);
    signature
        .iter()
        .flat_map(|register| register.to_le_bytes())
        .take_while(|byte| byte.is_ascii_graphic())
        .map(char::from)
        .collect()
}
