//! DRM device nodes and the few ioctls that the tests issue natively, without any code of pvgpu in between.
//! Tests compare what a guest sees with this. The structs are written from the kernel's `include/uapi/drm`.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use pvgpu_protocol::Errno;
use pvgpu_scenarios::DeviceFile;
use zerocopy::{FromBytes, IntoBytes};

/// An open DRM device node.
pub struct Node {
    file: File,
    /// `/dev/dri/...`.
    pub path: PathBuf,
}

/// Which of a device's nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `card*`, the primary node: everything.
    Card,
    /// `renderD*`: rendering only.
    Render,
}

/// Finds the node of `kind` whose driver calls itself `driver` (DRM_IOCTL_VERSION). Numbers of nodes depend on
/// the order in which drivers came up, so nothing goes by them.
pub fn find(driver: &str, kind: Kind) -> io::Result<Node> {
    let prefix = match kind {
        Kind::Card => "card",
        Kind::Render => "renderD",
    };
    let mut seen = Vec::new();
    for entry in fs::read_dir("/dev/dri")? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let node = Node::open(&entry.path())?;
        let name = node.driver()?;
        if name == driver {
            return Ok(node);
        }
        seen.push(name);
    }
    let message = format!("no {prefix} node of driver {driver} in /dev/dri, only of {seen:?}");
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}

/// An ioctl of DRM that reads and writes a `T`.
const fn request<T>(number: libc::c_ulong) -> libc::c_ulong {
    const DRM_IOCTL_BASE: libc::c_ulong = b'd' as libc::c_ulong;
    const READ_WRITE: libc::c_ulong = 3;
    READ_WRITE << 30 | (size_of::<T>() as libc::c_ulong) << 16 | DRM_IOCTL_BASE << 8 | number
}

/// `struct drm_version`.
#[repr(C)]
#[derive(Default)]
struct Version {
    numbers: [i32; 3],
    name_length: usize,
    name: u64,
    date_length: usize,
    date: u64,
    description_length: usize,
    description: u64,
}

/// `struct drm_mode_create_dumb`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DumbBuffer {
    /// In pixels.
    pub height: u32,
    /// In pixels.
    pub width: u32,
    /// Bits per pixel.
    pub bits_per_pixel: u32,
    /// None defined.
    pub flags: u32,
    /// GEM handle (output).
    pub handle: u32,
    /// Bytes per row (output).
    pub pitch: u32,
    /// Bytes (output).
    pub size: u64,
}

/// `struct drm_mode_map_dumb`.
#[repr(C)]
#[derive(Default)]
struct MapDumb {
    handle: u32,
    pad: u32,
    offset: u64,
}

/// `struct drm_virtgpu_getparam`.
#[repr(C)]
struct GetParam {
    param: u64,
    value: u64,
}

/// `struct drm_virtgpu_get_caps`.
#[repr(C)]
struct GetCaps {
    capset: u32,
    version: u32,
    address: u64,
    size: u32,
    pad: u32,
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Node {
    /// Opens the node at `path` for reading and writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Node {
            file,
            path: path.to_owned(),
        })
    }

    /// Issues ioctl `number` with `argument`; its pointer fields must be 0 or point to memory of the size
    /// that its other fields say.
    fn ioctl<T>(&self, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        loop {
            // SAFETY: the kernel reads and writes size_of::<T>() bytes at `argument`, which the request's number
            // says, and what its pointers reach, which the callers below own.
            let result = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    request::<T>(number),
                    argument as *mut T,
                )
            };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
    }

    /// What the node says of an ioctl of that type and number without an argument; none when it performs it.
    pub fn refuses(&self, kind: u8, number: u8) -> Option<Errno> {
        let command = libc::c_ulong::from(kind) << 8 | libc::c_ulong::from(number);
        // SAFETY: the request's number says that there is no argument, so the kernel reads and writes none.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), command) };
        (result < 0).then(|| errno(io::Error::last_os_error()))
    }

    /// The driver's name, by DRM_IOCTL_VERSION.
    pub fn driver(&self) -> io::Result<String> {
        Ok(self.version()?.0)
    }

    /// All that DRM_IOCTL_VERSION says: the driver's name, and for people its version, date and description.
    pub fn version(&self) -> io::Result<(String, String)> {
        let mut texts = [[0u8; 64]; 3];
        let [name, date, description] = &mut texts;
        let mut version = Version {
            name_length: name.len(),
            name: name.as_mut_ptr() as u64,
            date_length: date.len(),
            date: date.as_mut_ptr() as u64,
            description_length: description.len(),
            description: description.as_mut_ptr() as u64,
            ..Default::default()
        };
        self.ioctl(0x00, &mut version)?;
        let text = |bytes: &[u8], length: usize| {
            String::from_utf8_lossy(&bytes[..length.min(bytes.len())]).into_owned()
        };
        let [major, minor, patch] = version.numbers;
        let (date, description) = (
            text(&texts[1], version.date_length),
            text(&texts[2], version.description_length),
        );
        Ok((
            text(&texts[0], version.name_length),
            format!("{major}.{minor}.{patch} of {date}, {description}"),
        ))
    }

    /// DRM_IOCTL_MODE_CREATE_DUMB: a buffer of 32 bits per pixel.
    pub fn create_dumb(&self, width: u32, height: u32) -> io::Result<DumbBuffer> {
        let mut dumb = DumbBuffer {
            width,
            height,
            bits_per_pixel: 32,
            ..Default::default()
        };
        self.ioctl(0xb2, &mut dumb)?;
        Ok(dumb)
    }

    /// DRM_IOCTL_MODE_MAP_DUMB and mmap: the buffer's memory.
    pub fn map_dumb(&self, dumb: &DumbBuffer) -> io::Result<Mapping> {
        let mut map = MapDumb {
            handle: dumb.handle,
            ..Default::default()
        };
        self.ioctl(0xb3, &mut map)?;
        self.map(
            map.offset,
            usize::try_from(dumb.size).map_err(io::Error::other)?,
        )
    }

    /// Maps `length` bytes, readable and writable, from the offset that a MAP ioctl gave.
    pub fn map(&self, offset: u64, length: usize) -> io::Result<Mapping> {
        Mapping::new(self.file.as_fd(), offset, length)
    }

    /// DRM_IOCTL_VIRTGPU_GETPARAM.
    pub fn virtgpu_parameter(&self, param: u64) -> io::Result<i32> {
        let mut value = 0i32;
        let mut argument = GetParam {
            param,
            value: &raw mut value as u64,
        };
        self.ioctl(0x43, &mut argument)?;
        Ok(value)
    }

    /// DRM_IOCTL_VIRTGPU_GET_CAPS: `size` bytes of capability set `capset`.
    pub fn virtgpu_capabilities(
        &self,
        capset: u32,
        version: u32,
        size: u32,
    ) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0u8; usize::try_from(size).map_err(io::Error::other)?];
        let mut argument = GetCaps {
            capset,
            version,
            address: bytes.as_mut_ptr() as u64,
            size,
            pad: 0,
        };
        self.ioctl(0x49, &mut argument)?;
        Ok(bytes)
    }
}

