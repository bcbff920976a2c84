//! A system call that the sandbox forbids: one line on standard error, then the process ends by `SIGSYS`.
//!
//! [`super`] installs the handler. The kernel runs it on the thread that made the call, in the middle of anything: so it
//! may only do what is safe in a signal handler, and what every filter allows. It must never return to the call.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::ptr;

/// Why the kernel sent `SIGSYS`: a filter (`asm-generic/siginfo.h`). Anybody else is a program that kills this one.
const SYS_SECCOMP: libc::c_int = 1;

/// The calls that somebody who has taken a thread over would try first, or a change of a library would bring.
const NAMES: &[(i64, &str)] = &[
    (libc::SYS_open, "open"),
    (libc::SYS_stat, "stat"),
    (libc::SYS_fstat, "fstat"),
    (libc::SYS_mmap, "mmap"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_rt_sigaction, "rt_sigaction"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_dup, "dup"),
    (libc::SYS_socket, "socket"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_socketpair, "socketpair"),
    (libc::SYS_clone, "clone"),
    (libc::SYS_fork, "fork"),
    (libc::SYS_vfork, "vfork"),
    (libc::SYS_execve, "execve"),
    (libc::SYS_kill, "kill"),
    (libc::SYS_fcntl, "fcntl"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_ptrace, "ptrace"),
    (libc::SYS_prctl, "prctl"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_tgkill, "tgkill"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_newfstatat, "newfstatat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_eventfd2, "eventfd2"),
    (libc::SYS_dup3, "dup3"),
    (libc::SYS_pipe2, "pipe2"),
    (libc::SYS_prlimit64, "prlimit64"),
    (libc::SYS_process_vm_readv, "process_vm_readv"),
    (libc::SYS_process_vm_writev, "process_vm_writev"),
    (libc::SYS_seccomp, "seccomp"),
    (libc::SYS_memfd_create, "memfd_create"),
    (libc::SYS_bpf, "bpf"),
    (libc::SYS_execveat, "execveat"),
    (libc::SYS_statx, "statx"),
    (libc::SYS_pkey_mprotect, "pkey_mprotect"),
    (libc::SYS_io_uring_setup, "io_uring_setup"),
    (libc::SYS_openat2, "openat2"),
];

/// Asks the kernel whether its filters can raise a signal; an error says that it has none, or that this is forbidden.
pub(super) fn kernel_reports_violations() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: reads 32 bits of the action and nothing else.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Installs the handler for the whole process.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: all zeros is a valid `sigaction` with an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // A second violation, and the signal that the handler itself raises, end the process at once.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESETHAND;
    action.sa_sigaction = on_signal as *const () as usize;
    // SAFETY: the handler has the type that SA_SIGINFO asks for, and is safe to run at any time (see there).
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO both, valid until it returns.
    let (code, registers) = unsafe { ((*info).si_code, (*context).uc_mcontext.gregs) };
    if code == SYS_SECCOMP {
        report(&registers);
    }
    // SAFETY: signals this very thread; the default action, which `SA_RESETHAND` has put back, ends the process.
    // `_exit` is for nobody: it is there so that nothing goes on in any case.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal);
        libc::_exit(128 + signal);
    }
}

/// Writes the line, from the registers as they were at the system call.
fn report(registers: &[i64; 23]) {
    let register = |index: libc::c_int| {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        registers.get(index).copied().unwrap_or(0)
    };
    let number = register(libc::REG_RAX);
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, the last one zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let mut line = Line::default();
    line.text(b"pvgpu: the sandbox ends this process: thread ");
    line.text(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.text(b" made system call ");
    line.decimal(number.cast_unsigned());
    if let Some((_, name)) = NAMES.iter().find(|(known, _)| *known == number) {
        line.text(b" (");
        line.text(name.as_bytes());
        line.text(b")");
    }
    line.text(b", which its filter forbids, with arguments");
    for argument in [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX] {
        line.text(b" ");
        line.hexadecimal(register(argument).cast_unsigned());
    }
    line.text(b"; see docs/sandbox.md\n");
    let bytes = line.bytes();
    // SAFETY: writes bytes that live until it returns. That it fails can be told to nobody.
    unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
}

/// A line that is put together without allocating; what does not fit is left out.
struct Line {
    bytes: [u8; 320],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 320],
            length: 0,
        }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        let room = self.bytes.iter_mut().skip(self.length);
        self.length += room.zip(text).map(|(to, from)| *to = *from).count();
    }

    fn hexadecimal(&mut self, value: u64) {
        self.text(b"0x");
        self.digits(value, 16);
    }

    fn decimal(&mut self, value: u64) {
        self.digits(value, 10);
    }

    fn digits(&mut self, value: u64, base: u64) {
        let places = std::iter::successors(Some(value), |rest| Some(rest / base));
        let count = 1 + places.clone().skip(1).take_while(|rest| *rest > 0).count();
        for place in (0..count).rev() {
            let digit = places.clone().nth(place).unwrap_or(0) % base;
            let digit = u32::try_from(digit).unwrap_or(0);
            let digit = char::from_digit(digit, 16).unwrap_or('?');
            self.text(digit.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_numbers_as_people_write_them_and_never_too_many_bytes() {
        let mut line = Line::default();
        line.decimal(0);
        line.text(b" ");
        line.decimal(257);
        line.text(b" ");
        line.hexadecimal(0xc010_6441);
        line.text(b" ");
        line.hexadecimal(u64::MAX);
        assert_eq!(line.bytes(), b"0 257 0xc0106441 0xffffffffffffffff");
        line.text(&[b'x'; 400]);
        assert_eq!(line.bytes().len(), 320);
    }
}
