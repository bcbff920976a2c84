//! `scenario=selftest`: makes the calls that a device file must refuse ([`pvgpu_scenarios::selftest`]), whatever host driver is
//! behind it.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use core::cell::RefCell;

use pvgpu_scenarios::selftest;

use crate::device_file::GuestFile;
use crate::machine::Machine;
use crate::{gpu, println};

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let (session, aperture) = gpu::connect(machine)?;
    let driver = session.host().driver;
    let session = Rc::new(RefCell::new(session));
    let mut file = GuestFile::open(&session, aperture).map_err(|errno| format!("open: {errno}"))?;
    let mut count = 0;
    let mut report = |_: &'static str, _: u64| count += 1;
    selftest::run(&mut file, &mut report).map_err(|failure| failure.to_string())?;
    println!("{count} calls on {driver}, each answered as it must be");
    Ok(())
}
