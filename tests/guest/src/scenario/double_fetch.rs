//! `scenario=doublefetch rounds=N`: sends the same submission again and again while a second processor changes its words, its
//! descriptors and the ring's index. What reaches the host driver is the host's to look at (`tests/e2e/src/double_fetch.rs`);
//! it is to be one whose ioctls are those of `virtio_gpu`, and which never waits.

use alloc::format;
use alloc::string::String;
use core::mem::offset_of;

use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family::core::{SYNCOBJ_CREATE, SyncobjCreate};
use pvgpu_protocol::family::virtio_gpu::{
    EXECBUFFER, Execbuffer, RESOURCE_CREATE, ResourceCreate, exec,
};
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use pvgpu_scenarios::submission::{COMMANDS, submission};
use zerocopy::IntoBytes;

use super::fuzz::arena::{AVAILABLE, Arena, REQUESTS, RESPONSES, TABLES, USED};
use crate::machine::Machine;
use crate::physical::Registers;
use crate::{clock, flips, println, ring0};

/// Bytes between two requests, and between two responses.
const SLOT: u64 = 1024;
/// Descriptors of the queue.
const QUEUE_SIZE: u64 = 128;
/// The slot of the submission; those before it say hello, open a file and make a buffer and a syncobj.
const SUBMISSION: u64 = 4;
/// How long the host may take for an answer.
const PATIENCE_NS: u64 = 10_000_000_000;

/// The registers that set a queue up (virtio 1.2, section 4.2.2), what goes in, in the order of section 3.1.1.
fn set_up(registers: Registers, arena: &Arena) {
    let [table, available, used] = [TABLES, AVAILABLE, USED].map(|part| arena.at(part) as u32);
    let steps: [(u64, u32); 18] = [
        (0x070, 0),
        (0x070, 1),
        (0x070, 3),
        (0x024, 0),
        (0x020, 0),
        (0x024, 1),
        (0x020, 1), // VERSION_1
        (0x070, 11),
        (0x030, 0),
        (0x038, QUEUE_SIZE as u32),
        (0x080, table),
        (0x084, 0),
        (0x090, available),
        (0x094, 0),
        (0x0a0, used),
        (0x0a4, 0),
        (0x044, 1),
        (0x070, 15),
    ];
    for (register, value) in steps {
        registers.write(register, value);
    }
}

struct Queue<'a> {
    registers: Registers,
    arena: &'a Arena,
    submitted: u16,
}

