//! The embedded software GPU: its ioctls with their schemas, and the binary layout of its command streams.
//!
//! The guest driver and the host proxy use the ioctl tables as they use those of any other family. Programs build
//! command streams from the structs below ([`Stream`]), the engine in the host proxy parses them from the same
//! structs. `docs/soft-gpu.md` describes what each ioctl and command does. Nothing here executes anything.

#![allow(clippy::cast_possible_truncation)] // offsets in structs of a few bytes

use super::Family;
use crate::schema::{
    Allocates, Answer, Blocking, Coherence, Condition, Count, Descriptor, Direction, Element,
    Ioctl, Space, command, rule::*,
};
use crate::{Errno, at, uapi_struct};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `DRM_IOCTL_SOFT_GETPARAM`.
pub const DRM_IOCTL_SOFT_GETPARAM: u32 = command::iowr::<GetParam>(0x40);
/// `DRM_IOCTL_SOFT_GEM_CREATE`.
pub const DRM_IOCTL_SOFT_GEM_CREATE: u32 = command::iowr::<GemCreate>(0x41);
/// `DRM_IOCTL_SOFT_GEM_MMAP`.
pub const DRM_IOCTL_SOFT_GEM_MMAP: u32 = command::iowr::<GemMmap>(0x42);
/// `DRM_IOCTL_SOFT_GEM_INFO`.
pub const DRM_IOCTL_SOFT_GEM_INFO: u32 = command::iowr::<GemInfo>(0x43);
/// `DRM_IOCTL_SOFT_SUBMIT`.
pub const DRM_IOCTL_SOFT_SUBMIT: u32 = command::iowr::<Submit>(0x44);
/// `DRM_IOCTL_SOFT_WAIT`.
pub const DRM_IOCTL_SOFT_WAIT: u32 = command::iowr::<Wait>(0x45);
/// `DRM_IOCTL_SOFT_GET_RESET_STATS`.
pub const DRM_IOCTL_SOFT_GET_RESET_STATS: u32 = command::iowr::<GetResetStats>(0x46);

/// Parameters of [`DRM_IOCTL_SOFT_GETPARAM`].
pub mod param {
    /// Version of the command set, [`super::COMMAND_SET`].
    pub const COMMAND_SET: u64 = 0;
    /// Bits of the optional features, [`super::feature`].
    pub const FEATURES: u64 = 1;
    /// Engines that execute submissions of different files at a time.
    pub const ENGINES: u64 = 2;
    /// GPU memory in bytes that all buffers of the device share.
    pub const MEMORY_SIZE: u64 = 3;
    /// GPU memory in bytes that is free.
    pub const MEMORY_FREE: u64 = 4;
    /// Most bytes of the commands of one submission.
    pub const COMMANDS_SIZE_MAX: u64 = 5;
    /// Most buffers of one submission.
    pub const BUFFERS_MAX: u64 = 6;
    /// Most syncobjs of one submission, each way.
    pub const SYNCS_MAX: u64 = 7;
    /// Most pixels of a surface in either direction.
    pub const DIMENSION_MAX: u64 = 8;
    /// Most rows or columns of a matrix.
    pub const MATRIX_MAX: u64 = 9;
    /// Most work of one submission, in units (see [`super::WORK_MAX`]).
    pub const WORK_MAX: u64 = 10;
    /// Nanoseconds that a submission may run before the watchdog resets its engine.
    pub const WATCHDOG_NS: u64 = 11;
    /// Hangs after which a file may no longer submit.
    pub const HANGS_MAX: u64 = 12;
    /// Most submissions that one file may have waiting.
    pub const QUEUE_MAX: u64 = 13;
}

/// Bits of [`param::FEATURES`].
pub mod feature {
    /// Fences as file descriptors (`sync_file`) in [`super::Submit`].
    pub const FENCE_FD: u64 = 1 << 0;
    /// Syncobjs in [`super::Submit`], binary and timeline.
    pub const SYNCOBJ: u64 = 1 << 1;
    /// The commands `FILL`, `COPY`, `BLIT` and `STORE`.
    pub const COPY_ENGINE: u64 = 1 << 2;
    /// The command `PATH`.
    pub const PATH: u64 = 1 << 3;
    /// The command `MATMUL`.
    pub const MATMUL: u64 = 1 << 4;
}

