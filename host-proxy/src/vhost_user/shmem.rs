//! The aperture of a guest whose VMM is another process: each mapping is a message to it, with the descriptor to be mapped.

use crate::aperture::Window;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};

/// The shared-memory region of the device that the aperture is.
const REGION: u8 = 0;

/// The front end's region.
pub(super) struct Region {
    front_end: Backend,
    size: u64,
    /// The front end is gone, and its mappings with it.
    gone: AtomicBool,
}

impl Region {
    pub(super) fn new(front_end: Backend, size: u64) -> Self {
        front_end.set_shmem_flag(true);
        front_end.set_reply_ack_flag(true);
        Self {
            front_end,
            size,
            gone: AtomicBool::new(false),
        }
    }

    /// From now on nobody waits for the front end's answers. It is told what is unmapped, but it may be waiting itself for the end of
    /// the session, and what it answers then changes nothing.
    pub(super) fn close(&self) {
        self.front_end.set_reply_ack_flag(false);
    }

    /// The next session is to have its mappings acknowledged.
    pub(super) fn reopen(&self) {
        self.front_end.set_reply_ack_flag(true);
    }

    /// The front end is gone.
    pub(super) fn lose(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn message(offset: u64, length: u64, file_offset: u64) -> VhostUserMMap {
        VhostUserMMap {
            shmid: REGION,
            padding: [0; 7],
            fd_offset: file_offset,
            shm_offset: offset,
            len: length,
            flags: VhostUserMMapFlags::WRITABLE.bits(),
        }
    }
}

impl Window for Region {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(
        &self,
        offset: u64,
        length: u64,
        file: &dyn AsRawFd,
        file_offset: u64,
    ) -> io::Result<()> {
        let message = Self::message(offset, length, file_offset);
        let mapped = self.front_end.shmem_map(&message, &file.as_raw_fd());
        // Why it does not want to, the front end does not say.
        mapped.map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(())
    }

    fn unmap(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.front_end
            .shmem_unmap(&Self::message(offset, length, 0))?;
        Ok(())
    }

    fn unmap_all(&self) -> io::Result<()> {
        // What its guest has written where nothing is mapped is the front end's.
        Ok(())
    }
}
