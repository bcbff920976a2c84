//! What the virtio device promises to any VMM, driven through real virtqueues in made-up guest memory.

use pvgpu_e2e::gate::{Gate, GateDriver};
use pvgpu_e2e::recording::{Record, Recording};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{ActivateError, Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::limit::Limit;
use pvgpu_host_proxy::statistics::SessionState;
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::wire::{
    CancelRequest, Event, MapRequest, OpenRequest, Operation, PollRequest, RequestHeader,
    ResponseHeader, WatchRequest,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    MmapRegion,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const MEMORY: usize = 1 << 20;
/// The parts of the queue (virtio 1.2 section 2.7).
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the event queue's parts lie, as far from those of the request queue.
const EVENT_QUEUE: u64 = 0x1_0000;
/// Buffers for events lie here, [`SLOT`] bytes each.
const EVENTS: u64 = 0x2_0000;
/// Requests and responses lie here, [`SLOT`] bytes each.
const BUFFERS: u64 = 0x4_0000;
const SLOT: u64 = 0x400;
const QUEUE_SIZE: u16 = 128;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
/// The answer to what comes before a hello.
const NO_HELLO: i32 = -Errno::ENOTCONN.number();

/// What a VMM may have beside its guest's memory: a bitmap of what has been written, or nothing.
trait Memory: NewBitmap + Send + Sync + 'static {}

impl<B: NewBitmap + Send + Sync + 'static> Memory for B {}

/// Interrupts of the two queues, then those that say that the status has changed.
#[derive(Default)]
struct Interrupts(AtomicUsize, AtomicUsize, AtomicUsize);

impl Interrupt for Interrupts {
    fn signal_queue(&self, queue: u16) {
        [&self.0, &self.1][usize::from(queue)].fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.2.fetch_add(1, Ordering::SeqCst);
    }
}

struct Machine<B: Memory = ()> {
    device: Device<GuestMemoryAtomic<GuestMemoryMmap<B>>>,
    record: Arc<Record>,
    memory: GuestMemoryAtomic<GuestMemoryMmap<B>>,
    interrupts: Arc<Interrupts>,
    /// Chains made available so far.
    submitted: u16,
    /// Whether the event queue is to be set up.
    with_events: bool,
    /// Chains made available on the event queue so far.
    given: u16,
}

impl Machine {
    fn new(doorbell: Doorbell) -> Self {
        Self::with(doorbell, VERSION_1)
    }

    fn with(doorbell: Doorbell, features: u64) -> Self {
        let driver = Recording::default();
        let record = driver.record();
        let mut machine = Self::inactive(doorbell, Arc::new(driver), record);
        machine.activate(features).unwrap();
        machine
    }

    /// A machine that has opened a file whose gate is returned, with an event queue.
    fn watching(doorbell: Doorbell, features: u64) -> (Self, Arc<Gate>) {
        let driver = GateDriver::default();
        let gate = driver.gate();
        let mut machine = Self::inactive(doorbell, Arc::new(driver), Arc::default());
        machine.with_events = true;
        machine.activate(features).unwrap();
        machine.hello();
        machine.open();
        machine.ring();
        machine.wait_for_used(2);
        assert_eq!((machine.result(0), machine.result(1)), (0, 1));
        (machine, gate)
    }
}

impl<B: Memory> Machine<B> {
    fn inactive(doorbell: Doorbell, driver: Arc<dyn HostDriver>, record: Arc<Record>) -> Self {
        let config = DeviceConfig {
            queue_size: QUEUE_SIZE,
            doorbell,
            limits: Limits {
                message: 4096,
                ..Limits::default()
            },
            ..DeviceConfig::default()
        };
        let aperture = Aperture::reserve(1 << 20).unwrap();
        let device = Device::new(driver, Some(aperture), config).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self {
            device,
            record,
            memory: GuestMemoryAtomic::new(memory),
            interrupts: Arc::default(),
            submitted: 0,
            with_events: false,
            given: 0,
        }
    }

    fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        let interrupts = Arc::clone(&self.interrupts) as Arc<dyn Interrupt>;
        self.activate_with(features, interrupts)
    }

    fn activate_with(
        &mut self,
        features: u64,
        interrupts: Arc<dyn Interrupt>,
    ) -> Result<(), ActivateError> {
        let queues = vec![queue_at(0, true), queue_at(EVENT_QUEUE, self.with_events)];
        self.device
            .activate(self.memory.clone(), features, queues, interrupts)
    }

    /// Makes a chain of these descriptors available: (address, length, writable).
    fn submit_chain(&mut self, buffers: &[(u64, u32, bool)]) {
        self.chain(0, self.submitted, buffers);
        self.submitted += 1;
    }

    /// Makes a chain available on the event queue, without ringing its doorbell.
    fn give_chain(&mut self, buffers: &[(u64, u32, bool)]) {
        self.chain(EVENT_QUEUE, self.given, buffers);
        self.given += 1;
    }

    /// Makes a buffer for one event available.
    fn give_buffer(&mut self) {
        let address = EVENTS + u64::from(self.given) * SLOT;
        self.give_chain(&[(address, 16, true)]);
    }

    fn chain(&mut self, queue: u64, number: u16, buffers: &[(u64, u32, bool)]) {
        let head = number * 2;
        for (index, &(address, length, writable)) in (0..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let place = queue + DESCRIPTORS + u64::from(head + index) * 16;
            self.store(place, address);
            self.store(place + 8, length);
            self.store(place + 12, flags);
            self.store(place + 14, head + index + 1);
        }
        self.store(queue + AVAILABLE + 4 + u64::from(number) * 2, head);
        self.store(queue + AVAILABLE + 2, number + 1);
    }

    fn store<T: vm_memory::AtomicAccess>(&self, address: u64, value: T) {
        let memory = self.memory.memory();
        memory
            .store(value, GuestAddress(address), Ordering::SeqCst)
            .unwrap();
    }

    /// Makes a request available; its response goes to the slot behind it.
    fn submit(&mut self, operation: Operation, object: u32, body: &[u8]) {
        let id = u64::from(self.submitted);
        let header = RequestHeader::new(operation, object, id);
        let request = [header.as_bytes(), body].concat();
        let address = BUFFERS + id * SLOT;
        self.memory
            .memory()
            .write_slice(&request, GuestAddress(address))
            .unwrap();
        let length = u32::try_from(request.len()).unwrap();
        self.submit_chain(&[(address, length, false), (address + SLOT / 2, 0x200, true)]);
    }

    fn ring(&self) {
        self.device.notify(0);
    }

    fn load<T: vm_memory::AtomicAccess>(&self, address: u64) -> T {
        let memory = self.memory.memory();
        memory
            .load(GuestAddress(address), Ordering::SeqCst)
            .unwrap()
    }

    fn used(&self) -> u16 {
        self.load(USED + 2)
    }

    /// Watches the file for input; the response is the last one.
    fn watch(&mut self) -> i32 {
        let body = WatchRequest {
            events: 1.into(),
            reserved: 0.into(),
        };
        self.submit(Operation::Watch, 1, body.as_bytes());
        self.last_result()
    }

    /// Rings the doorbell and waits for the last request's result.
    fn last_result(&mut self) -> i32 {
        self.ring();
        self.wait_for_used(self.submitted);
        self.result(self.submitted - 1)
    }

    /// Rings the event queue's doorbell.
    fn ring_for_events(&self) {
        self.device.notify(1);
    }

    /// Waits until so many buffers of the event queue have been returned.
    fn wait_for_events(&self, count: u16) {
        self.wait_for_used_of(EVENT_QUEUE, count);
    }

    /// What is in a returned buffer of the event queue: the id and the events, `None` if it was returned empty.
    fn event(&self, number: u16) -> Option<(u64, u32)> {
        let used = EVENT_QUEUE + USED + 4 + u64::from(number) * 8;
        assert_eq!(self.load::<u32>(used), u32::from(number) * 2);
        let length: u32 = self.load(used + 4);
        if length == 0 {
            return None;
        }
        assert_eq!(length, 16);
        let mut bytes = [0; 16];
        let address = EVENTS + u64::from(number) * SLOT;
        let memory = self.memory.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let event = Event::read_from_bytes(&bytes).unwrap();
        assert_eq!(event.reserved, 0);
        Some((event.id.get(), event.events.get()))
    }

    fn in_flight(&self) -> usize {
        self.device.statistics().usage.unwrap().in_flight
    }

    /// The result of the request that was submitted as number `index`.
    fn result(&self, index: u16) -> i32 {
        let address = BUFFERS + u64::from(index) * SLOT + SLOT / 2;
        let mut bytes = [0; size_of::<ResponseHeader>()];
        self.memory
            .memory()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let header = ResponseHeader::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.id.get(), u64::from(index));
        header.result.get()
    }

    fn hello(&mut self) {
        let hello = Hello::new("test");
        let mut record = [0; 64];
        let length = control::encode(&hello, &mut record).unwrap();
        self.submit(Operation::Hello, 0, &record[..length]);
    }

    fn open(&mut self) {
        let body = OpenRequest {
            flags: 2.into(),
            reserved: 0.into(),
        };
        self.submit(Operation::Open, 0, body.as_bytes());
    }

    /// A poll that waits for ever.
    fn wait_for_ever(&mut self, object: u32) {
        let body = PollRequest {
            events: 1.into(),
            reserved: 0.into(),
            timeout_ns: (-1).into(),
        };
        self.submit(Operation::Poll, object, body.as_bytes());
    }

    fn wait_for_used(&self, count: u16) {
        self.wait_for_used_of(0, count);
    }

    fn wait_for_used_of(&self, queue: u64, count: u16) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let used: u16 = self.load(queue + USED + 2);
            if used == count {
                return;
            }
            assert!(Instant::now() < deadline, "only {used} of {count} returned");
            std::thread::yield_now();
        }
    }
}

