//! OpenGL ES, as much of it as the scenes need, so that they draw without `unsafe`: programs, meshes, textures, targets and
//! pixel buffers, each deleted with its value. Sizes and counts are checked here against what was uploaded.
//!
//! Nothing here waits for the GPU but [`Gl::finish`], [`Target::read`] and [`PixelBuffer::take`].
#![allow(unsafe_code)]

use std::rc::Rc;

use glow::HasContext;
use pvgpu_scenarios::Picture;

use crate::egl::{Context, EglError, Image};

/// Why something was not drawn.
#[derive(Debug, thiserror::Error)]
pub enum GlError {
    /// EGL.
    #[error(transparent)]
    Egl(#[from] EglError),
    /// `glGetError` had something to say.
    #[error("OpenGL ES reports {} after {during}", error_name(*code))]
    Reported {
        /// What was done.
        during: &'static str,
        /// `GL_INVALID_*` or `GL_OUT_OF_MEMORY`.
        code: u32,
    },
    /// A shader does not compile or a program does not link.
    #[error("the driver refuses a shader: {0}")]
    Shader(String),
    /// An object could not be made.
    #[error("the driver cannot make an object: {0}")]
    Object(String),
    /// A framebuffer cannot be drawn to.
    #[error("the driver cannot draw into such a framebuffer (status 0x{0:04x})")]
    Incomplete(u32),
    /// The GPU has not done what a fence waits for.
    #[error("the GPU did not come to a fence within {0} s")]
    Fence(u32),
    /// A buffer could not be mapped.
    #[error("the driver cannot map a buffer of {0} bytes")]
    Map(usize),
}

fn error_name(code: u32) -> String {
    match code {
        glow::INVALID_ENUM => "INVALID_ENUM".to_owned(),
        glow::INVALID_VALUE => "INVALID_VALUE".to_owned(),
        glow::INVALID_OPERATION => "INVALID_OPERATION".to_owned(),
        glow::INVALID_FRAMEBUFFER_OPERATION => "INVALID_FRAMEBUFFER_OPERATION".to_owned(),
        glow::OUT_OF_MEMORY => "OUT_OF_MEMORY".to_owned(),
        other => format!("error 0x{other:04x}"),
    }
}

/// A context's functions. Clones are the same context, which is current as long as one of them, or an object made of one,
/// lives: that is what the `SAFETY` comments below mean by "current".
#[derive(Clone)]
pub struct Gl(Rc<Current>);

struct Current {
    raw: glow::Context,
    context: Context,
}

/// How what is drawn mixes with what is there.
#[derive(Clone, Copy)]
pub enum Blend {
    /// It replaces it.
    Off,
    /// By its alpha.
    Alpha,
    /// Their sum.
    Add,
    /// Their product.
    Multiply,
    /// What is there, less what is drawn.
    Subtract,
}

impl Gl {
    /// The functions of a context that is current.
    pub fn new(context: Context) -> Gl {
        // SAFETY: `context` is current and stays so as long as `Current`; EGL gives addresses of its functions.
        let raw = unsafe { glow::Context::from_loader_function(|name| context.function(name)) };
        Gl(Rc::new(Current { raw, context }))
    }

    /// The context.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// `GL_RENDERER` and `GL_VERSION`.
    pub fn renderer(&self) -> (String, String) {
        // SAFETY: current.
        unsafe {
            (
                self.0.raw.get_parameter_string(glow::RENDERER),
                self.0.raw.get_parameter_string(glow::VERSION),
            )
        }
    }

    /// Fills the bound target with a colour (red, green, blue; opaque) and its depth with the farthest.
    pub fn clear(&self, [red, green, blue]: [f32; 3]) {
        // SAFETY: current.
        unsafe {
            self.0.raw.clear_color(red, green, blue, 1.0);
            self.0
                .raw
                .clear(glow::COLOR_BUFFER_BIT | glow::DEPTH_BUFFER_BIT);
        }
    }

