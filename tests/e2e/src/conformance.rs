//! Whether a call that has reached a host driver is what its schema allows: an oracle beside the proxy's own validation.
//!
//! For host drivers of tests and fuzz targets, which call [`violations`] first thing in their `ioctl`. It reads the schema and
//! the call's bytes, and shares no code with what it judges (`protocol/src/layout.rs`, `host-proxy/src/call.rs`): it must
//! never ask them for an answer.

use pvgpu_host_proxy::call::Call;
use pvgpu_protocol::schema::{Count, Element, Field, Kind, Space, Struct, command};
use std::ops::Range;

/// A struct that goes to the host driver, and where its bytes lie in the call.
pub type Placed = (&'static Struct, Range<usize>);

/// What the schema does not allow in a call that is about to be performed, a line each; none in all that a proxy may hand to a
/// driver. `owns` says which handles the file has; `limit` is the session's on messages.
pub fn violations(call: &mut Call, limit: usize, owns: &dyn Fn(Space, u32) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let ioctl = call.ioctl();
    let argument = call.argument().len();
    let sizes = [&[ioctl.argument.size], ioctl.older_sizes].concat();
    if !sizes.iter().any(|size| usize::from(*size) == argument)
        || usize::from(command::size(call.command())) != argument
        || command::with_size(call.command(), ioctl.argument.size) != ioctl.command
    {
        found.push(format!(
            "{:#x} with {argument} bytes is no form of it",
            call.command()
        ));
    }
    let bytes = call.bytes_mut().to_vec();
    if !call.bytes_mut().as_ptr().addr().is_multiple_of(8) {
        found.push("its bytes are not aligned".into());
    }
    if bytes.len() > limit {
        found.push(format!("{} bytes exceed the limit {limit}", bytes.len()));
    }
    found.extend(misplaced(call, &bytes, argument));
    let structs = structs(call);
    let mut arrays = 0;
    for (structure, range) in &structs {
        let inside = bytes.get(range.clone()).unwrap_or_default();
        for field in structure.fields {
            let place = range.start + usize::from(field.offset);
            let fault = match field.kind(structure, inside) {
                Kind::Pointer(_) if field.range().end > inside.len() => None,
                Kind::Pointer(_) => {
                    arrays += 1;
                    pointer_fault(call, structure, field, inside, place)
                }
                Kind::Fd(direction, ..) => {
                    let mut fds = call.fds().filter(|(at, _)| *at == place);
                    match (fds.next(), fds.next()) {
                        (Some((_, object)), None) if object.is_some() == direction.is_in() => None,
                        _ => Some("its object is not there, or there without reason"),
                    }
                    .or((field.read(inside) != u64::from(u32::MAX))
                        .then_some("holds a number that is no descriptor of the proxy"))
                }
                kind => field_fault(kind, field, inside, owns),
            };
            if let Some(fault) = fault {
                let value = field.read(inside);
                found.push(format!(
                    "{}.{} = {value:#x}: {fault}",
                    structure.name, field.name
                ));
            }
        }
    }
    if arrays != call.arrays().count() {
        found.push("it has arrays that no pointer field reaches".into());
    }
    for (array, range) in call.arrays() {
        let content = bytes.get(range).unwrap_or_default();
        if !array.pointer.direction.is_in() && content.iter().any(|byte| *byte != 0) {
            found.push("an array that only comes out is not zero".into());
        }
        if let Element::Handles { space, .. } = array.pointer.element {
            for handle in content.as_chunks().0 {
                let handle = u32::from_le_bytes(*handle);
                if !owns(space, handle) {
                    found.push(format!(
                        "{space:?} handle {handle} in an array is not owned"
                    ));
                }
            }
        }
    }
    found
        .iter()
        .map(|line| format!("{}: {line}", ioctl.name))
        .collect()
}

/// What of a call differs from the payload that the guest has sent, though the schema passes it on as it came, a line each.
pub fn differences(call: &mut Call, payload: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let bytes = call.bytes_mut().to_vec();
    for (structure, range) in structs(call) {
        let inside = bytes.get(range.clone()).unwrap_or_default();
        for field in structure.fields {
            let copied = match field.kind(structure, inside) {
                Kind::Output | Kind::NewHandle(_) | Kind::Deadline => false,
                Kind::Pointer(_) | Kind::Fd(..) => false,
                _ => field.range().end <= inside.len(),
            };
            let place = range.start + usize::from(field.offset);
            let place = place..place + usize::from(field.size);
            if copied && bytes.get(place.clone()) != payload.get(place) {
                found.push(format!("{}.{} has changed", structure.name, field.name));
            }
        }
    }
    for (array, range) in call.arrays() {
        let structs = matches!(array.pointer.element, Element::Struct(_));
        if array.pointer.direction.is_in()
            && !structs
            && bytes.get(range.clone()) != payload.get(range)
        {
            found.push("the bytes of an array have changed".into());
        }
    }
    found
}

/// Arrays that do not lie in the call, or on top of each other.
fn misplaced(call: &Call, bytes: &[u8], argument: usize) -> Vec<String> {
    let mut ranges: Vec<_> = call.arrays().map(|(_, range)| range).collect();
    ranges.push(0..argument);
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut found = Vec::new();
    if ranges.iter().any(|range| range.end > bytes.len()) {
        found.push("an array ends outside of its bytes".into());
    }
    if ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
        found.push("two arrays overlap".into());
    }
    found
}

