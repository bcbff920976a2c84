//! `virtio_gpu`, the driver of virtio's own GPU device with virgl 3D (`drm/virtgpu_drm.h` as of Linux 6.12).
//!
//! Older forms of its structs are accepted by their size. The errno of an unknown handle is the kernel's
//! (`virtgpu_ioctl.c`, `virtgpu_submit.c`).

#![allow(clippy::cast_possible_truncation)] // offsets in structs of a few bytes

use super::Family;
use crate::schema::{
    Allocates, Answer, Blocking, Coherence, Condition, Count, Descriptor, Direction, Element,
    Ioctl, Space, command, rule::*,
};
use crate::{Errno, at, uapi_struct};

/// Parameters that [`GetParam`] asks for.
pub mod param {
    /// Whether there is 3D.
    pub const FEATURES_3D: u64 = 1;
    /// Whether [`super::GetCaps`] gives every capset.
    pub const CAPSET_QUERY_FIX: u64 = 2;
    /// Whether [`super::ResourceCreateBlob`] works.
    pub const RESOURCE_BLOB: u64 = 3;
    /// Whether host blobs can be mapped.
    pub const HOST_VISIBLE: u64 = 4;
    /// Whether resources can go to other virtio devices.
    pub const CROSS_DEVICE: u64 = 5;
    /// Whether [`super::ContextInit`] works.
    pub const CONTEXT_INIT: u64 = 6;
    /// Bit mask of the capsets.
    pub const SUPPORTED_CAPSET_IDS: u64 = 7;
    /// Whether contexts can be named.
    pub const EXPLICIT_DEBUG_NAME: u64 = 8;
}

/// Flags of [`Execbuffer`] and of the synchronization objects in it.
pub mod exec {
    /// Wait for the sync file in `fence_fd` first.
    pub const FENCE_FD_IN: u32 = 1;
    /// Put a sync file of this submission into `fence_fd`.
    pub const FENCE_FD_OUT: u32 = 2;
    /// Submit to the ring `ring_idx`.
    pub const RING_IDX: u32 = 4;
    /// Reset the synchronization object after the wait.
    pub const SYNCOBJ_RESET: u32 = 1;
}

/// Memory and flags of [`ResourceCreateBlob`].
pub mod blob {
    /// Guest memory.
    pub const MEM_GUEST: u32 = 1;
    /// Host memory of the 3D renderer.
    pub const MEM_HOST3D: u32 = 2;
    /// Both.
    pub const MEM_HOST3D_GUEST: u32 = 3;
    /// It will be mapped.
    pub const USE_MAPPABLE: u32 = 1;
    /// It will be exported.
    pub const USE_SHAREABLE: u32 = 2;
    /// It will go to another virtio device.
    pub const USE_CROSS_DEVICE: u32 = 4;
}

/// Parameters of [`ContextInit`].
pub mod context {
    /// Which capset the context speaks.
    pub const CAPSET_ID: u64 = 1;
    /// How many rings it has.
    pub const NUM_RINGS: u64 = 2;
    /// Which rings send an event per fence.
    pub const POLL_RINGS_MASK: u64 = 3;
    /// Its name, for debugging.
    pub const DEBUG_NAME: u64 = 4;
}

/// Flag of [`Wait`]: only ask, `EBUSY` when it is in use.
pub const WAIT_NOWAIT: u32 = 1;

/// Most bytes of commands in one call.
pub const COMMANDS_MAX: u32 = 16 << 20;
/// Most buffers in one submission.
pub const BUFFERS_MAX: u32 = 16384;
/// Most synchronization objects on each side of a submission.
pub const SYNCOBJS_MAX: u32 = 1024;
/// Most bytes of a capset.
pub const CAPS_MAX: u32 = 64 << 10;
/// Most parameters of [`ContextInit`]; the kernel itself takes four.
pub const CONTEXT_PARAMS_MAX: u32 = 16;
/// Bytes that are read for a context's name; it may end earlier with a zero byte (the device keeps 64).
pub const DEBUG_NAME_BYTES: u32 = 64;

