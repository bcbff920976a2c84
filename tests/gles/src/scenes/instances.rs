//! Instances: one petal, drawn for each of many places and colours by a single call, which make the head of a sunflower.

use crate::geometry::{hue, sin_cos};
use crate::gl::{Blend, Mesh, Program, Shape, Target};
use crate::scene::{Failure, Scene, Stage};

const VERTEX: &str = "#version 300 es
in vec2 corner;
in vec4 petal;
in vec3 colour;
flat out vec3 shade;
out vec2 inside;
void main() {
    vec2 turned = vec2(corner.x * petal.z - corner.y * petal.w, corner.x * petal.w + corner.y * petal.z);
    gl_Position = vec4(petal.xy + turned, 0.0, 1.0);
    shade = colour;
    inside = corner;
}
";
const FRAGMENT: &str = "#version 300 es
precision highp float;
flat in vec3 shade;
in vec2 inside;
out vec4 colour;
void main() { colour = vec4(shade * (1.0 - 0.75 * abs(inside.y)), 1.0); }
";

/// Petals, and what part of a turn lies between one and the next: the golden angle.
const PETALS: u16 = 900;
const GOLDEN: f32 = 0.381_966;

/// The corners of a petal of length 1 along the x axis.
const CORNERS: [[f32; 2]; 6] = [
    [0.0, 0.0],
    [0.5, -0.45],
    [1.0, 0.0],
    [0.0, 0.0],
    [1.0, 0.0],
    [0.5, 0.45],
];

/// The scene.
pub struct Flower {
    program: Program,
    petal: Mesh,
    places: Mesh,
}

impl Flower {
    /// Compiles its shaders and uploads the petal.
    pub fn new(stage: &Stage) -> Result<Flower, Failure> {
        let gl = &stage.gl;
        let attributes = ["corner", "petal", "colour"];
        let mut petal = Mesh::new(gl, &[2])?;
        petal.upload(CORNERS.as_flattened());
        Ok(Flower {
            program: Program::new(gl, VERTEX, FRAGMENT, &attributes)?,
            petal,
            places: Mesh::new(gl, &[4, 3])?,
        })
    }
}

impl Scene for Flower {
    /// Of each petal its place (2), its direction times its length (2) and its colour (3).
    fn compute(&self, frame: u32) -> Vec<f32> {
        let mut petals = Vec::new();
        // From the rim to the middle, so that inner petals cover outer ones.
        for number in (0..PETALS).rev() {
            let part = f32::from(number) / f32::from(PETALS);
            let radius = 0.9 * part.sqrt();
            let turn = f32::from(number) * GOLDEN + frame as f32 / 150.0;
            let (sine, cosine) = sin_cos(turn);
            let (breath, _) = sin_cos(part * 3.0 - frame as f32 / 30.0);
            let length = 0.05 + 0.09 * part + 0.02 * breath;
            petals.extend([
                radius * cosine,
                radius * sine,
                cosine * length,
                sine * length,
            ]);
            petals.extend(hue(0.02 + 0.14 * part + 0.6 * part * part));
        }
        petals
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.blend(Blend::Off);
        gl.depth_test(false);
        gl.clear([0.04, 0.07, 0.05]);
        self.places.upload(numbers);
        self.petal
            .draw_instances(&self.program, Shape::Triangles, &self.places);
        Ok(())
    }
}
