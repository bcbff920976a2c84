//! A square that shows a texture through a shader: what the scenes with several passes are made of.

use crate::gl::{Gl, GlError, Mesh, Program, Shape};

const VERTEX: &str = "
attribute vec2 place;
attribute vec2 where;
varying vec2 at;
void main() { gl_Position = vec4(place, 0.0, 1.0); at = where; }
";

/// Shows the texture `picture` as it is.
pub const PLAIN: &str = "
precision mediump float;
varying vec2 at;
uniform sampler2D picture;
void main() { gl_FragColor = texture2D(picture, at); }
";

/// The program of a square with this fragment shader, which finds its place in the texture in `at`.
pub fn program(gl: &Gl, fragment: &str) -> Result<Program, GlError> {
    Program::new(gl, VERTEX, fragment, &["place", "where"])
}

/// A mesh for [`vertices`], to be drawn as [`Shape::Triangles`].
pub fn mesh(gl: &Gl) -> Result<Mesh, GlError> {
    Mesh::new(gl, &[2, 2])
}

/// Corner by corner from the lower left one, against the clock: where it is, and what part of the texture is there.
pub fn vertices(corners: [([f32; 2], [f32; 2]); 4]) -> impl Iterator<Item = f32> {
    [0, 1, 2, 0, 2, 3]
        .into_iter()
        .flat_map(move |corner: usize| [corners[corner].0, corners[corner].1].concat())
}

/// All of a target, showing all of a texture.
pub fn whole() -> Vec<f32> {
    let corner = |x: f32, y: f32| ([2.0 * x - 1.0, 2.0 * y - 1.0], [x, y]);
    vertices([
        corner(0.0, 0.0),
        corner(1.0, 0.0),
        corner(1.0, 1.0),
        corner(0.0, 1.0),
    ])
    .collect()
}

/// Draws all of the bound target with `program`.
pub fn fill(gl: &Gl, program: &Program) -> Result<(), GlError> {
    let mut mesh = mesh(gl)?;
    mesh.upload(&whole());
    mesh.draw(program, Shape::Triangles);
    Ok(())
}