/// Version of the command set that this file describes.
pub const COMMAND_SET: u64 = 1;
/// Most bytes of the commands of one submission.
pub const COMMANDS_SIZE_MAX: u32 = 1 << 20;
/// Most buffers of one submission.
pub const BUFFERS_MAX: u32 = 256;
/// Most syncobjs of one submission, each way.
pub const SYNCS_MAX: u32 = 64;
/// Most pixels of a surface in either direction.
pub const DIMENSION_MAX: u32 = 8192;
/// Most rows or columns of a matrix.
pub const MATRIX_MAX: u32 = 4096;
/// Most colour stops of a gradient.
pub const STOPS_MAX: u32 = 64;
/// Most points, and most verbs, of a path.
pub const POINTS_MAX: u32 = 16_384;
/// Largest coordinate of a path once it is transformed, either sign.
pub const COORDINATE_MAX: f32 = 65_536.0;
/// Most work of one submission (`E2BIG`). One unit is a byte read or written by `FILL`, `COPY` or `BLIT`, or 8
/// multiplications of a `MATMUL`; each row of their pictures and matrices costs [`WORK_ROW`]; a `PATH` costs [`WORK_PIXEL`] for each pixel of its bounds, and [`WORK_COMMAND`] for
/// each of its points in each tile of 4096 by 64 pixels that its bounds cover; each command costs another
/// [`WORK_COMMAND`].
pub const WORK_MAX: u64 = 1 << 30;
/// Work of a row of a picture or matrix beyond its bytes.
pub const WORK_ROW: u64 = 64;
/// Work of a pixel in the bounds of a path.
pub const WORK_PIXEL: u64 = 32;
/// Work of a command beyond what it reads and writes.
pub const WORK_COMMAND: u64 = 256;
/// Hangs after which a file may no longer submit.
pub const HANGS_MAX: u64 = 4;
/// Most submissions that one file may have waiting.
pub const QUEUE_MAX: u32 = 256;

uapi_struct! {
    /// Reads one parameter of the device.
    pub struct GetParam = "drm_soft_getparam" {
        /// Which one, of [`param`].
        param: u64 = [VALUE],
        /// Its value.
        value: u64 = [OUTPUT],
    }
}

uapi_struct! {
    /// Creates a buffer object filled with zeros.
    pub struct GemCreate = "drm_soft_gem_create" {
        /// Bytes, rounded up to whole pages.
        size: u64 = [VALUE],
        /// Must be zero.
        flags: u32 = [flags(0)],
        /// The new handle.
        handle: u32 = [new_handle(Space::Gem)],
    }
}

uapi_struct! {
    /// Tells where in the device file a buffer object can be mapped.
    pub struct GemMmap = "drm_soft_gem_mmap" {
        /// The buffer object.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Must be zero.
        flags: u32 = [flags(0)],
        /// The offset for `mmap`.
        offset: u64 = [OUTPUT],
    }
}