    /// How what is drawn from now on mixes with what is there. The alpha of the target stays.
    pub fn blend(&self, blend: Blend) {
        let gl = &self.0.raw;
        let (equation, source, destination) = match blend {
            // SAFETY: current.
            Blend::Off => return unsafe { gl.disable(glow::BLEND) },
            Blend::Alpha => (glow::FUNC_ADD, glow::SRC_ALPHA, glow::ONE_MINUS_SRC_ALPHA),
            Blend::Add => (glow::FUNC_ADD, glow::SRC_ALPHA, glow::ONE),
            Blend::Multiply => (glow::FUNC_ADD, glow::DST_COLOR, glow::ZERO),
            Blend::Subtract => (glow::FUNC_REVERSE_SUBTRACT, glow::SRC_ALPHA, glow::ONE),
        };
        // SAFETY: current.
        unsafe {
            gl.enable(glow::BLEND);
            gl.blend_equation_separate(equation, glow::FUNC_ADD);
            gl.blend_func_separate(source, destination, glow::ZERO, glow::ONE);
        }
    }

    /// Whether what is drawn from now on is hidden by what is nearer.
    pub fn depth_test(&self, on: bool) {
        // SAFETY: current.
        unsafe {
            match on {
                true => self.0.raw.enable(glow::DEPTH_TEST),
                false => self.0.raw.disable(glow::DEPTH_TEST),
            }
        }
    }

    /// Gives the GPU all that was drawn.
    pub fn flush(&self) {
        // SAFETY: current.
        unsafe { self.0.raw.flush() }
    }

    /// Waits until the GPU has drawn everything.
    pub fn finish(&self) {
        // SAFETY: current.
        unsafe { self.0.raw.finish() }
    }

    /// Fails if a call since the last check did.
    pub fn check(&self, during: &'static str) -> Result<(), GlError> {
        // SAFETY: current.
        match unsafe { self.0.raw.get_error() } {
            glow::NO_ERROR => Ok(()),
            code => Err(GlError::Reported { during, code }),
        }
    }
}

/// A vertex and a fragment shader.
pub struct Program {
    gl: Gl,
    raw: glow::NativeProgram,
}

impl Program {
    /// Compiles and links. The attributes get the places 0, 1, ... in the order of `attributes`.
    pub fn new(
        gl: &Gl,
        vertex: &str,
        fragment: &str,
        attributes: &[&str],
    ) -> Result<Program, GlError> {
        let raw = &gl.0.raw;
        // SAFETY: current; each object is one of this context.
        unsafe {
            let program = Program {
                gl: gl.clone(),
                raw: raw.create_program().map_err(GlError::Object)?,
            };
            for (kind, source) in [
                (glow::VERTEX_SHADER, vertex),
                (glow::FRAGMENT_SHADER, fragment),
            ] {
                let shader = raw.create_shader(kind).map_err(GlError::Object)?;
                raw.shader_source(shader, source);
                raw.compile_shader(shader);
                raw.attach_shader(program.raw, shader);
                let compiled = raw.get_shader_compile_status(shader);
                let said = raw.get_shader_info_log(shader);
                // It lives on as long as the program.
                raw.delete_shader(shader);
                if !compiled {
                    return Err(GlError::Shader(said));
                }
            }
            for (place, name) in (0..).zip(attributes) {
                raw.bind_attrib_location(program.raw, place, name);
            }
            raw.link_program(program.raw);
            match raw.get_program_link_status(program.raw) {
                true => Ok(program),
                false => Err(GlError::Shader(raw.get_program_info_log(program.raw))),
            }
        }
    }

    /// Sets a uniform of 1 to 4 floats, or with 16 a matrix, column after column.
    pub fn floats(&self, name: &str, values: &[f32]) {
        let raw = &self.gl.0.raw;
        // SAFETY: current; glow passes as many values as the slice has.
        unsafe {
            raw.use_program(Some(self.raw));
            let place = raw.get_uniform_location(self.raw, name);
            let place = place.as_ref();
            match values {
                [x] => raw.uniform_1_f32(place, *x),
                [x, y] => raw.uniform_2_f32(place, *x, *y),
                [x, y, z] => raw.uniform_3_f32(place, *x, *y, *z),
                [x, y, z, w] => raw.uniform_4_f32(place, *x, *y, *z, *w),
                matrix => raw.uniform_matrix_4_f32_slice(place, false, matrix),
            }
        }
    }

