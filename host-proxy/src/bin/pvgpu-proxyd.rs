//! The program `pvgpu-proxyd`: the device for a VMM in another process, over vhost-user.
//!
//! Everything it does is the library's; here are only the options, the order of a safe start, and the exit status.

use clap::Parser;
use pvgpu_host_proxy::choice::Choice;
use pvgpu_host_proxy::command_line::{SandboxChoice, USAGE, usage};
use pvgpu_host_proxy::control::{self, Socket};
use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig};
use pvgpu_host_proxy::sandbox::{self, Filter, Sandbox};
use pvgpu_host_proxy::setting::Setting;
use pvgpu_host_proxy::soft::SoftConfig;
use pvgpu_host_proxy::vhost_user::listener::Source;
use pvgpu_host_proxy::vhost_user::{BackEnd, FRONT_END, serve};
use pvgpu_host_proxy::{files, logging, privacy, rlimit, size};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A paravirtual GPU for VMMs that speak vhost-user.
#[derive(Debug, Parser)]
#[command(
    name = "pvgpu-proxyd",
    version,
    // What an operator adds to a unit's options counts.
    args_override_self = true,
    after_help = "\
One of --socket, --fd and a socket of systemd (LISTEN_FDS) says where the front end is. With a socket it serves one front end after \
the other until it is ended by a signal. Of an option that is given twice the last one counts, but limits add up.
Exit status: 0 when the front end of --fd is gone, 1 when it was disconnected for what it sent, 2 for errors of usage and environment. \
What the sandbox forbids ends it by SIGSYS, which a shell reports as 159."
)]
struct Options {
    /// Listen on a Unix socket at this path, which only this user can connect to.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serve the front end at the other end of this inherited socket.
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    fd: Option<i32>,
    /// GPU: 'soft' (embedded in this program) or 'drm:NODE' (a node of this host).
    #[arg(long, value_name = "GPU", default_value = "soft", value_parser = parse_gpu)]
    gpu: Choice,
    /// What the guest may use of the GPU: message=SIZE, objects=N, in_flight=N, mapped=SIZE, memory=SIZE, handles=N,
    /// worker_time=MILLISECONDS per second. Reaching a limit is an error for the guest alone (see docs/protocol.md).
    #[arg(long, value_name = "NAME=VALUE,...", value_delimiter = ',', value_parser = Setting::parse)]
    limit: Vec<Setting>,
    /// Size of the window in which the guest sees the GPU's memory, where the front end supports shared-memory regions; 0 for none.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    aperture: u64,
    /// Number of request queues, one for each vCPU at best. The front end must offer one more, for events.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// How long a queue's thread looks for requests before it sleeps, in microseconds: longer answers sooner and takes more of a
    /// processor.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    poll: u32,
    /// How many seconds a submission may run on the embedded GPU before the GPU is reset.
    #[arg(long, value_name = "SECONDS", default_value_t = SoftConfig::default().watchdog.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    watchdog: u64,
    /// Make a control socket there, which 'pvgpu-ctl --socket SOCKET' asks what the GPU does, and for traces; for this user and root
    /// alone (see docs/operations.md).
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Which messages go to standard error: off, error, warn, info or debug.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse_level)]
    log: log::LevelFilter,
    /// Whether threads may only make the system calls that they need, and the program only open the files that it is given: 'on'
    /// unless the environment says PVGPU_SANDBOX=off, for debugging alone.
    #[arg(long, value_enum)]
    sandbox: Option<SandboxChoice>,
    /// Print what this program can do, as JSON, and exit.
    #[arg(long)]
    print_capabilities: bool,
}

fn parse_gpu(text: &str) -> Result<Choice, String> {
    Choice::parse(text)
        .ok_or_else(|| "write soft or drm:NODE (such as drm:/dev/dri/renderD128)".into())
}

fn parse_level(text: &str) -> Result<log::LevelFilter, String> {
    text.parse()
        .map_err(|_| "write off, error, warn, info or debug".into())
}

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => return usage(&error, "pvgpu-proxyd", &[]),
    };
    if options.print_capabilities {
        println!("{}", capabilities());
        return ExitCode::SUCCESS;
    }
    logging::to_stderr("pvgpu-proxyd", options.log);
    match run(&options) {
        Ok(status) => status,
        Err(message) => {
            eprintln!("pvgpu-proxyd: {message}");
            ExitCode::from(USAGE)
        }
    }
}

