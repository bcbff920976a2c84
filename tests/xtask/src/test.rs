//! `cargo xtask test`: all tests, in the order in which they fail fastest. `.ci/run` calls it.
//!
//! A step that cannot run here fails; nothing is skipped unless the caller says so on the command line or in
//! `PVGPU_WITHOUT_KVM`.

use crate::dkms;
use crate::fuzz;
use crate::lock_file;
use crate::memory_safety;
use crate::packages;
use crate::qemu;
use crate::say::say;
use crate::testbed;
use crate::unsafe_lines;
use clap::Parser;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

/// Runs all tests.
#[derive(clap::Args)]
#[command(after_help = "Environment:\n  \
    PVGPU_WITHOUT_KVM=1  this machine has no /dev/kvm: leave the tests that need it to the testbed")]
pub struct Arguments {
    /// Run only these steps, by their names
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    only: Vec<String>,
    /// List the steps and exit
    #[arg(long)]
    list: bool,
}

/// One step: its name, what it does, and how.
struct Step {
    name: &'static str,
    what: &'static str,
    run: fn(&Path) -> Result<(), String>,
}

const STEPS: &[Step] = &[
    Step {
        name: "fmt",
        what: "the code is formatted",
        run: |_| cargo(&["fmt", "--all", "--check"]),
    },
    Step {
        name: "clippy",
        what: "no lint has anything to say",
        run: |_| {
            let all = ["clippy", "--quiet", "--workspace", "--all-targets", "--"];
            cargo(&[&all[..], &["-D", "warnings"]].concat())?;
            // The bare-metal guest is built alone, so it is linted alone.
            let guest = ["clippy", "--quiet", "-p", "pvgpu-test-guest"];
            let how = ["--profile", "guest", "--features", "bare-metal", "--"];
            cargo(&[&guest[..], &how[..], &["-D", "warnings"]].concat())
        },
    },
    Step {
        name: "lock-file",
        what: "no crate is there in two versions",
        run: |workspace| match lock_file::duplicates(workspace) {
            Ok(duplicates) if duplicates.is_empty() => Ok(()),
            Ok(duplicates) => Err(format!(
                "{}: use one version, or excuse one in deny.toml with a reason",
                duplicates.join(", ")
            )),
            Err(error) => Err(format!("cannot read the lock file: {error}")),
        },
    },
    Step {
        name: "unsafe",
        what: "there are no more lines of unsafe code than before",
        run: |workspace| unsafe_lines::check(workspace).map_err(|error| error.to_string()),
    },
    Step {
        name: "headers",
        what: "the kernel headers that the tables are compared with are there",
        run: |_| packages::install_headers().map_err(|error| error.to_string()),
    },
    Step {
        name: "mesa",
        what: "the Mesa that tests draw with is there",
        run: |_| packages::install_missing(packages::MESA).map_err(|error| error.to_string()),
    },
    Step {
        name: "unit",
        what: "unit, doc and end-to-end tests on this machine",
        run: |_| cargo(&["test", "--quiet", "--workspace"]),
    },
    Step {
        name: "valgrind",
        what: "valgrind finds nothing in the tests of unsafe code",
        run: |_| memory_safety::valgrind().map_err(|error| error.to_string()),
    },
    Step {
        name: "asan",
        what: "AddressSanitizer finds nothing in the tests of unsafe code",
        run: |_| memory_safety::asan().map_err(|error| error.to_string()),
    },
    Step {
        name: "loom",
        what: "threads that share a table without a lock agree, in any order",
        run: |_| memory_safety::loom().map_err(|error| error.to_string()),
    },
    Step {
        name: "doc",
        what: "the documentation builds without a warning",
        run: |_| {
            let mut command = Command::new(env!("CARGO"));
            command.args(["doc", "--quiet", "--workspace", "--no-deps"]);
            status(command.env("RUSTDOCFLAGS", "-D warnings"))
        },
    },
    Step {
        name: "fuzz",
        what: "a minute of all fuzz targets together finds nothing",
        run: |_| match fuzz::all(7) {
            code if code == ExitCode::SUCCESS => Ok(()),
            _ => Err("see above; docs/fuzzing.md says what to do".into()),
        },
    },
    Step {
        name: "dkms",
        what: "DKMS installs the Linux module for the kernels that guests boot, and removes it",
        run: |workspace| dkms::run(workspace).map_err(|error| error.to_string()),
    },
    Step {
        name: "testbed",
        what: "end-to-end tests with real GPU drivers and nested KVM",
        run: |_| match testbed::run(&testbed_arguments()) {
            code if code == ExitCode::SUCCESS => Ok(()),
            _ => Err("see above; docs/testbed.md says what to do".into()),
        },
    },
    Step {
        name: "qemu",
        what: "a guest under an unmodified QEMU finds the daemon's GPU",
        run: |_| match qemu::check() {
            code if code == ExitCode::SUCCESS => Ok(()),
            _ => Err("see above; docs/vhost-user.md says more".into()),
        },
    },
];

/// Runs the task.
pub fn run(arguments: &Arguments) -> ExitCode {
    if arguments.list {
        for step in STEPS {
            say!("{:10} {}", step.name, step.what);
        }
        return ExitCode::SUCCESS;
    }
    let known = |name: &String| STEPS.iter().any(|step| step.name == name);
    if let Some(unknown) = arguments.only.iter().find(|name| !known(name)) {
        eprintln!("error: there is no step `{unknown}`: `cargo xtask test --list` shows them");
        return ExitCode::from(2);
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut results = Vec::new();
    for step in STEPS {
        let chosen =
            arguments.only.is_empty() || arguments.only.iter().any(|name| name == step.name);
        if !chosen {
            continue;
        }
        say!("== {}: {}", step.name, step.what);
        let start = Instant::now();
        let result = (step.run)(&workspace);
        if let Err(reason) = &result {
            eprintln!("FAILED {}: {reason}", step.name);
        }
        results.push((step.name, result.is_ok(), start.elapsed()));
    }
    say!("== summary");
    for (name, passed, time) in &results {
        let verdict = if *passed { "ok" } else { "FAILED" };
        say!("{verdict:6} {name:10} {:6.1} s", time.as_secs_f64());
    }
    match results.iter().all(|(_, passed, _)| *passed) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// The testbed in two machines at once, which take longer for a test than one alone. All in them is emulated, time included, and some
/// tests race with time: what passed at its second attempt alone is named, with the reason of the first.
fn testbed_arguments() -> testbed::Arguments {
    #[derive(Parser)]
    struct Defaults {
        #[command(flatten)]
        arguments: testbed::Arguments,
    }
    Defaults::parse_from(["testbed", "--again", "--machines", "2", "--patience", "2"]).arguments
}

fn cargo(arguments: &[&str]) -> Result<(), String> {
    status(Command::new(env!("CARGO")).args(arguments))
}

fn status(command: &mut Command) -> Result<(), String> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{status}")),
        Err(error) => Err(format!("cannot start cargo: {error}")),
    }
}
