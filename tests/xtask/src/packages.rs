//! The Debian packages that tasks need: which are missing, and installing them where this user may.
//!
//! Tasks call it first; it never removes or upgrades anything.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, CommandError};

/// The testbed's machine.
const QEMU: &[&str] = &[
    "qemu-system-x86",            // the machine
    "qemu-system-gui",            // its SDL display
    "qemu-system-modules-opengl", // 3D on that display; part of the others in Debian 12's own version
];

/// What the testbed needs beside that, the Rust toolchain, and the C linker that it needs anyway.
pub const TESTBED: &[&str] = &[
    "xvfb",            // an X server without a screen, for QEMU's display
    "libgl1",          // OpenGL through ...
    "libglx-mesa0",    // ... GLX ...
    "libgl1-mesa-dri", // ... on the processor (llvmpipe): what virgl renders with
    "busybox-static",  // the console of --shell
    "binutils",        // strip
    "xz-utils",        // the compression of Debian 12's kernel ...
    "zstd",            // ... and of later ones
];

/// A Mesa to draw with, by EGL and GBM: what `tests/gles` loads.
pub const MESA: &[&str] = &["libegl1", "libegl-mesa0", "libgbm1", "libgl1-mesa-dri"];

/// What building the Linux module needs beside a kernel's headers.
pub const LINUX_MODULE: &[&str] = &["gcc", "make", "rustc-web", "rust-web-src"];

/// What installing it by DKMS needs beside those.
pub const DKMS: &[&str] = &["dkms", "cargo-web", "kmod", "openssl"];

/// The kernels whose headers the tables of ioctls are compared with (`protocol/tests/headers.rs`).
const HEADERS: &[&str] = &["6.1", "6.12"];

/// Why packages are not there.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// They are missing and this user cannot install them.
    #[error("these Debian packages are missing: run `{0}` as root, then this command again")]
    Missing(String),
    /// There is no dpkg.
    #[error(
        "this task needs Debian packages and this system has no dpkg: run it on Debian 12, for example in a container"
    )]
    NotDebian,
    /// apt does not know a package.
    #[error(
        "apt knows no package {0}: add the Debian archive that has it, run `apt-get update` as root, then this command again"
    )]
    Unknown(String),
    /// A folder of ours cannot be written to.
    #[error("cannot write to {path}: {source}", path = path.display())]
    Scratch {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// apt failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Installs those of `packages` that are missing, or says which command would.
pub fn install_missing(packages: &[&str]) -> Result<(), PackageError> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        return Err(PackageError::NotDebian);
    }
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let install = ["install", "--yes", "--no-install-recommends"];
    if !is_root() {
        return Err(PackageError::Missing(format!(
            "apt-get {} {}",
            install.join(" "),
            missing.join(" ")
        )));
    }
    eprintln!("installing {} (once)", missing.join(" "));
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .args(install)
            .args(&missing);
        apt
    };
    // Package lists that are missing or old are the usual reason for a failure: fetch them, try once more.
    if command::capture(&mut apt()).is_err() {
        update_lists()?;
        command::capture(&mut apt())?;
    }
    Ok(())
}

/// Installs QEMU, if there is none. Debian 12's own (7.2) runs the testbed too, but needs 1.5 times as long, so a newer one of
/// Debian's backports is taken where this user may install it; the system's list of archives stays as it is. `scratch` is a
/// folder that is there.
pub fn install_qemu(scratch: &Path) -> Result<(), PackageError> {
    if !candidate(QEMU[0])?.starts_with("1:7.") {
        return install_missing(QEMU);
    }
    if is_root() && !installed(QEMU[0]) {
        match install_from_backports(QEMU, scratch) {
            Ok(()) => return Ok(()),
            Err(error) => eprintln!("no QEMU of backports ({error}): installing Debian 12's own"),
        }
    }
    install_missing(&QEMU[..2])
}

