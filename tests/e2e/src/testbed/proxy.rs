//! Guest driver and host proxy in one process, in front of the kernel's drivers: a picture drawn through them equals the
//! native one, and what must be refused is refused. Without a VM, so that what fails here is not the VM's.

use std::sync::Arc;

use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_scenarios::{Picture, selftest, vgem, virtio_gpu};

use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;
use crate::loopback_file::LoopbackFile;

pub const TESTS: &[Test] = &[
    Test {
        name: "vgem_gives_the_same_picture_through_the_proxy_as_natively",
        run: || {
            let native = vgem::draw(&mut find("vgem", Kind::Card)?, &mut |_, _| {})?;
            let proxied = vgem::draw(&mut open("vgem", Kind::Card)?, &mut |_, _| {})?;
            equal(&native, &proxied)
        },
    },
    Test {
        name: "virtio_gpu_gives_the_same_picture_through_the_proxy_as_natively",
        run: || {
            let native = virtio_gpu::draw(&mut find("virtio_gpu", Kind::Render)?, &mut |_, _| {})?;
            let proxied = virtio_gpu::draw(&mut open("virtio_gpu", Kind::Render)?, &mut |_, _| {})?;
            equal(&native, &proxied)
        },
    },
    Test {
        name: "a_file_on_vgem_refuses_what_it_must",
        run: || {
            Ok(selftest::run(
                &mut open("vgem", Kind::Card)?,
                &mut |_, _| {},
            )?)
        },
    },
    Test {
        name: "a_file_on_virtio_gpu_refuses_what_it_must",
        run: || {
            let mut file = open("virtio_gpu", Kind::Render)?;
            Ok(selftest::run(&mut file, &mut |_, _| {})?)
        },
    },
];

/// A file of a guest whose GPU is the node of that driver.
fn open(driver: &str, kind: Kind) -> Result<LoopbackFile, Failure> {
    let node = find(driver, kind)?.path;
    Ok(LoopbackFile::open(Arc::new(DrmDriver::new(node)?))?)
}

fn equal(native: &Picture, proxied: &Picture) -> Result<(), Failure> {
    ensure!(
        native == proxied,
        "the picture is {:016x}, natively it is {:016x}",
        proxied.fingerprint(),
        native.fingerprint()
    );
    Ok(())
}
