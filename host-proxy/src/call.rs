//! One ioctl of a guest, copied and validated: what a host driver gets to execute.
//!
//! The module `session` builds a [`Call`] from the copy of the request ([`Call::new`]), which rejects everything that
//! the schema does not allow. From then on the guest has no influence on its bytes. All of it lies in one buffer:
//! the argument struct first, then the arrays that its pointers reach. Pointer fields hold no addresses here; a
//! driver that needs addresses (the kernel) puts its own in.

use crate::clock;
use crate::driver::HostObject;
use pvgpu_protocol::Errno;
use pvgpu_protocol::layout::{Array, Layout, Payload, align, lay_out, structs};
use pvgpu_protocol::schema::{Coherence, Direction, Element, Field, Ioctl, Kind, Space, Struct};
use std::ops::Range;
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What a call may refer to: the guest file's handles and the session's objects.
pub trait Owned {
    /// Whether the file owns that handle.
    fn owns(&self, space: Space, handle: u32) -> bool;
    /// The object of that id, `EBADF` when there is none.
    fn object(&self, id: i32) -> Result<Arc<dyn HostObject>, Errno>;
}

/// A validated ioctl.
pub struct Call {
    ioctl: &'static Ioctl,
    command: u32,
    bytes: Bytes,
    /// Bytes of the argument struct.
    argument: usize,
    arrays: Vec<Array>,
    /// Bytes of the request's payload.
    request: usize,
    /// Bytes of the response's payload.
    response: usize,
    fds: Vec<Fd>,
    /// Where the times on the host's clock lie in the bytes.
    deadlines: Vec<usize>,
}

/// A file descriptor field of the call.
struct Fd {
    /// Where the field lies in the call's bytes.
    field: usize,
    direction: Direction,
    object: Option<Arc<dyn HostObject>>,
}

/// A handle that the call created or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleChange {
    /// Which handles.
    pub space: Space,
    /// The handle.
    pub handle: u32,
    /// Whether it was created; closed otherwise.
    pub created: bool,
}

/// Bytes at an address that is a multiple of eight, so that every struct in them is aligned as in C.
#[derive(Default)]
struct Bytes {
    words: Vec<u64>,
    length: usize,
}

impl Bytes {
    fn get(&self) -> &[u8] {
        let bytes = self.words.as_bytes();
        bytes.get(..self.length).unwrap_or(bytes)
    }

    fn get_mut(&mut self) -> &mut [u8] {
        self.words
            .as_mut_bytes()
            .get_mut(..self.length)
            .unwrap_or_default()
    }

    fn copy_of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks();
        let mut last = [0; 8];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        let last = (!rest.is_empty()).then_some(last);
        Self {
            words: words
                .iter()
                .copied()
                .chain(last)
                .map(u64::from_ne_bytes)
                .collect(),
            length: bytes.len(),
        }
    }

    /// Grows with zeros to `length` bytes.
    fn resize(&mut self, length: usize) {
        self.words.resize(length.div_ceil(8), 0);
        self.length = length;
    }
}

/// The received payload: everything that goes in must already be there.
struct Received(Bytes);

impl Payload for Received {
    fn bytes(&self) -> &[u8] {
        self.0.get()
    }

