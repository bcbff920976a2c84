//! What a guest in L2 is refused, on each host driver: the calls of the scenario `selftest`, through guest driver,
//! virtqueue and proxy.

use std::time::Duration;

use super::mini_vmm::run;
use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_on_vgem_gets_the_errnos_that_the_specification_names",
        run: || refused(&node("vgem", Kind::Card)?, "vgem"),
    },
    Test {
        name: "a_guest_on_virtio_gpu_gets_the_errnos_that_the_specification_names",
        run: || refused(&node("virtio_gpu", Kind::Render)?, "virtio_gpu"),
    },
    Test {
        name: "a_guest_on_the_embedded_gpu_gets_the_errnos_that_the_specification_names",
        run: || refused("soft", "soft"),
    },
];

/// About a second, and on the embedded GPU five more until its watchdog ends a hang.
const LIMIT: Duration = Duration::from_secs(60);

/// The value of `--gpu` for the node of that driver.
fn node(driver: &str, kind: Kind) -> Result<String, Failure> {
    Ok(format!("drm:{}", find(driver, kind)?.path.display()))
}

fn refused(gpu: &str, driver: &str) -> Result<(), Failure> {
    let kernel = "/boot/pvgpu-test-guest";
    let command_line = "scenario=selftest";
    let ended = run(
        &["--kernel", kernel, "--cmdline", command_line, "--gpu", gpu],
        LIMIT,
    )?;
    ensure!(
        ended.code == 0,
        "mini-vmm ended with code {}: {}",
        ended.code,
        ended.tail()
    );
    let expected = format!("calls on {driver}, each answered as it must be");
    ensure!(
        ended.output.contains(&expected),
        "the guest does not say that it made its calls on {driver}: {}",
        ended.tail()
    );
    Ok(())
}