    /// Sets a sampler: it reads `texture`, bound to unit `unit` until another one is.
    pub fn texture(&self, name: &str, unit: u8, texture: &Texture) {
        let raw = &self.gl.0.raw;
        // SAFETY: current.
        unsafe {
            raw.use_program(Some(self.raw));
            let place = raw.get_uniform_location(self.raw, name);
            raw.uniform_1_i32(place.as_ref(), i32::from(unit));
            raw.active_texture(glow::TEXTURE0 + u32::from(unit));
            raw.bind_texture(glow::TEXTURE_2D, Some(texture.raw));
            raw.active_texture(glow::TEXTURE0);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: current; used no more.
        unsafe { self.gl.0.raw.delete_program(self.raw) }
    }
}

/// What the vertices of a mesh make.
#[derive(Clone, Copy)]
pub enum Shape {
    /// Three make a triangle.
    Triangles,
    /// Each with the two before it.
    Strip,
}

/// Vertices in a buffer of the GPU.
pub struct Mesh {
    gl: Gl,
    raw: glow::NativeBuffer,
    /// Floats of each attribute.
    layout: &'static [u8],
    /// Vertices in the buffer.
    count: i32,
}

impl Mesh {
    /// An empty buffer for vertices whose attributes have so many floats each, 1 to 4.
    pub fn new(gl: &Gl, layout: &'static [u8]) -> Result<Mesh, GlError> {
        // SAFETY: current.
        let raw = unsafe { gl.0.raw.create_buffer() }.map_err(GlError::Object)?;
        Ok(Mesh {
            gl: gl.clone(),
            raw,
            layout,
            count: 0,
        })
    }

    /// Floats per vertex.
    fn floats(&self) -> usize {
        self.layout.iter().map(|size| usize::from(*size)).sum()
    }

    /// Replaces the vertices; floats that make no whole vertex at the end are not used.
    pub fn upload(&mut self, vertices: &[f32]) {
        let bytes: Vec<u8> = vertices
            .iter()
            .flat_map(|float| float.to_le_bytes())
            .collect();
        let raw = &self.gl.0.raw;
        // SAFETY: current.
        unsafe {
            raw.bind_buffer(glow::ARRAY_BUFFER, Some(self.raw));
            raw.buffer_data_u8_slice(glow::ARRAY_BUFFER, &bytes, glow::STREAM_DRAW);
        }
        self.count = i32::try_from(vertices.len() / self.floats()).unwrap_or(0);
    }

    /// Draws all vertices.
    pub fn draw(&self, program: &Program, shape: Shape) {
        self.draw_with(program, shape, None);
    }

    /// Draws all vertices once for each one of `instances`, whose attributes come after those of the vertices.
    pub fn draw_instances(&self, program: &Program, shape: Shape, instances: &Mesh) {
        self.draw_with(program, shape, Some(instances));
    }

    fn draw_with(&self, program: &Program, shape: Shape, instances: Option<&Mesh>) {
        let raw = &self.gl.0.raw;
        let mode = match shape {
            Shape::Triangles => glow::TRIANGLES,
            Shape::Strip => glow::TRIANGLE_STRIP,
        };
        let mut places = 0;
        // SAFETY: current; no more vertices and instances are drawn than their buffers have, and only their attributes are
        // enabled, so that the GPU reads nothing else.
        unsafe {
            raw.use_program(Some(program.raw));
            for (mesh, step) in [(Some(self), 0), (instances, 1)] {
                let Some(mesh) = mesh else { continue };
                raw.bind_buffer(glow::ARRAY_BUFFER, Some(mesh.raw));
                let stride = i32::try_from(mesh.floats() * 4).unwrap_or(0);
                let mut offset = 0;
                for size in mesh.layout {
                    let size = i32::from(*size);
                    raw.enable_vertex_attrib_array(places);
                    raw.vertex_attrib_pointer_f32(places, size, glow::FLOAT, false, stride, offset);
                    if instances.is_some() {
                        raw.vertex_attrib_divisor(places, step);
                    }
                    offset += size * 4;
                    places += 1;
                }
            }
            match instances {
                None => raw.draw_arrays(mode, 0, self.count),
                Some(instances) => raw.draw_arrays_instanced(mode, 0, self.count, instances.count),
            }
            for place in 0..places {
                if instances.is_some() {
                    raw.vertex_attrib_divisor(place, 0);
                }
                raw.disable_vertex_attrib_array(place);
            }
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // SAFETY: current; used no more.
        unsafe { self.gl.0.raw.delete_buffer(self.raw) }
    }
}

/// How a texture is read between its pixels.
#[derive(Clone, Copy)]
pub enum Filter {
    /// The nearest pixel.
    Nearest,
    /// Between four pixels.
    Linear,
    /// Between four pixels of each of two levels.
    Mipmaps,
}

/// How a texture is read beside its pixels.
#[derive(Clone, Copy)]
pub enum Wrap {
    /// As its edge.
    Clamp,
    /// Again and again.
    Repeat,
    /// Again and again, every other time mirrored.
    Mirror,
}

/// A texture of four bytes per pixel.
pub struct Texture {
    gl: Gl,
    raw: glow::NativeTexture,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
}

impl Texture {
    /// A texture whose pixels are not set yet.
    pub fn new(
        gl: &Gl,
        width: u32,
        height: u32,
        filter: Filter,
        wrap: Wrap,
    ) -> Result<Texture, GlError> {
        let texture = Texture::without_pixels(gl, width, height, filter, wrap)?;
        texture.define(0, width, height, None);
        gl.check("making a texture")?;
        Ok(texture)
    }