    fn gather(&mut self, _address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        match offset.checked_add(length) {
            Some(end) if end <= self.0.length => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl Call {
    /// Validates the payload of an ioctl request. `limit` is the most bytes that the call may take, arrays that
    /// come out included (`E2BIG`).
    pub fn new(
        ioctl: &'static Ioctl,
        command: u32,
        payload: &[u8],
        owned: &dyn Owned,
        limit: usize,
    ) -> Result<Self, Errno> {
        let size = ioctl.accept(command)?;
        if payload.len() > limit {
            return Err(Errno::E2BIG);
        }
        let mut received = Received(Bytes::copy_of(payload));
        let mut layout = Layout::default();
        lay_out(ioctl, size, &mut received, &mut layout)?;
        if layout.request != payload.len() {
            return Err(Errno::EINVAL);
        }
        let room = layout.arrays.iter().filter(|array| array.request.is_none());
        let total = room.fold(align(layout.request), |total, array| {
            total.saturating_add(align(array.length))
        });
        if total > limit {
            return Err(Errno::E2BIG);
        }
        let mut bytes = received.0;
        bytes.resize(total);
        let mut call = Self {
            ioctl,
            command,
            bytes,
            argument: layout.argument,
            arrays: layout.arrays.iter().copied().collect(),
            request: layout.request,
            response: layout.response,
            fds: Vec::new(),
            deadlines: Vec::new(),
        };
        call.check(owned)?;
        Ok(call)
    }

    /// Applies the rules of every field of every struct.
    fn check(&mut self, owned: &dyn Owned) -> Result<(), Errno> {
        let arrays = std::mem::take(&mut self.arrays);
        for (structure, range) in structs(self.ioctl, self.argument, &arrays) {
            for field in structure.fields {
                self.check_field(structure, &range, field, owned)?;
            }
        }
        self.arrays = arrays;
        for array in &self.arrays {
            let Element::Handles { space, unknown } = array.pointer.element else {
                continue;
            };
            let handles = array
                .request
                .and_then(|start| self.bytes.get().get(start..start + array.length))
                .unwrap_or_default();
            for handle in handles.chunks_exact(4) {
                let handle = handle.try_into().map_or(0, u32::from_le_bytes);
                if !owned.owns(space, handle) {
                    return Err(unknown);
                }
            }
        }
        Ok(())
    }

    fn check_field(
        &mut self,
        structure: &'static Struct,
        range: &Range<usize>,
        field: &'static Field,
        owned: &dyn Owned,
    ) -> Result<(), Errno> {
        let bytes = self
            .bytes
            .get_mut()
            .get_mut(range.clone())
            .unwrap_or_default();
        let value = field.read(bytes);
        let inside = field.range().end <= bytes.len();
        let handle = u32::try_from(value);
        let owns = |space| handle.is_ok_and(|handle| owned.owns(space, handle));
        match *field.kind(structure, bytes) {
            Kind::Value | Kind::Pointer(_) => Ok(()),
            Kind::Output | Kind::NewHandle(_) => {
                field.write(bytes, 0);
                Ok(())
            }
            Kind::Zero => match bytes.get(field.range()) {
                Some(reserved) if reserved.iter().any(|byte| *byte != 0) => Err(Errno::EINVAL),
                _ => Ok(()),
            },
            Kind::Flags(allowed) if value & !allowed != 0 => Err(Errno::EINVAL),
            Kind::OneOf(values) if !values.contains(&value) => Err(Errno::EINVAL),
            Kind::Flags(_) | Kind::OneOf(_) => Ok(()),
            Kind::OptionalHandle { .. } if value == 0 => Ok(()),
            Kind::Handle { space, unknown }
            | Kind::OptionalHandle { space, unknown }
            | Kind::ClosedHandle { space, unknown } => match owns(space) {
                true => Ok(()),
                false => Err(unknown),
            },
            Kind::Deadline => {
                // Nanoseconds from now become the host's clock; a wait longer than the clock lasts is one for ever.
                let relative = i64::from_le_bytes(value.to_le_bytes());
                let deadline = match u64::try_from(relative) {
                    Ok(0) | Err(_) => 0,
                    Ok(wait) => clock::monotonic_ns()
                        .saturating_add(wait)
                        .min(i64::MAX as u64),
                };
                field.write(bytes, deadline);
                if inside {
                    self.deadlines.push(range.start + usize::from(field.offset));
                }
                Ok(())
            }
            // An older form of the struct has no place for it.
            Kind::Fd(..) if !inside => Err(Errno::EINVAL),
            Kind::Fd(direction, ..) => {
                let object = match direction.is_in() {
                    true => {
                        let id = i32::from_le_bytes(lower_half(value));
                        Some(owned.object(id)?)
                    }
                    false => None,
                };
                field.write(bytes, u64::from(u32::MAX)); // -1 until the driver puts its own number there
                self.fds.push(Fd {
                    field: range.start + usize::from(field.offset),
                    direction,
                    object,
                });
                Ok(())
            }
        }
    }

    /// Every struct that came in, with the range of its bytes.
    fn structs(&self) -> impl Iterator<Item = (&'static Struct, Range<usize>)> {
        structs(self.ioctl, self.argument, &self.arrays)
    }

    /// The ioctl's schema.
    pub fn ioctl(&self) -> &'static Ioctl {
        self.ioctl
    }

    /// The command number as the guest gave it: the size in it is that of [`Call::argument`].
    pub fn command(&self) -> u32 {
        self.command
    }

    /// Whether it may wait and belongs to the worker pool.
    pub fn may_block(&self) -> bool {
        self.ioctl.may_block(self.argument())
    }

    /// Bytes of GPU memory that it allocates.
    pub fn allocated_bytes(&self) -> u64 {
        self.ioctl.allocated_bytes(self.argument())
    }

    /// The argument struct, which may be in an older, shorter form.
    pub fn argument(&self) -> &[u8] {
        self.bytes.get().get(..self.argument).unwrap_or_default()
    }

    /// The argument as its Rust struct; fields that an older form lacks are zero.
    pub fn read_argument<T: FromBytes + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        value
            .as_mut_bytes()
            .iter_mut()
            .zip(self.argument())
            .for_each(|(to, from)| *to = *from);
        value
    }

    /// Replaces the argument; fields that an older form lacks are dropped.
    pub fn write_argument<T: IntoBytes + Immutable>(&mut self, value: &T) {
        let length = self.argument;
        self.bytes
            .get_mut()
            .iter_mut()
            .take(length)
            .zip(value.as_bytes())
            .for_each(|(to, from)| *to = *from);
    }

    /// The array that the argument's pointer field at this offset reaches; empty for a null pointer.
    pub fn array(&self, field: u16) -> &[u8] {
        self.array_range(field)
            .and_then(|range| self.bytes.get().get(range))
            .unwrap_or_default()
    }

    /// As [`Call::array`], to be written.
    pub fn array_mut(&mut self, field: u16) -> &mut [u8] {
        match self.array_range(field) {
            Some(range) => self.bytes.get_mut().get_mut(range).unwrap_or_default(),
            None => &mut [],
        }
    }

    fn array_range(&self, field: u16) -> Option<Range<usize>> {
        self.arrays()
            .find(|(array, _)| array.field == usize::from(field))
            .map(|(_, range)| range)
    }

    /// Every array with where its bytes lie in [`Call::bytes_mut`]; [`Array::field`] is where its pointer lies there.
    pub fn arrays(&self) -> impl Iterator<Item = (&Array, Range<usize>)> {
        let mut end = align(self.request);
        self.arrays.iter().map(move |array| {
            let start = array.request.unwrap_or_else(|| {
                let start = end;
                end += align(array.length);
                start
            });
            (array, start..start + array.length)
        })
    }

    /// All bytes of the call at an address that is a multiple of eight, the argument first.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut()
    }