uapi_struct! {
    /// Prepares a resource to be mapped.
    pub struct Map = "drm_virtgpu_map" {
        /// Where it lies in the file, for `mmap`.
        offset: u64 = [OUTPUT],
        /// The resource.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Padding.
        pad: u32 = [OUTPUT],
    }
}

uapi_struct! {
    /// A point to wait for before a submission.
    pub struct InSyncobj = "drm_virtgpu_execbuffer_syncobj" {
        /// The synchronization object.
        handle: u32 = [handle(Space::Syncobj, Errno::ENOENT)],
        /// Flags ([`exec::SYNCOBJ_RESET`]).
        flags: u32 = [flags(exec::SYNCOBJ_RESET as u64)],
        /// The point, zero without a timeline.
        point: u64 = [VALUE],
    }
}

uapi_struct! {
    /// A point that a submission signals.
    pub struct OutSyncobj = "drm_virtgpu_execbuffer_syncobj" {
        /// The synchronization object.
        handle: u32 = [handle(Space::Syncobj, Errno::EINVAL)],
        /// None is defined.
        flags: u32 = [ZERO],
        /// The point, zero without a timeline.
        point: u64 = [VALUE],
    }
}

uapi_struct! {
    /// Submits commands of the 3D renderer.
    pub struct Execbuffer = "drm_virtgpu_execbuffer" {
        /// Flags ([`exec`]).
        flags: u32 = [flags((exec::FENCE_FD_IN | exec::FENCE_FD_OUT | exec::RING_IDX) as u64)],
        /// Bytes of commands.
        size: u32 = [VALUE],
        /// The commands.
        command: u64 = [pointer(Direction::In, Element::Bytes(1), Count::Field(at!(size)), COMMANDS_MAX)],
        /// The resources that the commands use.
        bo_handles: u64 = [pointer(
            Direction::In,
            Element::Handles { space: Space::Gem, unknown: Errno::ENOENT },
            Count::Field(at!(num_bo_handles)),
            BUFFERS_MAX,
        )],
        /// How many.
        num_bo_handles: u32 = [VALUE],
        /// Sync file to wait for, sync file of this submission.
        fence_fd: i32 = [
            fd(Direction::InOut, Descriptor::SyncFile).when(
                at!(flags),
                (exec::FENCE_FD_IN | exec::FENCE_FD_OUT) as u64,
                (exec::FENCE_FD_IN | exec::FENCE_FD_OUT) as u64,
            ),
            fd(Direction::In, Descriptor::SyncFile).when(at!(flags), exec::FENCE_FD_IN as u64, exec::FENCE_FD_IN as u64),
            fd(Direction::Out, Descriptor::SyncFile).when(at!(flags), exec::FENCE_FD_OUT as u64, exec::FENCE_FD_OUT as u64),
            VALUE,
        ],
        /// The ring.
        ring_idx: u32 = [VALUE],
        /// Bytes of an element of the two arrays: 16, or 0 where there are none (padding before Linux 6.6).
        syncobj_stride: u32 = [one_of(&[0, size_of::<InSyncobj>() as u64])],
        /// How many points to wait for.
        num_in_syncobjs: u32 = [VALUE],
        /// How many points to signal.
        num_out_syncobjs: u32 = [VALUE],
        /// Points to wait for.
        in_syncobjs: u64 = [pointer(
            Direction::In,
            Element::Struct(InSyncobj::SCHEMA),
            Count::Field(at!(num_in_syncobjs)),
            SYNCOBJS_MAX,
        )],
        /// Points to signal.
        out_syncobjs: u64 = [pointer(
            Direction::In,
            Element::Struct(OutSyncobj::SCHEMA),
            Count::Field(at!(num_out_syncobjs)),
            SYNCOBJS_MAX,
        )],
    }
}

uapi_struct! {
    /// Asks for a parameter of the driver.
    pub struct GetParam = "drm_virtgpu_getparam" {
        /// Which one ([`param`]).
        param: u64 = [VALUE],
        /// Where its 32-bit value goes.
        value: u64 = [pointer(Direction::InOut, Element::Bytes(4), Count::Fixed(1), 1)],
    }
}

