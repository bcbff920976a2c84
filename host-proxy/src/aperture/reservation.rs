//! The address space behind the aperture: `mmap`, `mremap` and `munmap`.
//!
//! Used by [`super::Aperture`] through [`Window`], and by a VMM whose device is in another process. No address in the range may ever be unmapped while the reservation lives: the
//! VMM has given it to the guest, and another mapping of this process could otherwise land in the hole. So a mapping
//! is made elsewhere first, where it may fail, and then moved over the placeholder.

#![allow(unsafe_code)]

use super::Window;
use pvgpu_protocol::wire::PAGE_SIZE;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Alignment of the range, so that the guest can have it in huge pages.
const ALIGNMENT: usize = 2 << 20;

/// A range of this process's addresses that a VMM gives to its guest as one memory slot. Where nothing is mapped, it is
/// anonymous memory that reads as zeros.
pub struct Reservation {
    address: usize,
    length: usize,
    /// What was reserved to get an aligned range: address and length.
    outer: (usize, usize),
    /// The mappings: offset to length.
    taken: Mutex<BTreeMap<u64, u64>>,
}

impl Window for Reservation {
    fn size(&self) -> u64 {
        self.length as u64
    }

    /// Fails with `EINVAL` where the range is none of whole pages of this reservation, or overlaps another mapping. On failure the
    /// range is as it was.
    fn map(
        &self,
        offset: u64,
        length: u64,
        file: &dyn AsRawFd,
        file_offset: u64,
    ) -> io::Result<()> {
        let mut taken = self.taken();
        let before = taken.range(..offset.saturating_add(length)).next_back();
        let overlaps = before.is_some_and(|(start, length)| start + length > offset);
        let aligned = (offset | length).is_multiple_of(PAGE_SIZE);
        if overlaps || !aligned {
            return Err(invalid());
        }
        self.map_file(offset, length, file, file_offset)?;
        taken.insert(offset, length);
        Ok(())
    }

    /// Fails with `EINVAL` if that is not a mapping.
    fn unmap(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut taken = self.taken();
        if taken.get(&offset) != Some(&length) {
            return Err(invalid());
        }
        self.clear(offset, length)?;
        taken.remove(&offset);
        Ok(())
    }

    fn unmap_all(&self) -> io::Result<()> {
        let mut taken = self.taken();
        self.clear(0, self.size())?;
        taken.clear();
        Ok(())
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl Reservation {
    /// Reserves `size` bytes of address space, a multiple of [`PAGE_SIZE`]. Memory is used only for mappings, and
    /// for pages that the guest writes without one.
    pub fn new(size: u64) -> io::Result<Self> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("aperture size {size} is not a positive multiple of {PAGE_SIZE}"),
            ));
        }
        let length = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        let padded = length
            .checked_add(ALIGNMENT)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let outer = placeholder(None, padded)?;
        Ok(Self {
            address: outer.next_multiple_of(ALIGNMENT),
            length,
            outer: (outer, padded),
            taken: Mutex::default(),
        })
    }

    /// Where the range starts in this process, aligned to 2 MiB.
    pub fn host_address(&self) -> u64 {
        self.address as u64
    }

    /// Puts the placeholder where the memory behind a mapping is gone, because its GPU was unplugged or its file was cut off,
    /// and returns how many mappings that were: the guest then reads zeros there.
    ///
    /// For the VMM, to be called when KVM_RUN fails with `EFAULT`, and about every second: with interrupts enabled, KVM tries for
    /// ever to get such a page, and does not return to say so. It takes 1 µs for each mapping, and no signal comes of it.
    pub fn replace_lost(&self) -> usize {
        // While this is locked, no range is given to another mapping.
        let taken = self.taken();
        let mut replaced = 0;
        let mut first = None;
        for (&offset, &length) in taken.iter() {
            // A file that is cut off loses its end first, a GPU everything.
            if self.readable(offset + length - 1) {
                continue;
            }
            match self.clear(offset, length) {
                Ok(()) => {
                    replaced += 1;
                    first = first.or(Some((offset, length)));
                }
                Err(error) => log::error!("aperture: cannot replace lost memory: {error}"),
            }
        }
        if let Some((offset, length)) = first {
            log::error!(
                "aperture: the memory behind {replaced} of the guest's mappings is gone, and it reads zeros there (the first are \
                 {length:#x} bytes at {offset:#x}): restart the guest once its GPU is back"
            );
        }
        replaced
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps a file's memory at `offset`. On failure the range is as it was.
    fn map_file(
        &self,
        offset: u64,
        length: u64,
        file: &dyn AsRawFd,
        file_offset: u64,
    ) -> io::Result<()> {
        let (target, length) = self.range(offset, length)?;
        let file_offset = libc::off_t::try_from(file_offset).map_err(|_| invalid())?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let fresh = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
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
    fn clear(&self, offset: u64, length: u64) -> io::Result<()> {
        let (target, length) = self.range(offset, length)?;
        placeholder(Some(target), length).map(drop)
    }

    /// Whether the byte at `offset` can be read. The kernel tries it, so that no signal comes where it cannot: it compares the
    /// word there with a value, and if they are equal waits for no time. Nothing is copied, no page is pinned, and unlike
    /// `process_vm_readv` it can read device memory.
    fn readable(&self, offset: u64) -> bool {
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
                let offset = usize::try_from(offset).map_err(|_| invalid())?;
                let length = usize::try_from(length).map_err(|_| invalid())?;
                Ok((self.address + offset, length))
            }
            _ => Err(invalid()),
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
