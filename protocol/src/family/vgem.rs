//! `vgem`, the kernel's virtual GEM driver: buffers without a GPU (`drm/vgem_drm.h`).
//!
//! Its buffers are dumb buffers (`drm/drm_mode.h`, card node only), so those three ioctls of the DRM core stand
//! here. The errno of an unknown handle is the kernel's (`vgem_fence.c`, `drm_gem.c`).

#![allow(clippy::cast_possible_truncation)] // offsets in structs of a few bytes

use super::Family;
use crate::schema::{Allocates, Answer, Blocking, Coherence, Ioctl, Space, command, rule::*};
use crate::{Errno, at, uapi_struct};

/// Flag of [`FenceAttach`]: the fence is for a write, so readers wait for it too.
pub const FENCE_WRITE: u32 = 1;

uapi_struct! {
    /// Attaches a new fence to a buffer; it ends by itself after 10 seconds. `EBUSY` when another one is in the way.
    pub struct FenceAttach = "drm_vgem_fence_attach" {
        /// The buffer.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Flags ([`FENCE_WRITE`]).
        flags: u32 = [flags(FENCE_WRITE as u64)],
        /// The fence's number in this file.
        out_fence: u32 = [OUTPUT],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Signals a fence. `ENOENT` when there is none, `ETIMEDOUT` when it had already ended by itself.
    pub struct FenceSignal = "drm_vgem_fence_signal" {
        /// The fence's number in this file.
        fence: u32 = [VALUE],
        /// None is defined.
        flags: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Makes a buffer for an image.
    pub struct CreateDumb = "drm_mode_create_dumb" {
        /// Height in pixels.
        height: u32 = [VALUE],
        /// Width in pixels.
        width: u32 = [VALUE],
        /// Bits per pixel.
        bpp: u32 = [VALUE],
        /// None is defined.
        flags: u32 = [ZERO],
        /// The new buffer.
        handle: u32 = [new_handle(Space::Gem)],
        /// Bytes from one line to the next.
        pitch: u32 = [OUTPUT],
        /// Size in bytes.
        size: u64 = [OUTPUT],
    }
}

uapi_struct! {
    /// Prepares a buffer to be mapped.
    pub struct MapDumb = "drm_mode_map_dumb" {
        /// The buffer.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Padding.
        pad: u32 = [OUTPUT],
        /// Where it lies in the file, for `mmap`.
        offset: u64 = [OUTPUT],
    }
}

uapi_struct! {
    /// Gives a buffer's handle back.
    pub struct DestroyDumb = "drm_mode_destroy_dumb" {
        /// The buffer.
        handle: u32 = [closed_handle(Space::Gem, Errno::EINVAL)],
    }
}

/// `DRM_IOCTL_VGEM_FENCE_ATTACH`.
pub const FENCE_ATTACH: u32 = command::iowr::<FenceAttach>(0x41);
/// `DRM_IOCTL_VGEM_FENCE_SIGNAL`.
pub const FENCE_SIGNAL: u32 = command::iow::<FenceSignal>(0x42);
/// `DRM_IOCTL_MODE_CREATE_DUMB`.
pub const CREATE_DUMB: u32 = command::iowr::<CreateDumb>(0xb2);
/// `DRM_IOCTL_MODE_MAP_DUMB`.
pub const MAP_DUMB: u32 = command::iowr::<MapDumb>(0xb3);
/// `DRM_IOCTL_MODE_DESTROY_DUMB`.
pub const DESTROY_DUMB: u32 = command::iowr::<DestroyDumb>(0xb4);

/// The ioctls of `vgem`.
pub static FAMILY: Family = Family {
    name: "vgem",
    header: "drm/vgem_drm.h",
    refused: &[],
    ioctls: &[
        Ioctl {
            name: "DRM_IOCTL_VGEM_FENCE_ATTACH",
            command: FENCE_ATTACH,
            argument: FenceAttach::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Attaches a new fence to a buffer; it ends by itself after 10 seconds.",
        },
        Ioctl {
            name: "DRM_IOCTL_VGEM_FENCE_SIGNAL",
            command: FENCE_SIGNAL,
            argument: FenceSignal::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Signals a fence of this file.",
        },
        Ioctl {
            name: "DRM_IOCTL_MODE_CREATE_DUMB",
            command: CREATE_DUMB,
            argument: CreateDumb::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Image {
                width: at!(CreateDumb.width),
                height: at!(CreateDumb.height),
                bits_per_pixel: at!(CreateDumb.bpp),
            },
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Makes a buffer for an image (card node only).",
        },
        Ioctl {
            name: "DRM_IOCTL_MODE_MAP_DUMB",
            command: MAP_DUMB,
            argument: MapDumb::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Where to map such a buffer.",
        },
        Ioctl {
            name: "DRM_IOCTL_MODE_DESTROY_DUMB",
            command: DESTROY_DUMB,
            argument: DestroyDumb::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Gives such a buffer's handle back.",
        },
    ],
};