/// A queue whose parts lie behind `base`.
fn queue_at(base: u64, ready: bool) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(base + DESCRIPTORS))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(base + AVAILABLE))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(base + USED))
        .unwrap();
    queue.set_ready(ready);
    queue
}

/// Waits until something has happened.
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} does not come true");
        std::thread::yield_now();
    }
}

#[test]
fn inline_requests_are_answered_before_the_doorbell_returns() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.open();
    machine.ring();
    assert_eq!(
        (machine.used(), machine.result(0), machine.result(1)),
        (2, 0, 1)
    );
    assert_eq!(machine.record.open(), 1);
}

#[test]
fn a_vmm_that_tracks_dirty_pages_learns_which_ones_the_device_has_written() {
    let mut machine: Machine<AtomicBitmap> = Machine::inactive(
        Doorbell::Inline,
        Arc::new(Recording::default()),
        Arc::default(),
    );
    machine.activate(VERSION_1).unwrap();
    machine.hello();
    let memory = machine.memory.memory();
    let region: &MmapRegion<_> = memory.iter().next().unwrap();
    let bitmap = region.bitmap();
    // What the guest has written so far.
    bitmap.reset();
    machine.ring();
    assert_eq!(machine.result(0), 0);
    let pages = (0..MEMORY.div_ceil(0x1000)).filter(|page| bitmap.is_bit_set(*page));
    let response = BUFFERS + SLOT / 2;
    let written = [USED, response].map(|address| usize::try_from(address >> 12).unwrap());
    assert_eq!(pages.collect::<Vec<_>>(), written);
}

