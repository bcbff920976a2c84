//! Steps of `cargo xtask test`: the tests of the modules that have unsafe code, under AddressSanitizer and under valgrind;
//! and the one table that threads share without a lock, in all orders of its accesses that the memory model allows.
//! `docs/contributing.md` says what each of them can see. They change nothing but their target folders.

use crate::command::{self, CommandError};
use crate::packages::{self, PackageError};
use crate::test_programs::{Build, TestBuildError, TestProgram};

/// Why a step has failed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The tests do not build.
    #[error(transparent)]
    Build(#[from] TestBuildError),
    /// Packages are missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// A program cannot be started.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// Tests, or what watches them, found something.
    #[error("see what {0} says above")]
    Found(String),
    /// A program of the table is not there.
    #[error("no tests of {0} were built: were they renamed? see tests/xtask/src/memory_safety.rs")]
    Missing(&'static str),
}

/// Tests to run: a program, and its arguments, which are parts of the names of its tests; all of them where there are none.
type Tests = (&'static str, &'static [&'static str]);

/// The tests that run unsafe code of the product. Sessions and devices as a whole run under AddressSanitizer in
/// `cargo xtask fuzz`.
const UNSAFE: &[Tests] = &[
    ("guest-driver/pvgpu_guest_driver", &["baremetal", "flat"]),
    (
        "host-proxy/pvgpu_host_proxy",
        &[
            "aperture",
            "clock",
            "drm::",
            "rlimit::",
            "shadow::",
            "soft::memory",
            "multiply",
        ],
    ),
    (
        "mini-vmm/pvgpu_mini_vmm",
        &["kvm::", "memory::", "terminal::", "vm::"],
    ),
    ("mini-vmm/boot", &[]),
    ("mini-vmm/gpu", &[]),
];

/// Those that loom drives; the others would not know that they are to be driven.
const UNDER_LOOM: &[Tests] = &[("guest-driver/pvgpu_guest_driver", &["loom_tests"])];

/// Runs the tests built by the nightly toolchain with `-Z sanitizer=address`, which the stable one does not have.
pub fn asan() -> Result<(), MemoryError> {
    let programs = Build {
        folder: Some("asan"),
        toolchain: Some("nightly"),
        flags: &["-Zsanitizer=address"],
        which: &[
            "--package=pvgpu-guest-driver",
            "--package=pvgpu-host-proxy",
            "--package=pvgpu-mini-vmm",
            "--features=pvgpu-guest-driver/baremetal",
            "--lib",
            "--test=boot",
            "--test=gpu",
        ],
    }
    .run()?;
    run(&programs, UNSAFE, &[])
}

/// Runs the very programs of `cargo test` under memcheck. It notes that it does not know the ioctls 0x5441 (TIOCGPTPEER) and
/// 0xaea3 (KVM_GET_TSC_KHZ); neither takes a pointer, so there is nothing that it would have to know.
pub fn valgrind() -> Result<(), MemoryError> {
    packages::install_missing(&["valgrind"])?;
    let programs = Build {
        folder: None,
        toolchain: None,
        flags: &[],
        which: &["--workspace", "--lib", "--test=boot", "--test=gpu"],
    }
    .run()?;
    let memcheck = [
        "valgrind",
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "--num-callers=30",
    ];
    run(&programs, UNSAFE, &memcheck)
}

/// Runs the tests that loom drives, which see the threads of one table in every order.
pub fn loom() -> Result<(), MemoryError> {
    let programs = Build {
        folder: Some("loom"),
        toolchain: None,
        flags: &["--cfg=loom"],
        which: &["--package=pvgpu-guest-driver", "--lib"],
    }
    .run()?;
    run(&programs, UNDER_LOOM, &[])
}

/// Runs each of `wanted` under the program `under`, all of them even if one fails.
fn run(programs: &[TestProgram], wanted: &[Tests], under: &[&str]) -> Result<(), MemoryError> {
    let mut failed = Vec::new();
    for (name, tests) in wanted {
        let program = programs
            .iter()
            .find(|program| program.name == *name && program.tests)
            .ok_or(MemoryError::Missing(name))?;
        let mut command = program.command(under);
        // What watches a program is a part of it, which has system calls of its own to make.
        command.env("PVGPU_SANDBOX", "off");
        command.arg("--quiet").args(*tests);
        // What watches the tests makes system calls of its own on their threads.
        command.env("PVGPU_SANDBOX", "off");
        let status = command
            .status()
            .map_err(|source| command::not_started(&command, source))?;
        if !status.success() {
            failed.push(*name);
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(MemoryError::Found(failed.join(", "))),
    }
}