/// What `--print-capabilities` prints, in the form that QEMU's conventions for back ends give it. Their list of types has none for
/// this device.
fn capabilities() -> serde_json::Value {
    serde_json::json!({
        "type": "pvgpu",
        "virtio-device-id": DEVICE_ID,
        "features": ["drm", "soft", "shmem"],
    })
}

fn source(options: &Options) -> Result<Source, String> {
    let source = match (&options.socket, options.fd) {
        (Some(path), _) => Source::listen(path).map(Some),
        (None, Some(descriptor)) => Source::connection(descriptor).map(Some),
        (None, None) => Source::activated(),
    };
    source.map_err(|error| error.to_string())?.ok_or_else(|| {
        "no front end: give --socket PATH or --fd N, or start it by a socket unit of systemd".into()
    })
}

fn run(options: &Options) -> Result<ExitCode, String> {
    // Before anything is opened: an inherited descriptor is known by its number.
    let source = {
        privacy::hide().map_err(|error| format!("cannot hide this process's memory: {error}"))?;
        source(options)?
    };
    let sandbox = SandboxChoice::sandbox(options.sandbox);
    if sandbox == Sandbox::On {
        sandbox::available().map_err(|error| format!("{error} (--sandbox off)"))?;
    }
    if !options.aperture.is_multiple_of(4096) {
        return Err(format!(
            "an aperture of {} is not possible: choose --aperture as a multiple of 4K, or 0 for none",
            size::display(options.aperture)
        ));
    }
    if let Err(error) = rlimit::raise_open_files() {
        log::warn!(
            "guests get fewer buffer objects: cannot raise the limit on open files: {error}"
        );
    }
    let control = options.control.as_deref().map(Socket::bind).transpose();
    let control = control.map_err(|error| format!("{error} (--control SOCKET)"))?;
    let watchdog = Duration::from_secs(options.watchdog);
    let driver = options.gpu.open(watchdog, sandbox);
    let driver = driver.map_err(|error| error.to_string())?;
    if sandbox == Sandbox::On {
        let nodes: Vec<_> = options.gpu.node().into_iter().collect();
        files::restrict(&nodes, None).map_err(|error| {
            format!("Landlock refuses ({error}): run with --sandbox off, and report this")
        })?;
    }
    let mut config = DeviceConfig {
        request_queues: options.queues,
        queue_size: 1024,
        poll: Duration::from_micros(options.poll.into()),
        sandbox,
        ..DeviceConfig::default()
    };
    for setting in &options.limit {
        setting.apply(&mut config);
    }
    let name = driver.identity().name.clone();
    let device = Device::new(driver, None, config).map_err(|error| {
        format!("cannot set the GPU up: {error}; check the limit on open files (ulimit -n)")
    })?;
    let serve_control = |socket: Socket| {
        let listener = socket.into_listener()?;
        control::serve(listener, device.monitor(), sandbox)
    };
    let _server = control
        .map(serve_control)
        .transpose()
        .map_err(|error| format!("cannot serve the control socket: {error}"))?;
    let calls = [FRONT_END, device.system_calls()].concat();
    let filter = Filter::new(sandbox, &calls).map_err(|error| error.to_string())?;
    let back_end = Arc::new(Mutex::new(BackEnd::new(device, options.aperture)));
    filter.enter().map_err(|error| error.to_string())?;
    match source {
        Source::Connection(connection) => {
            log::info!("{name}: serving the front end");
            match serve(connection, &back_end) {
                Ok(()) => Ok(ExitCode::SUCCESS),
                Err(error) => {
                    log::error!("{error}");
                    Ok(ExitCode::FAILURE)
                }
            }
        }
        Source::Listener(listener) => loop {
            log::info!("{name}: waiting for a front end");
            let connection = match listener.accept() {
                Ok((connection, _)) => connection,
                Err(error) => return Err(format!("cannot accept a front end: {error}")),
            };
            log::info!("{name}: a front end is connected");
            match serve(connection, &back_end) {
                Ok(()) => log::info!("{name}: the front end is gone"),
                Err(error) => log::error!("{error}"),
            }
        },
    }
}
