//! The main job on real drivers: the test guest in L2 draws through the paravirtual GPU, the same scenario draws in L1
//! without a VM, and both pictures are equal byte for byte. They are left as PNG files in `/shared` for people.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_scenarios::{self as scenarios, Picture};

use super::mini_vmm::{Running, TEST_GUEST, start_guest};
use super::over::NO_APERTURE;
use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::loopback_file::LoopbackFile;
use crate::vanishing::{self, Loss};
use crate::{ensure, picture_file};

pub const TESTS: &[Test] = &[
    Test {
        name: "a_guest_draws_on_vgem_what_a_native_program_draws",
        run: || draws(&VGEM, "inline", &[]),
    },
    Test {
        name: "a_guest_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draws(&VIRTIO_GPU, "inline", &[]),
    },
    Test {
        name: "a_guest_draws_on_soft_what_is_drawn_without_a_vm",
        run: || draws(&SOFT, "inline", &[]),
    },
    Test {
        name: "a_guest_draws_on_vgem_with_a_worker_thread",
        run: || draws(&VGEM, "worker", &[]),
    },
    Test {
        name: "a_guest_draws_on_virtio_gpu_with_a_worker_thread",
        run: || draws(&VIRTIO_GPU, "worker", &[]),
    },
    Test {
        name: "a_guest_without_an_aperture_draws_on_virtio_gpu_what_a_native_program_draws",
        run: || draws(&VIRTIO_GPU, "inline", NO_APERTURE),
    },
    Test {
        name: "a_guest_without_an_aperture_gets_enodev_from_mmap_on_vgem",
        run: refused_mmap,
    },
    Test {
        name: "two_guests_draw_on_virtio_gpu_at_the_same_time",
        run: two_guests,
    },
    Test {
        name: "virtio_gpu_works_after_a_guest_was_killed_while_it_drew",
        run: killed_guest,
    },
    Test {
        name: "a_guest_whose_mapped_memory_goes_away_goes_on_with_zeros",
        run: || vanishing::beside_another_guest(Path::new(TEST_GUEST), Loss::CutOff),
    },
    Test {
        name: "a_guest_whose_mapped_memory_gives_efault_goes_on_with_zeros",
        run: || vanishing::beside_another_guest(Path::new(TEST_GUEST), Loss::NoAccess),
    },
];

/// A GPU for guests and the scenario that draws on it.
pub struct Gpu {
    /// The host driver's name.
    pub name: &'static str,
    /// What `--gpu` is told.
    pub argument: fn() -> Result<String, Failure>,
    /// Draws without a VM: natively where there is a kernel driver.
    draw: fn() -> Result<Picture, Failure>,
}

/// Dumb buffers need the card node.
pub const VGEM: Gpu = Gpu {
    name: "vgem",
    argument: || node("vgem", Kind::Card),
    draw: || {
        Ok(scenarios::vgem::draw(
            &mut find("vgem", Kind::Card)?,
            &mut |_, _| {},
        )?)
    },
};

/// 3D needs no more than the render node.
pub const VIRTIO_GPU: Gpu = Gpu {
    name: "virtio_gpu",
    argument: || node("virtio_gpu", Kind::Render),
    draw: || {
        Ok(scenarios::virtio_gpu::draw(
            &mut find("virtio_gpu", Kind::Render)?,
            &mut |_, _| {},
        )?)
    },
};

/// The embedded GPU is in this process as it is in mini-vmm's. It takes a quarter of a minute in L1, so it draws once.
pub const SOFT: Gpu = Gpu {
    name: "soft",
    argument: || Ok("soft".to_owned()),
    draw: || {
        static DRAWN: OnceLock<Picture> = OnceLock::new();
        if let Some(picture) = DRAWN.get() {
            return Ok(picture.clone());
        }
        let driver = SoftDriver::new(SoftConfig {
            watchdog: LIMIT,
            ..SoftConfig::default()
        })?;
        let picture =
            scenarios::soft::draw(&mut LoopbackFile::open(Arc::new(driver))?, &mut |_, _| {})?;
        Ok(DRAWN.get_or_init(|| picture).clone())
    },
};

fn node(driver: &str, kind: Kind) -> Result<String, Failure> {
    Ok(format!("drm:{}", find(driver, kind)?.path.display()))
}

/// Drawing takes about a second in L2; a request may take a hundred times as long as on hardware.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long a submission may run on the embedded GPU, in seconds.
pub const WATCHDOG: &str = "60";

/// A picture with fewer colours is taken for blank or for broken.
const ENOUGH_COLOURS: usize = 16;

fn draws(gpu: &Gpu, doorbell: &str, options: &[&str]) -> Result<(), Failure> {
    // The embedded GPU is emulated too: what takes it milliseconds elsewhere takes seconds here.
    let always = ["--doorbell", doorbell, "--watchdog", WATCHDOG];
    draws_on(gpu, &(gpu.argument)()?, &[&always[..], options].concat())
}

