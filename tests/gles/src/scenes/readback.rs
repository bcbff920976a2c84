//! Reading back: the rosette, read at once, in sixteen tiles, and through a buffer of the GPU with a fence. All three must
//! give the same pixels.

use pvgpu_scenarios::Picture;

use super::triangles::{Rosette, rosette};
use crate::gl::{PixelBuffer, Target};
use crate::scene::{Failure, SIZE, Scene, Stage};

/// Width and height of a tile in pixels.
const TILE: u32 = SIZE / 4;

/// The scene.
pub struct ThreeWays(Rosette);

impl ThreeWays {
    /// Compiles its shaders.
    pub fn new(stage: &Stage) -> Result<ThreeWays, Failure> {
        Ok(ThreeWays(Rosette::new(stage)?))
    }
}

impl Scene for ThreeWays {
    fn compute(&self, frame: u32) -> Vec<f32> {
        // Not the frames of `triangles` again.
        rosette(frame + 90)
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        self.0.draw(canvas, numbers)
    }

    fn picture(&mut self, canvas: &Target) -> Result<Picture, Failure> {
        let buffer = PixelBuffer::of(canvas)?;
        let picture = canvas.read()?;
        if buffer.take()? != picture {
            return Err(Failure::Differs("what a buffer of the GPU has"));
        }
        for (x, y) in (0..16).map(|tile| (tile % 4 * TILE, tile / 4 * TILE)) {
            let tile = canvas.read_part(x, y, TILE, TILE)?;
            // OpenGL counts rows from the bottom, a picture from the top.
            let top = SIZE - y - TILE;
            let same = (0..TILE).all(|row| {
                (0..TILE)
                    .all(|column| tile.pixel(column, row) == picture.pixel(x + column, top + row))
            });
            if !same {
                return Err(Failure::Differs("a tile"));
            }
        }
        Ok(picture)
    }
}
