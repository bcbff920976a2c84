//! The aperture: one reserved range of host addresses in which mapped buffer objects appear.
//!
//! The VMM gives the whole range to the guest once, as one memory slot; the session then maps and unmaps ranges of
//! it. A range without a mapping is anonymous memory that reads as zeros, so that a guest which touches it harms
//! nobody. Mapping goes through `reservation`, the only place that changes the address space.

mod reservation;

use crate::driver::Mapping;
use crate::logging::guest_log;
use pvgpu_protocol::{Errno, wire::PAGE_SIZE};
use reservation::Reservation;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most mappings at a time (`ENOMEM`). With the holes between them they take twice as many of this process's mappings,
/// of which Linux allows 65530 (`vm.max_map_count`); without any left, nothing could be unmapped and no thread started.
const MAPPINGS_MAX: usize = 16_384;

/// The reserved range and what is free in it.
pub struct Aperture {
    reservation: Reservation,
    ranges: Mutex<Ranges>,
}

struct Ranges {
    /// Free ranges: offset to length, in bytes, never adjacent to each other.
    free: BTreeMap<u64, u64>,
    /// The others, each a mapping: offset to length.
    taken: BTreeMap<u64, u64>,
}

impl Aperture {
    /// Reserves `size` bytes of address space, a multiple of [`PAGE_SIZE`]. Memory is used only for mappings, and
    /// for pages that the guest writes without one.
    pub fn new(size: u64) -> io::Result<Self> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("aperture size {size} is not a positive multiple of {PAGE_SIZE}"),
            ));
        }
        Ok(Self {
            reservation: Reservation::new(size)?,
            ranges: Mutex::new(Ranges {
                free: BTreeMap::from([(0, size)]),
                taken: BTreeMap::new(),
            }),
        })
    }

    /// Where the range starts in this process, aligned to 2 MiB.
    pub fn host_address(&self) -> u64 {
        self.reservation.address()
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.reservation.size()
    }

    /// Maps `length` bytes and returns their offset; `ENOSPC` when no free range is that long, `ENOMEM` when there are
    /// [`MAPPINGS_MAX`] already.
    pub(crate) fn map(&self, mapping: &Mapping, length: u64) -> Result<u64, Errno> {
        let offset = self.allocate(length)?;
        match self.reservation.map(offset, length, mapping) {
            Ok(()) => Ok(offset),
            Err(error) => {
                self.release(offset, length);
                Err(Errno::new(error.raw_os_error().unwrap_or(0)))
            }
        }
    }

    /// Puts the placeholder back. The range is one that [`Aperture::map`] returned.
    pub(crate) fn unmap(&self, offset: u64, length: u64) {
        match self.reservation.clear(offset, length) {
            Ok(()) => self.release(offset, length),
            // The range stays taken: handing it out again would show its old memory to another file.
            Err(error) => guest_log!(error, "aperture: cannot unmap {length:#x} bytes: {error}"),
        }
    }

    /// Gives back the memory of pages that the guest has written where nothing is mapped. Only while nothing is mapped.
    pub(crate) fn discard(&self) {
        if let Err(error) = self.reservation.clear(0, self.size()) {
            guest_log!(error, "aperture: cannot give its pages back: {error}");
        }
    }

    /// Puts the placeholder where the memory behind a mapping is gone, because its GPU was unplugged or its file was cut off,
    /// and returns how many mappings that were: the guest then reads zeros there.
    ///
    /// For the VMM, to be called when KVM_RUN fails with `EFAULT`, and about every second: with interrupts enabled, KVM tries for
    /// ever to get such a page, and does not return to say so. It takes 1 µs for each mapping, and no signal comes of it.
    pub fn replace_lost(&self) -> usize {
        // While this is locked, no range is given to another mapping.
        let ranges = self.lock();
        let mut replaced = 0;
        let mut first = None;
        for (&offset, &length) in &ranges.taken {
            // A file that is cut off loses its end first, a GPU everything.
            if self.reservation.readable(offset + length - 1) {
                continue;
            }
            match self.reservation.clear(offset, length) {
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

    fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first free range that is long enough.
    fn allocate(&self, length: u64) -> Result<u64, Errno> {
        let mut ranges = self.lock();
        if ranges.taken.len() >= MAPPINGS_MAX {
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
        ranges.taken.insert(offset, length);
        Ok(offset)
    }

    /// Gives a range back and joins it with its free neighbours.
    fn release(&self, offset: u64, length: u64) {
        let mut ranges = self.lock();
        ranges.taken.remove(&offset);
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

    #[test]
    fn a_mapping_shares_memory_with_its_object_and_leaves_zeros_behind() {
        let aperture = Aperture::new(16 * PAGE_SIZE).unwrap();
        let file = memfd(2);
        file.write_at(b"hello", PAGE_SIZE).unwrap();
        let offset = aperture.map(&mapping(&file, PAGE_SIZE), PAGE_SIZE).unwrap();
        assert_eq!(aperture.reservation.read(offset), *b"hello");
        aperture.unmap(offset, PAGE_SIZE);
        assert_eq!(aperture.reservation.read(offset), [0; 5]);
    }

    #[test]
    fn an_aperture_of_no_pages_or_of_parts_of_some_is_refused() {
        for size in [0, 1, PAGE_SIZE + 1, !(PAGE_SIZE - 1)] {
            assert!(Aperture::new(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn a_guest_reads_zeros_where_the_memory_behind_its_mapping_is_gone() {
        let aperture = Aperture::new(16 * PAGE_SIZE).unwrap();
        let (kept, lost) = (memfd(2), memfd(2));
        for file in [&kept, &lost] {
            file.write_at(b"hello", 0).unwrap();
        }
        let kept_at = aperture.map(&mapping(&kept, 0), 2 * PAGE_SIZE).unwrap();
        let lost_at = aperture.map(&mapping(&lost, 0), 2 * PAGE_SIZE).unwrap();
        assert_eq!(aperture.replace_lost(), 0);
        lost.set_len(PAGE_SIZE).unwrap();
        assert_eq!(aperture.replace_lost(), 1);
        assert_eq!(aperture.reservation.read(lost_at), [0; 5]);
        assert_eq!(aperture.reservation.read(lost_at + PAGE_SIZE), [0; 5]);
        assert_eq!(aperture.reservation.read(kept_at), *b"hello");
        assert_eq!(aperture.replace_lost(), 0);
        aperture.unmap(lost_at, 2 * PAGE_SIZE);
        assert_eq!(aperture.map(&mapping(&kept, 0), 2 * PAGE_SIZE), Ok(lost_at));
    }

    #[test]
    fn a_failed_mapping_leaves_the_placeholder_and_its_range_free() {
        let aperture = Aperture::new(PAGE_SIZE).unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        let pipe = Mapping {
            fd: reader.into(),
            offset: 0,
        };
        assert_eq!(aperture.map(&pipe, PAGE_SIZE), Err(Errno::EACCES));
        assert_eq!(aperture.reservation.read(0), [0; 5]);
        assert_eq!(aperture.map(&mapping(&memfd(1), 0), PAGE_SIZE), Ok(0));
    }

    #[test]
    fn a_full_aperture_has_no_space_until_something_is_unmapped() {
        let aperture = Aperture::new(4 * PAGE_SIZE).unwrap();
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
        let aperture = Aperture::new(pages * PAGE_SIZE).unwrap();
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
        let aperture = Aperture::new(8 * PAGE_SIZE).unwrap();
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
