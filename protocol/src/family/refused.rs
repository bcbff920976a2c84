//! The ioctls of DRM core that no guest may use, each with the reason and with what a kernel's render node says to it.
//!
//! [`super::find`] takes the errno from here, and the page of ioctls the reason. An ioctl that a family of a driver has a
//! schema for is not refused there, whatever this table says.

use crate::Errno;

/// An ioctl that is refused.
#[derive(Debug)]
pub struct Refused {
    /// Name of its macro in the C header.
    pub name: &'static str,
    /// Its number: the low byte of the command.
    pub number: u8,
    /// What its caller gets: what `drm_ioctl.c` of Linux 6.12 gives on a render node.
    pub errno: Errno,
    /// Why, as part of a sentence.
    pub why: &'static str,
}

/// An ioctl of the primary node: the kernel has it, but not for render nodes.
const fn primary(number: u8, name: &'static str, why: &'static str) -> Refused {
    Refused {
        name,
        number,
        errno: Errno::EACCES,
        why,
    }
}

/// Drives displays.
const fn display(number: u8, name: &'static str) -> Refused {
    primary(number, name, "displays belong to the primary node")
}

/// Says who may drive displays.
const fn master(number: u8, name: &'static str) -> Refused {
    primary(
        number,
        name,
        "bus id, interface version and masters belong to the primary node",
    )
}

/// Gives or takes names that every client of the GPU can guess.
const fn global_name(number: u8, name: &'static str) -> Refused {
    primary(
        number,
        name,
        "global names would reach the buffers of others; PRIME is for sharing",
    )
}

/// Tells of other clients.
const fn others(number: u8, name: &'static str) -> Refused {
    primary(number, name, "other clients are not the guest's to see")
}

/// Does nothing any more.
const fn left_over(number: u8, name: &'static str) -> Refused {
    primary(number, name, "left over from DRM1, without effect")
}

/// Gone from the kernel. One before Linux 6.8 says `EACCES` on a render node.
const fn legacy(number: u8, name: &'static str) -> Refused {
    Refused {
        name,
        number,
        errno: Errno::EINVAL,
        why: "DRM1, for drivers that no longer exist",
    }
}

