//! The sandbox: which system calls a thread that handles a guest's data may make.
//!
//! [`crate::device`], `worker` and the host drivers start their threads through a [`Filter`]; a VMM puts its own
//! threads that call the device under one made of [`Device::system_calls`](crate::device::Device::system_calls) and of what
//! it needs itself. A filter is made of tables ([`Allowed`]): what is in none of them ends the process, with one line on
//! standard error (`violation`). Nothing here may depend on a guest.
//!
//! ```
//! use pvgpu_host_proxy::sandbox::{Filter, Sandbox, THREAD};
//!
//! let filter = Filter::new(Sandbox::On, THREAD)?;
//! let thread = filter.spawn("busy".into(), || drop(vec![0; 1 << 20]))?;
//! thread.join().unwrap();
//! # Ok::<(), std::io::Error>(())
//! ```

mod heap;
mod table;
mod violation;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::process;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

pub use table::{DEVICE, THREAD};

/// Whether threads that handle a guest's data are filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// They are.
    On,
    /// They may do whatever the process may: for debugging.
    Off,
}

impl Default for Sandbox {
    /// On, unless the environment says `PVGPU_SANDBOX=off`: for tools that are part of the process which they look at, such
    /// as valgrind, and for tests.
    fn default() -> Self {
        match std::env::var_os("PVGPU_SANDBOX") {
            Some(value) if value == "off" => Self::Off,
            _ => Self::On,
        }
    }
}

/// A system call that a thread may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Its number (`libc::SYS_*`).
    pub number: i64,
    /// With which arguments. Several rows of one call are alternatives.
    pub only: Only,
    /// What for.
    pub why: &'static str,
}

/// What an argument must be; arguments count from 0, and their low 32 bits are compared, which are all that the kernel
/// takes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Any arguments.
    Any,
    /// This argument has this value.
    Equal(u8, u32),
    /// This argument has none of these bits.
    Without(u8, u32),
    /// This argument is the id of this process.
    Itself(u8),
}

impl Allowed {
    /// The call with any arguments.
    pub const fn any(number: i64, why: &'static str) -> Self {
        Self {
            number,
            only: Only::Any,
            why,
        }
    }

    /// The call when this argument has this value.
    pub const fn equal(number: i64, argument: u8, value: u32, why: &'static str) -> Self {
        Self {
            number,
            only: Only::Equal(argument, value),
            why,
        }
    }

    /// The call when this argument has none of these bits.
    pub const fn without(number: i64, argument: u8, bits: u32, why: &'static str) -> Self {
        Self {
            number,
            only: Only::Without(argument, bits),
            why,
        }
    }

    /// The `ioctl` with that command number.
    pub const fn ioctl(command: u32, why: &'static str) -> Self {
        Self::equal(libc::SYS_ioctl, 1, command, why)
    }
}

/// Why there is no sandbox.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The kernel has none.
    #[error(
        "this kernel cannot filter system calls ({0}): use one with CONFIG_SECCOMP_FILTER, or run without the sandbox"
    )]
    Missing(String),
    /// The handler that reports violations cannot be installed.
    #[error("cannot handle SIGSYS ({0}): run without the sandbox")]
    Handler(String),
    /// A thread cannot be started.
    #[error("cannot start a thread ({0}): check the limit on threads (ulimit -u)")]
    Thread(String),
    /// A table makes no filter, or one that the kernel refuses.
    #[error(
        "the kernel refuses the filter of system calls ({0}): run without the sandbox, and report this"
    )]
    Filter(String),
}

impl From<SandboxError> for io::Error {
    fn from(error: SandboxError) -> Self {
        Self::other(error)
    }
}

/// The filter of one kind of thread; without any if the sandbox is off.
#[derive(Clone, Debug)]
pub struct Filter(Option<Arc<Programs>>);

/// What the kernel runs for each system call of a thread; the strictest answer counts.
#[derive(Debug)]
struct Programs {
    /// Lets pass what the tables allow.
    allow: BpfProgram,
    /// `clone3` has its flags in memory, where no filter can see them: it answers `ENOSYS`, as kernels before 5.3 do, and
    /// then the C library takes `clone`.
    without_clone3: BpfProgram,
}