#[test]
fn a_batch_of_64_requests_takes_one_doorbell_and_one_interrupt() {
    let mut machine = Machine::new(Doorbell::Inline);
    for _ in 0..64 {
        machine.submit(Operation::Nop, 0, &[]);
    }
    machine.ring();
    assert_eq!(machine.used(), 64);
    assert_eq!(machine.device.statistics().doorbells, 1);
    assert_eq!(machine.interrupts.0.load(Ordering::SeqCst), 1);
}

#[test]
fn a_worker_answers_requests_behind_its_eventfd() {
    let mut machine = Machine::with(Doorbell::Worker, VERSION_1 | EVENT_IDX);
    for round in 1..=20 {
        machine.submit(Operation::Nop, 0, &[]);
        machine.device.doorbell(0).unwrap().write(1).unwrap();
        machine.wait_for_used(round);
        // Longer than the thread polls, so that it sleeps in some rounds.
        std::thread::sleep(Duration::from_micros(u64::from(round) * 50));
    }
}

#[test]
fn broken_chains_are_returned_empty_and_harm_nothing() {
    let mut machine = Machine::new(Doorbell::Inline);
    let (request, response) = (BUFFERS, BUFFERS + SLOT / 2);
    let broken: [&[(u64, u32, bool)]; 7] = [
        &[(response, 64, true), (request, 16, false)], // readable behind writable
        &[(request, 16, false)],                       // no room for an answer
        &[(request, 16, false), (response, 15, true)], // too little room
        &[(MEMORY as u64, 16, false), (response, 64, true)], // outside of memory
        &[(u64::MAX - 8, 16, false), (response, 64, true)], // past the end of the address space
        &[(request, u32::MAX, false), (response, 64, true)], // too long
        &[(request, 4097, false), (response, 64, true)], // over the limit of this guest
    ];
    for chain in broken {
        machine.submit_chain(chain);
    }
    machine.ring();
    assert_eq!(machine.used(), 7);
    let statistics = machine.device.statistics();
    assert_eq!(
        (statistics.malformed, statistics.reached(Limit::Message)),
        (7, 2)
    );
    assert!(machine.record.calls().is_empty());
    machine.submit(Operation::Nop, 0, &[]);
    machine.ring();
    assert_eq!((machine.used(), machine.result(7)), (8, NO_HELLO));
}

