//! The tables: one file per host GPU family, and which of them a host driver speaks.

pub mod soft;

use crate::schema::Ioctl;

/// The ioctls of one header.
#[derive(Debug)]
pub struct Family {
    /// Name of the host driver, or `drm` for what all share.
    pub name: &'static str,
    /// The C header that defines it, as it is included; empty for a header that is only ours.
    pub header: &'static str,
    /// Its ioctls in order of their numbers.
    pub ioctls: &'static [Ioctl],
}

/// The ioctls of `family` and of the families behind it, by command number.
///
/// `None` when no ioctl has the command's type and number.
pub fn find(families: &[&'static Family], command: u32) -> Option<&'static Ioctl> {
    families
        .iter()
        .flat_map(|family| family.ioctls)
        .find(|ioctl| (ioctl.command ^ command) & 0xffff == 0)
}

/// The families that the host driver of that name speaks; none for an unknown driver.
pub fn of_driver(name: &str) -> &'static [&'static Family] {
    match name {
        "soft" => &[&soft::FAMILY],
        _ => &[],
    }
}
