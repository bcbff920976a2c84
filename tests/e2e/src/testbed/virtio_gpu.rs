//! The kernel's virtio_gpu driver with 3D (virgl), natively.

use pvgpu_scenarios as scenarios;

use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "virtio_gpu_has_3d",
        run: three_d,
    },
    Test {
        name: "virtio_gpu_gives_the_virgl_capability_set",
        run: virgl_capability_set,
    },
    Test {
        name: "virtio_gpu_draws_the_same_picture_twice",
        run: picture,
    },
];

/// `VIRTGPU_PARAM_3D_FEATURES` of virtgpu_drm.h.
const PARAM_3D_FEATURES: u64 = 1;

/// `VIRTIO_GPU_CAPSET_VIRGL` of virtio_gpu.h.
const CAPSET_VIRGL: u32 = 1;

fn three_d() -> Result<(), Failure> {
    for kind in [Kind::Render, Kind::Card] {
        let value = find("virtio_gpu", kind)?.virtgpu_parameter(PARAM_3D_FEATURES)?;
        ensure!(
            value == 1,
            "GETPARAM of 3D_FEATURES on the {kind:?} node is {value}, not 1"
        );
    }
    Ok(())
}

/// The set starts with its version and with bit masks of the formats that can be sampled (`union virgl_caps`):
/// a GPU without formats is no GPU.
fn virgl_capability_set() -> Result<(), Failure> {
    let capabilities =
        find("virtio_gpu", Kind::Render)?.virtgpu_capabilities(CAPSET_VIRGL, 1, 308)?;
    let version = u32::from_le_bytes([
        capabilities[0],
        capabilities[1],
        capabilities[2],
        capabilities[3],
    ]);
    ensure!(
        version == 1,
        "the capability set says version {version}, not 1"
    );
    ensure!(
        capabilities[4..68].iter().any(|byte| *byte != 0),
        "no texture format can be sampled"
    );
    Ok(())
}

/// Without this, comparing a guest's picture with a native one says nothing.
fn picture() -> Result<(), Failure> {
    let draw = || -> Result<scenarios::Picture, Failure> {
        let mut node = find("virtio_gpu", Kind::Render)?;
        Ok(scenarios::virtio_gpu::draw(&mut node, &mut |_, _| {})?)
    };
    let (first, second) = (draw()?, draw()?);
    ensure!(
        first == second,
        "two runs gave pictures {:016x} and {:016x}",
        first.fingerprint(),
        second.fingerprint()
    );
    Ok(())
}
