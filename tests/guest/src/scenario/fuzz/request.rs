//! Requests that are nearly right: an operation's header and body, an ioctl's argument as its schema has it, and now and then
//! something wrong in them. No ioctl is named here.

use alloc::vec::Vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family;
use pvgpu_protocol::layout::{Layout, Payload, lay_out};
use pvgpu_protocol::schema::{Count, Ioctl, Kind, Struct};
use pvgpu_protocol::wire::{Operation, RequestHeader};
use zerocopy::IntoBytes;

use super::random::Random;

/// Longest request.
pub const MAX: usize = 1024;

/// A request whose id is `id`. The first ones of a case say hello, open a file and make handles, as many others need it.
pub fn generate(random: &mut Random, id: u64) -> Vec<u8> {
    let operation = match id {
        0 if random.percent(97) => Operation::Hello.number(),
        1 if random.percent(97) => Operation::Open.number(),
        2..4 => Operation::Ioctl.number(),
        _ => match random.below(16) {
            0..9 => Operation::Ioctl.number(),
            9 => random.word() as u16,
            _ => random.below(13) as u16,
        },
    };
    let flags = if random.percent(1) {
        random.word() as u16
    } else {
        0
    };
    let object = if random.percent(96) { 1 } else { random.word() };
    let header = RequestHeader {
        operation: operation.into(),
        flags: flags.into(),
        object: object.into(),
        id: (if random.percent(95) { id } else { 0 }).into(),
    };
    let mut request = header.as_bytes().to_vec();
    body(random, Operation::from_number(operation), id, &mut request);
    if random.percent(if id < 4 { 1 } else { 5 }) {
        damage(random, &mut request);
    }
    request.truncate(MAX);
    request
}

fn put(request: &mut Vec<u8>, words: &[u32]) {
    words
        .iter()
        .for_each(|word| request.extend(word.to_le_bytes()));
}

fn body(random: &mut Random, operation: Option<Operation>, id: u64, request: &mut Vec<u8>) {
    let pages = |random: &mut Random| random.one_of(&[0, 0x1000, 0x1000, 0x2000, 0x3000, 0x800]);
    match operation {
        Some(Operation::Hello) => {
            let hello = Hello {
                version_min: if random.percent(98) { 1 } else { 2 },
                version_max: random.one_of(&[1, 1, 2, 0xffff]),
                features: 0,
                guest: "fuzz",
            };
            let mut bytes = [0; 64];
            if let Ok(length) = control::encode(&hello, &mut bytes) {
                request.extend(&bytes[..length]);
            }
        }
        Some(Operation::Open) => put(request, &[random.one_of(&[2, 2, 2, 2, 0o4002, 0, 1]), 0]),
        Some(Operation::Ioctl) => ioctl(random, (2..4).contains(&id), request),
        Some(Operation::Map) => {
            let words = [
                pages(random),
                random.one_of(&[0, 0, 1, 2]),
                pages(random),
                0,
                3,
                0,
            ];
            put(request, &words);
        }
        Some(Operation::MapPages) => {
            // Addresses at which there is no memory: this guest's own must not be overwritten.
            const NOWHERE: u32 = 0x7fff;
            let length = pages(random);
            let words = [
                pages(random),
                0,
                length,
                0,
                3,
                random.one_of(&[1, 1, 1, 0, 2]),
            ];
            put(request, &words);
            put(request, &[pages(random), NOWHERE, length, 0]);
        }
        Some(Operation::Unmap) => {
            let words = [pages(random), 0, pages(random), 0];
            put(request, &words);
        }
        Some(Operation::Poll) => {
            // Waits are short, for ever, or none.
            let timeout = random.one_of(&[[0, 0], [0x1_0000, 0], [u32::MAX, u32::MAX]]);
            put(
                request,
                &[random.one_of(&[1, 4, 0xffff]), 0, timeout[0], timeout[1]],
            );
        }
        Some(Operation::Read) => put(request, &[random.word(), 0]),
        Some(Operation::Watch) => put(request, &[random.one_of(&[1, 4]), 0]),
        Some(Operation::Cancel) => put(request, &[random.word() % 32, 0]),
        Some(Operation::Close | Operation::Nop | Operation::Size) => {}
        None => (0..random.below(8)).for_each(|_| put(request, &[random.word()])),
    }
}

