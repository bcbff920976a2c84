//! Debian's kernels for L1 and L2, taken out of their packages: the bzImage, the ELF file inside it, and the
//! modules of [`MODULES`]. Cached by the package's version. None is ever installed on this machine.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Error, file_error, progress};
use crate::command;
use crate::packages;

/// Debian's package of the kernel that L1 runs unless told otherwise.
pub const L1: &str = "linux-image-amd64";

/// The kernels that guests in L2 boot: a name that tests use, and Debian's package.
pub const GUESTS: &[(&str, &str)] = &[
    ("6.1", "linux-image-amd64"),
    ("6.12", "linux-image-6.12-amd64"),
];

/// The modules that L1 loads, in this order, with their parameters; what they depend on is found and loaded before them.
pub const MODULES: &[(&str, &str)] = &[
    ("kvm_amd", "nested=1"),
    ("virtio_pci", ""), // what finds the GPU on the PCI bus
    ("virtio_gpu", ""), // before other GPUs: EGL's default is /dev/dri/card0
    ("vgem", ""),
    ("virtio_mmio", ""),  // how L2 finds its GPU
    ("9p", ""),           // the folder that L1 shares with L0 ...
    ("9pnet_virtio", ""), // ... and how it gets there
];

/// A kernel, ready to boot.
pub struct Kernel {
    /// For people, and in the cache's folder name: `linux-image-6.1.0-56-amd64 6.1.192-2`.
    pub version: String,
    /// The uncompressed kernel, loadable segments and notes only. Boots by PVH.
    pub elf: PathBuf,
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// Modules in loading order: file, parameters.
    pub modules: Vec<(PathBuf, String)>,
    /// What modules for it are built with.
    pub headers: Headers,
}

/// What the modules of a kernel are built with.
pub enum Headers {
    /// Debian's package of this name; they are in a folder of that name in `/usr/src`.
    Package(String),
    /// The sources that the kernel itself was built of.
    Sources(PathBuf),
}

impl Kernel {
    /// Those of [`Self::modules`] that are in `wanted`, and those they depend on, in loading order. A name that is not there
    /// is taken for part of the kernel itself.
    pub fn modules_for(&self, wanted: &[String]) -> Result<Vec<(PathBuf, String)>, Error> {
        let mut wanted = wanted.to_vec();
        let mut found = Vec::new();
        // Whatever a module depends on comes before it.
        for (file, parameters) in self.modules.iter().rev() {
            if module_name(file).is_some_and(|name| wanted.contains(&name)) {
                wanted.extend(dependencies(file)?);
                found.insert(0, (file.clone(), parameters.clone()));
            }
        }
        Ok(found)
    }
}

/// The modules that the module in `file` depends on.
pub fn dependencies(file: &Path) -> Result<Vec<String>, Error> {
    let module = fs::read(file).map_err(file_error("read", file))?;
    Ok(module_dependencies(&module))
}

/// Gives the kernel behind the package `meta` of those that apt has to offer, from the cache where it is already there.
pub fn fetch(cache: &Path, meta: &str) -> Result<Kernel, Error> {
    let (package, version) = candidate(meta)?;
    let folder = cache.join(format!("{package}_{version}"));
    if !is_complete(&folder) {
        // A folder of the final name is complete: it is made under another name first.
        let partial = cache.join("kernel.partial");
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).map_err(file_error("create", &partial))?;
        extract(&package, &version, &partial)?;
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&partial, &folder).map_err(file_error("create", &folder))?;
    }
    let order = folder.join("modules/order");
    let modules = fs::read_to_string(&order).map_err(file_error("read", &order))?;
    Ok(Kernel {
        version: format!("{package} {version}"),
        headers: Headers::Package(package.replacen("linux-image-", "linux-headers-", 1)),
        elf: folder.join("vmlinux"),
        bzimage: folder.join("bzImage"),
        modules: modules
            .lines()
            .filter(|line| !line.starts_with(BUILT_IN))
            .map(|line| line.split_once(' ').unwrap_or((line, "")))
            .map(|(file, parameters)| (folder.join("modules").join(file), parameters.to_owned()))
            .collect(),
    })
}

