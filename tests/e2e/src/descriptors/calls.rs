//! The system calls on dma-bufs, sync files and other descriptors that the checks need and the standard library does not
//! have. The structs and numbers are those of `linux/dma-buf.h` and `linux/sync_file.h`.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Result of a system call that gives less than zero for an error.
fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes over a descriptor that an ioctl gave out.
pub fn take(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::other(format!(
            "the ioctl gave {fd}, no descriptor"
        )));
    }
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What of `events` is there at once or within that time; zero when the time is over.
pub fn poll(fd: BorrowedFd<'_>, events: i16, timeout: Duration) -> io::Result<i16> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the kernel reads and writes the one entry.
    check(unsafe { libc::poll(&raw mut entry, 1, timeout) })?;
    Ok(entry.revents)
}

/// As [`poll`], by an epoll instance of its own.
pub fn epoll(fd: BorrowedFd<'_>, events: u32, timeout: Duration) -> io::Result<u32> {
    let timeout = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let mut event = libc::epoll_event { events, u64: 7 };
    // SAFETY: plain system calls; the kernel reads and writes the one event.
    let count = unsafe {
        let epoll = take(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?)?;
        let number = epoll.as_raw_fd();
        let add = libc::EPOLL_CTL_ADD;
        check(libc::epoll_ctl(number, add, fd.as_raw_fd(), &raw mut event))?;
        event = libc::epoll_event { events: 0, u64: 0 };
        check(libc::epoll_wait(number, &raw mut event, 1, timeout))?
    };
    Ok(if count == 0 { 0 } else { event.events })
}

/// Reads from the descriptor, with signals as they come.
pub fn read(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most as many bytes as there are.
    let count = unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// `fcntl` without a third argument, or with that one.
pub fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: the commands that the checks use take and give numbers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}

/// The size of the file, by seeking to its end.
pub fn size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: no memory is touched.
    let end = unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

/// Makes `SIGALRM` interrupt this process's system calls, and raises it after that time.
pub fn alarm(after: Duration) -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            tv_usec: after.subsec_micros().into(),
        },
    };
    // SAFETY: a zeroed sigaction is valid (no flags, so no SA_RESTART), and the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        check(libc::sigaction(
            libc::SIGALRM,
            &raw const action,
            std::ptr::null_mut(),
        ))?;
        check(libc::setitimer(
            libc::ITIMER_REAL,
            &raw const timer,
            std::ptr::null_mut(),
        ))?;
    }
    Ok(())
}

/// An ioctl whose argument has no pointers.
fn ioctl<T>(fd: BorrowedFd<'_>, command: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: the kernel reads and writes as many bytes as the command says, which is the size of `T`; the callers below
    // see to that.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command, argument as *mut T) }).map(drop)
}

/// Whose memory is looked at or written by the processor: flags of `DMA_BUF_IOCTL_SYNC`.
pub mod sync {
    /// `DMA_BUF_SYNC_READ`.
    pub const READ: u64 = 1;
    /// `DMA_BUF_SYNC_WRITE`.
    pub const WRITE: u64 = 2;
    /// `DMA_BUF_SYNC_END`.
    pub const END: u64 = 4;
}

/// `DMA_BUF_IOCTL_SYNC`.
pub fn dma_buf_sync(fd: BorrowedFd<'_>, mut flags: u64) -> io::Result<()> {
    ioctl(fd, 0x4008_6200, &mut flags)
}

/// `struct sync_file_info`.
#[repr(C)]
#[derive(Default)]
struct SyncFileInfo {
    name: [u8; 32],
    status: i32,
    flags: u32,
    fences: u32,
    pad: u32,
    address: u64,
}

/// `SYNC_IOC_FILE_INFO`: 0 while the fence is not signaled, 1 when it is, less when it ended with an error.
pub fn status(sync_file: BorrowedFd<'_>) -> io::Result<i32> {
    let mut info = SyncFileInfo::default();
    ioctl(sync_file, 0xc038_3e04, &mut info)?;
    Ok(info.status)
}

/// `struct sync_merge_data`.
#[repr(C)]
#[derive(Default)]
struct SyncMerge {
    name: [u8; 32],
    other: i32,
    merged: i32,
    flags: u32,
    pad: u32,
}

/// `SYNC_IOC_MERGE`: a sync file of the fences of both.
pub fn merge(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut merge = SyncMerge {
        other: other.as_raw_fd(),
        ..SyncMerge::default()
    };
    ioctl(one, 0xc030_3e03, &mut merge)?;
    take(merge.merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_as_long_as_their_ioctls_say() {
        assert_eq!(size_of::<SyncFileInfo>(), 0x38);
        assert_eq!(size_of::<SyncMerge>(), 0x30);
    }
}
