//! Mappings with pages of the guest, for a guest that has no aperture: the guest's program sees those pages, the GPU sees the
//! object, and the bytes go from one to the other at the points that the schemas name
//! ([`Coherence`](pvgpu_protocol::schema::Coherence)).
//!
//! [`crate::session`] makes a [`Shadow`] for each mapping and calls [`Shadow::to_host`] and [`Shadow::to_guest`]. A shadow has a
//! *twin*, a copy of what guest and object had in common when they were last synchronized, as distributed shared memory does it
//! for several writers of a page: what differs from the twin in the guest's pages, the guest has written; what differs in the
//! object, the GPU has. Only such bytes are copied, so that writers of neighbouring bytes do not undo each other's work.
//!
//! Guest pages are touched only through `vm-memory`'s bounds-checked accessors, with the shadow locked: never again once
//! [`Shadow::end`] has returned. Each byte of them is read once, and what was read is then compared and written.

mod view;

use crate::driver::Mapping;
use crate::logging::guest_log;
use crate::soft::memory::Memory;
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::{PAGE_SIZE, PageRange};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use view::View;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

/// How many bytes are copied at once: that much memory the proxy has for it. (Greater ones leave the processor's cache.)
const CHUNK: usize = 128 << 10;

/// What all shadows of a guest share.
#[derive(Clone)]
pub(crate) struct Pages {
    memory: Arc<dyn Ram>,
    scratch: Arc<Scratch>,
}

/// The memory of a guest, whatever type its VMM has for it.
trait Ram: Send + Sync {
    fn has(&self, address: GuestAddress, length: usize) -> bool;
    /// Whether all of it could be read.
    fn read(&self, bytes: &mut [u8], address: GuestAddress) -> bool;
    /// Writes what there is memory for.
    fn write(&self, bytes: &[u8], address: GuestAddress);
}

impl<M: GuestAddressSpace + Send + Sync> Ram for M {
    fn has(&self, address: GuestAddress, length: usize) -> bool {
        self.memory()
            .check_range(address, length, Permissions::ReadWrite)
    }

    fn read(&self, bytes: &mut [u8], address: GuestAddress) -> bool {
        self.memory().read_slice(bytes, address).is_ok()
    }

    fn write(&self, bytes: &[u8], address: GuestAddress) {
        let _ = self.memory().write_slice(bytes, address);
    }
}

/// Where bytes rest between an object and the proxy.
pub(crate) struct Scratch(Mutex<Buffers>);

struct Buffers {
    /// Of an object's, or for it: the kernel copies between the two ([`View`]).
    file: Memory,
    bytes: Vec<u8>,
    runs: Vec<Range<usize>>,
}

/// One mapping.
pub(crate) struct Shadow {
    pages: Pages,
    /// The guest's pages, in order.
    pieces: Vec<Piece>,
    /// `None` once it is over, or when the object's memory is gone.
    copies: Mutex<Option<Copies>>,
}

/// Some pages of the guest in one piece.
struct Piece {
    /// Which bytes of the mapping they show.
    range: Range<usize>,
    address: GuestAddress,
}

struct Copies {
    object: View,
    writable: bool,
    twin: Vec<u8>,
}

impl Scratch {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Mutex::new(Buffers {
            file: Memory::new(CHUNK as u64)?,
            bytes: vec![0; CHUNK],
            runs: Vec::new(),
        })))
    }
}

impl Pages {
    pub(crate) fn new(
        memory: impl GuestAddressSpace + Send + Sync + 'static,
        scratch: &Arc<Scratch>,
    ) -> Self {
        Self {
            memory: Arc::new(memory),
            scratch: Arc::clone(scratch),
        }
    }

