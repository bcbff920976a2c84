//! The device as a channel. Each call makes one of its own, so calls share nothing in Rust: the queues and their locks are in
//! the C half, and a message belongs to the call that made it until the device has it.
#![allow(unsafe_code)]

use crate::kernel::{self, Device, Message, Patience, Queue};
use crate::process::result;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use pvgpu_guest_driver::channel::{Channel, Slot};
use pvgpu_protocol::Errno;

/// Most bytes of a request and of a response: what a host accepts unless it is told otherwise.
const MESSAGE_MAX: usize = 4 << 20;

/// One call's way to the device. A slot's number is the address of its `struct pvgpu_message`. All requests of a call go
/// through one queue, so that a host begins the first before the one that cancels it.
pub struct Call {
    device: *mut Device,
    queue: *mut Queue,
    patience: Patience,
}

impl Call {
    /// A way to that device for a call that waits so patiently.
    ///
    /// # Safety
    ///
    /// Only in process context; the device must outlive it.
    pub unsafe fn new(device: *mut Device, patience: Patience) -> Self {
        // SAFETY: the device is alive.
        let queue = unsafe { kernel::pvgpu_queue_here(device) };
        Self {
            device,
            queue,
            patience,
        }
    }
}

fn message(slot: &Slot) -> *mut Message {
    with_exposed_provenance_mut(slot.0)
}

fn message_ref(slot: &Slot) -> *const Message {
    with_exposed_provenance(slot.0)
}

// All of these hold: a `Slot` comes from `begin` alone and is used up by `end`, so its message is alive; and the device, by the
// promise of `Call::new`.
impl Channel for Call {
    fn max_message(&self) -> usize {
        MESSAGE_MAX
    }

    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno> {
        if request.max(response) > MESSAGE_MAX {
            return Err(Errno::E2BIG);
        }
        // SAFETY: this is process context.
        let message = unsafe { kernel::pvgpu_message_new(request, response) };
        if message.is_null() {
            return Err(Errno::ENOMEM);
        }
        Ok(Slot(message.expose_provenance()))
    }

    fn request(&mut self, slot: &Slot) -> &mut [u8] {
        let message = message(slot);
        // SAFETY: the message is alive, its request is that long and was zeroed; the device reads it only after `submit`, after
        // which nobody writes it.
        unsafe {
            core::slice::from_raw_parts_mut(
                kernel::pvgpu_message_request(message),
                kernel::pvgpu_message_room(message),
            )
        }
    }

    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno> {
        // SAFETY: the message, the device and the queue are alive, this is process context.
        result(unsafe {
            kernel::pvgpu_message_submit(
                message(slot),
                self.device,
                self.queue,
                length,
                self.patience,
            )
        })
        .map(drop)
    }

    fn doorbell(&mut self) {
        // SAFETY: the queue is alive.
        unsafe { kernel::pvgpu_queue_doorbell(self.queue) }
    }

    fn is_complete(&mut self, slot: &Slot) -> bool {
        // SAFETY: the message is alive.
        unsafe { kernel::pvgpu_message_complete(message(slot)) }
    }

    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        // SAFETY: the message is alive, this is process context.
        result(unsafe { kernel::pvgpu_message_wait(message(slot), self.patience) }).map(drop)
    }

    fn cancelling(&mut self) {
        self.patience = Patience::SoonOnly;
    }

    fn response(&self, slot: &Slot) -> &[u8] {
        let message = message_ref(slot);
        // SAFETY: the message is alive; so many bytes were written, and none before the device has returned it.
        unsafe {
            core::slice::from_raw_parts(
                kernel::pvgpu_message_response(message),
                kernel::pvgpu_message_written(message),
            )
        }
    }

    fn end(&mut self, slot: Slot) {
        // SAFETY: the message is alive, and its slot is used up with this.
        unsafe { kernel::pvgpu_message_end(message(&slot)) }
    }

    fn now_ns(&self) -> u64 {
        // SAFETY: may be called anywhere.
        unsafe { kernel::pvgpu_now_ns() }
    }
}
