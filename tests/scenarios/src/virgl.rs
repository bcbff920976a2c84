//! The virgl command stream, as EXECBUFFER of `virtio_gpu` takes it: just what is needed to clear and to draw.
//!
//! A command is one header word (number, object type, number of words that follow) and its words. Numbers and layouts
//! are those of `virgl_protocol.h`, formats and binding flags those of `virgl_hw.h` (both in virglrenderer and Mesa);
//! enumerations that virgl takes over from Gallium are in Mesa's `p_defines.h`. Pure data: nothing here does I/O.

use alloc::vec::Vec;

/// `enum virgl_context_cmd`.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Command {
    CreateObject = 1,
    BindObject = 2,
    SetViewportState = 4,
    SetFramebufferState = 5,
    SetVertexBuffers = 6,
    Clear = 7,
    DrawVbo = 8,
    BindShader = 31,
}

/// `enum virgl_object_type`.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Object {
    /// No object: `VIRGL_OBJECT_NULL`.
    None = 0,
    Blend = 1,
    Rasterizer = 2,
    DepthStencilAlpha = 3,
    Shader = 4,
    VertexElements = 5,
    Surface = 8,
}

/// `enum virgl_formats`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    /// Two floats.
    R32G32Float = 29,
    /// Four floats.
    R32G32B32A32Float = 31,
    /// A byte; also the format of buffers.
    R8Unorm = 64,
    /// Four bytes in the order of their names.
    R8G8B8A8Unorm = 67,
}

/// What a resource is for: `VIRGL_BIND_*`.
pub mod bind {
    /// `VIRGL_BIND_RENDER_TARGET`.
    pub const RENDER_TARGET: u32 = 1 << 1;
    /// `VIRGL_BIND_SAMPLER_VIEW`.
    pub const SAMPLER_VIEW: u32 = 1 << 3;
    /// `VIRGL_BIND_VERTEX_BUFFER`.
    pub const VERTEX_BUFFER: u32 = 1 << 4;
}

/// `enum pipe_texture_target`.
pub mod target {
    /// `PIPE_BUFFER`.
    pub const BUFFER: u32 = 0;
    /// `PIPE_TEXTURE_2D`.
    pub const TEXTURE_2D: u32 = 2;
}

/// `enum virgl_shader_stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// Runs once per vertex.
    Vertex = 0,
    /// Runs once per pixel.
    Fragment = 1,
}

/// One input of the vertex shader.
#[derive(Clone, Copy, Debug)]
pub struct VertexElement {
    /// Offset in bytes in the vertex.
    pub offset: u32,
    /// Its type.
    pub format: Format,
}

/// `PIPE_CLEAR_COLOR0`.
const CLEAR_COLOUR_0: u32 = 1 << 2;
/// `PIPE_PRIM_TRIANGLES`.
const TRIANGLES: u32 = 4;
/// `VIRGL_MAX_COLOR_BUFS`.
const COLOUR_BUFFERS: usize = 8;
/// `PIPE_BLENDFACTOR_*`.
mod factor {
    pub const ONE: u32 = 1;
    pub const SRC_ALPHA: u32 = 3;
    pub const INV_SRC_ALPHA: u32 = 0x13;
}

/// A command stream that is being written. Objects are named by handles that the caller chooses, none of them zero
/// and no two the same in one context; resources by the `res_handle` that RESOURCE_CREATE gave.
#[derive(Default)]
pub struct Stream {
    words: Vec<u32>,
}

