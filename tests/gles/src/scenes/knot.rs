//! A trefoil knot, lit from above: its tube is computed anew for each frame and uploaded.

use crate::geometry::{Vector, add, cross, hue, normalize, perspective, rotate, scale, sin_cos};
use crate::gl::{Blend, Mesh, Program, Shape, Target};
use crate::scene::{Failure, Scene, Stage};

const VERTEX: &str = "
attribute vec3 place;
attribute vec3 normal;
attribute vec3 colour;
uniform mat4 camera;
varying vec3 facing;
varying vec3 shade;
void main() { gl_Position = camera * vec4(place, 1.0); facing = normal; shade = colour; }
";
const FRAGMENT: &str = "
precision mediump float;
varying vec3 facing;
varying vec3 shade;
void main() {
    vec3 normal = normalize(facing);
    float light = max(dot(normal, vec3(0.36, 0.80, 0.48)), 0.0);
    float gloss = pow(max(dot(normal, vec3(0.21, 0.47, 0.86)), 0.0), 40.0);
    gl_FragColor = vec4(shade * (0.18 + 0.82 * light) + vec3(0.9) * gloss, 1.0);
}
";

/// Rings of the tube, and sides of each ring.
const RINGS: u16 = 96;
const SIDES: u16 = 16;

/// The scene.
pub struct Knot {
    program: Program,
    mesh: Mesh,
}

impl Knot {
    /// Compiles its shaders.
    pub fn new(stage: &Stage) -> Result<Knot, Failure> {
        let attributes = ["place", "normal", "colour"];
        let program = Program::new(&stage.gl, VERTEX, FRAGMENT, &attributes)?;
        program.floats("camera", &perspective(2.1, 2.0, 20.0, 9.5));
        Ok(Knot {
            program,
            mesh: Mesh::new(&stage.gl, &[3, 3, 3])?,
        })
    }
}

/// The middle of the tube after so much of its length, with the two directions at right angles to it.
fn spine(part: f32) -> (Vector, Vector, Vector) {
    let (s1, c1) = sin_cos(part);
    let (s2, c2) = sin_cos(2.0 * part);
    let (s3, c3) = sin_cos(3.0 * part);
    let middle = [s1 + 2.0 * s2, c1 - 2.0 * c2, -s3];
    let ahead = [c1 + 4.0 * c2, 4.0 * s2 - s1, -3.0 * c3];
    let bend = [-s1 - 8.0 * s2, 8.0 * c2 - c1, 9.0 * s3];
    let aside = normalize(cross(ahead, bend));
    (middle, normalize(cross(aside, ahead)), aside)
}

/// Place (3), normal (3) and colour (3) of a vertex of the tube.
fn vertex(ring: u16, side: u16, frame: u32) -> [f32; 9] {
    let part = f32::from(ring) / f32::from(RINGS);
    let (middle, inwards, aside) = spine(part);
    let (sine, cosine) = sin_cos(f32::from(side) / f32::from(SIDES));
    // A wave runs along the tube.
    let (wave, _) = sin_cos(8.0 * part - frame as f32 / 40.0);
    let normal = add(scale(inwards, cosine), scale(aside, sine));
    let place = add(middle, scale(normal, 0.55 + 0.12 * wave));
    let (y, x) = (frame as f32 / 120.0, 0.06 + frame as f32 / 300.0);
    let (place, normal) = (rotate(place, y, x), rotate(normal, y, x));
    let [red, green, blue] = hue(part * 2.0 + frame as f32 / 200.0);
    [
        place[0], place[1], place[2], normal[0], normal[1], normal[2], red, green, blue,
    ]
}

impl Scene for Knot {
    fn compute(&self, frame: u32) -> Vec<f32> {
        let mut strip = Vec::new();
        for ring in 0..RINGS {
            // The strip of one ring ends and that of the next starts in a triangle without area.
            strip.extend(vertex(ring, 0, frame));
            for side in 0..=SIDES {
                strip.extend(vertex(ring, side, frame));
                strip.extend(vertex(ring + 1, side, frame));
            }
            strip.extend(vertex(ring + 1, SIDES, frame));
        }
        strip
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.blend(Blend::Off);
        gl.depth_test(true);
        gl.clear([0.03, 0.03, 0.08]);
        self.mesh.upload(numbers);
        self.mesh.draw(&self.program, Shape::Strip);
        gl.depth_test(false);
        Ok(())
    }
}
