//! The workspace's tests as the programs that they are: built in a way of their own (a sanitizer, coverage), in a target
//! folder of their own, and started one by one. `coverage`, `asan` and `valgrind` call it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::command::{self, CommandError};
use crate::programs::{self, BuildError};

/// How tests are built.
pub struct Build<'a> {
    /// Folder in the target folder; `None` for the one that `cargo test` uses.
    pub folder: Option<&'static str>,
    /// rustup's name of the toolchain; `None` for the one that runs this task.
    pub toolchain: Option<&'static str>,
    /// Flags of rustc for all that runs in the tests, but neither for build scripts nor for what tests build.
    pub flags: &'a [&'a str],
    /// Arguments of `cargo test` that say which tests.
    pub which: &'a [&'a str],
}

/// A program that `cargo test` would run, or one that tests run.
#[derive(Debug, PartialEq, Eq)]
pub struct TestProgram {
    /// Its package and target: `pvgpu-host-proxy/activation`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Where `cargo test` would start it: the folder of its package.
    pub package: PathBuf,
    /// Whether it is made of tests; otherwise tests start it.
    pub tests: bool,
}

/// Why there are no programs.
#[derive(Debug, thiserror::Error)]
pub enum TestBuildError {
    /// The target folder is not known.
    #[error(transparent)]
    Target(#[from] BuildError),
    /// cargo could not be started.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// rustup or its toolchain is not there.
    #[error(
        "there is no rust toolchain `{0}` here: run `rustup toolchain install {0} --profile minimal`"
    )]
    Toolchain(&'static str),
    /// They do not compile.
    #[error("the tests do not build: see the compiler's messages above")]
    Compile,
}

impl Build<'_> {
    /// The folder that they are built into.
    pub fn target(&self) -> Result<PathBuf, TestBuildError> {
        let target = programs::target_directory()?;
        Ok(match self.folder {
            Some(folder) => target.join(folder),
            None => target,
        })
    }

    /// Builds them.
    pub fn run(&self) -> Result<Vec<TestProgram>, TestBuildError> {
        let mut cargo = match self.toolchain {
            Some(toolchain) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", toolchain]);
                let there = command::capture(
                    Command::new("rustup").args(["run", toolchain, "rustc", "-V"]),
                );
                there.map_err(|_| TestBuildError::Toolchain(toolchain))?;
                rustup.arg("cargo").env_remove("CARGO");
                rustup
            }
            None => Command::new(env!("CARGO")),
        };
        cargo.args([
            "test",
            "--no-run",
            "--quiet",
            "--message-format=json-render-diagnostics",
        ]);
        if self.folder.is_some() {
            cargo.arg("--target-dir").arg(self.target()?);
            // Enough for the lines of a stack trace, and a quarter of the disk.
            cargo.args(["--config", "profile.dev.debug='line-tables-only'"]);
        }
        if !self.flags.is_empty() {
            // In the environment they would go to what tests build, too; without a target, to build scripts.
            let flags = serde_json::json!(self.flags);
            cargo.args(["--target", "x86_64-unknown-linux-gnu"]);
            cargo.args(["--config", &format!("build.rustflags={flags}")]);
        }
        let output = cargo
            .args(self.which)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|source| command::not_started(&cargo, source))?;
        match output.status.success() {
            true => Ok(programs_in(&String::from_utf8_lossy(&output.stdout))),
            false => Err(TestBuildError::Compile),
        }
    }
}

/// The programs in cargo's messages.
fn programs_in(messages: &str) -> Vec<TestProgram> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |message: Value| {
        let package = Path::new(message["manifest_path"].as_str()?).parent()?;
        let folder = package.file_name()?.to_string_lossy();
        Some(TestProgram {
            name: format!("{folder}/{}", message["target"]["name"].as_str()?),
            path: message["executable"].as_str()?.into(),
            package: package.to_owned(),
            tests: message["profile"]["test"].as_bool()?,
        })
    };
    messages.filter_map(program).collect()
}

impl TestProgram {
    /// The command that starts it as `cargo test` would, or has `under` start it: a program and its first arguments.
    pub fn command(&self, under: &[&str]) -> Command {
        let mut command = match under.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(&self.path);
                command
            }
            None => Command::new(&self.path),
        };
        command
            .current_dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_messages_say_which_programs_there_are() {
        let messages = r#"{"reason":"compiler-artifact","manifest_path":"/w/host-proxy/Cargo.toml","target":{"name":"activation"},"profile":{"test":true},"executable":"/t/activation-1"}
{"reason":"compiler-artifact","manifest_path":"/w/host-proxy/Cargo.toml","target":{"name":"pvgpu"},"profile":{"test":false},"executable":null}
{"reason":"build-finished","success":true}
not JSON"#;
        let program = TestProgram {
            name: "host-proxy/activation".into(),
            path: "/t/activation-1".into(),
            package: "/w/host-proxy".into(),
            tests: true,
        };
        assert_eq!(programs_in(messages), [program]);
    }
}
