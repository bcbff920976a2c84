//! Blending: discs that circle over a grey ramp, in each quarter of the picture mixed in another way.

use crate::geometry::{hue, sin_cos};
use crate::gl::{Blend, Mesh, Program, Shape, Target};
use crate::scene::{Failure, Scene, Stage};

const VERTEX: &str = "
attribute vec2 place;
attribute vec4 colour;
varying vec4 shade;
void main() { gl_Position = vec4(place, 0.0, 1.0); shade = colour; }
";
const FRAGMENT: &str = "
precision mediump float;
varying vec4 shade;
void main() { gl_FragColor = shade; }
";

/// Triangles of a disc, discs of a quarter.
const SLICES: u16 = 48;
const DISCS: u16 = 7;

/// How each quarter mixes, from the lower left one.
const QUARTERS: [Blend; 4] = [Blend::Alpha, Blend::Add, Blend::Multiply, Blend::Subtract];

/// The scene.
pub struct Discs {
    program: Program,
    mesh: Mesh,
}

impl Discs {
    /// Compiles its shaders.
    pub fn new(stage: &Stage) -> Result<Discs, Failure> {
        Ok(Discs {
            program: Program::new(&stage.gl, VERTEX, FRAGMENT, &["place", "colour"])?,
            mesh: Mesh::new(&stage.gl, &[2, 4])?,
        })
    }
}

/// The ramp: dark below, bright above.
fn ramp() -> Vec<f32> {
    let corners = [[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]];
    let vertex = |[x, y]: [u8; 2]| {
        let grey = 0.25 + 0.5 * f32::from(y);
        let place = [x, y].map(|part| 2.0 * f32::from(part) - 1.0);
        [place[0], place[1], grey, grey, grey, 1.0]
    };
    corners.into_iter().flat_map(vertex).collect()
}

impl Scene for Discs {
    fn compute(&self, frame: u32) -> Vec<f32> {
        let mut vertices = Vec::new();
        for quarter in 0..4_u8 {
            let middle = [f32::from(quarter % 2) - 0.5, f32::from(quarter / 2) - 0.5];
            for disc in 0..DISCS {
                let part = f32::from(disc) / f32::from(DISCS);
                let (sine, cosine) = sin_cos(part + frame as f32 / 75.0);
                let [x, y] = [middle[0] + 0.22 * cosine, middle[1] + 0.22 * sine];
                let [red, green, blue] = hue(part);
                let rim = |slice: u16| {
                    let (sine, cosine) = sin_cos(f32::from(slice) / f32::from(SLICES));
                    [x + 0.2 * cosine, y + 0.2 * sine, red, green, blue, 0.35]
                };
                for slice in 0..SLICES {
                    vertices.extend([x, y, red, green, blue, 0.9]);
                    vertices.extend(rim(slice));
                    vertices.extend(rim(slice + 1));
                }
            }
        }
        vertices
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.depth_test(false);
        gl.blend(Blend::Off);
        gl.clear([0.0; 3]);
        self.mesh.upload(&ramp());
        self.mesh.draw(&self.program, Shape::Triangles);
        let quarters = numbers.chunks_exact(numbers.len() / QUARTERS.len());
        for (blend, vertices) in QUARTERS.into_iter().zip(quarters) {
            gl.blend(blend);
            self.mesh.upload(vertices);
            self.mesh.draw(&self.program, Shape::Triangles);
        }
        gl.blend(Blend::Off);
        Ok(())
    }
}
