//! `scenario=recover losses=N`: has N times that it loses its session, since the proxy on the host ends or forgets it, and each time
//! opens another one as soon as it can. In the session after them it draws as `scenario=draw` does.
//!
//! It says `session K is open` when it has the one after K losses, which the host may then take away: in every other one it
//! draws until then, in the others a request waits that would do so for ever.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use core::cell::RefCell;

use pvgpu_guest_driver::baremetal::SharedMemory;
use pvgpu_protocol::Errno;

use super::draw;
use crate::device_file::{GuestFile, SharedSession};
use crate::gpu::GuestSession;
use crate::machine::Machine;
use crate::{clock, gpu, println};

/// How long a proxy may be away.
const PATIENCE_NS: u64 = 60_000_000_000;
/// Between two attempts to open a session.
const PAUSE_NS: u64 = 10_000_000;
/// An event that no file of a host driver has unless somebody asks for it.
const POLLIN: u32 = 1;

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let losses = machine.command_line.number("losses").unwrap_or(1);
    for lost in 0..losses {
        let (session, aperture) = connect(machine)?;
        println!("session {lost} is open");
        lose(session, aperture, lost % 2 == 1)?;
    }
    let (session, aperture) = connect(machine)?;
    println!("session {losses} is open");
    draw::draw(machine, session, aperture)
}

/// Opens a session, or tries for a while.
fn connect(machine: &Machine) -> Result<(GuestSession, Option<SharedMemory>), String> {
    let deadline = clock::now_ns() + PATIENCE_NS;
    loop {
        match gpu::connect(machine) {
            Err(cause) if clock::now_ns() >= deadline => return Err(cause),
            Err(_) => pause(),
            session => return session,
        }
    }
}

fn pause() {
    let end = clock::now_ns() + PAUSE_NS;
    while clock::now_ns() < end {
        core::hint::spin_loop();
    }
}

/// Uses the session until it is lost, which every call must then say.
fn lose(session: GuestSession, aperture: Option<SharedMemory>, waits: bool) -> Result<(), String> {
    let session: SharedSession = Rc::new(RefCell::new(session));
    let mut used = use_up(&session, aperture, waits);
    for _ in 0..3 {
        match used {
            Err(Errno::ENODEV) => used = session.borrow_mut().nop(),
            other => return Err(format!("a lost session gives {other:?}")),
        }
    }
    Ok(())
}

fn use_up(
    session: &SharedSession,
    aperture: Option<SharedMemory>,
    waits: bool,
) -> Result<(), Errno> {
    if waits {
        let file = session.borrow_mut().open(0)?;
        let ready = session.borrow_mut().poll(file, POLLIN, -1)?;
        println!("the file is ready: {ready:#x}");
        return Ok(());
    }
    loop {
        let mut file = GuestFile::open(session, aperture)?;
        // A picture in the midst of which its memory is lost may be anything, or end with anything.
        let driver = session.borrow().host().driver;
        let _ = draw::picture(&driver, &mut file, &mut |_, _| {});
        drop(file);
        session.borrow_mut().nop()?;
    }
}