#[test]
fn a_response_without_memory_behind_it_is_lost_and_the_device_goes_on() {
    let mut machine = Machine::new(Doorbell::Inline);
    let header = RequestHeader {
        operation: Operation::Nop.number().into(),
        ..RequestHeader::new_zeroed()
    };
    machine
        .memory
        .memory()
        .write_slice(header.as_bytes(), GuestAddress(BUFFERS))
        .unwrap();
    machine.submit_chain(&[(BUFFERS, 16, false), (MEMORY as u64 - 8, 64, true)]);
    machine.submit(Operation::Nop, 0, &[]);
    machine.ring();
    assert_eq!((machine.used(), machine.result(1)), (2, NO_HELLO));
}

#[test]
fn a_reset_in_the_middle_of_a_request_closes_and_unmaps_everything() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.open();
    machine.ring();
    let map = MapRequest {
        length: 8192.into(),
        protection: 3.into(),
        ..MapRequest::new_zeroed()
    };
    machine.submit(Operation::Map, 1, map.as_bytes());
    machine.wait_for_ever(1);
    machine.ring();
    assert_eq!((machine.used(), machine.result(2)), (3, 0));
    let usage = machine.device.statistics().usage.unwrap();
    assert_eq!((usage.objects, usage.mapped, usage.in_flight), (1, 8192, 1));
    machine.device.reset();
    assert_eq!(machine.record.open(), 0);
    assert_eq!(machine.used(), 3, "a response was written after the reset");
    assert!(machine.device.statistics().usage.is_none());
}

#[test]
fn what_was_counted_outlives_the_session() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.ring();
    machine.device.reset();
    let statistics = machine.device.statistics();
    assert!(statistics.operations.contains(&(Operation::Hello, 1)));
    assert_eq!(statistics.completed, 1);
}

#[test]
fn a_guest_that_breaks_its_ring_is_told_once_to_reset_the_device() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    assert_eq!(machine.last_result(), 0);
    assert!(!machine.device.needs_reset());
    machine.store(AVAILABLE + 2, QUEUE_SIZE + 2);
    machine.ring();
    machine.ring();
    assert!(machine.device.needs_reset());
    assert_eq!(machine.interrupts.2.load(Ordering::SeqCst), 1);
    machine.device.reset();
    assert!(!machine.device.needs_reset());
    machine.activate(VERSION_1).unwrap();
    assert!(!machine.device.needs_reset());
}