/// The kernel that was built of the sources in the folder `sources`, without modules; what it boots from goes to `cache`.
pub fn built(cache: &Path, sources: &Path) -> Result<Kernel, Error> {
    let sources = fs::canonicalize(sources).map_err(file_error("find", sources))?;
    let built = sources.join("arch/x86/boot/bzImage");
    let folder = cache.join("built");
    fs::create_dir_all(&folder).map_err(file_error("create", &folder))?;
    let bzimage = folder.join("bzImage");
    fs::copy(&built, &bzimage).map_err(file_error("copy", &built))?;
    let elf = folder.join("vmlinux");
    fs::write(&elf, uncompressed_elf(&bzimage)?).map_err(file_error("write", &elf))?;
    Ok(Kernel {
        version: sources.display().to_string(),
        elf,
        bzimage,
        modules: Vec::new(),
        headers: Headers::Sources(sources),
    })
}

/// Whether `folder` was extracted, with the modules and parameters that are wanted today, in today's order.
fn is_complete(folder: &Path) -> bool {
    fs::read_to_string(folder.join("modules/order")).is_ok_and(|order| {
        let mut lines = order.lines();
        MODULES.iter().all(|module| {
            let built_in = |line: &str| line.strip_prefix(BUILT_IN) == Some(module.0);
            // Goes on after the line of the module before.
            order.lines().any(built_in) || lines.any(|line| line == order_line(module))
        })
    })
}

/// Starts a line of the file `order` that names a module which is part of the kernel itself.
const BUILT_IN: &str = "# built in: ";

/// A module in the file `order`: its file name and its parameters.
fn order_line((name, parameters): &(&str, &str)) -> String {
    format!("{name}.ko {parameters}").trim_end().to_owned()
}

/// The name and version of the package behind `meta`, such as `linux-image-amd64`.
pub fn candidate(meta: &str) -> Result<(String, String), Error> {
    let known = || {
        let shown =
            command::text(Command::new("apt-cache").args(["show", "--no-all-versions", meta]));
        dependency(&shown.ok()?)
    };
    if let Some(found) = known() {
        return Ok(found);
    }
    if packages::is_root() {
        packages::update_lists()?;
    }
    known().ok_or_else(|| Error::NoKernelPackage(meta.to_owned()))
}

/// Reads `Depends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)`.
fn dependency(shown: &str) -> Option<(String, String)> {
    let depends = shown
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))?;
    let (package, version) = depends
        .split(',')
        .find_map(|one| one.trim().split_once(" (= "))?;
    let plain = |text: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".+-~_".contains(&byte);
        (!text.is_empty() && text.bytes().all(allowed)).then(|| text.to_owned())
    };
    Some((plain(package)?, plain(version.trim_end_matches(')'))?))
}

/// Downloads the package into `folder` and leaves there only `vmlinux`, `bzImage` and `modules`.
fn extract(package: &str, version: &str, folder: &Path) -> Result<(), Error> {
    progress(format_args!(
        "downloading {package} {version} (once, about 70 MB)"
    ));
    let archive = packages::download(package, version, folder)?;
    progress(format_args!("extracting {package} (once)"));
    let tree = folder.join("package");
    command::capture(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&tree),
    )?;
    fs::remove_file(&archive).map_err(file_error("remove", &archive))?;

    let files = files_below(&tree)?;
    let shipped = files
        .iter()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .ok_or_else(|| Error::NoKernelPackage(package.to_owned()))?;
    let bzimage = folder.join("bzImage");
    fs::rename(shipped, &bzimage).map_err(file_error("move", &bzimage))?;
    let vmlinux = folder.join("vmlinux");
    fs::write(&vmlinux, uncompressed_elf(&bzimage)?).map_err(file_error("write", &vmlinux))?;
    extract_modules(&files, &folder.join("modules"))?;
    fs::remove_dir_all(&tree).map_err(file_error("remove", &tree))
}