/// DMA_BUF_IOCTL_EXPORT_SYNC_FILE: all fences of a dma-buf as a sync file (`linux/dma-buf.h`).
pub fn export_sync_file(dma_buf: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const EXPORT_SYNC_FILE: libc::c_ulong = 0xc008_6202;
    const SYNC_READ_WRITE: i32 = 3;
    // `struct dma_buf_export_sync_file`: flags, then the descriptor that comes out.
    let mut argument = [SYNC_READ_WRITE, -1];
    // SAFETY: the kernel reads and writes the 8 bytes that the request's number says.
    let result = unsafe { libc::ioctl(dma_buf.as_raw_fd(), EXPORT_SYNC_FILE, &raw mut argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(argument[1]) })
}

/// A buffer object's memory in this process; unmapped when dropped.
pub struct Mapping {
    address: *mut u32,
    length: usize,
}

impl Mapping {
    /// Maps `length` bytes at `offset` of a file, shared, readable and writable.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no other memory.
        let address = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            address: address.cast(),
            length,
        })
    }

    /// Number of 32-bit words.
    pub fn words(&self) -> usize {
        self.length / 4
    }

    /// Reads word `index`.
    pub fn read(&self, index: usize) -> u32 {
        assert!(
            index < self.words(),
            "word {index} is outside of the mapping"
        );
        // SAFETY: inside the mapping, by the line above; volatile, because others may write to the same memory.
        unsafe { self.address.add(index).read_volatile() }
    }

    /// Writes word `index`.
    pub fn write(&self, index: usize, value: u32) {
        assert!(
            index < self.words(),
            "word {index} is outside of the mapping"
        );
        // SAFETY: as in `read`.
        unsafe { self.address.add(index).write_volatile(value) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value is the only one that knows the mapping's address.
        unsafe { libc::munmap(self.address.cast(), self.length) };
    }
}

/// The scenarios on the node itself: what their run through pvgpu is compared with.
impl DeviceFile for Node {
    type Mapping = Mapping;

    fn open_again(&self) -> Result<Self, Errno> {
        Node::open(&self.path).map_err(errno)
    }

    fn ioctl<T: FromBytes + IntoBytes>(
        &mut self,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno> {
        // SAFETY: the kernel reads and writes as many bytes at `argument` as `command` says, which is how the
        // scenarios make it, and what the pointers in it reach, which are addresses of memory that they own.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), command.into(), argument as *mut T) };
        if result < 0 {
            Err(errno(io::Error::last_os_error()))
        } else {
            Ok(result)
        }
    }

    fn map(&mut self, offset: u64, length: usize) -> Result<Mapping, Errno> {
        Node::map(self, offset, length).map_err(errno)
    }

    fn close_fd(&mut self, fd: i32) -> Result<(), Errno> {
        // SAFETY: a file descriptor that an ioctl gave to the caller, who alone knows it.
        match unsafe { libc::close(fd) } {
            0 => Ok(()),
            _ => Err(errno(io::Error::last_os_error())),
        }
    }

    fn now_ns(&self) -> u64 {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes one timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

impl pvgpu_scenarios::Mapping for Mapping {
    fn len(&self) -> usize {
        self.length
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range, and the program's own memory is not part of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }
}

impl Mapping {
    /// Address of `length` bytes at `offset`, which must lie inside.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length),
            "{length} bytes at {offset} are outside of the mapping of {} bytes",
            self.length
        );
        self.address.cast::<u8>().wrapping_add(offset)
    }
}

/// The error number of a failed system call.
fn errno(error: io::Error) -> Errno {
    Errno::new(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernels_headers() {
        assert_eq!(request::<Version>(0x00), 0xc040_6400);
        assert_eq!(request::<DumbBuffer>(0xb2), 0xc020_64b2);
        assert_eq!(request::<MapDumb>(0xb3), 0xc010_64b3);
        assert_eq!(request::<GetParam>(0x43), 0xc010_6443);
        assert_eq!(request::<GetCaps>(0x49), 0xc018_6449);
    }
}