uapi_struct! {
    /// Describes a buffer object.
    pub struct GemInfo = "drm_soft_gem_info" {
        /// The buffer object.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Must be zero.
        flags: u32 = [flags(0)],
        /// Its size in bytes: whole pages.
        size: u64 = [OUTPUT],
        /// How many files have unfinished submissions that use it.
        busy: u32 = [OUTPUT],
        /// Must be zero.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// A syncobj that a submission waits for or signals.
    pub struct Sync = "drm_soft_sync" {
        /// The syncobj.
        handle: u32 = [handle(Space::Syncobj, Errno::ENOENT)],
        /// Must be zero.
        flags: u32 = [flags(0)],
        /// The point of its timeline; zero for a binary syncobj.
        point: u64 = [VALUE],
    }
}

/// Bit of [`Submit::flags`]: wait for the fence in [`Submit::fence_fd`].
pub const SUBMIT_FENCE_FD_IN: u32 = 1 << 0;
/// Bit of [`Submit::flags`]: put the submission's fence into [`Submit::fence_fd`].
pub const SUBMIT_FENCE_FD_OUT: u32 = 1 << 1;
const SUBMIT_FENCE_FD: u64 = (SUBMIT_FENCE_FD_IN | SUBMIT_FENCE_FD_OUT) as u64;

uapi_struct! {
    /// Queues commands for execution.
    pub struct Submit = "drm_soft_submit" {
        /// Address of the commands.
        commands: u64 = [pointer(Direction::In, Element::Bytes(1), Count::Field(at!(commands_size)), COMMANDS_SIZE_MAX)],
        /// Address of the handles of the buffer objects that the commands use, 32 bits each. Commands name a buffer by
        /// its place in this list.
        buffers: u64 = [pointer(
            Direction::In,
            Element::Handles { space: Space::Gem, unknown: Errno::ENOENT },
            Count::Field(at!(buffer_count)),
            BUFFERS_MAX,
        )],
        /// Address of the syncobjs to wait for, [`Sync`].
        in_syncs: u64 = [pointer(Direction::In, Element::Struct(Sync::SCHEMA), Count::Field(at!(in_sync_count)), SYNCS_MAX)],
        /// Address of the syncobjs to signal, [`Sync`].
        out_syncs: u64 = [pointer(Direction::In, Element::Struct(Sync::SCHEMA), Count::Field(at!(out_sync_count)), SYNCS_MAX)],
        /// Bytes of the commands.
        commands_size: u32 = [VALUE],
        /// Number of buffer objects.
        buffer_count: u32 = [VALUE],
        /// Number of syncobjs to wait for.
        in_sync_count: u32 = [VALUE],
        /// Number of syncobjs to signal.
        out_sync_count: u32 = [VALUE],
        /// [`SUBMIT_FENCE_FD_IN`] and [`SUBMIT_FENCE_FD_OUT`].
        flags: u32 = [flags(SUBMIT_FENCE_FD)],
        /// The fence to wait for, replaced by that of this submission; ignored when no flag says so.
        fence_fd: i32 = [
            fd(Direction::InOut, Descriptor::SyncFile).when(at!(flags), SUBMIT_FENCE_FD, SUBMIT_FENCE_FD),
            fd(Direction::In, Descriptor::SyncFile).when(at!(flags), SUBMIT_FENCE_FD, SUBMIT_FENCE_FD_IN as u64),
            fd(Direction::Out, Descriptor::SyncFile).when(at!(flags), SUBMIT_FENCE_FD, SUBMIT_FENCE_FD_OUT as u64),
            VALUE,
        ],
        /// Number of this submission, counted per file from 1.
        seqno: u64 = [OUTPUT],
    }
}

/// Bit of [`Wait::flags`]: wait for the buffer object in [`Wait::handle`], not for a submission.
pub const WAIT_BUFFER: u32 = 1 << 0;

uapi_struct! {
    /// Waits for a submission of this file, or for all submissions of all files that use a buffer object.
    pub struct Wait = "drm_soft_wait" {
        /// The submission; zero with [`WAIT_BUFFER`].
        seqno: u64 = [ZERO.when(at!(flags), WAIT_BUFFER as u64, WAIT_BUFFER as u64), VALUE],
        /// When to give up (`CLOCK_MONOTONIC`, nanoseconds).
        deadline_ns: i64 = [DEADLINE],
        /// The buffer object, with [`WAIT_BUFFER`].
        handle: u32 = [
            handle(Space::Gem, Errno::ENOENT).when(at!(flags), WAIT_BUFFER as u64, WAIT_BUFFER as u64),
            ZERO,
        ],
        /// [`WAIT_BUFFER`].
        flags: u32 = [flags(WAIT_BUFFER as u64)],
        /// How it ended: zero, or the negative errno of a submission that failed. With [`WAIT_BUFFER`], only the last
        /// submission of each file counts, and only if it was unfinished when the call began.
        error: i32 = [OUTPUT],
        /// Must be zero.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Counts what went wrong.
    pub struct GetResetStats = "drm_soft_get_reset_stats" {
        /// Must be zero.
        flags: u32 = [flags(0)],
        /// 1 when this file hung its engine too often and may no longer submit.
        banned: u32 = [OUTPUT],
        /// Resets of the device since it was started.
        resets: u64 = [OUTPUT],
        /// Submissions of this file that hung and were ended by a reset.
        hangs: u64 = [OUTPUT],
        /// Submissions of this file that were ended by a fault.
        faults: u64 = [OUTPUT],
    }
}

/// What only this GPU has.
pub static FAMILY: Family = Family {
    name: "soft",
    header: "",
    refused: &[],
    ioctls: &[
        Ioctl {
            name: "DRM_IOCTL_SOFT_GETPARAM",
            command: DRM_IOCTL_SOFT_GETPARAM,
            argument: GetParam::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::ConstantUnless(Condition {
                field: at!(GetParam.param),
                mask: u64::MAX,
                equals: param::MEMORY_FREE,
            }),
            coherence: Coherence::None,
            summary: "Reads a parameter of the device",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_GEM_CREATE",
            command: DRM_IOCTL_SOFT_GEM_CREATE,
            argument: GemCreate::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Bytes(0),
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Creates a buffer object",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_GEM_MMAP",
            command: DRM_IOCTL_SOFT_GEM_MMAP,
            argument: GemMmap::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::Offset(at!(GemMmap.offset)),
            summary: "Tells the offset at which a buffer object can be mapped",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_GEM_INFO",
            command: DRM_IOCTL_SOFT_GEM_INFO,
            argument: GemInfo::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Tells the size of a buffer object and whether it is busy",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_SUBMIT",
            command: DRM_IOCTL_SOFT_SUBMIT,
            argument: Submit::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToHost,
            summary: "Queues commands for execution",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_WAIT",
            command: DRM_IOCTL_SOFT_WAIT,
            argument: Wait::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Unless(&[Condition {
                field: at!(Wait.deadline_ns),
                mask: u64::MAX,
                equals: 0,
            }]),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToGuest,
            summary: "Waits for a submission or a buffer object",
        },
        Ioctl {
            name: "DRM_IOCTL_SOFT_GET_RESET_STATS",
            command: DRM_IOCTL_SOFT_GET_RESET_STATS,
            argument: GetResetStats::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Counts resets, hangs and faults",
        },
    ],
};

/// Opcodes of commands.
pub mod opcode {
    /// [`super::Fill`].
    pub const FILL: u16 = 1;
    /// [`super::CopyBytes`].
    pub const COPY: u16 = 2;
    /// [`super::Blit`].
    pub const BLIT: u16 = 3;
    /// [`super::Path`].
    pub const PATH: u16 = 4;
    /// [`super::MatMul`].
    pub const MATMUL: u16 = 5;
    /// [`super::Store`].
    pub const STORE: u16 = 6;
    /// [`super::Hang`].
    pub const HANG: u16 = 7;
}

/// Declares a struct of the command stream: plain little-endian data without padding.
macro_rules! stream_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }
    };
}

