//! Loads a kernel and tells it about the machine: ELF (with or without a PVH note) or bzImage,
//! initial ramdisk, command line, memory map, MP table.
//!
//! `vm` calls [`load`] once before the first vCPU runs. Files are the operator's, yet nothing in them
//! may make this code panic or write outside guest memory; every refusal says what to do.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::registers::{self, Entry};
use crate::{layout, mptable};
use pvgpu_host_proxy::size;

/// What is to be booted.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// An ELF file for x86-64 or a bzImage.
    pub kernel: &'a Path,
    /// The files of the initial ramdisk, one after another: Linux unpacks archives that are concatenated. None for none.
    pub initrd: &'a [PathBuf],
    /// The command line that the operator gave.
    pub cmdline: &'a str,
    /// What the machine itself adds to it, before a `--` that ends kernel parameters.
    pub announcements: &'a [String],
    /// Number of vCPUs.
    pub cpus: u8,
}

/// Why a machine cannot boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read the {what} {}: {error}; check the path and its permissions", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The kernel is of no kind that this monitor boots.
    #[error("{} is not a kernel that can be booted ({reason}): give an uncompressed 64-bit x86 ELF (vmlinux) or a bzImage", path.display())]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel does not fit into RAM.
    #[error("the kernel {} needs memory up to {}, the machine has {}: give it more with --memory", path.display(), size::display(*.needed), size::display(*.memory))]
    KernelSize {
        /// Which file.
        path: PathBuf,
        /// First address beyond the kernel, rounded up to a MiB.
        needed: u64,
        /// End of RAM below the device hole.
        memory: u64,
    },
    /// The initial ramdisk does not fit into RAM.
    #[error("the initrd {} ({initrd} bytes) does not fit beside the kernel ({room} bytes are free): give the machine more with --memory or use a smaller initrd", path.display())]
    InitrdSize {
        /// Which file.
        path: PathBuf,
        /// Its length.
        initrd: u64,
        /// The room between the end of the kernel and the highest address it accepts.
        room: u64,
    },
    /// The command line is too long or malformed.
    #[error(
        "the command line cannot be passed to the kernel ({reason}; the limit is {limit} bytes, the announced devices included): shorten or correct --cmdline"
    )]
    CommandLine {
        /// What is wrong with it.
        reason: String,
        /// Longest the kernel takes.
        limit: u64,
    },
    /// Guest memory refused a write that the checks above allowed.
    #[error(
        "cannot write boot structures to guest memory ({0}): give the machine more with --memory"
    )]
    Structures(String),
}

/// A kernel in memory.
struct Kernel {
    entry: Entry,
    /// First address that the kernel does not claim for itself while it starts.
    end: u64,
    /// The bzImage's own header.
    header: Option<linux_loader::loader::bootparam::setup_header>,
}

/// Loads everything and returns where the boot processor starts.
///
/// # Errors
///
/// See [`BootError`].
pub fn load(memory: &GuestMemoryMmap, request: Request<'_>) -> Result<Entry, BootError> {
    let low_end = low_end(memory);
    let kernel = load_kernel(memory, request.kernel, low_end)?;
    let header = kernel.header.unwrap_or_default();

    let limit = match header.cmdline_size {
        0 => layout::COMMAND_LINE_SIZE,
        // The header's size leaves out the NUL.
        size => u64::from(size)
            .saturating_add(1)
            .min(layout::MP_TABLE - layout::COMMAND_LINE),
    };
    let cmdline = command_line(request.cmdline, request.announcements, limit)?;
    write(memory, &cmdline, layout::COMMAND_LINE)?;

    let highest = match header.initrd_addr_max {
        0 => u64::from(u32::MAX >> 1),
        highest => u64::from(highest),
    };
    let initrd = match request.initrd {
        [] => None,
        files => Some(load_initrd(
            memory,
            files,
            kernel.end,
            low_end.min(highest.saturating_add(1)),
        )?),
    };

    write(memory, &mptable::table(request.cpus), layout::MP_TABLE)?;
    registers::write_tables(memory, kernel.entry)
        .map_err(|error| BootError::Structures(error.to_string()))?;
    match kernel.entry {
        Entry::Linux64(_) => write_zero_page(memory, header, initrd)?,
        Entry::Pvh(_) => write_start_info(memory, initrd)?,
    }
    Ok(kernel.entry)
}

