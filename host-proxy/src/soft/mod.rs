//! The embedded software GPU: a GPU driver in miniature, for machines without a GPU and for tests.
//!
//! It is a [`HostDriver`] like the one for real DRM nodes, with an interface of its own
//! ([`pvgpu_protocol::family::soft`], `docs/soft-gpu.md`), memory that can be mapped, engines that execute
//! asynchronously, fences, syncobjs and PRIME. Each session has queues and engines of its own on it (`Guest`), which take
//! turns. It must never touch guest memory: it sees copied and validated calls, and its own buffers.

mod buffer;
mod command;
mod engine;
mod fence;
mod file;
mod handle;
mod matrix;
pub(crate) mod memory;
mod raster;
mod syncobj;
#[cfg(test)]
mod tests;
mod turn;

use crate::driver::{HostDriver, HostObject, Identity};
use crate::logging::guest_log;
use crate::sandbox::{Allowed, Filter, Sandbox, THREAD};
use buffer::Account;
use engine::{Engines, Scheduler};
use fence::lock;
use file::File;
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::open;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use syncobj::Points;
use turn::Turns;

/// How large and how patient the GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftConfig {
    /// Bytes of GPU memory for all files together.
    pub memory: u64,
    /// Most buffer objects of all files together. Each takes a file descriptor and a mapping of this process, so no
    /// more than half of the descriptors that it may have are used.
    pub buffers: u64,
    /// Engines: submissions that are executed at a time, of all guests together and of different files of a guest, at
    /// least 1.
    pub engines: u32,
    /// How long a submission may run before its engine is reset.
    pub watchdog: Duration,
    /// Whether the engines are filtered.
    pub sandbox: Sandbox,
}

impl Default for SoftConfig {
    fn default() -> Self {
        Self {
            memory: 1 << 30,
            buffers: 16_384,
            engines: 1,
            watchdog: Duration::from_secs(5),
            sandbox: Sandbox::default(),
        }
    }
}

/// What the threads of a device do for the embedded GPU, whose ioctls never reach the kernel: buffer objects are made.
pub static SYSTEM_CALLS: &[Allowed] = &[
    Allowed::any(libc::SYS_memfd_create, MEMORY),
    Allowed::any(libc::SYS_ftruncate, MEMORY),
    Allowed::equal(
        libc::SYS_fcntl,
        1,
        libc::F_ADD_SEALS.cast_unsigned(),
        MEMORY,
    ),
];

const MEMORY: &str = "memory of a buffer object";

/// The embedded GPU, as one guest uses it; [`HostDriver::for_session`] gives it to another one.
pub struct SoftDriver {
    guest: Arc<Guest>,
}

/// What all guests share.
struct Device {
    identity: Identity,
    config: SoftConfig,
    account: Arc<Account>,
    turns: Arc<Turns>,
    /// Of engines, unless a thread starts them that has a filter already.
    filter: Filter,
}

/// What all files of a guest share, and no other guest touches.
struct Guest {
    device: Arc<Device>,
    scheduler: Arc<Scheduler>,
    /// Started when the first file is opened.
    engines: Mutex<Option<Engines>>,
    points: Arc<Points>,
}

impl Guest {
    fn new(device: Arc<Device>) -> Arc<Self> {
        Arc::new(Self {
            scheduler: Scheduler::new(device.config.watchdog, &device.turns),
            engines: Mutex::default(),
            points: Arc::default(),
            device,
        })
    }

    /// Starts the engines unless they run; `EAGAIN` when the host has no threads for them.
    fn start(&self) -> Result<(), Errno> {
        let mut engines = lock(&self.engines);
        if engines.is_none() {
            let device = &self.device;
            let started = Engines::start(&self.scheduler, device.config.engines, &device.filter);
            *engines = Some(started.map_err(|error| {
                guest_log!(warn, "cannot start the engines of the embedded GPU: {error}; check the limit on threads (ulimit -u)");
                Errno::EAGAIN
            })?);
        }
        Ok(())
    }
}

impl SoftDriver {
    /// Fails when the limit on open files cannot be told, or there is no sandbox. A guest's engines start with its first file; its last file or
    /// the driver itself, whichever goes last, stops them.
    pub fn new(config: SoftConfig) -> io::Result<Self> {
        let buffers = config.buffers.min(memory::descriptor_limit()? / 2);
        let filter = Filter::new(config.sandbox, THREAD)?;
        let engines = config.engines.max(1);
        let device = Device {
            identity: Identity {
                name: "soft".into(),
                version: [1, 0, 0],
                date: "20261122".into(),
                description: "pvgpu embedded software GPU".into(),
            },
            account: Arc::new(Account::new(config.memory, buffers)),
            turns: Turns::new(engines),
            config: SoftConfig { engines, ..config },
            filter,
        };
        Ok(Self {
            guest: Guest::new(Arc::new(device)),
        })
    }
}

impl HostDriver for SoftDriver {
    fn identity(&self) -> &Identity {
        &self.guest.device.identity
    }

    fn for_session(&self) -> Option<Arc<dyn HostDriver>> {
        let guest = Guest::new(self.guest.device.clone());
        Some(Arc::new(Self { guest }))
    }

    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        Ok(SYSTEM_CALLS.to_vec())
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        self.guest.start()?;
        let blocking = flags & open::NONBLOCK == 0;
        Ok(Arc::new(File::open(&self.guest, blocking)))
    }
}
