//! The main job on real drivers: the test guest in L2 draws through the paravirtual GPU, the same scenario draws natively
//! in L1, and both pictures are equal byte for byte. Both are left as PNG files in `/shared` for people.

use std::path::Path;
use std::time::Duration;

use pvgpu_scenarios::{self as scenarios, Picture};

use super::mini_vmm::run;
use super::{Failure, Test};
use crate::drm_ioctl::{Kind, Node, find};
use crate::{ensure, picture_file};

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_draws_on_vgem_what_a_native_program_draws",
        run: || same_picture(&VGEM, "inline"),
    },
    Test {
        name: "a_guest_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || same_picture(&VIRTIO_GPU, "inline"),
    },
    Test {
        name: "a_guest_draws_on_vgem_with_a_worker_thread",
        run: || same_picture(&VGEM, "worker"),
    },
    Test {
        name: "a_guest_draws_on_virtio_gpu_with_a_worker_thread",
        run: || same_picture(&VIRTIO_GPU, "worker"),
    },
];

/// A host driver, the node that its scenario needs, and the scenario.
struct Driver {
    name: &'static str,
    kind: Kind,
    draw: fn(&mut Node) -> Result<Picture, scenarios::Failure>,
}

/// Dumb buffers need the card node.
const VGEM: Driver = Driver {
    name: "vgem",
    kind: Kind::Card,
    draw: |node| scenarios::vgem::draw(node, &mut |_, _| {}),
};

const VIRTIO_GPU: Driver = Driver {
    name: "virtio_gpu",
    kind: Kind::Render,
    draw: |node| scenarios::virtio_gpu::draw(node, &mut |_, _| {}),
};

/// Drawing takes about a second in L2; a request may take a hundred times as long as on hardware.
const LIMIT: Duration = Duration::from_secs(60);

/// A picture with fewer colours is taken for blank or for broken.
const ENOUGH_COLOURS: usize = 16;

fn same_picture(driver: &Driver, doorbell: &str) -> Result<(), Failure> {
    let mut node = find(driver.name, driver.kind)?;
    let native = (driver.draw)(&mut node)?;
    let gpu = format!("drm:{}", node.path.display());
    drop(node);
    let colours = native.colours(ENOUGH_COLOURS);
    ensure!(
        colours == ENOUGH_COLOURS,
        "the native picture has only {colours} colours"
    );

    let dump = std::env::temp_dir().join("guest.rgba");
    let _ = std::fs::remove_file(&dump);
    let scenario = "scenario=draw";
    let ended = run(
        &[
            "--kernel",
            "/boot/pvgpu-test-guest",
            "--cmdline",
            scenario,
            "--gpu",
            &gpu,
            "--doorbell",
            doorbell,
            "--dump",
            &dump.to_string_lossy(),
        ],
        LIMIT,
    )?;
    ensure!(
        ended.code == 0,
        "mini-vmm ended with code {}: {}",
        ended.code,
        ended.tail()
    );
    let guest = picture_file::read_rgba(&dump, native.width, native.height)
        .map_err(|error| format!("the guest left no such picture: {error}"))?;
    for (who, picture) in [("native", &native), ("guest", &guest)] {
        picture_file::write_png(
            picture,
            Path::new(&format!("/shared/{}-{who}.png", driver.name)),
        )?;
    }
    match first_difference(&native, &guest) {
        None => Ok(()),
        Some(text) => Err(text.into()),
    }
}

/// Where and how two pictures differ first, counted from the top left.
fn first_difference(native: &Picture, guest: &Picture) -> Option<String> {
    let different = |(native, guest): (&[u8], &[u8])| native != guest;
    let pixels = || native.rgba.chunks(4).zip(guest.rgba.chunks(4));
    let first = pixels().position(different)?;
    let count = pixels().filter(|pair| different(*pair)).count();
    let (x, y) = (
        u32::try_from(first).ok()? % native.width,
        u32::try_from(first).ok()? / native.width,
    );
    let (expected, found) = (native.pixel(x, y), guest.pixel(x, y));
    Some(format!(
        "{count} pixels differ; the first is ({x}, {y}): native {expected:?}, guest {found:?}"
    ))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn a_difference_of_one_byte_is_found_and_named() {
        let native = Picture {
            width: 2,
            height: 2,
            rgba: vec![7; 16],
        };
        let mut guest = native.clone();
        assert_eq!(first_difference(&native, &guest), None);
        guest.rgba[13] = 8;
        let text = first_difference(&native, &guest).unwrap();
        assert_eq!(
            text,
            "1 pixels differ; the first is (1, 1): native [7, 7, 7, 7], guest [7, 8, 7, 7]"
        );
    }
}
