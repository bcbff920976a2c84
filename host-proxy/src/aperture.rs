//! The aperture: one range of guest-physical memory in which mapped buffer objects appear.
//!
//! The VMM gives the whole range to the guest once, as one memory slot; the session then maps and unmaps ranges of
//! it. A range without a mapping is anonymous memory that reads as zeros, so that a guest which touches it harms
//! nobody. What is free is decided here; where a mapping is put is a [`Window`]'s: a [`Reservation`] of this process, or, where
//! the device is not in the VMM's process, a message to the VMM.

mod reservation;

use crate::driver::Mapping;
use crate::logging::guest_log;
use pvgpu_protocol::Errno;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use reservation::Reservation;

/// Where the mappings of an aperture are put. Offsets and lengths are multiples of the page size.
pub trait Window: Send + Sync {
    /// Its length in bytes.
    fn size(&self) -> u64;
    /// Shows `length` bytes of a file from `file_offset` on at `offset`, where nothing is mapped. When this returns, the guest
    /// sees them; on failure, it sees what it saw before.
    fn map(&self, offset: u64, length: u64, file: &dyn AsRawFd, file_offset: u64)
    -> io::Result<()>;
    /// Takes away what `map` has put there.
    fn unmap(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Takes away what is left, and what the guest has written where nothing was mapped.
    fn unmap_all(&self) -> io::Result<()>;
}

/// Most mappings at a time (`ENOMEM`). With the holes between them they take twice as many of this process's mappings,
/// of which Linux allows 65530 (`vm.max_map_count`); without any left, nothing could be unmapped and no thread started.
const MAPPINGS_MAX: usize = 16_384;

/// A window and what is free in it.
pub struct Aperture {
    window: Arc<dyn Window>,
    ranges: Mutex<Ranges>,
}

struct Ranges {
    /// Free ranges: offset to length, in bytes, never adjacent to each other.
    free: BTreeMap<u64, u64>,
    /// How many others there are.
    taken: usize,
}

impl Aperture {
    /// An aperture in which nothing is mapped.
    pub fn new(window: Arc<dyn Window>) -> Self {
        let ranges = Ranges {
            free: BTreeMap::from([(0, window.size())]),
            taken: 0,
        };
        Self {
            window,
            ranges: Mutex::new(ranges),
        }
    }

    /// An aperture in a [`Reservation`] of its own.
    pub fn reserve(size: u64) -> io::Result<Self> {
        Ok(Self::new(Arc::new(Reservation::new(size)?)))
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.window.size()
    }

    /// Maps `length` bytes and returns their offset; `ENOSPC` when no free range is that long, `ENOMEM` when there are
    /// [`MAPPINGS_MAX`] already.
    pub(crate) fn map(&self, mapping: &Mapping, length: u64) -> Result<u64, Errno> {
        let offset = self.allocate(length)?;
        let mapped = self.window.map(offset, length, &mapping.fd, mapping.offset);
        match mapped {
            Ok(()) => Ok(offset),
            Err(error) => {
                self.release(offset, length);
                Err(Errno::new(error.raw_os_error().unwrap_or(0)))
            }
        }
    }

    /// Puts the placeholder back. The range is one that [`Aperture::map`] returned.
    pub(crate) fn unmap(&self, offset: u64, length: u64) {
        match self.window.unmap(offset, length) {
            Ok(()) => self.release(offset, length),
            // The range stays taken: handing it out again would show its old memory to another file.
            Err(error) => guest_log!(error, "aperture: cannot unmap {length:#x} bytes: {error}"),
        }
    }

