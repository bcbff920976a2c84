//! DRM core: what every DRM node offers, whatever its driver (`drm/drm.h` as of Linux 6.12).
//!
//! Only what a render node allows and clients of one use: identity, capabilities, GEM handles, PRIME and
//! synchronization objects. The errno of an unknown handle is the kernel's (`drm_gem.c`, `drm_prime.c`,
//! `drm_syncobj.c`). Never add legacy DRM1 or mode-setting calls here: [`super::refused`] has those.

#![allow(clippy::cast_possible_truncation)] // offsets in structs of a few bytes

use super::Family;
use crate::schema::{
    Allocates, Answer, Blocking, Coherence, Condition, Count, Descriptor, Direction, Element,
    Ioctl, Space, command, rule::*,
};
use crate::{Errno, at, uapi_struct};

/// Capabilities that [`GetCap`] asks for.
pub mod cap {
    /// Whether dumb buffers can be made.
    pub const DUMB_BUFFER: u64 = 0x1;
    /// Which directions of PRIME work: bit 0 import, bit 1 export.
    pub const PRIME: u64 = 0x5;
    /// Whether events carry `CLOCK_MONOTONIC`.
    pub const TIMESTAMP_MONOTONIC: u64 = 0x6;
    /// Whether synchronization objects exist.
    pub const SYNCOBJ: u64 = 0x13;
    /// Whether they have timelines.
    pub const SYNCOBJ_TIMELINE: u64 = 0x14;
}

/// Flags of [`PrimeHandleToFd`].
pub mod prime {
    /// The descriptor is closed on `exec` (`O_CLOEXEC`).
    pub const CLOEXEC: u32 = 0o2_000_000;
    /// The dma-buf may be mapped for writing (`O_RDWR`).
    pub const RDWR: u32 = 2;
}

/// Flags of the calls on synchronization objects.
pub mod syncobj {
    /// [`super::SyncobjCreate`]: born signaled.
    pub const CREATE_SIGNALED: u32 = 1;
    /// [`super::SyncobjHandleToFd`]: export its fence as a sync file.
    pub const EXPORT_SYNC_FILE: u32 = 1;
    /// [`super::SyncobjFdToHandle`]: import a sync file's fence.
    pub const IMPORT_SYNC_FILE: u32 = 1;
    /// Wait for all, not for the first.
    pub const WAIT_ALL: u32 = 1;
    /// Wait for a fence to be attached first.
    pub const WAIT_FOR_SUBMIT: u32 = 2;
    /// Wait only until a fence is attached.
    pub const WAIT_AVAILABLE: u32 = 4;
    /// Hand the fences the deadline hint.
    pub const WAIT_DEADLINE: u32 = 8;
    /// [`super::SyncobjQuery`]: the last submitted point instead of the last signaled one.
    pub const QUERY_LAST_SUBMITTED: u32 = 1;
}

/// Most bytes of each string of [`Version`].
pub const VERSION_TEXT_MAX: u32 = 4096;
/// Most synchronization objects in one call.
pub const SYNCOBJS_MAX: u32 = 4096;

const SYNCOBJ_HANDLES: Element = Element::Handles {
    space: Space::Syncobj,
    unknown: Errno::ENOENT,
};

uapi_struct! {
    /// Asks who the driver is. Each string's length goes in as the room and comes out as the whole length; the
    /// driver writes what fits, without a final zero.
    pub struct Version = "drm_version" {
        /// Major version.
        version_major: i32 = [OUTPUT],
        /// Minor version.
        version_minor: i32 = [OUTPUT],
        /// Patch level.
        version_patchlevel: i32 = [OUTPUT],
        /// Nameless padding.
        _padding: u32 = [OUTPUT],
        /// Room for the name in bytes; then its length.
        name_len: u64 = [VALUE],
        /// Where the name goes.
        name: u64 = [nullable(Direction::InOut, Element::Bytes(1), Count::Field(at!(name_len)), VERSION_TEXT_MAX)],
        /// Room for the date in bytes; then its length.
        date_len: u64 = [VALUE],
        /// Where the date goes.
        date: u64 = [nullable(Direction::InOut, Element::Bytes(1), Count::Field(at!(date_len)), VERSION_TEXT_MAX)],
        /// Room for the description in bytes; then its length.
        desc_len: u64 = [VALUE],
        /// Where the description goes.
        desc: u64 = [nullable(Direction::InOut, Element::Bytes(1), Count::Field(at!(desc_len)), VERSION_TEXT_MAX)],
    }
}

