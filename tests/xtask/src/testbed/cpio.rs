//! A newc archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst) of files, of our programs, and of the
//! libraries they need: what an initramfs is. `initramfs` and `boot` write them; the kernel unpacks them. Never
//! compressed, since unpacking is emulated and memory is not scarce.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, file_error};
use crate::command;
use crate::programs::Built;

/// A newc archive that is being written.
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<PathBuf>,
    files: BTreeSet<String>,
    entries: u32,
}

/// File types and permissions of entries (`stat.h`).
pub mod mode {
    pub const FOLDER: u32 = 0o040_755;
    pub const FILE: u32 = 0o100_644;
    pub const PROGRAM: u32 = 0o100_755;
    pub const CHARACTER_DEVICE: u32 = 0o020_600;
}

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Archive {
            bytes: Vec::new(),
            folders: BTreeSet::new(),
            files: BTreeSet::new(),
            entries: 0,
        }
    }

    /// Adds one entry; its folder must be there. `device` is the (major, minor) of a device node.
    pub fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
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
    pub fn folder(&mut self, path: &Path) {
        if path.as_os_str().is_empty() || !self.folders.insert(path.to_owned()) {
            return;
        }
        self.folder(path.parent().unwrap_or(Path::new("")));
        self.entry(&path.to_string_lossy(), mode::FOLDER, (0, 0), &[]);
    }

    /// Adds the file `source` as `path` (relative to the root), unless that path is there already.
    pub fn file(&mut self, path: &str, mode: u32, source: &Path) -> Result<(), Error> {
        if self.files.insert(path.to_owned()) {
            let data = fs::read(source).map_err(file_error("read", source))?;
            self.folder(Path::new(path).parent().unwrap_or(Path::new("")));
            self.entry(path, mode, (0, 0), &data);
        }
        Ok(())
    }

    /// Adds `program` as `path`, without debug information, and the libraries it needs. A stripped copy is left in the
    /// folder `scratch`.
    pub fn program(&mut self, path: &str, program: &Built, scratch: &Path) -> Result<(), Error> {
        let stripped = scratch.join(program.program.name);
        command::capture(
            Command::new("strip")
                .arg("-o")
                .arg(&stripped)
                .arg(&program.path),
        )?;
        self.file(path, mode::PROGRAM, &stripped)?;
        self.libraries_of(&program.path)
    }

    /// Adds the libraries that `program` is linked to, each under the path it has here.
    pub fn libraries_of(&mut self, program: &Path) -> Result<(), Error> {
        for library in shared_libraries(program) {
            let path = library.to_string_lossy();
            self.file(path.trim_start_matches('/'), mode::PROGRAM, &library)?;
        }
        Ok(())
    }

    /// Adds the folder `modules` with these (file, parameters) and `order`, a list of them in this order, which is the one to
    /// load them in.
    pub fn modules(&mut self, modules: &[(PathBuf, String)]) -> Result<(), Error> {
        let mut order = String::new();
        for (file, parameters) in modules {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            self.file(&format!("modules/{name}"), mode::FILE, file)?;
            order.push_str(format!("{name} {parameters}").trim_end());
            order.push('\n');
        }
        self.folder(Path::new("modules"));
        self.entry("modules/order", mode::FILE, (0, 0), order.as_bytes());
        Ok(())
    }

    /// Ends the archive and writes it to `path`. Whoever reads that file meanwhile gets the old one or the new one, whole.
    pub fn write(self, path: &Path) -> Result<(), Error> {
        let partial = path.with_extension("partial");
        fs::write(&partial, self.finish()).map_err(file_error("write", &partial))?;
        fs::rename(&partial, path).map_err(file_error("write", path))
    }

    /// The archive's bytes with its end mark.
    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

/// The libraries that `program` is linked to, the dynamic linker included, by `ldd`. None for a static one.
pub fn shared_libraries(program: &Path) -> Vec<PathBuf> {
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
