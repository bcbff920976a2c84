//! What a call is when it reaches the kernel: looked at as the kernel would, through the addresses in the argument.
//!
//! [`crate::recording`] inspects every call, by the rules of its schema too ([`crate::conformance`]); tests of a guest that changes its requests while they are read then compare
//! what was seen with the copies in a trace ([`compare`]). The rules of the schemas are applied here once more, by code
//! that is not the proxy's: that is the point.
#![allow(unsafe_code)]

use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::drm::perform_by;
use pvgpu_protocol::control::decode_trace;
use pvgpu_protocol::family::{self, Family};
use pvgpu_protocol::layout::{Layout, PRESENT, Payload, lay_out, structs};
use pvgpu_protocol::schema::{Ioctl, Kind, command};
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use std::collections::BTreeMap;
use std::ops::Range;
use zerocopy::FromBytes;

use crate::conformance::violations;

/// A call as the kernel would copy it: its command, then the payload of its request with nothing in it that means
/// something to one side only (addresses, descriptors, times, the guest's bytes in output fields).
pub type Seen = (u32, Vec<u8>);

/// The memory of a call, whose first bytes are the argument, at the address where the kernel would find it.
struct Memory<'a> {
    base: u64,
    bytes: &'a [u8],
    payload: Vec<u8>,
}

impl Memory<'_> {
    /// The bytes at an address, if all of them are the call's own.
    fn at(&self, address: u64, length: usize) -> Option<&[u8]> {
        let start = usize::try_from(address.checked_sub(self.base)?).ok()?;
        self.bytes.get(start..start.checked_add(length)?)
    }
}

/// Copies as the kernel does: from the addresses that the argument holds.
impl Payload for Memory<'_> {
    fn bytes(&self) -> &[u8] {
        &self.payload
    }

    fn gather(&mut self, address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        let bytes = self.at(address, length).ok_or(Errno::EFAULT)?.to_vec();
        self.payload.resize(offset, 0);
        self.payload.extend(bytes);
        Ok(())
    }
}

/// Looks at a call as the kernel behind a node would, if this were one. `owned` says whether the guest has been given that
/// handle; `guest` are the host addresses of what the guest can write to. The error says what must never have come so far.
pub fn inspect(
    call: &mut Call,
    owned: impl Fn(u32) -> bool,
    guest: &[Range<usize>],
) -> Result<Seen, String> {
    if let Some(violation) = violations(call, usize::MAX, &|_, handle| owned(handle)).pop() {
        return Err(violation);
    }
    let (ioctl, length) = (call.ioctl(), call.bytes_mut().len());
    let mut result = Err(String::new());
    perform_by(call, |number, argument| {
        let own = argument.addr()..argument.addr().saturating_add(length);
        let shared = |guest: &&Range<usize>| own.start < guest.end && guest.start < own.end;
        result = match guest.iter().find(shared) {
            Some(guest) => Err(format!(
                "{}: the call's memory {own:#x?} is the guest's own {guest:#x?}",
                ioctl.name
            )),
            None => {
                // SAFETY: `perform_by` promises that all of the call's bytes are there until this returns, and nobody
                // writes to them.
                let bytes = unsafe { std::slice::from_raw_parts(argument, length) };
                follow(ioctl, number, own.start as u64, bytes)
            }
        };
        Ok(0)
    })
    .map_err(|error| format!("{}: {error}", ioctl.name))?;
    result
}

/// Follows the addresses of a call whose memory is at `base`.
fn follow(ioctl: &'static Ioctl, number: u32, base: u64, bytes: &[u8]) -> Result<Seen, String> {
    let name = ioctl.name;
    let size = ioctl
        .accept(number)
        .map_err(|errno| format!("{name}: command {number:#x}: {errno}"))?;
    let mut memory = Memory {
        base,
        bytes,
        payload: bytes.get(..size.into()).unwrap_or_default().to_vec(),
    };
    let mut layout = Layout::default();
    lay_out(ioctl, size, &mut memory, &mut layout).map_err(|errno| {
        format!("{name}: an array that is not all in the call's memory: {errno}")
    })?;
    // Arrays that only come out were not gathered.
    for array in layout.arrays.iter().filter(|array| array.length > 0) {
        if memory.at(array.address, array.length).is_none() {
            return Err(format!(
                "{name}: {} bytes would be written to {:#x}, outside of the call's memory",
                array.length, array.address
            ));
        }
    }
    let mut payload = memory.payload;
    normalize(ioctl, &layout, &mut payload);
    Ok((number, payload))
}

