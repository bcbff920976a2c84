//! The scenario of `vgem`, on its card node: memory that the CPU draws into, shared between two files. The program
//! draws the Mandelbrot set into a dumb buffer, exports it with PRIME, imports it into a second file, and reads the
//! picture back through the second file's mapping.

use alloc::vec;
use alloc::vec::Vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_FD_TO_HANDLE, PRIME_HANDLE_TO_FD, PrimeFdToHandle, PrimeHandleToFd,
    prime,
};
use pvgpu_protocol::family::vgem::{
    CREATE_DUMB, CreateDumb, DESTROY_DUMB, DestroyDumb, MAP_DUMB, MapDumb,
};

use crate::steps::{Failure, Report, Steps, expect_driver};
use crate::{DeviceFile, Mapping, Picture, check};

/// Size of the picture in pixels.
const WIDTH: u32 = 512;
const HEIGHT: u32 = 384;

/// Runs the scenario.
pub fn draw<D: DeviceFile>(file: &mut D, report: &mut impl Report) -> Result<Picture, Failure> {
    let mut other = file.open_again().map_err(|errno| Failure::Call {
        step: "open again",
        errno,
    })?;
    let mut steps = Steps { file, report };
    expect_driver(&mut steps, b"vgem")?;

    let dumb = steps.ioctl(
        "CREATE_DUMB",
        CREATE_DUMB,
        CreateDumb {
            height: HEIGHT,
            width: WIDTH,
            bpp: 32,
            ..Default::default()
        },
    )?;
    let row = WIDTH as usize * 4;
    let (pitch, length) = (dumb.pitch as usize, dumb.size as usize);
    check!(
        dumb.handle != 0 && pitch >= row && length >= pitch * HEIGHT as usize,
        "CREATE_DUMB gave handle {}, pitch {pitch}, {length} bytes for {WIDTH}x{HEIGHT}",
        dumb.handle
    );
    let mut mapping = map_dumb(&mut steps, dumb.handle, length)?;
    let expected = mandelbrot();
    steps.call("draw", |_| {
        for (y, pixels) in expected.chunks_exact(row).enumerate() {
            mapping.write(y * pitch, pixels);
        }
        Ok(())
    })?;

    // Out and in again, in the same file: the same object has the same handle.
    let exported = steps.ioctl(
        "PRIME_HANDLE_TO_FD",
        PRIME_HANDLE_TO_FD,
        PrimeHandleToFd {
            handle: dumb.handle,
            flags: prime::CLOEXEC | prime::RDWR,
            fd: -1,
        },
    )?;
    let import = PrimeFdToHandle {
        fd: exported.fd,
        ..Default::default()
    };
    let again = steps.ioctl("PRIME_FD_TO_HANDLE", PRIME_FD_TO_HANDLE, import)?;
    check!(
        again.handle == dumb.handle,
        "importing what was exported as handle {} gave handle {}",
        dumb.handle,
        again.handle
    );

    // Into a second file: its own handle, the same memory.
    let mut second = Steps {
        file: &mut other,
        report: &mut *steps.report,
    };
    let imported = second.ioctl(
        "PRIME_FD_TO_HANDLE (second file)",
        PRIME_FD_TO_HANDLE,
        import,
    )?;
    let mut view = map_dumb(&mut second, imported.handle, length)?;
    let mut rows = vec![0; expected.len()];
    second.call("read back", |_| {
        for (y, pixels) in rows.chunks_exact_mut(row).enumerate() {
            view.read(y * pitch, pixels);
        }
        Ok(())
    })?;
    if let Some(index) = (0..rows.len()).find(|index| rows[*index] != expected[*index]) {
        check!(
            false,
            "byte {index} reads {:#04x} in the second file, {:#04x} was drawn in the first",
            rows[index],
            expected[index]
        );
    }
    // And back: what the second file writes, the first one sees.
    view.write(0, b"other side");
    let mut seen = [0; 10];
    mapping.read(0, &mut seen);
    check!(
        &seen == b"other side",
        "the first file does not see what the second one writes"
    );

    // Each file lets go of its handle; then it has none.
    drop(view);
    second.ioctl(
        "GEM_CLOSE (second file)",
        GEM_CLOSE,
        GemClose {
            handle: imported.handle,
            pad: 0,
        },
    )?;
    steps.call("close the exported fd", |file| file.close_fd(exported.fd))?;
    drop(mapping);
    steps.ioctl(
        "DESTROY_DUMB",
        DESTROY_DUMB,
        DestroyDumb {
            handle: dumb.handle,
        },
    )?;
    steps.refused(
        "MAP_DUMB of a destroyed buffer",
        MAP_DUMB,
        MapDumb {
            handle: dumb.handle,
            ..Default::default()
        },
        Errno::ENOENT,
    )?;

    // XRGB8888 is blue, green, red, unused in memory.
    let rgba = rows
        .chunks_exact(4)
        .flat_map(|pixel| [pixel[2], pixel[1], pixel[0], 0xff])
        .collect();
    Ok(Picture {
        width: WIDTH,
        height: HEIGHT,
        rgba,
    })
}

fn map_dumb<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    handle: u32,
    length: usize,
) -> Result<D::Mapping, Failure> {
    let map = steps.ioctl(
        "MAP_DUMB",
        MAP_DUMB,
        MapDumb {
            handle,
            ..Default::default()
        },
    )?;
    steps.map("mmap", map.offset, length)
}

/// The Mandelbrot set as XRGB8888, rows without gaps. In integers, so that every processor draws the same.
fn mandelbrot() -> Vec<u8> {
    const ROUNDS: u32 = 96;
    /// Numbers have 24 binary places.
    const ONE: i64 = 1 << 24;
    let step = 3 * ONE / i64::from(WIDTH);
    let mut pixels = Vec::with_capacity((WIDTH * HEIGHT * 4) as usize);
    for y in 0..i64::from(HEIGHT) {
        for x in 0..i64::from(WIDTH) {
            let re = x * step - ONE * 9 / 4;
            let im = (y - i64::from(HEIGHT / 2)) * step;
            let (mut a, mut b, mut round) = (0, 0, 0);
            while round < ROUNDS {
                let (aa, bb) = ((a * a) >> 24, (b * b) >> 24);
                if aa + bb > 4 * ONE {
                    break;
                }
                (a, b) = (aa - bb + re, ((a * b) >> 23) + im);
                round += 1;
            }
            let inside = round == ROUNDS;
            // From deep blue over orange to white, brighter the nearer to the set.
            let ramp =
                |first: u32, slope: u32| (first + round.saturating_sub(1) * slope).min(0xff) as u8;
            let [red, green, blue] = if inside {
                [0x0a, 0x06, 0x14]
            } else {
                [ramp(0x0c, 19), ramp(0x10, 8), ramp(0x2c, 5)]
            };
            pixels.extend_from_slice(&[blue, green, red, 0]);
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_the_set_in_its_middle_and_none_of_it_in_its_corner() {
        let pixels = mandelbrot();
        assert_eq!(pixels.len(), (WIDTH * HEIGHT * 4) as usize);
        let pixel = |x: u32, y: u32| {
            let at = ((y * WIDTH + x) * 4) as usize;
            &pixels[at..at + 4]
        };
        // -0.5 is inside, -2.25 + 1.125i is outside.
        assert_eq!(pixel(WIDTH * 7 / 12, HEIGHT / 2), [0x14, 0x06, 0x0a, 0]);
        assert_eq!(pixel(0, 0), [0x2c, 0x10, 0x0c, 0]);
    }
}
