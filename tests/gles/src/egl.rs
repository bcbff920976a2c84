//! EGL without a window: a display on a DRM node (GBM platform) or on no device at all (surfaceless), a context that is
//! current on this thread, and images made of dma-bufs. [`crate::gl`] draws with the context. The library is loaded when
//! a display is opened.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use khronos_egl as egl;

use crate::gbm::{self, DmaBuf, GbmError};

type Library = egl::DynamicInstance<egl::EGL1_5>;

/// Values of `eglext.h` that the crate does not have.
mod value {
    use khronos_egl::{Attrib, Enum, Int};

    pub const PLATFORM_GBM: Enum = 0x31d7;
    pub const PLATFORM_SURFACELESS: Enum = 0x31dd;
    pub const LINUX_DMA_BUF: Enum = 0x3270;
    pub const FOURCC: Attrib = 0x3271;
    pub const PLANE0_FD: Attrib = 0x3272;
    pub const PLANE0_OFFSET: Attrib = 0x3273;
    pub const PLANE0_PITCH: Attrib = 0x3274;
    pub const PLANE0_MODIFIER_LOW: Attrib = 0x3443;
    pub const PLANE0_MODIFIER_HIGH: Attrib = 0x3444;
    pub const OPENGL_ES_API: Enum = 0x30a0;
    pub const CONTEXT_MAJOR_VERSION: Int = 0x3098;
    pub const GL_TEXTURE_2D: Enum = 0x30b1;
}

/// Why there is no display, no context or no image.
#[derive(Debug, thiserror::Error)]
pub enum EglError {
    /// The node is not there or may not be opened.
    #[error("cannot open {path}: {source}; {remedy}", remedy = node_remedy(source))]
    Node {
        /// The node.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The library is not there, or is older than EGL 1.5.
    #[error("libEGL.so.1 cannot be used: {0}; install Debian's packages libegl1 and libegl-mesa0")]
    Library(String),
    /// libgbm.
    #[error(transparent)]
    Gbm(#[from] GbmError),
    /// EGL, or the display, lacks an extension.
    #[error("EGL has no {0} here: install Debian's packages libegl-mesa0 and libgl1-mesa-dri")]
    Extension(&'static str),
    /// A call failed.
    #[error("{call} failed: {error}; EGL_LOG_LEVEL=debug makes Mesa say more")]
    Call {
        /// Its name.
        call: &'static str,
        /// What EGL said.
        error: egl::Error,
    },
    /// A function that an extension promises is not there.
    #[error("EGL has no function {0}, although its extension is there: is this Mesa damaged?")]
    Function(&'static str),
    /// A texture that is exported lies in several buffers.
    #[error("the driver keeps a texture in {0} buffers, and only one can be passed on here")]
    Planes(i32),
}

fn node_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "`ls /dev/dri` shows the nodes there are; in a guest, load the module; --node none draws on the processor"
        }
        io::ErrorKind::PermissionDenied => "join the group render (usermod -aG render USER)",
        _ => "`dmesg` may say why",
    }
}

/// For `map_err`: which call it was.
fn failed(call: &'static str) -> impl Fn(egl::Error) -> EglError {
    move |error| EglError::Call { call, error }
}

/// An initialized EGL display.
pub struct Display {
    library: Library,
    raw: egl::Display,
    extensions: String,
    gbm: Option<gbm::Device>,
}

impl Display {
    /// Opens the display of a DRM node, or with `None` one that has no device and draws on the processor.
    pub fn open(node: Option<&Path>) -> Result<Rc<Display>, EglError> {
        let gbm = match node {
            None => None,
            Some(path) => {
                let file = File::options().read(true).write(true).open(path);
                let file = file.map_err(|source| EglError::Node {
                    path: path.to_owned(),
                    source,
                })?;
                Some(gbm::Device::new(file)?)
            }
        };
        // SAFETY: the dispatch library of EGL has no constructors that rely on anything of this process; the crate knows
        // its functions' types.
        let library = unsafe { Library::load_required_from_filename("libEGL.so.1") }
            .map_err(|error| EglError::Library(error.to_string()))?;
        let client = library
            .query_string(None, egl::EXTENSIONS)
            .map_err(failed("eglQueryString"))?
            .to_string_lossy()
            .into_owned();
        let (platform, extension, native) = match &gbm {
            Some(device) => (value::PLATFORM_GBM, "EGL_KHR_platform_gbm", device.as_ptr()),
            None => (
                value::PLATFORM_SURFACELESS,
                "EGL_MESA_platform_surfaceless",
                std::ptr::null_mut(),
            ),
        };
        if !client.split(' ').any(|name| name == extension) {
            return Err(EglError::Extension(extension));
        }
        // SAFETY: the GBM platform takes a gbm_device, which outlives the display (`gbm`); the other takes null.
        let raw = unsafe { library.get_platform_display(platform, native, &[egl::ATTRIB_NONE]) }
            .map_err(failed("eglGetPlatformDisplay"))?;
        library.initialize(raw).map_err(failed("eglInitialize"))?;
        let extensions = library
            .query_string(Some(raw), egl::EXTENSIONS)
            .map_err(failed("eglQueryString"))?
            .to_string_lossy()
            .into_owned();
        Ok(Rc::new(Display {
            library,
            raw,
            extensions,
            gbm,
        }))
    }

