//! The calling process: its memory and its file descriptors, as the marshalling code wants them.
#![allow(unsafe_code)]

use crate::kernel::{self, Device, Object};
use core::cell::Cell;
use core::ffi::c_int;
use core::ptr::null_mut;
use pvgpu_guest_driver::marshal::Caller;
use pvgpu_protocol::Errno;
use pvgpu_protocol::schema::Descriptor;

/// Objects that one call may hold: an ioctl has one, and is gathered up to three times.
const OBJECTS: usize = 4;

/// The process that runs this call.
pub struct Process {
    device: *mut Device,
    /// The objects behind its file descriptors, until the call is over.
    objects: [Cell<*mut Object>; OBJECTS],
}

/// 0 or more as it is; less is `-errno`.
pub fn result(number: c_int) -> Result<c_int, Errno> {
    match number {
        0.. => Ok(number),
        _ => Err(Errno::new(number.saturating_neg())),
    }
}

impl Process {
    /// The current process, calling that device.
    ///
    /// # Safety
    ///
    /// Only in process context, and not kept beyond the call; the device must outlive it.
    pub unsafe fn current(device: *mut Device) -> Self {
        Self {
            device,
            objects: [const { Cell::new(null_mut()) }; OBJECTS],
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        for object in &self.objects {
            if !object.get().is_null() {
                // SAFETY: a reference that `object` was given, and gives back here alone.
                unsafe { kernel::pvgpu_object_put(object.get()) }
            }
        }
    }
}

impl Caller for Process {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        // SAFETY: the target is ours; the kernel checks the source. Process context by the promise of `current`.
        result(unsafe { kernel::pvgpu_copy_from_user(bytes.as_mut_ptr(), address, bytes.len()) })
            .map(drop)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        // SAFETY: the source is ours; the kernel checks the target. Process context by the promise of `current`.
        result(unsafe { kernel::pvgpu_copy_to_user(address, bytes.as_ptr(), bytes.len()) })
            .map(drop)
    }

    fn object(&self, fd: i32, descriptor: Descriptor) -> Result<i32, Errno> {
        let free = self.objects.iter().find(|object| object.get().is_null());
        let free = free.ok_or(Errno::E2BIG)?;
        // SAFETY: the device is alive and this is process context, by the promise of `current`; the place is ours.
        result(unsafe {
            kernel::pvgpu_fd_object(self.device, fd, descriptor as c_int, free.as_ptr())
        })
    }

    fn fd(&mut self, object: i32, descriptor: Descriptor, flags: u32) -> Result<i32, Errno> {
        let descriptor = descriptor as c_int;
        // SAFETY: the device is alive and this is process context, by the promise of `current`.
        result(unsafe { kernel::pvgpu_object_fd(self.device, object, descriptor, flags) })
    }
}
