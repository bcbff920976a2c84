//! The device as a channel. Each call makes one of its own, so calls share nothing in Rust: the queues and their locks are in
//! the C half, and a message belongs to the call that made it until the device has it.
#![allow(unsafe_code)]

use crate::kernel::{self, Device, Message};
use crate::process::result;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use pvgpu_guest_driver::channel::{Channel, Slot};
use pvgpu_protocol::Errno;

/// Most bytes of a request and of a response: what the kernel allocates in one piece (`KMALLOC_MAX_SIZE` of amd64), and what a
/// host accepts unless it is told otherwise.
const MESSAGE_MAX: usize = 4 << 20;

/// One call's way to the device. A slot's number is the address of its `struct pvgpu_message`.
pub struct Call {
    device: *mut Device,
}

impl Call {
    /// A way to that device.
    ///
    /// # Safety
    ///
    /// Only in process context; the device must outlive it.
    pub unsafe fn new(device: *mut Device) -> Self {
        Self { device }
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
        // SAFETY: the device is alive.
        let message = unsafe { kernel::pvgpu_message_new(self.device, request, response) };
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
        // SAFETY: the message is alive.
        result(unsafe { kernel::pvgpu_message_submit(message(slot), length) }).map(drop)
    }

    fn doorbell(&mut self) {
        // SAFETY: the device is alive.
        unsafe { kernel::pvgpu_doorbell(self.device) }
    }

    fn is_complete(&mut self, slot: &Slot) -> bool {
        // SAFETY: the message is alive.
        unsafe { kernel::pvgpu_message_complete(message(slot)) }
    }

    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        // SAFETY: the message is alive, this is process context.
        result(unsafe { kernel::pvgpu_message_wait(message(slot), false) }).map(drop)
    }

    fn wait_cancelled(&mut self, slot: &Slot) -> Result<(), Errno> {
        // SAFETY: the message is alive, this is process context.
        result(unsafe { kernel::pvgpu_message_wait(message(slot), true) }).map(drop)
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
