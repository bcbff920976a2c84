//! A machine from its description to its end.
//!
//! `main`, tests and benchmarks fill a [`VmConfig`], make a [`Vm`] of it and [`run`](Vm::run) it. Nothing
//! of a machine outlives `run`: threads are joined, descriptors closed, memory unmapped, so that one
//! process can run any number of machines, one after the other or at once.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use pvgpu_host_proxy::files;
use pvgpu_host_proxy::monitor::Monitor;
use pvgpu_host_proxy::sandbox::{DEVICE, Filter, Sandbox, SandboxError, THREAD};
use pvgpu_host_proxy::size;
use pvgpu_host_proxy::statistics::Statistics;
use serde::Serialize;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::boot::{self, BootError};
use crate::bus::{Attachment, Bus, Overlap};
use crate::debug::{Debug, DumpTarget};
use crate::gpu::{self, Gpu, GpuDevice, GpuError, Off, Transport};
use crate::kvm::{self, KvmError, Machine};
use crate::memory::{MemoryError, Ram};
use crate::pci::PciBus;
use crate::ports::Ports;
use crate::sandbox::{self, Filters};
use crate::serial::{Console, Port};
use crate::stop::{Ending, Stop};
use crate::vcpu::{self, ExitCounters, Exits, Kick, Surroundings, Vcpu};
use crate::virtio::Virtio;
use crate::{events, layout};

/// A machine that does not exist yet. [`VmConfig::new`] gives a modest one; change its fields.
#[derive(Debug)]
pub struct VmConfig {
    /// The KVM device, normally [`kvm::DEVICE`].
    pub kvm: PathBuf,
    /// An ELF file for x86-64 or a bzImage.
    pub kernel: PathBuf,
    /// The files of the initial ramdisk, one after another; none for no ramdisk.
    pub initrd: Vec<PathBuf>,
    /// The kernel's command line; the machine adds what announces its devices.
    pub cmdline: String,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs, 1 to [`layout::MAX_CPUS`].
    pub cpus: u8,
    /// The GPU; none where a machine is to have none.
    pub gpu: Option<Gpu>,
    /// How the guest finds the GPU.
    pub transport: Transport,
    /// Where the guest's serial console goes and comes from.
    pub console: Console,
    /// Where the guest's dumps go.
    pub dump: Option<DumpTarget>,
    /// Whether the threads that handle the guest's data are filtered ([`crate::sandbox`]); the GPU's too, whatever its own
    /// configuration says.
    pub sandbox: Sandbox,
    /// If there is a list, then from when the kernel is loaded the calling thread, and all that it starts, can open nothing but
    /// KVM and these devices ([`pvgpu_host_proxy::files`]): for a program that makes no second machine.
    pub only_devices: Option<Vec<PathBuf>>,
    /// A file that the calling thread removes when the machine has ended: what restricts it leaves that to it (and, of necessity,
    /// the removal of all else in the file's folder that this user may remove).
    pub removes: Option<PathBuf>,
    /// Devices besides the machine's own, between [`layout::EXTRA_MMIO`] and [`layout::EXTRA_MMIO_END`].
    pub devices: Vec<Attachment>,
}

impl VmConfig {
    /// A machine with 256 MiB of RAM, one vCPU and no GPU that prints to standard output.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kvm: kvm::DEVICE.into(),
            kernel: kernel.into(),
            initrd: Vec::new(),
            cmdline: String::new(),
            memory: 256 << 20,
            cpus: 1,
            gpu: None,
            transport: Transport::default(),
            console: Console::output(io::stdout()),
            dump: None,
            sandbox: Sandbox::default(),
            only_devices: None,
            removes: None,
            devices: Vec::new(),
        }
    }
}

/// Why a machine could not be made or run. What a guest does wrong is an [`Ending`], not an error.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initial ramdisk or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The GPU.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Device windows.
    #[error(transparent)]
    Devices(#[from] Overlap),
    /// Number of vCPUs.
    #[error("{0} vCPUs are not possible: choose --cpus from 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u8),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Landlock.
    #[error("Landlock refuses ({0}): run with --sandbox off, and report this")]
    Files(io::Error),
    /// Threads, events, epoll.
    #[error(
        "the host refused {what}: {error}; check its limits on threads and open files (ulimit -u, ulimit -n)"
    )]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        error: io::Error,
    },
}

impl VmError {
    fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Host { what, error }
    }
}

