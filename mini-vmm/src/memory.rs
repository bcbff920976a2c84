//! Guest RAM: where it is in the guest's address space and which host pages hold it.
//!
//! `vm` makes one [`Ram`] per machine and hands its map to the boot code and to devices, which touch
//! it only through vm-memory's bounds-checked volatile accessors. This module must never hand out a
//! Rust reference to guest memory: the guest changes it at any time.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout;

/// Nested page faults are far fewer when huge pages can back the guest: align the host side to them.
const HUGE_PAGE: usize = 2 << 20;

/// The machine's RAM. Dropping it gives the host pages back, unless some device still holds the
/// map; then they stay mapped (a leak, never a dangling pointer).
#[derive(Debug)]
pub struct Ram {
    map: GuestMemoryAtomic<GuestMemoryMmap>,
    blocks: Vec<Block>,
}

/// One contiguous run of RAM: its place in the guest and in this process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address of the first byte.
    pub guest: u64,
    /// Address of the first byte in this process.
    pub host: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Why RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size cannot be a machine's RAM.
    #[error("{} of memory cannot be given to a guest: choose --memory from {} to {} in steps of 4K",
        pvgpu_host_proxy::size::display(*.0), pvgpu_host_proxy::size::display(layout::MIN_MEMORY), pvgpu_host_proxy::size::display(max_memory()))]
    Size(u64),
    /// The host refused the mapping.
    #[error("cannot reserve {} for guest memory ({error}): choose a smaller --memory or free some", pvgpu_host_proxy::size::display(*.size))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        error: io::Error,
    },
    /// vm-memory refused the regions.
    #[error(
        "guest memory regions do not fit together ({0}): this is a defect of mini-vmm, report it"
    )]
    Regions(String),
}

/// Most RAM a machine can have: all below the 32-bit hole and from 4 GiB up to the aperture.
pub const fn max_memory() -> u64 {
    layout::RAM_LOW_END + (layout::APERTURE_BASE - layout::RAM_HIGH)
}

/// Guest-physical base and size of each block of a machine with `size` bytes of RAM.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::RAM_LOW_END);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::RAM_HIGH, size - low));
    }
    ranges
}

/// A host mapping that this module owns, and the region that vm-memory makes of it.
#[derive(Debug)]
struct Block {
    guest: u64,
    region: Option<Arc<MmapRegion>>,
    /// What other processes can map.
    file: Option<File>,
}

impl Ram {
    /// Reserves `size` bytes of zeroed RAM; the host commits pages when the guest touches them.
    ///
    /// # Errors
    ///
    /// See [`MemoryError`].
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        Self::with(size, |_| Ok(None))
    }

    /// As [`Ram::new`], in memory that another process can map ([`Ram::shared`]).
    ///
    /// # Errors
    ///
    /// See [`MemoryError`].
    pub fn shareable(size: u64) -> Result<Self, MemoryError> {
        Self::with(size, |size| memfd(size).map(Some))
    }

    fn with(
        size: u64,
        file: impl Fn(u64) -> io::Result<Option<File>>,
    ) -> Result<Self, MemoryError> {
        if size < layout::MIN_MEMORY || size > max_memory() || !size.is_multiple_of(4096) {
            return Err(MemoryError::Size(size));
        }
        let mut blocks = Vec::new();
        let mut regions = Vec::new();
        for (guest, bytes) in ranges(size) {
            let length = usize::try_from(bytes).map_err(|_| MemoryError::Size(size))?;
            let refused = |error| MemoryError::Map { size, error };
            let file = file(bytes).map_err(refused)?;
            let region = map(length, file.as_ref()).map_err(refused)?;
            // From here on the block's Drop unmaps the pages, whatever fails below.
            blocks.push(Block {
                guest,
                region: Some(Arc::clone(&region)),
                file,
            });
            let region = GuestRegionMmap::with_arc(region, GuestAddress(guest))
                .ok_or_else(|| MemoryError::Regions("address overflow".into()))?;
            regions.push(region);
        }
        let map = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| MemoryError::Regions(error.to_string()))?;
        Ok(Self {
            map: GuestMemoryAtomic::new(map),
            blocks,
        })
    }

    /// The guest's RAM as devices see it.
    pub fn map(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.map
    }

    /// Every block of RAM, lowest first.
    pub fn ranges(&self) -> impl Iterator<Item = Range> + '_ {
        self.blocks.iter().filter_map(Block::range)
    }

    /// Every block of RAM that another process can map, with the file that it can map from its beginning.
    pub fn shared(&self) -> impl Iterator<Item = (Range, &File)> + '_ {
        let blocks = self.blocks.iter();
        blocks.filter_map(|block| block.range().zip(block.file.as_ref()))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // Give up this machine's own hold on the regions first, so that each block can see whether
        // it is the last holder.
        let map = std::mem::replace(
            &mut self.map,
            GuestMemoryAtomic::new(GuestMemoryMmap::new()),
        );
        drop(map);
        self.blocks.clear();
    }
}

