//! The event queue: what a guest watches is reported in buffers that it has put there.
//!
//! [`crate::session`] hands each event over as a [`Pending`], from the thread that waited for it; [`crate::device`] passes
//! the guest's doorbell on. Events without a buffer are kept, in order. Each keeps the id of its watch booked until the
//! guest can see it, so a guest that gives no buffers has no more of them than requests in flight. An event is never
//! written after the device was reset.

use crate::descriptor::copy_in;
use crate::session::{Pending, Reporter};
use crate::virtqueue::Virtqueue;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

/// The event queue of an active device.
pub(crate) struct EventQueue<M> {
    ring: Virtqueue<M>,
    /// Events that the guest has given no buffer for. Whoever delivers holds the lock, so that none overtakes another.
    kept: Mutex<VecDeque<Pending>>,
}

impl<M: GuestAddressSpace + Send + Sync> Reporter for EventQueue<M> {
    fn is_there(&self) -> bool {
        self.ring.ready()
    }

    /// Reports an event as soon as there is a buffer for it.
    fn report(&self, event: Pending) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(event);
        self.deliver(&mut kept);
    }
}

impl<M: GuestAddressSpace> EventQueue<M> {
    /// The guest is asked for doorbells only when an event needs a buffer.
    pub(crate) fn new(ring: Virtqueue<M>) -> Self {
        ring.set_notification(false);
        Self {
            ring,
            kept: Mutex::default(),
        }
    }

    pub(crate) fn ring(&self) -> &Virtqueue<M> {
        &self.ring
    }

    /// The guest has rung the doorbell: there may be buffers for what is kept.
    pub(crate) fn notified(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        self.deliver(&mut kept);
    }

    fn deliver(&self, kept: &mut VecDeque<Pending>) {
        let mut used = false;
        while !kept.is_empty() && !self.ring.ends() {
            match self.fill_buffer(kept) {
                Some(delivered) => used |= delivered,
                // Asking for doorbells tells whether there is a buffer meanwhile.
                None if self.ring.set_notification(true) => {}
                None => break,
            }
        }
        if kept.is_empty() {
            self.ring.set_notification(false);
        }
        if used {
            self.ring.interrupt(&self.ring.memory());
        }
    }

    /// Writes the first event into the next buffer; whether that was one, `None` when there is none.
    fn fill_buffer(&self, kept: &mut VecDeque<Pending>) -> Option<bool> {
        let memory = self.ring.memory();
        if self.ring.available(&memory) == 0 {
            return None;
        }
        let Some(chain) = self.ring.pop(&memory) else {
            self.ring.ignore();
            return None;
        };
        let event = kept.front()?.event();
        let bytes = event.as_bytes();
        let head = chain.head_index();
        // Readable bytes have no place here.
        let place = copy_in(chain, &mut Vec::new(), 0).ok();
        let written = place.filter(|(writable, _)| writable.write(&*memory, 0, bytes).is_ok());
        if written.is_none() {
            self.ring.discard(&memory, head);
            return Some(false);
        }
        self.ring.counters().events.fetch_add(1, Ordering::Relaxed);
        // Its id is free again before the guest can see it.
        drop(kept.pop_front());
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        self.ring.add_used(&memory, head, length);
        Some(true)
    }
}
