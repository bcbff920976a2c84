//! The scenes, one file each; `scene.rs` has their table.

pub mod blending;
pub mod framebuffers;
pub mod instances;
pub mod knot;
pub mod mipmaps;
pub mod readback;
pub mod square;
pub mod textures;
pub mod triangles;
