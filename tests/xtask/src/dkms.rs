//! A step of `cargo xtask test`: DKMS builds, installs and removes the Linux module as `docs/guest-linux.md` says, for each
//! kernel that the testbed's guests boot. All of it is in `target/dkms`; this machine's own modules stay as they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{self, CommandError};
use crate::packages::{self, PackageError};
use crate::testbed::{self, kernel};

/// Why the module is not to be had by DKMS.
#[derive(Debug, thiserror::Error)]
pub enum DkmsError {
    /// Packages are missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// It is not known which kernels guests boot.
    #[error(transparent)]
    Kernel(#[from] testbed::Error),
    /// Another program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A folder cannot be made.
    #[error("cannot write {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    /// DKMS failed.
    #[error("DKMS could not {action} ({source}): see {tree}/pvgpu/*/build/make.log", tree = tree.display())]
    Dkms {
        action: &'static str,
        tree: PathBuf,
        source: CommandError,
    },
    /// DKMS succeeded, but no module is there: the kernel, and what DKMS says.
    #[error("DKMS says of {0} that it is not installed: {1}")]
    NotInstalled(String, String),
    /// The module is for another kernel, or of another version.
    #[error("the module that DKMS installed for {kernel} says `{said}` where `{wanted}` is right")]
    WrongModule {
        kernel: String,
        said: String,
        wanted: String,
    },
    /// A file is there after the module was removed.
    #[error("DKMS has left {} behind", .0.display())]
    Left(PathBuf),
}

/// DKMS with folders of its own.
struct Dkms {
    /// What DKMS keeps of a module.
    tree: PathBuf,
    /// In place of `/usr/src`.
    sources: PathBuf,
    /// In place of `/lib/modules`.
    modules: PathBuf,
    /// The library `core`, compiled for kernels: it takes longer than all the rest, so it is not compiled anew.
    core: String,
}

/// Runs the step for the workspace in the folder `workspace`.
pub fn run(workspace: &Path) -> Result<(), DkmsError> {
    packages::install_missing(packages::LINUX_MODULE)?;
    packages::install_missing(packages::DKMS)?;
    let scratch = workspace.join("target/dkms");
    let _ = fs::remove_dir_all(&scratch);
    create(&scratch)?;
    let scratch = fs::canonicalize(&scratch).map_err(|source| DkmsError::File {
        path: scratch,
        source,
    })?;

    let mut kernels = Vec::new();
    for (_, package) in kernel::GUESTS {
        let (image, _) = kernel::candidate(package)?;
        let release = image.trim_start_matches("linux-image-").to_owned();
        packages::install_missing(&[&format!("linux-headers-{release}")])?;
        kernels.push(release);
    }

    let make = |arguments: &[&str]| {
        let mut make = Command::new("make");
        make.args(["--silent", "--no-print-directory", "-C"])
            .arg(workspace.join("guest-driver/linux"))
            .arg(format!("KDIR=/usr/src/linux-headers-{}", kernels[0]))
            .args(arguments)
            // Debian's, not those that run this task.
            .env_remove("CARGO")
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN");
        command::text(&mut make)
    };
    make(&["dkms-source", &format!("DESTDIR={}", scratch.display())])?;
    let dkms = Dkms {
        tree: scratch.join("tree"),
        sources: scratch.join("usr/src"),
        modules: scratch.join("modules"),
        core: make(&["core"])?.trim().to_owned(),
    };
    create(&dkms.tree)?;
    let version = env!("CARGO_PKG_VERSION");
    let package = format!("pvgpu/{version}");

    dkms.run("add", &[&package])?;
    for release in &kernels {
        create(&dkms.modules.join(release))?;
        let headers = format!("/usr/src/linux-headers-{release}");
        let of_kernel = ["-k", release, "--kernelsourcedir", &headers];
        dkms.run("build", &[&[&*package], &of_kernel[..]].concat())?;
        dkms.run("install", &[&[&*package], &of_kernel[..]].concat())?;
        dkms.check(&package, version, release)?;
    }
    dkms.run("remove", &[&package, "--all"])?;
    for folder in [&dkms.tree, &dkms.modules] {
        match file_named(folder, |_| true) {
            Some(file) => return Err(DkmsError::Left(file)),
            None => continue,
        }
    }
    Ok(())
}

impl Dkms {
    /// Runs `dkms ACTION` and gives what it says.
    fn run(&self, action: &'static str, arguments: &[&str]) -> Result<String, DkmsError> {
        // It wants to be root, for whom everything here is writable; a namespace in which this user is root does as well.
        let mut command = match packages::is_root() {
            true => Command::new("/usr/sbin/dkms"),
            false => {
                let mut command = Command::new("unshare");
                command.args(["--map-root-user", "/usr/sbin/dkms"]);
                command
            }
        };
        command.arg(action).args(arguments).arg("--no-depmod");
        for (option, folder) in [
            ("--dkmstree", &self.tree),
            ("--sourcetree", &self.sources),
            ("--installtree", &self.modules),
        ] {
            command.arg(option).arg(folder);
        }
        // As a kernel's installation runs it: with nothing of a user's environment. DKMS makes the key if there is none.
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("SYSROOT", &self.core)
            .env("mok_signing_key", self.tree.with_file_name("mok.key"))
            .env("mok_certificate", self.tree.with_file_name("mok.pub"));
        command::text(&mut command).map_err(|source| DkmsError::Dkms {
            action,
            tree: self.tree.clone(),
            source,
        })
    }

    /// Whether the module is installed for the kernel `release`, and is what it should be.
    fn check(&self, package: &str, version: &str, release: &str) -> Result<(), DkmsError> {
        let status = self.run("status", &[package])?;
        let line = format!("{package}, {release}, x86_64: installed");
        let module = file_named(&self.modules.join(release), |name| {
            name.starts_with("pvgpu.ko")
        });
        let Some(module) = module.filter(|_| status.lines().any(|said| said == line)) else {
            return Err(DkmsError::NotInstalled(release.to_owned(), status));
        };
        for (field, wanted) in [("version", version), ("vermagic", release)] {
            let mut modinfo = Command::new("/usr/sbin/modinfo");
            let said = command::text(modinfo.args(["-F", field]).arg(&module))?;
            if said.split_whitespace().next() != Some(wanted) {
                return Err(DkmsError::WrongModule {
                    kernel: release.to_owned(),
                    said: said.trim().to_owned(),
                    wanted: wanted.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// The first file in `folder` or below it whose name `wanted` accepts.
fn file_named(folder: &Path, wanted: fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).ok()?.flatten();
    entries.find_map(|entry| {
        let path = entry.path();
        match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => file_named(&path, wanted),
            false => wanted(&entry.file_name().to_string_lossy()).then_some(path),
        }
    })
}

fn create(folder: &Path) -> Result<(), DkmsError> {
    fs::create_dir_all(folder).map_err(|source| DkmsError::File {
        path: folder.to_owned(),
        source,
    })
}
