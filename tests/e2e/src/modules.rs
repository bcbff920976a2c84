//! The kernel modules of a machine in the testbed: its first process (`l1-init`, `l2-init`) loads them.

use std::ffi::CString;
use std::fs::{self, File};

use crate::syscall;

/// Loads what `/modules/order` lists, each line a file name and parameters.
pub fn load_all() -> Result<(), String> {
    let order = fs::read_to_string("/modules/order")
        .map_err(|error| format!("cannot read /modules/order: {error}"))?;
    for line in order.lines() {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        load(file, parameters)?;
    }
    Ok(())
}

/// Loads the module in the file of that name in `/modules`, with `parameters` (`name=value ...`).
pub fn load(file: &str, parameters: &str) -> Result<(), String> {
    let because = |what: &str| format!("cannot {what} module {file}");
    let module = File::open(format!("/modules/{file}"))
        .map_err(|error| format!("{}: {error}", because("open")))?;
    let parameters = CString::new(parameters).map_err(|error| error.to_string())?;
    syscall::load_module(&module, &parameters)
        .map_err(|error| format!("{}: {error}", because("load")))
}
