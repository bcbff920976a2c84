//! The scenes: what each one is, and the table of all. `main.rs` and [`crate::bench`] draw them frame by frame; each scene
//! is one file in `scenes/`.
//!
//! A frame depends on nothing but its number: no clock, no random number, no C library's sine, so that its picture is the
//! same in a guest and on its host.

use std::path::PathBuf;

use pvgpu_scenarios::Picture;

use crate::egl::{Context, Display, EglError};
use crate::gbm::GbmError;
use crate::gl::{Filter, Gl, GlError, Target, Texture, Wrap};
use crate::scenes::{
    blending, framebuffers, instances, knot, mipmaps, readback, textures, triangles,
};
use crate::sharing::{self, SharingError};

/// Width and height of all pictures, in pixels.
pub const SIZE: u32 = 512;

/// Why a scene was not drawn, or not right.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// EGL.
    #[error(transparent)]
    Egl(#[from] EglError),
    /// libgbm.
    #[error(transparent)]
    Gbm(#[from] GbmError),
    /// OpenGL ES.
    #[error(transparent)]
    Gl(#[from] GlError),
    /// Another process.
    #[error(transparent)]
    Sharing(#[from] SharingError),
    /// The same pixels, got in two ways, are not the same.
    #[error(
        "{0} differs from the picture read back at once: the driver or what is below it is broken"
    )]
    Differs(&'static str),
}

/// Something that draws frames. What a frame costs is told apart by these steps: `compute` is all of the processor's work
/// that the scene does itself, `draw` hands it to the driver, `picture` waits for the GPU.
pub trait Scene {
    /// The numbers of frame `frame`, most often its vertices.
    fn compute(&self, frame: u32) -> Vec<f32>;

    /// Draws what was computed into `canvas`.
    fn draw(&mut self, canvas: &Target, numbers: &[f32]) -> Result<(), Failure>;

    /// The picture of what was drawn last.
    fn picture(&mut self, canvas: &Target) -> Result<Picture, Failure> {
        Ok(canvas.read()?)
    }
}

/// What a scene is made on.
pub struct Stage {
    /// The context, current.
    pub gl: Gl,
    /// The node's path; none when the processor draws.
    pub node: Option<PathBuf>,
    /// What is drawn into.
    pub canvas: Target,
}

impl Stage {
    /// A stage for `entry` on the node, or with `None` on the processor.
    pub fn new(node: Option<PathBuf>, entry: &Entry) -> Result<Stage, Failure> {
        let display = Display::open(node.as_deref())?;
        let gl = Gl::new(Context::new(&display, entry.version)?);
        let texture = Texture::new(&gl, SIZE, SIZE, Filter::Linear, Wrap::Clamp)?;
        let canvas = Target::new(&gl, texture)?;
        Ok(Stage { gl, node, canvas })
    }
}

/// A row of the table.
pub struct Entry {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// The version of OpenGL ES that it is written for: 2 or 3.
    pub version: u32,
    /// Whether it shares buffers, which needs a DRM node.
    pub node: bool,
    /// Makes it.
    pub make: fn(&Stage) -> Result<Box<dyn Scene>, Failure>,
}

/// All scenes, what is simplest first.
pub const SCENES: &[Entry] = &[
    Entry {
        name: "triangles",
        about: "coloured triangles, no textures, no depth",
        version: 2,
        node: false,
        make: |stage| Ok(Box::new(triangles::Rosette::new(stage)?)),
    },
    Entry {
        name: "knot",
        about: "a knot with light and depth, its vertices computed anew for each frame",
        version: 2,
        node: false,
        make: |stage| Ok(Box::new(knot::Knot::new(stage)?)),
    },
    Entry {
        name: "textures",
        about: "filters, repetitions and partial uploads of textures",
        version: 2,
        node: false,
        make: |stage| Ok(Box::new(textures::Panels::new(stage)?)),
    },
    Entry {
        name: "blending",
        about: "discs that mix by alpha, sum, product and difference",
        version: 2,
        node: false,
        make: |stage| Ok(Box::new(blending::Discs::new(stage)?)),
    },
    Entry {
        name: "framebuffers",
        about: "the knot with a glow: four passes over textures that were drawn into",
        version: 2,
        node: false,
        make: |stage| Ok(Box::new(framebuffers::Glow::new(stage)?)),
    },
    Entry {
        name: "mipmaps",
        about: "a plane to the horizon, its levels made by the driver on the left and uploaded on the right",
        version: 3,
        node: false,
        make: |stage| Ok(Box::new(mipmaps::Plane::new(stage)?)),
    },
    Entry {
        name: "instances",
        about: "one petal drawn 900 times in one call",
        version: 3,
        node: false,
        make: |stage| Ok(Box::new(instances::Flower::new(stage)?)),
    },
    Entry {
        name: "readback",
        about: "a picture read back at once, in tiles, and through a buffer with a fence: all must be equal",
        version: 3,
        node: false,
        make: |stage| Ok(Box::new(readback::ThreeWays::new(stage)?)),
    },
    Entry {
        name: "sharing",
        about: "a buffer of GBM that a second process gets as a dma-buf, compares and draws with",
        version: 2,
        node: true,
        make: |stage| Ok(Box::new(sharing::Shared::of_buffer(stage)?)),
    },
    Entry {
        name: "export",
        about: "the same with a texture that EGL exports as a dma-buf",
        version: 2,
        node: true,
        make: |stage| Ok(Box::new(sharing::Shared::of_texture(stage)?)),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scene_has_a_name_of_its_own() {
        let mut names: Vec<_> = SCENES.iter().map(|entry| entry.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), SCENES.len());
        assert!(!names.contains(&"all"));
    }
}
