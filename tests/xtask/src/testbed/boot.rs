//! What guests in L2 boot: the folder of L0 that is `/boot` in L1. It has the test guest, and for each kernel of
//! [`kernel::GUESTS`] a folder by its name with `vmlinux`, `bzImage`, and `l2.cpio`, an initramfs with the guest driver
//! built for it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::{Archive, mode};
use super::kernel::{self, Headers, Kernel};
use super::{Error, file_error};
use crate::command;
use crate::packages;
use crate::programs::{self, Built, Program};

/// Our programs in the initramfs of a guest, each in `/bin` by its name, but for its first process.
const GUEST_PROGRAMS: &[Program] = &[
    programs::L2_INIT,
    programs::LINUX_DEMO_GUEST,
    programs::NATIVE,
    programs::NODE_DESCRIPTORS,
    programs::NODE_RECOVERY,
    programs::NODE_SEMANTICS,
    programs::GLES,
];

/// All that [`write()`] wants built.
pub const PROGRAMS: &[Program] = &[
    programs::TEST_GUEST,
    programs::L2_INIT,
    programs::LINUX_DEMO_GUEST,
    programs::NATIVE,
    programs::NODE_DESCRIPTORS,
    programs::NODE_RECOVERY,
    programs::NODE_SEMANTICS,
    programs::GLES,
];

/// The modules that a guest loads before the guest driver, beside those that either depends on: its GPU is on virtio-mmio or on
/// PCI.
const GUEST_MODULES: &[&str] = &["virtio_mmio", "virtio_pci"];

/// Fills the folder `boot`; `guests` has a kernel for each of [`kernel::GUESTS`]. What else is made on the way goes to the
/// folder `scratch`.
pub fn write(
    boot: &Path,
    guests: &[(&str, Kernel)],
    programs: &[Built],
    scratch: &Path,
) -> Result<(), Error> {
    for built in programs {
        if built.program == programs::TEST_GUEST {
            let stripped = scratch.join(built.program.name);
            command::capture(
                Command::new("strip")
                    .arg("-o")
                    .arg(&stripped)
                    .arg(&built.path),
            )?;
            link(&stripped, &boot.join(built.program.name))?;
        }
    }
    for (name, kernel) in guests {
        let folder = boot.join(name);
        fs::create_dir_all(&folder).map_err(file_error("create", &folder))?;
        link(&kernel.elf, &folder.join("vmlinux"))?;
        link(&kernel.bzimage, &folder.join("bzImage"))?;
        guest(kernel, programs, scratch, None)?.write(&folder.join("l2.cpio"))?;
    }
    Ok(())
}

/// Makes `target` another name of the file `source`. Whoever reads `target` meanwhile gets the old file or the new one.
fn link(source: &Path, target: &Path) -> Result<(), Error> {
    let inode = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino()).ok();
    if inode(source) == inode(target) {
        return Ok(());
    }
    let partial = target.with_extension("partial");
    let _ = fs::remove_file(&partial);
    fs::hard_link(source, &partial).map_err(file_error("write", &partial))?;
    fs::rename(&partial, target).map_err(file_error("write", target))
}

/// The initramfs of a Linux in L2: `l2-init`, the guest driver (for that number of virtio's, or its own), programs that draw, and a
/// shell.
pub fn guest(
    kernel: &Kernel,
    programs: &[Built],
    scratch: &Path,
    device: Option<u32>,
) -> Result<Archive, Error> {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "sys", "tmp"] {
        archive.folder(Path::new(folder));
    }
    archive.entry("dev/console", mode::CHARACTER_DEVICE, (5, 1), &[]);
    for built in programs {
        if built.program == programs::L2_INIT {
            archive.program("init", built, scratch)?;
        } else if GUEST_PROGRAMS.contains(&built.program) {
            archive.program(&format!("bin/{}", built.program.name), built, scratch)?;
        }
    }
    archive.file("bin/busybox", mode::PROGRAM, Path::new("/bin/busybox"))?;
    let module = scratch.join("pvgpu.ko");
    command::capture(
        Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&module)
            .arg(linux_module(kernel, device)?),
    )?;
    let mut wanted = kernel::dependencies(&module)?;
    wanted.extend(GUEST_MODULES.iter().map(|name| (*name).to_owned()));
    archive.modules(&kernel.modules_for(&wanted)?)?;
    archive.file("modules/pvgpu.ko", mode::FILE, &module)?;
    Ok(archive)
}

/// Builds the guest driver for `kernel` and gives the module.
fn linux_module(kernel: &Kernel, device: Option<u32>) -> Result<PathBuf, Error> {
    packages::install_missing(packages::LINUX_MODULE)?;
    let (headers, name) = match &kernel.headers {
        Headers::Package(package) => {
            packages::install_missing(&[package])?;
            (Path::new("/usr/src").join(package), package.as_str())
        }
        Headers::Sources(folder) => (folder.clone(), "built"),
    };
    let folder = programs::target_directory()?
        .with_file_name("guest-driver")
        .join("linux");
    let suffix = device.map_or_else(String::new, |number| format!("-device{number}"));
    let out = folder.join("build").join(format!("{name}{suffix}"));
    command::capture(
        Command::new("make")
            .args(["--silent", "-C"])
            .arg(&folder)
            .arg(format!("KDIR={}", headers.display()))
            .arg(format!("OUT={}", out.display()))
            .args(device.map(|number| format!("DEVICE_ID={number}")))
            .arg("W=1e") // no warning may be left
            // This task's own cargo has set variables that are not meant for another compiler.
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    Ok(out.join("pvgpu.ko"))
}
