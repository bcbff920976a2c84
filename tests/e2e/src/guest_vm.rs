//! The test guest in a VM on this machine's KVM: one scenario, from boot to exit, with everything that it said.
//!
//! The demo and the end-to-end tests use it; the testbed's L1 runs `mini-vmm` itself.

use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_mini_vmm::debug::DumpTarget;
use pvgpu_mini_vmm::gpu::Gpu;
use pvgpu_mini_vmm::serial::Console;
use pvgpu_mini_vmm::vm::{Outcome, Vm, VmConfig, VmError};
use pvgpu_scenarios::Picture;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Size of an aperture with room for the buffers of every scenario.
pub const APERTURE: u64 = 256 << 20;

/// What came of a run.
pub struct Run {
    /// How it ended, and what was counted.
    pub outcome: Outcome,
    /// The lines of the serial console.
    pub lines: Vec<String>,
    /// The picture that the guest dumped.
    pub picture: Option<Picture>,
}

/// Boots the test guest with these words on its command line and an aperture of that size, zero for none; and calls `line` for
/// each line that it prints.
pub fn run(
    guest: &Path,
    command_line: &str,
    driver: Arc<dyn HostDriver>,
    (doorbell, aperture): (Doorbell, u64),
    line: impl FnMut(&str) + Send + 'static,
) -> Result<Run, VmError> {
    let mut gpu = in_process(driver, doorbell);
    if let Gpu::InProcess { aperture: size, .. } = &mut gpu {
        *size = aperture;
    }
    run_with(guest, command_line, gpu, line)
}

/// As [`run`], with any GPU.
pub fn run_with(
    guest: &Path,
    command_line: &str,
    gpu: Gpu,
    line: impl FnMut(&str) + Send + 'static,
) -> Result<Run, VmError> {
    let lines = Lines::new(line);
    let config = config(guest, command_line, gpu, lines.clone());
    let mut outcome = Vm::new(config)?.run()?;
    let spoken = std::mem::take(&mut lines.lock().lines);
    let picture = outcome.dump.take().and_then(|rgba| {
        let (width, height) = spoken.iter().find_map(|line| dimensions(line))?;
        let complete = rgba.len() as u64 == u64::from(width) * u64::from(height) * 4;
        complete.then_some(Picture {
            width,
            height,
            rgba,
        })
    });
    Ok(Run {
        outcome,
        lines: spoken,
        picture,
    })
}

/// A GPU of this process with room for the buffers of every scenario.
pub fn in_process(driver: Arc<dyn HostDriver>, doorbell: Doorbell) -> Gpu {
    Gpu::InProcess {
        driver,
        aperture: APERTURE,
        device: DeviceConfig {
            doorbell,
            ..DeviceConfig::default()
        },
    }
}

/// The machine that [`run_with`] boots, for those who want to stop it.
pub fn config(guest: &Path, command_line: &str, gpu: Gpu, lines: Lines) -> VmConfig {
    let mut config = VmConfig::new(guest);
    config.cmdline = command_line.into();
    config.gpu = Some(gpu);
    config.console = Console::output(lines);
    config.dump = Some(DumpTarget::Memory);
    config
}

/// Width and height in the line `picture 1280x720, ...`.
fn dimensions(line: &str) -> Option<(u32, u32)> {
    let (size, _) = line.strip_prefix("picture ")?.split_once(',')?;
    let (width, height) = size.split_once('x')?;
    Some((width.parse().ok()?, height.parse().ok()?))
}

/// The serial console's lines: a sink for [`Console`].
#[derive(Clone)]
pub struct Lines(Arc<Mutex<Spoken>>);

struct Spoken {
    lines: Vec<String>,
    rest: Vec<u8>,
    heard: Box<dyn FnMut(&str) + Send>,
}

impl Lines {
    /// Calls `heard` for each line, on the thread of the vCPU that prints it, which waits meanwhile.
    pub fn new(heard: impl FnMut(&str) + Send + 'static) -> Lines {
        Lines(Arc::new(Mutex::new(Spoken {
            lines: Vec::new(),
            rest: Vec::new(),
            heard: Box::new(heard),
        })))
    }

    /// All lines so far.
    pub fn spoken(&self) -> Vec<String> {
        self.lock().lines.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Spoken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut spoken = self.lock();
        spoken.rest.extend_from_slice(bytes);
        while let Some(end) = spoken.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = spoken.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            (spoken.heard)(&line);
            spoken.lines.push(line);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_picture_is_read_from_its_line() {
        assert_eq!(dimensions("picture 12x7, fingerprint 0x1"), Some((12, 7)));
        assert_eq!(dimensions("a picture of 12x7, no"), None);
    }
}