fn write(memory: &GuestMemoryMmap, bytes: &[u8], address: u64) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| BootError::Structures(error.to_string()))
}

/// End of the RAM that starts at address 0.
fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, |region| region.len())
}

/// Usable RAM as (address, length) pairs.
fn usable(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    let low_end = low_end(memory);
    let mut ranges = vec![
        (0, layout::MP_TABLE),
        (
            layout::HIGH_MEMORY,
            low_end.saturating_sub(layout::HIGH_MEMORY),
        ),
    ];
    ranges.extend(
        memory
            .iter()
            .filter(|r| r.start_addr().0 != 0)
            .map(|r| (r.start_addr().0, r.len())),
    );
    ranges
}

fn load_kernel(memory: &GuestMemoryMmap, path: &Path, low_end: u64) -> Result<Kernel, BootError> {
    let read = |error| BootError::Read {
        what: "kernel",
        path: path.into(),
        error,
    };
    let refuse = |reason: String| BootError::Kernel {
        path: path.into(),
        reason,
    };
    let fits = |end: u64| match end <= low_end {
        true => Ok(()),
        false => Err(BootError::KernelSize {
            path: path.into(),
            needed: end.checked_next_multiple_of(1 << 20).unwrap_or(end),
            memory: low_end,
        }),
    };
    let mut file = File::open(path).map_err(read)?;
    let mut magic = Vec::new();
    (&mut file).take(4).read_to_end(&mut magic).map_err(read)?;

    if magic == b"\x7fELF" {
        let end = elf_end(&mut file)
            .map_err(read)?
            .map_err(|reason| refuse(reason.into()))?;
        fits(end)?;
        let loaded = Elf::load(
            memory,
            None,
            &mut file,
            Some(GuestAddress(layout::HIGH_MEMORY)),
        )
        .map_err(|error| refuse(error.to_string()))?;
        let entry = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
            _ => Entry::Linux64(loaded.kernel_load.0),
        };
        let (Entry::Pvh(address) | Entry::Linux64(address)) = entry;
        if address < layout::HIGH_MEMORY || address >= end {
            return Err(refuse(format!(
                "its entry point {address:#x} lies outside of it"
            )));
        }
        return Ok(Kernel {
            entry,
            end,
            header: None,
        });
    }

    let KernelLoaderResult {
        kernel_load,
        setup_header,
        ..
    } = BzImage::load(
        memory,
        None,
        &mut file,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|error| {
        let length = file.seek(SeekFrom::End(0)).unwrap_or(0);
        if is_bzimage(&mut file) && layout::HIGH_MEMORY + length > low_end {
            BootError::KernelSize {
                path: path.into(),
                needed: (layout::HIGH_MEMORY + length).next_multiple_of(1 << 20),
                memory: low_end,
            }
        } else {
            refuse(error.to_string())
        }
    })?;
    let header = setup_header.ok_or_else(|| refuse("its setup header is missing".into()))?;
    /// First version of the boot protocol that has `xloadflags`.
    const VERSION_WITH_64_BIT_ENTRY: u16 = 0x20c;
    const XLF_KERNEL_64: u16 = 1;
    if header.version < VERSION_WITH_64_BIT_ENTRY || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(refuse("this bzImage has no 64-bit entry point".into()));
    }
    // While it unpacks itself a kernel claims init_size bytes from where it will run.
    let runs_at = kernel_load.0.max(header.pref_address);
    let end = runs_at.saturating_add(u64::from(header.init_size));
    fits(end)?;
    /// The 64-bit entry point stands this far behind the start of the protected-mode code.
    const ENTRY_64: u64 = 0x200;
    Ok(Kernel {
        entry: Entry::Linux64(kernel_load.0 + ENTRY_64),
        end,
        header: Some(header),
    })
}