    /// The node's buffers; none on a display without a device.
    pub fn gbm(&self) -> Option<&gbm::Device> {
        self.gbm.as_ref()
    }

    fn need(&self, extension: &'static str) -> Result<(), EglError> {
        match self.extensions.split(' ').any(|name| name == extension) {
            true => Ok(()),
            false => Err(EglError::Extension(extension)),
        }
    }

    fn function(&self, name: &'static str) -> Result<extern "system" fn(), EglError> {
        self.library
            .get_proc_address(name)
            .ok_or(EglError::Function(name))
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        // What it could say helps nobody any more.
        let _ = self.library.terminate(self.raw);
    }
}

/// An OpenGL ES context without a surface, current on the thread that made it until it is dropped: there is one at a time.
pub struct Context {
    display: Rc<Display>,
    raw: egl::Context,
}

impl Context {
    /// Makes a context for OpenGL ES `major` and makes it current.
    ///
    /// # Panics
    ///
    /// If this thread already has one: the functions of the two would mix.
    pub fn new(display: &Rc<Display>, major: u32) -> Result<Context, EglError> {
        display.need("EGL_KHR_no_config_context")?;
        display.need("EGL_KHR_surfaceless_context")?;
        let library = &display.library;
        assert!(
            library.get_current_context().is_none(),
            "one context at a time"
        );
        library
            .bind_api(value::OPENGL_ES_API)
            .map_err(failed("eglBindAPI"))?;
        let attributes = [
            value::CONTEXT_MAJOR_VERSION,
            if major == 2 { 2 } else { 3 },
            egl::NONE,
        ];
        // SAFETY: null is EGL_NO_CONFIG_KHR, which the extension above allows.
        let config = unsafe { egl::Config::from_ptr(std::ptr::null_mut()) };
        let raw = library
            .create_context(display.raw, config, None, &attributes)
            .map_err(failed("eglCreateContext"))?;
        let context = Context {
            display: display.clone(),
            raw,
        };
        library
            .make_current(display.raw, None, None, Some(raw))
            .map_err(failed("eglMakeCurrent"))?;
        Ok(context)
    }

    /// The display of the context.
    pub fn display(&self) -> &Rc<Display> {
        &self.display
    }

    /// The address of a function of OpenGL ES; null if there is none.
    pub fn function(&self, name: &str) -> *const c_void {
        self.display
            .library
            .get_proc_address(name)
            .map_or(std::ptr::null(), |function| function as *const c_void)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let library = &self.display.library;
        // What they could say helps nobody any more.
        let _ = library.make_current(self.display.raw, None, None, None);
        let _ = library.destroy_context(self.display.raw, self.raw);
    }
}

/// An `EGLImage`: pixels that a texture can be made of.
pub struct Image {
    display: Rc<Display>,
    raw: egl::Image,
}

impl Image {
    /// The picture in a dma-buf.
    pub fn import(display: &Rc<Display>, buffer: &DmaBuf) -> Result<Image, EglError> {
        display.need("EGL_EXT_image_dma_buf_import")?;
        let attribute = |value: u32| value as egl::Attrib;
        let mut attributes = vec![
            egl::WIDTH as egl::Attrib,
            attribute(buffer.width),
            egl::HEIGHT as egl::Attrib,
            attribute(buffer.height),
            value::FOURCC,
            attribute(buffer.format),
            value::PLANE0_FD,
            buffer.fd.as_raw_fd() as egl::Attrib,
            value::PLANE0_OFFSET,
            attribute(buffer.offset),
            value::PLANE0_PITCH,
            attribute(buffer.stride),
        ];
        if buffer.modifier != gbm::NO_MODIFIER {
            display.need("EGL_EXT_image_dma_buf_import_modifiers")?;
            attributes.extend([
                value::PLANE0_MODIFIER_LOW,
                attribute(buffer.modifier as u32),
                value::PLANE0_MODIFIER_HIGH,
                attribute((buffer.modifier >> 32) as u32),
            ]);
        }
        attributes.push(egl::ATTRIB_NONE);
        // SAFETY: null is EGL_NO_CONTEXT and a null buffer, as the extension demands for dma-bufs; EGL takes its own
        // reference to the descriptor.
        let (context, none) = unsafe {
            (
                egl::Context::from_ptr(std::ptr::null_mut()),
                egl::ClientBuffer::from_ptr(std::ptr::null_mut()),
            )
        };
        let raw = display
            .library
            .create_image(
                display.raw,
                context,
                value::LINUX_DMA_BUF,
                none,
                &attributes,
            )
            .map_err(failed("eglCreateImage"))?;
        Ok(Image {
            display: display.clone(),
            raw,
        })
    }