/// Installs packages of Debian 12's backports, which apt is told of for this once. Its package lists are in `scratch`.
fn install_from_backports(packages: &[&str], scratch: &Path) -> Result<(), PackageError> {
    const ARCHIVE: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
         http://deb.debian.org/debian bookworm-backports main\n";
    const SOURCES: &str = "/etc/apt/sources.list";
    eprintln!(
        "installing {} of Debian's backports (once)",
        packages.join(" ")
    );
    let lists = scratch.join("apt-lists");
    let sources = scratch.join("sources.list");
    let usual = std::fs::read_to_string(SOURCES).unwrap_or_default();
    std::fs::create_dir_all(lists.join("partial"))
        .and_then(|()| std::fs::write(&sources, usual + "\n" + ARCHIVE))
        .map_err(|source| PackageError::Scratch {
            path: scratch.to_owned(),
            source,
        })?;
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .arg(format!(
                "--option=Dir::Etc::SourceList={}",
                sources.display()
            ))
            .arg(format!("--option=Dir::State::Lists={}", lists.display()))
            // The usual caches are those of the usual lists.
            .args([
                "--option=Dir::Cache::pkgcache=",
                "--option=Dir::Cache::srcpkgcache=",
            ])
            .arg("--option=APT::Sandbox::User=root")
            .args(arguments);
        command::capture(&mut apt)
    };
    apt(&["update", "--quiet"])?;
    let install = ["install", "--yes", "--no-install-recommends"];
    let backports = ["--target-release=bookworm-backports"];
    apt(&[&install[..], &backports, packages].concat())?;
    Ok(())
}

/// QEMU of another Debian, beside the libraries that it needs.
pub struct Qemu {
    root: PathBuf,
}

impl Qemu {
    /// Adds what starts it to a command; it sees this system's files.
    pub fn extend(&self, command: &mut Command) {
        let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
        let share = self.root.join("usr/share");
        command.arg(self.root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries);
        command.arg(self.root.join("usr/bin/qemu-system-x86_64"));
        for folder in ["qemu", "seabios"] {
            command.arg("-L").arg(share.join(folder));
        }
        command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
    }
}

/// QEMU of Debian 13's backports, extracted into a folder in `scratch`, not installed: nothing of this system changes, and anybody
/// may do it.
pub fn qemu_of_trixie(scratch: &Path) -> Result<Qemu, PackageError> {
    const SOURCES: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n\
         deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie-backports main\n";
    let folder = scratch.join("trixie");
    let qemu = Qemu {
        root: folder.join("root"),
    };
    let version = || {
        let mut env = Command::new("env");
        qemu.extend(&mut env);
        command::capture(env.arg("--version"))
    };
    if version().is_ok() {
        return Ok(qemu);
    }
    eprintln!("downloading QEMU of Debian 13's backports (once, about 40 MB)");
    let failed = |source| PackageError::Scratch {
        path: folder.clone(),
        source,
    };
    let (state, cache) = (folder.join("state"), folder.join("cache"));
    let (sources, archives) = (folder.join("sources.list"), cache.join("archives"));
    std::fs::create_dir_all(state.join("lists/partial"))
        .and_then(|()| std::fs::create_dir_all(archives.join("partial")))
        .and_then(|()| std::fs::write(state.join("status"), ""))
        .and_then(|()| std::fs::write(&sources, SOURCES))
        .map_err(failed)?;
    let apt = |arguments: &[&str]| {
        let option = |name: &str, value: &Path| format!("--option={name}={}", value.display());
        let mut apt = Command::new("apt-get");
        apt.arg(option("Dir::Etc::SourceList", &sources))
            .args([
                "--option=Dir::Etc::SourceParts=/nonexistent",
                "--option=APT::Sandbox::User=root",
                "--option=Debug::NoLocking=1",
            ])
            .arg(option("Dir::State", &state))
            .arg(option("Dir::State::status", &state.join("status")))
            .arg(option("Dir::Cache", &cache))
            .args(arguments);
        command::capture(&mut apt)
    };
    apt(&["update", "--quiet"])?;
    apt(&[
        "install",
        "--yes",
        "--download-only",
        "--no-install-recommends",
        "--target-release=trixie-backports",
        "qemu-system-x86",
    ])?;
    for entry in std::fs::read_dir(&archives).map_err(failed)? {
        let archive = entry.map_err(failed)?.path();
        if archive
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            command::capture(Command::new("dpkg").arg("-x").arg(&archive).arg(&qemu.root))?;
        }
    }
    version()?;
    Ok(qemu)
}

