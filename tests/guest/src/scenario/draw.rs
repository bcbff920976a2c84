//! `scenario=draw`: draws a picture through the GPU with the calls of the host driver's own scenario ([`pvgpu_scenarios`]), and
//! hands the picture to the VMM's `--dump FILE`: pixels of four bytes, red, green, blue, alpha, row after row.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use core::cell::RefCell;

use pvgpu_guest_driver::baremetal::SharedMemory;
use pvgpu_scenarios::{Picture, Report, soft, vgem, virtio_gpu};

use crate::device_file::GuestFile;
use crate::gpu::GuestSession;
use crate::machine::Machine;
use crate::{gpu, println};

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let (session, aperture) = gpu::connect(machine)?;
    draw(machine, session, aperture)
}

/// Draws in that session.
pub fn draw(
    machine: &Machine,
    session: GuestSession,
    aperture: Option<SharedMemory>,
) -> Result<(), String> {
    let session = Rc::new(RefCell::new(session));
    let mut file = GuestFile::open(&session, aperture).map_err(|errno| format!("open: {errno}"))?;
    let mut report = |step: &'static str, nanoseconds: u64| {
        println!(
            "step {step}: {}.{:03} us",
            nanoseconds / 1000,
            nanoseconds % 1000
        );
    };
    let driver = session.borrow().host().driver;
    let picture = picture(&driver, &mut file, &mut report)?;
    println!(
        "picture {}x{}, fingerprint {:#018x}, {} doorbells",
        picture.width,
        picture.height,
        picture.fingerprint(),
        session.borrow_mut().channel().doorbells()
    );
    let debug = machine
        .debug
        .ok_or("no debug device to hand the picture to")?;
    debug.dump(&picture.rgba).map_err(|errno| {
        format!("the VMM did not take the picture: errno {errno} (run it with --dump FILE)")
    })
}

/// The picture of that host driver's scenario.
pub fn picture(
    driver: &str,
    file: &mut GuestFile,
    report: &mut impl Report,
) -> Result<Picture, String> {
    match driver {
        "soft" => soft::draw(file, report),
        "vgem" => vgem::draw(file, report),
        "virtio_gpu" => virtio_gpu::draw(file, report),
        other => return Err(format!("nothing to draw with the host driver {other}")),
    }
    .map_err(|failure| failure.to_string())
}