/// What a front end does that outlives its back end and does not tell the guest: the new one goes on with the same rings,
/// where the old one's requests are lost.
#[test]
fn a_session_that_was_lost_answers_that_to_everything_until_a_hello() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.open();
    machine.ring();
    machine.wait_for_ever(1);
    machine.ring();
    assert_eq!(machine.used(), 2);
    machine.device.reset();
    let mut queue = queue_at(0, true);
    queue.set_next_avail(machine.submitted);
    queue.set_next_used(machine.used());
    let interrupts = Arc::clone(&machine.interrupts) as Arc<dyn Interrupt>;
    let queues = vec![queue, queue_at(EVENT_QUEUE, false)];
    let memory = machine.memory.clone();
    let device = &mut machine.device;
    device
        .activate(memory, VERSION_1, queues, interrupts)
        .unwrap();
    machine.submit(Operation::Nop, 0, &[]);
    machine.submit(Operation::Close, 1, &[]);
    machine.ring();
    assert_eq!(machine.used(), 4, "the poll's answer is lost");
    assert_eq!([machine.result(3), machine.result(4)], [NO_HELLO, NO_HELLO]);
    assert!(!machine.device.needs_reset(), "the guest did nothing wrong");
}

#[test]
fn statistics_tell_who_the_guest_is_what_it_has_what_waits_how_long_that_took_and_what_went_wrong()
{
    let waiting = Machine::new(Doorbell::Inline).device.statistics();
    assert_eq!(waiting.session.unwrap().state, SessionState::Waiting);
    let (mut machine, gate) = Machine::watching(Doorbell::Worker, VERSION_1);
    machine.give_buffer();
    assert_eq!(machine.watch(), 0);
    machine.wait_for_ever(1);
    machine.submit(
        Operation::Cancel,
        0,
        CancelRequest { id: 99.into() }.as_bytes(),
    );
    machine.ring();
    machine.wait_for_used(4);
    let now = machine.device.statistics();
    let session = now.session.unwrap();
    assert_eq!(
        (session.state, session.guest.as_str()),
        (SessionState::Open, "test")
    );
    let usage = now.usage.unwrap();
    assert_eq!((usage.files, usage.objects, usage.handles), (1, 1, 0));
    assert_eq!((usage.in_flight, usage.watches), (2, 1));
    // The first of each operation is timed: hello, open, watch, cancel.
    assert_eq!((now.at_once.count(), now.waited.count()), (4, 0));
    let errors: Vec<_> = now
        .errors
        .iter()
        .map(|(kind, count)| (kind.to_string(), *count))
        .collect();
    assert_eq!(errors, [("ENOENT".to_owned(), 1)]);
    gate.set(1);
    machine.wait_for_used(5);
    machine.wait_for_events(1);
    let now = machine.device.statistics();
    assert_eq!((now.at_once.count(), now.waited.count()), (4, 1));
    assert!(now.waited.percentile(0.5) > Some(Duration::from_micros(1)));
    let usage = now.usage.unwrap();
    assert_eq!((usage.in_flight, usage.watches), (0, 0));
}

#[test]
fn a_session_ends_with_its_device_though_another_thread_looks_at_it_all_the_time() {
    let mut machine = Machine::new(Doorbell::Worker);
    let (monitor, done) = (machine.device.monitor(), Arc::new(AtomicBool::new(false)));
    let looks = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            let mut sessions = 0;
            while !done.load(Ordering::Relaxed) {
                sessions += usize::from(monitor.statistics().session.is_some());
            }
            (sessions, monitor)
        })
    };
    for _ in 0..50 {
        machine.hello();
        machine.open();
        machine.ring();
        machine.wait_for_used(2);
        machine.device.reset();
        assert_eq!(machine.record.open(), 0);
        // The guest sets its queue up again, with nothing in it.
        machine.store(AVAILABLE + 2, 0u16);
        machine.store(USED + 2, 0u16);
        machine.submitted = 0;
        machine.activate(VERSION_1).unwrap();
    }
    let record = Arc::clone(&machine.record);
    drop(machine);
    done.store(true, Ordering::Relaxed);
    let (sessions, monitor) = looks.join().unwrap();
    assert!(sessions > 0);
    assert_eq!(record.open(), 0);
    assert_eq!(monitor.statistics().session, None);
}

#[test]
fn a_dropped_device_leaves_no_file_open() {
    let mut machine = Machine::new(Doorbell::Worker);
    machine.hello();
    machine.open();
    machine.ring();
    machine.wait_for_used(2);
    machine.wait_for_ever(1);
    machine.ring();
    let record = Arc::clone(&machine.record);
    drop(machine);
    assert_eq!(record.open(), 0);
}

