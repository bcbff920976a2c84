//! The [`Channel`] of a bare-metal guest: the device behind virtio-mmio, one request queue of it, and a way to wait.
//!
//! A session talks through it. It negotiates, moves bytes and waits; what the bytes mean is none of its business.

use core::fmt;

use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::{APERTURE_REGION, CONFIG_MAGIC, ConfigSpace, VERSION};
use virtio_drivers::device::common::Feature;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::channel::{Channel, Slot};

use super::mmio::{MmioTransport, SharedMemory};
use super::queue::{MESSAGE_MAX, Platform, QUEUE_SIZE, RequestQueue};

/// The virtio features that the guest driver can use.
const FEATURES: Feature = Feature::VERSION_1.union(Feature::RING_EVENT_IDX);
/// The request queue that it uses: the machine has one processor.
const REQUEST_QUEUE: u16 = 0;
/// How often a wait looks whether the device is still alive.
const ALIVE_CHECK_NS: u64 = 1_000_000_000;
/// Looks at the queue between two looks at the clock while polling.
const POLLS_PER_CLOCK: u32 = 1024;

/// How to wait for a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Look at the queue again and again; the device is asked not to interrupt.
    Polling,
    /// Sleep until the device interrupts.
    Interrupts,
}

/// Why there is no channel to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelError {
    /// It does not offer virtio 1.
    NotModern,
    /// It does not accept the features that both sides know.
    FeaturesRefused,
    /// Its configuration space starts with this instead of the magic.
    Magic(u32),
    /// It speaks this version of the protocol.
    ProtocolVersion(u16),
    /// A queue could not be set up.
    Queue(virtio_drivers::Error),
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotModern => write!(f, "the GPU does not offer virtio 1: use a newer VMM"),
            Self::FeaturesRefused => write!(
                f,
                "the GPU refuses the virtio features it offered: use a newer VMM"
            ),
            Self::Magic(magic) => {
                write!(
                    f,
                    "device id 63 is not a pvgpu device here (magic {magic:#x}): give the VM a pvgpu GPU"
                )
            }
            Self::ProtocolVersion(version) => write!(
                f,
                "the GPU speaks protocol version {version}, this driver {VERSION}: update the older of the two"
            ),
            Self::Queue(error) => write!(
                f,
                "request queue: {error}: the device needs queues of at least {QUEUE_SIZE} entries, the guest memory for them"
            ),
        }
    }
}

impl core::error::Error for ChannelError {}

impl From<virtio_drivers::Error> for ChannelError {
    fn from(error: virtio_drivers::Error) -> Self {
        Self::Queue(error)
    }
}

/// The channel.
#[derive(Debug)]
pub struct VirtioChannel<'a, P: Platform> {
    /// Before the queue: dropping it resets the device, which then no longer uses the queue's memory.
    transport: MmioTransport<'a>,
    queue: RequestQueue<P>,
    wait: Wait,
    aperture: Option<SharedMemory>,
    request_queues: u16,
    doorbells: u64,
}