    /// A texture that shows an image of this size.
    pub fn of_image(gl: &Gl, image: &Image, width: u32, height: u32) -> Result<Texture, GlError> {
        let texture = Texture::without_pixels(gl, width, height, Filter::Linear, Wrap::Clamp)?;
        image.bind(gl.context())?;
        gl.check("making a texture of an image")?;
        Ok(texture)
    }

    /// Makes the texture and leaves it bound.
    fn without_pixels(
        gl: &Gl,
        width: u32,
        height: u32,
        filter: Filter,
        wrap: Wrap,
    ) -> Result<Texture, GlError> {
        let raw = &gl.0.raw;
        let (smaller, larger) = match filter {
            Filter::Nearest => (glow::NEAREST, glow::NEAREST),
            Filter::Linear => (glow::LINEAR, glow::LINEAR),
            Filter::Mipmaps => (glow::LINEAR_MIPMAP_LINEAR, glow::LINEAR),
        };
        let wrap = match wrap {
            Wrap::Clamp => glow::CLAMP_TO_EDGE,
            Wrap::Repeat => glow::REPEAT,
            Wrap::Mirror => glow::MIRRORED_REPEAT,
        };
        // SAFETY: current.
        let texture = unsafe {
            let texture = raw.create_texture().map_err(GlError::Object)?;
            raw.bind_texture(glow::TEXTURE_2D, Some(texture));
            for (name, value) in [
                (glow::TEXTURE_MIN_FILTER, smaller),
                (glow::TEXTURE_MAG_FILTER, larger),
                (glow::TEXTURE_WRAP_S, wrap),
                (glow::TEXTURE_WRAP_T, wrap),
            ] {
                raw.tex_parameter_i32(glow::TEXTURE_2D, name, value.cast_signed());
            }
            texture
        };
        Ok(Texture {
            gl: gl.clone(),
            raw: texture,
            width,
            height,
        })
    }

    fn define(&self, level: u8, width: u32, height: u32, pixels: Option<&[u8]>) {
        let raw = &self.gl.0.raw;
        // SAFETY: current; the callers see to it that there are as many pixels as the size says.
        unsafe {
            raw.bind_texture(glow::TEXTURE_2D, Some(self.raw));
            raw.tex_image_2d(
                glow::TEXTURE_2D,
                i32::from(level),
                glow::RGBA.cast_signed(),
                width.cast_signed(),
                height.cast_signed(),
                0,
                glow::RGBA,
                glow::UNSIGNED_BYTE,
                glow::PixelUnpackData::Slice(pixels),
            );
        }
    }

    /// Sets all pixels of a level, each level half as large as the one before it. `colour` gives red, green, blue and alpha
    /// at (column, row).
    pub fn fill(&self, level: u8, colour: impl Fn(u32, u32) -> [u8; 4]) {
        let (width, height) = ((self.width >> level).max(1), (self.height >> level).max(1));
        let rows = (0..height).flat_map(|row| (0..width).map(move |column| (column, row)));
        let pixels: Vec<u8> = rows.flat_map(|(column, row)| colour(column, row)).collect();
        self.define(level, width, height, Some(&pixels));
    }

