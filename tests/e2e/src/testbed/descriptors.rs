//! The file descriptors of a DRM node: what holds of them natively in L1 holds in a Linux guest in L2. The program
//! `node-descriptors` has the checks (`tests/e2e/src/descriptors.rs`).

use std::process::Command;
use std::time::Duration;

use super::boot::EXIT_CODE;
use super::linux::{Guest, ON_PCI};
use super::pictures::{Gpu, SOFT, VGEM, VIRTIO_GPU};
use super::{Failure, Test, over};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "descriptors_of_vgem_are_as_the_checks_say",
        run: || natively("vgem"),
    },
    Test {
        name: "descriptors_of_virtio_gpu_are_as_the_checks_say",
        run: || natively("virtio_gpu"),
    },
    Test {
        name: "descriptors_of_vgem_are_the_same_in_a_linux_6_1_guest",
        run: || in_guest("6.1", &VGEM, "inline", &[]),
    },
    Test {
        name: "descriptors_of_virtio_gpu_are_the_same_in_a_linux_6_1_guest",
        run: || in_guest("6.1", &VIRTIO_GPU, "inline", &[]),
    },
    Test {
        name: "descriptors_of_the_embedded_gpu_are_the_same_in_a_linux_6_1_guest",
        run: || in_guest("6.1", &SOFT, "worker", &[]),
    },
    Test {
        name: "descriptors_of_vgem_are_the_same_in_a_linux_6_12_guest",
        run: || in_guest("6.12", &VGEM, "worker", &[]),
    },
    Test {
        name: "descriptors_of_virtio_gpu_are_the_same_in_a_linux_6_12_guest",
        run: || in_guest("6.12", &VIRTIO_GPU, "worker", &[]),
    },
    Test {
        name: "descriptors_of_the_embedded_gpu_are_the_same_in_a_linux_6_12_guest",
        run: || in_guest("6.12", &SOFT, "inline", &[]),
    },
    Test {
        name: "descriptors_of_virtio_gpu_are_the_same_in_a_linux_6_12_guest_on_pci",
        run: || in_guest("6.12", &VIRTIO_GPU, "worker", ON_PCI),
    },
];

/// Booting takes seconds, and so does the embedded GPU's watchdog, several times.
const LIMIT: Duration = Duration::from_secs(150);

fn natively(driver: &str) -> Result<(), Failure> {
    let output = Command::new("/bin/node-descriptors")
        .args(["--driver", driver])
        .output()?;
    let lines = String::from_utf8_lossy(&output.stdout);
    let failed: Vec<_> = lines
        .lines()
        .filter(|line| !line.starts_with("ok "))
        .collect();
    ensure!(
        output.status.success() && failed.is_empty(),
        "node-descriptors ended with {}: {}",
        output.status,
        failed.join("; ")
    );
    Ok(())
}

fn in_guest(kernel: &str, gpu: &Gpu, doorbell: &str, options: &[&str]) -> Result<(), Failure> {
    let guest = Guest {
        kernel,
        memory: "512M",
        cpus: "2",
        parameters: &format!("l2.descriptors={}{}", gpu.name, over::parameter(options)),
        gpu: &(gpu.argument)()?,
        options: &[&["--doorbell", doorbell], options].concat(),
    };
    let ended = guest.start()?.wait(LIMIT)?;
    let failed: Vec<_> = ended
        .output
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("FAILED") || line.starts_with("the other process"))
        .collect();
    ensure!(failed.is_empty(), "in the guest: {}", failed.join("; "));
    ended.expect(EXIT_CODE)
}