/// Puts the modules of [`MODULES`] and those they depend on into `folder`, uncompressed and without debug
/// information, with a file `order` that lists them in loading order.
fn extract_modules(files: &[PathBuf], folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(file_error("create", folder))?;
    let by_name: HashMap<String, &PathBuf> = files
        .iter()
        .filter_map(|path| Some((module_name(path)?, path)))
        .collect();
    let built_in = files
        .iter()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name == "modules.builtin")
        })
        .map(|path| fs::read_to_string(path).map_err(file_error("read", path)))
        .transpose()?
        .unwrap_or_default();
    let built_in: HashSet<String> = built_in
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    let mut order: Vec<String> = Vec::new();
    let mut lines = String::new();
    for (name, _) in MODULES {
        if built_in.contains(*name) {
            lines += &format!("{BUILT_IN}{name}\n");
        } else {
            place_module(name, &by_name, folder, &mut order)?;
        }
    }
    let parameters = |name: &str| {
        MODULES
            .iter()
            .find(|(wanted, _)| *wanted == name)
            .map_or("", |module| module.1)
    };
    lines.extend(
        order
            .iter()
            .map(|name| order_line(&(name, parameters(name))) + "\n"),
    );
    let list = folder.join("order");
    fs::write(&list, lines).map_err(file_error("write", &list))
}

/// Places the module `name` after all that it depends on, unless it is already there.
fn place_module(
    name: &str,
    files: &HashMap<String, &PathBuf>,
    folder: &Path,
    order: &mut Vec<String>,
) -> Result<(), Error> {
    if order.iter().any(|placed| placed == name) {
        return Ok(());
    }
    let shipped = files
        .get(name)
        .ok_or_else(|| Error::NoModule(name.to_owned()))?;
    let module = decompress(&fs::read(shipped).map_err(file_error("read", *shipped))?)?;
    for dependency in module_dependencies(&module) {
        place_module(&dependency, files, folder, order)?;
    }
    let path = folder.join(format!("{name}.ko"));
    fs::write(&path, module).map_err(file_error("write", &path))?;
    command::capture(Command::new("strip").arg("--strip-debug").arg(&path))?;
    order.push(name.to_owned());
    Ok(())
}

/// `.../virtio-gpu.ko.xz` is the module `virtio_gpu`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (name, rest) = name.split_once(".ko")?;
    (rest.is_empty() || rest.starts_with('.')).then(|| name.replace('-', "_"))
}

