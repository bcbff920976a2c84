//! `scenario=fuzz seed=N first=N cases=N seconds=N`: plays generated programs against the GPU's device, and looks now and then
//! whether it still works. A case is the same whenever its seed and number are the same; between two cases the device is
//! reset, nothing else is. `progress=ADDRESS` is a register that gets each case's number before it is played
//! (`tests/e2e/src/vm_fuzz.rs`); without it the console gets one of each batch.

use alloc::format;
use alloc::string::String;

use pvgpu_protocol::wire::open;

use crate::machine::Machine;
use crate::physical::{Registers, SharedRange};
use crate::{clock, gpu, println};

pub mod arena;
mod program;
mod random;
mod request;

use arena::Arena;
use program::Program;
use random::Random;

/// Cases between two looks at the device.
const BATCH: u32 = 64;
/// Cases, and the longest time for them, unless the command line says otherwise.
const CASES: u64 = 1000;
/// Register of the host: the number of the case that comes now.
const CASE: u64 = 0;
/// Register of the host: the device has been reset and has nothing to do.
const AT_REST: u64 = 4;
/// Bytes of the aperture that cases touch.
const TOUCHED: u64 = 16 * 4096;

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    // Nothing of the command line is read once the device may have been told to write.
    let number = |key| machine.command_line.number(key);
    let seed = number("seed").unwrap_or(1);
    let first = number("first").unwrap_or(0) as u32;
    let cases = number("cases").unwrap_or(CASES) as u32;
    let limit_ns = number("seconds").map_or(u64::MAX, |seconds| seconds * 1_000_000_000);
    let host = number("progress").and_then(|address| Registers::new(address, 8));
    let device = machine.virtio_mmio.first().ok_or("no virtio-mmio device")?;
    let registers = Registers::new(device.address, device.size).ok_or("no registers")?;
    let arena = Arena::new().ok_or("no memory")?;
    let (session, aperture) = gpu::connect(machine)?;
    drop(session);
    let mut aperture = aperture.and_then(|aperture| SharedRange::new(aperture, 0, TOUCHED));
    let at_rest = || {
        registers.write(0x70, 0);
        host.inspect(|host| host.write(AT_REST, 1));
    };
    at_rest();

    let start = clock::now_ns();
    let mut fingerprint = 0xcbf2_9ce4_8422_2325;
    let mut played = 0;
    while played < cases && clock::now_ns() - start < limit_ns {
        let case = first.wrapping_add(played);
        match host {
            Some(host) => host.write(CASE, case),
            None if played % BATCH == 0 => println!("case {case}"),
            None => {}
        }
        Program {
            registers,
            arena: &arena,
            aperture: aperture.as_mut(),
            random: Random::of_case(seed, case),
            fingerprint: &mut fingerprint,
            available: [0; 3],
        }
        .play();
        played += 1;
        if played % BATCH == 0 || played == cases {
            check(machine).map_err(|cause| format!("after case {case} of seed {seed}: {cause}"))?;
        }
    }
    let nanoseconds = clock::now_ns() - start;
    at_rest();
    println!(
        "fuzz seed={seed} first={first} cases={played} fingerprint={fingerprint:#018x} us={}",
        nanoseconds / 1000
    );
    Ok(())
}

/// Whether the device works: a session, a file, a request that does nothing.
fn check(machine: &Machine) -> Result<(), String> {
    let (mut session, _) = gpu::connect(machine)?;
    let file = session
        .open(open::RDWR)
        .map_err(|errno| format!("opening a file: {errno}"))?;
    session
        .nop()
        .map_err(|errno| format!("a request that does nothing: {errno}"))?;
    session
        .close(file)
        .map_err(|errno| format!("closing a file: {errno}"))
}
