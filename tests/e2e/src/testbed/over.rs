//! The same tests over vhost-user: `l1-tests --over` gives the GPU of every guest that a test starts to a `pvgpu-proxyd`.
//!
//! `mini_vmm` asks here for each guest. What a test tells mini-vmm of the GPU, the daemon is told then; the test itself,
//! the guest and what both must find stay as they are.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;

use pvgpu_host_proxy::control::{Command, ask};
use tempfile::TempDir;

use super::{Failure, Test};
use crate::daemon::Daemon;

/// Where L1 has the daemon.
pub const PROXYD: &str = "/bin/pvgpu-proxyd";

/// What makes mini-vmm's guest map with its own pages.
pub const NO_APERTURE: &[&str] = &["--no-aperture"];

/// How guests get to a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// With its aperture.
    VhostUser,
    /// As behind a front end that has no shared-memory regions.
    WithoutAperture,
}

impl FromStr for Over {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "vhost-user" => Ok(Self::VhostUser),
            "vhost-user-without-aperture" => Ok(Self::WithoutAperture),
            _ => Err(()),
        }
    }
}

static OVER: OnceLock<Over> = OnceLock::new();

/// From here on, tests run over that. Once.
pub fn set(over: Over) {
    let _ = OVER.set(over);
}

fn without_aperture() -> bool {
    OVER.get() == Some(&Over::WithoutAperture)
}

/// What the guest for which mini-vmm gets these options is told on its command line, if it has no aperture.
pub fn parameter(options: &[&str]) -> &'static str {
    match without_aperture() || options.contains(&"--no-aperture") {
        true => " l2.no_aperture",
        false => "",
    }
}

/// Why a test is not for guests that [`set`] is about.
pub fn left_out(test: &Test) -> Option<&'static str> {
    let vgem = test.name.contains("vgem") && !test.name.contains("refused");
    (without_aperture() && vgem)
        .then_some("vgem's buffers cannot be mapped without an aperture (docs/ioctls.md)")
}

/// The control socket of a daemon.
const CONTROL: &str = "control";

/// The daemon of one guest.
pub struct Device {
    daemon: Daemon,
    /// Where its control socket is.
    folder: TempDir,
    traces: bool,
}

impl Device {
    /// The daemon for a guest for which mini-vmm would get `arguments`, and what it gets instead; `None` when the GPU stays where
    /// these say.
    pub fn start(arguments: &[&str]) -> Result<Option<(Self, Vec<String>)>, Failure> {
        let (mut front, mut back) = (Vec::new(), Vec::new());
        let (mut gpu, mut trace) = ("soft", None);
        let mut words = arguments.iter();
        while let Some(&word) = words.next() {
            let mut value = || words.next().copied().unwrap_or_default();
            match word {
                "--gpu" => gpu = value(),
                "--trace" => trace = Some(value()),
                // A daemon has a thread behind each doorbell.
                "--doorbell" => drop(value()),
                "--watchdog" | "--limit" => back.extend([word, value()]),
                // A daemon's queues are for the guest's processors.
                "--cpus" => {
                    let count = value();
                    front.extend([word, count]);
                    back.extend(["--queues", count]);
                }
                _ => front.push(word),
            }
        }
        let elsewhere = gpu == "none" || gpu.starts_with("vhost-user:");
        if OVER.get().is_none() || elsewhere {
            return Ok(None);
        }
        if without_aperture() && !front.contains(&"--no-aperture") {
            front.extend(NO_APERTURE);
        }
        let folder = tempfile::tempdir()?;
        let control = folder.path().join(CONTROL);
        let path = control.to_string_lossy();
        back.extend(["--gpu", gpu, "--control", &path]);
        let daemon = Daemon::start(Path::new(PROXYD), &back)?;
        let argument = format!("vhost-user:{}", daemon.socket().display());
        front.extend(["--gpu", &argument]);
        let front = front.iter().map(|word| word.to_string()).collect();
        if let Some(file) = trace {
            let limit = u64::MAX;
            ask(
                &control,
                &Command::StartTrace { limit },
                Some(&File::create(file)?),
            )?;
        }
        let traces = trace.is_some();
        let device = Self {
            daemon,
            folder,
            traces,
        };
        Ok(Some((device, front)))
    }

    /// Its process.
    pub fn process(&self) -> u32 {
        self.daemon.id()
    }

    /// The guest has ended: waits until the daemon has forgotten it.
    pub fn end(&self) -> Result<(), Failure> {
        self.daemon.wait_for("the front end is gone")?;
        if self.traces {
            ask(&self.folder.path().join(CONTROL), &Command::StopTrace, None)?;
        }
        Ok(())
    }
}
