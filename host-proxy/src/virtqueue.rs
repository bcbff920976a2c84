//! One virtqueue of an active device: what request queues and the event queue do alike.
//!
//! Used by [`crate::device`] and [`crate::event`]. It pops descriptor chains, returns them and interrupts the guest; it
//! never looks into a chain. A ring that makes no sense is left alone until the guest resets the device, which it is told.

use crate::logging::guest_log;
use crate::statistics::Counters;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestAddressSpace;

/// How the device interrupts its guest.
pub trait Interrupt: Send + Sync {
    /// Responses or events are in the used ring of that queue.
    fn signal_queue(&self, queue: u16);
    /// The device's configuration or status has changed.
    fn signal_config(&self);
}

/// What the queues of a device have in common.
#[derive(Clone)]
pub(crate) struct Shared<M> {
    pub(crate) memory: M,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) counters: Arc<Counters>,
    /// Set when the guest has broken a ring: the device needs a reset.
    pub(crate) broken: Arc<AtomicBool>,
    /// Set at reset: guest memory is no longer the device's.
    pub(crate) closing: Arc<AtomicBool>,
    /// Set by the VMM that wants its threads back.
    pub(crate) off: Arc<AtomicBool>,
}

/// A queue that the guest has set up, or has left alone.
pub(crate) struct Virtqueue<M> {
    pub(crate) index: u16,
    pub(crate) shared: Shared<M>,
    queue: Mutex<Queue>,
    /// The guest has not set the queue up, or has broken its ring: left alone until the next activation.
    ignored: AtomicBool,
}

impl<M: GuestAddressSpace> Virtqueue<M> {
    pub(crate) fn new(index: u16, queue: Queue, shared: Shared<M>) -> Self {
        let ignored = AtomicBool::new(!queue.ready());
        Self {
            index,
            shared,
            queue: Mutex::new(queue),
            ignored,
        }
    }

    /// The guest's memory as it is now.
    pub(crate) fn memory(&self) -> M::T {
        self.shared.memory.memory()
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has set it up.
    pub(crate) fn ready(&self) -> bool {
        self.lock().ready()
    }

    /// The guest has set it up after all.
    pub(crate) fn start(&self, queue: Queue) {
        *self.lock() = queue;
        self.ignored.store(false, Ordering::Relaxed);
    }

    /// How far it has come in the available ring.
    pub(crate) fn next_available(&self) -> u16 {
        self.lock().next_avail()
    }

    /// Whether the device is being reset.
    pub(crate) fn closing(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire)
    }

    /// Whether a thread that the guest could keep busy must come back.
    pub(crate) fn ends(&self) -> bool {
        self.closing() || self.shared.off.load(Ordering::Relaxed)
    }

    /// Asks the guest for doorbells, or not to ring any. Returns whether chains are there already.
    pub(crate) fn set_notification(&self, enable: bool) -> bool {
        if self.ignored.load(Ordering::Relaxed) {
            return false;
        }
        let memory = self.memory();
        let mut queue = self.lock();
        match enable {
            true => queue.enable_notification(&*memory).unwrap_or(false),
            false => queue.disable_notification(&*memory).is_err(),
        }
    }

    /// How many chains are there now. A guest that says that there are more than its ring can hold has broken it.
    pub(crate) fn available(&self, memory: &M::M) -> u16 {
        if self.ignored.load(Ordering::Relaxed) {
            return 0;
        }
        let available = {
            let queue = self.lock();
            let end = queue.avail_idx(memory, Ordering::Acquire);
            end.ok()
                .map(|end| end.0.wrapping_sub(queue.next_avail()))
                .filter(|available| *available <= queue.size())
        };
        available.unwrap_or_else(|| {
            self.ignore();
            0
        })
    }

    /// Leaves a queue alone whose ring makes no sense: its chains could never be told apart again. The guest is told that the
    /// device needs a reset (virtio 1.2, section 2.1.1).
    pub(crate) fn ignore(&self) {
        if !self.ignored.swap(true, Ordering::Relaxed) {
            self.counters().malformed.fetch_add(1, Ordering::Relaxed);
            guest_log!(
                warn,
                "queue {}: the guest has broken its ring, so it is ignored until the guest resets the device",
                self.index
            );
            self.shared.broken.store(true, Ordering::Release);
            if !self.closing() {
                self.shared.interrupt.signal_config();
            }
        }
    }

    /// The next chain. Ask [`Virtqueue::available`] before.
    pub(crate) fn pop<'a>(&self, memory: &'a M::M) -> Option<DescriptorChain<&'a M::M>> {
        self.lock().pop_descriptor_chain(memory)
    }

    /// Returns a chain that means nothing.
    pub(crate) fn discard(&self, memory: &M::M, head: u16) {
        self.counters().malformed.fetch_add(1, Ordering::Relaxed);
        self.add_used(memory, head, 0);
        self.interrupt(memory);
    }

    /// Puts a chain into the used ring, unless the device is being reset.
    pub(crate) fn add_used(&self, memory: &M::M, head: u16, length: u32) {
        let mut queue = self.lock();
        if self.closing() {
            return;
        }
        // The guest may name a head that is no descriptor; the queue would log each of them.
        if head >= queue.size() || queue.add_used(memory, head, length).is_err() {
            self.counters().malformed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Interrupts the guest if it has asked for that.
    pub(crate) fn interrupt(&self, memory: &M::M) {
        fence(Ordering::SeqCst);
        let wanted = self.lock().needs_notification(memory).unwrap_or(true);
        if wanted && !self.closing() {
            self.counters().interrupts.fetch_add(1, Ordering::Relaxed);
            self.shared.interrupt.signal_queue(self.index);
        }
    }
}
