//! Memory of the embedded GPU: one sealed memfd per buffer object, and the engine's mapping of it. (The proxy's scratch memory
//! is one, too.)
//!
//! Guests map the same pages and write them whenever they like, so nothing here may ever make a Rust reference to
//! them: all access copies between them and private buffers ([`Memory::read`], [`Memory::write`]). The only `unsafe`
//! is what makes a memfd; the mapping and the copies are `vm-memory`'s.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Size of a page: buffer objects are whole pages.
pub(crate) const PAGE: u64 = 4096;

/// An access beyond the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfBounds;

/// Pages that nobody can take away: their file cannot shrink, so that touching a mapping of it never faults.
#[derive(Debug)]
pub(crate) struct Memory {
    region: MmapRegion,
    file: Arc<File>,
}

impl Memory {
    /// Makes `size` bytes of zeros; `size` must be a multiple of [`PAGE`] and not zero.
    pub(crate) fn new(size: u64) -> io::Result<Self> {
        let length = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let file = Arc::new(memfd()?);
        file.set_len(size)?;
        seal(&file)?;
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let region = MmapRegion::from_file(offset, length)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { region, file })
    }

    /// Copies the bytes at `offset` to a private buffer.
    pub(crate) fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), OutOfBounds> {
        let offset = usize::try_from(offset).map_err(|_| OutOfBounds)?;
        let slice = self.region.get_slice(offset, to.len());
        slice.map_err(|_| OutOfBounds)?.copy_to(to);
        Ok(())
    }

    /// Copies a private buffer to the bytes at `offset`.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfBounds> {
        let offset = usize::try_from(offset).map_err(|_| OutOfBounds)?;
        let slice = self.region.get_slice(offset, from.len());
        slice.map_err(|_| OutOfBounds)?.copy_from(from);
        Ok(())
    }

    /// Its file, for the kernel to copy from and to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A descriptor of the memory of its own.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

/// An empty memfd that can be sealed.
fn memfd() -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string that lives for ever; the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(c"pvgpu-soft".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Fixes the size of a memfd for ever.
fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many descriptors this process may have open.
pub(super) fn descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is an rlimit that this call may write.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => Ok(limit.rlim_cur),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_shrink_or_grow_a_buffers_memory() {
        let memory = Memory::new(PAGE).unwrap();
        let file = File::from(memory.descriptor().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 * PAGE).is_err());
        assert_eq!(file.metadata().unwrap().len(), PAGE);
    }

    #[test]
    fn a_buffers_memory_takes_one_descriptor_of_this_process() {
        use std::os::unix::fs::MetadataExt;
        let memory = Memory::new(PAGE).unwrap();
        let file = memory.file.metadata().unwrap();
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        let same = descriptors.filter(|entry| {
            let other = std::fs::metadata(entry.as_ref().unwrap().path());
            other.is_ok_and(|other| (other.dev(), other.ino()) == (file.dev(), file.ino()))
        });
        assert_eq!(same.count(), 1);
    }

    #[test]
    fn access_beyond_the_memory_is_refused_and_changes_nothing() {
        let memory = Memory::new(PAGE).unwrap();
        let mut bytes = [7; 8];
        assert_eq!(memory.write(PAGE - 4, &bytes), Err(OutOfBounds));
        assert_eq!(memory.read(PAGE - 4, &mut bytes), Err(OutOfBounds));
        assert_eq!(memory.read(u64::MAX, &mut bytes), Err(OutOfBounds));
        memory.read(PAGE - 8, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        memory.write(PAGE - 8, &[1; 8]).unwrap();
        memory.read(PAGE - 8, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 8]);
    }
}
