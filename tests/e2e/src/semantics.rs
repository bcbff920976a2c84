//! What a DRM node does beside its ioctls' own meaning: checks of mappings, descriptors, signals and ends of processes,
//! which the program `node-semantics` runs natively in L1 and on pvgpu's node in L2, with the same lines.
//!
//! - [`memory`]: `mmap` and all that can be done with a mapping.
//! - [`files`]: several opens, `dup`, `fork`, `exec`, closing.
//! - [`calls`]: signals, kills, threads, large requests.
//! - [`guest`]: what a guest's node alone can be asked: a lost device, unloading, 32-bit programs.
//! - [`system`]: the system calls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{
    SYNCOBJ_CREATE, SYNCOBJ_WAIT, SyncobjCreate, SyncobjWait, syncobj,
};
use pvgpu_protocol::family::{soft, vgem, virtio_gpu};
use pvgpu_scenarios::virgl::{Format, bind, target};
use system::{PAGE, ioctl};

use crate::drm_ioctl::{self, Kind};

pub mod calls;
pub mod files;
pub mod guest;
pub mod memory;
pub mod system;

/// Why a check could not be made, or that its result is a wrong one.
pub type Failure = Box<dyn std::error::Error>;

/// One check: what it sees is a line of words, equal on each node.
pub struct Check {
    /// What it is about.
    pub name: &'static str,
    /// Gives what it sees, or nothing where the driver does not have what it takes.
    pub run: fn(&Gpu) -> Result<Option<String>, Failure>,
    /// What a real node shows.
    pub expected: &'static str,
}

/// All checks that a native node stands, too.
pub fn checks() -> impl Iterator<Item = &'static Check> {
    [memory::CHECKS, files::CHECKS, calls::CHECKS]
        .into_iter()
        .flatten()
}

/// Makes the checks and prints a line for each; those that see something else than they should are the failure.
pub fn run(gpu: &Gpu, checks: impl Iterator<Item = &'static Check>) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for check in checks {
        let seen = match (check.run)(gpu) {
            Ok(None) => continue,
            Ok(Some(seen)) => seen,
            Err(error) => error.to_string(),
        };
        println!("check {}: {seen}", check.name);
        if seen != check.expected {
            println!("WRONG, it should be: {}", check.expected);
            wrong.push(format!("{}: {seen}", check.name));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(format!("wrong: {}", wrong.join("; ")).into()),
    }
}

/// What became of a call, as a word.
pub fn word<T>(result: Result<T, Errno>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(errno) => errno.to_string(),
    }
}

/// The node to check.
pub struct Gpu {
    /// Its driver's name.
    pub driver: String,
    /// Its file.
    pub path: PathBuf,
}

/// A buffer object.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Its GEM handle.
    pub handle: u32,
    /// Where it lies in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub length: usize,
}

/// Something that lasts.
pub enum Work {
    /// A syncobj that nobody signals.
    Syncobj(u32),
    /// A resource that is copied to.
    Resource(u32),
}

impl Gpu {
    /// The node of that driver on which a program makes buffers.
    pub fn find(driver: &str) -> Result<Self, Failure> {
        let kind = if driver == "vgem" {
            Kind::Card
        } else {
            Kind::Render
        };
        Ok(Self {
            driver: driver.to_owned(),
            path: drm_ioctl::find(driver, kind)?.path,
        })
    }

    /// Opens the node.
    pub fn open(&self) -> Result<OwnedFd, Errno> {
        system::open(&self.path, libc::O_RDWR | libc::O_CLOEXEC)
    }

    /// Makes a buffer of whole pages.
    pub fn buffer(&self, fd: BorrowedFd<'_>, pages: usize) -> Result<Buffer, Errno> {
        let length = pages * PAGE;
        let size = u32::try_from(length).map_err(|_| Errno::E2BIG)?;
        let (handle, offset) = match self.driver.as_str() {
            "vgem" => {
                let mut dumb = vgem::CreateDumb {
                    width: 1024,
                    height: size / PAGE as u32,
                    bpp: 32,
                    ..Default::default()
                };
                ioctl(fd, vgem::CREATE_DUMB, &mut dumb)?;
                let mut map = vgem::MapDumb {
                    handle: dumb.handle,
                    ..Default::default()
                };
                ioctl(fd, vgem::MAP_DUMB, &mut map)?;
                (dumb.handle, map.offset)
            }
            "virtio_gpu" => {
                let mut resource = virtio_gpu::ResourceCreate {
                    target: target::BUFFER,
                    format: Format::R8Unorm as u32,
                    bind: bind::VERTEX_BUFFER,
                    width: size,
                    height: 1,
                    depth: 1,
                    array_size: 1,
                    size,
                    ..Default::default()
                };
                ioctl(fd, virtio_gpu::RESOURCE_CREATE, &mut resource)?;
                let mut map = virtio_gpu::Map {
                    handle: resource.bo_handle,
                    ..Default::default()
                };
                ioctl(fd, virtio_gpu::MAP, &mut map)?;
                (resource.bo_handle, map.offset)
            }
            _ => {
                let mut create = soft::GemCreate {
                    size: size.into(),
                    ..Default::default()
                };
                ioctl(fd, soft::DRM_IOCTL_SOFT_GEM_CREATE, &mut create)?;
                let mut map = soft::GemMmap {
                    handle: create.handle,
                    ..Default::default()
                };
                ioctl(fd, soft::DRM_IOCTL_SOFT_GEM_MMAP, &mut map)?;
                (create.handle, map.offset)
            }
        };
        Ok(Buffer {
            handle,
            offset,
            length,
        })
    }

