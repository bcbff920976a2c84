//! `cargo xtask testbed`: boots a virtual machine (L1) that has real GPU drivers and nested KVM, and runs
//! the end-to-end tests of `tests/e2e` in it. `docs/testbed.md` explains it to people.
//!
//! One file per step: [`crate::packages`] -> [`kernel`] -> [`crate::programs`] -> [`boot`] -> [`mesa`] -> [`initramfs`] -> [`machine`]. This
//! file holds the arguments and the order of the steps.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::command::CommandError;
use crate::packages::{self, PackageError};
use crate::programs::{self, BuildError};
use crate::say::say;
pub use kernel::GUESTS;
pub use machine::{Ended, Machine, Process, bound};
pub use report::is_kernel_message;

use machine::Limit;
use report::{Console, Report};

mod boot;
mod cpio;
mod initramfs;
pub mod kernel;
mod machine;
mod mesa;
mod report;

/// What `cargo xtask testbed` can be told.
#[derive(Args)]
#[command(
    after_help = "Boots Debian's kernel in QEMU (L1: software emulation, so it needs neither a GPU nor KVM), loads the \
kernel's own vgem, virtio_gpu (3D) and kvm-amd drivers there, and runs the end-to-end tests inside. What it downloads \
and extracts is cached in target/testbed; target/testbed/shared is /shared in L1.\n\n\
Exit code 0: every test passed; 1: one failed; 2: the testbed itself did not work.\n\n\
Inside --shell: `l1-tests` runs the tests, `l1-tests --list` names them; Ctrl-A x ends the machine, Ctrl-A h lists \
QEMU's other keys. docs/testbed.md says more."
)]
pub struct Arguments {
    /// Give a console inside L1 instead of running the tests
    #[arg(long, conflicts_with_all = ["filter", "json"])]
    shell: bool,

    /// Run one command line in L1 instead of the tests; its exit code becomes the task's
    #[arg(long, value_name = "COMMAND", value_parser = command_line, conflicts_with_all = ["shell", "filter", "json", "keep_going"])]
    run: Option<String>,

    /// Run only the tests whose names contain this text
    #[arg(long, value_name = "TEXT", value_parser = filter)]
    filter: Option<String>,

    /// Give the GPU of every guest to a pvgpu-proxyd; `-without-aperture` as behind a front end that has no shared memory
    #[arg(long, value_name = "WAY", value_parser = ["vhost-user", "vhost-user-without-aperture"], conflicts_with_all = ["shell", "run"])]
    over: Option<String>,

    /// Go on after a test has failed (without it, the first failure ends the run)
    #[arg(long)]
    keep_going: bool,

    /// Run each test that has failed once more, in a machine of its own, and let that count; implies --keep-going
    #[arg(long)]
    again: bool,

    /// Print one JSON object on standard output instead of a line per test
    #[arg(long)]
    json: bool,

    /// Debian's package of L1's kernel, such as linux-image-6.12-amd64
    #[arg(long, value_name = "PACKAGE", default_value = kernel::L1, value_parser = package)]
    kernel: String,

    /// A folder of Linux sources in which a kernel was built: guests boot it instead of Debian's 6.1
    #[arg(long, value_name = "FOLDER")]
    guest_kernel: Option<PathBuf>,

    /// Run the tests in this many machines at once, each in one of them; with more than one, --keep-going is implied
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8), conflicts_with_all = ["shell", "run"])]
    machines: u8,

    /// Processors of L1; with more than one, QEMU's emulation of SVM fails now and then
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    processors: u8,

    /// Wait for guests this many times as long: for slow kernels and busy machines
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100), conflicts_with_all = ["shell", "run"])]
    patience: u32,

    /// End a machine after this many seconds, counted from its start
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 3000,
        conflicts_with = "shell"
    )]
    time_limit: u64,
}

