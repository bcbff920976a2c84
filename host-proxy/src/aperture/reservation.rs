//! The address space behind the aperture: `mmap`, `mremap` and `munmap`.
//!
//! Used by [`super::Aperture`] alone. No address in the range may ever be unmapped while the reservation lives: the
//! VMM has given it to the guest, and another mapping of this process could otherwise land in the hole. So a mapping
//! is made elsewhere first, where it may fail, and then moved over the placeholder.

#![allow(unsafe_code)]

use crate::driver::Mapping;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

/// Alignment of the range, so that the guest can have it in huge pages.
const ALIGNMENT: usize = 2 << 20;

/// A range of addresses that this object owns.
pub(super) struct Reservation {
    address: usize,
    length: usize,
    /// What was reserved to get an aligned range: address and length.
    outer: (usize, usize),
}

impl Reservation {
    pub(super) fn new(size: u64) -> io::Result<Self> {
        let length = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        let padded = length
            .checked_add(ALIGNMENT)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let outer = placeholder(None, padded)?;
        Ok(Self {
            address: outer.next_multiple_of(ALIGNMENT),
            length,
            outer: (outer, padded),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address as u64
    }

    pub(super) fn size(&self) -> u64 {
        self.length as u64
    }

    /// Maps an object's memory at `offset`. On failure the range is as it was.
    pub(super) fn map(&self, offset: u64, length: u64, mapping: &Mapping) -> io::Result<()> {
        let (target, length) = self.range(offset, length)?;
        let file_offset =
            libc::off_t::try_from(mapping.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let fresh = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                mapping.fd.as_raw_fd(),
                file_offset,
            )
        };
        if fresh == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fresh` was just made and is known to nobody else; the target lies in this reservation (`range`),
        // whose memory no Rust reference ever points to.
        let moved = unsafe {
            libc::mremap(
                fresh,
                length,
                length,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target as *mut libc::c_void,
            )
        };
        if moved != libc::MAP_FAILED {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // SAFETY: as above; the mapping was not moved.
        unsafe { libc::munmap(fresh, length) };
        placeholder(Some(target), length)?;
        Err(error)
    }

    /// Puts the placeholder back.
    pub(super) fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        let (target, length) = self.range(offset, length)?;
        placeholder(Some(target), length).map(drop)
    }

    /// Whether the byte at `offset` can be read. The kernel tries it, so that no signal comes where it cannot: it compares the
    /// word there with a value, and if they are equal waits for no time. Nothing is copied, no page is pinned, and unlike
    /// `process_vm_readv` it can read device memory.
    pub(super) fn readable(&self, offset: u64) -> bool {
        let Ok((address, _)) = self.range(offset & !3, 4) else {
            return false;
        };
        let no_time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: FUTEX_WAIT only reads the word at `address`, an address of this reservation aligned to 4, whose memory no
        // Rust reference ever points to; an address that it cannot read is an error.
        let result = unsafe {
            let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            libc::syscall(libc::SYS_futex, address, operation, 0, &raw const no_time)
        };
        result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT)
    }

    /// The address and length of a range inside this reservation.
    fn range(&self, offset: u64, length: u64) -> io::Result<(usize, usize)> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size() && length > 0 => {
                let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
                let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
                Ok((self.address + offset, length))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    #[cfg(test)]
    pub(super) fn read(&self, offset: u64) -> [u8; 5] {
        let (address, _) = self.range(offset, 5).unwrap();
        // SAFETY: the range is mapped, readable memory of this reservation.
        unsafe { ptr::read_volatile(address as *const [u8; 5]) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (address, length) = self.outer;
        // SAFETY: the whole range belongs to this object, and its owner has taken it from the guest before.
        unsafe { libc::munmap(address as *mut libc::c_void, length) };
    }
}

/// Maps anonymous memory that reads as zeros; over what is at `target`, a range of a reservation, if it is given.
fn placeholder(target: Option<usize>, length: usize) -> io::Result<usize> {
    let fixed = target.map_or(0, |_| libc::MAP_FIXED);
    // SAFETY: without a target the kernel chooses the address; with one, it lies in a reservation whose memory no
    // Rust reference ever points to.
    let address = unsafe {
        libc::mmap(
            target.unwrap_or(0) as *mut libc::c_void,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed,
            -1,
            0,
        )
    };
    match address {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        address => Ok(address as usize),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::os::fd::FromRawFd;

    pub(in super::super) fn memfd() -> File {
        // SAFETY: a new descriptor that nobody else knows is owned by the file.
        unsafe {
            let fd = libc::memfd_create(c"aperture-test".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        }
    }
}