uapi_struct! {
    /// Gives a GEM handle back.
    pub struct GemClose = "drm_gem_close" {
        /// The handle.
        handle: u32 = [closed_handle(Space::Gem, Errno::EINVAL)],
        /// Padding.
        pad: u32 = [OUTPUT],
    }
}

uapi_struct! {
    /// Asks for a capability of the driver.
    pub struct GetCap = "drm_get_cap" {
        /// Which one ([`cap`]).
        capability: u64 = [VALUE],
        /// Its value.
        value: u64 = [OUTPUT],
    }
}

uapi_struct! {
    /// Tells the driver what this client understands. Render nodes refuse it (`EACCES`).
    pub struct SetClientCap = "drm_set_client_cap" {
        /// Which capability.
        capability: u64 = [VALUE],
        /// Its value.
        value: u64 = [VALUE],
    }
}

uapi_struct! {
    /// Exports a buffer as a dma-buf.
    pub struct PrimeHandleToFd = "drm_prime_handle" {
        /// The buffer.
        handle: u32 = [handle(Space::Gem, Errno::ENOENT)],
        /// Flags ([`prime`]).
        flags: u32 = [flags((prime::CLOEXEC | prime::RDWR) as u64)],
        /// The dma-buf.
        fd: i32 = [fd_with_flags(Descriptor::DmaBuf, at!(flags))],
    }
}

uapi_struct! {
    /// Imports a dma-buf. A buffer that the file already has gives the handle it already had.
    pub struct PrimeFdToHandle = "drm_prime_handle" {
        /// The buffer.
        handle: u32 = [new_handle(Space::Gem)],
        /// Not used in this direction.
        flags: u32 = [OUTPUT],
        /// The dma-buf.
        fd: i32 = [fd(Direction::In, Descriptor::DmaBuf)],
    }
}

uapi_struct! {
    /// Makes a synchronization object.
    pub struct SyncobjCreate = "drm_syncobj_create" {
        /// The new object.
        handle: u32 = [new_handle(Space::Syncobj)],
        /// Flags ([`syncobj::CREATE_SIGNALED`]).
        flags: u32 = [flags(syncobj::CREATE_SIGNALED as u64)],
    }
}

