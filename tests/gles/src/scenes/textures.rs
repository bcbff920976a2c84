//! Textures: a three by three sheet of panels, one for each filter and each way to repeat; a part of the texture is uploaded
//! anew in each frame.

use super::square;
use crate::geometry::{hue, sin_cos};
use crate::gl::{Blend, Filter, Mesh, Program, Shape, Target, Texture, Wrap};
use crate::scene::{Failure, Scene, Stage};

/// Width and height of each texture, and of the square in it that changes, in pixels.
const SIZE: u32 = 32;
const PATCH: u32 = 6;

/// The scene.
pub struct Panels {
    program: Program,
    mesh: Mesh,
    /// One for each panel.
    textures: Vec<Texture>,
}

/// A weave of two colours with a bright frame, so that edges and repetitions can be told.
fn weave(column: u32, row: u32) -> [u8; 4] {
    let edge = [0, SIZE - 1].contains(&column) || [0, SIZE - 1].contains(&row);
    let level = |value: u32| (value * 255 / (SIZE - 1)) as u8;
    match (edge, (column / 4 + row / 4) % 2) {
        (true, _) => [255, 240, 200, 255],
        (_, 0) => [level(column), 40, level(row), 255],
        _ => [20, level(row), level(SIZE - 1 - column), 255],
    }
}

impl Panels {
    /// Uploads its textures.
    pub fn new(stage: &Stage) -> Result<Panels, Failure> {
        let gl = &stage.gl;
        let mut textures = Vec::new();
        for wrap in [Wrap::Clamp, Wrap::Repeat, Wrap::Mirror] {
            for filter in [Filter::Nearest, Filter::Linear, Filter::Mipmaps] {
                textures.push(Texture::new(gl, SIZE, SIZE, filter, wrap)?);
            }
        }
        Ok(Panels {
            program: square::program(gl, square::PLAIN)?,
            mesh: square::mesh(gl)?,
            textures,
        })
    }
}

impl Scene for Panels {
    /// The frame's number, then the vertices of each panel.
    fn compute(&self, frame: u32) -> Vec<f32> {
        let mut numbers = vec![frame as f32];
        let (sine, cosine) = sin_cos(frame as f32 / 90.0 + 0.03);
        for panel in 0..9_u8 {
            let (column, row) = (f32::from(panel % 3), f32::from(panel / 3));
            let corner = |x: f32, y: f32| {
                let place = [
                    (column + 0.04 + 0.92 * x) * 2.0 / 3.0 - 1.0,
                    (row + 0.04 + 0.92 * y) * 2.0 / 3.0 - 1.0,
                ];
                // Twice the texture's size, turned about its middle.
                let (u, v) = (2.0 * x - 1.0, 2.0 * y - 1.0);
                (
                    place,
                    [0.5 + u * cosine - v * sine, 0.5 + u * sine + v * cosine],
                )
            };
            numbers.extend(square::vertices([
                corner(0.0, 0.0),
                corner(1.0, 0.0),
                corner(1.0, 1.0),
                corner(0.0, 1.0),
            ]));
        }
        numbers
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.blend(Blend::Off);
        gl.depth_test(false);
        gl.clear([0.08, 0.08, 0.1]);
        let Some((frame, vertices)) = numbers.split_first() else {
            return Ok(());
        };
        let colour = hue(frame / 24.0).map(|value| (value * 255.0) as u8);
        let steps = (SIZE - PATCH) as u16;
        let place = (frame * 3.0) as u32 % u32::from(steps);
        let panels = vertices.chunks_exact(vertices.len() / self.textures.len());
        for (texture, panel) in self.textures.iter().zip(panels) {
            texture.fill(0, weave);
            let [red, green, blue] = colour;
            texture.fill_square(place, SIZE / 2, PATCH, [red, green, blue, 255]);
            texture.make_mipmaps();
            self.program.texture("picture", 0, texture);
            self.mesh.upload(panel);
            self.mesh.draw(&self.program, Shape::Triangles);
        }
        Ok(())
    }
}
