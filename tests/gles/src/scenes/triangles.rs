//! Coloured triangles: a rosette of three rings that turn against each other.

use crate::geometry::{hue, sin_cos};
use crate::gl::{Blend, Mesh, Program, Shape, Target};
use crate::scene::{Failure, Scene, Stage};

const VERTEX: &str = "
attribute vec2 place;
attribute vec3 colour;
varying vec3 shade;
void main() { gl_Position = vec4(place, 0.0, 1.0); shade = colour; }
";
const FRAGMENT: &str = "
precision mediump float;
varying vec3 shade;
void main() { gl_FragColor = vec4(shade, 1.0); }
";

/// Triangles in each ring.
const RAYS: u16 = 48;

/// The scene.
pub struct Rosette {
    program: Program,
    mesh: Mesh,
}

impl Rosette {
    /// Compiles its shaders.
    pub fn new(stage: &Stage) -> Result<Rosette, Failure> {
        Ok(Rosette {
            program: Program::new(&stage.gl, VERTEX, FRAGMENT, &["place", "colour"])?,
            mesh: Mesh::new(&stage.gl, &[2, 3])?,
        })
    }
}

/// The rosette's vertices in frame `frame`: place (2) and colour (3).
pub fn rosette(frame: u32) -> Vec<f32> {
    let mut vertices = Vec::new();
    for (ring, direction) in [(0, 1.0), (1, -1.0), (2, 1.0)] {
        let radius = 0.95 - 0.29 * ring as f32;
        for ray in 0..RAYS {
            let turn = f32::from(ray) / f32::from(RAYS) + direction * frame as f32 / 180.0;
            let bright = hue(turn + 0.33 * ring as f32);
            let dark = bright.map(|value| value * 0.12);
            let corners = [
                (turn, radius, bright),
                (turn + 0.012, radius - 0.3, dark),
                (turn - 0.012, radius - 0.3, dark),
            ];
            for (turn, radius, colour) in corners {
                let (sine, cosine) = sin_cos(turn);
                vertices.extend([cosine * radius, sine * radius]);
                vertices.extend(colour);
            }
        }
    }
    vertices
}

impl Scene for Rosette {
    fn compute(&self, frame: u32) -> Vec<f32> {
        rosette(frame)
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.blend(Blend::Off);
        gl.depth_test(false);
        gl.clear([0.02, 0.02, 0.06]);
        self.mesh.upload(numbers);
        self.mesh.draw(&self.program, Shape::Triangles);
        Ok(())
    }
}
