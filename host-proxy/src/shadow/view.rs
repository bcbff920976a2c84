//! The proxy's own view of an object's memory: `mmap`, and copies that the kernel makes.
//!
//! Used by [`super::Shadow`] alone. The memory behind a view goes away when a GPU is unplugged or a file is cut off, and whoever
//! touched it then would get a signal. So nobody here ever does: the kernel copies between it and a file, and says so where it
//! cannot (`EFAULT`).

#![allow(unsafe_code)]

use crate::driver::Mapping;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

/// Most ranges that the kernel takes at once (`UIO_MAXIOV`).
const RANGES_MAX: usize = 1024;

/// A mapping of an object.
pub(super) struct View {
    address: usize,
    length: usize,
}

impl View {
    /// Maps `length` bytes of an object.
    pub(super) fn new(mapping: &Mapping, length: usize, writable: bool) -> io::Result<Self> {
        let offset =
            libc::off_t::try_from(mapping.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | write,
                libc::MAP_SHARED,
                mapping.fd.as_raw_fd(),
                offset,
            )
        };
        match address {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            address => Ok(Self {
                address: address as usize,
                length,
            }),
        }
    }

    /// Copies a range of it to the start of a file. `false` when some of it is gone.
    #[must_use]
    pub(super) fn copy_to(&self, range: &Range<usize>, file: &File) -> bool {
        let Some(place) = self.place(range) else {
            return false;
        };
        // SAFETY: the range lies in this mapping (`place`), whose memory no Rust reference ever points to; the kernel only reads
        // it, and an address that it cannot read is an error.
        let copied = unsafe { libc::pwrite(file.as_raw_fd(), place.iov_base, place.iov_len, 0) };
        usize::try_from(copied) == Ok(range.len())
    }

    /// Copies the start of a file to ranges of it, one after the other. `false` when some of it is gone.
    #[must_use]
    pub(super) fn copy_from(&self, ranges: &[Range<usize>], file: &File) -> bool {
        let mut start = 0;
        for ranges in ranges.chunks(RANGES_MAX) {
            let places: Option<Vec<_>> = ranges.iter().map(|range| self.place(range)).collect();
            let length: usize = ranges.iter().map(Range::len).sum();
            let (Some(places), Ok(count), Ok(from)) = (
                places,
                libc::c_int::try_from(ranges.len()),
                libc::off_t::try_from(start),
            ) else {
                return false;
            };
            // SAFETY: the ranges lie in this mapping (`place`), whose memory no Rust reference ever points to; an address that
            // the kernel cannot write is an error. `places` lives until the call returns.
            let copied = unsafe { libc::preadv(file.as_raw_fd(), places.as_ptr(), count, from) };
            if usize::try_from(copied) != Ok(length) {
                return false;
            }
            start += length;
        }
        true
    }

    /// Where a range is, if it lies inside.
    fn place(&self, range: &Range<usize>) -> Option<libc::iovec> {
        (range.start <= range.end && range.end <= self.length).then(|| libc::iovec {
            iov_base: (self.address + range.start) as *mut libc::c_void,
            iov_len: range.len(),
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this object, and no Rust reference ever pointed into it.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.length) };
    }
}
