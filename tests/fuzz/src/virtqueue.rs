//! Virtqueues that a guest fills as it likes: descriptors, rings, indirect tables, indexes, and memory that changes meanwhile.
//!
//! Input: a byte of modes, then steps. Each writes a part of the guest's memory (a descriptor, a ring's index, a valid request, raw
//! bytes) or rings a doorbell. The device may write nothing but the used rings and the buffers that it was given for writing;
//! the used index never runs ahead of what was made available. In the mode with a second thread, that thread writes while
//! the device works, and only the process is judged.

use crate::answering::Answering;
use crate::decode::{LIMITS, prelude};
use crate::request;
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::device::{Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_protocol::wire::{Operation, PollRequest, WatchRequest};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

/// Bytes of guest memory.
const MEMORY: u64 = 0x8000;
/// Entries of each queue.
const SIZE: u16 = 16;
/// The request queue and the event queue begin here ...
const QUEUES: [u64; 2] = [0, 0x1000];
/// ... with the parts of each so far behind.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Where an indirect table is put.
const TABLE: u64 = 0x2000;
/// Where requests and responses are put, [`SLOT`] bytes each.
const SLOTS: u64 = 0x3000;
const SLOT: u64 = 0x400;
/// Bytes of all slots.
const SLOTS_LENGTH: usize = 16 * 0x400;
/// Bytes of memory that are compared at once.
const LINE: usize = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

/// The guest's memory. Mapping it anew for each input would take longer than the input.
static GUEST: LazyLock<GuestMemoryAtomic<GuestMemoryMmap>> = LazyLock::new(|| {
    let length = usize::try_from(MEMORY).expect("64 bits");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length)]);
    GuestMemoryAtomic::new(memory.expect("a few pages"))
});

/// A step of a hostile guest.
#[derive(Arbitrary, Debug)]
enum Step {
    /// Writes a descriptor of a queue's table or of the indirect table.
    Descriptor {
        table: u8,
        index: u8,
        address: u16,
        far: Option<u64>,
        length: u16,
        long: Option<u32>,
        flags: u8,
        next: u8,
    },
    /// Puts a head into an available ring and moves its index on.
    Offer { queue: bool, head: u8 },
    /// Sets an index, the flags or the event index of a ring.
    Index { queue: bool, field: u8, value: u16 },
    /// Puts a request and room for its response into a slot, as a chain that starts at this descriptor, and offers it. The first
    /// buffer for the response has that many bytes.
    Request {
        slot: u8,
        head: u8,
        what: u8,
        first: u8,
    },
    /// Gives the event queue a buffer.
    Buffer { slot: u8, head: u8, length: u8 },
    /// Writes bytes anywhere.
    Bytes { address: u16, bytes: [u8; 8] },
    /// Rings a doorbell.
    Doorbell { queue: u8 },
    /// Resets the device and starts it anew.
    Reset,
}

/// Interrupts go nowhere.
struct Line;

impl Interrupt for Line {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    // Too few bytes are no input.
    let _ = abuse(Unstructured::new(bytes));
}

fn abuse(mut input: Unstructured<'_>) -> Result<()> {
    let modes = u8::arbitrary(&mut input)?;
    let features = VERSION_1
        | (u64::from(modes & 1) * EVENT_IDX)
        | (u64::from(modes >> 1 & 1) * INDIRECT_DESC);
    // A thread takes longer to start than a request to be handled: such inputs are few.
    let worker = modes >> 2 == 1;
    let concurrent = modes >> 2 == 2;
    let driver = Answering::new("soft", u64::from(modes), LIMITS.message);
    let config = DeviceConfig {
        queue_size: SIZE,
        doorbell: match worker {
            true => Doorbell::Worker,
            false => Doorbell::Inline,
        },
        poll: Duration::from_micros(10),
        limits: LIMITS,
        sandbox: Sandbox::Off,
        ..DeviceConfig::default()
    };
    let device = Device::new(Arc::new(driver), None, config).expect("eventfds");
    let mut guest = Guest {
        device,
        features,
        used: [0; 2],
        writable: Some(Vec::new()),
        snapshots: [(); 2].map(|()| vec![0; usize::try_from(MEMORY).expect("64 bits")]),
    };
    store(0, &guest.snapshots[0]);
    // No response is made of these bytes: wherever one goes is seen.
    store(SLOTS, &[0xa5; SLOTS_LENGTH]);
    guest.start();
    let steps: Vec<Step> = input.arbitrary()?;
    if !concurrent {
        for step in steps {
            guest.step(step, !worker);
        }
    } else {
        // Doorbells ring on this thread while the other one writes.
        let (doorbells, writes): (Vec<_>, Vec<_>) = steps
            .into_iter()
            .partition(|step| matches!(step, Step::Doorbell { .. } | Step::Reset));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for write in writes.iter().cycle().take(writes.len() * 16) {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    write_step(write);
                }
            });
            for _ in 0..4 {
                for doorbell in &doorbells {
                    if let Step::Doorbell { queue } = doorbell {
                        guest.device.notify(u16::from(queue % 4));
                    }
                }
                guest.device.notify(0);
            }
            over.store(true, Ordering::Relaxed);
            // The scope waits for its last line only, and what it still holds would look like a leak.
            writer.join().expect("it only writes");
        });
    }
    guest.device.reset();
    let left = guest.device.statistics().usage;
    assert_eq!(left, None, "a session outlives the reset");
    Ok(())
}