/// Draws on that GPU in a guest for which mini-vmm gets this `--gpu` and `more`, and checks the picture.
pub fn draws_on(gpu: &Gpu, argument: &str, more: &[&str]) -> Result<(), Failure> {
    let expected = expected(gpu)?;
    let drawing = Drawing::start(argument, more)?;
    let found = drawing.picture(&expected)?;
    for (who, picture) in [("native", &expected), ("guest", &found)] {
        picture_file::write_png(
            picture,
            Path::new(&format!("/shared/{}-{who}.png", gpu.name)),
        )?;
    }
    equal(&expected, &found)
}

/// Of vgem nobody can say when a program has written to a buffer or will read it.
fn refused_mmap() -> Result<(), Failure> {
    let ended = start_guest("draw", &(VGEM.argument)()?, NO_APERTURE)?.wait(LIMIT)?;
    ensure!(
        ended.code != 0 && ended.output.contains("mmap: ENODEV"),
        "the guest ended with {}: {}",
        ended.code,
        ended.tail()
    );
    Ok(())
}

fn two_guests() -> Result<(), Failure> {
    let expected = expected(&VIRTIO_GPU)?;
    let argument = (VIRTIO_GPU.argument)()?;
    let first = Drawing::start(&argument, &[])?;
    let second = Drawing::start(&argument, &[])?;
    equal(&expected, &first.picture(&expected)?)?;
    equal(&expected, &second.picture(&expected)?)
}

/// Killed after its commands were submitted, before it has read the picture back.
fn killed_guest() -> Result<(), Failure> {
    let expected = expected(&VIRTIO_GPU)?;
    let argument = (VIRTIO_GPU.argument)()?;
    Drawing::start(&argument, &[])?
        .guest
        .kill_when("step EXECBUFFER", LIMIT)?;
    let found = Drawing::start(&argument, &[])?.picture(&expected)?;
    equal(&expected, &found)
}

/// The picture that a guest has to draw.
pub fn expected(gpu: &Gpu) -> Result<Picture, Failure> {
    let picture = (gpu.draw)()?;
    let colours = picture.colours(ENOUGH_COLOURS);
    ensure!(
        colours == ENOUGH_COLOURS,
        "the picture drawn without a VM has only {colours} colours"
    );
    Ok(picture)
}

/// A guest that draws, and the file that its picture goes to.
pub struct Drawing {
    /// The guest.
    pub guest: Running,
    dump: PathBuf,
}

impl Drawing {
    /// Starts it; mini-vmm gets this `--gpu` and `more`.
    pub fn start(argument: &str, more: &[&str]) -> Result<Self, Failure> {
        let dump = tempfile::Builder::new()
            .prefix("guest-")
            .suffix(".rgba")
            .tempfile()?
            .into_temp_path()
            .keep()?;
        std::fs::remove_file(&dump)?;
        let path = dump.to_string_lossy();
        let guest = start_guest("draw", argument, &[&["--dump", &path], more].concat())?;
        Ok(Drawing { guest, dump })
    }

    /// Waits for the guest's success and gives its picture, which has the size of `expected`.
    pub fn picture(self, expected: &Picture) -> Result<Picture, Failure> {
        self.guest.wait(LIMIT)?.expect(0)?;
        let picture = picture_file::read_rgba(&self.dump, expected.width, expected.height)
            .map_err(|error| format!("the guest left no such picture: {error}"))?;
        std::fs::remove_file(&self.dump)?;
        Ok(picture)
    }
}

/// A failure unless they are equal.
pub fn equal(expected: &Picture, found: &Picture) -> Result<(), Failure> {
    match first_difference(expected, found) {
        None => Ok(()),
        Some(text) => Err(text.into()),
    }
}

/// Where and how two pictures of the same size differ first, counted from the top left.
fn first_difference(expected: &Picture, found: &Picture) -> Option<String> {
    let different = |(expected, found): (&[u8], &[u8])| expected != found;
    let pixels = || expected.rgba.chunks(4).zip(found.rgba.chunks(4));
    let first = u32::try_from(pixels().position(different)?).ok()?;
    let count = pixels().filter(|pair| different(*pair)).count();
    let (x, y) = (first % expected.width, first / expected.width);
    let (expected, found) = (expected.pixel(x, y), found.pixel(x, y));
    Some(format!(
        "{count} pixels differ; the first is ({x}, {y}): expected {expected:?}, from the guest {found:?}"
    ))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn a_difference_of_one_byte_is_found_and_named() {
        let expected = Picture {
            width: 2,
            height: 2,
            rgba: vec![7; 16],
        };
        let mut found = expected.clone();
        assert_eq!(first_difference(&expected, &found), None);
        found.rgba[13] = 8;
        let text = first_difference(&expected, &found).unwrap();
        assert_eq!(
            text,
            "1 pixels differ; the first is (1, 1): expected [7, 7, 7, 7], from the guest [7, 8, 7, 7]"
        );
    }
}