/// Whether the file has a bzImage's magic in its setup header.
fn is_bzimage(file: &mut File) -> bool {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0x202)).is_ok()
        && file.read_exact(&mut magic).is_ok()
        && &magic == b"HdrS"
}

/// First address behind all segments of a 64-bit x86 ELF file, or what is wrong with the file.
fn elf_end(file: &mut File) -> io::Result<Result<u64, &'static str>> {
    const LOAD: u32 = 1;
    const X86_64: u16 = 62;
    let length = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut header = [0; 64];
    if length < 64 {
        return Ok(Err("it ends inside its ELF header"));
    }
    file.read_exact(&mut header)?;
    if header[4] != 2 || header[5] != 1 || u16::from_le_bytes([header[18], header[19]]) != X86_64 {
        return Ok(Err("it is an ELF file, but not for x86-64"));
    }
    let table = field64(&header, 32);
    let entry_size = u64::from(u16::from_le_bytes([header[54], header[55]]));
    let entries = u64::from(u16::from_le_bytes([header[56], header[57]]));
    if entry_size != 56
        || table
            .checked_add(entry_size * entries)
            .is_none_or(|end| end > length)
    {
        return Ok(Err("its program headers are damaged"));
    }
    file.seek(SeekFrom::Start(table))?;
    let mut end = 0;
    for _ in 0..entries {
        let mut entry = [0; 56];
        file.read_exact(&mut entry)?;
        if u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) != LOAD {
            continue;
        }
        let (offset, address) = (field64(&entry, 8), field64(&entry, 24));
        let (in_file, in_memory) = (field64(&entry, 32), field64(&entry, 40));
        if offset.checked_add(in_file).is_none_or(|end| end > length) {
            return Ok(Err("it is truncated: a segment ends beyond the file"));
        }
        let Some(segment_end) = address.checked_add(in_memory.max(in_file)) else {
            return Ok(Err("a segment wraps around the address space"));
        };
        if in_memory != 0 && address < layout::HIGH_MEMORY {
            return Ok(Err(
                "a segment lies below 1 MiB, where the boot structures are",
            ));
        }
        end = segment_end.max(end);
    }
    Ok(if end == 0 {
        Err("it has nothing to load")
    } else {
        Ok(end)
    })
}

/// The little-endian 64-bit field at `at`, which the caller's array is long enough for.
fn field64<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut field = [0; 8];
    for (to, from) in field.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u64::from_le_bytes(field)
}

/// Where the initial ramdisk was put: address and length.
type Initrd = (u64, u64);

/// What the parts of a ramdisk are aligned to: where Linux looks for the next archive.
const INITRD_ALIGNMENT: u64 = 4;

/// Puts the ramdisk, `files` one after another, as high as it goes below `highest` and above `kernel_end`.
fn load_initrd(
    memory: &GuestMemoryMmap,
    files: &[PathBuf],
    kernel_end: u64,
    highest: u64,
) -> Result<Initrd, BootError> {
    let read = |path: &Path, error| BootError::Read {
        what: "initrd",
        path: path.into(),
        error,
    };
    let first = kernel_end.max(layout::HIGH_MEMORY).next_multiple_of(4096);
    let highest = highest & !0xfff;
    let room = highest.saturating_sub(first);
    // Each file with its length and where it is to begin.
    let mut parts = Vec::new();
    let mut end = 0u64;
    for path in files {
        let file = File::open(path).map_err(|error| read(path, error))?;
        let metadata = file.metadata().map_err(|error| read(path, error))?;
        if !metadata.is_file() {
            // Its length is not known before it has been read.
            return Err(read(path, io::Error::other("it is not a regular file")));
        }
        let (start, length) = (end.next_multiple_of(INITRD_ALIGNMENT), metadata.len());
        let too_large = BootError::InitrdSize {
            path: path.into(),
            initrd: length,
            room: room.saturating_sub(start),
        };
        match (start.checked_add(length), usize::try_from(length)) {
            (Some(next), Ok(bytes)) if next <= room => {
                end = next;
                parts.push((path, file, start, bytes));
            }
            _ => return Err(too_large),
        }
    }
    let address = (highest - end) & !0xfff;
    for (path, mut file, start, bytes) in parts {
        memory
            .read_exact_volatile_from(GuestAddress(address + start), &mut file, bytes)
            .map_err(|error| read(path, io::Error::other(error)))?;
    }
    Ok((address, end))
}

