//! The system calls that the checks are about, each as one function that does nothing else, and child processes.
//! Addresses are numbers here: nothing of the program's own memory is ever at one that these calls get.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pvgpu_protocol::Errno;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a page.
pub const PAGE: usize = 4096;

fn last_errno() -> Errno {
    Errno::new(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    match result {
        0.. => Ok(result),
        _ => Err(last_errno()),
    }
}

/// Opens a file with the flags of `open`.
pub fn open(path: &Path, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let path =
        std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: a C string that lives through the call; the descriptor is new.
    unsafe {
        let fd = check(libc::open(path.as_ptr(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// One ioctl, never repeated.
pub fn ioctl<T: FromBytes + IntoBytes>(
    fd: BorrowedFd<'_>,
    command: u32,
    argument: &mut T,
) -> Result<i32, Errno> {
    // SAFETY: the kernel reads and writes as many bytes at `argument` as the command says, which the callers make from `T`,
    // and what the pointers in it reach, which is memory that they own.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command.into(), argument as *mut T) })
}

/// One ioctl with whatever number for an argument.
pub fn ioctl_at(fd: BorrowedFd<'_>, command: u32, address: usize) -> Result<i32, Errno> {
    // SAFETY: the address is one that nothing of the program is at.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), command.into(), address) })
}

/// Copies a value to where `map` or `map_low` gave memory.
pub fn store<T: IntoBytes>(address: usize, value: T) {
    // SAFETY: by the sentence above; nothing else is there.
    unsafe { (address as *mut T).write_unaligned(value) }
}

/// One ioctl by the system call of 32-bit programs, with an argument below 4 GiB ([`map_low`]).
pub fn ioctl_32(fd: BorrowedFd<'_>, command: u32, address: usize) -> Result<i32, Errno> {
    const SYS_IOCTL_32: u64 = 54;
    let mut result = SYS_IOCTL_32;
    // SAFETY: as in `ioctl_at`. rbx is the compiler's own, so it is put back; this entry into the kernel keeps no more
    // registers than named.
    unsafe {
        std::arch::asm!(
            "xchg {fd}, rbx",
            "int 0x80",
            "xchg {fd}, rbx",
            fd = inout(reg) fd.as_raw_fd() as u64 => _,
            inout("rax") result,
            in("rcx") u64::from(command),
            in("rdx") address as u64,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    check(result as i32).map_err(|_| Errno::new((result as i32).saturating_neg()))
}

/// Maps a file.
pub fn map(
    fd: BorrowedFd<'_>,
    offset: u64,
    length: usize,
    protection: libc::c_int,
    flags: libc::c_int,
) -> Result<usize, Errno> {
    // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            flags,
            fd.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(address as usize)
}

/// Maps a file for reading and writing, shared.
pub fn map_shared(fd: BorrowedFd<'_>, offset: u64, length: usize) -> Result<usize, Errno> {
    map(
        fd,
        offset,
        length,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED,
    )
}

/// A page of memory below 4 GiB.
pub fn map_low() -> Result<usize, Errno> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
    );
    // SAFETY: as in `map`.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(address as usize)
}

/// `munmap`.
pub fn unmap(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: the callers name what `map` gave them, or parts of it.
    check(unsafe { libc::munmap(address as *mut libc::c_void, length) }).map(drop)
}

/// `mremap` to wherever the kernel likes, or to `target`.
pub fn remap(
    address: usize,
    from: usize,
    to: usize,
    target: Option<usize>,
) -> Result<usize, Errno> {
    let flags = match target {
        Some(_) => libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
        None => libc::MREMAP_MAYMOVE,
    };
    // SAFETY: as in `unmap`, for both places.
    let address = unsafe {
        libc::mremap(
            address as *mut libc::c_void,
            from,
            to,
            flags,
            target.unwrap_or(0) as *mut libc::c_void,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(address as usize)
}

/// `mprotect`.
pub fn protect(address: usize, length: usize, protection: libc::c_int) -> Result<(), Errno> {
    // SAFETY: as in `unmap`.
    check(unsafe { libc::mprotect(address as *mut libc::c_void, length, protection) }).map(drop)
}

/// `msync` with `MS_SYNC`.
pub fn sync(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: as in `unmap`.
    check(unsafe { libc::msync(address as *mut libc::c_void, length, libc::MS_SYNC) }).map(drop)
}

/// `madvise`.
pub fn advise(address: usize, length: usize, advice: libc::c_int) -> Result<(), Errno> {
    // SAFETY: as in `unmap`.
    check(unsafe { libc::madvise(address as *mut libc::c_void, length, advice) }).map(drop)
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors, which are new.
    unsafe {
        check(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// The byte at an address, read by the kernel: `EFAULT` where a program would get a signal.
pub fn peek(address: usize) -> Result<u8, Errno> {
    let (reader, writer) = pipe()?;
    let mut byte = 0u8;
    // SAFETY: the kernel checks the address; the byte is ours.
    unsafe {
        check(libc::write(writer.as_raw_fd(), address as *const libc::c_void, 1) as libc::c_int)?;
        check(libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) as libc::c_int)?;
    }
    Ok(byte)
}

/// Writes a byte at an address, by the kernel: `EFAULT` where a program would get a signal.
pub fn poke(address: usize, byte: u8) -> Result<(), Errno> {
    let (reader, writer) = pipe()?;
    // SAFETY: the kernel checks the address, which is one of a mapping of the caller's; the byte is ours.
    unsafe {
        check(libc::write(writer.as_raw_fd(), (&raw const byte).cast(), 1) as libc::c_int)?;
        check(libc::read(reader.as_raw_fd(), address as *mut libc::c_void, 1) as libc::c_int)?;
    }
    Ok(())
}

/// Fills `length` bytes with `byte`, by the program itself.
pub fn fill(address: usize, length: usize, byte: u8) {
    // SAFETY: the callers name what `map` gave them for writing.
    unsafe { std::ptr::write_bytes(address as *mut u8, byte, length) }
}

/// Reads `length` bytes and gives their sum.
pub fn sum(address: usize, length: usize) -> u64 {
    (0..length / 8)
        // SAFETY: the callers name what `map` gave them; volatile, because others may write there.
        .map(|index| unsafe { (address as *const u64).add(index).read_volatile() })
        .fold(0, u64::wrapping_add)
}

/// Moves the file's position to where it is.
pub fn seek(fd: BorrowedFd<'_>) -> Result<i64, Errno> {
    // SAFETY: no memory is involved.
    match unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_CUR) } {
        position @ 0.. => Ok(position),
        _ => Err(last_errno()),
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn now_ns() -> i64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// Takes `O_CLOEXEC` from a descriptor, so that it lives on after `exec`.
pub fn keep_on_exec(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }).map(drop)
}

/// How often the alarm has rung.
static ALARMS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_alarm(_: libc::c_int) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

/// Lets `SIGALRM` come every `interval` while `work` runs, with a handler that has `SA_RESTART` or not. Gives how often it
/// came, too.
pub fn with_alarms<R>(interval: Duration, restart: bool, work: impl FnOnce() -> R) -> (R, u32) {
    let set = |interval: Duration| {
        let time = libc::timeval {
            tv_sec: interval.as_secs() as libc::time_t,
            tv_usec: interval.subsec_micros().into(),
        };
        let timer = libc::itimerval {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: the kernel reads one itimerval.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    };
    ALARMS.store(0, Ordering::Relaxed);
    // SAFETY: the handler does nothing but to count; the struct is initialized.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_alarm as *const () as usize;
        action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
    }
    set(interval);
    let result = work();
    set(Duration::ZERO);
    (result, ALARMS.load(Ordering::Relaxed))
}

/// Ends this process at once, with all its threads.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// A child process. One that is not waited for is killed when this is dropped.
pub struct Child {
    id: libc::pid_t,
    waited: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Not in time.
    Not,
}

/// Starts a child that runs `work` and ends with the code it gives. Only while the program has one thread.
pub fn fork(work: impl FnOnce() -> i32) -> Result<Child, Errno> {
    // SAFETY: there is one thread, so the child may do whatever the parent could.
    match check(unsafe { libc::fork() })? {
        0 => exit_now(work()),
        id => Ok(Child { id, waited: false }),
    }
}

impl Child {
    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: no memory is involved; the child was not waited for, so the number is its own.
        unsafe { libc::kill(self.id, signal) };
    }

    /// Waits for the end.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended, Errno> {
        let deadline = Instant::now() + limit;
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes one number.
            let id = check(unsafe { libc::waitpid(self.id, &raw mut status, libc::WNOHANG) })?;
            if id == self.id {
                self.waited = true;
                return Ok(match libc::WIFEXITED(status) {
                    true => Ended::Code(libc::WEXITSTATUS(status)),
                    false => Ended::Signal(libc::WTERMSIG(status)),
                });
            }
            if Instant::now() >= deadline {
                return Ok(Ended::Not);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.waited {
            self.signal(libc::SIGKILL);
        }
    }
}

/// Uses a descriptor that somebody else has opened and keeps open.
pub fn borrow<R>(fd: i32, work: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
    // SAFETY: by the sentence above, and the borrow ends with the call.
    work(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Closes a descriptor that an ioctl gave.
pub fn close(fd: i32) {
    // SAFETY: no memory is involved; nobody else knows the number.
    unsafe { libc::close(fd) };
}

/// `write`.
pub fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: the bytes are ours.
    let written = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    if written < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}
