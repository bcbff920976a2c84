//! The language that describes one ioctl: its number, its argument struct, and what each field means.
//!
//! A schema is a constant. [`uapi_struct!`](crate::uapi_struct) declares the argument struct and its schema in one
//! place, so that neither can change without the other. The guest driver walks the schema to gather the argument
//! and all that its pointers reach; the host proxy walks the same schema to check and rebuild it
//! ([`crate::layout`]). An ioctl without a schema does not exist.

use crate::Errno;
use crate::wire::PAGE_SIZE;

/// One ioctl of a host GPU family.
#[derive(Debug)]
pub struct Ioctl {
    /// Name of its macro in the C header, such as `DRM_IOCTL_VIRTGPU_MAP`.
    pub name: &'static str,
    /// Command number: direction, size, type and number (`asm-generic/ioctl.h`).
    pub command: u32,
    /// The argument struct in its newest form.
    pub argument: &'static Struct,
    /// Sizes of its older forms, each a prefix of the newest one. Fields beyond count as zero.
    pub older_sizes: &'static [u16],
    /// Whether it may wait for the GPU or for another process.
    pub blocking: Blocking,
    /// The GPU memory it allocates.
    pub allocates: Allocates,
    /// Who answers it.
    pub answer: Answer,
    /// What it does for memory that is mapped with pages of the guest.
    pub coherence: Coherence,
    /// What it does, in one line.
    pub summary: &'static str,
}

/// Whether an ioctl may wait. One that may goes to the worker pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// It never waits for anything but locks held for a short time.
    Never,
    /// It may wait.
    Always,
    /// It may wait if the condition holds.
    When(Condition),
    /// It may wait unless all of the conditions hold.
    Unless(&'static [Condition]),
}

/// Who answers an ioctl: the host driver each time, or the guest driver, which knows the answer already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The host driver, each time.
    Forwarded,
    /// The host driver once. When it succeeds, its answer holds for the same input for as long as the session lasts,
    /// whatever file asks. The input is all that goes in, so too the contents of arrays that go both ways.
    Constant,
    /// As [`Answer::Constant`], but each time if the condition holds.
    ConstantUnless(Condition),
    /// The guest driver, from what the hello says of the host driver.
    Identity,
}

/// What an ioctl does for memory that is mapped with pages of the guest ([`crate::wire::Operation::MapPages`]), of which host
/// and guest have a copy each. It concerns the buffers whose GEM handles the call has, in fields and arrays; if it has none, all
/// that its file has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coherence {
    /// Nothing.
    None,
    /// It tells, in the field at this offset of the argument, at which offset of the file the buffer can be mapped.
    Offset(u16),
    /// Before it, what the guest has written goes to the host.
    ToHost,
    /// After it has succeeded, what the GPU has written goes to the guest.
    ToGuest,
}

/// The GPU memory that an ioctl allocates, for the guest's memory limit. The first new handle of the call holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocates {
    /// None.
    Nothing,
    /// The number of bytes in the field at this offset of the argument.
    Bytes(u16),
    /// An image: product of the fields at these offsets (width, height, bits per pixel) in bits.
    Image {
        /// Offset of the width in pixels.
        width: u16,
        /// Offset of the height in pixels.
        height: u16,
        /// Offset of the bits per pixel.
        bits_per_pixel: u16,
    },
}

/// Layout and meaning of one C struct.
#[derive(Debug)]
pub struct Struct {
    /// Name in the C header, such as `drm_virtgpu_map`.
    pub name: &'static str,
    /// Size in bytes.
    pub size: u16,
    /// All fields in order of their offsets, without gaps.
    pub fields: &'static [Field],
}

/// One field of a [`Struct`].
#[derive(Debug)]
pub struct Field {
    /// Name in the C header (a Rust keyword has `r#` in front); one that starts with `_` is padding without a name.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: u16,
    /// Size in bytes: 1, 2, 4 or 8, or any other for reserved bytes and nested structs of plain values.
    pub size: u16,
    /// Its meaning: the first rule whose condition holds. The last one has no condition.
    pub rules: &'static [Rule],
}

