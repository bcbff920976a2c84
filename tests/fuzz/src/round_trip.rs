//! A program's memory through guest driver and host proxy to a host driver, and back.
//!
//! Input: which ioctl, how its argument is shaped, and the program's memory. What the host driver gets must be what lies in
//! that memory, and afterwards the memory must be what the driver has answered, where the schema says so and nowhere else.

use crate::answering::{Answered, Answering, DRIVERS};
use crate::decode::{LIMITS, prelude};
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_e2e::loopback::Loopback;
use pvgpu_guest_driver::marshal::Caller;
use pvgpu_guest_driver::session::{ObjectId, Session};
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::session::Session as Host;
use pvgpu_protocol::family::of_driver;
use pvgpu_protocol::schema::{
    Answer, Count, Descriptor, Direction, Element, Field, Ioctl, Kind, Struct, command,
};
use std::ops::Range;
use std::sync::Arc;

/// Address of the program's memory: low, so that few bytes make an address in it.
const BASE: u64 = 0x1000;
/// Bytes of it. The argument lies at its start.
const MEMORY: usize = 4096;

/// Runs one input.
pub fn run(bytes: &[u8]) {
    // Too few bytes are no input.
    let _ = round_trip(Unstructured::new(bytes));
}

/// The program that calls: its memory, and what was done to it.
struct Program {
    memory: Vec<u8>,
    written: Vec<Range<usize>>,
    /// Objects that it was given.
    given: Vec<i32>,
}

impl Program {
    fn range(&self, address: u64, length: usize) -> std::result::Result<Range<usize>, Errno> {
        let start = address.checked_sub(BASE).ok_or(Errno::EFAULT)?;
        let start = usize::try_from(start).map_err(|_| Errno::EFAULT)?;
        let end = start.checked_add(length).ok_or(Errno::EFAULT)?;
        match end <= self.memory.len() {
            true => Ok(start..end),
            false => Err(Errno::EFAULT),
        }
    }
}

