//! `scenario=device`: connects to the GPU's proxy, says who it is, and makes requests that do nothing, polling and sleeping, one
//! at a time and 64 at once.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvgpu_guest_driver::baremetal::Wait;
use pvgpu_protocol::Errno;

use crate::gpu::GuestSession;
use crate::machine::Machine;
use crate::{clock, gpu, println};

/// Requests made one at a time, polling.
const POLLED: u64 = 2000;
/// Requests made one at a time, sleeping.
const SLEPT: u64 = 200;
/// Batches of requests.
const BATCHES: u64 = 50;
/// Requests of a batch: as many as the channel takes.
const BATCH: usize = 64;

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let (mut session, aperture) = gpu::connect(machine)?;
    let host = *session.host();
    let [major, minor, patch] = host.driver_version;
    println!("host driver {} {major}.{minor}.{patch}", host.driver);
    println!("{:?}", host.limits);
    match aperture {
        Some(aperture) => println!(
            "aperture at {:#x}, {} MiB",
            aperture.address,
            aperture.size >> 20
        ),
        None => println!("no aperture"),
    }
    if aperture.map_or(0, |aperture| aperture.size) != host.aperture {
        return Err(format!(
            "the hello promises an aperture of {} bytes",
            host.aperture
        ));
    }

    for (wait, count) in [(Wait::Polling, POLLED), (Wait::Interrupts, SLEPT)] {
        session.channel().set_wait(wait);
        let interrupts = crate::interrupts::count();
        measure(&mut session, "one no-op", wait, count, 1, |session| {
            session.nop()
        })?;
        let interrupts = crate::interrupts::count().wrapping_sub(interrupts);
        println!("  {interrupts} interrupts");
    }
    session.channel().set_wait(Wait::Polling);
    let mut submitting = 0;
    let doorbells = measure(
        &mut session,
        "64 no-ops at once",
        Wait::Polling,
        BATCHES,
        BATCH as u64,
        |session| batch(session, &mut submitting),
    )?;
    println!(
        "  {} ns per request to submit it",
        submitting / (BATCHES * BATCH as u64)
    );
    if doorbells > BATCHES {
        return Err(format!(
            "{doorbells} doorbells for {BATCHES} batches: one must do for each"
        ));
    }
    Ok(())
}

/// Times `count` rounds of `requests` requests each, says so, and returns how many doorbells they took.
fn measure(
    session: &mut GuestSession,
    what: &str,
    wait: Wait,
    count: u64,
    requests: u64,
    mut round: impl FnMut(&mut GuestSession) -> Result<(), Errno>,
) -> Result<u64, String> {
    let doorbells = session.channel().doorbells();
    let start = clock::now_ns();
    for _ in 0..count {
        round(session).map_err(|errno| format!("{what}: {errno}"))?;
    }
    let nanoseconds = (clock::now_ns() - start) / (count * requests);
    let doorbells = session.channel().doorbells() - doorbells;
    println!(
        "{what}, {wait:?}: {}.{:03} us per request, {doorbells} doorbells for {} requests",
        nanoseconds / 1000,
        nanoseconds % 1000,
        count * requests
    );
    Ok(doorbells)
}

/// Submits a whole batch, then waits for all of it; adds the time that submitting took.
fn batch(session: &mut GuestSession, submitting: &mut u64) -> Result<(), Errno> {
    let mut pending = Vec::with_capacity(BATCH);
    let start = clock::now_ns();
    for _ in 0..BATCH {
        pending.push(session.start_nop()?);
    }
    *submitting += clock::now_ns() - start;
    for request in pending {
        session.wait(&request)?;
        session.finish(request)?;
    }
    Ok(())
}