thread_local! {
    /// Whether this thread has a filter of ours, its own or that of the thread that started it.
    static FILTERED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in the sandbox.
pub fn is_filtered() -> bool {
    FILTERED.try_with(Cell::get).unwrap_or(false)
}

/// Whether this kernel can filter system calls.
pub fn available() -> Result<(), SandboxError> {
    violation::kernel_reports_violations().map_err(|error| SandboxError::Missing(error.to_string()))
}

impl Filter {
    /// No filter.
    pub const OFF: Self = Self(None);

    /// A filter that allows these calls and no others. The first one of a process installs, for the whole process, the
    /// handler of `SIGSYS`, and a panic hook that leaves the backtrace out in filtered threads, which may open no files.
    pub fn new<'a>(
        sandbox: Sandbox,
        calls: impl IntoIterator<Item = &'a Allowed>,
    ) -> Result<Self, SandboxError> {
        if sandbox == Sandbox::Off {
            return Ok(Self::OFF);
        }
        prepare()?;
        let refuse = |error: seccompiler::BackendError| SandboxError::Filter(error.to_string());
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut always = vec![libc::SYS_clone3];
        for call in calls {
            let Some(condition) = call.only.condition().map_err(refuse)? else {
                always.push(call.number);
                continue;
            };
            let rule = SeccompRule::new(vec![condition]).map_err(refuse)?;
            rules.entry(call.number).or_default().push(rule);
        }
        // No rules: whatever the arguments.
        rules.extend(always.into_iter().map(|number| (number, Vec::new())));
        let allow = compile(rules, SeccompAction::Trap, SeccompAction::Allow).map_err(refuse)?;
        let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let without_clone3 = compile(clone3, SeccompAction::Allow, enosys).map_err(refuse)?;
        Ok(Self(Some(Arc::new(Programs {
            allow,
            without_clone3,
        }))))
    }

    /// Puts the calling thread under the filter, for the rest of its life, in addition to what it is under already; and all
    /// threads that it starts.
    pub fn enter(&self) -> Result<(), SandboxError> {
        let Some(programs) = &self.0 else {
            return Ok(());
        };
        let enter = |program: &BpfProgram| {
            seccompiler::apply_filter(program)
                .map_err(|error| SandboxError::Filter(error.to_string()))
        };
        // In this order: installing a filter is not among what the second one allows.
        enter(&programs.without_clone3)?;
        enter(&programs.allow)?;
        FILTERED.set(true);
        Ok(())
    }

    /// Starts a thread under the filter. If the calling thread is in the sandbox, the new one has its filter instead: who
    /// starts a thread may do at least what that thread does.
    pub fn spawn(
        &self,
        name: String,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let thread = thread::Builder::new().name(name);
        if self.0.is_none() {
            return thread.spawn(work);
        }
        if is_filtered() {
            return thread.spawn(|| {
                FILTERED.set(true);
                work();
            });
        }
        let filter = self.clone();
        let (entered, result) = sync_channel(1);
        let started = thread.spawn(move || {
            let result = filter.enter();
            let filtered = result.is_ok();
            // Its receiver waits below.
            let _ = entered.send(result);
            if filtered {
                work();
            }
        })?;
        match result.recv() {
            Ok(Ok(())) => Ok(started),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(io::Error::other(
                "a thread has ended before it could enter its sandbox",
            )),
        }
    }
}

impl Only {
    /// As a condition; `None` for any arguments.
    fn condition(self) -> Result<Option<SeccompCondition>, seccompiler::BackendError> {
        let (argument, operator, value) = match self {
            Self::Any => return Ok(None),
            Self::Equal(argument, value) => (argument, SeccompCmpOp::Eq, value),
            Self::Without(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), 0),
            Self::Itself(argument) => (argument, SeccompCmpOp::Eq, process::id()),
        };
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into()).map(Some)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?.try_into()
}

/// What a process needs once before the first of its threads enters the sandbox.
fn prepare() -> Result<(), SandboxError> {
    static PREPARED: OnceLock<Result<(), SandboxError>> = OnceLock::new();
    let prepare = || {
        available()?;
        violation::install().map_err(|error| SandboxError::Handler(error.to_string()))?;
        leave_backtraces_out();
        heap::settle().map_err(|error| SandboxError::Thread(error.to_string()))?;
        Ok(())
    };
    PREPARED.get_or_init(prepare).clone()
}

/// A panic in a filtered thread prints its message alone: for a backtrace, the standard library opens files.
fn leave_backtraces_out() {
    let otherwise = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !is_filtered() {
            return otherwise(panic);
        }
        let thread = thread::current();
        let place = panic.location().map(ToString::to_string);
        eprintln!(
            "thread '{}' panicked at {}: {} (in the sandbox there are no backtraces)",
            thread.name().unwrap_or("?"),
            place.as_deref().unwrap_or("?"),
            panic.payload_as_str().unwrap_or("?"),
        );
    }));
}

#[cfg(test)]
mod tests;
