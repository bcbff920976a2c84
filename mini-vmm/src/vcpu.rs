//! One virtual processor and the thread that runs it.
//!
//! `vm` creates vCPUs, gives each its thread and ends them by a [`Kick`]. The loop hands every exit to
//! the bus or the ports and otherwise does nothing: how fast it is decides what a doorbell costs.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_lapic_state, kvm_msr_entry,
    kvm_run,
};
use kvm_ioctls::{KvmRunWrapper, VcpuExit, VcpuFd};
use pvgpu_host_proxy::aperture::Reservation;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::cpuid::{self, Topology};
use crate::kvm::{KvmError, Machine};
use crate::layout;
use crate::ports::Ports;
use crate::registers::{self, Entry};
use crate::stop::{Ending, Stop};

/// How often the guest left for the monitor, by cause. ioeventfds and interrupts handled in the kernel
/// do not appear: they cost no exit to user space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// Reads of device registers in memory.
    pub mmio_reads: u64,
    /// Writes to device registers in memory.
    pub mmio_writes: u64,
    /// Accesses to I/O ports.
    pub pio: u64,
    /// Halts that KVM did not handle itself.
    pub hlt: u64,
    /// Anything else.
    pub other: u64,
    /// Interruptions by a signal.
    pub interrupted: u64,
}

impl std::ops::AddAssign for Exits {
    fn add_assign(&mut self, other: Self) {
        self.mmio_reads += other.mmio_reads;
        self.mmio_writes += other.mmio_writes;
        self.pio += other.pio;
        self.hlt += other.hlt;
        self.other += other.other;
        self.interrupted += other.interrupted;
    }
}

/// The exits of one vCPU while it counts them.
#[derive(Debug, Default)]
pub struct ExitCounters {
    mmio_reads: AtomicU64,
    mmio_writes: AtomicU64,
    pio: AtomicU64,
    hlt: AtomicU64,
    other: AtomicU64,
    interrupted: AtomicU64,
}

impl ExitCounters {
    /// What they say now; any thread may ask.
    pub fn read(&self) -> Exits {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            mmio_reads: read(&self.mmio_reads),
            mmio_writes: read(&self.mmio_writes),
            pio: read(&self.pio),
            hlt: read(&self.hlt),
            other: read(&self.other),
            interrupted: read(&self.interrupted),
        }
    }
}

/// Counts one exit. The vCPU's thread alone writes its counters, so nothing is lost.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// Gets a vCPU thread out of the guest.
///
/// It has its own mapping of the page that KVM shares with the vCPU, so it stays valid however the
/// vCPU's thread ends.
pub struct Kick {
    run: KvmRunWrapper,
}

// SAFETY: the mapping is a page shared with the kernel that any thread may access; `Kick` touches one
// byte of it, atomically.
unsafe impl Send for Kick {}

impl Kick {
    fn new(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let run = KvmRunWrapper::mmap_from_fd(vcpu, size_of::<kvm_run>())
            .map_err(KvmError::at("share a vCPU's control page"))?;
        Ok(Self { run })
    }

    /// Makes the vCPU of `thread` return from the guest now, or as soon as it would enter it.
    pub fn kick<T>(&mut self, thread: &JoinHandle<T>) {
        let run: *mut kvm_run = self.run.as_mut_ref();
        // SAFETY: the pointer is valid for the life of `self.run` and a u8 is always aligned; all
        // other accesses to this byte are the kernel's.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) };
        immediate_exit.store(1, Ordering::SeqCst);
        // A thread that is gone already needs no signal.
        let _ = thread.kill(signal());
    }
}

/// The signal that interrupts KVM_RUN. Its handler does nothing: the interruption is the point.
fn signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal with which vCPUs are kicked; doing it again is harmless.
///
/// # Errors
///
/// When the kernel refuses.
pub fn install_signal_handler() -> Result<(), KvmError> {
    register_signal_handler(signal(), on_signal)
        .map_err(KvmError::at("install a signal handler (kernel)"))
}

/// What a vCPU needs while it runs.
#[derive(Clone)]
pub struct Surroundings {
    /// Devices in memory.
    pub bus: Arc<Bus>,
    /// Devices behind ports.
    pub ports: Arc<Ports>,
    /// RAM, only to show the instruction at which a guest failed.
    pub memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// The GPU's aperture, whose memory can get lost.
    pub aperture: Option<Arc<Reservation>>,
    /// The machine's switch.
    pub stop: Stop,
    /// Whether the guest was told to reset by a triple fault (`reboot=t`).
    pub triple_fault_resets: bool,
}

/// A processor that is ready to run.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    exits: Arc<ExitCounters>,
    /// Instruction pointer at the last fault for which there was nothing to replace.
    fault: Option<u64>,
}