uapi_struct! {
    /// Makes a resource (a texture, a vertex buffer) with guest memory behind it.
    pub struct ResourceCreate = "drm_virtgpu_resource_create" {
        /// Kind of texture or buffer (`PIPE_TEXTURE_*`).
        target: u32 = [VALUE],
        /// Pixel format (`VIRGL_FORMAT_*`).
        format: u32 = [VALUE],
        /// What it will be used for (`VIRGL_BIND_*`).
        bind: u32 = [VALUE],
        /// Width in pixels or bytes.
        width: u32 = [VALUE],
        /// Height in pixels.
        height: u32 = [VALUE],
        /// Depth in pixels.
        depth: u32 = [VALUE],
        /// Layers.
        array_size: u32 = [VALUE],
        /// Last mipmap level.
        last_level: u32 = [VALUE],
        /// Samples per pixel.
        nr_samples: u32 = [VALUE],
        /// Flags of the renderer.
        flags: u32 = [VALUE],
        /// The new resource.
        bo_handle: u32 = [new_handle(Space::Gem)],
        /// Its number for the commands.
        res_handle: u32 = [OUTPUT],
        /// Bytes of guest memory behind it; zero gives one page.
        size: u32 = [VALUE],
        /// Bytes from one line to the next.
        stride: u32 = [VALUE],
    }
}

uapi_struct! {
    /// Asks about a resource.
    pub struct ResourceInfo = "drm_virtgpu_resource_info" {
        /// The resource.
        bo_handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Its number for the commands.
        res_handle: u32 = [OUTPUT],
        /// Size in bytes.
        size: u32 = [OUTPUT],
        /// Memory of a blob ([`blob`]), zero otherwise.
        blob_mem: u32 = [OUTPUT],
    }
}

uapi_struct! {
    /// A part of a resource.
    pub struct Box3d = "drm_virtgpu_3d_box" {
        /// Left edge.
        x: u32 = [VALUE],
        /// Upper edge.
        y: u32 = [VALUE],
        /// Front.
        z: u32 = [VALUE],
        /// Width.
        w: u32 = [VALUE],
        /// Height.
        h: u32 = [VALUE],
        /// Depth.
        d: u32 = [VALUE],
    }
}

uapi_struct! {
    /// Copies from the renderer into the memory of a resource.
    pub struct TransferFromHost = "drm_virtgpu_3d_transfer_from_host" {
        /// The resource.
        bo_handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// The part.
        r#box: Box3d = [VALUE],
        /// Mipmap level.
        level: u32 = [VALUE],
        /// Where its bytes start in the memory.
        offset: u32 = [VALUE],
        /// Bytes from one line to the next.
        stride: u32 = [VALUE],
        /// Bytes from one layer to the next.
        layer_stride: u32 = [VALUE],
    }
}

uapi_struct! {
    /// Copies from the memory of a resource to the renderer.
    pub struct TransferToHost = "drm_virtgpu_3d_transfer_to_host" {
        /// The resource.
        bo_handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// The part.
        r#box: Box3d = [VALUE],
        /// Mipmap level.
        level: u32 = [VALUE],
        /// Where its bytes start in the memory.
        offset: u32 = [VALUE],
        /// Bytes from one line to the next.
        stride: u32 = [VALUE],
        /// Bytes from one layer to the next.
        layer_stride: u32 = [VALUE],
    }
}

uapi_struct! {
    /// Waits until a resource is not in use any more (`EBUSY` after 15 seconds).
    pub struct Wait = "drm_virtgpu_3d_wait" {
        /// The resource.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Flags ([`WAIT_NOWAIT`]).
        flags: u32 = [flags(WAIT_NOWAIT as u64)],
    }
}

uapi_struct! {
    /// Asks for a capset: what the renderer can do.
    pub struct GetCaps = "drm_virtgpu_get_caps" {
        /// Which capset.
        cap_set_id: u32 = [VALUE],
        /// Its version.
        cap_set_ver: u32 = [VALUE],
        /// Where it goes.
        addr: u64 = [pointer(Direction::InOut, Element::Bytes(1), Count::Field(at!(size)), CAPS_MAX)],
        /// Room in bytes.
        size: u32 = [VALUE],
        /// Padding.
        pad: u32 = [OUTPUT],
    }
}

