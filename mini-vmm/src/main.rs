//! The program `mini-vmm`: options in, a machine's console and exit code out.
//!
//! Everything it does is the library's; here are only the options, the terminal and the exit status.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use pvgpu_host_proxy::choice::Choice;
use pvgpu_host_proxy::command_line::{SandboxChoice, USAGE, usage};
use pvgpu_host_proxy::control::{self, Socket};
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::sandbox::{self, Sandbox};
use pvgpu_host_proxy::setting::Setting;
use pvgpu_host_proxy::soft::SoftConfig;
use pvgpu_host_proxy::statistics::Statistics;
use pvgpu_host_proxy::{logging, privacy, rlimit, size};
use pvgpu_mini_vmm::{
    Console, DumpTarget, Ending, Gpu, Transport, Vm, VmConfig, VmError, check, kvm, terminal,
};

/// A small KVM virtual machine monitor with a paravirtual GPU.
#[derive(Debug, Parser)]
#[command(
    name = "mini-vmm",
    version,
    after_help = "\
Exit status of 'run': the guest's own exit code (its low eight bits; 255 where these are 0 but the code is not), \
0 when the guest resets the machine, 2 for errors of usage and environment (no KVM, bad kernel, ...), \
3 when the guest crashed or KVM could not go on with it, 128 + N when signal N ended it (130 also for Ctrl-A x). \
What the sandbox forbids ends it by SIGSYS, which a shell reports as 159.
Exit status of 'check': 0 when a machine can run here, 2 when not."
)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a kernel and run it until it ends. On a terminal, Ctrl-A x ends it.
    Run(Box<Run>),
    /// Tell what this host offers to a machine, and what to do about what is missing.
    Check(Check),
}

#[derive(Debug, Args)]
struct Run {
    /// Kernel: an ELF for x86-64 (with or without PVH entry) or a bzImage.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial ramdisk. Given several times, the files are put one after another: Linux unpacks all of them.
    #[arg(long, value_name = "FILE")]
    initrd: Vec<PathBuf>,
    /// Kernel command line; what announces the machine's devices is added to it.
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// RAM, such as 256M or 1G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(pvgpu_mini_vmm::layout::MAX_CPUS)))]
    cpus: u8,
    /// GPU: 'soft' (embedded in this program), 'drm:NODE' (a node of the host, see 'mini-vmm check'), 'vhost-user:SOCKET' (a
    /// pvgpu-proxyd that listens there and knows the GPU, its limits and all else of it) or 'none'.
    #[arg(long, value_name = "GPU", default_value = "soft", value_parser = GpuChoice::parse)]
    gpu: GpuChoice,
    /// How the guest finds the GPU: 'mmio' as the kernel's command line tells it, 'pci' on a PCI bus, by itself.
    #[arg(long, value_enum, default_value_t = TransportChoice::Mmio)]
    transport: TransportChoice,
    /// Size of the window in which the guest sees the GPU's memory; 0 for none. With vhost-user, the daemon knows the size.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    aperture: u64,
    /// As '--aperture 0', which most VMMs are like: the GPU's memory is copied to and from the guest's where it is synchronized.
    #[arg(long, conflicts_with = "aperture")]
    no_aperture: bool,
    /// Who handles the GPU's requests: 'inline' the vCPU that makes them (lowest latency of a single one),
    /// 'worker' a thread for each vCPU (highest throughput).
    #[arg(long, value_enum, default_value_t = DoorbellChoice::Worker)]
    doorbell: DoorbellChoice,
    /// How many seconds a submission may run on the embedded GPU before the GPU is reset.
    #[arg(long, value_name = "SECONDS", default_value_t = SoftConfig::default().watchdog.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    watchdog: u64,
    /// Record every GPU request and its result in this file; `cargo xtask trace FILE` prints it.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Most bytes of that file: it lacks the requests after them, and mini-vmm says how many.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    trace_limit: u64,
    /// Make a control socket there, which 'pvgpu-ctl --socket SOCKET' asks what the GPU does, and for traces; for this user and
    /// root alone.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// What the guest may use of the GPU: message=SIZE, objects=N, in_flight=N, mapped=SIZE, memory=SIZE, handles=N,
    /// worker_time=MILLISECONDS per second. Reaching a limit is an error for the guest alone (see docs/protocol.md).
    #[arg(long, value_name = "NAME=VALUE,...", value_delimiter = ',', value_parser = Setting::parse)]
    limit: Vec<Setting>,
    /// File that the guest's memory dumps replace (see the debug device).
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
    /// Whether threads that handle the guest's data may only make the system calls that they need, and the program only
    /// open the files that it is given: 'on' unless the environment says PVGPU_SANDBOX=off, for debugging alone.
    #[arg(long, value_enum)]
    sandbox: Option<SandboxChoice>,
    /// Print one JSON object with the outcome on standard output; the console goes to standard error.
    #[arg(long)]
    json: bool,
    /// KVM device.
    #[arg(long, value_name = "FILE", default_value = kvm::DEVICE)]
    kvm: PathBuf,
}

