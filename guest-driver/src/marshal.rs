//! From an ioctl's argument in the caller's memory to a request's payload, and back.
//!
//! [`crate::session`] calls [`gather`] before and [`scatter`] after the round trip. What to copy comes from the schema
//! alone; there is no code for any single ioctl.

use core::ops::Range;
use pvgpu_protocol::Errno;
use pvgpu_protocol::layout::{Layout, PRESENT, Payload, lay_out, structs};
use pvgpu_protocol::schema::{Descriptor, Direction, Element, Field, Ioctl, Kind, Struct};

/// The program that has called: its memory and its file descriptors.
pub trait Caller {
    /// Copies from the caller's memory; `EFAULT` where there is none.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Errno>;

    /// Copies to the caller's memory; `EFAULT` where there is none.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Errno>;

    /// The object behind one of the caller's file descriptors, which is to be of that sort; what a host driver says when it
    /// is not, or not of this session. The object stays until the call is over, whatever becomes of the descriptor.
    fn object(&self, fd: i32, descriptor: Descriptor) -> Result<i32, Errno>;

    /// Gives the caller a file descriptor of that sort for an object, with those flags of `open(2)`.
    fn fd(&mut self, object: i32, descriptor: Descriptor, flags: u32) -> Result<i32, Errno>;
}

/// A request's payload that is being gathered into a buffer.
struct Gathered<'a, C: ?Sized> {
    buffer: &'a mut [u8],
    length: usize,
    caller: &'a C,
}

impl<C: Caller + ?Sized> Payload for Gathered<'_, C> {
    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    fn gather(&mut self, address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        let end = offset.checked_add(length).ok_or(Errno::E2BIG)?;
        let gap = self
            .buffer
            .get_mut(self.length..offset)
            .ok_or(Errno::ENOSPC)?;
        gap.fill(0);
        let target = self.buffer.get_mut(offset..end).ok_or(Errno::ENOSPC)?;
        self.length = end;
        self.caller.read(address, target)
    }
}

/// Gathers the argument of `size` bytes at `address`, and all that its pointers reach, into `buffer`, and says in
/// `layout` where everything is.
///
/// `ENOSPC` when the buffer is too short; [`Layout::request`] then says how long it must be at least.
pub fn gather<C: Caller + ?Sized>(
    ioctl: &'static Ioctl,
    size: u16,
    address: u64,
    caller: &C,
    now_ns: u64,
    buffer: &mut [u8],
    layout: &mut Layout,
) -> Result<(), Errno> {
    let mut payload = Gathered {
        buffer,
        length: 0,
        caller,
    };
    layout.request = size.into();
    payload.gather(address, 0, size.into())?;
    lay_out(ioctl, size, &mut payload, layout)?;
    for (structure, range) in structs(ioctl, layout.argument, &layout.arrays) {
        let bytes = buffer.get_mut(range).ok_or(Errno::EFAULT)?;
        for field in structure.fields {
            encode_field(structure, field, bytes, caller, now_ns)?;
        }
    }
    Ok(())
}

/// Replaces what means something only here: addresses, file descriptors and points in time.
fn encode_field<C: Caller + ?Sized>(
    structure: &'static Struct,
    field: &'static Field,
    bytes: &mut [u8],
    caller: &C,
    now_ns: u64,
) -> Result<(), Errno> {
    let value = field.read(bytes);
    let encoded = match field.kind(structure, bytes) {
        Kind::Pointer(_) => u64::from(value != 0) * PRESENT,
        Kind::Deadline => {
            let deadline = u64::try_from(value.cast_signed()).unwrap_or(0);
            deadline.saturating_sub(now_ns)
        }
        &Kind::Fd(direction, descriptor, _) if direction.is_in() => {
            let object = caller.object(signed(value), descriptor)?;
            u64::from(object.cast_unsigned())
        }
        _ => return Ok(()),
    };
    field.write(bytes, encoded);
    Ok(())
}

/// Takes out of a gathered payload what never reaches the host driver: the bytes of output fields. What is left is all that
/// its answer can depend on.
pub fn erase_outputs(ioctl: &'static Ioctl, layout: &Layout, payload: &mut [u8]) {
    for (structure, range) in structs(ioctl, layout.argument, &layout.arrays) {
        let Some(bytes) = payload.get_mut(range) else {
            continue;
        };
        for field in structure.fields {
            if let (Kind::Output, Some(output)) =
                (field.kind(structure, bytes), bytes.get_mut(field.range()))
            {
                output.fill(0);
            }
        }
    }
}

/// Copies what came back to the caller: the argument of `ioctl` at `address`, and all arrays that come out.
///
/// A payload that is not as long as the layout says is `EPROTO`.
pub fn scatter<C: Caller + ?Sized>(
    ioctl: &'static Ioctl,
    layout: &Layout,
    address: u64,
    caller: &mut C,
    payload: &[u8],
) -> Result<(), Errno> {
    if payload.len() != layout.response {
        return Err(Errno::EPROTO);
    }
    if ioctl.writes_back() {
        let bytes = payload.get(..layout.argument).ok_or(Errno::EPROTO)?;
        decode_struct(ioctl.argument, bytes, address, caller)?;
    }
    for array in layout.arrays.iter().filter(|array| array.length > 0) {
        let Some(start) = array.response else {
            continue;
        };
        let bytes = payload
            .get(start..start + array.length)
            .ok_or(Errno::EPROTO)?;
        match array.pointer.element {
            Element::Struct(structure) => {
                let size = usize::from(structure.size).max(1);
                for (bytes, index) in bytes.chunks_exact(size).zip(0u64..) {
                    let address = array.address + index * u64::from(structure.size);
                    decode_struct(structure, bytes, address, caller)?;
                }
            }
            _ => caller.write(array.address, bytes)?,
        }
    }
    Ok(())
}

/// Writes a struct back, except for the fields that [`encode_field`] has replaced: those keep the caller's values,
/// and new objects become file descriptors.
fn decode_struct<C: Caller + ?Sized>(
    structure: &'static Struct,
    bytes: &[u8],
    address: u64,
    caller: &mut C,
) -> Result<(), Errno> {
    // Descriptors first: an object that has none when a write fails would stay open on the host.
    for field in structure.fields {
        let Kind::Fd(Direction::Out | Direction::InOut, descriptor, flags) =
            *field.kind(structure, bytes)
        else {
            continue;
        };
        let flags = flags.map_or(CLOSE_ON_EXEC, |flags| {
            signed(structure.read(bytes, flags)).cast_unsigned()
        });
        let fd = match signed(field.read(bytes)) {
            object if object > 0 => caller.fd(object, descriptor, flags)?,
            _ => -1,
        };
        if field.range().end <= bytes.len() {
            caller.write(address + u64::from(field.offset), &fd.to_le_bytes())?;
        }
    }
    let mut write = |range: Range<usize>| match bytes.get(range.clone()) {
        Some(bytes) if !bytes.is_empty() => caller.write(address + range.start as u64, bytes),
        _ => Ok(()),
    };
    let mut run = 0..0;
    for field in structure.fields {
        let range = field.range();
        if range.end > bytes.len() {
            break;
        }
        let kept = matches!(
            field.kind(structure, bytes),
            Kind::Pointer(_) | Kind::Deadline | Kind::Fd(..)
        );
        if kept {
            write(run)?;
            run = range.end..range.end;
        } else {
            run.end = range.end;
        }
    }
    write(run)
}

/// `O_CLOEXEC`.
const CLOSE_ON_EXEC: u32 = 0o2_000_000;

/// A 32-bit field as a signed number.
fn signed(value: u64) -> i32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}
