//! The kernel modules of a machine in the testbed: its first process (`l1-init`, `l2-init`) loads them.

use std::ffi::CString;
use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

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

/// Loads the guest driver, told where the GPU is as the kernel's command line has it; on PCI that says nothing.
pub fn load_guest_driver() -> Result<(), String> {
    load(GUEST_DRIVER, &guest_driver_parameters(&command_line()?))
}

/// Unloads the guest driver once nothing uses it any more. What was closed last is released by a worker thread of the kernel.
pub fn unload_guest_driver() -> Result<(), String> {
    /// Whatever uses it for longer was not closed.
    const SOON: Duration = Duration::from_secs(20);
    let started = Instant::now();
    while let Err(error) = syscall::unload_module(c"pvgpu") {
        if started.elapsed() > SOON {
            return Err(format!("cannot unload the guest driver: {error}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether this guest's GPU has an aperture, or this is no guest: `l2.no_aperture` on the kernel's command line says otherwise.
pub fn has_aperture() -> Result<bool, String> {
    Ok(!command_line()?.contains("l2.no_aperture"))
}

fn command_line() -> Result<String, String> {
    fs::read_to_string("/proc/cmdline")
        .map_err(|error| format!("cannot read /proc/cmdline: {error}"))
}

/// The file of the guest driver.
pub const GUEST_DRIVER: &str = "pvgpu.ko";

/// The guest driver's parameters where the kernel has that command line.
pub fn guest_driver_parameters(command_line: &str) -> String {
    let device = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("virtio_mmio.device="));
    device.map_or_else(String::new, |device| format!("mmio={device}"))
}

/// Whether there is that file in `/modules`.
pub fn exists(file: &str) -> bool {
    fs::exists(format!("/modules/{file}")).is_ok_and(|there| there)
}

/// Whether udev loads the module in that file of `/modules` for a device with that `modalias`.
pub fn is_for(file: &str, modalias: &str) -> Result<bool, String> {
    let module = fs::read(format!("/modules/{file}"))
        .map_err(|error| format!("cannot read module {file}: {error}"))?;
    // They stand in the module as strings that end by NUL.
    let mut aliases = module.split(|byte| *byte == 0).filter_map(|text| {
        let alias = text.strip_prefix(b"alias=")?;
        std::str::from_utf8(alias).ok()
    });
    Ok(aliases.any(|alias| matches(alias, modalias)))
}

/// Whether `text` is what `pattern` says, whose stars stand for anything.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|text| {
            let mut ends = text.char_indices().map(|(at, _)| at).chain([text.len()]);
            ends.any(|end| matches(rest, &text[end..]))
        }),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_of_an_alias_stand_for_anything() {
        let alias = "pci:v00001AF4d*sv*sd*bc*sc*i*";
        let device = "pci:v00001AF4d0000107Fsv00001AF4sd0000107Fbc03sc80i00";
        assert!(matches(alias, device));
        assert!(matches("virtio:d0000003Fv*", "virtio:d0000003Fv00001AF4"));
        assert!(matches("a*", "a"));
        for (pattern, text) in [
            (
                alias,
                "pci:v00001AF5d0000107Fsv00001AF4sd0000107Fbc03sc80i00",
            ),
            ("virtio:d0000003Fv*", "virtio:d00000010v00001AF4"),
            ("a", "ab"),
            ("*a", "b"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }
}