struct Guest {
    device: Device,
    features: u64,
    /// The used index of each queue as it was last seen.
    used: [u16; 2],
    /// Where the device may write: whatever it was given since it was started, since a request that waits is answered later.
    /// `None` when it was told to write where it looks for descriptors: then it follows what it has written itself.
    writable: Option<Vec<Range<u64>>>,
    /// The guest's memory before and after a doorbell.
    snapshots: [Vec<u8>; 2],
}

impl Guest {
    fn start(&mut self) {
        for queue in QUEUES {
            store(queue + USED, &[0; 4]);
            store(queue + AVAILABLE, &[0; 4]);
        }
        self.used = [0; 2];
        self.writable = Some(Vec::new());
        let queues = QUEUES.map(|base| {
            let mut queue = Queue::new(SIZE).expect("a power of two");
            queue.set_size(SIZE);
            queue
                .try_set_desc_table_address(GuestAddress(base))
                .expect("aligned");
            queue
                .try_set_avail_ring_address(GuestAddress(base + AVAILABLE))
                .expect("aligned");
            queue
                .try_set_used_ring_address(GuestAddress(base + USED))
                .expect("aligned");
            queue.set_ready(true);
            queue
        });
        self.device
            .activate(GUEST.clone(), self.features, queues.into(), Arc::new(Line))
            .expect("valid queues");
    }

    fn step(&mut self, step: Step, alone: bool) {
        match step {
            Step::Doorbell { queue } => self.ring(u16::from(queue % 4), alone),
            Step::Reset => {
                self.device.reset();
                self.start();
            }
            write => write_step(&write),
        }
    }

    /// Rings a doorbell. When only this thread works, judges what the device has done.
    fn ring(&mut self, queue: u16, alone: bool) {
        if !alone || self.writable.is_none() {
            return self.device.notify(queue);
        }
        let [before, after] = &mut self.snapshots;
        snapshot(before);
        match (&mut self.writable, writable(before)) {
            (Some(known), Some(new)) => known.extend(new),
            (known, _) => *known = None,
        }
        self.device.notify(queue);
        let Some(writable) = &self.writable else {
            return;
        };
        snapshot(after);
        for (base, seen) in QUEUES.into_iter().zip(&mut self.used) {
            let [old, new] = [&*before, &*after].map(|memory| half(memory, base + USED + 2));
            // The guest may have written there itself.
            assert!(
                old != *seen || new.wrapping_sub(old) <= SIZE,
                "the used index jumps from {old} to {new}"
            );
            *seen = new;
        }
        let lines = before.chunks(LINE).zip(after.chunks(LINE)).zip(0..);
        for ((old, new), line) in lines.filter(|((old, new), _)| old != new) {
            for (at, (old, new)) in (line * LINE as u64..).zip(old.iter().zip(new)) {
                assert!(
                    old == new || writable.iter().any(|range| range.contains(&at)),
                    "the device has written to {at:#x}, which it was not given"
                );
            }
        }
    }
}

/// The places that the device may write before the guest writes again: the used rings, and every descriptor for writing that
/// lies anywhere it could look for one. `None` when it may write where it looks for them: then it follows what it has written.
fn writable(memory: &[u8]) -> Option<Vec<Range<u64>>> {
    let rings = QUEUES.map(|base| base + USED..base + USED + 8 * u64::from(SIZE) + 6);
    let mut writable = rings.to_vec();
    let mut tables: Vec<_> = QUEUES
        .map(|base| base..base + 16 * u64::from(SIZE))
        .to_vec();
    let mut next = 0;
    while let Some(table) = tables.get(next).cloned() {
        next += 1;
        let places = (table.start..table.end).step_by(16);
        for place in places.filter(|place| place + 16 <= MEMORY) {
            let address = word(memory, place);
            let length = u64::from(word(memory, place + 8) as u32);
            let flags = half(memory, place + 12);
            if flags & WRITE != 0 {
                writable.push(address..address.saturating_add(length));
            }
            // Tables in tables are not followed, but a wrong device might.
            if flags & INDIRECT != 0 && next <= tables.len() && tables.len() < 64 {
                tables.push(address..address.saturating_add(length).min(MEMORY));
            }
        }
    }
    let looked_at = tables
        .into_iter()
        .chain(QUEUES.map(|base| base + AVAILABLE..base + AVAILABLE + 2 * u64::from(SIZE) + 6));
    let meets = |place: Range<u64>| {
        let mut buffers = writable[rings.len()..].iter();
        buffers.any(|buffer| buffer.start < place.end && place.start < buffer.end)
    };
    let follows = looked_at.chain(rings.clone()).any(meets);
    (!follows).then_some(writable)
}

