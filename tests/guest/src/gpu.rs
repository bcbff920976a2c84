//! The machine's GPU: finds its virtio device, opens a session with the proxy behind it.

use alloc::format;
use alloc::string::{String, ToString};

use pvgpu_guest_driver::baremetal::{SharedMemory, VirtioChannel, Wait};
use pvgpu_guest_driver::session::Session;

use crate::dma::{self, Guest};
use crate::machine::Machine;
use crate::physical::Registers;

/// How this guest calls itself in the hello.
const NAME: &str = concat!("pvgpu-test-guest ", env!("CARGO_PKG_VERSION"));

/// A session of this guest.
pub type GuestSession = Session<'static, VirtioChannel<'static, Guest>>;

/// Opens a session with the first virtio-mmio device that the command line announces. `wait=interrupts` on the command line
/// makes it sleep for responses; otherwise it polls.
pub fn connect(machine: &Machine) -> Result<(GuestSession, Option<SharedMemory>), String> {
    let device = machine
        .virtio_mmio
        .first()
        .ok_or("no virtio-mmio device: start the VM with a GPU (mini-vmm run --gpu soft)")?;
    let registers = Registers::new(device.address, device.size)
        .ok_or("the virtio-mmio device is not in 3..4 GiB, where this guest maps registers")?;
    let transport = registers.virtio_mmio().map_err(|error| error.to_string())?;
    if !dma::listen(device.irq) {
        return Err(format!(
            "the virtio-mmio device's interrupt {} is none of the I/O APIC's",
            device.irq
        ));
    }
    let wait = match machine.command_line.get("wait") {
        None | Some("polling") => Wait::Polling,
        Some("interrupts") => Wait::Interrupts,
        Some(other) => return Err(format!("wait={other} is neither polling nor interrupts")),
    };
    let channel = VirtioChannel::new(transport, wait).map_err(|error| error.to_string())?;
    let aperture = channel.aperture();
    let session =
        Session::connect(channel, NAME).map_err(|errno| format!("the proxy's hello: {errno}"))?;
    Ok((session, aperture))
}