    /// The file descriptor fields: where each lies in [`Call::bytes_mut`], and the object that goes in.
    pub fn fds(&self) -> impl Iterator<Item = (usize, Option<&Arc<dyn HostObject>>)> {
        self.fds.iter().map(|fd| (fd.field, fd.object.as_ref()))
    }

    /// The object that the file descriptor field at this offset names, if it goes in.
    pub fn object(&self, field: u16) -> Option<&Arc<dyn HostObject>> {
        let fd = self.fds.iter().find(|fd| fd.field == usize::from(field))?;
        fd.object.as_ref()
    }

    /// Where the fields lie whose file descriptors the driver gives out.
    pub fn fds_out(&self) -> impl Iterator<Item = usize> {
        let out = self.fds.iter().filter(|fd| fd.direction.is_out());
        out.map(|fd| fd.field)
    }

    /// Gives out an object through the file descriptor field at this place.
    pub fn put_object(&mut self, field: usize, object: Arc<dyn HostObject>) {
        if let Some(fd) = self
            .fds
            .iter_mut()
            .find(|fd| fd.field == field && fd.direction.is_out())
        {
            fd.object = Some(object);
            fd.direction = Direction::Out;
        }
    }

    /// Turns the objects that the driver gave out into ids that the guest can name, and takes the host's clock out.
    pub(crate) fn publish(
        &mut self,
        mut insert: impl FnMut(Arc<dyn HostObject>) -> Result<i32, Errno>,
    ) -> Result<(), Errno> {
        for place in &self.deadlines {
            if let Some(field) = self.bytes.get_mut().get_mut(*place..*place + 8) {
                field.fill(0);
            }
        }
        for fd in &mut self.fds {
            let given = match fd.direction {
                Direction::Out => fd.object.take(),
                Direction::In | Direction::InOut => None,
            };
            let id = given.map_or(Ok(-1), &mut insert)?;
            if let Some(field) = self.bytes.get_mut().get_mut(fd.field..fd.field + 4) {
                field.copy_from_slice(&id.to_le_bytes());
            }
        }
        Ok(())
    }