impl Arguments {
    fn keeps_going(&self) -> bool {
        self.keep_going || self.again || self.machines > 1
    }
}

/// Longest time without a line on L1's console: no test takes as long, not even on a slow machine.
const SILENCE: Duration = Duration::from_secs(600);

/// A filter travels on L1's kernel command line, so it is made of what test names are made of.
fn filter(text: &str) -> Result<String, String> {
    if !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    {
        Ok(text.to_owned())
    } else {
        Err("test names are made of letters, digits and underscores".to_owned())
    }
}

/// The name of a package of Debian, which apt must not take for an option.
fn package(text: &str) -> Result<String, String> {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte);
    if text.starts_with(|first: char| first.is_ascii_alphanumeric()) && text.bytes().all(allowed) {
        Ok(text.to_owned())
    } else {
        Err("that is no name of a Debian package".to_owned())
    }
}

/// A command line travels on L1's kernel command line too, within one pair of double quotes.
fn command_line(text: &str) -> Result<String, String> {
    const LONGEST: usize = 1024;
    if text.contains(['"', '\n']) || text.is_empty() || text.len() > LONGEST {
        Err(format!(
            "it must be one line of 1 to {LONGEST} bytes without double quotes"
        ))
    } else {
        Ok(text.to_owned())
    }
}

/// Why the testbed could not run, or could not say how the tests ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that a step needs failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A file or folder could not be read or written.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// `read`, `write`, ...
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The Debian packages that the testbed is made of.
    #[error(transparent)]
    Packages(#[from] PackageError),
    /// apt does not know the kernel package.
    #[error("apt knows no package {0}: run `apt-get update` as root, then this command again")]
    NoKernelPackage(String),
    /// The kernel image is not what this program can take apart.
    #[error("{path} cannot be used: {reason}; delete {cache} and try again", cache = path.parent().unwrap_or(path).display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel package lacks a module that the tests need.
    #[error(
        "the kernel package has no module {0}: only Debian's linux-image-amd64 (not cloud) has all that the tests need"
    )]
    NoModule(String),
    /// Our own programs did not build.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Xvfb did not start.
    #[error("Xvfb did not start: {0}")]
    Display(String),
    /// A time limit was reached.
    #[error("{limit} {doing}; the whole console is in {log}")]
    TimeLimit {
        /// The limit.
        limit: Limit,
        /// What L1 was doing then.
        doing: String,
        /// Where the console's text is.
        log: PathBuf,
    },
    /// L1 or QEMU ended without saying how the tests went.
    #[error("the machine ended without a result {doing}: {reason}; the whole console is in {log}")]
    NoResult {
        /// What L1 was doing then.
        doing: String,
        /// QEMU's exit and what it said.
        reason: String,
        /// Where the console's text is.
        log: PathBuf,
    },
}

/// Turns an I/O error into an [`Error::File`].
fn file_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::File {
        action,
        path,
        source,
    }
}

/// Tells people on standard error which step is going on.
fn progress(text: std::fmt::Arguments) {
    eprintln!("testbed: {text}");
}

/// Runs the task; everything that goes wrong is one line on standard error.
pub fn run(arguments: &Arguments) -> ExitCode {
    let machine = prepare_with(&arguments.kernel, arguments.guest_kernel.as_deref());
    let code = machine.and_then(|machine| {
        let machine = Machine {
            processors: arguments.processors,
            ..machine
        };
        if arguments.shell {
            progress(format_args!(
                "{} in L1; Ctrl-A x ends the machine",
                machine.version
            ));
            return Ok(u8::from(!machine.shell()?));
        }
        progress(format_args!("{} in L1", machine.version));
        match &arguments.run {
            Some(line) => program(&machine, line, arguments.time_limit),
            None => tests(&machine, arguments),
        }
    });
    code.map_or_else(
        |error| {
            eprintln!("cargo xtask testbed: {error}");
            ExitCode::from(2)
        },
        ExitCode::from,
    )
}

