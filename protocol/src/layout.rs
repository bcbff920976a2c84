//! Where the argument of an ioctl and all that its pointers reach lie in a message.
//!
//! Both sides call [`lay_out`] on the same bytes and get the same [`Layout`]: the guest while it gathers, the host
//! after it has copied the request. Lengths and counts always come from the struct itself, never from the message.
//!
//! A request's payload is the argument struct, then every array that goes in; a response's payload is the argument
//! struct (if the command returns it), then every array that comes out. Each starts at the next multiple of
//! [`ALIGNMENT`]. Arrays stand in the order of their pointer fields, breadth first: all arrays of one struct, then
//! those of the structs that they hold.

use crate::Errno;
use crate::schema::{Count, Element, Ioctl, Kind, Pointer, Struct};
use arrayvec::ArrayVec;
use core::ops::Range;

/// Arrays start at multiples of this many bytes in a payload, the argument at zero.
pub const ALIGNMENT: usize = 8;
/// Most arrays that one call may reach (`E2BIG`).
pub const ARRAYS_MAX: usize = 32;
/// Deepest nesting: the argument's own arrays are at depth 1.
pub const DEPTH_MAX: u8 = 3;

/// Value of a pointer field on the wire when there is an array.
pub const PRESENT: u64 = 1;

/// Where everything lies. It is large: fill it where it stays ([`lay_out`]).
#[derive(Debug, Default)]
pub struct Layout {
    /// Bytes of the argument struct.
    pub argument: usize,
    /// Every array that a pointer field reaches, null pointers included.
    pub arrays: ArrayVec<Array, ARRAYS_MAX>,
    /// Bytes of the request's payload.
    pub request: usize,
    /// Bytes of the response's payload.
    pub response: usize,
}

/// One array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array {
    /// Its schema.
    pub pointer: &'static Pointer,
    /// Where its pointer field lies in the request's payload.
    pub field: usize,
    /// Its length in bytes; zero for a null pointer.
    pub length: usize,
    /// Where it lies in the request's payload, if it goes in.
    pub request: Option<usize>,
    /// Where it lies in the response's payload, if it comes out.
    pub response: Option<usize>,
    /// The pointer field's value as it was read: the caller's address in the guest, [`PRESENT`] in the host, zero for
    /// a null pointer.
    pub address: u64,
    depth: u8,
}

/// A request's payload while it is being laid out.
pub trait Payload {
    /// The bytes that are there: at least the argument struct.
    fn bytes(&self) -> &[u8];

    /// Makes sure that `length` bytes of the array at guest address `address` lie at `offset`. The guest copies
    /// them there; the host checks that they were sent.
    fn gather(&mut self, address: u64, offset: usize, length: usize) -> Result<(), Errno>;
}