#[test]
fn requests_complete_out_of_order() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.open();
    machine.ring();
    machine.wait_for_ever(1);
    machine.submit(Operation::Nop, 0, &[]);
    machine.ring();
    assert_eq!((machine.used(), machine.result(3)), (3, 0));
}

#[test]
fn a_guest_that_refuses_version_1_is_refused() {
    let mut machine = Machine::new(Doorbell::Inline);
    assert!(matches!(machine.activate(0), Err(ActivateError::Features)));
    machine.ring();
}

#[test]
fn the_configuration_space_says_what_it_is_and_ends_in_zeros() {
    let machine = Machine::new(Doorbell::Inline);
    let mut bytes = [0xff; 12];
    machine.device.read_config(0, &mut bytes);
    assert_eq!(&bytes, b"PVGP\x01\x00\x01\x00\0\0\0\0");
    let mut bytes = [0xff; 4];
    machine.device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 4]);
}

#[test]
fn an_impossible_available_index_holds_up_neither_a_vcpu_nor_the_reset() {
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        let mut machine = Machine::new(doorbell);
        machine.store(AVAILABLE + 2, QUEUE_SIZE + 1);
        let (done, ended) = std::sync::mpsc::channel();
        let guest = std::thread::spawn(move || {
            machine.ring();
            machine.ring();
            let deadline = Instant::now() + Duration::from_secs(5);
            while machine.device.statistics().malformed == 0 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            machine.device.reset();
            done.send(machine.device.statistics()).unwrap();
        });
        let statistics = ended.recv_timeout(Duration::from_secs(10));
        let malformed = statistics.map(|statistics| statistics.malformed);
        assert_eq!(malformed, Ok(1), "{doorbell:?}");
        guest.join().unwrap();
    }
}

/// Makes the same request available again with every interrupt, as another vCPU can, or the guest's own responses where
/// they overwrite the ring.
struct Endless {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Where the queue's parts lie.
    queue: u64,
    interrupts: AtomicUsize,
}

impl Interrupt for Endless {
    fn signal_queue(&self, _queue: u16) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        let memory = self.memory.memory();
        let index = GuestAddress(self.queue + AVAILABLE + 2);
        let available: u16 = memory.load(index, Ordering::SeqCst).unwrap();
        memory
            .store(available.wrapping_add(1), index, Ordering::SeqCst)
            .unwrap();
    }

    fn signal_config(&self) {}
}

#[test]
fn a_doorbell_returns_once_the_device_is_switched_off_though_requests_never_end() {
    let mut machine = Machine::new(Doorbell::Inline);
    let endless = Arc::new(Endless {
        memory: machine.memory.clone(),
        queue: 0,
        interrupts: AtomicUsize::new(0),
    });
    machine.device.reset();
    let interrupt = Arc::clone(&endless) as Arc<dyn Interrupt>;
    machine.activate_with(VERSION_1, interrupt).unwrap();
    machine.submit(Operation::Nop, 0, &[]);
    let off = machine.device.off_switch();
    let (returned, has_returned) = std::sync::mpsc::channel();
    let device = Arc::new(machine.device);
    let vcpu = Arc::clone(&device);
    std::thread::spawn(move || {
        vcpu.notify(0);
        drop(vcpu);
        returned.send(()).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    while endless.interrupts.load(Ordering::SeqCst) < 1000 {
        assert!(Instant::now() < deadline, "the requests have ended");
    }
    off.store(true, Ordering::SeqCst);
    has_returned.recv_timeout(Duration::from_secs(30)).unwrap();
}

#[test]
fn a_doorbell_of_a_queue_that_the_guest_has_not_set_up_does_nothing() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.device.reset();
    machine.store(0, u64::MAX);
    let queues = vec![
        Queue::new(QUEUE_SIZE).unwrap(),
        Queue::new(QUEUE_SIZE).unwrap(),
    ];
    let interrupts = Arc::clone(&machine.interrupts) as Arc<dyn Interrupt>;
    machine
        .device
        .activate(machine.memory.clone(), VERSION_1, queues, interrupts)
        .unwrap();
    machine.ring();
    let memory = machine.memory.memory();
    let untouched: u64 = memory.load(GuestAddress(0), Ordering::SeqCst).unwrap();
    assert_eq!(untouched, u64::MAX);
}

#[test]
fn an_event_comes_in_a_buffer_of_the_event_queue_and_interrupts() {
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
            let (mut machine, gate) = Machine::watching(doorbell, features);
            machine.give_buffer();
            assert_eq!(machine.watch(), 0);
            assert_eq!(machine.in_flight(), 1);
            gate.set(1);
            machine.wait_for_events(1);
            assert_eq!(machine.event(0), Some((2, 1)));
            assert_eq!(machine.in_flight(), 0);
            // What is ready is said at once, and takes no buffer.
            machine.give_buffer();
            assert_eq!(machine.watch(), 1);
            machine.device.reset();
            assert_eq!(machine.interrupts.1.load(Ordering::SeqCst), 1);
            assert_eq!(machine.device.statistics().events, 1);
            machine.wait_for_events(1);
        }
    }
}

