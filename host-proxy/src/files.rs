//! Which files this process may open: the devices that it is given, and nothing else, where the kernel has Landlock.
//!
//! Programs do it when all that is to be read has been read. What is open
//! already stays open.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest Landlock whose rights are asked for; an older kernel restricts what it can.
const NEWEST: ABI = ABI::V6;

/// From now on this thread, and all that it starts, may open these devices and no other file; and, if there is one, remove files
/// of that folder. Nor may it use TCP, or send signals to other processes, where the kernel can see to that. Returns whether the
/// kernel has Landlock: without it, nothing changes.
///
/// # Errors
///
/// When the kernel has it, but refuses. That a device is not there is for whoever opens it.
pub fn restrict(devices: &[&Path], removes_in: Option<&Path>) -> io::Result<bool> {
    let rights: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let there = devices.iter().filter_map(|path| PathFd::new(path).ok());
    let rules = there.map(|device| Ok::<_, RulesetError>(PathBeneath::new(device, rights)));
    let folder = removes_in.and_then(|path| PathFd::new(path).ok());
    let removal = folder.map(|folder| Ok(PathBeneath::new(folder, AccessFs::RemoveFile)));
    let restrict = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .add_rules(rules.chain(removal))?
            .restrict_self()
    };
    let status = restrict().map_err(io::Error::other)?;
    Ok(match status.landlock {
        LandlockStatus::Available { .. } => status.ruleset != RulesetStatus::NotEnforced,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => false,
    })
}

/// The folder that a file is in.
pub fn folder(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Whether this kernel has Landlock. Only a thread that ends at once is restricted.
pub fn available() -> bool {
    let probe = std::thread::spawn(|| restrict(&[], None));
    matches!(probe.join(), Ok(Ok(true)))
}