/// The command line with the machine's announcements, NUL included.
fn command_line(
    operator: &str,
    announcements: &[String],
    limit: u64,
) -> Result<Vec<u8>, BootError> {
    let error = |reason: String| BootError::CommandLine { reason, limit };
    let capacity = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut line = match operator.trim() {
        "" => Cmdline::new(capacity),
        operator => Cmdline::try_from(operator, capacity),
    }
    .map_err(|e| error(e.to_string()))?;
    for announcement in announcements {
        line.insert_str(announcement)
            .map_err(|e| error(e.to_string()))?;
    }
    let line = line.as_cstring().map_err(|e| error(e.to_string()))?;
    let line = line.into_bytes_with_nul();
    if line.len() > capacity {
        return Err(error("it is too long".into()));
    }
    Ok(line)
}

/// Memory type "usable" of the BIOS and PVH memory maps.
const USABLE: u32 = 1;

fn write_zero_page(
    memory: &GuestMemoryMmap,
    header: linux_loader::loader::bootparam::setup_header,
    initrd: Option<Initrd>,
) -> Result<(), BootError> {
    /// Magic numbers that a kernel expects in the header it is handed.
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
    const UNKNOWN_LOADER: u8 = 0xff;
    const LOADED_HIGH: u8 = 1;
    const DEFAULT_ALIGNMENT: u32 = 0x100_0000;

    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = UNKNOWN_LOADER;
    params.hdr.loadflags |= LOADED_HIGH;
    // Addresses below 4 GiB by construction of the layout and of `load_initrd`.
    params.hdr.cmd_line_ptr = u32::try_from(layout::COMMAND_LINE).unwrap_or_default();
    if params.hdr.kernel_alignment == 0 {
        params.hdr.kernel_alignment = DEFAULT_ALIGNMENT;
    }
    if let Some((address, length)) = initrd {
        let narrow = |value| {
            u32::try_from(value)
                .map_err(|_| BootError::Structures("the initrd lies above 4 GiB".into()))
        };
        params.hdr.ramdisk_image = narrow(address)?;
        params.hdr.ramdisk_size = narrow(length)?;
    }
    let usable = usable(memory);
    for (entry, (address, length)) in params.e820_table.iter_mut().zip(&usable) {
        entry.addr = *address;
        entry.size = *length;
        entry.r#type = USABLE;
    }
    params.e820_entries = u8::try_from(usable.len()).unwrap_or_default();
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(|error| BootError::Structures(error.to_string()))
}

fn write_start_info(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> Result<(), BootError> {
    const MAGIC: u32 = 0x336e_c578;
    let map: Vec<_> = usable(memory)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: USABLE,
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or_default(),
        ..Default::default()
    };
    if initrd.is_some() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Structures(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_come_before_the_arguments_of_init() {
        let line = command_line("quiet -- single", &["a=1".into(), "b=2".into()], 64).unwrap();
        assert_eq!(line, b"quiet a=1 b=2 -- single\0");
        assert_eq!(command_line("", &["a=1".into()], 64).unwrap(), b"a=1\0");
        assert_eq!(command_line("", &[], 64).unwrap(), b"\0");
    }

    #[test]
    fn a_command_line_that_is_too_long_names_the_limit() {
        let error = command_line(&"x".repeat(60), &["a=1".into()], 63)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("63") && error.contains("--cmdline"),
            "{error}"
        );
    }
}