#[test]
fn a_cancelled_watch_gives_one_event_that_says_so() {
    let (mut machine, _) = Machine::watching(Doorbell::Inline, VERSION_1);
    machine.give_buffer();
    machine.give_buffer();
    assert_eq!(machine.watch(), 0);
    let cancel = CancelRequest { id: 2.into() };
    machine.submit(Operation::Cancel, 0, cancel.as_bytes());
    assert_eq!(machine.last_result(), 0);
    machine.wait_for_events(1);
    assert_eq!(machine.event(0), Some((2, 0)));
    machine.submit(Operation::Cancel, 0, cancel.as_bytes());
    assert_eq!(machine.last_result(), -Errno::ENOENT.number());
    machine.device.reset();
    machine.wait_for_events(1);
}

#[test]
fn events_without_buffers_are_kept_until_the_guest_rings_with_some() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        for doorbell in [Doorbell::Inline, Doorbell::Worker] {
            let (mut machine, gate) = Machine::watching(doorbell, features);
            for _ in 0..3 {
                assert_eq!(machine.watch(), 0);
            }
            let asks_for_doorbells = |machine: &Machine| match features & EVENT_IDX {
                0 => machine.load::<u16>(EVENT_QUEUE + USED) & 1 == 0,
                _ => {
                    let place = EVENT_QUEUE + USED + 4 + u64::from(QUEUE_SIZE) * 8;
                    machine.load::<u16>(place) == machine.given
                }
            };
            assert!(features & EVENT_IDX != 0 || !asks_for_doorbells(&machine));
            gate.set(1);
            wait_until("a doorbell is wanted", || asks_for_doorbells(&machine));
            assert_eq!(machine.in_flight(), 3);
            machine.give_buffer();
            machine.give_buffer();
            machine.ring_for_events();
            machine.wait_for_events(2);
            assert_eq!(machine.in_flight(), 1);
            wait_until("a doorbell is wanted", || asks_for_doorbells(&machine));
            machine.give_buffer();
            machine.ring_for_events();
            machine.wait_for_events(3);
            assert_eq!(machine.in_flight(), 0);
            let mut events: Vec<_> = (0..3).map(|number| machine.event(number)).collect();
            events.sort();
            assert_eq!(events, [Some((2, 1)), Some((3, 1)), Some((4, 1))]);
        }
    }
}

#[test]
fn buffers_that_cannot_take_an_event_are_returned_empty_and_the_event_comes_in_the_next() {
    let (mut machine, gate) = Machine::watching(Doorbell::Inline, VERSION_1);
    machine.give_chain(&[(EVENTS, 15, true)]);
    machine.give_chain(&[(EVENTS, 16, false)]);
    machine.give_chain(&[(EVENTS, 8, false), (EVENTS, 64, true)]);
    machine.give_chain(&[(MEMORY as u64 - 8, 16, true)]);
    machine.give_chain(&[(u64::MAX - 8, 16, true)]);
    machine.give_buffer();
    assert_eq!(machine.watch(), 0);
    gate.set(1);
    machine.wait_for_events(6);
    let events: Vec<_> = (0..6).map(|number| machine.event(number)).collect();
    assert_eq!(events, [None, None, None, None, None, Some((2, 1))]);
    let statistics = machine.device.statistics();
    assert_eq!((statistics.malformed, statistics.events), (5, 1));
}