fn write_step(step: &Step) {
    match *step {
        Step::Descriptor {
            table,
            index,
            address,
            far,
            length,
            long,
            flags,
            next,
        } => {
            let table = [QUEUES[0], QUEUES[1], TABLE][usize::from(table % 3)];
            let address = far.unwrap_or(u64::from(address));
            let length = long.unwrap_or(u32::from(length));
            let index = u64::from(index) % (2 * u64::from(SIZE));
            descriptor(table, index, address, length, flags.into(), next.into());
        }
        Step::Offer { queue, head } => offer(queue, head.into()),
        Step::Index {
            queue,
            field,
            value,
        } => {
            let base = QUEUES[usize::from(queue)];
            let field = match field % 6 {
                0 => AVAILABLE,
                1 => AVAILABLE + 2,
                2 => AVAILABLE + 4 + 2 * u64::from(SIZE),
                3 => USED,
                4 => USED + 4 + 8 * u64::from(SIZE),
                _ => AVAILABLE + 4 + 2 * u64::from(value % SIZE),
            };
            store(base + field, &value.to_le_bytes());
        }
        Step::Request {
            slot,
            head,
            what,
            first,
        } => {
            let place = SLOTS + u64::from(slot % 16) * SLOT;
            let bytes = message(what);
            let head = u16::from(head) % (SIZE - 2);
            store(place, &bytes);
            let length = u32::try_from(bytes.len()).expect("short");
            let chain = [
                (place, length, NEXT),
                (place + SLOT / 2, first.into(), WRITE | NEXT),
                (place + SLOT * 3 / 4, 0x80, WRITE),
            ];
            for (index, (address, length, flags)) in (head..).zip(chain) {
                descriptor(QUEUES[0], index.into(), address, length, flags, index + 1);
            }
            offer(false, head);
        }
        Step::Buffer { slot, head, length } => {
            let place = SLOTS + u64::from(slot % 16) * SLOT;
            let head = u16::from(head) % SIZE;
            descriptor(QUEUES[1], head.into(), place, length.into(), WRITE, 0);
            offer(true, head);
        }
        Step::Bytes { address, bytes } => {
            let address = u64::from(address) % (MEMORY - 8);
            store(address, &bytes);
        }
        Step::Doorbell { .. } | Step::Reset => {}
    }
}

/// A request that is worth sending: first those that open a session, then some that make events and wait.
fn message(what: u8) -> Vec<u8> {
    let mut requests = prelude("soft");
    let watch = WatchRequest {
        events: 4.into(),
        reserved: 0.into(),
    };
    let poll = PollRequest {
        events: 1.into(),
        reserved: 0.into(),
        timeout_ns: (-1).into(),
    };
    let id = u64::from(what);
    requests.push(request(Operation::Watch, 1, id, &watch, &[]));
    requests.push(request(Operation::Poll, 1, id, &poll, &[]));
    requests.push(request(Operation::Nop, 0, id, &(), &[what; 32]));
    requests.push(request(Operation::Close, 1, id, &(), &[]));
    let index = usize::from(what) % requests.len();
    requests.swap_remove(index)
}

fn descriptor(table: u64, index: u64, address: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    store(table + index * 16, &bytes);
}

/// Makes a chain available.
fn offer(queue: bool, head: u16) {
    let base = QUEUES[usize::from(queue)] + AVAILABLE;
    let mut index = [0; 2];
    GUEST
        .memory()
        .read_slice(&mut index, GuestAddress(base + 2))
        .expect("in memory");
    let index = u16::from_le_bytes(index);
    store(base + 4 + 2 * u64::from(index % SIZE), &head.to_le_bytes());
    store(base + 2, &index.wrapping_add(1).to_le_bytes());
}

fn store(address: u64, bytes: &[u8]) {
    let memory = GUEST.memory();
    memory
        .write_slice(bytes, GuestAddress(address))
        .expect("in memory");
}

/// Copies all of the guest's memory.
fn snapshot(bytes: &mut [u8]) {
    let memory = GUEST.memory();
    memory
        .read_slice(bytes, GuestAddress(0))
        .expect("in memory");
}

fn half(memory: &[u8], address: u64) -> u16 {
    let at = usize::try_from(address).expect("64 bits");
    u16::from_le_bytes([memory[at], memory[at + 1]])
}

fn word(memory: &[u8], address: u64) -> u64 {
    let at = usize::try_from(address).expect("64 bits");
    u64::from_le_bytes(memory[at..at + 8].try_into().expect("8 bytes"))
}
