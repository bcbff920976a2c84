//! The kernel's vgem driver, natively: what a guest's buffer objects on it are compared with.

use pvgpu_scenarios as scenarios;

use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "vgem_gives_dumb_buffers_that_keep_what_is_written",
        run: dumb_buffers,
    },
    Test {
        name: "vgem_shares_the_picture_of_one_file_with_another",
        run: picture,
    },
];

fn dumb_buffers() -> Result<(), Failure> {
    let node = find("vgem", Kind::Card)?;
    let first = node.create_dumb(64, 48)?;
    let second = node.create_dumb(64, 48)?;
    ensure!(
        first.handle != second.handle,
        "two buffers have the same handle {}",
        first.handle
    );
    ensure!(
        first.size >= 64 * 48 * 4,
        "a buffer of 64x48 pixels has only {} bytes",
        first.size
    );
    let (one, other) = (node.map_dumb(&first)?, node.map_dumb(&second)?);
    let value = |index: usize| {
        u32::try_from(index)
            .unwrap_or(0)
            .wrapping_mul(2_654_435_761)
    };
    for index in 0..one.words() {
        one.write(index, value(index));
        other.write(index, !value(index));
    }
    drop(one);
    let again = node.map_dumb(&first)?;
    for index in 0..again.words() {
        let found = again.read(index);
        ensure!(
            found == value(index),
            "word {index} is {found:#x}, not {:#x}",
            value(index)
        );
    }
    Ok(())
}

fn picture() -> Result<(), Failure> {
    scenarios::vgem::draw(&mut find("vgem", Kind::Card)?, &mut |_, _| {})?;
    Ok(())
}