impl Vcpu {
    /// Creates processor `index` of `cpus`. Processor 0 starts at `entry`; the others wait for it.
    ///
    /// # Errors
    ///
    /// When KVM refuses any of it.
    pub fn new(
        machine: &Machine,
        index: u8,
        cpus: u8,
        entry: Entry,
    ) -> Result<(Self, Kick), KvmError> {
        let fd = machine.create_vcpu(index)?;
        let kick = Kick::new(&fd)?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let topology = Topology {
            cpu: index,
            cpus,
            tsc_khz,
        };
        let cpuid = cpuid::table(machine.supported_cpuid(), topology).map_err(|_| {
            KvmError::at("hold one more CPUID leaf")(kvm_ioctls::Error::new(libc::E2BIG))
        })?;
        fd.set_cpuid2(&cpuid).map_err(KvmError::at("set CPUID"))?;
        set_msrs(&fd)?;
        set_local_interrupts(&fd)?;
        if index == 0 {
            let mut special = fd
                .get_sregs()
                .map_err(KvmError::at("read special registers"))?;
            registers::set_special(&mut special, entry);
            fd.set_sregs(&special)
                .map_err(KvmError::at("set special registers"))?;
            fd.set_regs(&registers::general(entry))
                .map_err(KvmError::at("set registers"))?;
            let mut fpu = fd
                .get_fpu()
                .map_err(KvmError::at("read floating-point registers"))?;
            fpu.fcw = 0x37f; // all exceptions masked, extended precision: the state after FNINIT
            fpu.mxcsr = 0x1f80; // all exceptions masked
            fd.set_fpu(&fpu)
                .map_err(KvmError::at("set floating-point registers"))?;
        }
        let exits = Arc::default();
        let vcpu = Self {
            fd,
            index,
            exits,
            fault: None,
        };
        Ok((vcpu, kick))
    }

    /// Its exits, which stay readable when it has ended.
    pub fn exits(&self) -> Arc<ExitCounters> {
        Arc::clone(&self.exits)
    }

    /// Runs the guest until the machine stops.
    pub fn run(mut self, around: &Surroundings) {
        // Whatever ends this thread, a panic included, ends the machine.
        let _guard = EndOnDrop(&around.stop, self.index);
        let exits = Arc::clone(&self.exits);
        while !around.stop.stopped() {
            match self.fd.run() {
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    count(&exits.mmio_writes);
                    around.bus.write(address, data);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    count(&exits.mmio_reads);
                    around.bus.read(address, data);
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    count(&exits.pio);
                    around.ports.write(port, data);
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    count(&exits.pio);
                    around.ports.read(port, data);
                }
                Ok(VcpuExit::Hlt) => count(&exits.hlt),
                Ok(VcpuExit::Intr) => count(&exits.interrupted),
                // Since Linux 6.8 KVM says where, before it fails with EFAULT alone.
                Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                    count(&exits.other);
                    self.recover(Some(gpa), around);
                }
                Ok(exit) => {
                    count(&exits.other);
                    let exit = Unhandled::from(&exit);
                    if let Some(ending) = self.ending(exit, around) {
                        around.stop.end(ending);
                    }
                }
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN => count(&exits.interrupted),
                    libc::EFAULT => {
                        count(&exits.other);
                        self.recover(None, around);
                    }
                    _ => {
                        let cause = format!("KVM_RUN failed: {error}; {}", self.place(around));
                        around.stop.end(Ending::Failure { cause });
                    }
                },
            }
        }
    }

    /// The host could not give the guest the memory that it touched. Where that is lost memory behind the aperture the guest
    /// can go on, without it.
    fn recover(&mut self, address: Option<u64>, around: &Surroundings) {
        let aperture = around.aperture.as_ref();
        if aperture.is_some_and(|aperture| aperture.replace_lost() > 0) {
            return;
        }
        // The event loop may have replaced it meanwhile: that it cannot be had shows when the guest tries again.
        let place = self.fd.get_regs().ok().map(|registers| registers.rip);
        if place.is_some() && std::mem::replace(&mut self.fault, place) != place {
            return;
        }
        let cause = format!("{}; {}", memory_fault(address), self.place(around));
        around.stop.end(Ending::Failure { cause });
    }

    /// What a rare exit means for the machine; `None` where it can go on.
    fn ending(&mut self, exit: Unhandled, around: &Surroundings) -> Option<Ending> {
        Some(match exit {
            Unhandled::Shutdown if around.triple_fault_resets => Ending::Reset,
            Unhandled::Shutdown => Ending::TripleFault {
                place: self.place(around),
            },
            Unhandled::Reset => Ending::Reset,
            Unhandled::Ignored => return None,
            Unhandled::InternalError => {
                let run = self.fd.get_kvm_run();
                // SAFETY: KVM filled this member of the union: the exit reason is an internal error.
                let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
                let what = match suberror {
                    kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                        "KVM cannot emulate an instruction".into()
                    }
                    other => format!("KVM internal error {other}"),
                };
                Ending::Failure {
                    cause: format!("{what}; {}", self.place(around)),
                }
            }
            Unhandled::Other(exit) => Ending::Failure {
                cause: format!("unexpected exit {exit}; {}", self.place(around)),
            },
        })
    }

    /// Where this vCPU is: its index, instruction pointer and the bytes there.
    fn place(&self, around: &Surroundings) -> String {
        let Ok(registers) = self.fd.get_regs() else {
            return format!("vCPU {}", self.index);
        };
        let mut place = format!("vCPU {} at rip {:#x}", self.index, registers.rip);
        let physical = self
            .fd
            .translate_gva(registers.rip)
            .ok()
            .filter(|t| t.valid != 0);
        let mut bytes = [0u8; 8];
        if let Some(translation) = physical
            && around
                .memory
                .memory()
                .read_slice(&mut bytes, GuestAddress(translation.physical_address))
                .is_ok()
        {
            place.push_str(", code");
            for byte in bytes {
                place.push_str(&format!(" {byte:02x}"));
            }
        }
        place
    }
}