#[test]
fn an_event_may_lie_in_several_descriptors() {
    let (mut machine, gate) = Machine::watching(Doorbell::Inline, VERSION_1);
    machine.give_chain(&[(EVENTS, 7, true), (EVENTS + 7, 64, true)]);
    assert_eq!(machine.watch(), 0);
    gate.set(1);
    machine.wait_for_events(1);
    assert_eq!(machine.event(0), Some((2, 1)));
}

#[test]
fn a_broken_event_queue_is_ignored_and_requests_go_on() {
    let (mut machine, gate) = Machine::watching(Doorbell::Inline, VERSION_1);
    machine.store(EVENT_QUEUE + AVAILABLE + 2, QUEUE_SIZE + 1);
    assert_eq!(machine.watch(), 0);
    gate.set(1);
    let malformed = || machine.device.statistics().malformed;
    wait_until("the ring is found broken", || malformed() == 1);
    machine.ring_for_events();
    machine.ring_for_events();
    assert_eq!(malformed(), 1);
    assert!(machine.device.needs_reset());
    assert_eq!(machine.interrupts.2.load(Ordering::SeqCst), 1);
    machine.submit(Operation::Nop, 0, &[]);
    assert_eq!(machine.last_result(), 0);
    machine.device.reset();
    machine.wait_for_events(0);
    assert_eq!(gate.open(), 0);
}

#[test]
fn a_reset_drops_watches_and_kept_events_and_the_next_session_starts_afresh() {
    let (mut machine, gate) = Machine::watching(Doorbell::Worker, VERSION_1);
    assert_eq!(machine.watch(), 0);
    wait_until("the first watch waits", || gate.waiting() == 1);
    gate.set(1);
    wait_until("the first watch ends", || gate.waiting() == 0);
    gate.set(0);
    assert_eq!(machine.watch(), 0);
    wait_until("the second watch waits", || gate.waiting() == 1);
    machine.device.reset();
    assert_eq!((gate.open(), gate.waiting()), (0, 0));
    let counted = machine.device.statistics();
    assert_eq!((counted.events, counted.malformed), (0, 0));

    // The guest sets its queues up again, with nothing in them.
    for queue in [0, EVENT_QUEUE] {
        machine.store(queue + AVAILABLE + 2, 0u16);
        machine.store(queue + USED + 2, 0u16);
    }
    (machine.submitted, machine.given) = (0, 0);
    machine.activate(VERSION_1).unwrap();
    machine.hello();
    machine.open();
    machine.give_buffer();
    machine.give_buffer();
    assert_eq!(machine.watch(), 0);
    gate.set(1);
    machine.wait_for_events(1);
    assert_eq!(machine.event(0), Some((2, 1)));
}

#[test]
fn a_guest_that_has_not_set_up_the_event_queue_cannot_watch() {
    let mut machine = Machine::new(Doorbell::Inline);
    machine.hello();
    machine.open();
    assert_eq!(machine.watch(), -Errno::EOPNOTSUPP.number());
    machine.ring_for_events();
}

#[test]
fn a_reset_comes_through_though_useless_buffers_for_events_never_end() {
    let (mut machine, gate) = Machine::watching(Doorbell::Inline, VERSION_1);
    let endless = Arc::new(Endless {
        memory: machine.memory.clone(),
        queue: EVENT_QUEUE,
        interrupts: AtomicUsize::new(0),
    });
    machine.device.reset();
    for queue in [0, EVENT_QUEUE] {
        machine.store(queue + AVAILABLE + 2, 0u16);
        machine.store(queue + USED + 2, 0u16);
    }
    (machine.submitted, machine.given) = (0, 0);
    let interrupt = Arc::clone(&endless) as Arc<dyn Interrupt>;
    machine.activate_with(VERSION_1, interrupt).unwrap();
    machine.hello();
    machine.open();
    assert_eq!(machine.watch(), 0);
    machine.give_chain(&[(EVENTS, 15, true)]);
    gate.set(1);
    let deadline = Instant::now() + Duration::from_secs(30);
    while endless.interrupts.load(Ordering::SeqCst) < 1000 {
        assert!(Instant::now() < deadline, "the buffers have ended");
    }
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        machine.device.reset();
        done.send(machine.device.statistics().events).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(0));
}