/// An argument that is being made up, and all that its pointers reach.
struct MadeUp<'a> {
    random: &'a mut Random,
    bytes: Vec<u8>,
}

impl Payload for MadeUp<'_> {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn gather(&mut self, _address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        if offset + length > MAX {
            return Err(Errno::E2BIG);
        }
        self.bytes.resize(offset, 0);
        while self.bytes.len() < offset + length {
            let word = self.random.word().to_le_bytes();
            self.bytes.extend(word);
        }
        self.bytes.truncate(offset + length);
        Ok(())
    }
}

/// An ioctl; one that makes handles if `creates`.
fn ioctl(random: &mut Random, creates: bool, request: &mut Vec<u8>) {
    let families = match random.below(20) {
        0 => family::of_driver("virtio_gpu"),
        _ => family::of_driver("soft"),
    };
    // The driver's own family is half of all.
    let family = random.one_of(families);
    let wanted = |ioctl: &&Ioctl| {
        let mut kinds = ioctl.argument.fields.iter().flat_map(|field| field.rules);
        !creates || kinds.any(|rule| matches!(rule.kind, Kind::NewHandle(_)))
    };
    let candidates: Vec<&Ioctl> = family.ioctls.iter().filter(wanted).collect();
    let ioctl = candidates[random.below(candidates.len())];
    let command = match random.percent(97) {
        true => ioctl.command,
        false => ioctl.command ^ 1 << random.below(32),
    };
    put(request, &[command, 0]);
    let mut made_up = MadeUp {
        bytes: argument(random, ioctl.argument),
        random,
    };
    // An argument with counts that nobody takes is sent as far as it goes.
    let _ = lay_out(
        ioctl,
        ioctl.argument.size,
        &mut made_up,
        &mut Layout::default(),
    );
    request.extend(&made_up.bytes);
}

/// Whether the field at that offset says how long an array is.
fn counts(structure: &'static Struct, offset: u16) -> bool {
    let mut rules = structure.fields.iter().flat_map(|field| field.rules);
    rules.any(|rule| match rule.kind {
        Kind::Pointer(pointer) => pointer.count == Count::Field(offset),
        _ => false,
    })
}

/// The bytes of a struct.
fn argument(random: &mut Random, structure: &'static Struct) -> Vec<u8> {
    let mut bytes = alloc::vec![0; structure.size.into()];
    for field in structure.fields {
        let value = match *field.kind(structure, &bytes) {
            _ if random.percent(2) => u64::from(random.word()),
            Kind::Zero | Kind::Output | Kind::NewHandle(_) => 0,
            Kind::Flags(allowed) => random.next() & random.next() & allowed,
            Kind::OneOf(values) => random.one_of(values),
            Kind::Pointer(_) => u64::from(random.percent(90)),
            Kind::Handle { .. } | Kind::ClosedHandle { .. } | Kind::OptionalHandle { .. } => {
                random.one_of(&[1, 1, 1, 2, 3, 0])
            }
            Kind::Fd(..) => random.one_of(&[2, 3, 4, 1, u64::MAX]),
            Kind::Deadline => random.one_of(&[0, 0x1_0000, u64::MAX >> 1]),
            Kind::Value if counts(structure, field.offset) => random.below(4) as u64,
            Kind::Value => u64::from(random.word()),
        };
        field.write(&mut bytes, value);
    }
    bytes
}

/// Makes something wrong.
fn damage(random: &mut Random, request: &mut Vec<u8>) {
    let place = random.below(request.len().max(1));
    match random.below(4) {
        0 => request.truncate(place),
        1 => request.extend([0; 8]),
        2 => put(request, &[random.word(); 4]),
        // The upper half of a word decides over what it is as an address: only lower halves are damaged.
        _ => {
            if let Some(byte) = request.get_mut(place / 4 * 4) {
                *byte ^= 1 << random.below(8);
            }
        }
    }
}
