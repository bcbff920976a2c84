//! What the C half calls (`pvgpu.h`): one function per operation of a device file. Each makes the call's own session on the
//! device's connection and gives 0 or more, or `-errno`.
#![allow(unsafe_code)]

use crate::device::Call;
use crate::kernel::{self, Device, Patience};
use crate::process::Process;
use core::ffi::{c_char, c_int};
use pvgpu_guest_driver::constants::Constants;
use pvgpu_guest_driver::marshal::Caller;
use pvgpu_guest_driver::session::{Host, Mapping, ObjectId, Session};
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::PageRange;

/// Requests of one call: the operation itself, and its cancellation.
const IDS: u32 = 2;

fn number(result: Result<c_int, Errno>) -> c_int {
    result.unwrap_or_else(|errno| -errno.number())
}

/// Events as a result, of which the sign says that it is none.
fn positive(events: u32) -> c_int {
    (events & c_int::MAX.cast_unsigned()).cast_signed()
}

/// `struct pvgpu_host`: what all calls on one device share.
pub struct Shared {
    host: Host,
    constants: Constants,
}

/// The session of one call. As on the kernel's own nodes, no signal but one that kills interrupts other calls than ioctls; and
/// none those that give something back, which would be lost.
///
/// # Safety
///
/// As for [`Call::new`]; and `host` must be what [`pvgpu_rust_connect`] gave for this device.
unsafe fn session<'a>(
    device: *mut Device,
    host: *const Shared,
    patience: Patience,
) -> Session<'a, Call> {
    // SAFETY: the caller's promise; nobody writes what is shared but through its atomics.
    let (shared, channel, first) = unsafe {
        let first = kernel::pvgpu_take_ids(device, IDS);
        (&*host, Call::new(device, patience), first)
    };
    Session::share(channel, shared.host, first).with_constants(&shared.constants)
}

/// `struct pvgpu_identity`: the host driver, as the node is to report it.
#[repr(C)]
pub struct Identity {
    name: [c_char; 33],
    version: [c_int; 3],
    pages: bool,
}

/// Says hello. Gives what every other function here needs (freed with `kfree`), or null with the errno in `error`.
///
/// # Safety
///
/// Process context, with the device's queues running; `identity` and `error` are written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_connect(
    device: *mut Device,
    identity: &mut Identity,
    error: &mut c_int,
) -> *mut Shared {
    // SAFETY: the caller's promise.
    let session = match Session::connect(unsafe { Call::new(device, Patience::Hello) }, "linux")
    {
        Ok(session) => session,
        Err(errno) => {
            *error = -errno.number();
            return core::ptr::null_mut();
        }
    };
    let host = session.host();
    identity.name = [0; 33];
    for (to, from) in identity.name.iter_mut().zip(host.driver.bytes()) {
        *to = from.cast_signed();
    }
    identity.version = host.driver_version;
    identity.pages = host.maps_pages;
    // SAFETY: room for a `Shared`, aligned to 16 bytes, or null; zeroed, which is what an empty `Constants` is.
    unsafe {
        let memory: *mut Shared = kernel::pvgpu_allocate(size_of::<Shared>()).cast();
        *error = -Errno::ENOMEM.number();
        if !memory.is_null() {
            (&raw mut (*memory).host).write(*host);
        }
        memory
    }
}

/// Opens the device with flags of `wire::open`; gives the file's object.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_open(
    device: *mut Device,
    host: *const Shared,
    flags: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::Killable) };
    number(session.open(flags).map(|object| object.0))
}

/// Closes a file or another object.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_close(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::SoonOnly) };
    number(session.close(ObjectId(object)).map(|()| 0))
}

/// Performs an ioctl of the calling process, with its argument at `address` there.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_ioctl(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    command: u32,
    address: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let (mut session, mut process) = unsafe {
        (
            session(device, host, Patience::Interruptible),
            Process::current(device),
        )
    };
    number(session.ioctl(ObjectId(object), command, address, &mut process))
}