/// What a field means under a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What it means.
    pub kind: Kind,
    /// When the rule applies; always if there is none.
    pub when: Option<Condition>,
}

/// A condition on another field of the same struct: `value & mask == equals`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Offset of the field.
    pub field: u16,
    /// The bits that matter.
    pub mask: u64,
    /// Their required value.
    pub equals: u64,
}

/// Meaning of a field. Values are unsigned integers of the field's size unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number that the host driver checks itself.
    Value,
    /// Written by the host driver, or padding that it ignores; the guest's bytes never reach it.
    Output,
    /// Must be zero (`EINVAL`).
    Zero,
    /// Only these bits may be set (`EINVAL`).
    Flags(u64),
    /// One of these values (`EINVAL`).
    OneOf(&'static [u64]),
    /// A handle that this file must own; the errno is the host driver's when it does not.
    Handle {
        /// Which handles.
        space: Space,
        /// What the host driver says of an unknown handle.
        unknown: Errno,
    },
    /// As [`Kind::Handle`], but zero stands for none.
    OptionalHandle {
        /// Which handles.
        space: Space,
        /// What the host driver says of an unknown handle.
        unknown: Errno,
    },
    /// As [`Kind::Handle`]; after success the file no longer owns it.
    ClosedHandle {
        /// Which handles.
        space: Space,
        /// What the host driver says of an unknown handle.
        unknown: Errno,
    },
    /// A handle that the call creates; after success the file owns it.
    NewHandle(Space),
    /// A file descriptor (signed; an object id on the wire). A new one is close-on-exec, unless the field at this offset
    /// has its `open(2)` flags.
    Fd(Direction, Descriptor, Option<u16>),
    /// Absolute time of `CLOCK_MONOTONIC` in nanoseconds (signed). Travels as nanoseconds from now, since the two
    /// sides have different clocks; zero or less is already over.
    Deadline,
    /// Address of an array. Travels as 1, or as 0 for a null pointer: no guest address ever crosses.
    Pointer(Pointer),
}

/// The namespaces of handles in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// GEM buffer objects.
    Gem,
    /// DRM synchronization objects.
    Syncobj,
}

/// What a file descriptor is of. The guest's kernel makes one of its own of the same sort for each that comes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// A buffer object (`linux/dma-buf.h`).
    DmaBuf = 0,
    /// A fence (`linux/sync_file.h`).
    SyncFile = 1,
    /// A DRM synchronization object.
    Syncobj = 2,
    /// An `eventfd(2)`.
    Eventfd = 3,
}

/// Which way data goes, seen from the ioctl's caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the host driver.
    In,
    /// From the host driver.
    Out,
    /// Both.
    InOut,
}

impl Direction {
    /// Whether data goes to the host driver.
    pub const fn is_in(self) -> bool {
        matches!(self, Self::In | Self::InOut)
    }

    /// Whether data comes from the host driver.
    pub const fn is_out(self) -> bool {
        matches!(self, Self::Out | Self::InOut)
    }
}

/// An array that a field points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// What it holds.
    pub element: Element,
    /// How many elements.
    pub count: Count,
    /// Most elements (`E2BIG`).
    pub max: u32,
    /// Which way it goes.
    pub direction: Direction,
    /// Whether a null pointer with elements is allowed (it then stands for none); `EFAULT` otherwise.
    pub nullable: bool,
}

/// Element of an array.
#[derive(Clone, Copy, Debug)]
pub enum Element {
    /// That many opaque bytes.
    Bytes(u16),
    /// 32-bit handles that the file must own.
    Handles {
        /// Which handles.
        space: Space,
        /// What the host driver says of an unknown handle.
        unknown: Errno,
    },
    /// Structs, whose fields may be pointers in turn.
    Struct(&'static Struct),
}

impl PartialEq for Element {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (
                Self::Handles { space, unknown },
                Self::Handles {
                    space: other_space,
                    unknown: other_unknown,
                },
            ) => space == other_space && unknown == other_unknown,
            (Self::Struct(a), Self::Struct(b)) => core::ptr::eq(*a, *b),
            _ => false,
        }
    }
}

