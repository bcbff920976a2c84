//! `DRM_IOCTL_VERSION`, answered from what the hello says of the host driver ([`Answer::Identity`]).
//!
//! [`crate::session`] calls it. A schema cannot express it: what comes out depends on the lengths of strings that only the
//! driver knows. It does what `drm_version` in the kernel's `drm_ioctl.c` does, to the last errno.
//!
//! [`Answer::Identity`]: pvgpu_protocol::schema::Answer::Identity

use crate::marshal::Caller;
use pvgpu_protocol::Errno;
use pvgpu_protocol::control::DriverIdentity;
use pvgpu_protocol::family::core::Version;
use zerocopy::{FromZeros, IntoBytes};

/// Answers a caller whose argument, a `struct drm_version`, lies at `address`.
///
/// Of each string it writes what fits, without a final zero, and nothing where the caller has no buffer; its length field
/// gets the whole length. `EFAULT` when a buffer is not the caller's; the argument is then written all the same.
pub fn answer<C: Caller + ?Sized>(
    identity: &DriverIdentity<'_>,
    address: u64,
    caller: &mut C,
) -> Result<i32, Errno> {
    let mut version = Version::new_zeroed();
    caller.read(address, version.as_mut_bytes())?;
    [
        version.version_major,
        version.version_minor,
        version.version_patchlevel,
    ] = identity.version;
    let texts = [
        (identity.name, version.name, &mut version.name_len),
        (identity.date, version.date, &mut version.date_len),
        (identity.description, version.desc, &mut version.desc_len),
    ];
    let written = texts
        .into_iter()
        .try_for_each(|(text, buffer, room)| write_text(text, buffer, room, caller));
    caller.write(address, version.as_bytes())?;
    written.map(|()| 0)
}

/// Writes what fits of a text, and puts its length in place of the room.
fn write_text<C: Caller + ?Sized>(
    text: &str,
    buffer: u64,
    room: &mut u64,
    caller: &mut C,
) -> Result<(), Errno> {
    let fits = usize::try_from(*room).unwrap_or(usize::MAX);
    let bytes = text.as_bytes().get(..fits).unwrap_or(text.as_bytes());
    *room = text.len() as u64;
    if bytes.is_empty() || buffer == 0 {
        return Ok(());
    }
    caller.write(buffer, bytes)
}
