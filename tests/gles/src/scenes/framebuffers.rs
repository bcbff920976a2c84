//! Framebuffers: the knot is drawn into a texture; what is bright in it is blurred, across and then down, and added.

use super::knot::Knot;
use super::square;
use crate::gl::{Filter, Program, Target, Texture, Wrap};
use crate::scene::{Failure, SIZE, Scene, Stage};

/// What is brighter than a threshold, blurred across.
const ACROSS: &str = "
precision mediump float;
varying vec2 at;
uniform sampler2D picture;
uniform float pitch;
void main() {
    vec3 sum = vec3(0.0);
    for (int i = -6; i <= 6; i++) {
        float weight = exp(-float(i * i) / 18.0) / 7.1;
        sum += max(texture2D(picture, at + vec2(pitch * float(i), 0.0)).rgb - 0.35, 0.0) * weight;
    }
    gl_FragColor = vec4(sum * 1.9, 1.0);
}
";
/// Blurred down.
const DOWN: &str = "
precision mediump float;
varying vec2 at;
uniform sampler2D picture;
uniform float pitch;
void main() {
    vec3 sum = vec3(0.0);
    for (int i = -6; i <= 6; i++) {
        float weight = exp(-float(i * i) / 18.0) / 7.1;
        sum += texture2D(picture, at + vec2(0.0, pitch * float(i))).rgb * weight;
    }
    gl_FragColor = vec4(sum, 1.0);
}
";
/// The sum, darker to the corners.
const SUM: &str = "
precision mediump float;
varying vec2 at;
uniform sampler2D picture;
uniform sampler2D glow;
void main() {
    vec2 away = at - 0.5;
    vec3 sum = texture2D(picture, at).rgb + texture2D(glow, at).rgb;
    gl_FragColor = vec4(sum * (1.0 - 0.9 * dot(away, away)), 1.0);
}
";

/// Width and height of the blurred pictures, in pixels.
const SMALL: u32 = 128;

/// The scene.
pub struct Glow {
    knot: Knot,
    across: Program,
    down: Program,
    sum: Program,
    sharp: Target,
    halfway: Target,
    blurred: Target,
}

impl Glow {
    /// Compiles its shaders and makes its textures.
    pub fn new(stage: &Stage) -> Result<Glow, Failure> {
        let gl = &stage.gl;
        let target = |size| -> Result<Target, Failure> {
            let texture = Texture::new(gl, size, size, Filter::Linear, Wrap::Clamp)?;
            Ok(Target::new(gl, texture)?)
        };
        let program = |shader| square::program(gl, shader);
        let (across, down) = (program(ACROSS)?, program(DOWN)?);
        for blur in [&across, &down] {
            blur.floats("pitch", &[1.0 / SMALL as f32]);
        }
        Ok(Glow {
            knot: Knot::new(stage)?,
            across,
            down,
            sum: program(SUM)?,
            sharp: target(SIZE)?,
            halfway: target(SMALL)?,
            blurred: target(SMALL)?,
        })
    }
}

impl Scene for Glow {
    fn compute(&self, frame: u32) -> Vec<f32> {
        self.knot.compute(frame)
    }

    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        let gl = canvas.gl();
        self.knot.draw(&self.sharp, numbers)?;
        self.halfway.bind();
        self.across.texture("picture", 0, &self.sharp.texture);
        square::fill(gl, &self.across)?;
        self.blurred.bind();
        self.down.texture("picture", 0, &self.halfway.texture);
        square::fill(gl, &self.down)?;
        canvas.bind();
        self.sum.texture("picture", 0, &self.sharp.texture);
        self.sum.texture("glow", 1, &self.blurred.texture);
        Ok(square::fill(gl, &self.sum)?)
    }
}