impl Eq for Element {}

impl Element {
    /// Its size in bytes.
    pub const fn size(&self) -> u16 {
        match self {
            Self::Bytes(size) => *size,
            Self::Handles { .. } => 4,
            Self::Struct(structure) => structure.size,
        }
    }
}

/// Number of elements of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Always that many.
    Fixed(u32),
    /// The value of the field at this offset of the same struct.
    Field(u16),
}

/// Command numbers are built as in `asm-generic/ioctl.h`; DRM's type is `'d'`.
pub mod command {
    /// Bit 30: the argument is read by the driver (`_IOC_WRITE`).
    pub const WRITE: u32 = 1 << 30;
    /// Bit 31: the argument is written by the driver (`_IOC_READ`).
    pub const READ: u32 = 2 << 30;
    /// Largest argument that a command number can name (14 bits).
    pub const SIZE_MAX: u16 = (1 << 14) - 1;
    /// Bits 8 to 15: the type of every DRM ioctl.
    pub const TYPE: u32 = (b'd' as u32) << 8;

    const fn sized<T>(direction: u32, number: u8) -> u32 {
        assert!(size_of::<T>() <= SIZE_MAX as usize);
        #[allow(clippy::cast_possible_truncation)] // asserted above
        let size = size_of::<T>() as u32;
        direction | (size << 16) | TYPE | number as u32
    }

    /// `DRM_IOWR(number, T)`.
    pub const fn iowr<T>(number: u8) -> u32 {
        sized::<T>(READ | WRITE, number)
    }

    /// `DRM_IOW(number, T)`.
    pub const fn iow<T>(number: u8) -> u32 {
        sized::<T>(WRITE, number)
    }

    /// `DRM_IOR(number, T)`.
    pub const fn ior<T>(number: u8) -> u32 {
        sized::<T>(READ, number)
    }

    /// Size of the argument in bytes.
    pub const fn size(command: u32) -> u16 {
        (command >> 16) as u16 & SIZE_MAX
    }

    /// The command with another argument size.
    pub const fn with_size(command: u32, size: u16) -> u32 {
        (command & !((SIZE_MAX as u32) << 16)) | ((size as u32 & SIZE_MAX as u32) << 16)
    }
}

impl Ioctl {
    /// Checks a command number that has this ioctl's number: `EINVAL` when its size or direction is none of ours.
    pub fn accept(&self, command: u32) -> Result<u16, Errno> {
        let size = command::size(command);
        let known = size == self.argument.size || self.older_sizes.contains(&size);
        if known && command::with_size(command, self.argument.size) == self.command {
            Ok(size)
        } else {
            Err(Errno::EINVAL)
        }
    }

    /// Whether the driver writes the argument back.
    pub const fn writes_back(&self) -> bool {
        self.command & command::READ != 0
    }

    /// Whether a call with this argument may wait.
    pub fn may_block(&self, argument: &[u8]) -> bool {
        match self.blocking {
            Blocking::Never => false,
            Blocking::Always => true,
            Blocking::When(condition) => condition.holds(self.argument, argument),
            Blocking::Unless(conditions) => !conditions
                .iter()
                .all(|condition| condition.holds(self.argument, argument)),
        }
    }

    /// Whether the answer to a call with this argument, once it has succeeded, holds for the rest of the session.
    pub fn is_constant(&self, argument: &[u8]) -> bool {
        match self.answer {
            Answer::Forwarded | Answer::Identity => false,
            Answer::Constant => true,
            Answer::ConstantUnless(condition) => !condition.holds(self.argument, argument),
        }
    }