/// The folder that keeps what was downloaded and built. Two runs at once share it: one prepares it at a time, as long as it has the
/// file.
fn lock_cache() -> Result<(PathBuf, File), Error> {
    let cache = programs::target_directory()?.join("testbed");
    fs::create_dir_all(&cache).map_err(file_error("create", &cache))?;
    let path = cache.join("lock");
    let lock = File::create(&path).map_err(file_error("create", &path))?;
    lock.lock().map_err(file_error("lock", &path))?;
    Ok((cache, lock))
}

/// Everything up to a machine with two processors that can be started, with the programs as they are now.
pub fn prepare() -> Result<Machine, Error> {
    prepare_with(kernel::L1, None)
}

/// As [`prepare`], with the kernel of another package in L1, and one of other sources in L2.
fn prepare_with(l1: &str, l2: Option<&Path>) -> Result<Machine, Error> {
    let (cache, _lock) = lock_cache()?;
    packages::install_qemu(&cache)?;
    packages::install_missing(packages::TESTBED)?;
    let kernel = kernel::fetch(&cache, l1)?;
    let guests = kernel::GUESTS
        .iter()
        .map(|(name, package)| {
            let kernel = match l2 {
                Some(sources) if *name == "6.1" => kernel::built(&cache, sources)?,
                _ => kernel::fetch(&cache, package)?,
            };
            Ok((*name, kernel))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    progress(format_args!("building the programs for L1 and L2"));
    let mut programs = initramfs::PROGRAMS.to_vec();
    let others = boot::PROGRAMS.iter();
    programs.extend(others.filter(|program| !initramfs::PROGRAMS.contains(program)));
    let programs = programs::build(&programs)?;
    let folder = |name: &str| {
        let folder = cache.join(name);
        fs::create_dir_all(&folder).map_err(file_error("create", &folder))?;
        Ok::<_, Error>(folder)
    };
    let (shared, boot) = (folder("shared")?, folder("boot")?);
    boot::write(&boot, &guests, &programs, &cache)?;
    mesa::write(&boot.join("mesa.cpio"), &cache)?;
    let initramfs = cache.join("initramfs.cpio");
    initramfs::write(&initramfs, &kernel, &programs)?;
    Ok(Machine {
        shared,
        boot,
        version: kernel.version,
        kernel: kernel.elf,
        initramfs,
        processors: 2,
        console_log: cache.join("console.log"),
        qemu_log: cache.join("qemu.log"),
    })
}

/// The kernel (a bzImage, Debian's of that name or the one that was built in `sources`) and the initramfs of a Linux guest whose GPU
/// has that number of virtio's.
pub fn guest_for(
    name: &str,
    sources: Option<&Path>,
    device: u32,
) -> Result<(PathBuf, PathBuf), Error> {
    let (cache, _lock) = lock_cache()?;
    packages::install_missing(packages::TESTBED)?;
    let package = kernel::GUESTS.iter().find(|(known, _)| *known == name);
    let kernel = match sources {
        Some(sources) => kernel::built(&cache, sources)?,
        None => kernel::fetch(&cache, package.map_or(kernel::L1, |(_, package)| package))?,
    };
    let programs = programs::build(boot::PROGRAMS)?;
    let initramfs = cache.join(format!("guest-{name}-device{device}.cpio"));
    boot::guest(&kernel, &programs, &cache, Some(device))?.write(&initramfs)?;
    Ok((kernel.bzimage, initramfs))
}

/// Runs the tests. Gives the task's exit code.
fn tests(machine: &Machine, arguments: &Arguments) -> Result<u8, Error> {
    let started = Instant::now();
    let filter = arguments.filter.as_deref();
    let mut report = attempt(machine, arguments, filter, arguments.machines)?;
    if arguments.again {
        for name in report.failed() {
            progress(format_args!("{name} once more, in a machine of its own"));
            if attempt(machine, arguments, Some(&name), 1)?.passed() {
                report.passed_later(&name);
            }
        }
    }
    if arguments.json {
        say!("{}", report.json(&machine.version, started.elapsed()));
    } else {
        say!(
            "{} ({:.1} s)",
            report.summary(),
            started.elapsed().as_secs_f64()
        );
    }
    Ok(u8::from(!report.passed()))
}

/// Runs the tests whose names contain the filter in machines that are started for them.
fn attempt(
    machine: &Machine,
    arguments: &Arguments,
    filter: Option<&str>,
    machines: u8,
) -> Result<Report, Error> {
    // Where machines claim tests: `Selection` in `tests/e2e/src/testbed.rs`.
    let claims =
        tempfile::tempdir_in(&machine.shared).map_err(file_error("write to", &machine.shared))?;
    let in_one = &|number| -> Result<Report, Error> {
        let machine = machine.numbered(number);
        let mut report = Report::default();
        // A machine that is lost loses the test that it ran; another one goes on with the others.
        loop {
            let (more, lost) = in_machine(&machine, arguments, filter, claims.path())?;
            report.add(more);
            if !lost || !arguments.keeps_going() {
                return Ok(report);
            }
            progress(format_args!("another machine goes on"));
        }
    };
    std::thread::scope(|scope| {
        let one = |number| scope.spawn(move || in_one(number));
        let running: Vec<_> = (1..=machines).map(one).collect();
        let mut report = Report::default();
        for machine in running {
            match machine.join() {
                Ok(more) => report.add(more?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(report)
    })
}

/// Runs the tests that nobody has claimed in a machine that is started for them. Says whether it was lost.
fn in_machine(
    machine: &Machine,
    arguments: &Arguments,
    filter: Option<&str>,
    claims: &Path,
) -> Result<(Report, bool), Error> {
    let patience = arguments.patience.to_string();
    let claims = Path::new("/shared").join(claims.file_name().unwrap_or_default());
    let claims = claims.to_string_lossy();
    let mut words = vec!["l1-tests", "--patience", &patience, "--claims", &claims];
    if arguments.keeps_going() {
        words.push("--keep-going");
    }
    if let Some(filter) = filter {
        words.extend(["--filter", filter]);
    }
    if let Some(over) = &arguments.over {
        words.extend(["--over", over]);
    }
    let mut console = Console::default();
    let whole = Duration::from_secs(arguments.time_limit);
    let silence = SILENCE * arguments.patience;
    let ended = machine.run(&words, whole, silence, |line| {
        if console.line(line) && !arguments.json {
            say!("{line}");
        }
    })?;
    match code(machine, ended, || console.doing()) {
        Ok(code) => Ok((console.ended(code), false)),
        Err(error) => match console.lost(&error) {
            Some(report) => {
                progress(format_args!("{error}"));
                Ok((report, true))
            }
            None => Err(error),
        },
    }
}

/// Runs one command of L1 and prints what it writes. Gives the command's exit code.
fn program(machine: &Machine, line: &str, seconds: u64) -> Result<u8, Error> {
    let words = ["busybox", "sh", "-c", line];
    let limit = Duration::from_secs(seconds);
    let ended = machine.run(&words, limit, limit, |line| say!("{line}"))?;
    code(machine, ended, || format!("during `{line}`"))
}

/// The exit code of what L1 ran, or the error that says why there is none.
fn code(machine: &Machine, ended: Ended, doing: impl Fn() -> String) -> Result<u8, Error> {
    let log = machine.console_log.clone();
    match ended {
        Ended::Code(code) => Ok(code),
        Ended::TimeLimit(limit) => Err(Error::TimeLimit {
            limit,
            doing: doing(),
            log,
        }),
        Ended::NoCode(reason) => Err(Error::NoResult {
            doing: doing(),
            reason,
            log,
        }),
    }
}
