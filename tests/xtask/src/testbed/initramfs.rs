//! The initramfs of L1: a newc archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst) with
//! our programs, the libraries they need, the kernel's modules, and the kernel itself for L2. Uncompressed,
//! since unpacking is emulated and memory is not scarce.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::kernel::Kernel;
use super::{Error, file_error};
use crate::command;
use crate::packages;
use crate::programs::{self, Built, Program};

/// Our programs in L1, each in `/bin` by its name, but for those that [`place`] knows.
pub const PROGRAMS: &[Program] = &[
    programs::L1_INIT,
    programs::L1_TESTS,
    programs::L2_INIT,
    programs::NATIVE,
    programs::BENCH,
    programs::MINI_VMM,
    programs::TEST_GUEST,
];

/// Where `program` is in L1.
fn place(program: Program) -> String {
    match program {
        programs::L1_INIT => "init".to_owned(),
        // What L2 boots is in one folder with the kernels.
        programs::TEST_GUEST => format!("boot/{}", program.name),
        _ => format!("bin/{}", program.name),
    }
}

/// A newc archive that is being written.
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<PathBuf>,
    libraries: BTreeSet<String>,
    entries: u32,
}

/// File types and permissions of entries (`stat.h`).
mod mode {
    pub const FOLDER: u32 = 0o040_755;
    pub const FILE: u32 = 0o100_644;
    pub const PROGRAM: u32 = 0o100_755;
    pub const CHARACTER_DEVICE: u32 = 0o020_600;
}

impl Archive {
    fn new() -> Self {
        Archive {
            bytes: Vec::new(),
            folders: BTreeSet::new(),
            libraries: BTreeSet::new(),
            entries: 0,
        }
    }

    /// Adds one entry; its folder must be there. `device` is the (major, minor) of a device node.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(data.len()).expect("a file for L1 is smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        self.bytes.extend_from_slice(b"070701");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(data);
        self.align();
    }

    /// Pads to a multiple of four bytes.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds the folder `path` and those above it.
    fn folder(&mut self, path: &Path) {
        if path.as_os_str().is_empty() || !self.folders.insert(path.to_owned()) {
            return;
        }
        self.folder(path.parent().unwrap_or(Path::new("")));
        self.entry(&path.to_string_lossy(), mode::FOLDER, (0, 0), &[]);
    }

    /// Adds the file `source` as `path` (relative to the root).
    fn file(&mut self, path: &str, mode: u32, source: &Path) -> Result<(), Error> {
        let data = fs::read(source).map_err(file_error("read", source))?;
        self.folder(Path::new(path).parent().unwrap_or(Path::new("")));
        self.entry(path, mode, (0, 0), &data);
        Ok(())
    }

    /// Adds `program` as `path`, without debug information, and the libraries it needs. A stripped copy is left beside
    /// `image`.
    fn program(&mut self, path: &str, program: &Built, image: &Path) -> Result<(), Error> {
        let stripped = image.with_file_name(program.program.name);
        command::capture(
            Command::new("strip")
                .arg("-o")
                .arg(&stripped)
                .arg(&program.path),
        )?;
        self.file(path, mode::PROGRAM, &stripped)?;
        for library in shared_libraries(&program.path) {
            let path = library.to_string_lossy();
            let path = path.trim_start_matches('/');
            if self.libraries.insert(path.to_owned()) {
                self.file(path, mode::PROGRAM, &library)?;
            }
        }
        Ok(())
    }

    /// The archive's bytes with its end mark.
    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