stream_struct! {
    /// What every command starts with.
    pub struct Header {
        /// Which command, of [`opcode`].
        opcode: u16,
        /// Flags of that command.
        flags: u16,
        /// Bytes of the command, this header and all that follows included: a multiple of 8.
        size: u32,
    }
}

stream_struct! {
    /// A picture in a buffer: rows of pixels of four bytes, red, green, blue and alpha, with premultiplied alpha.
    pub struct Surface {
        /// Place of the buffer in the submission's list.
        buffer: u32,
        /// Bytes from one row to the next: a multiple of 4, at least four times the width.
        stride: u32,
        /// Where in the buffer it starts: a multiple of 4.
        offset: u64,
        /// Pixels in a row, 1 to [`DIMENSION_MAX`].
        width: u32,
        /// Rows, 1 to [`DIMENSION_MAX`].
        height: u32,
    }
}

stream_struct! {
    /// A rectangle of pixels, which must lie in its surface.
    pub struct Rectangle {
        /// Left edge.
        x: u32,
        /// Top edge.
        y: u32,
        /// Pixels in a row, at least 1.
        width: u32,
        /// Rows, at least 1.
        height: u32,
    }
}

stream_struct! {
    /// Fills a rectangle with one colour.
    pub struct Fill {
        /// [`opcode::FILL`], no flags.
        header: Header,
        /// The picture.
        target: Surface,
        /// Which part of it.
        rectangle: Rectangle,
        /// The pixel to store: red, green, blue, alpha, premultiplied.
        color: [u8; 4],
        /// Must be zero.
        pad: u32,
    }
}