/// What is known of a machine that has ended.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Why it ended.
    pub ending: Ending,
    /// The process exit status that stands for that ([`Ending::status`]).
    pub exit_code: u8,
    /// How often guests left for the monitor, all vCPUs together.
    pub exits: Exits,
    /// How many of the exits were doorbells of the GPU; those that went through an ioeventfd are no exits.
    pub doorbell_exits: u64,
    /// What the GPU counted, as it was when the machine ended.
    pub gpu: Option<Statistics>,
    /// The last dump, where [`DumpTarget::Memory`] asked to keep it.
    #[serde(skip)]
    pub dump: Option<Vec<u8>>,
}

/// A machine that is complete but for running.
///
/// Fields are in the order in which they must be dropped: the VM before the memory in its slots (RAM and
/// the device's aperture), devices before the RAM that they use.
pub struct Vm {
    vcpus: Vec<(Vcpu, Kick)>,
    machine: Machine,
    around: Surroundings,
    debug: Arc<Debug>,
    gpu: Option<Arc<Virtio<GpuDevice>>>,
    gpu_off: Option<Off>,
    port: Port,
    input: Option<(File, bool)>,
    filters: Filters,
    ram: Ram,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("vcpus", &self.vcpus.len())
            .field("bus", &self.around.bus)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Makes the machine and loads its kernel; no guest instruction runs yet.
    ///
    /// # Errors
    ///
    /// See [`VmError`].
    pub fn new(config: VmConfig) -> Result<Self, VmError> {
        if config.cpus == 0 || config.cpus > layout::MAX_CPUS {
            return Err(VmError::Cpus(config.cpus));
        }
        // What needs no KVM comes first, so that a wrong file is named even where KVM is missing.
        let ram = match config.gpu {
            Some(Gpu::VhostUser { .. }) => Ram::shareable(config.memory)?,
            _ => Ram::new(config.memory)?,
        };
        let entry = boot::load(
            &ram.map().memory(),
            boot::Request {
                kernel: &config.kernel,
                initrd: &config.initrd,
                cmdline: &config.cmdline,
                announcements: &announcements(config.gpu.as_ref().map(|_| config.transport)),
                cpus: config.cpus,
            },
        )?;

        if let Some(devices) = &config.only_devices {
            let mut devices: Vec<_> = devices.iter().map(PathBuf::as_path).collect();
            devices.push(&config.kvm);
            let folder = config.removes.as_deref().map(files::folder);
            files::restrict(&devices, folder).map_err(VmError::Files)?;
        }

        let stop = Stop::new().map_err(VmError::host("an event"))?;
        let machine = Machine::new(&config.kvm)?;
        for (slot, range) in [layout::slot::RAM_LOW, layout::slot::RAM_HIGH]
            .into_iter()
            .zip(ram.ranges())
        {
            // SAFETY: `ram` is a field of `Vm` dropped after the machine and its vCPUs, so the range
            // stays mapped as long as the guest can run, and nothing refers to it but vm-memory.
            unsafe { machine.add_memory(slot, range)? };
        }

        let port = Port::new(config.console.output).map_err(VmError::host("an event"))?;
        machine.add_interrupt(layout::SERIAL_IRQ, port.interrupt())?;

        let mut bus = Bus::default();
        let debug = Arc::new(Debug::new(ram.map().clone(), stop.clone(), config.dump));
        bus.attach(Attachment {
            base: layout::DEBUG_MMIO,
            size: layout::DEBUG_MMIO_SIZE,
            device: Arc::clone(&debug) as _,
            doorbells: Vec::new(),
            interrupts: Vec::new(),
        })?;
        let mut gpu = None;
        let mut gpu_off = None;
        let mut aperture = None;
        let mut pci = None;
        let mut system_calls = [THREAD, DEVICE].concat();
        if let Some(wanted) = config.gpu {
            let attached = gpu::attach(wanted, config.transport, &ram, config.sandbox, &machine)?;
            aperture = attached.aperture;
            if let Some(range) = aperture.as_deref().map(gpu::range) {
                // SAFETY: the reservation stays mapped, whatever is mapped inside, for as long as it lives;
                // it is part of the surroundings that every vCPU holds while it runs, and no Rust
                // reference ever points into it.
                unsafe { machine.add_memory(layout::slot::APERTURE, range)? };
            }
            bus.attach(attached.attachment)?;
            system_calls = attached.system_calls;
            pci = attached
                .function
                .map(|function| PciBus::new(vec![function]));
            gpu = Some(attached.device);
            gpu_off = Some(attached.off);
        }
        for device in config.devices {
            system_calls.extend(device.device.system_calls());
            bus.attach(device)?;
        }
        for device in bus.devices() {
            machine.connect(device)?;
        }

        vcpu::install_signal_handler()?;
        let vcpus = (0..config.cpus)
            .map(|index| Vcpu::new(&machine, index, config.cpus, entry))
            .collect::<Result<_, _>>()?;
        let around = Surroundings {
            bus: Arc::new(bus),
            ports: Arc::new(Ports::new(port.clone(), pci, stop.clone())),
            memory: ram.map().clone(),
            aperture,
            stop,
            triple_fault_resets: resets_by_triple_fault(&config.cmdline),
        };
        let vcpu_calls = match config.transport {
            Transport::Mmio => &[],
            Transport::Pci => sandbox::VCPU_PCI,
        };
        let removes = config.removes.is_some();
        let filters = Filters::new(config.sandbox, &system_calls, vcpu_calls, removes)?;
        let input = config
            .console
            .input
            .map(|file| (file, config.console.escape));
        Ok(Self {
            vcpus,
            machine,
            around,
            debug,
            gpu,
            gpu_off,
            port,
            input,
            filters,
            ram,
        })
    }