/// Writes the initramfs of L1 to `image`.
pub fn write(image: &Path, kernel: &Kernel, programs: &[Built]) -> Result<(), Error> {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "shared", "sys", "tmp"] {
        archive.folder(Path::new(folder));
    }
    // The kernel opens it for /init before there is a devtmpfs.
    archive.entry("dev/console", mode::CHARACTER_DEVICE, (5, 1), &[]);
    for program in programs {
        archive.program(&place(program.program), program, image)?;
    }
    archive.file("bin/busybox", mode::PROGRAM, Path::new("/bin/busybox"))?;

    let mut order = String::new();
    for (file, parameters) in &kernel.modules {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{name}"), mode::FILE, file)?;
        order.push_str(format!("{name} {parameters}").trim_end());
        order.push('\n');
    }
    archive.entry("modules/order", mode::FILE, (0, 0), order.as_bytes());
    archive.file("boot/vmlinux", mode::FILE, &kernel.elf)?;
    archive.file("boot/bzImage", mode::FILE, &kernel.bzimage)?;
    archive.entry(
        "boot/l2.cpio",
        mode::FILE,
        (0, 0),
        &guest(image, kernel, programs)?,
    );
    // A machine of another run may be about to read the image: it gets the old one or the new one, whole.
    let partial = image.with_extension("partial");
    fs::write(&partial, archive.finish()).map_err(file_error("write", &partial))?;
    fs::rename(&partial, image).map_err(file_error("write", image))
}

/// The modules of L1 that L2 needs, too: the guest driver's device is on virtio-mmio.
const GUEST_MODULES: &[&str] = &["virtio_ring", "virtio", "virtio_mmio", "drm"];

/// The initramfs of a Linux in L2: `l2-init`, the guest driver, and a program that draws.
fn guest(image: &Path, kernel: &Kernel, programs: &[Built]) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    for folder in ["dev", "proc", "tmp"] {
        archive.folder(Path::new(folder));
    }
    archive.entry("dev/console", mode::CHARACTER_DEVICE, (5, 1), &[]);
    for init in programs
        .iter()
        .filter(|program| program.program == programs::L2_INIT)
    {
        archive.program("init", init, image)?;
    }
    for native in programs
        .iter()
        .filter(|program| program.program == programs::NATIVE)
    {
        archive.program("bin/native", native, image)?;
    }
    let mut order = String::new();
    for (file, _) in &kernel.modules {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        if GUEST_MODULES.contains(&name.as_ref()) {
            archive.file(&format!("modules/{name}.ko"), mode::FILE, file)?;
            order += &format!("{name}.ko\n");
        }
    }
    archive.entry("modules/order", mode::FILE, (0, 0), order.as_bytes());
    let module = image.with_file_name("pvgpu.ko");
    command::capture(
        Command::new("strip")
            .args(["--strip-debug", "-o"])
            .arg(&module)
            .arg(linux_module(kernel)?),
    )?;
    archive.file("modules/pvgpu.ko", mode::FILE, &module)?;
    Ok(archive.finish())
}

/// Builds the guest driver for `kernel` and gives the module.
fn linux_module(kernel: &Kernel) -> Result<PathBuf, Error> {
    let headers = kernel.headers();
    packages::install_missing(packages::LINUX_MODULE)?;
    packages::install_missing(&[&headers])?;
    let folder = programs::target_directory()?
        .with_file_name("guest-driver")
        .join("linux");
    command::capture(
        Command::new("make")
            .args(["--silent", "-C"])
            .arg(&folder)
            .arg(format!("KDIR=/usr/src/{headers}"))
            // This task's own cargo has set variables that are not meant for another compiler.
            .env_remove("RUSTC")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    Ok(folder.join("build").join(headers).join("pvgpu.ko"))
}

/// The libraries that `program` is linked to, the dynamic linker included, by `ldd`. None for a static one.
fn shared_libraries(program: &Path) -> Vec<PathBuf> {
    let listed = command::text(Command::new("ldd").arg(program)).unwrap_or_default();
    listed
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut archive = Archive::new();
        archive.folder(Path::new("a/b"));
        archive.entry("a/b/odd", mode::FILE, (0, 0), b"12345");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let names: Vec<_> = text
            .split("070701")
            .skip(1)
            .map(|entry| entry[104..].split('\0').next().unwrap())
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/odd", "TRAILER!!!"]);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(text.find("12345").unwrap() % 4, 0);
    }
}