stream_struct! {
    /// Copies bytes; the ranges may overlap.
    pub struct CopyBytes {
        /// [`opcode::COPY`], no flags.
        header: Header,
        /// Place in the list of the buffer to read.
        source: u32,
        /// Place in the list of the buffer to write.
        target: u32,
        /// Where to read.
        source_offset: u64,
        /// Where to write.
        target_offset: u64,
        /// Bytes, at least 1.
        length: u64,
    }
}

/// Flag of [`Blit`]: the source is put over the target (Porter-Duff "over"), not in its place.
pub const BLIT_BLEND: u16 = 1 << 0;
/// Flag of [`Blit`]: when scaling, mix the four nearest pixels instead of taking the nearest.
pub const BLIT_SMOOTH: u16 = 1 << 1;

stream_struct! {
    /// Copies a rectangle of pixels, scaled when the sizes differ. Source and target must not overlap.
    pub struct Blit {
        /// [`opcode::BLIT`] with [`BLIT_BLEND`] and [`BLIT_SMOOTH`].
        header: Header,
        /// The picture to read.
        source: Surface,
        /// The picture to write.
        target: Surface,
        /// The part to read.
        source_rectangle: Rectangle,
        /// The part to write.
        target_rectangle: Rectangle,
    }
}

/// Flag of [`Path`]: the inside is where a ray crosses the path an odd number of times; else by winding number.
pub const PATH_EVEN_ODD: u16 = 1 << 0;
/// Flag of [`Path`]: pixels are inside or outside, edges are not smoothed.
pub const PATH_ALIASED: u16 = 1 << 1;
/// Flag of [`Path`]: the paint replaces the target instead of being put over it.
pub const PATH_REPLACE: u16 = 1 << 2;

/// Values of [`Path::paint`].
pub mod paint {
    /// One colour, [`super::Path::color`].
    pub const SOLID: u32 = 0;
    /// Colours change along the line from [`super::Path::start`] to [`super::Path::end`].
    pub const LINEAR: u32 = 1;
    /// Colours change from the centre [`super::Path::start`] to the circle of [`super::Path::radius`] around it.
    pub const RADIAL: u32 = 2;
}

/// Values of [`Path::spread`]: what a gradient does beyond its ends.
pub mod spread {
    /// Keeps the colour of the end.
    pub const PAD: u32 = 0;
    /// Runs back and forth.
    pub const REFLECT: u32 = 1;
    /// Starts again.
    pub const REPEAT: u32 = 2;
}

/// Verbs of a path, one byte each; each takes its points from the list of points.
pub mod verb {
    /// Starts a contour at one point.
    pub const MOVE: u8 = 0;
    /// A straight line to one point.
    pub const LINE: u8 = 1;
    /// A quadratic Bézier curve: control point, end.
    pub const QUAD: u8 = 2;
    /// A cubic Bézier curve: two control points, end.
    pub const CUBIC: u8 = 3;
    /// A straight line back to the start of the contour: no point.
    pub const CLOSE: u8 = 4;
}

stream_struct! {
    /// Fills a path. After this struct come the points (two `f32` each), the colour stops ([`Stop`]) and the verbs
    /// (one byte each), then zeros up to a multiple of 8.
    pub struct Path {
        /// [`opcode::PATH`] with [`PATH_EVEN_ODD`], [`PATH_ALIASED`] and [`PATH_REPLACE`].
        header: Header,
        /// The picture.
        target: Surface,
        /// Number of verbs, 1 to [`POINTS_MAX`].
        verb_count: u32,
        /// Number of points, 1 to [`POINTS_MAX`]: as many as the verbs take.
        point_count: u32,
        /// Number of colour stops: 2 to [`STOPS_MAX`] for a gradient, zero for one colour.
        stop_count: u32,
        /// One of [`paint`].
        paint: u32,
        /// One of [`spread`]; zero for one colour.
        spread: u32,
        /// Radius of a radial gradient, greater than zero; zero for others.
        radius: f32,
        /// The colour: red, green, blue, alpha, each 0 to 1, not premultiplied; zeros for a gradient.
        color: [f32; 4],
        /// Where a gradient starts, in the path's coordinates; zeros for one colour.
        start: [f32; 2],
        /// Where a linear gradient ends; zeros for others.
        end: [f32; 2],
        /// From the path's coordinates (x, y) to pixels: `x' = t[0] x + t[2] y + t[4]`, `y' = t[1] x + t[3] y + t[5]`.
        transform: [f32; 6],
    }
}