/// Takes out what means something to one side only. What is taken out decides over no other field.
fn normalize(ioctl: &'static Ioctl, layout: &Layout, payload: &mut [u8]) {
    for (structure, range) in structs(ioctl, layout.argument, &layout.arrays) {
        let Some(bytes) = payload.get_mut(range) else {
            continue;
        };
        for field in structure.fields {
            let one_sided = matches!(
                field.kind(structure, bytes),
                Kind::Output | Kind::NewHandle(_) | Kind::Deadline | Kind::Fd(..)
            );
            if let (true, Some(bytes)) = (one_sided, bytes.get_mut(field.range())) {
                bytes.fill(0);
            }
        }
    }
    for array in &layout.arrays {
        let present = u64::from(array.length > 0) * PRESENT;
        if let Some(field) = payload.get_mut(array.field..array.field + 8) {
            field.copy_from_slice(&present.to_le_bytes());
        }
    }
}

/// What the proxy has copied of a request: everything that goes in must be there.
struct Copied<'a> {
    sent: &'a [u8],
    payload: Vec<u8>,
}

impl Payload for Copied<'_> {
    fn bytes(&self) -> &[u8] {
        &self.payload
    }

    fn gather(&mut self, _address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        let bytes = self.sent.get(offset..offset + length);
        self.payload.resize(offset, 0);
        self.payload.extend(bytes.ok_or(Errno::EINVAL)?);
        Ok(())
    }
}

/// The ioctl in the copy of a request, as the kernel must see it; `None` for other operations.
fn copied(families: &[&'static Family], request: &[u8]) -> Result<Option<Seen>, Errno> {
    let Ok((header, rest)) = RequestHeader::read_from_prefix(request) else {
        return Ok(None);
    };
    if header.operation.get() != Operation::Ioctl.number() {
        return Ok(None);
    }
    let (ioctl, sent) = IoctlRequest::read_from_prefix(rest).map_err(|_| Errno::EINVAL)?;
    let number = ioctl.command.get();
    let size = command::size(number);
    let argument = sent.get(..size.into()).ok_or(Errno::EINVAL)?;
    let mut payload = Copied {
        sent,
        payload: argument.to_vec(),
    };
    let mut layout = Layout::default();
    let ioctl = family::find(families, number)?;
    lay_out(ioctl, size, &mut payload, &mut layout)?;
    let mut payload = payload.payload;
    normalize(ioctl, &layout, &mut payload);
    Ok(Some((number, payload)))
}

/// How many requests of a trace there were, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Ioctls that the driver has performed.
    pub performed: usize,
    /// Requests that the proxy has refused.
    pub refused: usize,
}

/// Holds the calls that a driver has seen, all of which it answered with success, against the trace of the same
/// requests. The error names a call that is not what the proxy had copied, or a copy of more than `limit` bytes.
pub fn compare(
    families: &[&'static Family],
    seen: &[Seen],
    mut trace: &[u8],
    limit: usize,
) -> Result<Tally, String> {
    let mut tally = Tally::default();
    // Calls may be performed in another order than they are recorded in.
    let mut missing: BTreeMap<&Seen, usize> = BTreeMap::new();
    for call in seen {
        *missing.entry(call).or_default() += 1;
    }
    while !trace.is_empty() {
        let (record, length) =
            decode_trace(trace).map_err(|errno| format!("no trace record: {errno}"))?;
        trace = &trace[length..];
        if record.request.len() > limit {
            return Err(format!("a request of {} bytes", record.request.len()));
        }
        if record.result < 0 {
            tally.refused += 1;
            continue;
        }
        let copy = copied(families, record.request).map_err(|errno| {
            format!(
                "performed, but its copy is no ioctl ({errno}): {:x?}",
                record.request
            )
        })?;
        let Some(copy) = copy else { continue };
        match missing.get_mut(&copy).filter(|count| **count > 0) {
            Some(count) => *count -= 1,
            None => return Err(format!("the driver never saw {copy:x?}")),
        }
        tally.performed += 1;
    }
    match missing.iter().find(|(_, count)| **count > 0) {
        Some((call, _)) => Err(format!("the driver saw {call:x?}, which was never copied")),
        None => Ok(tally),
    }
}
