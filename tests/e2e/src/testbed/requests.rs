//! Requests of the test guest in L2 that draw nothing: those that do nothing, and those that must be refused, on every GPU.

use std::path::Path;
use std::time::Duration;

use pvgpu_host_proxy::device::Doorbell;

use super::mini_vmm::start_guest;
use super::pictures::{Gpu, SOFT, VGEM, VIRTIO_GPU};
use super::{Failure, Test};
use crate::double_fetch::race;

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_reaches_the_proxy_inline_and_by_worker",
        run: no_operations,
    },
    Test {
        name: "a_guest_on_vgem_is_refused_what_it_must_not_do",
        run: || refused(&VGEM),
    },
    Test {
        name: "a_guest_on_virtio_gpu_is_refused_what_it_must_not_do",
        run: || refused(&VIRTIO_GPU),
    },
    Test {
        name: "a_guest_on_soft_is_refused_what_it_must_not_do",
        run: || refused(&SOFT),
    },
    Test {
        name: "a_hostile_guest_plays_generated_programs_and_the_device_works_after_them",
        run: generated_programs,
    },
    Test {
        name: "a_second_vcpu_that_changes_requests_while_they_are_read_changes_nothing_behind_the_check",
        run: double_fetch,
    },
];

/// None of them takes more than a few seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// The guest itself checks that 64 requests at once take one doorbell.
fn no_operations() -> Result<(), Failure> {
    for doorbell in ["inline", "worker"] {
        start_guest("device", "soft", &["--doorbell", doorbell])?
            .wait(LIMIT)?
            .expect(0)?;
    }
    Ok(())
}

fn refused(gpu: &Gpu) -> Result<(), Failure> {
    start_guest("selftest", &(gpu.argument)()?, &[])?
        .wait(LIMIT)?
        .expect(0)
}

/// The guest itself looks at the device after each 64 cases.
fn generated_programs() -> Result<(), Failure> {
    for doorbell in ["inline", "worker"] {
        let gpu = ["--doorbell", doorbell];
        start_guest("fuzz seed=7 cases=128", "soft", &gpu)?
            .wait(LIMIT)?
            .expect(0)?;
    }
    Ok(())
}

fn double_fetch() -> Result<(), Failure> {
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        race(Path::new("/boot/pvgpu-test-guest"), doorbell, 400)?;
    }
    Ok(())
}
