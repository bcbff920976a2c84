//! A guest that changes its requests, descriptors and ring while the proxy reads them, from a second thread: what reaches
//! the host driver is what was copied once and checked, and never an address of the guest's.
//!
//! The same with a second vCPU is in `vm.rs` and in the testbed.

use pvgpu_e2e::inspection::{Tally, compare};
use pvgpu_e2e::recording::{Record, Recording};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::device::{Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family::core::{self, SyncobjCreate};
use pvgpu_protocol::family::virtio_gpu::{self, Execbuffer, ResourceCreate, exec};
use pvgpu_protocol::wire::{IoctlRequest, OpenRequest, Operation, RequestHeader};
use pvgpu_scenarios::submission::{COMMANDS, submission};
use std::fs;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use zerocopy::IntoBytes;

const MEMORY: usize = 1 << 20;
/// The parts of the queue (virtio 1.2 section 2.7); [`QUEUE_SIZE`] descriptors.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const QUEUE_SIZE: u16 = 128;
/// Requests lie here, [`SLOT`] bytes each, each with its response in the second half.
const REQUESTS: u64 = 0x4_0000;
const SLOT: u64 = 0x400;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Longest message.
const LIMIT: u32 = 1024;
/// Calls that must get through, and requests that must be refused, before a test believes that it has raced.
const ENOUGH: usize = 200;
/// Times that a chain must have been read by then: a moment between two reads is short.
const ROUNDS: usize = 20_000;
/// Rings that must have been broken by then; each takes a session.
const ENOUGH_RINGS: usize = 50;
/// Longest a test may take to get there.
const PATIENCE: Duration = Duration::from_secs(60);

struct Line;

impl Interrupt for Line {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
}

/// A device on memory that others write to, in front of a driver that inspects.
struct Machine {
    device: Device,
    driver: Arc<Recording>,
    record: Arc<Record>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    trace: NamedTempFile,
    /// Chains made available in this session.
    submitted: u16,
}

impl Machine {
    fn new(doorbell: Doorbell) -> Self {
        let driver = Arc::new(Recording::inspecting());
        let trace = NamedTempFile::new().unwrap();
        let config = DeviceConfig {
            queue_size: QUEUE_SIZE,
            doorbell,
            limits: Limits {
                message: LIMIT,
                ..Limits::default()
            },
            trace: Some(trace.reopen().unwrap()),
            ..DeviceConfig::default()
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap().addr();
        driver.record().forbid(host..host + MEMORY);
        Self {
            device: Device::new(Arc::clone(&driver) as _, None, config).unwrap(),
            record: driver.record(),
            driver,
            memory: GuestMemoryAtomic::new(memory),
            trace,
            submitted: 0,
        }
    }

    /// Resets the device and starts a session: its rings are empty, and no chain is made.
    fn activate(&mut self) {
        self.device.reset();
        let zeros = [0; 0x3000];
        let memory = self.memory.memory();
        memory.write_slice(&zeros, GuestAddress(0)).unwrap();
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        let place = GuestAddress;
        queue
            .try_set_desc_table_address(place(DESCRIPTORS))
            .unwrap();
        queue.try_set_avail_ring_address(place(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(place(USED)).unwrap();
        queue.set_ready(true);
        let queues = vec![queue, Queue::new(QUEUE_SIZE).unwrap()];
        self.device
            .activate(self.memory.clone(), 1 << 32, queues, Arc::new(Line))
            .unwrap();
        self.submitted = 0;
    }

    /// Writes a request into that slot and its chain into the descriptors of that number; nothing is made available.
    fn write(&self, slot: u16, operation: Operation, object: u32, rest: &[u8]) {
        let length = self.write_request(slot, operation, object, rest);
        let place = request_at(slot);
        for (index, address, length, flags, next) in [
            (2 * slot, place, length, NEXT, 2 * slot + 1),
            (2 * slot + 1, place + SLOT / 2, 0x200, WRITE, 0),
        ] {
            let descriptor = descriptor_at(index);
            self.store(descriptor, 8, address);
            self.store(descriptor + 8, 4, length);
            self.store(descriptor + 12, 2, flags.into());
            self.store(descriptor + 14, 2, next.into());
        }
    }

    /// Writes a request into that slot and returns its length.
    fn write_request(&self, slot: u16, operation: Operation, object: u32, rest: &[u8]) -> u64 {
        let header = RequestHeader::new(operation, object, slot.into());
        let request = [header.as_bytes(), rest].concat();
        let memory = self.memory.memory();
        let place = GuestAddress(request_at(slot));
        memory.write_slice(&request, place).unwrap();
        request.len() as u64
    }

    fn ioctl(&self, slot: u16, number: u32, payload: &[u8]) {
        self.write(slot, Operation::Ioctl, 1, &body(number, payload));
    }

    /// The requests that come before any race: slot 0 says hello, 1 opens object 1, 2 and 3 make handles.
    fn prepare(&self) {
        let hello = Hello::new("test");
        let mut bytes = [0; 64];
        let length = control::encode(&hello, &mut bytes).unwrap();
        self.write(0, Operation::Hello, 0, &bytes[..length]);
        let open = OpenRequest {
            flags: 2.into(),
            reserved: 0.into(),
        };
        self.write(1, Operation::Open, 0, open.as_bytes());
        let create = ResourceCreate::default();
        self.ioctl(2, virtio_gpu::RESOURCE_CREATE, create.as_bytes());
        let create = SyncobjCreate::default();
        self.ioctl(3, core::SYNCOBJ_CREATE, create.as_bytes());
    }

    /// A new session in which the guest owns buffer 1 and syncobj 2.
    fn start(&mut self) {
        self.activate();
        self.prepare();
        for slot in 0..4 {
            self.submit(slot);
            self.wait();
        }
    }

    /// Makes a slot's chain available and rings the doorbell.
    fn submit(&mut self, slot: u16) {
        let place = AVAILABLE + 4 + u64::from(self.submitted % QUEUE_SIZE) * 2;
        self.store(place, 2, u64::from(2 * slot));
        self.submitted = self.submitted.wrapping_add(1);
        self.store(AVAILABLE + 2, 2, self.submitted.into());
        self.device.notify(0);
    }

    /// Waits until all chains have been returned.
    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.used() != self.submitted {
            assert!(
                Instant::now() < deadline,
                "{} of {} chains were returned",
                self.used(),
                self.submitted
            );
            std::thread::yield_now();
        }
    }

    fn used(&self) -> u16 {
        let memory = self.memory.memory();
        memory
            .load(GuestAddress(USED + 2), Ordering::SeqCst)
            .unwrap()
    }

    fn store(&self, address: u64, width: u8, value: u64) {
        store(&self.memory, address, width, value);
    }

    /// Runs rounds while another thread flips words, at least so many, until enough was performed and so much was refused.
    fn race(
        &mut self,
        flips: &[Flip],
        (least, enough): (usize, usize),
        refused: impl Fn(&Machine) -> usize,
        mut round: impl FnMut(&mut Machine),
    ) {
        let stop = AtomicBool::new(false);
        let memory = self.memory.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| flip(&memory, flips, &stop));
            let deadline = Instant::now() + PATIENCE;
            let in_time = || Instant::now() < deadline;
            let mut rounds = 0;
            while in_time()
                && (rounds < least || refused(self) < enough || self.record.seen() < ENOUGH)
            {
                (0..10).for_each(|_| round(self));
                rounds += 10;
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    /// What the driver has seen is what was copied, and there was enough of it. Ends the device.
    fn verdict(self) -> Tally {
        let inspected = self.record.inspected();
        assert_eq!(
            inspected.violation, None,
            "a call that must not have reached the driver"
        );
        let families = self.driver.families();
        drop(self.device);
        let trace = fs::read(self.trace.path()).unwrap();
        let tally = compare(families, &inspected.seen, &trace, LIMIT as usize).unwrap();
        assert!(tally.performed >= ENOUGH, "no race: {tally:?}");
        tally
    }
}

fn store(memory: &GuestMemoryAtomic<GuestMemoryMmap>, address: u64, width: u8, value: u64) {
    let memory = memory.memory();
    let address = GuestAddress(address);
    let stored = match width {
        2 => memory.store(value as u16, address, Ordering::SeqCst),
        4 => memory.store(value as u32, address, Ordering::SeqCst),
        _ => memory.store(value, address, Ordering::SeqCst),
    };
    stored.unwrap();
}

/// The body of an ioctl.
fn body(number: u32, payload: &[u8]) -> Vec<u8> {
    let ioctl = IoctlRequest {
        command: number.into(),
        reserved: 0.into(),
    };
    [ioctl.as_bytes(), payload].concat()
}

fn descriptor_at(index: u16) -> u64 {
    DESCRIPTORS + u64::from(index) * 16
}

fn request_at(slot: u16) -> u64 {
    REQUESTS + u64::from(slot) * SLOT
}

/// A word of guest memory that is one thing now and another in a moment.
struct Flip {
    address: u64,
    width: u8,
    /// What it is in between.
    good: u64,
    others: &'static [u64],
}

/// Changes one word after the other to something else for a moment, until it is told to stop: all are good then.
fn flip(memory: &GuestMemoryAtomic<GuestMemoryMmap>, flips: &[Flip], stop: &AtomicBool) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    while !stop.load(Ordering::Relaxed) {
        // Marsaglia's xorshift.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let flip = &flips[(random >> 32) as usize % flips.len()];
        let other = flip.others[(random >> 16) as usize % flip.others.len()];
        store(memory, flip.address, flip.width, other);
        (0..random % 64).for_each(|_| std::hint::spin_loop());
        store(memory, flip.address, flip.width, flip.good);
        (0..random % 64).for_each(|_| std::hint::spin_loop());
    }
}

/// Words of the request with [`submission`] in that slot.
fn flips_of_the_request(slot: u16) -> Vec<Flip> {
    let request = request_at(slot);
    let body = request + size_of::<RequestHeader>() as u64;
    let argument = body + size_of::<IoctlRequest>() as u64;
    let commands = argument + size_of::<Execbuffer>() as u64;
    let handles = commands + COMMANDS as u64;
    let point = handles + 8;
    let word = |address, good: u32, others| Flip {
        address,
        width: 4,
        good: good.into(),
        others,
    };
    macro_rules! field {
        ($field:ident) => {
            argument + offset_of!(Execbuffer, $field) as u64
        };
    }
    vec![
        word(
            request,
            Operation::Ioctl.number().into(),
            &[9, 1, 0xffff, 0x1_0003],
        ),
        word(request + 4, 1, &[0, 2, u32::MAX as u64]),
        word(
            body,
            virtio_gpu::EXECBUFFER,
            &[0xc010_6443, 0xc020_6442, 0xffff_ffff],
        ),
        word(body + 4, 0, &[1]),
        word(field!(flags), exec::RING_IDX, &[0x80, 0x8000_0004, 3, 0, 2]),
        word(field!(size), COMMANDS as u32, &[0, 8, 24, 40, 0xffff_ffe0]),
        word(field!(command), 1, &[0]),
        word(field!(bo_handles), 1, &[0, 0x4_0000]),
        word(field!(num_bo_handles), 2, &[0, 1, 3, 4, 0x4000_0002]),
        word(field!(ring_idx), 5, &[6, 7]),
        word(field!(syncobj_stride), 16, &[8, 17, 0]),
        word(field!(num_in_syncobjs), 0, &[1, 0x8000_0000]),
        word(field!(num_out_syncobjs), 1, &[0, 2, 1025]),
        word(field!(out_syncobjs), 1, &[0, 2]),
        word(commands, 0x1111_1111, &[0x2222_2222, 0x3333_3333]),
        word(commands + 28, 0x1111_1111, &[0x2222_2222, 0x3333_3333]),
        word(handles, 1, &[0, 2_000_000, u32::MAX as u64]),
        word(handles + 4, 1, &[0, 3_000_000]),
        word(point, 2, &[0, 4_000_000]),
        word(point + 4, 0, &[1, 0x8000_0000]),
        word(point + 8, 7, &[8, 9]),
    ]
}

const SLOT_OF_THE_RACE: u16 = 4;

#[test]
fn a_request_that_changes_while_it_is_read_reaches_the_driver_as_it_was_checked() {
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        let mut machine = Machine::new(doorbell);
        machine.start();
        machine.ioctl(SLOT_OF_THE_RACE, virtio_gpu::EXECBUFFER, &submission());
        let refused = |machine: &Machine| machine.device.statistics().rejected as usize;
        machine.race(
            &flips_of_the_request(SLOT_OF_THE_RACE),
            (ROUNDS, ENOUGH),
            refused,
            |machine| {
                machine.submit(SLOT_OF_THE_RACE);
                machine.wait();
            },
        );
        let rejected = refused(&machine);
        let tally = machine.verdict();
        assert!(
            tally.refused >= rejected && rejected >= ENOUGH,
            "no race: {tally:?}"
        );
    }
}

#[test]
fn descriptors_that_change_while_they_are_read_give_a_whole_request_or_none() {
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        let mut machine = Machine::new(doorbell);
        machine.start();
        let sent = body(virtio_gpu::EXECBUFFER, &submission());
        let write = |machine: &Machine| {
            let (slot, operation) = (SLOT_OF_THE_RACE, Operation::Ioctl);
            machine.write_request(slot, operation, 1, &sent)
        };
        machine.ioctl(SLOT_OF_THE_RACE, virtio_gpu::EXECBUFFER, &submission());
        let request = request_at(SLOT_OF_THE_RACE);
        let length = write(&machine);
        let [first, second] = [0, 1].map(|part| descriptor_at(2 * SLOT_OF_THE_RACE + part));
        let flip = |address, width, good, others| Flip {
            address,
            width,
            good,
            others,
        };
        let flips = [
            // Other requests, the end of memory, the end of the address space.
            flip(
                first,
                8,
                request,
                &[
                    REQUESTS,
                    REQUESTS + 2 * SLOT,
                    MEMORY as u64 - 8,
                    u64::MAX - 8,
                ],
            ),
            flip(
                first + 8,
                4,
                length,
                &[
                    0,
                    15,
                    16,
                    24,
                    88,
                    136,
                    LIMIT as u64 + 1,
                    0x8_0000,
                    u32::MAX as u64,
                ],
            ),
            flip(
                first + 12,
                2,
                NEXT.into(),
                &[
                    0,
                    (NEXT | WRITE) as u64,
                    INDIRECT as u64,
                    (NEXT | INDIRECT) as u64,
                    0xffff,
                ],
            ),
            flip(
                first + 14,
                2,
                (2 * SLOT_OF_THE_RACE + 1).into(),
                &[8, 0, 127, 128, 0xffff],
            ),
            flip(
                second,
                8,
                request + SLOT / 2,
                &[MEMORY as u64 - 8, u64::MAX - 8],
            ),
            flip(second + 8, 4, 0x200, &[0, 15, 16, u32::MAX as u64]),
            flip(
                second + 12,
                2,
                WRITE.into(),
                &[0, INDIRECT as u64, (NEXT | WRITE) as u64],
            ),
        ];
        let refused = |machine: &Machine| machine.device.statistics().malformed as usize;
        machine.race(&flips, (ROUNDS, ENOUGH), refused, |machine| {
            // A response may have been written over the request.
            write(machine);
            machine.submit(SLOT_OF_THE_RACE);
            machine.wait();
        });
        assert!(refused(&machine) >= ENOUGH, "no race");
        // All is good again: so is the device.
        let seen = machine.record.seen();
        write(&machine);
        machine.submit(SLOT_OF_THE_RACE);
        machine.wait();
        assert_eq!(machine.record.seen(), seen + 1);
        machine.verdict();
    }
}

#[test]
fn a_ring_that_changes_while_it_is_read_gives_whole_requests_and_ends_with_a_reset() {
    /// Chains of a session: hello, open, two handles, then submissions.
    const CHAINS: u16 = 12;
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        let mut machine = Machine::new(doorbell);
        let ring = |entry: u64| AVAILABLE + 4 + 2 * entry;
        let flip = |address, good, others| Flip {
            address,
            width: 2,
            good,
            others,
        };
        let flips = [
            flip(AVAILABLE, 0, &[1, 0xffff]),
            flip(
                AVAILABLE + 2,
                CHAINS.into(),
                &[0, 3, 11, 13, 100, 128, 140, 141, 0x8000, 0xffff],
            ),
            flip(ring(5), 10, &[0, 2, 9, 11, 127, 128, 0xffff]),
            flip(ring(7), 14, &[0, 2, 9, 15, 127, 128, 0xffff]),
        ];
        let submission = Execbuffer {
            flags: exec::RING_IDX,
            ..Default::default()
        };
        let life = |machine: &mut Machine| {
            machine.activate();
            machine.prepare();
            for slot in 0..CHAINS {
                machine.store(ring(slot.into()), 2, (2 * slot).into());
                if slot >= 4 {
                    machine.ioctl(slot, virtio_gpu::EXECBUFFER, submission.as_bytes());
                }
            }
            machine.store(AVAILABLE + 2, 2, CHAINS.into());
            for _ in 0..8 {
                machine.device.notify(0);
                if doorbell == Doorbell::Worker {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        };
        // A ring that makes no sense is counted once per session.
        let refused = |machine: &Machine| machine.device.statistics().malformed as usize;
        machine.race(&flips, (0, ENOUGH_RINGS), refused, life);
        assert!(refused(&machine) >= ENOUGH_RINGS, "no race");
        // A worker may still be at what the last session sent; nothing comes after this.
        machine.device.reset();
        let seen = machine.record.seen();
        machine.activate();
        machine.prepare();
        machine.ioctl(
            SLOT_OF_THE_RACE,
            virtio_gpu::EXECBUFFER,
            submission.as_bytes(),
        );
        for slot in 0..=SLOT_OF_THE_RACE {
            machine.submit(slot);
            machine.wait();
        }
        assert_eq!(machine.record.seen(), seen + 3);
        machine.verdict();
    }
}