uapi_struct! {
    /// Gives a synchronization object back.
    pub struct SyncobjDestroy = "drm_syncobj_destroy" {
        /// The object.
        handle: u32 = [closed_handle(Space::Syncobj, Errno::EINVAL)],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Exports a synchronization object, or the fence it holds now as a sync file.
    pub struct SyncobjHandleToFd = "drm_syncobj_handle" {
        /// The object.
        handle: u32 = [
            handle(Space::Syncobj, Errno::ENOENT).when(
                at!(flags),
                syncobj::EXPORT_SYNC_FILE as u64,
                syncobj::EXPORT_SYNC_FILE as u64,
            ),
            handle(Space::Syncobj, Errno::EINVAL),
        ],
        /// Flags ([`syncobj::EXPORT_SYNC_FILE`]).
        flags: u32 = [flags(syncobj::EXPORT_SYNC_FILE as u64)],
        /// The object or the sync file.
        fd: i32 = [
            fd(Direction::Out, Descriptor::SyncFile).when(
                at!(flags),
                syncobj::EXPORT_SYNC_FILE as u64,
                syncobj::EXPORT_SYNC_FILE as u64,
            ),
            fd(Direction::Out, Descriptor::Syncobj),
        ],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Imports a synchronization object, or a sync file's fence into one that is there.
    pub struct SyncobjFdToHandle = "drm_syncobj_handle" {
        /// The new object, or the one that takes the fence.
        handle: u32 = [
            handle(Space::Syncobj, Errno::ENOENT).when(
                at!(flags),
                syncobj::IMPORT_SYNC_FILE as u64,
                syncobj::IMPORT_SYNC_FILE as u64,
            ),
            new_handle(Space::Syncobj),
        ],
        /// Flags ([`syncobj::IMPORT_SYNC_FILE`]).
        flags: u32 = [flags(syncobj::IMPORT_SYNC_FILE as u64)],
        /// The object or the sync file.
        fd: i32 = [
            fd(Direction::In, Descriptor::SyncFile).when(
                at!(flags),
                syncobj::IMPORT_SYNC_FILE as u64,
                syncobj::IMPORT_SYNC_FILE as u64,
            ),
            fd(Direction::In, Descriptor::Syncobj),
        ],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Waits until synchronization objects are signaled (`ETIME` when the time is over).
    pub struct SyncobjWait = "drm_syncobj_wait" {
        /// The objects.
        handles: u64 = [pointer(Direction::In, SYNCOBJ_HANDLES, Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// Until when to wait, in nanoseconds of `CLOCK_MONOTONIC`; zero only asks.
        timeout_nsec: i64 = [DEADLINE],
        /// How many objects.
        count_handles: u32 = [VALUE],
        /// Flags ([`syncobj`]).
        flags: u32 = [flags((syncobj::WAIT_ALL | syncobj::WAIT_FOR_SUBMIT | syncobj::WAIT_DEADLINE) as u64)],
        /// Index of a signaled object, when not waiting for all.
        first_signaled: u32 = [OUTPUT],
        /// Padding.
        pad: u32 = [OUTPUT],
        /// When the fences should better be signaled, in nanoseconds of `CLOCK_MONOTONIC`.
        deadline_nsec: u64 = [
            DEADLINE.when(at!(flags), syncobj::WAIT_DEADLINE as u64, syncobj::WAIT_DEADLINE as u64),
            OUTPUT,
        ],
    }
}

uapi_struct! {
    /// Names synchronization objects to be reset or signaled.
    pub struct SyncobjArray = "drm_syncobj_array" {
        /// The objects.
        handles: u64 = [pointer(Direction::In, SYNCOBJ_HANDLES, Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// How many.
        count_handles: u32 = [VALUE],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Waits until points of timelines are signaled (`ETIME` when the time is over).
    pub struct SyncobjTimelineWait = "drm_syncobj_timeline_wait" {
        /// The objects.
        handles: u64 = [pointer(Direction::In, SYNCOBJ_HANDLES, Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// A 64-bit point for each; none means zeros.
        points: u64 = [nullable(Direction::In, Element::Bytes(8), Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// Until when to wait, in nanoseconds of `CLOCK_MONOTONIC`; zero only asks.
        timeout_nsec: i64 = [DEADLINE],
        /// How many objects.
        count_handles: u32 = [VALUE],
        /// Flags ([`syncobj`]).
        flags: u32 = [flags(
            (syncobj::WAIT_ALL | syncobj::WAIT_FOR_SUBMIT | syncobj::WAIT_AVAILABLE | syncobj::WAIT_DEADLINE) as u64
        )],
        /// Index of a signaled object, when not waiting for all.
        first_signaled: u32 = [OUTPUT],
        /// Padding.
        pad: u32 = [OUTPUT],
        /// When the fences should better be signaled, in nanoseconds of `CLOCK_MONOTONIC`.
        deadline_nsec: u64 = [
            DEADLINE.when(at!(flags), syncobj::WAIT_DEADLINE as u64, syncobj::WAIT_DEADLINE as u64),
            OUTPUT,
        ],
    }
}

uapi_struct! {
    /// Asks which points timelines have reached.
    pub struct SyncobjQuery = "drm_syncobj_timeline_array" {
        /// The objects.
        handles: u64 = [pointer(Direction::In, SYNCOBJ_HANDLES, Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// Where the 64-bit points go.
        points: u64 = [pointer(Direction::InOut, Element::Bytes(8), Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// How many objects.
        count_handles: u32 = [VALUE],
        /// Flags ([`syncobj::QUERY_LAST_SUBMITTED`]).
        flags: u32 = [flags(syncobj::QUERY_LAST_SUBMITTED as u64)],
    }
}

uapi_struct! {
    /// Attaches the fence of one synchronization object to a point of another.
    pub struct SyncobjTransfer = "drm_syncobj_transfer" {
        /// Where the fence comes from.
        src_handle: u32 = [handle(Space::Syncobj, Errno::ENOENT)],
        /// Where it goes.
        dst_handle: u32 = [handle(Space::Syncobj, Errno::ENOENT)],
        /// Its point there, zero without a timeline.
        src_point: u64 = [VALUE],
        /// Its point here, zero without a timeline.
        dst_point: u64 = [VALUE],
        /// Flags ([`syncobj::WAIT_FOR_SUBMIT`]).
        flags: u32 = [flags(syncobj::WAIT_FOR_SUBMIT as u64)],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Signals points of timelines.
    pub struct SyncobjTimelineSignal = "drm_syncobj_timeline_array" {
        /// The objects.
        handles: u64 = [pointer(Direction::In, SYNCOBJ_HANDLES, Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// A 64-bit point for each; none means zeros.
        points: u64 = [nullable(Direction::In, Element::Bytes(8), Count::Field(at!(count_handles)), SYNCOBJS_MAX)],
        /// How many objects.
        count_handles: u32 = [VALUE],
        /// None is defined.
        flags: u32 = [ZERO],
    }
}

uapi_struct! {
    /// Signals an eventfd when a synchronization object is signaled.
    pub struct SyncobjEventfd = "drm_syncobj_eventfd" {
        /// The object.
        handle: u32 = [handle(Space::Syncobj, Errno::ENOENT)],
        /// Flags ([`syncobj::WAIT_AVAILABLE`]).
        flags: u32 = [flags(syncobj::WAIT_AVAILABLE as u64)],
        /// The point, zero without a timeline.
        point: u64 = [VALUE],
        /// The eventfd.
        fd: i32 = [fd(Direction::In, Descriptor::Eventfd)],
        /// Padding.
        pad: u32 = [ZERO],
    }
}

/// `DRM_IOCTL_VERSION`.
pub const VERSION: u32 = command::iowr::<Version>(0x00);
/// `DRM_IOCTL_GEM_CLOSE`.
pub const GEM_CLOSE: u32 = command::iow::<GemClose>(0x09);
/// `DRM_IOCTL_GET_CAP`.
pub const GET_CAP: u32 = command::iowr::<GetCap>(0x0c);
/// `DRM_IOCTL_SET_CLIENT_CAP`.
pub const SET_CLIENT_CAP: u32 = command::iow::<SetClientCap>(0x0d);
/// `DRM_IOCTL_PRIME_HANDLE_TO_FD`.
pub const PRIME_HANDLE_TO_FD: u32 = command::iowr::<PrimeHandleToFd>(0x2d);
/// `DRM_IOCTL_PRIME_FD_TO_HANDLE`.
pub const PRIME_FD_TO_HANDLE: u32 = command::iowr::<PrimeFdToHandle>(0x2e);
/// `DRM_IOCTL_SYNCOBJ_CREATE`.
pub const SYNCOBJ_CREATE: u32 = command::iowr::<SyncobjCreate>(0xbf);
/// `DRM_IOCTL_SYNCOBJ_DESTROY`.
pub const SYNCOBJ_DESTROY: u32 = command::iowr::<SyncobjDestroy>(0xc0);
/// `DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD`.
pub const SYNCOBJ_HANDLE_TO_FD: u32 = command::iowr::<SyncobjHandleToFd>(0xc1);
/// `DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE`.
pub const SYNCOBJ_FD_TO_HANDLE: u32 = command::iowr::<SyncobjFdToHandle>(0xc2);
/// `DRM_IOCTL_SYNCOBJ_WAIT`.
pub const SYNCOBJ_WAIT: u32 = command::iowr::<SyncobjWait>(0xc3);
/// `DRM_IOCTL_SYNCOBJ_RESET`.
pub const SYNCOBJ_RESET: u32 = command::iowr::<SyncobjArray>(0xc4);
/// `DRM_IOCTL_SYNCOBJ_SIGNAL`.
pub const SYNCOBJ_SIGNAL: u32 = command::iowr::<SyncobjArray>(0xc5);
/// `DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT`.
pub const SYNCOBJ_TIMELINE_WAIT: u32 = command::iowr::<SyncobjTimelineWait>(0xca);
/// `DRM_IOCTL_SYNCOBJ_QUERY`.
pub const SYNCOBJ_QUERY: u32 = command::iowr::<SyncobjQuery>(0xcb);
/// `DRM_IOCTL_SYNCOBJ_TRANSFER`.
pub const SYNCOBJ_TRANSFER: u32 = command::iowr::<SyncobjTransfer>(0xcc);
/// `DRM_IOCTL_SYNCOBJ_TIMELINE_SIGNAL`.
pub const SYNCOBJ_TIMELINE_SIGNAL: u32 = command::iowr::<SyncobjTimelineSignal>(0xcd);
/// `DRM_IOCTL_SYNCOBJ_EVENTFD`.
pub const SYNCOBJ_EVENTFD: u32 = command::iowr::<SyncobjEventfd>(0xcf);

/// DRM core.
pub static FAMILY: Family = Family {
    name: "drm",
    header: "drm/drm.h",
    refused: super::refused::CORE,
    ioctls: &[
        Ioctl {
            name: "DRM_IOCTL_VERSION",
            command: VERSION,
            argument: Version::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Identity,
            coherence: Coherence::None,
            summary: "Name, version, date and description of the driver.",
        },
        Ioctl {
            name: "DRM_IOCTL_GEM_CLOSE",
            command: GEM_CLOSE,
            argument: GemClose::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Gives a buffer's handle back; the memory lives on while it is mapped, exported or in use.",
        },
        Ioctl {
            name: "DRM_IOCTL_GET_CAP",
            command: GET_CAP,
            argument: GetCap::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            // All say what the driver and its display hardware can do, not what they do now.
            answer: Answer::Constant,
            coherence: Coherence::None,
            summary: "Value of one capability of the driver.",
        },
        Ioctl {
            name: "DRM_IOCTL_SET_CLIENT_CAP",
            command: SET_CLIENT_CAP,
            argument: SetClientCap::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Tells what the client understands; about mode setting only, so render nodes refuse it.",
        },
        Ioctl {
            name: "DRM_IOCTL_PRIME_HANDLE_TO_FD",
            command: PRIME_HANDLE_TO_FD,
            argument: PrimeHandleToFd::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Exports a buffer as a dma-buf.",
        },
        Ioctl {
            name: "DRM_IOCTL_PRIME_FD_TO_HANDLE",
            command: PRIME_FD_TO_HANDLE,
            argument: PrimeFdToHandle::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Imports a dma-buf; the same buffer gives the same handle again.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_CREATE",
            command: SYNCOBJ_CREATE,
            argument: SyncobjCreate::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Makes a synchronization object.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_DESTROY",
            command: SYNCOBJ_DESTROY,
            argument: SyncobjDestroy::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Gives a synchronization object back.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD",
            command: SYNCOBJ_HANDLE_TO_FD,
            argument: SyncobjHandleToFd::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Exports a synchronization object, or its fence as a sync file.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE",
            command: SYNCOBJ_FD_TO_HANDLE,
            argument: SyncobjFdToHandle::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Imports a synchronization object, or a sync file's fence into one.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_WAIT",
            command: SYNCOBJ_WAIT,
            argument: SyncobjWait::SCHEMA,
            older_sizes: &[at!(SyncobjWait.deadline_nsec)],
            blocking: Blocking::Unless(&[Condition {
                field: at!(SyncobjWait.timeout_nsec),
                mask: u64::MAX,
                equals: 0,
            }]),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToGuest,
            summary: "Waits until one or all of some synchronization objects are signaled.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_RESET",
            command: SYNCOBJ_RESET,
            argument: SyncobjArray::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Takes the fences out of synchronization objects.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_SIGNAL",
            command: SYNCOBJ_SIGNAL,
            argument: SyncobjArray::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Signals synchronization objects.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT",
            command: SYNCOBJ_TIMELINE_WAIT,
            argument: SyncobjTimelineWait::SCHEMA,
            older_sizes: &[at!(SyncobjTimelineWait.deadline_nsec)],
            blocking: Blocking::Unless(&[Condition {
                field: at!(SyncobjTimelineWait.timeout_nsec),
                mask: u64::MAX,
                equals: 0,
            }]),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::ToGuest,
            summary: "Waits until one or all of some points of timelines are signaled or at least submitted.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_QUERY",
            command: SYNCOBJ_QUERY,
            argument: SyncobjQuery::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Points that timelines have reached.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_TRANSFER",
            command: SYNCOBJ_TRANSFER,
            argument: SyncobjTransfer::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::When(Condition {
                field: at!(SyncobjTransfer.flags),
                mask: syncobj::WAIT_FOR_SUBMIT as u64,
                equals: syncobj::WAIT_FOR_SUBMIT as u64,
            }),
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Attaches the fence of one synchronization object to a point of another.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_TIMELINE_SIGNAL",
            command: SYNCOBJ_TIMELINE_SIGNAL,
            argument: SyncobjTimelineSignal::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Signals points of timelines.",
        },
        Ioctl {
            name: "DRM_IOCTL_SYNCOBJ_EVENTFD",
            command: SYNCOBJ_EVENTFD,
            argument: SyncobjEventfd::SCHEMA,
            older_sizes: &[],
            blocking: Blocking::Never,
            allocates: Allocates::Nothing,
            answer: Answer::Forwarded,
            coherence: Coherence::None,
            summary: "Signals an eventfd of the session when a synchronization object is signaled.",
        },
    ],
};
