//! Our own programs that go into L1: cargo builds them, this file knows where they end up.
//! Called by the testbed before each run; cargo decides what there is to rebuild.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Error, progress};
use crate::command;

/// A program of the workspace that runs in L1.
pub struct Program {
    /// Its name in `/bin` of L1.
    pub name: &'static str,
    /// Where cargo put it.
    pub path: PathBuf,
}

/// Package and program. The release profile, since L1 is emulated.
const PROGRAMS: &[(&str, &str)] = &[
    ("pvgpu-e2e", "l1-init"),
    ("pvgpu-e2e", "l1-tests"),
    ("pvgpu-e2e", "l2-init"),
];

/// The folder that cargo builds into.
pub fn target_directory() -> Result<PathBuf, Error> {
    let metadata =
        command::text(cargo().args(["metadata", "--no-deps", "--offline", "--format-version=1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).unwrap_or_default();
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .ok_or(Error::Build)
}

/// Builds [`PROGRAMS`]; the compiler's messages go to standard error.
pub fn build() -> Result<Vec<Program>, Error> {
    progress(format_args!("building the programs for L1"));
    let mut cargo = cargo();
    cargo.args([
        "build",
        "--quiet",
        "--release",
        "--message-format=json-render-diagnostics",
    ]);
    for (package, name) in PROGRAMS {
        cargo.args(["--package", package, "--bin", name]);
    }
    let output = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| command::not_started(&cargo, source))?;
    if !output.status.success() {
        return Err(Error::Build);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let built: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    PROGRAMS
        .iter()
        .map(|(_, name)| {
            built
                .iter()
                .filter(|message| message["target"]["name"] == *name)
                .find_map(|message| message["executable"].as_str())
                .map(|path| Program {
                    name,
                    path: PathBuf::from(path),
                })
                .ok_or(Error::NoProgram(name))
        })
        .collect()
}

/// The cargo that runs this task.
fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