/// Installs the headers of the kernels that the tables of ioctls are compared with.
pub fn install_headers() -> Result<(), PackageError> {
    install_missing(&["gcc", "libc6-dev"])?;
    for version in HEADERS {
        let start = format!("linux-headers-{version}.");
        let there = std::fs::read_dir("/usr/src").is_ok_and(|entries| {
            entries.flatten().any(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                name.starts_with(&start) && name.ends_with("-common")
            })
        });
        if !there {
            let package = match newest(&start)? {
                None if is_root() => {
                    update_lists()?;
                    newest(&start)?
                }
                found => found,
            };
            let package =
                package.ok_or_else(|| PackageError::Unknown(format!("{start}*-common")))?;
            install_missing(&[&package])?;
        }
    }
    Ok(())
}

/// The newest package that apt knows of `linux-headers-VERSION.*-common`.
fn newest(start: &str) -> Result<Option<String>, PackageError> {
    let known = command::text(Command::new("apt-cache").args(["pkgnames", start]))?;
    let revision = |name: &str| -> Vec<u32> {
        let digits = name.split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|number| number.parse().ok()).collect()
    };
    let common = known.lines().filter(|name| name.ends_with("-common"));
    let plain = common.filter(|name| !name.contains("-rt"));
    Ok(plain.max_by_key(|name| revision(name)).map(str::to_owned))
}

/// The version of `package` that apt would install.
pub fn candidate(package: &str) -> Result<String, PackageError> {
    let known = || {
        let shown =
            command::text(Command::new("apt-cache").args(["show", "--no-all-versions", package]));
        let version = shown.ok()?;
        let version = version
            .lines()
            .find_map(|line| line.strip_prefix("Version: "))?;
        Some(version.trim().to_owned())
    };
    if let Some(version) = known() {
        return Ok(version);
    }
    if is_root() {
        update_lists()?;
    }
    known().ok_or_else(|| PackageError::Unknown(package.to_owned()))
}

/// Downloads that version of `package` into `folder`, without installing it, and gives the file.
pub fn download(package: &str, version: &str, folder: &Path) -> Result<PathBuf, PackageError> {
    let download = || {
        let mut apt = Command::new("apt-get");
        // Without its own sandbox user apt needs no permission of others on our folder.
        apt.args(["download", "--option=APT::Sandbox::User=root"])
            .arg(format!("{package}={version}"))
            .current_dir(folder);
        apt
    };
    if let Err(error) = command::capture(&mut download()) {
        if !is_root() {
            return Err(error.into());
        }
        update_lists()?;
        command::capture(&mut download())?;
    }
    let start = format!("{package}_");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .map(|entry| entry.path())
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&start) && name.ends_with(".deb")
        })
        .ok_or_else(|| PackageError::Unknown(format!("{package}={version}")))
}

/// Fetches apt's package lists anew.
pub fn update_lists() -> Result<(), PackageError> {
    eprintln!("fetching apt's package lists");
    command::capture(Command::new("apt-get").args(["update", "--quiet"]))?;
    Ok(())
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    command::text(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// Whether dpkg has `package` in its complete state.
fn installed(package: &str) -> bool {
    command::text(Command::new("dpkg-query").args([
        "--show",
        "--showformat=${db:Status-Status}\n",
        package,
    ]))
    .is_ok_and(|status| status.lines().any(|line| line == "installed"))
}