impl Queue<'_> {
    /// Writes a request and its two descriptors.
    fn write(&self, slot: u64, operation: Operation, object: u32, rest: &[u8]) {
        let header = RequestHeader::new(operation, object, slot);
        let request = [header.as_bytes(), rest].concat();
        self.arena.write(REQUESTS + slot * SLOT, &request);
        let parts = [
            (REQUESTS, request.len() as u32, 1, 2 * slot as u16 + 1),
            (RESPONSES, SLOT as u32, 2, 0),
        ];
        for (index, (area, length, flags, next)) in (2 * slot..).zip(parts) {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&self.arena.at(area + slot * SLOT).to_le_bytes());
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes[12..14].copy_from_slice(&u16::to_le_bytes(flags));
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            self.arena.write(TABLES + index * 16, &bytes);
        }
    }

    fn ioctl(&self, slot: u64, command: u32, payload: &[u8]) {
        let ioctl = IoctlRequest {
            command: command.into(),
            reserved: 0.into(),
        };
        let rest = [ioctl.as_bytes(), payload].concat();
        self.write(slot, Operation::Ioctl, 1, &rest);
    }

    /// Sends what is in a slot and waits until the chain comes back.
    fn send(&mut self, slot: u64) -> Result<(), String> {
        let place = AVAILABLE + 4 + u64::from(self.submitted) % QUEUE_SIZE * 2;
        self.arena.write(place, &(2 * slot as u16).to_le_bytes());
        self.submitted = self.submitted.wrapping_add(1);
        let index = self.submitted.to_le_bytes();
        self.arena.write(AVAILABLE + 2, &index);
        self.registers.write(0x050, 0);
        let start = clock::now_ns();
        while self.arena.half(USED + 2) != self.submitted {
            if clock::now_ns() - start > PATIENCE_NS {
                return Err(format!("request {} never came back", self.submitted));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}

/// Runs the scenario.
pub fn run(machine: &Machine) -> Result<(), String> {
    let rounds = machine.command_line.number("rounds").unwrap_or(2000);
    let device = machine.virtio_mmio.first().ok_or("no virtio-mmio device")?;
    let registers = Registers::new(device.address, device.size).ok_or("no registers")?;
    let arena = Arena::new().ok_or("no memory")?;
    set_up(registers, &arena);
    let mut queue = Queue {
        registers,
        arena: &arena,
        submitted: 0,
    };
    let hello = Hello::new("doublefetch");
    let mut bytes = [0; 64];
    let length = control::encode(&hello, &mut bytes).map_err(|errno| format!("hello: {errno}"))?;
    queue.write(0, Operation::Hello, 0, &bytes[..length]);
    queue.write(1, Operation::Open, 0, &[2, 0, 0, 0, 0, 0, 0, 0]);
    queue.ioctl(2, RESOURCE_CREATE, ResourceCreate::default().as_bytes());
    queue.ioctl(3, SYNCOBJ_CREATE, SyncobjCreate::default().as_bytes());
    for slot in 0..SUBMISSION {
        queue.send(slot)?;
    }

    queue.ioctl(SUBMISSION, EXECBUFFER, &submission());
    let request = arena.at(REQUESTS + SUBMISSION * SLOT);
    let argument = request + (size_of::<RequestHeader>() + size_of::<IoctlRequest>()) as u64;
    let commands = argument + size_of::<Execbuffer>() as u64;
    let chain = arena.at(TABLES + 2 * SUBMISSION * 16);
    let length = (commands - request) as u32 + COMMANDS as u32 + 8 + 16;
    let field = |offset: usize| argument + offset as u64;
    let words = [
        (request, u32::from(Operation::Ioctl.number()), 9),
        (request + 4, 1, 2),
        (argument - 8, EXECBUFFER, 0xc010_6443),
        (
            field(offset_of!(Execbuffer, flags)),
            exec::RING_IDX,
            0x8000_0004,
        ),
        (field(offset_of!(Execbuffer, size)), COMMANDS as u32, 40),
        (
            field(offset_of!(Execbuffer, num_bo_handles)),
            2,
            0x4000_0002,
        ),
        (field(offset_of!(Execbuffer, ring_idx)), 5, 6),
        (field(offset_of!(Execbuffer, syncobj_stride)), 16, 17),
        (field(offset_of!(Execbuffer, num_out_syncobjs)), 1, 1025),
        (commands, 0x1111_1111, 0x2222_2222),
        (commands + COMMANDS as u64, 1, 2_000_000),
        (commands + 40, 2, 4_000_000),
        (commands + 44, 0, 1),
        // The descriptor's address, length, and flags with next.
        (chain, request as u32, 0x8000_0000),
        (chain + 8, length, 0xffff_ffff),
        (chain + 8, length, 88),
        (
            chain + 12,
            (2 * SUBMISSION as u32 + 1) << 16 | 1,
            0x0008_0001,
        ),
        (chain + 12, (2 * SUBMISSION as u32 + 1) << 16 | 1, 0),
    ];
    for (address, good, bad) in words {
        if !flips::flip(address, good, bad) {
            return Err("too many words".into());
        }
    }
    ring0::start_second();
    let start = clock::now_ns();
    while flips::changes() == 0 {
        if clock::now_ns() - start > PATIENCE_NS {
            return Err("no second processor: give the VM two (--cpus 2)".into());
        }
        core::hint::spin_loop();
    }
    for _ in 0..rounds {
        queue.send(SUBMISSION)?;
    }
    println!(
        "doublefetch: {rounds} submissions, {} changes meanwhile",
        flips::changes()
    );
    Ok(())
}
