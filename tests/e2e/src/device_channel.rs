//! A [`Channel`] through the virtqueue of a [`Device`] in this process, in made-up guest memory: all of pvgpu's host side but the
//! VM.
//!
//! For tests that end devices in the midst of something: a request that is not waited for is left to the device. The guest's
//! side is as simple as can be: each slot has two descriptors and a place in guest memory for ever.

use pvgpu_guest_driver::channel::{Channel, Slot};
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{ActivateError, Device, DeviceConfig, Interrupt};
use pvgpu_host_proxy::driver::HostDriver;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
};

/// Slots; each takes two descriptors.
const SLOTS: u16 = 64;
const QUEUE_SIZE: u16 = SLOTS * 2;
/// Most bytes of a message.
const MESSAGE: usize = 16 << 10;
/// Where the parts of a queue lie, from its start; the event queue starts at [`EVENT_QUEUE`].
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const EVENT_QUEUE: u64 = 0x4000;
/// Where the event queue's one buffer lies: events beyond it are kept by the device.
const EVENT: u64 = 0x8000;
/// Pages that the channel does not use, up to the slots.
pub const SPARE: u64 = 0xc000;
/// Where the slots begin: of each the request, then the response.
const MESSAGES: u64 = 0x1_0000;
const MEMORY: usize = MESSAGES as usize + SLOTS as usize * MESSAGE * 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const VERSION_1: u64 = 1 << 32;
/// Room for some buffers.
const APERTURE: u64 = 1 << 20;
/// How long a response may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device and the memory of its guest.
pub struct DeviceHost {
    device: Device,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

/// An interrupt that nobody waits for.
struct Ignored;

impl Interrupt for Ignored {
    fn signal_queue(&self, _: u16) {}
    fn signal_config(&self) {}
}

impl DeviceHost {
    /// A device with one request queue that is not active yet.
    pub fn new(driver: Arc<dyn HostDriver>, config: DeviceConfig) -> io::Result<Self> {
        Self::with_aperture(driver, config, true)
    }

    /// As [`DeviceHost::new`], with or without an aperture.
    pub fn with_aperture(
        driver: Arc<dyn HostDriver>,
        config: DeviceConfig,
        aperture: bool,
    ) -> io::Result<Self> {
        let config = DeviceConfig {
            queue_size: QUEUE_SIZE,
            request_queues: 1,
            ..config
        };
        let device = Device::new(driver, reserved(aperture)?, config)?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]);
        let memory = GuestMemoryAtomic::new(memory.map_err(io::Error::other)?);
        Ok(Self { device, memory })
    }

    /// Gives the device an aperture or takes it away, as a front end does that comes or goes. The session ends.
    pub fn set_aperture(&mut self, aperture: bool) -> io::Result<()> {
        self.device.set_aperture(reserved(aperture)?);
        Ok(())
    }

    /// Starts a new session, after the end of the one before.
    pub fn activate(&mut self) -> Result<DeviceChannel<'_>, ActivateError> {
        self.device.reset();
        let memory = self.memory.memory();
        memory
            .write_slice(&[0; MESSAGES as usize], GuestAddress(0))
            .map_err(io::Error::other)?;
        let queues = [0, EVENT_QUEUE].map(queue_at).into();
        self.device
            .activate(self.memory.clone(), VERSION_1, queues, Arc::new(Ignored))?;
        let channel = DeviceChannel {
            host: self,
            begun: HashMap::new(),
            done: HashMap::new(),
            submitted: 0,
            start: Instant::now(),
        };
        channel.descriptor(EVENT_QUEUE, 0, (EVENT, 16, WRITE));
        channel.store(EVENT_QUEUE + AVAILABLE + 2, 1u16);
        Ok(channel)
    }

    /// Ends the session, whatever it is at.
    pub fn reset(&mut self) {
        self.device.reset();
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

fn reserved(aperture: bool) -> io::Result<Option<Aperture>> {
    aperture.then(|| Aperture::reserve(APERTURE)).transpose()
}

fn queue_at(base: u64) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).expect("a power of two");
    // All of them lie below 4 GiB.
    let set = |part: u64| Some((base + part) as u32);
    queue.set_desc_table_address(set(DESCRIPTORS), Some(0));
    queue.set_avail_ring_address(set(AVAILABLE), Some(0));
    queue.set_used_ring_address(set(USED), Some(0));
    queue.set_ready(true);
    queue
}

