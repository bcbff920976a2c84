//! The embedded software GPU: a GPU driver in miniature, for machines without a GPU and for tests.
//!
//! It is a [`HostDriver`] like the one for real DRM nodes, with an interface of its own
//! ([`pvgpu_protocol::family::soft`], `docs/soft-gpu.md`), memory that can be mapped, engines that execute
//! asynchronously, fences, syncobjs and PRIME. It must never touch guest memory: it sees copied and validated calls,
//! and its own buffers.

mod buffer;
mod command;
mod engine;
mod fence;
mod file;
mod handle;
mod matrix;
mod memory;
mod raster;
mod syncobj;
#[cfg(test)]
mod tests;

use crate::driver::{HostDriver, HostObject, Identity};
use crate::sandbox::{Allowed, Filter, Sandbox, THREAD};
use buffer::Account;
use engine::{Engines, Scheduler};
use file::File;
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::open;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How large and how patient the GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftConfig {
    /// Bytes of GPU memory for all files together.
    pub memory: u64,
    /// Most buffer objects of all files together. Each takes a file descriptor and a mapping of this process, so no
    /// more than half of the descriptors that it may have are used.
    pub buffers: u64,
    /// Engines: submissions of different files that are executed at a time, at least 1.
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

/// The embedded GPU.
pub struct SoftDriver {
    device: Arc<Device>,
}

/// What all files share.
struct Device {
    identity: Identity,
    account: Arc<Account>,
    scheduler: Arc<Scheduler>,
    engines: Engines,
}

impl SoftDriver {
    /// Starts the engines. The last file or the driver itself, whichever goes last, stops them.
    pub fn new(config: SoftConfig) -> io::Result<Self> {
        let buffers = config.buffers.min(memory::descriptor_limit()? / 2);
        let scheduler = Scheduler::new(config.watchdog);
        let filter = Filter::new(config.sandbox, THREAD)?;
        let device = Device {
            identity: Identity {
                name: "soft".into(),
                version: [1, 0, 0],
                date: "20261122".into(),
                description: "pvgpu embedded software GPU".into(),
            },
            account: Arc::new(Account::new(config.memory, buffers)),
            engines: Engines::start(&scheduler, config.engines.max(1), &filter)?,
            scheduler,
        };
        Ok(Self {
            device: Arc::new(device),
        })
    }
}

impl HostDriver for SoftDriver {
    fn identity(&self) -> &Identity {
        &self.device.identity
    }

    fn system_calls(&self) -> io::Result<Vec<Allowed>> {
        Ok(SYSTEM_CALLS.to_vec())
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        let blocking = flags & open::NONBLOCK == 0;
        Ok(Arc::new(File::open(&self.device, blocking)))
    }
}