    /// What the threads around this machine need to do, for a program to put its own under.
    pub fn filter(&self) -> &Filter {
        &self.filters.monitor
    }

    /// The switch that ends this machine from any thread.
    pub fn stop(&self) -> Stop {
        self.around.stop.clone()
    }

    /// What the machine counts, readable from any thread while it runs.
    pub fn counters(&self) -> Counters {
        Counters {
            exits: self.vcpus.iter().map(|(vcpu, _)| vcpu.exits()).collect(),
            gpu: self.gpu.as_ref().map(Arc::downgrade),
        }
    }

    /// What tells of the GPU and switches its trace, from any thread while the machine runs; none if it has no GPU in
    /// this process.
    pub fn monitor(&self) -> Option<Monitor> {
        self.gpu.as_ref()?.device().monitor()
    }

    /// The guest's RAM, for tests and benchmarks that share words with their guest.
    pub fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        self.ram.map()
    }

    /// Runs the guest until it ends or somebody stops it, and takes the machine down.
    ///
    /// # Errors
    ///
    /// When the host refuses threads or epoll; whatever the guest does is part of the outcome.
    ///
    /// # Panics
    ///
    /// With the panic of a vCPU thread, if one had one: a defect of the monitor.
    pub fn run(self) -> Result<Outcome, VmError> {
        self.run_under(&Filter::OFF)
    }

    /// As [`Vm::run`], and puts the calling thread under [`Vm::filter`] for the rest of its life: for a program that does
    /// nothing else afterwards.
    ///
    /// # Errors
    ///
    /// As [`Vm::run`].
    pub fn run_in_the_sandbox(self) -> Result<Outcome, VmError> {
        let filter = self.filters.monitor.clone();
        self.run_under(&filter)
    }

    fn run_under(self, filter: &Filter) -> Result<Outcome, VmError> {
        // On an early return these are dropped from the last to the first: see the order of the fields.
        let Self {
            ram,
            filters,
            input,
            port,
            gpu_off,
            gpu,
            debug,
            around,
            machine,
            vcpus,
        } = self;
        let exits: Vec<_> = vcpus.iter().map(|(vcpu, _)| vcpu.exits()).collect();
        let mut running: Vec<(JoinHandle<()>, Kick)> = Vec::new();
        let mut link_thread = None;
        let mut result = Ok(());
        for (index, (vcpu, kick)) in vcpus.into_iter().enumerate() {
            let surroundings = around.clone();
            let run = move || vcpu.run(&surroundings);
            let thread = filters.vcpu.spawn(format!("vcpu{index}"), run);
            match thread {
                Ok(thread) => running.push((thread, kick)),
                Err(error) => {
                    result = Err(VmError::host("a thread")(error));
                    around.stop.end(Ending::Stopped { signal: None });
                    break;
                }
            }
        }
        if let (Some(Off::Link(link)), Some(gpu)) = (&gpu_off, &gpu)
            && result.is_ok()
        {
            let (link, gpu) = (Arc::clone(link), Arc::clone(gpu));
            let look_after = move || link.run(&*gpu);
            match filters.link.spawn("pvgpu-link".into(), look_after) {
                Ok(thread) => link_thread = Some(thread),
                Err(error) => {
                    result = Err(VmError::host("a thread")(error));
                    around.stop.end(Ending::Stopped { signal: None });
                }
            }
        }
        // The vCPUs have filters of their own by now, which are not that of this thread.
        if result.is_ok() {
            result = filter.enter().map_err(|error| {
                around.stop.end(Ending::Stopped { signal: None });
                error.into()
            });
        }
        if result.is_ok() {
            let aperture = around.aperture.as_deref();
            result = events::run(&around.stop, &port, input, aperture).map_err(|error| {
                around.stop.end(Ending::Stopped { signal: None });
                VmError::host("an event loop")(io::Error::other(error))
            });
        }
        // A vCPU may be in the device, whose doorbell a guest can keep busy for ever.
        if let Some(off) = &gpu_off {
            off.switch();
        }
        for (thread, kick) in &mut running {
            kick.kick(thread);
        }
        let mut panic = None;
        for thread in running
            .into_iter()
            .map(|(thread, _)| thread)
            .chain(link_thread)
        {
            if let Err(payload) = thread.join() {
                panic = Some(payload);
            }
        }
        if let Some(payload) = panic {
            std::panic::resume_unwind(payload);
        }
        result?;

        let dump = debug.take_dump();
        let ending = around
            .stop
            .ending()
            .unwrap_or(Ending::Stopped { signal: None });
        // Counted before the end of the session, which takes its counters with it.
        let doorbell_exits = gpu.as_ref().map_or(0, |gpu| gpu.notifications());
        let statistics = gpu.as_ref().and_then(|gpu| gpu.device().statistics());
        drop((machine, around, debug, port, gpu));
        drop(ram);
        Ok(Outcome {
            exit_code: ending.status(),
            ending,
            exits: sum(&exits),
            doorbell_exits,
            gpu: statistics,
            dump,
        })
    }
}