    /// The pages of a mapping of `length` bytes. `EINVAL` unless they are whole and exactly so many, `EFAULT` when they are not
    /// memory of the guest.
    fn pieces(&self, ranges: &[PageRange], length: usize) -> Result<Vec<Piece>, Errno> {
        let mut pieces = Vec::with_capacity(ranges.len());
        let mut end = 0usize;
        for range in ranges {
            let address = GuestAddress(range.address.get());
            let bytes = range.length.get();
            if !address.0.is_multiple_of(PAGE_SIZE)
                || !bytes.is_multiple_of(PAGE_SIZE)
                || bytes == 0
            {
                return Err(Errno::EINVAL);
            }
            let start = end;
            let bytes = usize::try_from(bytes).map_err(|_| Errno::EINVAL)?;
            end = start
                .checked_add(bytes)
                .filter(|end| *end <= length)
                .ok_or(Errno::EINVAL)?;
            if !self.memory.has(address, bytes) {
                return Err(Errno::EFAULT);
            }
            let range = start..end;
            pieces.push(Piece { range, address });
        }
        match end == length {
            true => Ok(pieces),
            false => Err(Errno::EINVAL),
        }
    }
}

impl Shadow {
    /// Maps `length` bytes of an object and copies them to the guest's pages. `ENODEV` when the object has not so many.
    pub(crate) fn new(
        pages: &Pages,
        ranges: &[PageRange],
        mapping: &Mapping,
        length: u64,
        writable: bool,
    ) -> Result<Self, Errno> {
        let length = usize::try_from(length).map_err(|_| Errno::ENOMEM)?;
        let pieces = pages.pieces(ranges, length)?;
        let object = View::new(mapping, length, writable)
            .map_err(|error| Errno::new(error.raw_os_error().unwrap_or(0)))?;
        let mut twin = Vec::new();
        twin.try_reserve_exact(length).map_err(|_| Errno::ENOMEM)?;
        twin.resize(length, 0);
        let shadow = Self {
            pages: pages.clone(),
            pieces,
            copies: Mutex::new(Some(Copies {
                object,
                writable,
                twin,
            })),
        };
        shadow.copy_to_guest(true);
        let lost = shadow.copies().is_none();
        if lost { Err(Errno::ENODEV) } else { Ok(shadow) }
    }

    /// Takes to the object what the guest has written.
    pub(crate) fn to_host(&self) {
        let mut copies = self.copies();
        let Some(Copies {
            object,
            writable: true,
            twin,
        }) = &mut *copies
        else {
            return;
        };
        let mut start = 0;
        let mut gone = false;
        for twin in twin.chunks_mut(CHUNK) {
            let mut buffers = self.buffers();
            let Buffers { file, bytes, runs } = &mut *buffers;
            let bytes = bytes.get_mut(..twin.len()).unwrap_or_default();
            // What the guest has no memory for any more it has not written.
            if self.read_guest(start, bytes) && bytes != twin {
                differences(bytes, twin, runs);
                let mut packed = 0;
                for run in &*runs {
                    let written = bytes.get(run.clone()).unwrap_or_default();
                    // The scratch memory is as long as a chunk.
                    gone |= file.write(packed, written).is_err();
                    packed += written.len() as u64;
                }
                twin.copy_from_slice(bytes);
                for run in &mut *runs {
                    *run = start + run.start..start + run.end;
                }
                gone |= !object.copy_from(runs, file.file());
            }
            start += twin.len();
        }
        self.notice_loss(&mut copies, gone);
    }

    /// Takes to the guest what the GPU has written.
    pub(crate) fn to_guest(&self) {
        self.copy_to_guest(false);
    }

    /// As [`Shadow::to_guest`], or with `all`, whatever there is.
    fn copy_to_guest(&self, all: bool) {
        let mut copies = self.copies();
        let Some(Copies { object, twin, .. }) = &mut *copies else {
            return;
        };
        let mut start = 0;
        let mut gone = false;
        for twin in twin.chunks_mut(CHUNK) {
            let mut buffers = self.buffers();
            let Buffers { file, bytes, runs } = &mut *buffers;
            let bytes = bytes.get_mut(..twin.len()).unwrap_or_default();
            if !object.copy_to(&(start..start + twin.len()), file.file())
                || file.read(0, bytes).is_err()
            {
                gone = true;
                break;
            }
            if all {
                self.write_guest(start, bytes);
            } else {
                differences(bytes, twin, runs);
                for run in &*runs {
                    let written = bytes.get(run.clone()).unwrap_or_default();
                    self.write_guest(start + run.start, written);
                }
            }
            if all || !runs.is_empty() {
                twin.copy_from_slice(bytes);
            }
            start += twin.len();
        }
        self.notice_loss(&mut copies, gone);
    }

