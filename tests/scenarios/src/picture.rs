//! The result of a scenario: a picture as the program read it back.

use alloc::vec::Vec;

/// Pixels, row after row from the top, without gaps between rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Four bytes per pixel: red, green, blue, alpha; `width * height * 4` of them.
    pub rgba: Vec<u8>,
}

impl Picture {
    /// The pixel at (`x`, `y`), counted from the top left corner; zeros outside of the picture.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 4] {
        if x >= self.width || y >= self.height {
            return [0; 4];
        }
        let index = (y as usize * self.width as usize + x as usize) * 4;
        self.rgba
            .get(index..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .unwrap_or_default()
    }

    /// Number of different colours, counted up to `enough`.
    pub fn colours(&self, enough: usize) -> usize {
        let mut seen = alloc::collections::BTreeSet::new();
        for pixel in self.rgba.chunks_exact(4) {
            seen.insert(pixel);
            if seen.len() >= enough {
                break;
            }
        }
        seen.len()
    }

    /// FNV-1a over size and pixels: names a picture in one word, for reports.
    pub fn fingerprint(&self) -> u64 {
        let size = [self.width.to_le_bytes(), self.height.to_le_bytes()];
        size.as_flattened()
            .iter()
            .chain(&self.rgba)
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
            })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn a_pixel_is_found_by_column_and_row() {
        let mut picture = Picture {
            width: 3,
            height: 2,
            rgba: vec![0; 24],
        };
        picture.rgba[20..].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(picture.pixel(2, 1), [1, 2, 3, 4]);
        assert_eq!(picture.pixel(3, 1), [0; 4]);
        assert_eq!(picture.colours(10), 2);
    }

    #[test]
    fn pictures_that_differ_in_one_byte_or_in_shape_have_different_fingerprints() {
        let picture = |width, height, last| Picture {
            width,
            height,
            rgba: vec![0, 0, 0, 0, 0, 0, 0, last],
        };
        assert_ne!(
            picture(2, 1, 0).fingerprint(),
            picture(2, 1, 1).fingerprint()
        );
        assert_ne!(
            picture(2, 1, 0).fingerprint(),
            picture(1, 2, 0).fingerprint()
        );
    }
}
