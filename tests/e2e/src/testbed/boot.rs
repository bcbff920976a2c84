//! mini-vmm boots an unmodified Debian kernel to user space in L2. The guest's first process is `l2-init`.

use std::time::Duration;

use super::mini_vmm::start;
use super::{Failure, Test};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "mini_vmm_boots_a_linux_elf_to_user_space",
        run: || boot("6.1", "vmlinux", 1, 256),
    },
    Test {
        name: "mini_vmm_boots_a_linux_bzimage_to_user_space",
        run: || boot("6.1", "bzImage", 1, 256),
    },
    Test {
        name: "mini_vmm_boots_linux_with_two_processors",
        run: || boot("6.1", "vmlinux", 2, 256),
    },
    Test {
        name: "mini_vmm_boots_linux_with_ram_on_both_sides_of_its_devices",
        run: || boot("6.1", "vmlinux", 1, 3584),
    },
];

/// Linux parameters of L2.
pub const PARAMETERS: &str =
    "console=ttyS0 quiet panic=-1 reboot=k mitigations=off init_on_alloc=0 cryptomgr.notests";

/// Nothing ends with this code by accident.
pub const EXIT_CODE: i32 = 37;

/// A guest that boots at all does so in seconds; a bzImage also unpacks itself, emulated twice.
const LIMIT: Duration = Duration::from_secs(90);

/// Boots that kernel's file `vmlinux` or `bzImage`. RAM ends at 3 GiB and goes on at 4 GiB when there is more than 3 GiB of it.
fn boot(version: &str, image: &str, processors: u32, mebibytes: u32) -> Result<(), Failure> {
    let ended = start(&[
        "--kernel",
        &format!("/boot/{version}/{image}"),
        "--initrd",
        &format!("/boot/{version}/l2.cpio"),
        "--memory",
        &format!("{mebibytes}M"),
        "--cpus",
        &processors.to_string(),
        "--cmdline",
        &format!("{PARAMETERS} l2.exit={EXIT_CODE}"),
        "--gpu",
        "none",
    ])?
    .wait(LIMIT)?;
    ended.expect(EXIT_CODE)?;
    let expected = format!("l2-init: {processors} processors, ");
    let kilobytes = ended
        .output
        .lines()
        .find_map(|line| line.trim().strip_prefix(&expected)?.strip_suffix(" kB"));
    let kilobytes: u32 = kilobytes
        .ok_or_else(|| format!("the guest does not say `{expected}...`: {}", ended.tail()))?
        .parse()?;
    // What the kernel keeps is missing: itself (50 MiB), its page structures (a 64th), bounce buffers (64 MiB) when there is
    // RAM above 4 GiB.
    let all = mebibytes * 1024;
    let least = all - all / 20 - 60_000;
    ensure!(
        (least..=all).contains(&kilobytes),
        "the guest sees {kilobytes} kB of its {mebibytes} MiB"
    );
    Ok(())
}