/// What a machine counts while it runs. Its machine may end; then the GPU's counters are gone.
pub struct Counters {
    exits: Vec<Arc<ExitCounters>>,
    gpu: Option<Weak<Virtio<GpuDevice>>>,
}

impl Counters {
    /// The exits of all vCPUs so far.
    pub fn exits(&self) -> Exits {
        sum(&self.exits)
    }

    /// What the GPU has counted so far; none if there is no GPU any more.
    pub fn gpu(&self) -> Option<Statistics> {
        let gpu = self.gpu.as_ref()?.upgrade()?;
        gpu.device().statistics()
    }
}

fn sum(exits: &[Arc<ExitCounters>]) -> Exits {
    let mut all = Exits::default();
    exits.iter().for_each(|exits| all += exits.read());
    all
}

/// What tells the guest's kernel where the machine's devices are. It finds a GPU on PCI by itself.
fn announcements(gpu: Option<Transport>) -> Vec<String> {
    let mut announcements = vec![format!("pvgpu.debug={:#x}", layout::DEBUG_MMIO)];
    if gpu == Some(Transport::Mmio) {
        announcements.push(format!(
            "virtio_mmio.device={}@{:#x}:{}",
            size::display(layout::GPU_MMIO_SIZE),
            layout::GPU_MMIO,
            layout::GPU_IRQ
        ));
    }
    announcements
}

/// Whether a Linux command line asks for resets by triple fault: `reboot=t`, alone or in a list.
fn resets_by_triple_fault(cmdline: &str) -> bool {
    cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("reboot="))
        .any(|modes| modes.split(',').any(|mode| mode.starts_with('t')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_can_be_made_on_one_thread_and_run_on_another() {
        fn is_send<T: Send>() {}
        is_send::<VmConfig>();
        is_send::<Vm>();
        is_send::<Outcome>();
    }

    #[test]
    fn the_gpu_is_announced_as_linux_expects() {
        assert_eq!(
            announcements(Some(Transport::Mmio)),
            [
                "pvgpu.debug=0xd0001000",
                "virtio_mmio.device=4K@0xd0000000:5"
            ]
        );
        for other in [Some(Transport::Pci), None] {
            assert_eq!(announcements(other), ["pvgpu.debug=0xd0001000"]);
        }
    }

    #[test]
    fn only_reboot_by_triple_fault_makes_a_triple_fault_a_reset() {
        assert!(resets_by_triple_fault("console=ttyS0 reboot=t panic=-1"));
        assert!(resets_by_triple_fault("reboot=warm,t"));
        assert!(!resets_by_triple_fault("console=ttyS0 reboot=k"));
        assert!(!resets_by_triple_fault("noreboot=t init=/t"));
    }
}
