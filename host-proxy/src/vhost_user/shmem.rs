//! The aperture of a guest whose VMM is another process: each mapping is a message to it, with the descriptor to be mapped.

use crate::aperture::{Reservation, Window};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};

/// The shared-memory region of the device that the aperture is.
const REGION: u8 = 0;

/// The front end's region.
pub(super) struct Region {
    front_end: Backend,
    size: u64,
    /// The session is over, or the front end is gone: it takes the mappings away by itself, and may not listen any more.
    closed: AtomicBool,
    /// What was mapped when a session was over, in case that the front end did not.
    left: Mutex<Vec<Range<u64>>>,
}

impl Region {
    pub(super) fn new(front_end: Backend, size: u64) -> Self {
        front_end.set_shmem_flag(true);
        front_end.set_reply_ack_flag(true);
        Self {
            front_end,
            size,
            closed: AtomicBool::new(false),
            left: Mutex::default(),
        }
    }

    /// From now on the front end is told nothing any more: it may be waiting itself for the end of the session. QEMU does not survive
    /// a message to a device that it has stopped.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// The next session may have mappings.
    pub(super) fn reopen(&self) {
        self.closed.store(false, Ordering::Relaxed);
    }

    /// Takes mappings of earlier sessions away that the front end may still have in that range; whether there are any.
    fn make_room(&self, range: &Range<u64>) -> bool {
        let mut made = false;
        for left in self.forget(range) {
            let message = Self::message(left.start, left.end - left.start, 0);
            made |= self.front_end.shmem_unmap(&message).is_ok();
        }
        made
    }

    /// Forgets what may be left of earlier sessions in that range.
    fn forget(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let overlaps = |left: &mut Range<u64>| left.start < range.end && range.start < left.end;
        self.left().extract_if(.., overlaps).collect()
    }

    fn left(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
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
        // A front end that cannot map it does not say why, and QEMU listens no longer.
        Reservation::new(length)?.map(0, length, file, file_offset)?;
        let message = Self::message(offset, length, file_offset);
        let range = offset..offset.saturating_add(length);
        let map = || self.front_end.shmem_map(&message, &file.as_raw_fd());
        let mapped = match map() {
            Err(_) if self.make_room(&range) => map(),
            mapped => mapped,
        };
        // What it has no room for.
        mapped.map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        self.forget(&range);
        Ok(())
    }

    fn unmap(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            self.left().push(offset..offset.saturating_add(length));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::thread;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    const PAGE: u64 = 4096;

    /// A front end that refuses to map where something is mapped; and what it was told.
    #[derive(Default)]
    struct FrontEnd {
        mapped: Mutex<Vec<u64>>,
        told: Mutex<Vec<(&'static str, u64)>>,
    }

    impl FrontEnd {
        /// Answers one message; false when nobody sends any more.
        fn answer(&self, mut stream: &UnixStream) -> io::Result<bool> {
            let (mut header, mut body) = ([0; 12], [0; 40]);
            // With the descriptor that is to be mapped.
            if stream.recv_with_fd(&mut header)?.0 == 0 {
                return Ok(false);
            }
            stream.read_exact(&mut body)?;
            let offset = u64::from_ne_bytes(body[16..24].try_into().unwrap());
            let mut mapped = self.mapped.lock().unwrap();
            let (what, refused) = match header[0] {
                9 => ("map", mapped.contains(&offset)),
                _ => ("unmap", !mapped.contains(&offset)),
            };
            mapped.retain(|other| *other != offset);
            if what == "map" {
                mapped.push(offset);
            }
            self.told.lock().unwrap().push((what, offset));
            let reply = [header[0].into(), 5, 8, u32::from(refused), 0];
            stream.write_all(&reply.map(u32::to_ne_bytes).concat())?;
            Ok(true)
        }
    }

    /// A region, and its front end.
    fn region() -> (Region, Arc<FrontEnd>) {
        let front_end = Arc::<FrontEnd>::default();
        let (ours, stream) = UnixStream::pair().unwrap();
        let answers = Arc::clone(&front_end);
        thread::spawn(move || while answers.answer(&stream).unwrap() {});
        (Region::new(Backend::from_stream(ours), 4 * PAGE), front_end)
    }

    fn map(region: &Region, page: u64) -> io::Result<()> {
        let file = tempfile::tempfile().unwrap();
        region.map(page * PAGE, PAGE, &file, 0)
    }

    #[test]
    fn what_cannot_be_mapped_has_the_kernels_errno_and_the_front_end_does_not_hear_of_it() {
        let (region, front_end) = region();
        let (pipe, _other) = io::pipe().unwrap();
        let file = tempfile::tempfile().unwrap();
        let errno = |refused: io::Result<()>| refused.unwrap_err().raw_os_error();
        assert_eq!(errno(region.map(0, PAGE, &pipe, 0)), Some(libc::EACCES));
        assert_eq!(errno(region.map(0, PAGE, &file, 1)), Some(libc::EINVAL));
        assert_eq!(*front_end.told.lock().unwrap(), []);
    }

    #[test]
    fn a_front_end_is_told_nothing_at_the_end_of_a_session_and_later_only_what_it_has_left() {
        let (region, front_end) = region();
        let told = || std::mem::take(&mut *front_end.told.lock().unwrap());
        for page in 0..3 {
            map(&region, page).unwrap();
        }
        region.unmap(2 * PAGE, PAGE).unwrap();
        told();
        region.close();
        region.unmap(0, PAGE).unwrap();
        region.unmap(PAGE, PAGE).unwrap();
        assert_eq!(told(), []);
        region.reopen();
        // It has left the one, and taken the other away.
        front_end
            .mapped
            .lock()
            .unwrap()
            .retain(|offset| *offset == 0);
        map(&region, 0).unwrap();
        map(&region, 1).unwrap();
        let expected = [("map", 0), ("unmap", 0), ("map", 0), ("map", PAGE)];
        assert_eq!(told(), expected);
        // Whatever it refuses now is nothing of an earlier session.
        map(&region, 0).unwrap_err();
        map(&region, 1).unwrap_err();
        assert_eq!(told(), [("map", 0), ("map", PAGE)]);
    }
}