uapi_struct! {
    /// Makes a resource that is plain memory.
    pub struct ResourceCreateBlob = "drm_virtgpu_resource_create_blob" {
        /// Where the memory is ([`blob`]).
        blob_mem: u32 = [one_of(&[blob::MEM_GUEST as u64, blob::MEM_HOST3D as u64, blob::MEM_HOST3D_GUEST as u64])],
        /// Flags ([`blob`]).
        blob_flags: u32 = [flags((blob::USE_MAPPABLE | blob::USE_SHAREABLE | blob::USE_CROSS_DEVICE) as u64)],
        /// The new resource.
        bo_handle: u32 = [new_handle(Space::Gem)],
        /// Its number for the commands.
        res_handle: u32 = [OUTPUT],
        /// Size in bytes.
        size: u64 = [VALUE],
        /// Padding.
        pad: u32 = [OUTPUT],
        /// Bytes of commands that make the memory in the renderer.
        cmd_size: u32 = [VALUE],
        /// The commands.
        cmd: u64 = [pointer(Direction::In, Element::Bytes(1), Count::Field(at!(cmd_size)), COMMANDS_MAX)],
        /// The renderer's name for the memory.
        blob_id: u64 = [VALUE],
    }
}

uapi_struct! {
    /// One parameter of a context.
    pub struct ContextSetParam = "drm_virtgpu_context_set_param" {
        /// Which one ([`context`]).
        param: u64 = [one_of(&[
            context::CAPSET_ID,
            context::NUM_RINGS,
            context::POLL_RINGS_MASK,
            context::DEBUG_NAME,
        ])],
        /// Its value; for the name its address.
        value: u64 = [
            pointer(Direction::In, Element::Bytes(1), Count::Fixed(DEBUG_NAME_BYTES), DEBUG_NAME_BYTES).when(
                at!(param),
                u64::MAX,
                context::DEBUG_NAME,
            ),
            VALUE,
        ],
    }
}

uapi_struct! {
    /// Makes the file's context with parameters; without it the first use makes a plain one.
    pub struct ContextInit = "drm_virtgpu_context_init" {
        /// How many parameters.
        num_params: u32 = [VALUE],
        /// Padding.
        pad: u32 = [OUTPUT],
        /// The parameters.
        ctx_set_params: u64 = [pointer(
            Direction::In,
            Element::Struct(ContextSetParam::SCHEMA),
            Count::Field(at!(num_params)),
            CONTEXT_PARAMS_MAX,
        )],
    }
}

/// `DRM_IOCTL_VIRTGPU_MAP`.
pub const MAP: u32 = command::iowr::<Map>(0x41);
/// `DRM_IOCTL_VIRTGPU_EXECBUFFER`.
pub const EXECBUFFER: u32 = command::iowr::<Execbuffer>(0x42);
/// `DRM_IOCTL_VIRTGPU_GETPARAM`.
pub const GETPARAM: u32 = command::iowr::<GetParam>(0x43);
/// `DRM_IOCTL_VIRTGPU_RESOURCE_CREATE`.
pub const RESOURCE_CREATE: u32 = command::iowr::<ResourceCreate>(0x44);
/// `DRM_IOCTL_VIRTGPU_RESOURCE_INFO`.
pub const RESOURCE_INFO: u32 = command::iowr::<ResourceInfo>(0x45);
/// `DRM_IOCTL_VIRTGPU_TRANSFER_FROM_HOST`.
pub const TRANSFER_FROM_HOST: u32 = command::iowr::<TransferFromHost>(0x46);
/// `DRM_IOCTL_VIRTGPU_TRANSFER_TO_HOST`.
pub const TRANSFER_TO_HOST: u32 = command::iowr::<TransferToHost>(0x47);
/// `DRM_IOCTL_VIRTGPU_WAIT`.
pub const WAIT: u32 = command::iowr::<Wait>(0x48);
/// `DRM_IOCTL_VIRTGPU_GET_CAPS`.
pub const GET_CAPS: u32 = command::iowr::<GetCaps>(0x49);
/// `DRM_IOCTL_VIRTGPU_RESOURCE_CREATE_BLOB`.
pub const RESOURCE_CREATE_BLOB: u32 = command::iowr::<ResourceCreateBlob>(0x4a);
/// `DRM_IOCTL_VIRTGPU_CONTEXT_INIT`.
pub const CONTEXT_INIT: u32 = command::iowr::<ContextInit>(0x4b);

