//! What every thread of the sandbox may do, and what those of a device may do on top. A host driver adds what it needs
//! ([`HostDriver::system_calls`](crate::driver::HostDriver::system_calls)).
//!
//! None of it opens a file, starts a program, makes a socket or executable memory, or reaches another process. Whoever adds a
//! row must say why, and keep it so.

use super::{Allowed, Only};
use libc::{
    CLONE_CHILD_CLEARTID, CLONE_FILES, CLONE_FS, CLONE_PARENT_SETTID, CLONE_SETTLS, CLONE_SIGHAND,
    CLONE_SYSVSEM, CLONE_THREAD, CLONE_VM,
};

/// How the C library starts a thread, and nothing but a thread.
const A_THREAD: u32 = (CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SYSVSEM
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID)
    .cast_unsigned();

const EXECUTABLE: u32 = libc::PROT_EXEC.cast_unsigned();

const MEMORY: &str = "memory that is not executable";
const CLOSES: &str = "closes descriptors that it is the last to hold";
const COPIES: &str = "copies between mapped objects and pages of a guest without an aperture";
const STARTS: &str = "starts and names threads, which end";

/// What the standard library and the C library do on any thread: memory, locks, time, threads, messages.
pub static THREAD: &[Allowed] = &[
    Allowed::any(libc::SYS_brk, MEMORY),
    Allowed::without(libc::SYS_mmap, 2, EXECUTABLE, MEMORY),
    Allowed::without(libc::SYS_mprotect, 2, EXECUTABLE, MEMORY),
    Allowed::any(libc::SYS_mremap, MEMORY),
    Allowed::any(libc::SYS_munmap, MEMORY),
    Allowed::any(libc::SYS_madvise, MEMORY),
    Allowed::any(libc::SYS_close, CLOSES),
    Allowed::equal(libc::SYS_fcntl, 1, libc::F_GETFD.cast_unsigned(), CLOSES),
    Allowed::any(libc::SYS_futex, "locks, condition variables, joins"),
    Allowed::any(libc::SYS_sched_yield, "locks that spin"),
    Allowed::any(
        libc::SYS_clock_gettime,
        "time, where the kernel does not map its clock",
    ),
    Allowed::any(libc::SYS_clock_nanosleep, "sleep"),
    Allowed::any(libc::SYS_nanosleep, "sleep"),
    Allowed::any(
        libc::SYS_restart_syscall,
        "a sleep that a debugger has interrupted",
    ),
    Allowed::any(libc::SYS_getrandom, "seeds of hash tables"),
    Allowed::equal(libc::SYS_clone, 0, A_THREAD, STARTS),
    Allowed::any(libc::SYS_set_robust_list, STARTS),
    Allowed::any(libc::SYS_rseq, STARTS),
    Allowed::any(libc::SYS_sigaltstack, STARTS),
    Allowed::any(libc::SYS_sched_getaffinity, STARTS),
    Allowed::equal(
        libc::SYS_prctl,
        0,
        libc::PR_SET_NAME.cast_unsigned(),
        STARTS,
    ),
    Allowed::equal(
        libc::SYS_prctl,
        0,
        libc::PR_GET_NAME.cast_unsigned(),
        "the report of a violation",
    ),
    Allowed::any(libc::SYS_exit, STARTS),
    Allowed::any(libc::SYS_exit_group, "the end of the process"),
    Allowed::any(
        libc::SYS_rt_sigprocmask,
        "signals are held back while a thread starts",
    ),
    Allowed::any(libc::SYS_rt_sigreturn, "the end of a signal handler"),
    Allowed::any(libc::SYS_getpid, "signals to threads"),
    Allowed::any(libc::SYS_gettid, "signals to threads"),
    Allowed {
        number: libc::SYS_tgkill,
        only: Only::Itself(0),
        why: "wakes threads of this process that wait in the kernel",
    },
    Allowed::any(
        libc::SYS_write,
        "messages, interrupts, doorbells, traces: to what is open",
    ),
    Allowed::any(libc::SYS_writev, "messages"),
];

/// What the threads of a device do whatever its host driver is: doorbells, mappings, the end of what a guest had.
pub static DEVICE: &[Allowed] = &[
    Allowed::any(libc::SYS_read, "doorbells"),
    Allowed::any(libc::SYS_epoll_wait, "doorbells"),
    Allowed::any(libc::SYS_pwrite64, COPIES),
    Allowed::any(libc::SYS_preadv, COPIES),
    Allowed::equal(
        libc::SYS_fcntl,
        1,
        libc::F_DUPFD_CLOEXEC.cast_unsigned(),
        "a descriptor of its own for each doorbell and mapping",
    ),
];