    /// The pixels of level 0 of a texture of `context`, by its name.
    pub fn of_texture(context: &Context, texture: u32) -> Result<Image, EglError> {
        let display = &context.display;
        display.need("EGL_KHR_gl_texture_2D_image")?;
        // SAFETY: EGL takes the texture's name in place of an address and follows none.
        let buffer = unsafe { egl::ClientBuffer::from_ptr(texture as usize as *mut c_void) };
        let raw = display
            .library
            .create_image(
                display.raw,
                context.raw,
                value::GL_TEXTURE_2D,
                buffer,
                &[egl::ATTRIB_NONE],
            )
            .map_err(failed("eglCreateImage"))?;
        Ok(Image {
            display: display.clone(),
            raw,
        })
    }

    /// Exports the image, of `width` x `height` pixels, as a dma-buf (`EGL_MESA_image_dma_buf_export`).
    pub fn export(&self, width: u32, height: u32) -> Result<DmaBuf, EglError> {
        type Query = unsafe extern "system" fn(
            egl::EGLDisplay,
            egl::EGLImage,
            *mut c_int,
            *mut c_int,
            *mut u64,
        ) -> egl::Boolean;
        type Export = unsafe extern "system" fn(
            egl::EGLDisplay,
            egl::EGLImage,
            *mut c_int,
            *mut egl::Int,
            *mut egl::Int,
        ) -> egl::Boolean;
        self.display.need("EGL_MESA_image_dma_buf_export")?;
        let query = self.display.function("eglExportDMABUFImageQueryMESA")?;
        let export = self.display.function("eglExportDMABUFImageMESA")?;
        // SAFETY: the functions of the extension, with the types that its specification gives them.
        let (query, export) = unsafe {
            (
                std::mem::transmute::<extern "system" fn(), Query>(query),
                std::mem::transmute::<extern "system" fn(), Export>(export),
            )
        };
        let error = |call| {
            let error = self.display.library.get_error();
            EglError::Call {
                call,
                error: error.unwrap_or(egl::Error::BadAccess),
            }
        };
        let (display, image) = (self.display.raw.as_ptr(), self.raw.as_ptr());
        // An image has up to four planes; only those of one are taken.
        let (mut format, mut planes, mut modifiers) = (0, 0, [gbm::NO_MODIFIER; 4]);
        // SAFETY: each address has room for what is written: one number, or one for each of at most four planes.
        let good = unsafe {
            query(
                display,
                image,
                &mut format,
                &mut planes,
                modifiers.as_mut_ptr(),
            )
        };
        if good == egl::FALSE {
            return Err(error("eglExportDMABUFImageQueryMESA"));
        }
        if planes != 1 {
            return Err(EglError::Planes(planes));
        }
        let (mut fds, mut strides, mut offsets) = ([-1; 4], [0; 4], [0; 4]);
        // SAFETY: as above.
        let good = unsafe {
            export(
                display,
                image,
                fds.as_mut_ptr(),
                strides.as_mut_ptr(),
                offsets.as_mut_ptr(),
            )
        };
        if good == egl::FALSE || fds[0] < 0 {
            return Err(error("eglExportDMABUFImageMESA"));
        }
        Ok(DmaBuf {
            // SAFETY: a descriptor that EGL has made for the caller.
            fd: unsafe { OwnedFd::from_raw_fd(fds[0]) },
            width,
            height,
            stride: strides[0].cast_unsigned(),
            offset: offsets[0].cast_unsigned(),
            format: format.cast_unsigned(),
            modifier: modifiers[0],
        })
    }

    /// Makes the texture that is bound in `context` show the image (`GL_OES_EGL_image`).
    pub fn bind(&self, context: &Context) -> Result<(), EglError> {
        type Target = unsafe extern "system" fn(u32, egl::EGLImage);
        /// `GL_TEXTURE_2D` of OpenGL ES.
        const TEXTURE_2D: u32 = 0x0de1;
        let name = "glEGLImageTargetTexture2DOES";
        let function = context.display.function(name)?;
        // SAFETY: the function of the extension, with the type that its specification gives it.
        let function = unsafe { std::mem::transmute::<extern "system" fn(), Target>(function) };
        // SAFETY: a context is current, since `context` lives, and the image is one of EGL's.
        unsafe { function(TEXTURE_2D, self.raw.as_ptr()) };
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What it could say helps nobody any more.
        let _ = self
            .display
            .library
            .destroy_image(self.display.raw, self.raw);
    }
}