impl<'a, P: Platform> VirtioChannel<'a, P> {
    /// Initializes the device (virtio 1.2, section 3.1) and its first request queue.
    pub fn new(mut transport: MmioTransport<'a>, wait: Wait) -> Result<Self, ChannelError> {
        let features = transport.begin_init(FEATURES);
        if !features.contains(Feature::VERSION_1) {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::NotModern);
        }
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::FeaturesRefused);
        }
        let config: ConfigSpace = transport.read_config_space(0)?;
        if config.magic.get() != CONFIG_MAGIC {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::Magic(config.magic.get()));
        }
        if config.version.get() != VERSION {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::ProtocolVersion(config.version.get()));
        }
        let aperture = transport.shared_memory(APERTURE_REGION);
        let event_index = features.contains(Feature::RING_EVENT_IDX);
        let queue = RequestQueue::new(&mut transport, REQUEST_QUEUE, event_index)?;
        let mut channel = Self {
            transport,
            queue,
            wait,
            aperture,
            request_queues: config.request_queues.get(),
            doorbells: 0,
        };
        channel.set_wait(wait);
        channel.transport.finish_init();
        Ok(channel)
    }

    /// How it waits from now on.
    pub fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
        self.queue.wants_no_interrupt(true);
    }

    /// The aperture, where the device has one.
    pub fn aperture(&self) -> Option<SharedMemory> {
        self.aperture
    }

    /// Request queues that the device has.
    pub fn request_queues(&self) -> u16 {
        self.request_queues
    }

    /// Doorbells rung so far.
    pub fn doorbells(&self) -> u64 {
        self.doorbells
    }

    fn check_alive(&self) -> Result<(), Errno> {
        let status = self.transport.get_status();
        if status.contains(DeviceStatus::DEVICE_NEEDS_RESET)
            || !status.contains(DeviceStatus::DRIVER_OK)
        {
            return Err(Errno::ENODEV);
        }
        Ok(())
    }

    /// Looks at the queue until the response is there.
    fn poll_until_complete(&mut self, slot: u16) -> Result<(), Errno> {
        let mut check = P::now_ns() + ALIVE_CHECK_NS;
        loop {
            for _ in 0..POLLS_PER_CLOCK {
                self.queue.take();
                if self.queue.is_complete(slot) {
                    self.queue.wants_no_interrupt(false);
                    return Ok(());
                }
                core::hint::spin_loop();
            }
            if self.queue.is_broken() {
                return Err(Errno::EPROTO);
            }
            if P::now_ns() >= check {
                self.check_alive()?;
                check = P::now_ns() + ALIVE_CHECK_NS;
            }
        }
    }

    /// Sleeps until the response is there.
    fn sleep_until_complete(&mut self, slot: u16) -> Result<(), Errno> {
        loop {
            let interrupts = P::interrupts();
            self.queue.take();
            if self.queue.is_complete(slot) {
                return Ok(());
            }
            if self.queue.is_broken() {
                return Err(Errno::EPROTO);
            }
            if !self.queue.wants_interrupt() {
                continue;
            }
            P::sleep(interrupts, ALIVE_CHECK_NS);
            if P::interrupts() == interrupts {
                self.check_alive()?;
            } else {
                self.transport.acknowledge_used();
            }
        }
    }
}

/// The number of a slot on the queue; one that no slot has for a number that is none.
fn number(slot: &Slot) -> u16 {
    u16::try_from(slot.0).unwrap_or(u16::MAX)
}

impl<P: Platform> Channel for VirtioChannel<'_, P> {
    fn max_message(&self) -> usize {
        MESSAGE_MAX
    }

    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno> {
        let slot = match self.queue.begin(request, response) {
            Err(Errno::EAGAIN) => {
                // Slots that were ended in flight may have come back.
                self.queue.take();
                self.queue.begin(request, response)
            }
            other => other,
        };
        slot.map(|slot| Slot(usize::from(slot)))
    }

    fn request(&mut self, slot: &Slot) -> &mut [u8] {
        self.queue.request(number(slot))
    }

    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno> {
        self.queue.submit(number(slot), length)
    }

    fn doorbell(&mut self) {
        if self.queue.needs_doorbell() {
            self.doorbells += 1;
            self.transport.notify(self.queue.index());
        }
    }

    fn is_complete(&mut self, slot: &Slot) -> bool {
        self.queue.take();
        self.queue.is_complete(number(slot))
    }

    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        match self.wait {
            Wait::Polling => self.poll_until_complete(number(slot)),
            Wait::Interrupts => self.sleep_until_complete(number(slot)),
        }
    }

    fn response(&self, slot: &Slot) -> &[u8] {
        self.queue.response(number(slot))
    }

    fn end(&mut self, slot: Slot) {
        self.queue.end(number(&slot));
    }

    fn now_ns(&self) -> u64 {
        P::now_ns()
    }
}
