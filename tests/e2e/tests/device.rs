//! What the virtio device promises to any VMM, driven through real virtqueues in made-up guest memory.

use pvgpu_e2e::recording::{Record, Recording};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{ActivateError, Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::wire::{
    MapRequest, OpenRequest, Operation, PollRequest, RequestHeader, ResponseHeader,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const MEMORY: usize = 1 << 20;
/// The parts of the queue (virtio 1.2 section 2.7).
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Requests and responses lie here, [`SLOT`] bytes each.
const BUFFERS: u64 = 0x4_0000;
const SLOT: u64 = 0x400;
const QUEUE_SIZE: u16 = 128;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

#[derive(Default)]
struct Interrupts(AtomicUsize);

impl Interrupt for Interrupts {
    fn signal_queue(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {}
}

struct Machine {
    device: Device,
    record: Arc<Record>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    interrupts: Arc<Interrupts>,
    /// Chains made available so far.
    submitted: u16,
}

impl Machine {
    fn new(doorbell: Doorbell) -> Self {
        Self::with(doorbell, VERSION_1)
    }

    fn with(doorbell: Doorbell, features: u64) -> Self {
        let driver = Recording::default();
        let record = driver.record();
        let config = DeviceConfig {
            queue_size: QUEUE_SIZE,
            doorbell,
            limits: Limits {
                message: 4096,
                ..Limits::default()
            },
            ..DeviceConfig::default()
        };
        let aperture = Aperture::new(1 << 20).unwrap();
        let device = Device::new(Arc::new(driver), Some(aperture), config).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut machine = Self {
            device,
            record,
            memory: GuestMemoryAtomic::new(memory),
            interrupts: Arc::default(),
            submitted: 0,
        };
        machine.activate(features).unwrap();
        machine
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
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAILABLE))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let event_queue = Queue::new(QUEUE_SIZE).unwrap(); // not set up
        let queues = vec![queue, event_queue];
        self.device
            .activate(self.memory.clone(), features, queues, interrupts)
    }

    /// Makes a chain of these descriptors available: (address, length, writable).
    fn submit_chain(&mut self, buffers: &[(u64, u32, bool)]) {
        let head = self.submitted * 2;
        for (index, &(address, length, writable)) in (0..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let place = DESCRIPTORS + u64::from(head + index) * 16;
            self.store(place, address);
            self.store(place + 8, length);
            self.store(place + 12, flags);
            self.store(place + 14, head + index + 1);
        }
        self.store(AVAILABLE + 4 + u64::from(self.submitted) * 2, head);
        self.submitted += 1;
        self.store(AVAILABLE + 2, self.submitted);
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
        let header = RequestHeader {
            operation: operation.number().into(),
            flags: 0.into(),
            object: object.into(),
            id: id.into(),
        };
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

    fn used(&self) -> u16 {
        let memory = self.memory.memory();
        memory
            .load(GuestAddress(USED + 2), Ordering::SeqCst)
            .unwrap()
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
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            features: 0,
            guest: "test",
        };
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
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.used() != count {
            assert!(
                Instant::now() < deadline,
                "only {} of {count} completed",
                self.used()
            );
            std::thread::yield_now();
        }
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
    assert_eq!(machine.device.statistics().malformed, 7);
    assert!(machine.record.calls().is_empty());
    machine.submit(Operation::Nop, 0, &[]);
    machine.ring();
    assert_eq!((machine.used(), machine.result(7)), (8, 0));
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
    assert_eq!((machine.used(), machine.result(1)), (2, 0));
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
    assert!(statistics.operations.contains(&("hello", 1)));
    assert_eq!(statistics.completed, 1);
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
    interrupts: AtomicUsize,
}

impl Interrupt for Endless {
    fn signal_queue(&self, _queue: u16) {
        self.interrupts.fetch_add(1, Ordering::SeqCst);
        let memory = self.memory.memory();
        let index = GuestAddress(AVAILABLE + 2);
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
