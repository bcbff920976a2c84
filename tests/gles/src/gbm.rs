//! `libgbm`, as much of it as [`crate::egl`] and [`crate::sharing`] need: a device for EGL's GBM platform, and buffers
//! that leave the process as dma-bufs. It is loaded when a node is opened, so that nothing needs Mesa to build.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use libloading::Library;

/// 32 bits per pixel, in memory blue, green, red, alpha: `DRM_FORMAT_ARGB8888` of `drm_fourcc.h`, `AR24`.
pub const ARGB8888: u32 = u32::from_le_bytes(*b"AR24");

/// `GBM_BO_USE_RENDERING` of `gbm.h`.
const USE_RENDERING: u32 = 1 << 2;

/// Why there is no device or no buffer.
#[derive(Debug, thiserror::Error)]
pub enum GbmError {
    /// The library is not there, or is no GBM.
    #[error("libgbm.so.1 cannot be used: {0}; install Debian's package libgbm1")]
    Library(#[from] libloading::Error),
    /// `gbm_create_device` gave nothing.
    #[error("libgbm knows no driver for this node: install Debian's package libgl1-mesa-dri")]
    Device,
    /// `gbm_bo_create` gave nothing.
    #[error("the driver cannot make a buffer of {0}x{1} for rendering: `dmesg` may say why")]
    Buffer(u32, u32),
    /// `gbm_bo_get_fd` gave nothing.
    #[error("the driver cannot export a buffer as a dma-buf: does the node's driver have PRIME?")]
    Export,
}

/// A dma-buf with all that another process needs to know to use it as a picture. Sizes and distances are in pixels and
/// bytes; `modifier` is one of `drm_fourcc.h`.
#[derive(Debug)]
pub struct DmaBuf {
    /// The buffer itself.
    pub fd: OwnedFd,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Bytes from the buffer's start to its first pixel.
    pub offset: u32,
    /// `DRM_FORMAT_*`.
    pub format: u32,
    /// How the pixels lie; [`NO_MODIFIER`] if the driver does not say.
    pub modifier: u64,
}

/// `DRM_FORMAT_MOD_INVALID`: only the driver knows how the pixels lie.
pub const NO_MODIFIER: u64 = 0x00ff_ffff_ffff_ffff;

/// The library's functions, as `gbm.h` declares them.
struct Functions {
    device_destroy: unsafe extern "C" fn(*mut c_void),
    bo_create: unsafe extern "C" fn(*mut c_void, u32, u32, u32, u32) -> *mut c_void,
    bo_destroy: unsafe extern "C" fn(*mut c_void),
    bo_get_fd: unsafe extern "C" fn(*mut c_void) -> c_int,
    bo_get_stride: unsafe extern "C" fn(*mut c_void) -> u32,
    bo_get_offset: unsafe extern "C" fn(*mut c_void, c_int) -> u32,
    bo_get_modifier: unsafe extern "C" fn(*mut c_void) -> u64,
}

/// A `gbm_device` on an open DRM node. Its clones are one device.
#[derive(Clone)]
pub struct Device(Rc<Inner>);

struct Inner {
    raw: *mut c_void,
    functions: Functions,
    /// The functions are its code.
    _library: Library,
    _node: File,
}

impl Device {
    /// Loads the library and makes the device.
    pub fn new(node: File) -> Result<Device, GbmError> {
        // SAFETY: Mesa's libgbm has no constructors that rely on anything of this process.
        let library = unsafe { Library::new("libgbm.so.1") }?;
        // SAFETY: the types are those of `gbm.h`, whose ABI the library's version 1 keeps; the pointers are kept
        // together with the library.
        let (create, functions) = unsafe {
            let create: unsafe extern "C" fn(c_int) -> *mut c_void =
                *library.get(b"gbm_create_device\0")?;
            let functions = Functions {
                device_destroy: *library.get(b"gbm_device_destroy\0")?,
                bo_create: *library.get(b"gbm_bo_create\0")?,
                bo_destroy: *library.get(b"gbm_bo_destroy\0")?,
                bo_get_fd: *library.get(b"gbm_bo_get_fd\0")?,
                bo_get_stride: *library.get(b"gbm_bo_get_stride\0")?,
                bo_get_offset: *library.get(b"gbm_bo_get_offset\0")?,
                bo_get_modifier: *library.get(b"gbm_bo_get_modifier\0")?,
            };
            (create, functions)
        };
        // SAFETY: the descriptor is open, and stays open as long as the device (`_node`).
        let raw = unsafe { create(node.as_raw_fd()) };
        if raw.is_null() {
            return Err(GbmError::Device);
        }
        Ok(Device(Rc::new(Inner {
            raw,
            functions,
            _library: library,
            _node: node,
        })))
    }

    /// The `gbm_device`, valid as long as `self` or a clone of it.
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.raw
    }

    /// Makes a buffer for rendering, of the format [`ARGB8888`], and exports it. The buffer lives as long as its dma-buf.
    pub fn render_buffer(&self, width: u32, height: u32) -> Result<DmaBuf, GbmError> {
        let functions = &self.0.functions;
        // SAFETY: the device lives.
        let bo =
            unsafe { (functions.bo_create)(self.0.raw, width, height, ARGB8888, USE_RENDERING) };
        if bo.is_null() {
            return Err(GbmError::Buffer(width, height));
        }
        // SAFETY: `bo` is a buffer until bo_destroy, after which nothing uses it; the descriptor is new and nobody else's.
        unsafe {
            let fd = (functions.bo_get_fd)(bo);
            let buffer = (fd >= 0).then(|| DmaBuf {
                fd: OwnedFd::from_raw_fd(fd),
                width,
                height,
                stride: (functions.bo_get_stride)(bo),
                offset: (functions.bo_get_offset)(bo, 0),
                format: ARGB8888,
                modifier: (functions.bo_get_modifier)(bo),
            });
            (functions.bo_destroy)(bo);
            buffer.ok_or(GbmError::Export)
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: made by gbm_create_device, used no more; the library is dropped after this.
        unsafe { (self.functions.device_destroy)(self.raw) };
    }
}