    /// Bytes of GPU memory that a call with this argument allocates (saturating): whole pages, at least one.
    pub fn allocated_bytes(&self, argument: &[u8]) -> u64 {
        let read = |offset| self.argument.read(argument, offset);
        let bytes = match self.allocates {
            Allocates::Nothing => return 0,
            Allocates::Bytes(offset) => read(offset),
            Allocates::Image {
                width,
                height,
                bits_per_pixel,
            } => read(width)
                .saturating_mul(read(height))
                .saturating_mul(read(bits_per_pixel))
                .div_ceil(8),
        };
        bytes
            .max(1)
            .checked_next_multiple_of(PAGE_SIZE)
            .unwrap_or(u64::MAX)
    }
}

impl Struct {
    /// The value of the field at `offset`, zero when it lies beyond `bytes` (an older form of the struct).
    pub fn read(&self, bytes: &[u8], offset: u16) -> u64 {
        self.fields
            .iter()
            .find(|field| field.offset == offset)
            .map_or(0, |field| field.read(bytes))
    }
}

impl Field {
    /// Where the field lies in its struct.
    pub fn range(&self) -> core::ops::Range<usize> {
        usize::from(self.offset)..usize::from(self.offset) + usize::from(self.size)
    }

    /// Its value in the bytes of its struct; zero when it lies beyond them or is not an integer.
    pub fn read(&self, bytes: &[u8]) -> u64 {
        match bytes.get(self.range()) {
            Some(&[a]) => a.into(),
            Some(&[a, b]) => u16::from_le_bytes([a, b]).into(),
            Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]).into(),
            Some(&[a, b, c, d, e, f, g, h]) => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => 0,
        }
    }

    /// Writes the low bytes of `value` into the field; does nothing when it lies beyond `bytes`.
    pub fn write(&self, bytes: &mut [u8], value: u64) {
        if let Some(target) = bytes.get_mut(self.range()) {
            target
                .iter_mut()
                .zip(value.to_le_bytes().into_iter().chain(core::iter::repeat(0)))
                .for_each(|(byte, new)| *byte = new);
        }
    }

    /// What the field means in this struct with these bytes.
    pub fn kind(&'static self, structure: &Struct, bytes: &[u8]) -> &'static Kind {
        self.rules
            .iter()
            .find(|rule| {
                rule.when
                    .is_none_or(|condition| condition.holds(structure, bytes))
            })
            .map_or(&Kind::Value, |rule| &rule.kind)
    }
}

impl Condition {
    /// Whether it holds in a struct with these bytes.
    pub fn holds(&self, structure: &Struct, bytes: &[u8]) -> bool {
        structure.read(bytes, self.field) & self.mask == self.equals
    }
}

impl Rule {
    /// The rule under a condition: `value & mask == equals` for the field at that offset.
    pub const fn when(self, field: u16, mask: u64, equals: u64) -> Self {
        Self {
            kind: self.kind,
            when: Some(Condition {
                field,
                mask,
                equals,
            }),
        }
    }
}

/// Short constructors for the tables.
pub mod rule {
    use super::{Count, Descriptor, Direction, Element, Kind, Pointer, Rule, Space};
    use crate::Errno;

    const fn always(kind: Kind) -> Rule {
        Rule { kind, when: None }
    }

    /// [`Kind::Value`].
    pub const VALUE: Rule = always(Kind::Value);
    /// [`Kind::Output`].
    pub const OUTPUT: Rule = always(Kind::Output);
    /// [`Kind::Zero`].
    pub const ZERO: Rule = always(Kind::Zero);
    /// [`Kind::Deadline`].
    pub const DEADLINE: Rule = always(Kind::Deadline);

    /// [`Kind::Flags`].
    pub const fn flags(allowed: u64) -> Rule {
        always(Kind::Flags(allowed))
    }

    /// [`Kind::OneOf`].
    pub const fn one_of(values: &'static [u64]) -> Rule {
        always(Kind::OneOf(values))
    }