    /// The handles that a successful call created and closed.
    pub(crate) fn handle_changes(&self) -> Vec<HandleChange> {
        let mut changes = Vec::new();
        for (structure, range) in self.structs() {
            let bytes = self.bytes.get().get(range).unwrap_or_default();
            for field in structure.fields {
                let (space, created) = match *field.kind(structure, bytes) {
                    Kind::NewHandle(space) => (space, true),
                    Kind::ClosedHandle { space, .. } => (space, false),
                    _ => continue,
                };
                if let Ok(handle) = u32::try_from(field.read(bytes)) {
                    changes.push(HandleChange {
                        space,
                        handle,
                        created,
                    });
                }
            }
        }
        changes
    }

    /// The GEM handles in the fields of its structs, arrays of handles excepted.
    pub(crate) fn gem_handles(&self) -> impl Iterator<Item = u32> {
        self.structs().flat_map(|(structure, range)| {
            let bytes = self.bytes.get().get(range).unwrap_or_default();
            structure.fields.iter().filter_map(move |field| {
                let named = matches!(
                    field.kind(structure, bytes),
                    Kind::Handle {
                        space: Space::Gem,
                        ..
                    } | Kind::OptionalHandle {
                        space: Space::Gem,
                        ..
                    }
                );
                named
                    .then(|| u32::try_from(field.read(bytes)).ok())
                    .flatten()
            })
        })
    }

    /// The GEM handles that the call uses, in fields and in arrays.
    pub(crate) fn used_gem_handles(&self) -> impl Iterator<Item = u32> {
        let arrays = self.arrays().filter_map(|(array, range)| {
            let gem = matches!(
                array.pointer.element,
                Element::Handles {
                    space: Space::Gem,
                    ..
                }
            );
            gem.then(|| self.bytes.get().get(range)).flatten()
        });
        let listed = arrays
            .flat_map(|bytes| bytes.as_chunks().0)
            .map(|handle| u32::from_le_bytes(*handle));
        self.gem_handles().chain(listed)
    }

    /// Where the argument says that the buffer can be mapped which it names, if it is for that: handle and offset.
    pub(crate) fn mapping_offset(&self) -> Option<(u32, u64)> {
        let Coherence::Offset(field) = self.ioctl.coherence else {
            return None;
        };
        let offset = self.ioctl.argument.read(self.argument(), field);
        Some((self.gem_handles().next()?, offset))
    }

    /// Bytes of the response's payload.
    pub(crate) fn response_length(&self) -> usize {
        self.response
    }

    /// The parts of the response's payload: each with its offset there.
    pub(crate) fn response_parts(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let argument = self.ioctl.writes_back().then(|| (0, self.argument()));
        let arrays = self
            .arrays()
            .filter_map(|(array, range)| Some((array.response?, self.bytes.get().get(range)?)));
        argument.into_iter().chain(arrays)
    }
}

/// The lower 32 bits, as bytes.
fn lower_half(value: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = value.to_le_bytes();
    [a, b, c, d]
}