/// That the host has no memory for a guest-physical address, where KVM tells it, and what to do.
fn memory_fault(address: Option<u64>) -> String {
    let what = match address {
        Some(address) if address >= layout::APERTURE_BASE => format!(
            "address {address:#x}, {:#x} in the GPU's aperture",
            address - layout::APERTURE_BASE
        ),
        Some(address) => format!("address {address:#x}, its RAM"),
        None => "an address that it touched (KVM says where since Linux 6.8)".into(),
    };
    format!(
        "the host has no memory for {what}: free some memory, look for errors of memory and GPU in the host's dmesg, and start it again"
    )
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vCPU {} (fd {})", self.index, self.fd.as_raw_fd())
    }
}

/// An exit that neither the bus nor the ports handle, without its borrow of the vCPU.
enum Unhandled {
    Shutdown,
    Reset,
    InternalError,
    Ignored,
    Other(String),
}

impl From<&VcpuExit<'_>> for Unhandled {
    fn from(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET, _) => {
                Self::Reset
            }
            VcpuExit::InternalError => Self::InternalError,
            VcpuExit::IrqWindowOpen
            | VcpuExit::IoapicEoi(_)
            | VcpuExit::SetTpr
            | VcpuExit::TprAccess => Self::Ignored,
            other => Self::Other(format!("{other:?}")),
        }
    }
}

/// Ends the machine when the vCPU's thread ends for a reason that nobody reported.
struct EndOnDrop<'a>(&'a Stop, u8);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end(Ending::Failure {
            cause: format!("the thread of vCPU {} ended unexpectedly", self.1),
        });
    }
}

/// The few model-specific registers that firmware would have set.
fn set_msrs(fd: &VcpuFd) -> Result<(), KvmError> {
    const MISC_ENABLE: u32 = 0x1a0;
    const MISC_ENABLE_FAST_STRINGS: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let refused =
        |errno| KvmError::at("set model-specific registers")(kvm_ioctls::Error::new(errno));
    let msrs = Msrs::from_entries(&entries).map_err(|_| refused(libc::E2BIG))?;
    match fd.set_msrs(&msrs) {
        Ok(count) if count == entries.len() => Ok(()),
        Ok(_) => Err(refused(libc::EINVAL)),
        Err(error) => Err(refused(error.errno())),
    }
}

/// Wires the local interrupt pins as firmware does: legacy interrupts to pin 0, NMI to pin 1.
fn set_local_interrupts(fd: &VcpuFd) -> Result<(), KvmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVER_EXT_INT: u32 = 0x700;
    const DELIVER_NMI: u32 = 0x400;
    let mut lapic = fd
        .get_lapic()
        .map_err(KvmError::at("read a local interrupt controller"))?;
    set_register(&mut lapic, LVT_LINT0, DELIVER_EXT_INT);
    set_register(&mut lapic, LVT_LINT1, DELIVER_NMI);
    fd.set_lapic(&lapic)
        .map_err(KvmError::at("set a local interrupt controller"))
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_the_host_cannot_resolve_is_told_with_its_place_and_a_remedy() {
        let aperture = memory_fault(Some(layout::APERTURE_BASE + 0x5000));
        assert!(
            aperture.contains("0x5000 in the GPU's aperture"),
            "{aperture}"
        );
        let ram = memory_fault(Some(0x1000));
        assert!(ram.contains("address 0x1000, its RAM"), "{ram}");
        for message in [aperture, ram, memory_fault(None)] {
            assert!(message.contains("dmesg"), "{message}");
        }
    }
}
