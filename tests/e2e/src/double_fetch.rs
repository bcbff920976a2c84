//! A VM whose second vCPU changes requests and descriptors while the proxy reads them: the host's side of the test guest's
//! `scenario=doublefetch`. The end-to-end tests call it, on this machine's KVM and in the testbed.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use std::{sync::Arc, thread};

use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_mini_vmm::{Console, Ending, Gpu, Vm, VmConfig};
use tempfile::NamedTempFile;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::guest_vm::Lines;
use crate::inspection::{Tally, compare};
use crate::recording::Recording;
use crate::testbed::Failure;

/// Longest message.
const LIMIT: u32 = 1024;
/// Performed and refused requests without which there was no race.
const ENOUGH: u64 = 50;
/// A guest that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(100);

/// Runs `rounds` submissions of the guest of that file. An error when anything but the checked copy of a request has
/// reached the driver, when the guest fails, or when nothing was changed in time.
pub fn race(guest: &Path, doorbell: Doorbell, rounds: u32) -> Result<Tally, Failure> {
    let driver = Arc::new(Recording::inspecting());
    let record = driver.record();
    let families = driver.families();
    let trace = NamedTempFile::new()?;
    let lines = Lines::new(|_| ());
    let vm = Vm::new(VmConfig {
        cmdline: format!("scenario=doublefetch rounds={rounds}"),
        cpus: 2,
        gpu: Some(Gpu::InProcess {
            driver,
            aperture: 0,
            device: DeviceConfig {
                doorbell,
                limits: Limits {
                    message: LIMIT,
                    ..Limits::default()
                },
                trace: Some(trace.reopen()?),
                ..DeviceConfig::default()
            },
        }),
        console: Console::output(lines.clone()),
        ..VmConfig::new(guest)
    })?;
    for region in vm.memory().memory().iter() {
        let start = region.as_ptr().addr();
        record.forbid(start..start + usize::try_from(region.len())?);
    }
    let (stop, (ended, end)) = (vm.stop(), channel::<()>());
    let watch = thread::spawn(move || {
        if end.recv_timeout(TIME_LIMIT) == Err(RecvTimeoutError::Timeout) {
            stop.end(Ending::Stopped { signal: None });
        }
    });
    let outcome = vm.run();
    drop(ended);
    let _ = watch.join();
    let outcome = outcome?;
    if outcome.ending != (Ending::Exit { code: 0 }) {
        let said = lines.spoken().pop().unwrap_or_default();
        return Err(format!("the guest ended badly ({:?}): {said}", outcome.ending).into());
    }
    let inspected = record.inspected();
    if let Some(violation) = inspected.violation {
        return Err(violation.into());
    }
    let trace = fs::read(trace.path())?;
    let tally = compare(families, &inspected.seen, &trace, usize::try_from(LIMIT)?)?;
    let gpu = outcome.gpu.ok_or("no statistics")?;
    let refused = gpu.rejected + gpu.malformed;
    if (tally.performed as u64) < ENOUGH || refused < ENOUGH {
        return Err(format!("no race: {tally:?}, {refused} refused").into());
    }
    Ok(tally)
}
