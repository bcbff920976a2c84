//! The Debian packages that the testbed is made of: which are missing, and installing them where this
//! user may. Called first; it never removes or upgrades anything.

use std::path::Path;
use std::process::Command;

use super::{Error, progress};
use crate::command;

/// What a run needs beside the Rust toolchain and the C linker that it needs anyway.
const PACKAGES: &[&str] = &[
    "qemu-system-x86", // the machine
    "qemu-system-gui", // its SDL display
    "xvfb",            // an X server without a screen, for that display
    "libgl1",          // OpenGL through ...
    "libglx-mesa0",    // ... GLX ...
    "libgl1-mesa-dri", // ... on the processor (llvmpipe): what virgl renders with
    "busybox-static",  // the console of --shell
    "binutils",        // strip
    "xz-utils",        // the compression of Debian's kernel
];

/// Installs what is missing, or says which command would.
pub fn install_missing() -> Result<(), Error> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        return Err(Error::NotDebian("dpkg"));
    }
    let missing: Vec<&str> = PACKAGES
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let install = ["install", "--yes", "--no-install-recommends"];
    if !is_root() {
        return Err(Error::Packages(format!(
            "apt-get {} {}",
            install.join(" "),
            missing.join(" ")
        )));
    }
    progress(format_args!("installing {} (once)", missing.join(" ")));
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .args(install)
            .args(&missing);
        apt
    };
    // Package lists that are missing or old are the usual reason for a failure: fetch them, try once more.
    if command::capture(&mut apt()).is_err() {
        update_lists()?;
        command::capture(&mut apt())?;
    }
    Ok(())
}

/// Fetches apt's package lists anew.
pub fn update_lists() -> Result<(), Error> {
    progress(format_args!("fetching apt's package lists"));
    command::capture(Command::new("apt-get").args(["update", "--quiet"]))?;
    Ok(())
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    command::text(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// Whether dpkg has `package` in its complete state.
fn installed(package: &str) -> bool {
    command::text(Command::new("dpkg-query").args([
        "--show",
        "--showformat=${db:Status-Status}\n",
        package,
    ]))
    .is_ok_and(|status| status.lines().any(|line| line == "installed"))
}