    /// [`Kind::Handle`].
    pub const fn handle(space: Space, unknown: Errno) -> Rule {
        always(Kind::Handle { space, unknown })
    }

    /// [`Kind::OptionalHandle`].
    pub const fn optional_handle(space: Space, unknown: Errno) -> Rule {
        always(Kind::OptionalHandle { space, unknown })
    }

    /// [`Kind::ClosedHandle`].
    pub const fn closed_handle(space: Space, unknown: Errno) -> Rule {
        always(Kind::ClosedHandle { space, unknown })
    }

    /// [`Kind::NewHandle`].
    pub const fn new_handle(space: Space) -> Rule {
        always(Kind::NewHandle(space))
    }

    /// [`Kind::Fd`].
    pub const fn fd(direction: Direction, descriptor: Descriptor) -> Rule {
        always(Kind::Fd(direction, descriptor, None))
    }

    /// [`Kind::Fd`] that comes out, open as the field at offset `flags` says.
    pub const fn fd_with_flags(descriptor: Descriptor, flags: u16) -> Rule {
        always(Kind::Fd(Direction::Out, descriptor, Some(flags)))
    }

    /// [`Kind::Pointer`] that must not be null when it has elements.
    pub const fn pointer(direction: Direction, element: Element, count: Count, max: u32) -> Rule {
        always(Kind::Pointer(Pointer {
            element,
            count,
            max,
            direction,
            nullable: false,
        }))
    }

    /// [`Kind::Pointer`] that may be null.
    pub const fn nullable(direction: Direction, element: Element, count: Count, max: u32) -> Rule {
        always(Kind::Pointer(Pointer {
            element,
            count,
            max,
            direction,
            nullable: true,
        }))
    }
}

/// Declares a struct of a host driver's uAPI together with its schema.
///
/// The struct becomes `#[repr(C)]` with the `zerocopy` derives, and its `SCHEMA` constant lists every field with its
/// name, offset, size and rules. In the rules, [`at!`](crate::at) gives the offset of a sibling field.
///
/// ```
/// use pvgpu_protocol::schema::{Count, Direction, Element, rule::*};
/// use pvgpu_protocol::{at, uapi_struct};
///
/// uapi_struct! {
///     /// Reads one parameter of the driver.
///     pub struct GetParam = "drm_virtgpu_getparam" {
///         /// Which parameter.
///         param: u64 = [VALUE],
///         /// Address of the 32-bit result.
///         value: u64 = [pointer(Direction::Out, Element::Bytes(4), Count::Fixed(1), 1)],
///     }
/// }
/// assert_eq!(GetParam::SCHEMA.fields[1].offset, 8);
/// ```
#[macro_export]
macro_rules! uapi_struct {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident = $c_name:literal {
        $($(#[$field_meta:meta])* $field:ident: $type:ty = [$($rule:expr),+ $(,)?]),* $(,)?
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes,
            zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        $visibility struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }

        impl $name {
            #[doc = concat!("Schema of `struct ", $c_name, "`.")]
            #[allow(clippy::cast_possible_truncation)] // sizes of uAPI structs are below 16 KiB
            pub const SCHEMA: &'static $crate::schema::Struct = &$crate::schema::Struct {
                name: $c_name,
                size: size_of::<Self>() as u16,
                fields: &[$($crate::schema::Field {
                    name: stringify!($field),
                    offset: $crate::at!($field),
                    size: size_of::<$type>() as u16,
                    rules: &[$($rule),+],
                }),*],
            };
        }
    };
}

/// Offset of a field of the struct being declared, for the rules inside [`uapi_struct!`](crate::uapi_struct), or of
/// a named struct: `at!(GetParam.value)`.
#[macro_export]
macro_rules! at {
    ($structure:ident . $field:ident) => {
        ::core::mem::offset_of!($structure, $field) as u16
    };
    ($field:ident) => {
        ::core::mem::offset_of!(Self, $field) as u16
    };
}
