//! The GPU in a process of its own, `pvgpu-proxyd`: guests behind mini-vmm's front end draw on it what they draw in process.

use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use super::over::{NO_APERTURE, PROXYD};
use super::pictures::{Gpu, SOFT, VGEM, VIRTIO_GPU, WATCHDOG, draws_on};
use super::{Failure, Test};
use super::{linux, mesa};
use crate::daemon::Daemon;
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_draws_on_vgem_over_vhost_user",
        run: || bare_metal(&VGEM, &[]),
    },
    Test {
        name: "a_guest_draws_on_virtio_gpu_over_vhost_user",
        run: || bare_metal(&VIRTIO_GPU, &[]),
    },
    Test {
        name: "a_guest_without_an_aperture_draws_on_virtio_gpu_over_vhost_user",
        run: || bare_metal(&VIRTIO_GPU, NO_APERTURE),
    },
    Test {
        name: "a_guest_draws_on_soft_over_vhost_user",
        run: || bare_metal(&SOFT, &[]),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_vgem_over_vhost_user",
        run: || linux("6.1", &VGEM),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_virtio_gpu_over_vhost_user",
        run: || linux("6.1", &VIRTIO_GPU),
    },
    Test {
        name: "a_linux_6_1_guest_draws_on_soft_over_vhost_user",
        run: || linux("6.1", &SOFT),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_vgem_over_vhost_user",
        run: || linux("6.12", &VGEM),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_virtio_gpu_over_vhost_user",
        run: || linux("6.12", &VIRTIO_GPU),
    },
    Test {
        name: "a_linux_6_12_guest_draws_on_soft_over_vhost_user",
        run: || linux("6.12", &SOFT),
    },
    Test {
        name: "gles_draws_in_a_linux_6_1_guest_over_vhost_user_what_it_draws_natively",
        run: || gles("6.1", &[]),
    },
    Test {
        name: "gles_draws_in_a_linux_6_12_guest_over_vhost_user_what_it_draws_natively",
        run: || gles("6.12", &[]),
    },
    Test {
        name: "gles_draws_in_a_linux_6_1_guest_without_an_aperture_over_vhost_user_what_it_draws_natively",
        run: || gles("6.1", NO_APERTURE),
    },
    Test {
        name: "the_daemon_serves_a_guest_as_a_user_who_may_use_the_node_and_nothing_else",
        run: unprivileged,
    },
];

/// A user who owns nothing.
const NOBODY: u32 = 65_534;

/// A daemon with that GPU, and what mini-vmm's `--gpu` is told to use it.
fn daemon(gpu: &Gpu, user: Option<u32>) -> Result<(Daemon, String), Failure> {
    let host = (gpu.argument)()?;
    let options = ["--gpu", &host, "--watchdog", WATCHDOG];
    let daemon = Daemon::start_as(user, Path::new(PROXYD), &options)?;
    let argument = format!("vhost-user:{}", daemon.socket().display());
    Ok((daemon, argument))
}

fn bare_metal(gpu: &Gpu, options: &[&str]) -> Result<(), Failure> {
    let (_daemon, argument) = daemon(gpu, None)?;
    draws_on(gpu, &argument, options)
}

fn linux(kernel: &str, gpu: &Gpu) -> Result<(), Failure> {
    let (_daemon, argument) = daemon(gpu, None)?;
    linux::draw_on(kernel, gpu, &argument, &[])
}

fn gles(kernel: &str, options: &[&str]) -> Result<(), Failure> {
    let (_daemon, argument) = daemon(&VIRTIO_GPU, None)?;
    mesa::gles_on(&argument, kernel, options)
}

fn unprivileged() -> Result<(), Failure> {
    let host = (VIRTIO_GPU.argument)()?;
    let node = host.trim_start_matches("drm:");
    let owner = std::fs::metadata(node)?;
    chown(node, Some(NOBODY), None)?;
    let drawn = daemon(&VIRTIO_GPU, Some(NOBODY)).and_then(|(daemon, argument)| {
        let process = std::fs::metadata(format!("/proc/{}/stat", daemon.id()))?;
        // Not even its own user may look into it, so its files in /proc belong to root; what it runs as is in its status.
        ensure!(process.uid() == 0, "others can look into the daemon");
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
        let runs_as = format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}");
        ensure!(status.contains(&runs_as), "it runs as another user");
        draws_on(&VIRTIO_GPU, &argument, &[])
    });
    chown(node, Some(owner.uid()), None)?;
    drawn
}