    /// Gives back the memory of pages that the guest has written where nothing is mapped. Only while nothing is mapped.
    pub(crate) fn discard(&self) {
        if let Err(error) = self.window.unmap_all() {
            guest_log!(error, "aperture: cannot give its pages back: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first free range that is long enough.
    fn allocate(&self, length: u64) -> Result<u64, Errno> {
        let mut ranges = self.lock();
        if ranges.taken >= MAPPINGS_MAX {
            return Err(Errno::ENOMEM);
        }
        let mut free = ranges.free.iter();
        let (&offset, &room) = free
            .find(|(_, room)| **room >= length)
            .ok_or(Errno::ENOSPC)?;
        ranges.free.remove(&offset);
        if room > length {
            ranges.free.insert(offset + length, room - length);
        }
        ranges.taken += 1;
        Ok(offset)
    }

    /// Gives a range back and joins it with its free neighbours.
    fn release(&self, offset: u64, length: u64) {
        let mut ranges = self.lock();
        ranges.taken = ranges.taken.saturating_sub(1);
        let free = &mut ranges.free;
        let (mut start, mut end) = (offset, offset + length);
        if let Some((&before, &room)) = free.range(..offset).next_back()
            && before + room == start
        {
            free.remove(&before);
            start = before;
        }
        if let Some(room) = free.remove(&end) {
            end += room;
        }
        free.insert(start, end - start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvgpu_protocol::wire::PAGE_SIZE;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn memfd(pages: u64) -> File {
        let file = crate::aperture::reservation::tests::memfd();
        file.set_len(pages * PAGE_SIZE).unwrap();
        file
    }

    fn mapping(file: &File, offset: u64) -> Mapping {
        Mapping {
            fd: file.try_clone().unwrap().into(),
            offset,
        }
    }

    fn aperture(size: u64) -> (Arc<Reservation>, Aperture) {
        let reservation = Arc::new(Reservation::new(size).unwrap());
        (Arc::clone(&reservation), Aperture::new(reservation))
    }

    #[test]
    fn a_mapping_shares_memory_with_its_object_and_leaves_zeros_behind() {
        let (reservation, aperture) = aperture(16 * PAGE_SIZE);
        let file = memfd(2);
        file.write_at(b"hello", PAGE_SIZE).unwrap();
        let offset = aperture.map(&mapping(&file, PAGE_SIZE), PAGE_SIZE).unwrap();
        assert_eq!(reservation.read(offset), *b"hello");
        aperture.unmap(offset, PAGE_SIZE);
        assert_eq!(reservation.read(offset), [0; 5]);
    }

    #[test]
    fn an_aperture_of_no_pages_or_of_parts_of_some_is_refused() {
        for size in [0, 1, PAGE_SIZE + 1, !(PAGE_SIZE - 1)] {
            assert!(Aperture::reserve(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn a_guest_reads_zeros_where_the_memory_behind_its_mapping_is_gone() {
        let (reservation, aperture) = aperture(16 * PAGE_SIZE);
        let (kept, lost) = (memfd(2), memfd(2));
        for file in [&kept, &lost] {
            file.write_at(b"hello", 0).unwrap();
        }
        let kept_at = aperture.map(&mapping(&kept, 0), 2 * PAGE_SIZE).unwrap();
        let lost_at = aperture.map(&mapping(&lost, 0), 2 * PAGE_SIZE).unwrap();
        assert_eq!(reservation.replace_lost(), 0);
        lost.set_len(PAGE_SIZE).unwrap();
        assert_eq!(reservation.replace_lost(), 1);
        assert_eq!(reservation.read(lost_at), [0; 5]);
        assert_eq!(reservation.read(lost_at + PAGE_SIZE), [0; 5]);
        assert_eq!(reservation.read(kept_at), *b"hello");
        assert_eq!(reservation.replace_lost(), 0);
        aperture.unmap(lost_at, 2 * PAGE_SIZE);
        assert_eq!(aperture.map(&mapping(&kept, 0), 2 * PAGE_SIZE), Ok(lost_at));
    }

    #[test]
    fn a_failed_mapping_leaves_the_placeholder_and_its_range_free() {
        let (reservation, aperture) = aperture(PAGE_SIZE);
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = Mapping {
            fd: reader.into(),
            offset: 0,
        };
        assert_eq!(aperture.map(&pipe, PAGE_SIZE), Err(Errno::EACCES));
        assert_eq!(reservation.read(0), [0; 5]);
        assert_eq!(aperture.map(&mapping(&memfd(1), 0), PAGE_SIZE), Ok(0));
    }

    #[test]
    fn a_full_aperture_has_no_space_until_something_is_unmapped() {
        let (_, aperture) = aperture(4 * PAGE_SIZE);
        let file = memfd(3);
        let first = aperture.map(&mapping(&file, 0), 3 * PAGE_SIZE).unwrap();
        assert_eq!(
            aperture.map(&mapping(&file, 0), 2 * PAGE_SIZE),
            Err(Errno::ENOSPC)
        );
        aperture.unmap(first, 3 * PAGE_SIZE);
        assert!(aperture.map(&mapping(&file, 0), 2 * PAGE_SIZE).is_ok());
    }

    #[test]
    fn a_guest_cannot_use_up_the_mappings_that_the_kernel_allows_this_process() {
        let pages = u64::try_from(MAPPINGS_MAX).unwrap() + 1;
        let (_, aperture) = aperture(pages * PAGE_SIZE);
        let file = mapping(&memfd(1), 0);
        for _ in 0..MAPPINGS_MAX {
            aperture.map(&file, PAGE_SIZE).unwrap();
        }
        assert_eq!(aperture.map(&file, PAGE_SIZE), Err(Errno::ENOMEM));
        aperture.unmap(0, PAGE_SIZE);
        assert_eq!(aperture.map(&file, PAGE_SIZE), Ok(0));
    }

    #[test]
    fn neighbouring_free_ranges_become_one_again() {
        let (_, aperture) = aperture(8 * PAGE_SIZE);
        let file = memfd(1);
        let offsets: Vec<_> = (0..8)
            .map(|_| aperture.map(&mapping(&file, 0), PAGE_SIZE).unwrap())
            .collect();
        for index in [1, 3, 5, 7, 6, 0, 4, 2] {
            aperture.unmap(offsets[index], PAGE_SIZE);
        }
        assert_eq!(
            aperture.ranges.lock().unwrap().free,
            BTreeMap::from([(0, 8 * PAGE_SIZE)])
        );
    }
}
