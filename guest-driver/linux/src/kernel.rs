//! The services that the C half offers (`pvgpu.h`): the only way from Rust into the kernel.
//!
//! The rest of the module calls these; a declaration here must be what the header says.
#![allow(unsafe_code)]

use core::ffi::c_int;

/// `struct pvgpu_session`: one session with the device, which it leads to. It outlives every call that names it.
#[repr(C)]
pub struct Device {
    _opaque: [u8; 0],
}

/// `struct pvgpu_queue`: one request queue; it lives as long as its device.
#[repr(C)]
pub struct Queue {
    _opaque: [u8; 0],
}

/// `enum pvgpu_patience`: what ends a wait before the device does.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum Patience {
    /// Any signal.
    Interruptible,
    /// A fatal signal.
    Killable,
    /// No signal, but some seconds: for what the host has promised to end soon.
    SoonOnly,
    /// A fatal signal, or some seconds, or a device that needs a reset: for a hello.
    Hello,
    /// There is no wait: the request is for whom its answer wakes.
    AtOnce,
}

/// `struct pvgpu_object`: an object that an ioctl gave.
#[repr(C)]
pub struct Object {
    _opaque: [u8; 0],
}

/// `struct pvgpu_message`: one request with its response.
#[repr(C)]
pub struct Message {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    /// Prints a line; `text` need not end with zero.
    pub fn pvgpu_print(text: *const u8, length: usize);
    /// Kernel `BUG()`. Declared as returning, which objtool wants.
    pub fn pvgpu_bug();
    /// Zeroed memory of the kernel, aligned to 16 bytes at least; null when there is none.
    pub fn pvgpu_allocate(length: usize) -> *mut u8;
    /// Copies from the calling process; 0 or `-EFAULT`.
    pub fn pvgpu_copy_from_user(target: *mut u8, source: u64, length: usize) -> c_int;
    /// Copies to the calling process; 0 or `-EFAULT`.
    pub fn pvgpu_copy_to_user(target: u64, source: *const u8, length: usize) -> c_int;
    /// The object behind a file descriptor of the calling process, which is to be of that sort (`enum pvgpu_descriptor`), and
    /// a reference to it in `object`; or `-errno`. May wait.
    pub fn pvgpu_fd_object(
        device: *mut Device,
        fd: c_int,
        descriptor: c_int,
        object: *mut *mut Object,
    ) -> c_int;
    /// Gives a reference back; the last one closes the object.
    pub fn pvgpu_object_put(object: *mut Object);
    /// A new file descriptor of that sort for an object, with flags of `open(2)`, or `-errno`; the object is then closed with
    /// the file, or already.
    pub fn pvgpu_object_fd(
        device: *mut Device,
        object: c_int,
        descriptor: c_int,
        flags: u32,
    ) -> c_int;
    /// The request queue of this processor.
    pub fn pvgpu_queue_here(device: *mut Device) -> *mut Queue;
    /// Rings the queue's doorbell if it has something that the device was not told of.
    pub fn pvgpu_queue_doorbell(queue: *mut Queue);
    /// A message with room for that many zeroed bytes; null when there is no memory.
    pub fn pvgpu_message_new(request: usize, response: usize) -> *mut Message;
    /// Where the request is; its length is what the message was made with.
    pub fn pvgpu_message_request(message: *mut Message) -> *mut u8;
    /// Where the response is.
    pub fn pvgpu_message_response(message: *const Message) -> *const u8;
    /// Bytes of request there is room for.
    pub fn pvgpu_message_room(message: *const Message) -> usize;
    /// Bytes of response that the device has written; 0 until the message is complete.
    pub fn pvgpu_message_written(message: *const Message) -> usize;
    /// Queues the first `length` bytes of the request, once, and waits for room if there is none: 0, `-EINTR`, `-ENOMEM`,
    /// `-ENODEV` when the session has ended, `-ENOSPC` with `AtOnce`, or `-EIO` when `SoonOnly` was too short.
    pub fn pvgpu_message_submit(
        message: *mut Message,
        device: *mut Device,
        queue: *mut Queue,
        length: usize,
        patience: Patience,
    ) -> c_int;
    /// Whether the response is there.
    pub fn pvgpu_message_complete(message: *mut Message) -> bool;
    /// Sleeps until it is: 0, `-EINTR`, `-ENODEV`, or `-EIO` when `SoonOnly` was too short.
    pub fn pvgpu_message_wait(message: *mut Message, patience: Patience) -> c_int;
    /// Gives the message back; it is freed when the device has returned it.
    pub fn pvgpu_message_end(message: *mut Message);
    /// `count` ids that no other call has; gives the one before the first.
    pub fn pvgpu_take_ids(device: *mut Device, count: u32) -> u64;
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub fn pvgpu_now_ns() -> u64;
}
