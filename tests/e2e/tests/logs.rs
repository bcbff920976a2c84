//! What a guest can have written to the host's log: a bounded number of lines, however often it provokes them.

use log::{Level, LevelFilter, Log, Metadata, Record};
use pvgpu_e2e::gate::GateDriver;
use pvgpu_host_proxy::device::{ActivateError, Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_host_proxy::logging::{LINES, Limited, PERIOD};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

const PROVOCATIONS: u32 = 100_000;
const VERSION_1: u64 = 1 << 32;
const SIZE: u16 = 16;

/// Counts lines.
struct Count(AtomicU32);

impl Log for Count {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, _: &Record<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn flush(&self) {}
}

static OURS: Count = Count(AtomicU32::new(0));
static THEIRS: Count = Count(AtomicU32::new(0));
static LIMITED: Count = Count(AtomicU32::new(0));

/// Counts the lines of the proxy and of the libraries below it as they come, then those that pass the limit.
struct Tap(Limited<&'static Count>);

impl Log for Tap {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        assert!(record.level() <= Level::Warn, "{}", record.args());
        match record.target().starts_with("pvgpu_host_proxy") {
            true => OURS.log(record),
            false => THEIRS.log(record),
        }
        self.0.log(record);
    }

    fn flush(&self) {}
}

static TAP: Tap = Tap(Limited::new(&LIMITED, LINES));

struct Silent;

impl Interrupt for Silent {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
}

/// Activates the device with a request queue whose descriptors lie at `descriptors`, and an event queue of its own.
fn activate(
    device: &mut Device,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    descriptors: u32,
) -> Result<(), ActivateError> {
    let queue = |ready| {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.set_desc_table_address(Some(descriptors), Some(0));
        queue.set_avail_ring_address(Some(0x1000), Some(0));
        queue.set_used_ring_address(Some(0x2000), Some(0));
        queue.set_ready(ready);
        queue
    };
    let queues = vec![queue(true), queue(false)];
    device.activate(memory.clone(), VERSION_1, queues, Arc::new(Silent))
}

#[test]
fn a_guest_that_provokes_log_lines_100_000_times_has_few_of_them_written() {
    log::set_logger(&TAP).unwrap();
    log::set_max_level(LevelFilter::Warn);
    let start = Instant::now();
    let config = DeviceConfig {
        queue_size: SIZE,
        doorbell: Doorbell::Inline,
        ..DeviceConfig::default()
    };
    let mut device = Device::new(Arc::new(GateDriver::default()), None, config).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
    // More chains are available than the ring can hold: the proxy warns, once per activation.
    memory.write_obj(SIZE + 1, GuestAddress(0x1002)).unwrap();
    let memory = GuestMemoryAtomic::new(memory);
    for _ in 0..PROVOCATIONS {
        activate(&mut device, &memory, 0).unwrap();
        device.notify(0);
    }
    assert_eq!(device.statistics().malformed, u64::from(PROVOCATIONS));
    let periods = || 1 + u32::try_from(start.elapsed().as_secs() / PERIOD.as_secs()).unwrap();
    let ours = OURS.0.load(Ordering::Relaxed);
    assert!(
        ours >= LINES && ours <= (LINES + 1) * periods(),
        "{ours} lines"
    );

    // Descriptors outside of memory: the queue's library reports each, and only a limited logger helps.
    for _ in 0..PROVOCATIONS {
        let refused = activate(&mut device, &memory, 0x10_0000);
        assert!(matches!(refused, Err(ActivateError::Memory(0))));
    }
    let theirs = THEIRS.0.load(Ordering::Relaxed);
    assert!(theirs >= PROVOCATIONS, "the library says nothing any more");
    let written = LIMITED.0.load(Ordering::Relaxed);
    assert!(written <= (LINES + 1) * periods(), "{written} lines");
}