/// The next multiple of [`ALIGNMENT`].
pub const fn align(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

/// Lays out a call of `ioctl` whose argument struct of `size` bytes starts the payload, into `layout`, whose former
/// contents do not matter.
///
/// `E2BIG` for a count over its limit, `EFAULT` for a null pointer with elements, or what [`Payload::gather`] says.
pub fn lay_out<P: Payload>(
    ioctl: &Ioctl,
    size: u16,
    payload: &mut P,
    layout: &mut Layout,
) -> Result<(), Errno> {
    let argument = usize::from(size);
    layout.argument = argument;
    layout.arrays.clear();
    layout.request = argument;
    layout.response = if ioctl.writes_back() { argument } else { 0 };
    layout.add_struct(ioctl.argument, 0, argument, 1, payload)?;
    let mut next = 0;
    while let Some(&array) = layout.arrays.get(next) {
        next += 1;
        let (Element::Struct(structure), Some(start)) = (array.pointer.element, array.request)
        else {
            continue;
        };
        if !structure.has_pointers() {
            continue;
        }
        if array.depth >= DEPTH_MAX {
            return Err(Errno::E2BIG);
        }
        let size = usize::from(structure.size);
        for base in (start..start + array.length).step_by(size.max(1)) {
            layout.add_struct(structure, base, size, array.depth + 1, payload)?;
        }
    }
    Ok(())
}

/// Every struct that goes in, with the range of its bytes in the request's payload: the argument of `size` bytes,
/// then the elements of arrays.
pub fn structs(
    ioctl: &'static Ioctl,
    size: usize,
    arrays: &[Array],
) -> impl Iterator<Item = (&'static Struct, Range<usize>)> {
    let elements = arrays.iter().filter_map(|array| {
        let (structure, start) = match array.pointer.element {
            Element::Struct(structure) => (structure, array.request?),
            _ => return None,
        };
        let size = usize::from(structure.size);
        let bases = (start..start + array.length).step_by(size.max(1));
        Some(bases.map(move |base| (structure, base..base + size)))
    });
    core::iter::once((ioctl.argument, 0..size)).chain(elements.flatten())
}

impl Struct {
    /// Whether any field may be a pointer.
    pub fn has_pointers(&self) -> bool {
        self.fields
            .iter()
            .flat_map(|field| field.rules)
            .any(|rule| matches!(rule.kind, Kind::Pointer(_)))
    }
}

impl Layout {
    /// Adds the arrays of the struct of `size` bytes at `base`.
    fn add_struct<P: Payload>(
        &mut self,
        structure: &'static Struct,
        base: usize,
        size: usize,
        depth: u8,
        payload: &mut P,
    ) -> Result<(), Errno> {
        for field in structure.fields {
            let bytes = payload
                .bytes()
                .get(base..base + size)
                .ok_or(Errno::EINVAL)?;
            let Kind::Pointer(pointer) = field.kind(structure, bytes) else {
                continue;
            };
            let address = field.read(bytes);
            let count = match pointer.count {
                Count::Fixed(count) => u64::from(count),
                Count::Field(offset) => structure.read(bytes, offset),
            };
            let null = address == 0;
            if count > u64::from(pointer.max) {
                return Err(Errno::E2BIG);
            }
            if null && count != 0 && !pointer.nullable {
                return Err(Errno::EFAULT);
            }
            if field.range().end > size {
                continue; // an older form of the struct: there is no field to hold an address
            }
            let length = match usize::try_from(count) {
                _ if null => 0,
                Ok(count) => count
                    .checked_mul(pointer.element.size().into())
                    .ok_or(Errno::E2BIG)?,
                Err(_) => return Err(Errno::E2BIG),
            };
            let request = match pointer.direction.is_in() {
                true => Some(extend(&mut self.request, length)?),
                false => None,
            };
            let response = match pointer.direction.is_out() {
                true => Some(extend(&mut self.response, length)?),
                false => None,
            };
            if let (Some(offset), 1..) = (request, length) {
                payload.gather(address, offset, length)?;
            }
            self.arrays
                .try_push(Array {
                    pointer,
                    field: base + usize::from(field.offset),
                    length,
                    request,
                    response,
                    address,
                    depth,
                })
                .map_err(|_| Errno::E2BIG)?;
        }
        Ok(())
    }
}

/// Appends `length` bytes to a payload of `total` bytes and returns where they start. An empty array takes no room.
fn extend(total: &mut usize, length: usize) -> Result<usize, Errno> {
    if length == 0 {
        return Ok(*total);
    }
    let start = align(*total);
    *total = start.checked_add(length).ok_or(Errno::E2BIG)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{Allocates, Answer, Blocking, Coherence, Direction, command, rule::*};
    use crate::{at, uapi_struct};
    use std::vec::Vec;

    uapi_struct! {
        struct Inner = "inner" {
            data: u64 = [pointer(Direction::In, Element::Bytes(1), Count::Field(at!(length)), 100)],
            length: u32 = [VALUE],
            pad: u32 = [ZERO],
        }
    }

    uapi_struct! {
        struct Outer = "outer" {
            list: u64 = [pointer(Direction::InOut, Element::Struct(Inner::SCHEMA), Count::Field(at!(count)), 4)],
            count: u32 = [VALUE],
            flags: u32 = [flags(1)],
            name: u64 = [nullable(Direction::Out, Element::Bytes(1), Count::Fixed(10), 10)],
        }
    }

    const IOCTL: Ioctl = Ioctl {
        name: "TEST",
        command: command::iowr::<Outer>(0x40),
        argument: Outer::SCHEMA,
        older_sizes: &[16],
        blocking: Blocking::Never,
        allocates: Allocates::Nothing,
        answer: Answer::Forwarded,
        coherence: Coherence::None,
        summary: "",
    };

    /// Gathers from this process's own memory, a `Vec` of (address, bytes).
    struct Fake<'a> {
        bytes: Vec<u8>,
        memory: &'a [(u64, &'a [u8])],
    }

    impl Payload for Fake<'_> {
        fn bytes(&self) -> &[u8] {
            &self.bytes
        }

        fn gather(&mut self, address: u64, offset: usize, length: usize) -> Result<(), Errno> {
            let (_, source) = self
                .memory
                .iter()
                .find(|(start, _)| *start == address)
                .ok_or(Errno::EFAULT)?;
            self.bytes.resize(offset, 0);
            self.bytes
                .extend_from_slice(source.get(..length).ok_or(Errno::EFAULT)?);
            Ok(())
        }
    }

    fn outer(outer: Outer, memory: &[(u64, &[u8])]) -> Result<Layout, Errno> {
        use zerocopy::IntoBytes;
        let mut payload = Fake {
            bytes: outer.as_bytes().to_vec(),
            memory,
        };
        let mut layout = Layout::default();
        lay_out(&IOCTL, 24, &mut payload, &mut layout)?;
        assert_eq!(payload.bytes.len(), layout.request);
        Ok(layout)
    }

    #[test]
    fn nested_arrays_follow_breadth_first_and_aligned() {
        use zerocopy::IntoBytes;
        let inner = [
            Inner {
                data: 200,
                length: 3,
                pad: 0,
            },
            Inner {
                data: 300,
                length: 5,
                pad: 0,
            },
        ];
        let value = Outer {
            list: 100,
            count: 2,
            flags: 0,
            name: 400,
        };
        let memory: &[(u64, &[u8])] = &[(100, inner.as_bytes()), (200, b"abc"), (300, b"defgh")];
        let layout = outer(value, memory).unwrap();
        let seen: Vec<_> = layout
            .arrays
            .iter()
            .map(|array| (array.field, array.length, array.request, array.response))
            .collect();
        assert_eq!(
            seen,
            [
                (0, 32, Some(24), Some(24)),
                (16, 10, None, Some(56)),
                (24, 3, Some(56), None),
                (40, 5, Some(64), None),
            ]
        );
        assert_eq!((layout.request, layout.response), (69, 66));
    }

    #[test]
    fn a_count_over_its_limit_is_too_big() {
        let value = Outer {
            list: 1,
            count: 5,
            ..Outer::default()
        };
        assert_eq!(outer(value, &[]).unwrap_err(), Errno::E2BIG);
    }

    #[test]
    fn a_null_pointer_with_elements_is_a_fault_unless_nullable() {
        let value = Outer {
            list: 0,
            count: 1,
            ..Outer::default()
        };
        assert_eq!(outer(value, &[]).unwrap_err(), Errno::EFAULT);
        let layout = outer(Outer::default(), &[]).unwrap();
        assert!(
            layout
                .arrays
                .iter()
                .all(|array| array.address == 0 && array.length == 0)
        );
    }

    #[test]
    fn an_older_form_of_the_struct_lacks_the_later_fields() {
        let mut payload = Fake {
            bytes: std::vec![0; 16],
            memory: &[],
        };
        let mut layout = Layout::default();
        lay_out(&IOCTL, 16, &mut payload, &mut layout).unwrap();
        assert_eq!((layout.request, layout.response), (16, 16));
        assert_eq!(layout.arrays.len(), 1);
        assert_eq!(IOCTL.accept(command::with_size(IOCTL.command, 16)), Ok(16));
        assert_eq!(
            IOCTL.accept(command::with_size(IOCTL.command, 17)),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            IOCTL.accept(IOCTL.command & !command::READ),
            Err(Errno::EINVAL)
        );
    }
}