/// A value of `--gpu`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum GpuChoice {
    Host(Choice),
    VhostUser(PathBuf),
    None,
}

impl GpuChoice {
    fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vhost-user", socket)) if !socket.is_empty() => {
                Ok(Self::VhostUser(socket.into()))
            }
            None if text == "none" => Ok(Self::None),
            _ => Choice::parse(text).map(Self::Host).ok_or_else(|| {
                "write soft, drm:NODE (such as drm:/dev/dri/renderD128), vhost-user:SOCKET or none"
                    .into()
            }),
        }
    }
}

/// A value of `--transport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TransportChoice {
    Mmio,
    Pci,
}

/// A value of `--doorbell`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DoorbellChoice {
    Inline,
    Worker,
}

impl Run {
    /// Size of the aperture.
    fn aperture(&self) -> u64 {
        if self.no_aperture { 0 } else { self.aperture }
    }
}

#[derive(Debug, Args)]
struct Check {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// KVM device.
    #[arg(long, value_name = "FILE", default_value = kvm::DEVICE)]
    kvm: PathBuf,
}

fn main() -> ExitCode {
    logging::to_stderr("mini-vmm", log::LevelFilter::Warn);
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => return usage(&error, "mini-vmm", &["run", "check"]),
    };
    let result = match options.command {
        Command::Run(options) => run(*options),
        Command::Check(options) => run_check(&options),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(message) => {
            eprintln!("mini-vmm: {message}");
            ExitCode::from(USAGE)
        }
    }
}

/// The GPU that the options ask for.
fn gpu(options: &Run, trace: Option<File>) -> Result<Option<Gpu>, String> {
    let choice = match &options.gpu {
        GpuChoice::Host(choice) => choice,
        GpuChoice::VhostUser(socket) => {
            return Ok(Some(Gpu::VhostUser {
                socket: socket.clone(),
                aperture: options.aperture() != 0,
            }));
        }
        GpuChoice::None => return Ok(None),
    };
    let watchdog = Duration::from_secs(options.watchdog);
    let driver = choice.open(watchdog, SandboxChoice::sandbox(options.sandbox));
    let mut device = DeviceConfig {
        request_queues: options.cpus.into(),
        doorbell: match options.doorbell {
            DoorbellChoice::Inline => Doorbell::Inline,
            DoorbellChoice::Worker => Doorbell::Worker,
        },
        trace,
        trace_limit: options.trace_limit,
        ..DeviceConfig::default()
    };
    for setting in &options.limit {
        setting.apply(&mut device);
    }
    Ok(Some(Gpu::InProcess {
        driver: driver.map_err(|error| error.to_string())?,
        aperture: options.aperture(),
        device,
    }))
}

/// The file that a GPU's requests are recorded in.
fn open_trace(options: &Run) -> Result<Option<File>, String> {
    let Some(path) = &options.trace else {
        return Ok(None);
    };
    if !matches!(options.gpu, GpuChoice::Host(_)) {
        return Err("--trace records the requests of a GPU in this process, but there is no GPU here: leave it out or choose another --gpu".into());
    }
    let file = File::create(path).map_err(|error| {
        format!(
            "cannot write the trace {}: {error}; give a --trace FILE that can be created",
            path.display()
        )
    });
    file.map(Some)
}

/// The socket at which the GPU's state can be had.
fn open_control(options: &Run) -> Result<Option<Socket>, String> {
    let Some(path) = &options.control else {
        return Ok(None);
    };
    if options.gpu == GpuChoice::None {
        return Err(
            "--control shows a GPU, but there is none: leave it out or choose another --gpu".into(),
        );
    }
    if let GpuChoice::VhostUser(_) = options.gpu {
        return Err(
            "--control shows a GPU in this process: give it to the pvgpu-proxyd that has this one"
                .into(),
        );
    }
    let socket = Socket::bind(path).map_err(|error| format!("{error} (--control SOCKET)"));
    socket.map(Some)
}

/// The file that dumps go to, as it is until there is one.
fn open_dump(path: &Path) -> Result<File, String> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    file.map_err(|error| {
        format!(
            "cannot write the dump {}: {error}; give a --dump FILE that can be created",
            path.display()
        )
    })
}

