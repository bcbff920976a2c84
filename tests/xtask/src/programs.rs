//! The workspace's programs that tasks run or put into a machine: cargo builds them, this file knows how and where
//! they end up. Every task that needs one calls [`build`]; cargo decides what there is to rebuild.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::command::{self, CommandError};

/// A program of the workspace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    package: &'static str,
    /// Arguments of `cargo build` that say how.
    how: &'static [&'static str],
}

/// For programs of the host and of Linux guests.
const RELEASE: &[&str] = &["--release"];

/// For the bare-metal guest; it cannot be built together with others.
const BARE_METAL: &[&str] = &["--profile", "guest", "--features", "bare-metal"];

/// First process of the testbed's L1.
pub const L1_INIT: Program = Program {
    name: "l1-init",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// The tests that run in L1.
pub const L1_TESTS: Program = Program {
    name: "l1-tests",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// First process of a Linux guest in L2.
pub const L2_INIT: Program = Program {
    name: "l2-init",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Boots the test guest on the embedded GPU.
pub const DEMO: Program = Program {
    name: "demo",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Draws on a DRM node without pvgpu.
pub const NATIVE: Program = Program {
    name: "native",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Checks mappings, descriptors, signals and threads on a DRM node.
pub const NODE_SEMANTICS: Program = Program {
    name: "node-semantics",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Sees the GPU behind a DRM node go and come back.
pub const NODE_RECOVERY: Program = Program {
    name: "node-recovery",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Draws OpenGL ES scenes on a DRM node by the system's Mesa.
pub const GLES: Program = Program {
    name: "gles",
    package: "pvgpu-gles",
    how: RELEASE,
};
/// Checks the file descriptors of a DRM node.
pub const NODE_DESCRIPTORS: Program = Program {
    name: "node-descriptors",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Draws natively and in a Linux guest, and compares.
pub const LINUX_DEMO: Program = Program {
    name: "linux-demo",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// First process of its guest.
pub const LINUX_DEMO_GUEST: Program = Program {
    name: "linux-demo-guest",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Plays generated programs against a machine.
pub const FUZZ_VM: Program = Program {
    name: "fuzz-vm",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Replays traces.
pub const REPLAY: Program = Program {
    name: "replay",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// Measures in a guest.
pub const BENCH: Program = Program {
    name: "bench",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// A mixed load that must leave nothing behind.
pub const SOAK: Program = Program {
    name: "soak",
    package: "pvgpu-e2e",
    how: RELEASE,
};
/// The VMM.
pub const MINI_VMM: Program = Program {
    name: "mini-vmm",
    package: "pvgpu-mini-vmm",
    how: RELEASE,
};
/// The GPU's daemon.
pub const PROXYD: Program = Program {
    name: "pvgpu-proxyd",
    package: "pvgpu-host-proxy",
    how: RELEASE,
};
/// The bare-metal guest.
pub const TEST_GUEST: Program = Program {
    name: "pvgpu-test-guest",
    package: "pvgpu-test-guest",
    how: BARE_METAL,
};

/// A program that has been built.
pub struct Built {
    /// Which one.
    pub program: Program,
    /// Where cargo put it.
    pub path: PathBuf,
}

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// cargo could not be run, or does not know the workspace.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// `cargo metadata` said something else than expected.
    #[error(
        "`cargo metadata` does not say where the target directory is: is this cargo older than 1.95?"
    )]
    Metadata,
    /// It does not compile.
    #[error("{0} does not build: see the compiler's messages above")]
    Compile(&'static str),
    /// The build went well and the program is not there.
    #[error("building {0} made no such program: was it renamed? see tests/xtask/src/programs.rs")]
    Missing(&'static str),
}

/// The folder that cargo builds into.
pub fn target_directory() -> Result<PathBuf, BuildError> {
    let metadata = command::text(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).unwrap_or_default();
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .ok_or(BuildError::Metadata)
}

/// Builds `programs`, one cargo run for those that are built in the same way. The compiler's messages go to standard
/// error. The result has the order of `programs`.
pub fn build(programs: &[Program]) -> Result<Vec<Built>, BuildError> {
    let mut messages: Vec<Value> = Vec::new();
    for how in [RELEASE, BARE_METAL] {
        let group: Vec<&Program> = programs
            .iter()
            .filter(|program| program.how == how)
            .collect();
        let Some(first) = group.first() else { continue };
        let mut cargo = cargo();
        cargo
            .args(["build", "--message-format=json-render-diagnostics"])
            .args(how);
        // A first build takes minutes: a person sees cargo's progress, a log only what went wrong.
        if !std::io::stderr().is_terminal() {
            cargo.arg("--quiet");
        }
        for program in &group {
            cargo.args(["--package", program.package, "--bin", program.name]);
        }
        let output = cargo
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|source| command::not_started(&cargo, source))?;
        if !output.status.success() {
            return Err(BuildError::Compile(first.package));
        }
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        messages.extend(
            lines
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok()),
        );
    }
    programs
        .iter()
        .map(|program| {
            messages
                .iter()
                .filter(|message| message["target"]["name"] == program.name)
                .find_map(|message| message["executable"].as_str())
                .map(|path| Built {
                    program: *program,
                    path: PathBuf::from(path),
                })
                .ok_or(BuildError::Missing(program.name))
        })
        .collect()
}

/// The cargo that runs this task.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
