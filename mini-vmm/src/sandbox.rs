//! What the threads of a machine may do beyond the GPU's device: tables for the filters of
//! [`pvgpu_host_proxy::sandbox`], and the filters made of them.
//!
//! `vm` puts its vCPU threads under theirs; `main` those of its own that are left.

use kvm_bindings::{KVMIO, kvm_irq_routing, kvm_irqfd, kvm_regs, kvm_translation};
use pvgpu_host_proxy::sandbox::{Allowed, Filter, Sandbox, SandboxError};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// The command of an ioctl of KVM: its direction, number and argument (`linux/kvm.h`).
#[allow(clippy::cast_possible_truncation)] // commands have 32 bits, and these arguments less than 16 KiB
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    ioctl_expr(direction, KVMIO, number, size as u32) as u32
}

const PLACE: &str = "where a guest has failed";
const DUMP: &str = "a dump replaces the one before in its file";

/// What a vCPU's thread does beside the devices' work.
pub static VCPU: &[Allowed] = &[
    Allowed::ioctl(kvm(_IOC_NONE, 0x80, 0), "KVM_RUN"),
    Allowed::ioctl(kvm(_IOC_READ, 0x81, size_of::<kvm_regs>()), PLACE),
    Allowed::ioctl(
        kvm(_IOC_READ | _IOC_WRITE, 0x85, size_of::<kvm_translation>()),
        PLACE,
    ),
    Allowed::any(libc::SYS_ftruncate, DUMP),
    Allowed::any(libc::SYS_lseek, DUMP),
];

/// What it does, too, when the GPU is on PCI.
pub static VCPU_PCI: &[Allowed] = &[
    Allowed::ioctl(
        kvm(_IOC_WRITE, 0x6a, size_of::<kvm_irq_routing>()),
        "the guest has said which messages are its interrupts",
    ),
    Allowed::ioctl(
        kvm(_IOC_WRITE, 0x76, size_of::<kvm_irqfd>()),
        "the guest has masked one of them, or no longer does",
    ),
];

const DAEMON: &str = "looks for the GPU's daemon when it is gone";

/// What the thread does on top that looks after a GPU in another process.
pub static LINK: &[Allowed] = &[
    Allowed::equal(libc::SYS_socket, 0, libc::AF_UNIX.cast_unsigned(), DAEMON),
    Allowed::equal(
        libc::SYS_socketpair,
        0,
        libc::AF_UNIX.cast_unsigned(),
        DAEMON,
    ),
    Allowed::any(libc::SYS_connect, DAEMON),
    Allowed::any(libc::SYS_setsockopt, DAEMON),
    Allowed::any(libc::SYS_recvfrom, "requests of the GPU's daemon"),
    Allowed::any(libc::SYS_sendto, "answers to them"),
];

const EVENTS: &str = "waits for the end of the machine and for the console's input";
const TERMINAL: &str = "gives the terminal its settings back";

/// What the program's own threads do when the machine is complete: the event loop, the end of the machine, signals.
pub static MONITOR: &[Allowed] = &[
    Allowed::any(libc::SYS_epoll_create1, EVENTS),
    Allowed::any(libc::SYS_epoll_ctl, EVENTS),
    Allowed::any(libc::SYS_epoll_wait, EVENTS),
    Allowed::any(libc::SYS_epoll_pwait, EVENTS),
    Allowed::any(libc::SYS_rt_sigtimedwait, "the signals that ask it to end"),
    Allowed::ioctl(terminal(libc::TCGETS), TERMINAL),
    Allowed::ioctl(terminal(libc::TCSETS), TERMINAL),
];

/// What they do besides, where a file is to be removed in the end.
pub static REMOVAL: &[Allowed] = &[Allowed::any(libc::SYS_unlink, "removes the control socket")];

/// The command of an ioctl of terminals.
#[allow(clippy::cast_possible_truncation)] // they have 16 bits
const fn terminal(command: libc::Ioctl) -> u32 {
    command as u32
}

/// The filters of a machine.
#[derive(Debug)]
pub(crate) struct Filters {
    /// Of its vCPU threads.
    pub vcpu: Filter,
    /// Of the threads around it.
    pub monitor: Filter,
    /// Of the one that looks after a GPU in another process.
    pub link: Filter,
}

impl Filters {
    /// The filters of a machine whose devices make these calls, and its vCPUs these besides; `removes` a file in the end or not.
    pub(crate) fn new(
        sandbox: Sandbox,
        devices: &[Allowed],
        vcpus: &[Allowed],
        removes: bool,
    ) -> Result<Self, SandboxError> {
        let removal = if removes { REMOVAL } else { &[] };
        Ok(Self {
            // What a vCPU does most stands first.
            vcpu: Filter::new(sandbox, VCPU.iter().chain(vcpus).chain(devices))?,
            monitor: Filter::new(sandbox, MONITOR.iter().chain(devices).chain(removal))?,
            link: Filter::new(sandbox, LINK.iter().chain(MONITOR).chain(devices))?,
        })
    }
}
