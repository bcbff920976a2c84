//! The bare-metal test guest for the tests that boot it on this machine's KVM.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The test guest, built once.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        let build = [
            "build",
            "--quiet",
            "--profile",
            "guest",
            "--features",
            "bare-metal",
        ];
        let status = Command::new(env!("CARGO"))
            .args(build)
            .args(["--package", "pvgpu-test-guest", "--target-dir"])
            .arg(&target)
            .status()
            .expect("cargo can be started");
        assert!(status.success(), "the test guest does not build");
        target.join("guest/pvgpu-test-guest")
    })
}

/// The daemon, built once, with pvgpu-ctl and mini-vmm beside it.
#[allow(dead_code)] // not every test has one
pub fn proxyd() -> &'static Path {
    static PROXYD: OnceLock<PathBuf> = OnceLock::new();
    PROXYD.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("proxyd");
        let build = ["build", "--quiet", "--bins"];
        let status = Command::new(env!("CARGO"))
            .args(build)
            .args(["--package", "pvgpu-host-proxy"])
            .args(["--package", "pvgpu-mini-vmm", "--target-dir"])
            .arg(&target)
            .status()
            .expect("cargo can be started");
        assert!(status.success(), "the programs do not build");
        target.join("debug/pvgpu-proxyd")
    })
}

/// Whether this machine has KVM; where it has none, the caller must have said so.
pub fn with_kvm() -> bool {
    let without = std::env::var_os("PVGPU_WITHOUT_KVM").is_some_and(|value| value == "1");
    if without {
        eprintln!("not run: PVGPU_WITHOUT_KVM says that this machine has no KVM");
    }
    !without
}