    /// Sets the pixels of a square of level 0, whose lower left corner is at (`x`, `y`).
    pub fn fill_square(&self, x: u32, y: u32, size: u32, colour: [u8; 4]) {
        let raw = &self.gl.0.raw;
        let pixels = colour.repeat((size * size) as usize);
        // SAFETY: current; `pixels` has size * size pixels.
        unsafe {
            raw.bind_texture(glow::TEXTURE_2D, Some(self.raw));
            raw.tex_sub_image_2d(
                glow::TEXTURE_2D,
                0,
                x.cast_signed(),
                y.cast_signed(),
                size.cast_signed(),
                size.cast_signed(),
                glow::RGBA,
                glow::UNSIGNED_BYTE,
                glow::PixelUnpackData::Slice(Some(&pixels)),
            );
        }
    }

    /// Makes all smaller levels from level 0.
    pub fn make_mipmaps(&self) {
        // SAFETY: current.
        unsafe {
            self.gl.0.raw.bind_texture(glow::TEXTURE_2D, Some(self.raw));
            self.gl.0.raw.generate_mipmap(glow::TEXTURE_2D);
        }
    }

    /// An image of the texture, which other processes can share.
    pub fn image(&self) -> Result<Image, EglError> {
        Image::of_texture(self.gl.context(), self.raw.0.get())
    }
}

impl Drop for Texture {
    fn drop(&mut self) {
        // SAFETY: current; used no more.
        unsafe { self.gl.0.raw.delete_texture(self.raw) }
    }
}

/// A texture that is drawn into, with a depth buffer.
pub struct Target {
    gl: Gl,
    raw: glow::NativeFramebuffer,
    depth: glow::NativeRenderbuffer,
    /// What is drawn.
    pub texture: Texture,
}

impl Target {
    /// Draws into level 0 of `texture`.
    pub fn new(gl: &Gl, texture: Texture) -> Result<Target, GlError> {
        let raw = &gl.0.raw;
        // SAFETY: current.
        let (framebuffer, depth) = unsafe {
            (
                raw.create_framebuffer().map_err(GlError::Object)?,
                raw.create_renderbuffer().map_err(GlError::Object)?,
            )
        };
        let target = Target {
            gl: gl.clone(),
            raw: framebuffer,
            depth,
            texture,
        };
        let (width, height) = (
            target.texture.width.cast_signed(),
            target.texture.height.cast_signed(),
        );
        target.bind();
        // SAFETY: current.
        let status = unsafe {
            raw.bind_renderbuffer(glow::RENDERBUFFER, Some(depth));
            raw.renderbuffer_storage(glow::RENDERBUFFER, glow::DEPTH_COMPONENT16, width, height);
            raw.framebuffer_renderbuffer(
                glow::FRAMEBUFFER,
                glow::DEPTH_ATTACHMENT,
                glow::RENDERBUFFER,
                Some(depth),
            );
            raw.framebuffer_texture_2d(
                glow::FRAMEBUFFER,
                glow::COLOR_ATTACHMENT0,
                glow::TEXTURE_2D,
                Some(target.texture.raw),
                0,
            );
            raw.check_framebuffer_status(glow::FRAMEBUFFER)
        };
        match status {
            glow::FRAMEBUFFER_COMPLETE => Ok(target),
            status => Err(GlError::Incomplete(status)),
        }
    }

    /// The context that draws.
    pub fn gl(&self) -> &Gl {
        &self.gl
    }

    /// What is drawn from now on goes here.
    pub fn bind(&self) {
        let raw = &self.gl.0.raw;
        let (width, height) = (
            self.texture.width.cast_signed(),
            self.texture.height.cast_signed(),
        );
        // SAFETY: current.
        unsafe {
            raw.bind_framebuffer(glow::FRAMEBUFFER, Some(self.raw));
            raw.viewport(0, 0, width, height);
        }
    }

    /// Waits for what was drawn and reads it back.
    pub fn read(&self) -> Result<Picture, GlError> {
        let (width, height) = (self.texture.width, self.texture.height);
        self.read_part(0, 0, width, height)
    }