fn run(options: Run) -> Result<u8, String> {
    privacy::hide().map_err(|error| format!("cannot hide this process's memory: {error}"))?;
    let sandbox = SandboxChoice::sandbox(options.sandbox);
    if sandbox == Sandbox::On {
        sandbox::available().map_err(|error| format!("{error} (--sandbox off)"))?;
    }
    let watch = |error| format!("cannot watch for signals: {error}");
    let signals = terminal::Signals::block().map_err(watch)?;
    if let Err(error) = rlimit::raise_open_files() {
        log::warn!(
            "guests get fewer buffer objects: cannot raise the limit on open files: {error}"
        );
    }
    let output: Box<dyn Write + Send> = if options.json {
        Box::new(io::stderr())
    } else {
        Box::new(io::stdout())
    };
    let stdin = io::stdin();
    let input = stdin.as_fd().try_clone_to_owned().ok().map(File::from);
    let is_terminal = io::IsTerminal::is_terminal(&stdin);
    let dump = options.dump.as_deref().map(open_dump).transpose()?;
    let trace = open_trace(&options)?;
    let control = open_control(&options)?;
    let only_devices = (sandbox == Sandbox::On).then(|| match &options.gpu {
        GpuChoice::Host(choice) => choice.node().map(PathBuf::from).into_iter().collect(),
        GpuChoice::VhostUser(_) | GpuChoice::None => Vec::new(),
    });
    let config = VmConfig {
        only_devices,
        gpu: gpu(&options, trace)?,
        transport: match options.transport {
            TransportChoice::Mmio => Transport::Mmio,
            TransportChoice::Pci => Transport::Pci,
        },
        removes: options.control,
        kvm: options.kvm,
        initrd: options.initrd,
        cmdline: options.cmdline,
        memory: options.memory,
        cpus: options.cpus,
        console: Console {
            output,
            input,
            escape: is_terminal,
        },
        dump: dump.map(DumpTarget::File),
        sandbox,
        ..VmConfig::new(options.kernel)
    };
    let message = |error: VmError| error.to_string();
    let vm = Vm::new(config).map_err(message)?;
    let server = match (&control, vm.monitor()) {
        (Some(socket), Some(monitor)) => {
            let listener = socket.listener();
            let server = listener.and_then(|listener| control::serve(listener, monitor, sandbox));
            Some(server.map_err(|error| format!("cannot serve the control socket: {error}"))?)
        }
        _ => None,
    };
    signals.end(vm.stop(), vm.filter()).map_err(watch)?;
    let raw = terminal::RawMode::enter(stdin.as_fd())
        .map_err(|error| format!("cannot set the terminal up: {error}"))?;
    let outcome = vm.run_in_the_sandbox();
    drop((raw, server, control));
    let outcome = outcome.map_err(message)?;
    match &outcome.ending {
        Ending::TripleFault { place } => {
            eprintln!("mini-vmm: the guest crashed (triple fault; {place})")
        }
        Ending::Failure { cause } => eprintln!("mini-vmm: the guest cannot go on: {cause}"),
        Ending::Exit { .. } | Ending::Reset | Ending::Stopped { .. } => {}
    }
    outcome.gpu.iter().for_each(report);
    if options.json {
        let json = serde_json::to_string(&outcome).map_err(|error| error.to_string())?;
        print(&format!("{json}\n"))?;
    }
    Ok(outcome.exit_code)
}

/// Tells what a guest's user should know of its GPU: limits that it has reached, and what the trace lacks.
fn report(gpu: &Statistics) {
    let reached = gpu.limits_reached.iter().filter(|(_, count)| *count > 0);
    let reached: Vec<_> = reached
        .map(|(limit, count)| format!("{} ({count} times)", limit.name()))
        .collect();
    if !reached.is_empty() {
        let reached = reached.join(", ");
        eprintln!(
            "mini-vmm: the guest has reached limits of its GPU: {reached}; --limit sets them"
        );
    }
    if gpu.untraced > 0 {
        eprintln!(
            "mini-vmm: the trace lacks the last {} requests; --trace-limit sets its size",
            gpu.untraced
        );
    }
}

/// Writes `text` to standard output. That nobody reads it any more (`mini-vmm check | head`) is no error.
fn print(text: &str) -> Result<(), String> {
    let mut output = io::stdout();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(format!(
            "cannot write to standard output: {error}; send it to a file or a program that takes it"
        )),
        _ => Ok(()),
    }
}

fn run_check(options: &Check) -> Result<u8, String> {
    let report = check::check(&options.kvm, check::GPU_NODES.as_ref());
    if options.json {
        let json = serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?;
        print(&format!("{json}\n"))?;
    } else {
        print(&report.to_string())?;
    }
    Ok(if report.ok { 0 } else { USAGE })
}