    /// Ends it: neither the guest's pages nor the object are touched any more.
    pub(crate) fn end(&self) {
        let copies = self.copies().take();
        drop(copies);
    }

    /// Ends it, if the memory behind it is gone: the guest keeps what it saw last.
    fn notice_loss(&self, copies: &mut Option<Copies>, gone: bool) {
        if gone {
            *copies = None;
            guest_log!(
                error,
                "the memory behind a mapping is gone, and the guest reads what was there last: restart the guest once its GPU is \
                 back"
            );
        }
    }

    /// Reads bytes of the mapping out of the guest's pages.
    fn read_guest(&self, start: usize, bytes: &mut [u8]) -> bool {
        let mut rest = bytes;
        let mut at = start;
        while !rest.is_empty() {
            let Some((address, length)) = self.place(at, rest.len()) else {
                return false;
            };
            let Some((now, later)) = rest.split_at_mut_checked(length) else {
                return false;
            };
            if !self.pages.memory.read(now, address) {
                return false;
            }
            (rest, at) = (later, at + length);
        }
        true
    }

    /// Writes bytes of the mapping into the guest's pages. Where the guest has no memory any more they are lost: it named the
    /// place itself.
    fn write_guest(&self, start: usize, bytes: &[u8]) {
        let mut rest = bytes;
        let mut at = start;
        while let Some((address, length)) = self.place(at, rest.len()) {
            let Some((now, later)) = rest.split_at_checked(length) else {
                return;
            };
            self.pages.memory.write(now, address);
            (rest, at) = (later, at + length);
        }
    }

    /// Where the guest has the byte at `start` of the mapping, and how many of the next `length` bytes follow there.
    fn place(&self, start: usize, length: usize) -> Option<(GuestAddress, usize)> {
        let index = self
            .pieces
            .partition_point(|piece| piece.range.end <= start);
        let piece = self.pieces.get(index).filter(|_| length > 0)?;
        let before = start.checked_sub(piece.range.start)?;
        let address = piece.address.0.checked_add(before as u64)?;
        Some((GuestAddress(address), length.min(piece.range.end - start)))
    }

    fn copies(&self) -> MutexGuard<'_, Option<Copies>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locked after a shadow's copies, for one chunk at a time.
    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        let scratch = &self.pages.scratch.0;
        scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills `runs` with the ranges in which two equally long pieces of memory differ. Pages, then words are compared first, since most
/// are equal; and what differs is mostly a whole word.
fn differences(new: &[u8], old: &[u8], runs: &mut Vec<Range<usize>>) {
    const PAGE: usize = 4096;
    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    runs.clear();
    let mut add = |start: usize, length: usize| match runs.last_mut() {
        Some(last) if last.end == start => last.end += length,
        _ => runs.push(start..start + length),
    };
    for (page, (new, old)) in new.chunks(PAGE).zip(old.chunks(PAGE)).enumerate() {
        if new == old {
            continue;
        }
        // Pages are whole words.
        let words = new.as_chunks::<8>().0.iter().zip(old.as_chunks::<8>().0);
        for (word, (new, old)) in words.enumerate() {
            let start = page * PAGE + word * 8;
            let change = u64::from_le_bytes(*new) ^ u64::from_le_bytes(*old);
            if change == 0 {
                continue;
            }
            // No byte of the change is zero.
            if change.wrapping_sub(LOW) & !change & HIGH == 0 {
                add(start, 8);
                continue;
            }
            for (byte, _) in change
                .to_le_bytes()
                .iter()
                .enumerate()
                .filter(|(_, byte)| **byte != 0)
            {
                add(start + byte, 1);
            }
        }
    }
}

#[cfg(test)]
mod tests;
