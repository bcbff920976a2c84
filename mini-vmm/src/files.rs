//! Which files this process may open: those that it is given, and no others, where the kernel has Landlock.
//!
//! `main` asks for it before any other thread exists, so that it holds for all of them; `check` tells whether the kernel has
//! it. It does not touch what is open already.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

/// The newest Landlock whose rights are asked for; an older kernel restricts what it can.
const NEWEST: ABI = ABI::V6;

/// From now on this thread, and all that it starts, may open these files only: some for reading, some (devices) for reading
/// and writing. Nor may it use TCP, or send signals to other processes, where the kernel can see to that. Returns whether the
/// kernel has Landlock: without it, nothing changes.
///
/// # Errors
///
/// When the kernel has it, but refuses. That a file is not there is for whoever opens it.
pub fn restrict(read: &[&Path], write: &[&Path]) -> io::Result<bool> {
    let devices: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let rights = |paths: &[&Path], rights: BitFlags<AccessFs>| {
        let there = paths.iter().filter_map(|path| PathFd::new(path).ok());
        there
            .map(|file| PathBeneath::new(file, rights))
            .collect::<Vec<_>>()
    };
    let mut rules = rights(read, AccessFs::ReadFile.into());
    rules.extend(rights(write, devices));
    let restrict = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .add_rules(rules.into_iter().map(Ok::<_, landlock::RulesetError>))?
            .restrict_self()
    };
    let status = restrict().map_err(io::Error::other)?;
    Ok(match status.landlock {
        LandlockStatus::Available { .. } => status.ruleset != RulesetStatus::NotEnforced,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => false,
    })
}

/// Whether this kernel has Landlock. Only a thread that ends at once is restricted.
pub fn available() -> bool {
    let probe = std::thread::spawn(|| restrict(&[], &[]));
    matches!(probe.join(), Ok(Ok(true)))
}
