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
/// How long a wait takes before it looks whether the device is still alive, and lets the session ask the proxy.
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
    /// Its request queue has at most this many entries.
    QueueSize(u32),
    /// The request queue could not be set up.
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
                "the GPU speaks protocol version {version}, this driver needs {VERSION}: update the VMM"
            ),
            Self::QueueSize(size) => write!(
                f,
                "the GPU's request queue has {size} entries, this driver needs {QUEUE_SIZE}: give the VM larger queues"
            ),
            Self::Queue(error) => write!(
                f,
                "the GPU's request queue: {error}: give the guest more memory"
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
    /// Whether the device has said that it is gone.
    gone: bool,
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
        if config.version.get() < VERSION {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::ProtocolVersion(config.version.get()));
        }
        let size = transport.max_queue_size(REQUEST_QUEUE);
        if size < QUEUE_SIZE as u32 {
            transport.set_status(DeviceStatus::FAILED);
            return Err(ChannelError::QueueSize(size));
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
            gone: false,
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

    fn check_alive(&mut self) -> Result<(), Errno> {
        let status = self.transport.get_status();
        self.gone = status.contains(DeviceStatus::DEVICE_NEEDS_RESET)
            || !status.contains(DeviceStatus::DRIVER_OK);
        match self.gone {
            true => Err(Errno::ENODEV),
            false => Ok(()),
        }
    }

    /// Looks at the queue until the response is there.
    fn poll_until_complete(&mut self, slot: u16) -> Result<(), Errno> {
        // Most responses are there before the clock is ever read.
        let mut check = None;
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
            let now = P::now_ns();
            if now >= *check.get_or_insert(now + ALIVE_CHECK_NS) {
                self.check_alive()?;
                return Err(Errno::ETIMEDOUT);
            }
        }
    }

    /// Sleeps until the response is there.
    fn sleep_until_complete(&mut self, slot: u16) -> Result<(), Errno> {
        let mut check = None;
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
            let now = P::now_ns();
            let check = *check.get_or_insert(now + ALIVE_CHECK_NS);
            if now >= check {
                self.check_alive()?;
                return Err(Errno::ETIMEDOUT);
            }
            P::sleep(interrupts, check - now);
            if P::interrupts() != interrupts {
                self.transport.acknowledge();
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
        if self.gone {
            return Err(Errno::ENODEV);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baremetal::fake::Fake;
    use crate::baremetal::mmio::tests::{offer, window};
    use safe_mmio::UniqueMmioPointer;

    /// Both halves of the feature bits read the same from a window of plain memory: VERSION_1 and RING_EVENT_IDX.
    const OFFERED: u32 = 1 | 1 << 29;

    fn error(features: u32, queue_size: u32, config: [u32; 2]) -> Option<ChannelError> {
        let mut registers = window();
        offer(&mut registers, features, queue_size, config);
        let transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        VirtioChannel::<Fake>::new(transport, Wait::Polling).err()
    }

    #[test]
    fn a_device_that_is_as_it_should_be_is_accepted() {
        assert_eq!(
            error(
                OFFERED,
                128,
                [CONFIG_MAGIC, 0x0001_0000 | u32::from(VERSION)]
            ),
            None
        );
        assert_eq!(
            error(1, 1024, [CONFIG_MAGIC, 0x0004_0000 | u32::from(VERSION)]),
            None
        );
    }

    #[test]
    fn a_device_that_this_driver_cannot_use_is_refused_with_the_reason() {
        let config = [CONFIG_MAGIC, 0x0001_0000 | u32::from(VERSION)];
        assert_eq!(error(1 << 29, 128, config), Some(ChannelError::NotModern));
        assert_eq!(
            error(OFFERED, 64, config),
            Some(ChannelError::QueueSize(64))
        );
        assert_eq!(
            error(OFFERED, 128, [7, config[1]]),
            Some(ChannelError::Magic(7))
        );
        assert_eq!(
            error(OFFERED, 128, [CONFIG_MAGIC, u32::from(VERSION - 1)]),
            Some(ChannelError::ProtocolVersion(VERSION - 1))
        );
    }

    #[test]
    fn the_status_says_which_part_of_the_initialization_was_reached() {
        let mut registers = window();
        offer(
            &mut registers,
            OFFERED,
            128,
            [CONFIG_MAGIC, u32::from(VERSION)],
        );
        let transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        let channel = VirtioChannel::<Fake>::new(transport, Wait::Polling).unwrap();
        let status = channel.transport.get_status();
        assert_eq!(
            status.bits(),
            1 | 2 | 4 | 8,
            "ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK"
        );
    }

    #[test]
    fn a_device_that_needs_a_reset_is_gone() {
        let mut registers = window();
        offer(
            &mut registers,
            OFFERED,
            128,
            [CONFIG_MAGIC, u32::from(VERSION)],
        );
        let transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        let mut channel = VirtioChannel::<Fake>::new(transport, Wait::Polling).unwrap();
        assert_eq!(channel.check_alive(), Ok(()));
        let broken = channel.transport.get_status() | DeviceStatus::DEVICE_NEEDS_RESET;
        channel.transport.set_status(broken);
        assert_eq!(channel.begin(16, 16), Ok(Slot(0)));
        assert_eq!(channel.check_alive(), Err(Errno::ENODEV));
        assert_eq!(channel.begin(16, 16), Err(Errno::ENODEV));
    }
}