impl Stream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes that EXECBUFFER takes.
    pub fn bytes(&self) -> Vec<u8> {
        self.words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// `VIRGL_CMD0` and the words.
    fn command(&mut self, command: Command, object: Object, words: &[u32]) {
        let length = u16::try_from(words.len()).expect("a command is shorter than 64 Ki words");
        self.words
            .push(command as u32 | (object as u32) << 8 | u32::from(length) << 16);
        self.words.extend_from_slice(words);
    }

    fn bind(&mut self, object: Object, handle: u32) {
        self.command(Command::BindObject, object, &[handle]);
    }

    /// Makes a surface of a whole 2D texture (its level 0 and layer 0).
    pub fn create_surface(&mut self, handle: u32, resource: u32, format: Format) {
        let words = [handle, resource, format as u32, 0, 0];
        self.command(Command::CreateObject, Object::Surface, &words);
    }

    /// Renders into that surface, without depth buffer.
    pub fn set_framebuffer(&mut self, surface: u32) {
        let words = [1, 0, surface];
        self.command(Command::SetFramebufferState, Object::None, &words);
    }

    /// The viewport that maps -1..1 to the whole of `width` x `height` pixels: y = -1 is the first row in memory.
    pub fn set_viewport(&mut self, width: f32, height: f32) {
        let (x, y) = (width / 2.0, height / 2.0);
        let mut words = [0; 7];
        for (word, value) in words[1..].iter_mut().zip([x, y, 0.5, x, y, 0.5]) {
            *word = value.to_bits();
        }
        self.command(Command::SetViewportState, Object::None, &words);
    }

    /// Fills the surface with a colour: red, green, blue, alpha from 0 to 1.
    pub fn clear(&mut self, colour: [f32; 4]) {
        let depth = 1.0f64.to_bits();
        let [r, g, b, a] = colour.map(f32::to_bits);
        let words = [
            CLEAR_COLOUR_0,
            r,
            g,
            b,
            a,
            depth as u32,
            (depth >> 32) as u32,
            0,
        ];
        self.command(Command::Clear, Object::None, &words);
    }

    /// Makes and binds blending of colours over what is there, by their alpha.
    pub fn blend_over(&mut self, handle: u32) {
        let over = 1
            | factor::SRC_ALPHA << 4
            | factor::INV_SRC_ALPHA << 9
            | factor::ONE << 17
            | factor::INV_SRC_ALPHA << 22
            | 0xf << 27;
        let mut words = [0; COLOUR_BUFFERS + 3];
        words[0] = handle;
        words[3] = over;
        self.command(Command::CreateObject, Object::Blend, &words);
        self.bind(Object::Blend, handle);
    }

    /// Makes and binds filled polygons, both sides visible, pixels sampled at their centres.
    pub fn rasterize_filled(&mut self, handle: u32) {
        const DEPTH_CLIP: u32 = 1 << 1;
        const HALF_PIXEL_CENTER: u32 = 1 << 29;
        let one = 1.0f32.to_bits();
        // Handle, flags, point size, sprite coordinates, stipple, line width, three offsets.
        let words = [
            handle,
            DEPTH_CLIP | HALF_PIXEL_CENTER,
            one,
            0,
            0,
            one,
            0,
            0,
            0,
        ];
        self.command(Command::CreateObject, Object::Rasterizer, &words);
        self.bind(Object::Rasterizer, handle);
    }

    /// Makes and binds a state without depth, stencil and alpha tests.
    pub fn test_nothing(&mut self, handle: u32) {
        self.command(
            Command::CreateObject,
            Object::DepthStencilAlpha,
            &[handle, 0, 0, 0, 0],
        );
        self.bind(Object::DepthStencilAlpha, handle);
    }

    /// Makes and binds a shader from TGSI text.
    pub fn shader(&mut self, handle: u32, stage: Stage, text: &str) {
        // More than any shader here needs; the host reserves room for so many tokens.
        const TOKENS: u32 = 300;
        let bytes: Vec<u8> = text.bytes().chain([0]).collect();
        let length = u32::try_from(bytes.len()).expect("a shader is short");
        let mut words: Vec<u32> = [handle, stage as u32, length, TOKENS, 0].to_vec();
        words.extend(bytes.chunks(4).map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        }));
        self.command(Command::CreateObject, Object::Shader, &words);
        self.command(Command::BindShader, Object::None, &[handle, stage as u32]);
    }

    /// Makes and binds the layout of a vertex; all elements come from vertex buffer 0.
    pub fn vertex_elements(&mut self, handle: u32, elements: &[VertexElement]) {
        let mut words = [handle].to_vec();
        for element in elements {
            words.extend_from_slice(&[element.offset, 0, 0, element.format as u32]);
        }
        self.command(Command::CreateObject, Object::VertexElements, &words);
        self.bind(Object::VertexElements, handle);
    }

    /// Takes vertices of `stride` bytes from the start of a resource.
    pub fn set_vertex_buffer(&mut self, resource: u32, stride: u32) {
        let words = [stride, 0, resource];
        self.command(Command::SetVertexBuffers, Object::None, &words);
    }

    /// Draws `count` vertices from vertex `first` on, every three a triangle.
    pub fn draw_triangles(&mut self, first: u32, count: u32) {
        // Start, count, mode, indexed, instances, index bias, first instance, restart, its index, least and
        // greatest index, stream output.
        let words = [first, count, TRIANGLES, 0, 1, 0, 0, 0, 0, 0, u32::MAX, 0];
        self.command(Command::DrawVbo, Object::None, &words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_holds_command_object_type_and_number_of_words() {
        let mut stream = Stream::new();
        stream.create_surface(7, 9, Format::R8G8B8A8Unorm);
        assert_eq!(stream.words, [0x0005_0801, 7, 9, 67, 0, 0]);
        assert_eq!(stream.bytes()[..8], [1, 8, 5, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn the_text_of_a_shader_ends_with_a_zero_and_fills_whole_words() {
        let mut stream = Stream::new();
        stream.shader(3, Stage::Fragment, "FRAG");
        assert_eq!(stream.words[0], 0x0007_0401);
        assert_eq!(stream.words[1..6], [3, 1, 5, 300, 0]);
        assert_eq!(stream.words[6], u32::from_le_bytes(*b"FRAG"));
        assert_eq!(stream.words[7], 0);
    }

    #[test]
    fn every_command_has_as_many_words_as_its_header_says() {
        let mut stream = Stream::new();
        stream.create_surface(1, 1, Format::R8G8B8A8Unorm);
        stream.set_framebuffer(1);
        stream.set_viewport(4.0, 4.0);
        stream.clear([0.0; 4]);
        stream.blend_over(2);
        stream.rasterize_filled(3);
        stream.test_nothing(4);
        stream.shader(5, Stage::Vertex, "VERT\nEND\n");
        stream.vertex_elements(
            6,
            &[VertexElement {
                offset: 0,
                format: Format::R32G32Float,
            }],
        );
        stream.set_vertex_buffer(2, 8);
        stream.draw_triangles(0, 3);
        // virgl_protocol.h: VIRGL_OBJ_SURFACE_SIZE and so on, in the order of the calls above.
        let expected = [5, 3, 7, 8, 11, 1, 9, 1, 5, 1, 8, 2, 5, 1, 3, 12];
        let (mut lengths, mut at) = (Vec::new(), 0);
        while let Some(header) = stream.words.get(at) {
            lengths.push(header >> 16);
            at += 1 + (header >> 16) as usize;
        }
        assert_eq!(lengths, expected);
    }
}