    /// As [`Target::read`], a rectangle whose lower left corner is at (`x`, `y`).
    pub fn read_part(&self, x: u32, y: u32, width: u32, height: u32) -> Result<Picture, GlError> {
        let mut pixels = vec![0; width as usize * height as usize * 4];
        self.bind();
        // SAFETY: current; `pixels` has four bytes for each pixel, and rows of such have no gaps at any alignment that
        // OpenGL ES has by default.
        unsafe {
            self.gl.0.raw.read_pixels(
                x.cast_signed(),
                y.cast_signed(),
                width.cast_signed(),
                height.cast_signed(),
                glow::RGBA,
                glow::UNSIGNED_BYTE,
                glow::PixelPackData::Slice(Some(&mut pixels)),
            );
        }
        self.gl.check("drawing and reading back")?;
        Ok(upright(width, height, &pixels))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: current; used no more.
        unsafe {
            self.gl.0.raw.delete_framebuffer(self.raw);
            self.gl.0.raw.delete_renderbuffer(self.depth);
        }
    }
}

/// A picture of rows from the bottom, as OpenGL has them.
fn upright(width: u32, height: u32, rows: &[u8]) -> Picture {
    let rgba = rows.rchunks_exact(width as usize * 4).flatten().copied();
    Picture {
        width,
        height,
        rgba: rgba.collect(),
    }
}

/// A buffer of the GPU that a picture is copied into without waiting (OpenGL ES 3).
pub struct PixelBuffer {
    gl: Gl,
    raw: glow::NativeBuffer,
    width: u32,
    height: u32,
}

impl PixelBuffer {
    /// How long [`PixelBuffer::take`] waits, in seconds: far more than any frame takes, emulated or not.
    const PATIENCE: u32 = 60;

    /// Starts to copy the picture of `target` into a new buffer.
    pub fn of(target: &Target) -> Result<PixelBuffer, GlError> {
        let gl = &target.gl;
        let raw = &gl.0.raw;
        let (width, height) = (target.texture.width, target.texture.height);
        target.bind();
        // SAFETY: current; the buffer has four bytes for each pixel, and is unbound before anything else is read.
        let buffer = unsafe {
            let buffer = raw.create_buffer().map_err(GlError::Object)?;
            raw.bind_buffer(glow::PIXEL_PACK_BUFFER, Some(buffer));
            let size = width.cast_signed() * height.cast_signed() * 4;
            raw.buffer_data_size(glow::PIXEL_PACK_BUFFER, size, glow::STREAM_READ);
            raw.read_pixels(
                0,
                0,
                width.cast_signed(),
                height.cast_signed(),
                glow::RGBA,
                glow::UNSIGNED_BYTE,
                glow::PixelPackData::BufferOffset(0),
            );
            raw.bind_buffer(glow::PIXEL_PACK_BUFFER, None);
            buffer
        };
        Ok(PixelBuffer {
            gl: gl.clone(),
            raw: buffer,
            width,
            height,
        })
    }

    /// Waits for the copy by a fence, and maps it.
    pub fn take(self) -> Result<Picture, GlError> {
        let raw = &self.gl.0.raw;
        let size = self.width as usize * self.height as usize * 4;
        // SAFETY: current; a mapping has the size that was asked for, and is read before it is unmapped.
        let picture = unsafe {
            let fence = raw
                .fence_sync(glow::SYNC_GPU_COMMANDS_COMPLETE, 0)
                .map_err(GlError::Object)?;
            let mut waited = glow::TIMEOUT_EXPIRED;
            for _ in 0..Self::PATIENCE {
                // In nanoseconds: a second.
                waited = raw.client_wait_sync(fence, glow::SYNC_FLUSH_COMMANDS_BIT, 1_000_000_000);
                if waited != glow::TIMEOUT_EXPIRED {
                    break;
                }
            }
            raw.delete_sync(fence);
            if waited != glow::CONDITION_SATISFIED && waited != glow::ALREADY_SIGNALED {
                return Err(GlError::Fence(Self::PATIENCE));
            }
            raw.bind_buffer(glow::PIXEL_PACK_BUFFER, Some(self.raw));
            let bytes = i32::try_from(size).unwrap_or(i32::MAX);
            let address =
                raw.map_buffer_range(glow::PIXEL_PACK_BUFFER, 0, bytes, glow::MAP_READ_BIT);
            let picture = (!address.is_null()).then(|| {
                let pixels = std::slice::from_raw_parts(address, size);
                upright(self.width, self.height, pixels)
            });
            raw.unmap_buffer(glow::PIXEL_PACK_BUFFER);
            raw.bind_buffer(glow::PIXEL_PACK_BUFFER, None);
            picture
        };
        self.gl.check("reading back through a buffer")?;
        picture.ok_or(GlError::Map(size))
    }
}

impl Drop for PixelBuffer {
    fn drop(&mut self) {
        // SAFETY: current; used no more.
        unsafe { self.gl.0.raw.delete_buffer(self.raw) }
    }
}