/// The ioctls of `virtio_gpu`.
pub static FAMILY: Family = Family {
    name: "virtio_gpu",
    header: "drm/virtgpu_drm.h",
    refused: &[],
    ioctls: &[
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_MAP",
            command: MAP,
            argument: Map::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::Offset(at!(Map.offset)),
            summary: "Where to map a resource.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_EXECBUFFER",
            command: EXECBUFFER,
            argument: Execbuffer::SCHEMA,
            // Before rings (Linux 5.16), before synchronization objects (Linux 6.6).
            older_sizes: &[at!(Execbuffer.ring_idx), at!(Execbuffer.num_in_syncobjs)],
            blocking: Blocking::Unless(&[
                Condition {
                    field: at!(Execbuffer.flags),
                    mask: exec::FENCE_FD_IN as u64,
                    equals: 0,
                },
                Condition {
                    field: at!(Execbuffer.num_in_syncobjs),
                    mask: u64::MAX,
                    equals: 0,
                },
            ]),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToHost,
            summary: "Submits commands of the 3D renderer.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_GETPARAM",
            command: GETPARAM,
            argument: GetParam::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            // The driver settles all of them while it sets its device up.
            answer: Answer::Constant,
            coherence: Coherence::None,
            summary: "Value of one parameter of the driver.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_RESOURCE_CREATE",
            command: RESOURCE_CREATE,
            argument: ResourceCreate::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Bytes(at!(ResourceCreate.size)),
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Makes a texture or a buffer with guest memory behind it.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_RESOURCE_INFO",
            command: RESOURCE_INFO,
            argument: ResourceInfo::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Size, number and memory of a resource.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_TRANSFER_FROM_HOST",
            command: TRANSFER_FROM_HOST,
            argument: TransferFromHost::SCHEMA,
            // Before strides (Linux 5.12).
            older_sizes: &[at!(TransferFromHost.stride)],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Starts a copy from the renderer into the memory of a resource.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_TRANSFER_TO_HOST",
            command: TRANSFER_TO_HOST,
            argument: TransferToHost::SCHEMA,
            // Before strides (Linux 5.12).
            older_sizes: &[at!(TransferToHost.stride)],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToHost,
            summary: "Starts a copy from the memory of a resource to the renderer.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_WAIT",
            command: WAIT,
            argument: Wait::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Unless(&[Condition {
                field: at!(Wait.flags),
                mask: WAIT_NOWAIT as u64,
                equals: WAIT_NOWAIT as u64,
            }]),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToGuest,
            summary: "Waits until a resource is not in use any more.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_GET_CAPS",
            command: GET_CAPS,
            argument: GetCaps::SCHEMA,
            older_sizes: &[],
            // The first time the driver asks its device and waits for up to 5 seconds.
            blocking: Blocking::Always,
            allocates: Allocates::Nothing,
            // The driver itself keeps what its device said the first time.
            answer: Answer::Constant,
            coherence: Coherence::None,
            summary: "What the renderer can do, in one of its formats.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_RESOURCE_CREATE_BLOB",
            command: RESOURCE_CREATE_BLOB,
            argument: ResourceCreateBlob::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Bytes(at!(ResourceCreateBlob.size)),
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Makes a resource that is plain memory.",
        },
        Ioctl {
            name: "DRM_IOCTL_VIRTGPU_CONTEXT_INIT",
            command: CONTEXT_INIT,
            argument: ContextInit::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Makes the file's context with parameters.",
        },
    ],
};
