//! A device that cannot be activated leaves nothing behind. Alone in its process: it changes the limit on memory.

#![allow(unsafe_code)]

use pvgpu_host_proxy::device::{ActivateError, Device, DeviceConfig, Doorbell, Interrupt};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use std::fs;
use std::sync::Arc;
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// Request queues of the device.
const QUEUES: u16 = 64;

struct Nobody;

impl Interrupt for Nobody {
    fn signal_queue(&self, _queue: u16) {}
    fn signal_config(&self) {}
}

/// Lets this process have so many bytes of address space only; returns what it was.
fn limit_memory(below: u64) -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is an rlimit that these calls may write and read.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_AS, &raw mut limit), 0);
        let before = limit.rlim_cur;
        limit.rlim_cur = below;
        assert_eq!(libc::setrlimit(libc::RLIMIT_AS, &raw const limit), 0);
        before
    }
}

fn queue_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.starts_with("pvgpu-queue")).count()
}

#[test]
fn an_activation_that_fails_half_way_leaves_no_thread_behind() {
    let config = DeviceConfig {
        request_queues: QUEUES,
        doorbell: Doorbell::Worker,
        ..DeviceConfig::default()
    };
    let driver = SoftDriver::new(SoftConfig::default()).unwrap();
    let mut device = Device::new(Arc::new(driver), None, config).unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    let queue = |base: u64, ready| {
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(16);
        queue
            .try_set_desc_table_address(GuestAddress(base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(base + 0x1000))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(base + 0x2000))
            .unwrap();
        queue.set_ready(ready);
        queue
    };
    let queues = (0..=QUEUES).map(|index| queue(0x4000 * u64::from(index), index < QUEUES));
    let queues = queues.collect();

    // Room for some more stacks of 2 MiB: enough for the first queues' threads, not for all.
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    let before = limit_memory(pages * 4096 + (10 << 20));
    let activated = device.activate(
        GuestMemoryAtomic::new(memory),
        1 << 32,
        queues,
        Arc::new(Nobody),
    );
    limit_memory(before);

    assert!(
        matches!(activated, Err(ActivateError::Thread(_))),
        "{activated:?}"
    );
    // A thread names itself a moment after its start.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(queue_threads(), 0);
}