/// The transform that changes nothing.
pub const IDENTITY: [f32; 6] = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0];

stream_struct! {
    /// A colour of a gradient.
    pub struct Stop {
        /// Where: 0 at the start, 1 at the end, never less than that of the stop before.
        offset: f32,
        /// Red, green, blue, alpha, each 0 to 1, not premultiplied.
        color: [f32; 4],
    }
}

/// Flag of [`MatMul`]: adds the product to C instead of replacing it.
pub const MATMUL_ACCUMULATE: u16 = 1 << 0;

stream_struct! {
    /// A matrix of `f32` in a buffer, row after row.
    pub struct Matrix {
        /// Place of the buffer in the submission's list.
        buffer: u32,
        /// Bytes from one row to the next: a multiple of 4, at least four times the columns.
        stride: u32,
        /// Where in the buffer it starts: a multiple of 4.
        offset: u64,
    }
}

stream_struct! {
    /// Multiplies matrices: C (m rows, n columns) = A (m rows, k columns) B (k rows, n columns). C must not overlap
    /// A or B.
    pub struct MatMul {
        /// [`opcode::MATMUL`] with [`MATMUL_ACCUMULATE`].
        header: Header,
        /// The left factor.
        a: Matrix,
        /// The right factor.
        b: Matrix,
        /// The product.
        c: Matrix,
        /// Rows of A and C, 1 to [`MATRIX_MAX`].
        m: u32,
        /// Columns of A, rows of B, 1 to [`MATRIX_MAX`].
        k: u32,
        /// Columns of B and C, 1 to [`MATRIX_MAX`].
        n: u32,
        /// Must be zero.
        pad: u32,
    }
}

stream_struct! {
    /// Stores 32 bits. The address is checked only when the engine gets there: outside of the buffer it is a fault,
    /// which ends the submission.
    pub struct Store {
        /// [`opcode::STORE`], no flags.
        header: Header,
        /// Place of the buffer in the submission's list.
        buffer: u32,
        /// What to store.
        value: u32,
        /// Where in the buffer: a multiple of 4.
        offset: u64,
    }
}

stream_struct! {
    /// Never ends: the watchdog resets the engine and the submission fails.
    pub struct Hang {
        /// [`opcode::HANG`], no flags.
        header: Header,
    }
}

/// A command of fixed length.
pub trait Command: IntoBytes + Immutable {
    /// Its opcode.
    const OPCODE: u16;
}

impl Command for Fill {
    const OPCODE: u16 = opcode::FILL;
}
impl Command for CopyBytes {
    const OPCODE: u16 = opcode::COPY;
}
impl Command for Blit {
    const OPCODE: u16 = opcode::BLIT;
}
impl Command for MatMul {
    const OPCODE: u16 = opcode::MATMUL;
}
impl Command for Store {
    const OPCODE: u16 = opcode::STORE;
}
impl Command for Hang {
    const OPCODE: u16 = opcode::HANG;
}

/// Builds a command stream in a buffer.
///
/// ```
/// use pvgpu_protocol::family::soft::{Fill, Rectangle, Stream, Surface};
///
/// let mut buffer = [0; 256];
/// let mut stream = Stream::new(&mut buffer);
/// let target = Surface { buffer: 0, stride: 256, offset: 0, width: 64, height: 64 };
/// let rectangle = Rectangle { x: 0, y: 0, width: 64, height: 64 };
/// stream.push(0, &Fill { target, rectangle, color: [255; 4], ..Fill::default() })?;
/// assert_eq!(stream.bytes().len(), 56);
/// # Ok::<(), pvgpu_protocol::Errno>(())
/// ```
#[derive(Debug)]
pub struct Stream<'a> {
    buffer: &'a mut [u8],
    length: usize,
}