/// Those of `drm/drm.h`.
pub static CORE: &[Refused] = &[
    master(0x01, "DRM_IOCTL_GET_UNIQUE"),
    master(0x02, "DRM_IOCTL_GET_MAGIC"),
    legacy(0x03, "DRM_IOCTL_IRQ_BUSID"),
    legacy(0x04, "DRM_IOCTL_GET_MAP"),
    others(0x05, "DRM_IOCTL_GET_CLIENT"),
    others(0x06, "DRM_IOCTL_GET_STATS"),
    master(0x07, "DRM_IOCTL_SET_VERSION"),
    legacy(0x08, "DRM_IOCTL_MODESET_CTL"),
    global_name(0x0a, "DRM_IOCTL_GEM_FLINK"),
    global_name(0x0b, "DRM_IOCTL_GEM_OPEN"),
    left_over(0x10, "DRM_IOCTL_SET_UNIQUE"),
    master(0x11, "DRM_IOCTL_AUTH_MAGIC"),
    left_over(0x12, "DRM_IOCTL_BLOCK"),
    left_over(0x13, "DRM_IOCTL_UNBLOCK"),
    legacy(0x14, "DRM_IOCTL_CONTROL"),
    legacy(0x15, "DRM_IOCTL_ADD_MAP"),
    legacy(0x16, "DRM_IOCTL_ADD_BUFS"),
    legacy(0x17, "DRM_IOCTL_MARK_BUFS"),
    legacy(0x18, "DRM_IOCTL_INFO_BUFS"),
    legacy(0x19, "DRM_IOCTL_MAP_BUFS"),
    legacy(0x1a, "DRM_IOCTL_FREE_BUFS"),
    legacy(0x1b, "DRM_IOCTL_RM_MAP"),
    legacy(0x1c, "DRM_IOCTL_SET_SAREA_CTX"),
    legacy(0x1d, "DRM_IOCTL_GET_SAREA_CTX"),
    master(0x1e, "DRM_IOCTL_SET_MASTER"),
    master(0x1f, "DRM_IOCTL_DROP_MASTER"),
    legacy(0x20, "DRM_IOCTL_ADD_CTX"),
    legacy(0x21, "DRM_IOCTL_RM_CTX"),
    legacy(0x22, "DRM_IOCTL_MOD_CTX"),
    legacy(0x23, "DRM_IOCTL_GET_CTX"),
    legacy(0x24, "DRM_IOCTL_SWITCH_CTX"),
    legacy(0x25, "DRM_IOCTL_NEW_CTX"),
    legacy(0x26, "DRM_IOCTL_RES_CTX"),
    left_over(0x27, "DRM_IOCTL_ADD_DRAW"),
    left_over(0x28, "DRM_IOCTL_RM_DRAW"),
    legacy(0x29, "DRM_IOCTL_DMA"),
    legacy(0x2a, "DRM_IOCTL_LOCK"),
    legacy(0x2b, "DRM_IOCTL_UNLOCK"),
    left_over(0x2c, "DRM_IOCTL_FINISH"),
    legacy(0x30, "DRM_IOCTL_AGP_ACQUIRE"),
    legacy(0x31, "DRM_IOCTL_AGP_RELEASE"),
    legacy(0x32, "DRM_IOCTL_AGP_ENABLE"),
    legacy(0x33, "DRM_IOCTL_AGP_INFO"),
    legacy(0x34, "DRM_IOCTL_AGP_ALLOC"),
    legacy(0x35, "DRM_IOCTL_AGP_FREE"),
    legacy(0x36, "DRM_IOCTL_AGP_BIND"),
    legacy(0x37, "DRM_IOCTL_AGP_UNBIND"),
    legacy(0x38, "DRM_IOCTL_SG_ALLOC"),
    legacy(0x39, "DRM_IOCTL_SG_FREE"),
    display(0x3a, "DRM_IOCTL_WAIT_VBLANK"),
    display(0x3b, "DRM_IOCTL_CRTC_GET_SEQUENCE"),
    display(0x3c, "DRM_IOCTL_CRTC_QUEUE_SEQUENCE"),
    left_over(0x3f, "DRM_IOCTL_UPDATE_DRAW"),
    display(0xa0, "DRM_IOCTL_MODE_GETRESOURCES"),
    display(0xa1, "DRM_IOCTL_MODE_GETCRTC"),
    display(0xa2, "DRM_IOCTL_MODE_SETCRTC"),
    display(0xa3, "DRM_IOCTL_MODE_CURSOR"),
    display(0xa4, "DRM_IOCTL_MODE_GETGAMMA"),
    display(0xa5, "DRM_IOCTL_MODE_SETGAMMA"),
    display(0xa6, "DRM_IOCTL_MODE_GETENCODER"),
    display(0xa7, "DRM_IOCTL_MODE_GETCONNECTOR"),
    display(0xa8, "DRM_IOCTL_MODE_ATTACHMODE"),
    display(0xa9, "DRM_IOCTL_MODE_DETACHMODE"),
    display(0xaa, "DRM_IOCTL_MODE_GETPROPERTY"),
    display(0xab, "DRM_IOCTL_MODE_SETPROPERTY"),
    display(0xac, "DRM_IOCTL_MODE_GETPROPBLOB"),
    display(0xad, "DRM_IOCTL_MODE_GETFB"),
    display(0xae, "DRM_IOCTL_MODE_ADDFB"),
    display(0xaf, "DRM_IOCTL_MODE_RMFB"),
    display(0xb0, "DRM_IOCTL_MODE_PAGE_FLIP"),
    display(0xb1, "DRM_IOCTL_MODE_DIRTYFB"),
    display(0xb2, "DRM_IOCTL_MODE_CREATE_DUMB"),
    display(0xb3, "DRM_IOCTL_MODE_MAP_DUMB"),
    display(0xb4, "DRM_IOCTL_MODE_DESTROY_DUMB"),
    display(0xb5, "DRM_IOCTL_MODE_GETPLANERESOURCES"),
    display(0xb6, "DRM_IOCTL_MODE_GETPLANE"),
    display(0xb7, "DRM_IOCTL_MODE_SETPLANE"),
    display(0xb8, "DRM_IOCTL_MODE_ADDFB2"),
    display(0xb9, "DRM_IOCTL_MODE_OBJ_GETPROPERTIES"),
    display(0xba, "DRM_IOCTL_MODE_OBJ_SETPROPERTY"),
    display(0xbb, "DRM_IOCTL_MODE_CURSOR2"),
    display(0xbc, "DRM_IOCTL_MODE_ATOMIC"),
    display(0xbd, "DRM_IOCTL_MODE_CREATEPROPBLOB"),
    display(0xbe, "DRM_IOCTL_MODE_DESTROYPROPBLOB"),
    display(0xc6, "DRM_IOCTL_MODE_CREATE_LEASE"),
    display(0xc7, "DRM_IOCTL_MODE_LIST_LESSEES"),
    display(0xc8, "DRM_IOCTL_MODE_GET_LEASE"),
    display(0xc9, "DRM_IOCTL_MODE_REVOKE_LEASE"),
    display(0xce, "DRM_IOCTL_MODE_GETFB2"),
    display(0xd0, "DRM_IOCTL_MODE_CLOSEFB"),
];