impl Caller for Program {
    fn read(&self, address: u64, bytes: &mut [u8]) -> std::result::Result<(), Errno> {
        let range = self.range(address, bytes.len())?;
        bytes.copy_from_slice(&self.memory[range]);
        Ok(())
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> std::result::Result<(), Errno> {
        let range = self.range(address, bytes.len())?;
        self.memory[range.clone()].copy_from_slice(bytes);
        self.written.push(range);
        Ok(())
    }

    fn object(&self, fd: i32, _: Descriptor) -> std::result::Result<i32, Errno> {
        match fd {
            0..16 => Ok(fd),
            _ => Err(Errno::EBADF),
        }
    }

    fn fd(&mut self, object: i32, _: Descriptor, _: u32) -> std::result::Result<i32, Errno> {
        self.given.push(object);
        Ok(100 + object)
    }
}

fn round_trip(mut input: Unstructured<'_>) -> Result<()> {
    let name = *input.choose(&DRIVERS)?;
    let families = of_driver(name);
    let rows: Vec<_> = families.iter().flat_map(|family| family.ioctls).collect();
    let ioctl: &'static Ioctl = input.choose(&rows)?;
    let sizes = [&[ioctl.argument.size], ioctl.older_sizes].concat();
    let size = *input.choose(&sizes)?;
    let driver = Answering::new(name, u64::arbitrary(&mut input)?, LIMITS.message);
    let answers = driver.answers();
    let shaped = input.ratio(7, 8)?;
    let shape: [u8; 16] = input.arbitrary()?;

    let mut program = Program {
        memory: input.take_rest().to_vec(),
        written: Vec::new(),
        given: Vec::new(),
    };
    program.memory.resize(MEMORY, 0);
    let argument = usize::from(size);
    if shaped {
        shape_argument(ioctl.argument, &mut program.memory[..argument], &shape);
    }
    let before = program.memory.clone();

    let host = Host::new(Arc::new(driver), None, LIMITS);
    let mut guest = Session::connect(Loopback::new(host), "fuzz").expect("a hello");
    for request in &prelude(name)[1..] {
        guest.channel().raw(request, 4096);
    }
    answers.take();
    let command = command::with_size(ioctl.command, size);
    let result = guest.ioctl(ObjectId(1), command, BASE, &mut program);

    assert_eq!(
        guest.channel().slots_taken(),
        0,
        "a slot was not given back"
    );
    match answers.take() {
        Some(answered) => judge(ioctl, &before, &program, &answered, result.is_ok()),
        None if ioctl.answer == Answer::Identity => {}
        None => assert_eq!(program.memory, before, "rejected, but written to"),
    }
    Ok(())
}

/// Makes it likely that an argument is valid: pointers into the memory, few elements, handles that there are, and only flags
/// that there are.
fn shape_argument(structure: &Struct, bytes: &mut [u8], shape: &[u8; 16]) {
    for (field, shape) in structure.fields.iter().zip(shape.iter().cycle()) {
        let value = field.read(bytes);
        let shaped = match field.rules.iter().map(|rule| rule.kind).next_back() {
            _ if shape % 16 == 0 => continue,
            Some(Kind::Pointer(_)) if shape % 16 == 1 => 0,
            Some(Kind::Pointer(_)) => BASE + 128 + value % 2048,
            Some(Kind::Zero) => 0,
            Some(Kind::Flags(allowed)) => value & allowed,
            Some(Kind::OneOf(values)) if !values.is_empty() => {
                values[usize::from(*shape) % values.len()]
            }
            Some(Kind::Handle { .. } | Kind::OptionalHandle { .. } | Kind::ClosedHandle { .. }) => {
                1 + value % 16
            }
            Some(Kind::Deadline) => value % 1_000_000,
            _ if counts(structure, field) => value % 24,
            Some(Kind::Fd(..)) => value % 4,
            _ => continue,
        };
        if field.size <= 8 {
            field.write(bytes, shaped);
        }
    }
}

/// Whether a pointer of the struct has as many elements as that field says.
fn counts(structure: &Struct, field: &Field) -> bool {
    let rules = structure.fields.iter().flat_map(|field| field.rules);
    rules.into_iter().any(|rule| match rule.kind {
        Kind::Pointer(pointer) => pointer.count == Count::Field(field.offset),
        _ => false,
    })
}

/// Where something lies: in the call, and in the program's memory.
struct Place {
    structure: Option<&'static Struct>,
    call: Range<usize>,
    memory: Range<usize>,
    comes_out: bool,
}

/// Holds what the host driver got and what it answered against the program's memory.
fn judge(
    ioctl: &'static Ioctl,
    before: &[u8],
    program: &Program,
    answered: &Answered,
    succeeded: bool,
) {
    let mut places = vec![Place {
        structure: Some(ioctl.argument),
        call: 0..answered.argument,
        memory: 0..answered.argument,
        comes_out: ioctl.writes_back(),
    }];
    let mut complete = true;
    for (field, call, goes_in, comes_out, element) in &answered.arrays {
        if call.is_empty() {
            continue;
        }
        let structure = match element {
            Element::Struct(structure) => Some(*structure),
            _ => None,
        };
        // The pointer lies in the argument or in an array that is here already.
        let holder = places.iter().find(|place| place.call.contains(field));
        let holder = holder.expect("a pointer that was sent");
        let pointer = holder.memory.start + field - holder.call.start;
        let address = u64::from_le_bytes(before[pointer..pointer + 8].try_into().expect("8 bytes"));
        let memory = program.range(address, call.len());
        if *goes_in {
            assert!(memory.is_ok(), "gathered from where nothing is");
        }
        let Ok(memory) = memory else {
            complete = false;
            continue;
        };
        if *goes_in {
            let (sent, got) = (&before[memory.clone()], &answered.before[call.clone()]);
            judge_sent(structure, sent, got);
        }
        places.push(Place {
            structure,
            call: call.clone(),
            memory,
            comes_out: *comes_out,
        });
    }
    let argument = 0..answered.argument;
    judge_sent(
        Some(ioctl.argument),
        &before[argument.clone()],
        &answered.before[argument],
    );

    let mut expected = before.to_vec();
    let mut allowed = vec![false; before.len()];
    let mut overlapping = false;
    for place in places.iter().filter(|place| place.comes_out) {
        let answer = &answered.after[place.call.clone()];
        for (at, index) in place.memory.clone().zip(0..) {
            overlapping |= allowed[at];
            allowed[at] = true;
            expected[at] = answer[index];
        }
        let Some(structure) = place.structure else {
            continue;
        };
        let size = usize::from(structure.size).min(answer.len()).max(1);
        for (element, start) in answer.chunks(size).zip(place.memory.clone().step_by(size)) {
            for field in structure.fields {
                let range = field.range();
                if range.end > element.len() {
                    continue;
                }
                let range = start + range.start..start + range.end;
                match field.kind(structure, element) {
                    Kind::Pointer(_) | Kind::Deadline | Kind::Fd(Direction::In, ..) => {
                        expected[range.clone()].copy_from_slice(&before[range]);
                    }
                    Kind::Fd(..) => {
                        let written = &program.memory[range.clone()];
                        let fd = i32::from_le_bytes(written.try_into().expect("32 bits"));
                        if succeeded && !overlapping {
                            let given = program.given.contains(&(fd - 100));
                            assert!(fd == -1 || given, "{fd} is no new descriptor");
                        }
                        expected[range.clone()].copy_from_slice(written);
                    }
                    _ => {}
                }
            }
        }
    }
    for range in &program.written {
        assert!(
            range.clone().all(|at| allowed[at]),
            "{}: written where nothing comes out",
            ioctl.name
        );
    }
    // Where arrays lie on top of each other, the last one wins; where one cannot be written, the rest stays as it was.
    if complete && !overlapping {
        assert!(
            program.memory == expected,
            "{}: not what the host answered",
            ioctl.name
        );
    }
}

/// Holds what the host driver got of an array or the argument against what the program had there.
fn judge_sent(structure: Option<&'static Struct>, sent: &[u8], got: &[u8]) {
    let Some(structure) = structure else {
        return assert!(sent == got, "an array has changed on its way");
    };
    let size = usize::from(structure.size).min(sent.len()).max(1);
    for (sent, got) in sent.chunks(size).zip(got.chunks(size)) {
        for field in structure.fields {
            let range = field.range();
            if range.end > got.len() {
                continue;
            }
            match field.kind(structure, got) {
                Kind::Output | Kind::NewHandle(_) | Kind::Deadline | Kind::Fd(..) => {}
                Kind::Pointer(_) => {
                    let present = (field.read(sent) != 0, field.read(got) != 0);
                    assert_eq!(present.0, present.1, "a pointer is lost");
                    assert!(field.read(got) <= 1, "an address has crossed");
                }
                _ => assert!(
                    sent[range.clone()] == got[range],
                    "{}.{} has changed on its way",
                    structure.name,
                    field.name
                ),
            }
        }
    }
}