/// The names in the `depends=` entry of a module's `.modinfo` section.
fn module_dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = module.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = module
        .iter()
        .skip(start + key.len())
        .take_while(|byte| **byte != 0);
    String::from_utf8_lossy(&value.copied().collect::<Vec<_>>())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// All regular files below `folder`.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(file_error("read", &folder))? {
            let entry = entry.map_err(file_error("read", &folder))?;
            let kind = entry
                .file_type()
                .map_err(file_error("read", entry.path()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// How each compression starts, and the program that undoes it (standard input to standard output).
const COMPRESSIONS: &[(&[u8], &[&str])] = &[
    (
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        &["xz", "--decompress", "--stdout"],
    ),
    (
        &[0x28, 0xb5, 0x2f, 0xfd],
        &["zstd", "--decompress", "--stdout"],
    ),
    (&[0x1f, 0x8b], &["gzip", "--decompress", "--stdout"]),
];

/// Gives `data` uncompressed, whatever it was compressed with.
fn decompress(data: &[u8]) -> Result<Vec<u8>, Error> {
    let Some((_, program)) = COMPRESSIONS
        .iter()
        .find(|(magic, _)| data.starts_with(magic))
    else {
        return Ok(data.to_vec());
    };
    Ok(command::filter(
        Command::new(program[0]).args(&program[1..]),
        data,
    )?)
}

/// Offsets in the setup header of a bzImage (Linux, Documentation/x86/boot.rst).
mod setup_header {
    /// Number of 512-byte setup sectors after the first; 0 means 4.
    pub const SETUP_SECTS: usize = 0x1f1;
    /// `HdrS`.
    pub const HEADER: usize = 0x202;
    /// Where the compressed kernel starts, counted from the protected-mode code.
    pub const PAYLOAD_OFFSET: usize = 0x248;
    /// Its length in bytes.
    pub const PAYLOAD_LENGTH: usize = 0x24c;
}

/// Takes the ELF file out of a bzImage and keeps of it what a boot needs.
fn uncompressed_elf(bzimage: &Path) -> Result<Vec<u8>, Error> {
    let unusable = |reason| Error::Kernel {
        path: bzimage.to_owned(),
        reason,
    };
    let image = fs::read(bzimage).map_err(file_error("read", bzimage))?;
    let payload = payload(&image).ok_or(unusable("it is not a bzImage"))?;
    // The kernel's build appends the uncompressed size to all but gzip, which has it anyway; it is not compressed data.
    let compressed = match payload {
        [0x1f, 0x8b, ..] => payload,
        _ => payload
            .split_last_chunk::<4>()
            .map_or(payload, |(compressed, _size)| compressed),
    };
    let elf = decompress(compressed)?;
    loadable(&elf).ok_or(unusable("there is no 64-bit ELF kernel inside"))
}

/// The compressed kernel inside a bzImage.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(setup_header::HEADER..)?.get(..4)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(setup_header::SETUP_SECTS)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512
        + usize::try_from(number::<4>(image, setup_header::PAYLOAD_OFFSET)?).ok()?;
    let length = usize::try_from(number::<4>(image, setup_header::PAYLOAD_LENGTH)?).ok()?;
    image.get(start..)?.get(..length)
}

/// Offsets in the header and in the program headers of a 64-bit ELF file (ELF-64 object file format 1.5).
mod elf {
    pub const HEADER_SIZE: usize = 64;
    pub const E_PHOFF: usize = 0x20;
    pub const E_SHOFF: usize = 0x28;
    pub const E_PHENTSIZE: usize = 0x36;
    pub const E_PHNUM: usize = 0x38;
    pub const E_SHENTSIZE: usize = 0x3a;
    pub const PROGRAM_HEADER_SIZE: usize = 56;
    pub const P_OFFSET: usize = 0x08;
    pub const P_FILESZ: usize = 0x20;
    pub const PT_LOAD: u64 = 1;
    pub const PT_NOTE: u64 = 4;
}

/// A copy of an ELF file with only its PT_LOAD and PT_NOTE segments, and no sections.
fn loadable(file: &[u8]) -> Option<Vec<u8>> {
    const ELF64_LITTLE_ENDIAN: &[u8] = &[0x7f, b'E', b'L', b'F', 2, 1];
    if !file.starts_with(ELF64_LITTLE_ENDIAN) {
        return None;
    }
    let table = usize::try_from(number::<8>(file, elf::E_PHOFF)?).ok()?;
    let entry_size = usize::try_from(number::<2>(file, elf::E_PHENTSIZE)?).ok()?;
    let count = usize::try_from(number::<2>(file, elf::E_PHNUM)?).ok()?;
    let mut kept = Vec::new();
    for index in 0..count {
        let header = file
            .get(table + index * entry_size..)?
            .get(..elf::PROGRAM_HEADER_SIZE)?;
        if [elf::PT_LOAD, elf::PT_NOTE].contains(&number::<4>(header, 0)?) {
            kept.push(header.to_vec());
        }
    }
    let mut output = file.get(..elf::HEADER_SIZE)?.to_vec();
    put(
        &mut output,
        elf::E_PHOFF,
        &(elf::HEADER_SIZE as u64).to_le_bytes(),
    )?;
    put(&mut output, elf::E_SHOFF, &[0; 8])?;
    put(
        &mut output,
        elf::E_PHNUM,
        &u16::try_from(kept.len()).ok()?.to_le_bytes(),
    )?;
    put(&mut output, elf::E_SHENTSIZE, &[0; 6])?; // and e_shnum, e_shstrndx after it
    let mut contents = Vec::new();
    let contents_start = elf::HEADER_SIZE + kept.len() * elf::PROGRAM_HEADER_SIZE;
    for mut header in kept {
        let offset = usize::try_from(number::<8>(&header, elf::P_OFFSET)?).ok()?;
        let size = usize::try_from(number::<8>(&header, elf::P_FILESZ)?).ok()?;
        put(
            &mut header,
            elf::P_OFFSET,
            &((contents_start + contents.len()) as u64).to_le_bytes(),
        )?;
        contents.extend_from_slice(file.get(offset..)?.get(..size)?);
        output.extend_from_slice(&header);
    }
    output.extend_from_slice(&contents);
    Some(output)
}

/// The little-endian number of `N` bytes at `offset`.
fn number<const N: usize>(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..)?.get(..N)?;
    Some(
        field
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)),
    )
}