/// Every struct that the guest has sent: the argument, then the elements of arrays.
pub fn structs(call: &Call) -> Vec<Placed> {
    let mut structs = vec![(call.ioctl().argument, 0..call.argument().len())];
    for (array, range) in call.arrays() {
        if let Element::Struct(structure) = array.pointer.element
            && array.pointer.direction.is_in()
        {
            let size = usize::from(structure.size).max(1);
            let starts = range.step_by(size);
            structs.extend(starts.map(|start| (structure, start..start + size)));
        }
    }
    structs
}

/// What is wrong with a field of plain data.
fn field_fault(
    kind: &Kind,
    field: &Field,
    bytes: &[u8],
    owns: &dyn Fn(Space, u32) -> bool,
) -> Option<&'static str> {
    let value = field.read(bytes);
    let zero = bytes
        .get(field.range())
        .is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0));
    let owned = |space| u32::try_from(value).is_ok_and(|handle| owns(space, handle));
    let fault = |allowed: bool, what| (!allowed).then_some(what);
    match *kind {
        Kind::Value | Kind::Pointer(_) | Kind::Fd(..) => None,
        Kind::Output | Kind::NewHandle(_) => fault(zero, "the guest's bytes are there"),
        Kind::Zero => fault(zero, "is not zero"),
        Kind::Flags(allowed) => fault(value & !allowed == 0, "has a bit that is not allowed"),
        Kind::OneOf(values) => fault(values.contains(&value), "is none of the allowed values"),
        Kind::OptionalHandle { space, .. } => {
            fault(value == 0 || owned(space), "is not a handle of this file")
        }
        Kind::Handle { space, .. } | Kind::ClosedHandle { space, .. } => {
            fault(owned(space), "is not a handle of this file")
        }
        Kind::Deadline => fault(value.cast_signed() >= 0, "is no time of the host's clock"),
    }
}

/// What is wrong with an array that the pointer field at `place` of the call should reach.
fn pointer_fault(
    call: &Call,
    structure: &'static Struct,
    field: &'static Field,
    bytes: &[u8],
    place: usize,
) -> Option<&'static str> {
    let Kind::Pointer(pointer) = field.kind(structure, bytes) else {
        return None;
    };
    let mut reached = call.arrays().filter(|(array, _)| array.field == place);
    let Some((array, range)) = reached.next() else {
        return Some("reaches no array");
    };
    if reached.next().is_some() {
        return Some("reaches two arrays");
    }
    let count = match pointer.count {
        Count::Fixed(count) => count.into(),
        Count::Field(offset) => structure.read(bytes, offset),
    };
    let null = field.read(bytes) == 0;
    let length = if null { 0 } else { count };
    let length = length.saturating_mul(pointer.element.size().into());
    if count > u64::from(pointer.max) {
        Some("has more elements than the schema allows")
    } else if null && count > 0 && !pointer.nullable {
        Some("may not be null")
    } else if array.pointer != pointer || u64::try_from(range.len()) != Ok(length) {
        Some("reaches another array than the schema says")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvgpu_host_proxy::Errno;
    use pvgpu_host_proxy::call::Owned;
    use pvgpu_host_proxy::driver::HostObject;
    use pvgpu_protocol::family::{find, of_driver, virtio_gpu};
    use std::sync::Arc;
    use zerocopy::IntoBytes;

    /// A file with every handle below 10.
    struct File;

    impl Owned for File {
        fn owns(&self, _: Space, handle: u32) -> bool {
            handle < 10
        }

        fn object(&self, _: i32) -> Result<Arc<dyn HostObject>, Errno> {
            Err(Errno::EBADF)
        }
    }

    /// A valid submission of 8 bytes that names handles 1 and 2.
    fn submission() -> (Call, Vec<u8>) {
        let argument = virtio_gpu::Execbuffer {
            size: 8,
            command: 1,
            bo_handles: 1,
            num_bo_handles: 2,
            ..Default::default()
        };
        let mut payload = argument.as_bytes().to_vec();
        payload.extend([7; 8]);
        payload.extend([1, 0, 0, 0, 2, 0, 0, 0]);
        let command = virtio_gpu::EXECBUFFER;
        let ioctl = find(of_driver("virtio_gpu"), command).unwrap();
        let call = Call::new(ioctl, command, &payload, &File, 4096).unwrap();
        (call, payload)
    }

    fn faults(call: &mut Call, highest: u32) -> String {
        violations(call, 4096, &|_, handle| handle <= highest).join("\n")
    }

    #[test]
    fn a_valid_call_is_as_it_was_sent_and_conforms() {
        let (mut call, payload) = submission();
        assert_eq!(faults(&mut call, 9), "");
        assert_eq!(differences(&mut call, &payload), Vec::<String>::new());
    }

    #[test]
    fn a_handle_of_another_file_is_noticed() {
        let (mut call, _) = submission();
        assert!(faults(&mut call, 1).contains("handle 2 in an array is not owned"));
    }

    #[test]
    fn a_call_that_changed_after_validation_is_noticed() {
        let (mut call, payload) = submission();
        call.bytes_mut()[0] = 0x80; // a flag that the schema does not have
        call.bytes_mut()[4] = 16; // twice the bytes
        let found = faults(&mut call, 9);
        assert!(found.contains("flags = 0x80: has a bit"), "{found}");
        assert!(found.contains("command = 0x1: reaches another"), "{found}");
        assert_eq!(differences(&mut call, &payload).len(), 2);
        let end = call.bytes_mut().len() - 9;
        call.bytes_mut()[end] ^= 1;
        let changed = differences(&mut call, &payload).join("\n");
        assert!(changed.contains("the bytes of an array"), "{changed}");
    }
}
