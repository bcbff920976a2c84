//! How requests reach the proxy and responses come back.
//!
//! [`crate::session`] uses a [`Channel`]; the bare-metal port ([`crate::baremetal`]), the Linux module and the
//! in-process channel of the tests implement it. A channel moves bytes and knows no operation.

use pvgpu_protocol::Errno;

/// Names a message buffer pair that a channel has lent: one request and its response.
///
/// The number is the channel's own. A slot must go back through [`Channel::end`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a slot that is not ended stays taken"]
pub struct Slot(pub usize);

/// A way to carry requests to the proxy and responses back. Requests complete in any order.
pub trait Channel {
    /// Most bytes of one request and of one response.
    fn max_message(&self) -> usize;

    /// Lends a slot with room for that many request and response bytes. `EAGAIN` when all are in flight, `E2BIG`
    /// above [`Channel::max_message`], `ENODEV` when the device is known to be gone.
    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno>;

    /// The slot's request buffer, of the length asked for; its contents are undefined.
    fn request(&mut self, slot: &Slot) -> &mut [u8];

    /// Makes the first `length` bytes of the request available to the device, without ringing the doorbell.
    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno>;

    /// Rings the doorbell if the device wants to be told. One doorbell covers all submitted requests.
    fn doorbell(&mut self);

    /// Whether the slot's response is there. Never waits.
    fn is_complete(&mut self, slot: &Slot) -> bool;

    /// Waits until the slot's response is there. `EINTR` when the wait was interrupted; the request is then still
    /// in flight. So it is with `ETIMEDOUT`, which says after about a second that the host may have lost it. `ENODEV` when
    /// the device is gone.
    fn wait(&mut self, slot: &Slot) -> Result<(), Errno>;

    /// What comes now cancels a request whose wait was interrupted, and waits for its end, which will be soon: what
    /// interrupted that wait must not end these.
    fn cancelling(&mut self) {}

    /// The bytes that the device has written.
    fn response(&self, slot: &Slot) -> &[u8];

    /// Gives a slot back. One that is in flight stays taken until the device, which may still write to it, returns it.
    fn end(&mut self, slot: Slot);

    /// `CLOCK_MONOTONIC` of this guest in nanoseconds.
    fn now_ns(&self) -> u64;
}