/// A session of the device.
pub struct DeviceChannel<'a> {
    host: &'a DeviceHost,
    /// Requests that are being written.
    begun: HashMap<usize, (Vec<u8>, usize)>,
    /// Responses that have come.
    done: HashMap<usize, Vec<u8>>,
    submitted: u16,
    start: Instant,
}

impl DeviceChannel<'_> {
    fn store<T: AtomicAccess>(&self, address: u64, value: T) {
        let memory = self.host.memory.memory();
        let stored = memory.store(value, GuestAddress(address), Ordering::SeqCst);
        stored.expect("inside of guest memory");
    }

    fn load<T: AtomicAccess>(&self, address: u64) -> T {
        let memory = self.host.memory.memory();
        let loaded = memory.load(GuestAddress(address), Ordering::SeqCst);
        loaded.expect("inside of guest memory")
    }

    fn descriptor(&self, queue: u64, index: u16, (address, length, flags): (u64, usize, u16)) {
        let place = queue + DESCRIPTORS + u64::from(index) * 16;
        self.store(place, address);
        self.store(place + 8, length as u32);
        self.store(place + 12, flags);
        self.store(place + 14, index + 1);
    }

    /// Where a slot's request and its response lie.
    fn places(slot: usize) -> (u64, u64) {
        let request = MESSAGES + (slot * MESSAGE * 2) as u64;
        (request, request + MESSAGE as u64)
    }
}

impl Channel for DeviceChannel<'_> {
    fn max_message(&self) -> usize {
        MESSAGE
    }

    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno> {
        if request.max(response) > MESSAGE {
            return Err(Errno::E2BIG);
        }
        // A slot is used once: some requests are never answered before the end.
        let slot = usize::from(self.submitted) + self.begun.len();
        if slot >= usize::from(SLOTS) {
            return Err(Errno::EAGAIN);
        }
        self.begun.insert(slot, (vec![0; request], response));
        Ok(Slot(slot))
    }

    fn request(&mut self, slot: &Slot) -> &mut [u8] {
        &mut self
            .begun
            .get_mut(&slot.0)
            .expect("a slot that was begun")
            .0
    }

    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno> {
        let (request, room) = self.begun.remove(&slot.0).ok_or(Errno::EINVAL)?;
        let (to, from) = Self::places(slot.0);
        let memory = self.host.memory.memory();
        let written = memory.write_slice(&request[..length], GuestAddress(to));
        written.map_err(|_| Errno::EFAULT)?;
        let head = slot.0 as u16 * 2;
        self.descriptor(0, head, (to, length, NEXT));
        self.descriptor(0, head + 1, (from, room, WRITE));
        self.store(AVAILABLE + 4 + u64::from(self.submitted) * 2, head);
        self.submitted += 1;
        self.store(AVAILABLE + 2, self.submitted);
        Ok(())
    }

    fn doorbell(&mut self) {
        self.host.device.notify(0);
    }

    fn is_complete(&mut self, slot: &Slot) -> bool {
        for index in 0..self.load::<u16>(USED + 2) {
            let used = USED + 4 + u64::from(index) * 8;
            let done = self.load::<u32>(used) as usize / 2;
            if self.done.contains_key(&done) {
                continue;
            }
            let mut response = vec![0; self.load::<u32>(used + 4) as usize];
            let memory = self.host.memory.memory();
            let read = memory.read_slice(&mut response, GuestAddress(Self::places(done).1));
            read.expect("inside of guest memory");
            self.done.insert(done, response);
        }
        self.done.contains_key(&slot.0)
    }

    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_complete(slot) {
            if Instant::now() >= deadline {
                return Err(Errno::EIO);
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn response(&self, slot: &Slot) -> &[u8] {
        self.done
            .get(&slot.0)
            .map(Vec::as_slice)
            .unwrap_or_default()
    }

    fn end(&mut self, slot: Slot) {
        // One that was never submitted is free again.
        self.begun.remove(&slot.0);
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