impl<'a> Stream<'a> {
    /// An empty stream that grows in `buffer`.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, length: 0 }
    }

    /// The commands so far.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    /// Appends a command with these flags; its header is filled in. `E2BIG` when the buffer is full.
    pub fn push<C: Command>(&mut self, flags: u16, command: &C) -> Result<(), Errno> {
        self.append(C::OPCODE, flags, &[command.as_bytes()])
    }

    /// Appends a path with these flags; its header and counts are filled in. `E2BIG` when the buffer is full.
    pub fn push_path(
        &mut self,
        flags: u16,
        path: &Path,
        points: &[[f32; 2]],
        stops: &[Stop],
        verbs: &[u8],
    ) -> Result<(), Errno> {
        let count = |length: usize| u32::try_from(length).map_err(|_| Errno::E2BIG);
        let path = Path {
            verb_count: count(verbs.len())?,
            point_count: count(points.len())?,
            stop_count: count(stops.len())?,
            ..*path
        };
        let parts = [path.as_bytes(), points.as_bytes(), stops.as_bytes(), verbs];
        self.append(opcode::PATH, flags, &parts)
    }

    /// Appends the parts of one command, the first of which starts with room for the header.
    fn append(&mut self, opcode: u16, flags: u16, parts: &[&[u8]]) -> Result<(), Errno> {
        let start = self.length;
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let size = length.checked_next_multiple_of(8).ok_or(Errno::E2BIG)?;
        let header = Header {
            opcode,
            flags,
            size: u32::try_from(size).map_err(|_| Errno::E2BIG)?,
        };
        let room = start
            .checked_add(size)
            .and_then(|end| self.buffer.get_mut(start..end))
            .ok_or(Errno::E2BIG)?;
        let zeros = core::iter::repeat(&0);
        let bytes = parts.iter().copied().flatten().chain(zeros);
        room.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        room.iter_mut()
            .zip(header.as_bytes())
            .for_each(|(to, from)| *to = *from);
        self.length = start + size;
        Ok(())
    }
}

/// Compiles the example of the page.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/soft-gpu.md")]
struct Page;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_number_and_argument_size_is_part_of_the_interface() {
        let seen = FAMILY
            .ioctls
            .iter()
            .map(|ioctl| ioctl.command)
            .collect::<std::vec::Vec<_>>();
        let expected = [
            0xc010_6440,
            0xc010_6441,
            0xc010_6442,
            0xc018_6443,
            0xc040_6444,
            0xc020_6445,
            0xc020_6446,
        ];
        assert_eq!(seen, expected, "{seen:#x?}");
    }

    #[test]
    fn sizes_of_commands_are_part_of_the_interface() {
        let sizes = [
            size_of::<Header>(),
            size_of::<Fill>(),
            size_of::<CopyBytes>(),
            size_of::<Blit>(),
            size_of::<Path>(),
            size_of::<Stop>(),
            size_of::<MatMul>(),
            size_of::<Store>(),
            size_of::<Hang>(),
        ];
        assert_eq!(sizes, [8, 56, 40, 88, 112, 20, 72, 24, 8]);
    }

    #[test]
    fn a_path_is_its_struct_its_points_its_stops_and_its_verbs() {
        let mut buffer = [0xff; 256];
        let mut stream = Stream::new(&mut buffer);
        let points = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        let verbs = [verb::MOVE, verb::LINE, verb::LINE, verb::CLOSE, verb::MOVE];
        let path = Path {
            color: [1.0; 4],
            transform: IDENTITY,
            ..Path::default()
        };
        stream
            .push_path(PATH_EVEN_ODD, &path, &points, &[], &verbs)
            .unwrap();
        let bytes = stream.bytes();
        assert_eq!(bytes.len(), 112 + 24 + 8);
        let (seen, rest) = Path::read_from_prefix(bytes).unwrap();
        assert_eq!(
            seen.header,
            Header {
                opcode: opcode::PATH,
                flags: PATH_EVEN_ODD,
                size: 144
            }
        );
        assert_eq!((seen.verb_count, seen.point_count), (5, 3));
        assert_eq!(rest[..4], 1.0_f32.to_le_bytes());
        assert_eq!(rest[24..], [0, 1, 1, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn a_stream_that_is_full_stays_as_it_was() {
        let mut buffer = [0; 12];
        let mut stream = Stream::new(&mut buffer);
        stream.push(0, &Hang::default()).unwrap();
        assert_eq!(stream.push(0, &Hang::default()), Err(Errno::E2BIG));
        assert_eq!(stream.bytes().len(), 8);
    }
}