/// Writes `value` at `offset`.
fn put(bytes: &mut [u8], offset: usize, value: &[u8]) -> Option<()> {
    bytes
        .get_mut(offset..)?
        .get_mut(..value.len())?
        .copy_from_slice(value);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_package_is_read_from_what_apt_shows() {
        let shown = "Package: linux-image-amd64\nDepends: linux-image-6.1.0-56-amd64 (= 6.1.192-2)\nSize: 1\n";
        let expected = (
            "linux-image-6.1.0-56-amd64".to_owned(),
            "6.1.192-2".to_owned(),
        );
        assert_eq!(dependency(shown), Some(expected));
        assert_eq!(dependency("Depends: a (= ../../b)"), None);
    }

    #[test]
    fn modules_have_the_names_that_dependencies_use() {
        assert_eq!(
            module_name(Path::new("a/virtio-gpu.ko.xz")).as_deref(),
            Some("virtio_gpu")
        );
        assert_eq!(
            module_name(Path::new("a/kvm-amd.ko")).as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(module_name(Path::new("a/modules.koala")), None);
        assert_eq!(
            module_dependencies(b"x\0depends=drm,virtio-ring\0y"),
            ["drm", "virtio_ring"]
        );
        assert_eq!(module_dependencies(b"x\0depends=\0y"), [""; 0]);
    }

    #[test]
    fn only_loadable_segments_and_notes_of_a_kernel_are_kept() {
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        put(&mut file, elf::E_PHOFF, &64u64.to_le_bytes()).unwrap();
        put(&mut file, elf::E_PHENTSIZE, &56u16.to_le_bytes()).unwrap();
        put(&mut file, elf::E_PHNUM, &3u16.to_le_bytes()).unwrap();
        for (kind, offset) in [(1u32, 300u64), (7, 310), (4, 320)] {
            let mut header = vec![0; 56];
            put(&mut header, 0, &kind.to_le_bytes()).unwrap();
            put(&mut header, elf::P_OFFSET, &offset.to_le_bytes()).unwrap();
            put(&mut header, elf::P_FILESZ, &10u64.to_le_bytes()).unwrap();
            file.extend(header);
        }
        file.resize(300, 0);
        file.extend(b"loadable__tls_______note______section");
        let kept = loadable(&file).unwrap();
        assert_eq!(number::<2>(&kept, elf::E_PHNUM), Some(2));
        assert_eq!(number::<8>(&kept, 64 + 56 + elf::P_OFFSET), Some(186));
        assert_eq!(&kept[176..], b"loadable__note______");
    }
}
