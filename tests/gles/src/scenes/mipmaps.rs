//! Mipmaps: a plane to the horizon over which the eye flies. On the left, the driver has made the levels of its texture; on
//! the right, each level was uploaded in a colour of its own, so that the picture shows which one is read.

use super::square;
use crate::geometry::hue;
use crate::gl::{Blend, Filter, Mesh, Program, Shape, Target, Texture, Wrap};
use crate::scene::{Failure, Scene, Stage};

/// OpenGL ES 3: the place in the texture is divided by the distance at each pixel, and the derivatives of that pick the
/// level.
const VERTEX: &str = "#version 300 es
in vec2 place;
in vec2 where;
out vec2 screen;
out vec2 ground;
void main() { gl_Position = vec4(place, 0.0, 1.0); screen = place; ground = where; }
";
const FRAGMENT: &str = "#version 300 es
precision highp float;
in vec2 screen;
in vec2 ground;
uniform sampler2D picture;
out vec4 colour;
void main() {
    float depth = 1.0 / max(0.6 - screen.y, 0.001);
    vec2 at = vec2(screen.x * depth, depth) * 1.5 + ground;
    vec3 sky = mix(vec3(0.55, 0.72, 0.95), vec3(0.12, 0.25, 0.6), (screen.y - 0.55) * 2.2);
    vec3 plane = mix(texture(picture, at).rgb, vec3(0.55, 0.72, 0.95), clamp(depth / 40.0, 0.0, 1.0));
    colour = vec4(screen.y < 0.575 ? plane : sky, 1.0);
}
";

/// Width and height of the textures in pixels, and their levels.
const SIZE: u32 = 128;
const LEVELS: u8 = 8;

/// The scene.
pub struct Plane {
    program: Program,
    mesh: Mesh,
    made: Texture,
    uploaded: Texture,
}

fn tiles(column: u32, row: u32) -> [u8; 4] {
    let seam = column % 32 < 2 || row % 32 < 2;
    match (seam, (column / 32 + row / 32) % 2) {
        (true, _) => [30, 30, 40, 255],
        (_, 0) => [235, 225, 200, 255],
        _ => [150, 60, 45, 255],
    }
}

impl Plane {
    /// Makes and uploads its textures.
    pub fn new(stage: &Stage) -> Result<Plane, Failure> {
        let gl = &stage.gl;
        let texture = || Texture::new(gl, SIZE, SIZE, Filter::Mipmaps, Wrap::Repeat);
        let (made, uploaded) = (texture()?, texture()?);
        made.fill(0, tiles);
        made.make_mipmaps();
        for level in 0..LEVELS {
            let [red, green, blue] =
                hue(f32::from(level) / f32::from(LEVELS)).map(|value| (value * 255.0) as u8);
            let bar = (SIZE >> level) / 8;
            uploaded.fill(level, |column, row| match column < bar || row < bar {
                true => [20, 20, 30, 255],
                false => [red, green, blue, 255],
            });
        }
        Ok(Plane {
            program: Program::new(gl, VERTEX, FRAGMENT, &["place", "where"])?,
            mesh: square::mesh(gl)?,
            made,
            uploaded,
        })
    }
}

impl Scene for Plane {
    /// The left half, then the right half.
    fn compute(&self, frame: u32) -> Vec<f32> {
        let ground = [frame as f32 / 64.0, frame as f32 / 16.0];
        let half = |left: f32| {
            square::vertices([
                ([left, -1.0], ground),
                ([left + 1.0, -1.0], ground),
                ([left + 1.0, 1.0], ground),
                ([left, 1.0], ground),
            ])
        };
        half(-1.0).chain(half(0.0)).collect()
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        canvas.bind();
        let gl = canvas.gl();
        gl.blend(Blend::Off);
        gl.depth_test(false);
        gl.clear([0.0; 3]);
        let halves = numbers.chunks_exact(numbers.len() / 2);
        for (texture, vertices) in [&self.made, &self.uploaded].into_iter().zip(halves) {
            self.program.texture("picture", 0, texture);
            self.mesh.upload(vertices);
            self.mesh.draw(&self.program, Shape::Triangles);
        }
        Ok(())
    }
}