impl Block {
    fn range(&self) -> Option<Range> {
        let region = self.region.as_ref()?;
        Some(Range {
            guest: self.guest,
            host: region.as_ptr() as u64,
            size: region.size() as u64,
        })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Some(region) = self.region.take() else {
            return;
        };
        let Some(region) = Arc::into_inner(region) else {
            log::warn!(
                "guest memory at {:#x} is still in use by a device and stays mapped",
                self.guest
            );
            return;
        };
        // SAFETY: `map` made exactly this mapping, nothing else unmaps it (`build_raw` regions do not
        // own their pages), and `into_inner` proved that no other holder of the region exists.
        let result = unsafe { libc::munmap(region.as_ptr().cast(), region.size()) };
        debug_assert_eq!(result, 0, "munmap of guest memory");
    }
}

/// A file of `size` zeros in memory that cannot become shorter, so that nobody who maps it loses its pages.
fn memfd(size: u64) -> io::Result<File> {
    // SAFETY: the name is a string with an end; the call touches no other memory.
    let fd = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        libc::memfd_create(c"guest-memory".as_ptr(), flags)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: changes attributes of the file, and touches no memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Maps `size` bytes of zeroed memory at an address aligned to huge pages: private memory, or that of a file.
fn map(size: usize, file: Option<&File>) -> io::Result<Arc<MmapRegion>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (flags, fd) = match file {
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
    };
    let flags = flags | libc::MAP_NORESERVE;
    let room = size
        .checked_add(HUGE_PAGE)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: an anonymous mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, reserve, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let head = start.align_offset(HUGE_PAGE);
    let tail = HUGE_PAGE - head;
    // SAFETY: head + size + tail = room, so all three parts lie inside the mapping just made, and
    // nobody has seen its address yet. The parts are page multiples since size, HUGE_PAGE and the
    // address are.
    let address = unsafe {
        if head != 0 {
            libc::munmap(start, head);
        }
        let address = start.add(head);
        if tail != 0 {
            libc::munmap(address.add(size), tail);
        }
        if libc::mmap(address, size, protection, flags | libc::MAP_FIXED, fd, 0) == libc::MAP_FAILED
        {
            let error = io::Error::last_os_error();
            libc::munmap(address, size);
            return Err(error);
        }
        // Advice only: without transparent huge pages the guest is slower and nothing else.
        libc::madvise(address, size, libc::MADV_HUGEPAGE);
        address
    };
    // SAFETY: the mapping of `size` bytes at `address` is valid, readable and writable until the
    // block that owns it is dropped, which checks that no other holder of the region is left.
    let region = unsafe { MmapRegion::build_raw(address.cast(), size, protection, flags) };
    match region {
        Ok(region) => Ok(Arc::new(region)),
        Err(error) => {
            // SAFETY: the mapping was made above and no region came to hold it.
            unsafe { libc::munmap(address, size) };
            Err(io::Error::other(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddressSpace};

    #[test]
    fn ram_above_three_gib_continues_at_four_gib() {
        assert_eq!(ranges(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn host_pages_are_aligned_to_huge_pages_and_zeroed() {
        let ram = Ram::new(3 << 20).unwrap();
        let range = ram.ranges().next().unwrap();
        assert_eq!(range.host % HUGE_PAGE as u64, 0);
        assert_eq!((range.guest, range.size), (0, 3 << 20));
        let word: u64 = ram
            .map()
            .memory()
            .read_obj(GuestAddress((3 << 20) - 8))
            .unwrap();
        assert_eq!(word, 0);
    }

    #[test]
    fn ram_that_a_device_still_holds_stays_mapped() {
        let ram = Ram::new(8 << 20).unwrap();
        let held = ram.map().clone();
        drop(ram);
        held.memory().write_obj(1u32, GuestAddress(4096)).unwrap();
        assert_eq!(
            held.memory().read_obj::<u32>(GuestAddress(4096)).unwrap(),
            1
        );
    }

    #[test]
    fn dropping_a_machine_gives_its_ram_back() {
        let virtual_kib = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let before = virtual_kib();
        for _ in 0..64 {
            drop(Ram::new(5 << 30).unwrap());
        }
        let grown = virtual_kib().saturating_sub(before);
        assert!(
            grown < 64 * 1024 * 1024,
            "64 machines of 5 GiB left {grown} KiB mapped"
        );
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 4096, (2 << 20) + 1, u64::MAX, max_memory() + 4096] {
            let message = Ram::new(size).unwrap_err().to_string();
            assert!(message.contains("--memory"), "{message}");
        }
    }
}
