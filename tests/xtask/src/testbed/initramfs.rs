//! The initramfs of L1: our programs, the libraries they need, and the modules of its kernel. What guests boot is not
//! in it but in a folder of L0 (`boot`).

use std::path::Path;

use super::Error;
use super::cpio::{Archive, mode};
use super::kernel::Kernel;
use crate::programs::{self, Built, Program};

/// Our programs in L1, each in `/bin` by its name, but for its first process.
pub const PROGRAMS: &[Program] = &[
    programs::L1_INIT,
    programs::L1_TESTS,
    programs::NATIVE,
    programs::NODE_DESCRIPTORS,
    programs::NODE_SEMANTICS,
    programs::GLES,
    programs::LINUX_DEMO,
    programs::BENCH,
    programs::MINI_VMM,
    programs::PROXYD,
];

/// Writes the initramfs of L1 to `image`; of `programs`, those of [`PROGRAMS`] are in it.
pub fn write(image: &Path, kernel: &Kernel, programs: &[Built]) -> Result<(), Error> {
    let scratch = image.parent().unwrap_or(Path::new("."));
    let mut archive = Archive::new();
    for folder in ["boot", "dev", "proc", "shared", "sys", "tmp"] {
        archive.folder(Path::new(folder));
    }
    // The kernel opens it for /init before there is a devtmpfs.
    archive.entry("dev/console", mode::CHARACTER_DEVICE, (5, 1), &[]);
    for built in programs {
        if built.program == programs::L1_INIT {
            archive.program("init", built, scratch)?;
        } else if PROGRAMS.contains(&built.program) {
            archive.program(&format!("bin/{}", built.program.name), built, scratch)?;
        }
    }
    archive.file("bin/busybox", mode::PROGRAM, Path::new("/bin/busybox"))?;
    archive.modules(&kernel.modules)?;
    archive.write(image)
}