/// Maps a range of an object; `mapping` is then where it is in the aperture.
///
/// # Safety
///
/// As for `session`; `aperture_offset` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_map(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    offset: u64,
    length: u64,
    protection: u32,
    aperture_offset: &mut u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::Killable) };
    let mapped = session.map(ObjectId(object), offset, length, protection);
    number(mapped.and_then(|mapping| {
        let end = mapping.aperture_offset.checked_add(length);
        if mapping.length != length || end.is_none_or(|end| end > session.host().aperture) {
            return Err(Errno::EPROTO);
        }
        *aperture_offset = mapping.aperture_offset;
        Ok(0)
    }))
}

/// Maps a range of an object with pages of this kernel, `count` ranges of which are as long as it is; `number` is then what
/// [`pvgpu_rust_unmap`] takes. `-EIO` when nobody knows whether it is mapped.
///
/// # Safety
///
/// As for `session`; `ranges` are so many, and `number` is written. The host writes to the pages until they are unmapped or the
/// device is reset.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)] // as many as the operation has
pub unsafe extern "C" fn pvgpu_rust_map_pages(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    offset: u64,
    length: u64,
    protection: u32,
    ranges: *const PageRange,
    count: u32,
    number: &mut u64,
) -> c_int {
    // SAFETY: the caller's promise; the record has no alignment.
    let (mut session, ranges) = unsafe {
        (
            session(device, host, Patience::Killable),
            core::slice::from_raw_parts(ranges, count as usize),
        )
    };
    let mapped = session.map_pages(ObjectId(object), offset, length, protection, ranges);
    self::number(mapped.and_then(|mapping| {
        *number = mapping.aperture_offset;
        // Otherwise it could not be unmapped.
        if mapping.length == length {
            Ok(0)
        } else {
            Err(Errno::EIO)
        }
    }))
}

/// Removes a mapping.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_unmap(
    device: *mut Device,
    host: *const Shared,
    aperture_offset: u64,
    length: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::SoonOnly) };
    let mapping = Mapping {
        aperture_offset,
        length,
    };
    number(session.unmap(mapping).map(|()| 0))
}

/// Bytes of the kernel's stack for one read.
const READ_ROOM: usize = 512;

/// Reads from a file to `address` in the calling process: at most `length` bytes, `-EAGAIN` when there is nothing.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_read(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    address: u64,
    length: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let (mut session, mut process) = unsafe {
        (
            session(device, host, Patience::Interruptible),
            Process::current(device),
        )
    };
    let mut room = [0; READ_ROOM];
    let length = usize::try_from(length).map_or(READ_ROOM, |length| length.min(READ_ROOM));
    number((|| {
        let length = session.read(ObjectId(object), &mut room[..length])?;
        process.write(address, &room[..length])?;
        c_int::try_from(length).map_err(|_| Errno::EPROTO)
    })())
}

/// Waits until one of `events` (`POLLIN` and the like) is there; gives what is.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_wait(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    events: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::Interruptible) };
    number(session.poll(ObjectId(object), events, -1).map(positive))
}

/// Gives those of `events` that are there; with none, the event queue has an event with this id later.
///
/// # Safety
///
/// As for `session`; `id` must be of `pvgpu_take_ids`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_watch(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    id: u64,
    events: u32,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::Killable) };
    number(session.watch(id, ObjectId(object), events).map(positive))
}

/// Asks the host whether it knows the session, if there is room for that. Nobody waits for the answer: `driver.c` sees it.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_ask(device: *mut Device, host: *const Shared) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::AtOnce) };
    number(session.ask().map(|()| 0))
}

/// Cancels a request that waits.
///
/// # Safety
///
/// As for `session`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_cancel(
    device: *mut Device,
    host: *const Shared,
    id: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::SoonOnly) };
    number(session.cancel(id).map(|()| 0))
}

/// Gives the size of an object in bytes in `size`.
///
/// # Safety
///
/// As for `session`; `size` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvgpu_rust_size(
    device: *mut Device,
    host: *const Shared,
    object: c_int,
    size: &mut u64,
) -> c_int {
    // SAFETY: the caller's promise.
    let mut session = unsafe { session(device, host, Patience::Killable) };
    number(session.size(ObjectId(object)).map(|bytes| {
        *size = bytes;
        0
    }))
}