    /// Starts something that a program can wait for: the embedded GPU's lasts for ever, that of virtio_gpu a while. Nothing where
    /// the driver has no call that waits.
    pub fn work(&self, fd: BorrowedFd<'_>) -> Result<Option<Work>, Errno> {
        match self.driver.as_str() {
            "soft" => {
                let mut create = SyncobjCreate::default();
                ioctl(fd, SYNCOBJ_CREATE, &mut create)?;
                Ok(Some(Work::Syncobj(create.handle)))
            }
            "virtio_gpu" => {
                /// Pixels of each side of two textures; how often one is drawn on the other in a submission; and how many of
                /// these there are. In the testbed that is some hundred milliseconds, in which the machine goes on: the GPU behind
                /// its GPU draws on threads of its own, while a mere copy would keep everything waiting.
                const SIDE: u32 = 2048;
                const BLITS: usize = 3;
                const SUBMISSIONS: usize = 8;
                let texture = || {
                    let mut resource = virtio_gpu::ResourceCreate {
                        target: target::TEXTURE_2D,
                        format: Format::R8G8B8A8Unorm as u32,
                        bind: bind::SAMPLER_VIEW | bind::RENDER_TARGET,
                        width: SIDE,
                        height: SIDE,
                        depth: 1,
                        array_size: 1,
                        size: SIDE * SIDE * 4,
                        ..Default::default()
                    };
                    ioctl(fd, virtio_gpu::RESOURCE_CREATE, &mut resource).map(|_| resource)
                };
                let (from, to) = (texture()?, texture()?);
                /// `VIRGL_CCMD_BLIT` with its 21 words: all colours, filtered; no scissors; to where (resource, level, format, x,
                /// y, z, how much), from where (`virgl_protocol.h`).
                const BLIT: u32 = 16 | 21 << 16;
                const COLOURS_FILTERED: u32 = 0xf | 1 << 8;
                let place = |texture: u32, side: u32| {
                    let format = Format::R8G8B8A8Unorm as u32;
                    [texture, 0, format, 0, 0, 0, side, side, 1]
                };
                let blit = [
                    &[BLIT, COLOURS_FILTERED, 0, 0][..],
                    &place(to.res_handle, SIDE),
                    &place(from.res_handle, SIDE - 1),
                ];
                let stream = blit.concat().repeat(BLITS);
                let buffers = [from.bo_handle, to.bo_handle];
                for _ in 0..SUBMISSIONS {
                    let mut execute = virtio_gpu::Execbuffer {
                        size: u32::try_from(size_of_val(&stream[..])).map_err(|_| Errno::E2BIG)?,
                        command: stream.as_ptr() as u64,
                        bo_handles: buffers.as_ptr() as u64,
                        num_bo_handles: 2,
                        fence_fd: -1,
                        ..Default::default()
                    };
                    ioctl(fd, virtio_gpu::EXECBUFFER, &mut execute)?;
                }
                Ok(Some(Work::Resource(to.bo_handle)))
            }
            _ => Ok(None),
        }
    }

    /// Waits for it, in one call that lasts until `deadline_ns` at most where the driver's call has a deadline.
    pub fn wait(&self, fd: BorrowedFd<'_>, work: &Work, deadline_ns: i64) -> Result<i32, Errno> {
        match work {
            Work::Syncobj(handle) => {
                let mut wait = SyncobjWait {
                    handles: &raw const *handle as u64,
                    timeout_nsec: deadline_ns,
                    count_handles: 1,
                    flags: syncobj::WAIT_FOR_SUBMIT,
                    ..Default::default()
                };
                ioctl(fd, SYNCOBJ_WAIT, &mut wait)
            }
            Work::Resource(handle) => {
                let mut wait = virtio_gpu::Wait {
                    handle: *handle,
                    flags: 0,
                };
                ioctl(fd, virtio_gpu::WAIT, &mut wait)
            }
        }
    }
}

/// An open node with a buffer and a mapping of it.
pub struct Mapped {
    /// The node.
    pub fd: OwnedFd,
    /// The buffer.
    pub buffer: Buffer,
    /// Where it is.
    pub address: usize,
}

impl Mapped {
    /// A buffer of that many pages; every byte of page `n` is `n + 1`.
    pub fn new(gpu: &Gpu, pages: usize) -> Result<Self, Errno> {
        let mapped = Self::try_new(gpu, pages)?;
        for page in 0..pages {
            system::fill(mapped.page(page), PAGE, page as u8 + 1);
        }
        Ok(mapped)
    }

    /// The same without writing: the device may go away, and whoever writes then gets a signal.
    pub fn try_new(gpu: &Gpu, pages: usize) -> Result<Self, Errno> {
        let fd = gpu.open()?;
        let buffer = gpu.buffer(fd.as_fd(), pages)?;
        let address = system::map_shared(fd.as_fd(), buffer.offset, buffer.length)?;
        Ok(Self {
            fd,
            buffer,
            address,
        })
    }

    /// Address of a page.
    pub fn page(&self, page: usize) -> usize {
        self.address + page * PAGE
    }
}

/// The first bytes of pages one after the other, `-` where there is no memory.
pub fn pages(address: usize, count: usize) -> String {
    let byte = |page| match system::peek(address + page * PAGE) {
        Ok(byte) => byte.to_string(),
        Err(_) => "-".to_owned(),
    };
    (0..count).map(byte).collect::<Vec<_>>().join(" ")
}
