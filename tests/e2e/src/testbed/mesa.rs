//! A stock Mesa on virtio_gpu, in a Linux guest and natively: one command line runs in L1 and in L2, and both have to
//! write the same. The programs are Debian's, but for `gles` (`tests/gles`), which prints a fingerprint of each frame.
//!
//! The first test that needs Mesa unpacks it in L1; guests get it beside their own initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::boot::EXIT_CODE;
use super::linux::Guest;
use super::mini_vmm::{Ended, Running};
use super::over::NO_APERTURE;
use super::pictures::VIRTIO_GPU;
use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "libdrm_finds_in_a_linux_6_1_guest_the_nodes_that_the_host_has",
        run: || devices("6.1"),
    },
    Test {
        name: "libdrm_finds_in_a_linux_6_12_guest_the_nodes_that_the_host_has",
        run: || devices("6.12"),
    },
    Test {
        name: "eglinfo_says_in_a_linux_6_1_guest_what_it_says_natively",
        run: || eglinfo("6.1"),
    },
    Test {
        name: "eglinfo_says_in_a_linux_6_12_guest_what_it_says_natively",
        run: || eglinfo("6.12"),
    },
    Test {
        name: "piglit_passes_in_a_linux_6_1_guest_as_it_does_natively",
        run: || piglit("6.1"),
    },
    Test {
        name: "piglit_passes_in_a_linux_6_12_guest_as_it_does_natively",
        run: || piglit("6.12"),
    },
    Test {
        name: "gles_draws_in_a_linux_6_1_guest_frame_for_frame_what_it_draws_natively",
        run: || gles("6.1", &[]),
    },
    Test {
        name: "gles_draws_in_a_linux_6_1_guest_without_an_aperture_frame_for_frame_what_it_draws_natively",
        run: || gles("6.1", NO_APERTURE),
    },
    Test {
        name: "gles_draws_in_a_linux_6_12_guest_frame_for_frame_what_it_draws_natively",
        run: || gles("6.12", &[]),
    },
    Test {
        name: "gles_draws_in_a_linux_6_12_guest_without_an_aperture_frame_for_frame_what_it_draws_natively",
        run: || gles("6.12", NO_APERTURE),
    },
    Test {
        name: "four_gles_at_once_in_a_linux_6_1_guest_draw_what_one_draws_natively",
        run: || four_at_once("6.1"),
    },
    Test {
        name: "four_gles_at_once_in_a_linux_6_12_guest_draw_what_one_draws_natively",
        run: || four_at_once("6.12"),
    },
    Test {
        name: "gles_killed_fifty_times_in_a_linux_6_1_guest_leaves_nothing_behind_in_the_host",
        run: || killed("6.1"),
    },
    Test {
        name: "gles_killed_fifty_times_in_a_linux_6_12_guest_leaves_nothing_behind_in_the_host",
        run: || killed("6.12"),
    },
];

/// The archive with Mesa and packaged programs.
pub const ARCHIVE: &str = "/boot/mesa.cpio";

/// The native node: virtio_gpu's driver comes up first in L1.
const NODE: &str = "/dev/dri/renderD128";

/// Booting, unpacking and drawing take a minute when the machine has other things to do.
const LIMIT: Duration = Duration::from_secs(240);

/// Unpacks the archive in L1, once.
pub fn unpack() -> Result<(), Failure> {
    if !Path::new("/bin/eglinfo").exists() {
        let status = Command::new("/bin/busybox")
            .args(["cpio", "-i", "-d", "-u"])
            .current_dir("/")
            .stdin(fs::File::open(ARCHIVE)?)
            .stderr(Stdio::null())
            .status()?;
        ensure!(status.success(), "unpacking {ARCHIVE} ended with {status}");
    }
    let node = find("virtio_gpu", Kind::Render)?.path;
    ensure!(
        node == Path::new(NODE),
        "virtio_gpu's node in L1 is {}, not {NODE}",
        node.display()
    );
    Ok(())
}

/// The lines that a shell's `command` writes in L1; it has to succeed.
fn native(command: &str) -> Result<Vec<String>, Failure> {
    unpack()?;
    let output = Command::new("/bin/busybox")
        .args(["sh", "-c", command])
        .current_dir("/tmp")
        .env("PATH", "/bin")
        .env("HOME", "/")
        .stdin(Stdio::null())
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "`{command}` ended natively with {}: {errors}",
        output.status
    );
    Ok(lines(&String::from_utf8_lossy(&output.stdout)))
}

/// Starts a guest that runs a shell's `command` with the guest driver loaded; it must have no double quotes. mini-vmm gets
/// `options`, too.
fn start(kernel: &str, cpus: &str, command: &str, options: &[&str]) -> Result<Running, Failure> {
    start_on(&(VIRTIO_GPU.argument)()?, kernel, cpus, command, options)
}

/// As [`start`], with that `--gpu`.
fn start_on(
    gpu: &str,
    kernel: &str,
    cpus: &str,
    command: &str,
    options: &[&str],
) -> Result<Running, Failure> {
    Guest {
        kernel,
        memory: "1G",
        cpus,
        parameters: &format!("l2.run=\"{command}\""),
        gpu,
        options: &[&["--doorbell", "inline", "--initrd", ARCHIVE], options].concat(),
    }
    .start()
}

/// The lines that the command in a guest has written; it has to have succeeded, with no complaint of the guest's kernel.
fn written(ended: &Ended) -> Result<Vec<String>, Failure> {
    ended.expect(EXIT_CODE)?;
    let output = ended.output.replace('\r', "");
    let found = output
        .split_once("l2-init: running\n")
        .and_then(|(_, rest)| rest.split_once("l2-init: done\n"));
    let (found, _) = found.ok_or_else(|| format!("the guest ran nothing: {}", ended.tail()))?;
    Ok(lines(found))
}

/// The lines that a shell's `command` writes in a guest.
fn guest(kernel: &str, command: &str, options: &[&str]) -> Result<Vec<String>, Failure> {
    written(&start(kernel, "1", command, options)?.wait(LIMIT)?)
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// Fails with the first line that differs.
fn equal(native: &[String], guest: &[String]) -> Result<(), Failure> {
    for index in 0..native.len().max(guest.len()) {
        let (native, guest) = (native.get(index), guest.get(index));
        ensure!(
            native == guest,
            "line {} is natively {native:?}, in the guest {guest:?}",
            index + 1
        );
    }
    Ok(())
}

/// What differs is the bus: the host's device is on PCI, the guest's node belongs to a platform device.
fn devices(kernel: &str) -> Result<(), Failure> {
    // First the driver's name, version, date and description, then one block for each device.
    let command = "native --driver virtio_gpu | grep renderD; drmdevice";
    let (native, guest) = (native(command)?, guest(kernel, command, &[])?);
    ensure!(
        native
            .first()
            .is_some_and(|line| line.contains("virtio_gpu 0.1")),
        "natively the driver's version is {:?}",
        native.first()
    );
    equal(&native[..1], guest.get(..1).unwrap_or_default())?;
    // From the line that names a device to the one before its bus, of the device with that bus.
    let nodes = |lines: &[String], bus: &str| -> Vec<String> {
        let mut block = Vec::new();
        for line in lines {
            if line.starts_with("device[") {
                block.clear();
            } else if let Some(kind) = line.strip_prefix("+-> bustype ") {
                if kind == bus {
                    return block;
                }
            } else {
                block.push(line.clone());
            }
        }
        Vec::new()
    };
    const PCI: &str = "0000";
    const PLATFORM: &str = "0002";
    let count = "--- Devices reported 1 ---";
    ensure!(
        guest.iter().any(|line| line == count),
        "the guest has not one GPU: {guest:?}"
    );
    let expected = nodes(&native, PCI);
    ensure!(
        expected.iter().any(|line| line.ends_with(NODE)),
        "natively there is no GPU on PCI: {native:?}"
    );
    equal(&expected, &nodes(&guest, PLATFORM))
}

/// Vendor, version, extensions and framebuffer configurations on the GBM platform.
fn eglinfo(kernel: &str) -> Result<(), Failure> {
    let command = "eglinfo 2>/dev/null | sed -n '/^GBM platform/,/^Wayland platform/p'";
    let (native, guest) = (native(command)?, guest(kernel, command, &[])?);
    for expected in [
        "EGL vendor string: Mesa Project",
        "EGL driver name: virtio_gpu",
    ] {
        ensure!(
            native.iter().any(|line| line == expected),
            "natively eglinfo does not say `{expected}` but {native:?}"
        );
    }
    equal(&native, &guest)
}

/// Programs that draw, read back, and decide whether the picture is right.
fn piglit(kernel: &str) -> Result<(), Failure> {
    let command = "cd /piglit; export LD_LIBRARY_PATH=lib PIGLIT_PLATFORM=gbm; \
        for t in bin/[^s]*; do echo $t $($t -auto -fbo 2>&1 | grep PIGLIT:); done; \
        for t in $(find . -name '*.shader_test' | sort); do \
        echo $t $(bin/shader_runner_gles3 $t -auto -fbo 2>&1 | grep PIGLIT:); done";
    let (native, guest) = (native(command)?, guest(kernel, command, &[])?);
    ensure!(native.len() > 8, "piglit has run only {native:?}");
    for line in &native {
        ensure!(
            line.ends_with("PIGLIT: {\"result\": \"pass\" }"),
            "natively: {line}"
        );
    }
    equal(&native, &guest)
}

fn gles(kernel: &str, options: &[&str]) -> Result<(), Failure> {
    gles_on(&(VIRTIO_GPU.argument)()?, kernel, options)
}

/// Renderer, and the fingerprint of each frame of each scene: two of them share a buffer between two processes. The guest has that
/// `--gpu`, and mini-vmm gets `options`, too.
pub fn gles_on(gpu: &str, kernel: &str, options: &[&str]) -> Result<(), Failure> {
    let command = "gles --scene all --frames 3";
    let native = native(command)?;
    let guest = written(&start_on(gpu, kernel, "1", command, options)?.wait(LIMIT)?)?;
    ensure!(
        native
            .first()
            .is_some_and(|line| line.starts_with("renderer virgl "))
            && native.len() > 30,
        "natively gles has drawn only {native:?}"
    );
    equal(&native, &guest)
}

fn four_at_once(kernel: &str) -> Result<(), Failure> {
    let one = "gles --scene all --frames 1";
    let four = format!("for i in 1 2 3 4; do {one} > $i & done; wait; cat 1 2 3 4");
    let native = native(one)?;
    ensure!(native.len() > 10, "natively gles has drawn only {native:?}");
    let ended = start(kernel, "2", &four, &[])?.wait(LIMIT)?;
    let guest = written(&ended)?;
    ensure!(
        guest.len() == 4 * native.len(),
        "four programs have written {} lines, one natively {}: {}",
        guest.len(),
        native.len(),
        ended.tail()
    );
    guest
        .chunks(native.len())
        .try_for_each(|guest| equal(&native, guest))
}

/// How often a program is killed; two loops at once do it.
const KILLS: usize = 50;

/// Each program needs seconds until it draws: LLVM is large, and emulated memory slow.
const KILLS_LIMIT: Duration = Duration::from_secs(450);

/// In the guest one program draws to its end, then the guest waits for a line on its console while L1 counts what
/// mini-vmm holds; then programs are killed after their first frames, in the middle of another one, and L1 counts again.
fn killed(kernel: &str) -> Result<(), Failure> {
    unpack()?;
    let command = format!(
        "gles --scene knot --frames 2 >/dev/null; echo counting; read go; \
        kills() {{ mkfifo $1; for n in $(seq {}); do gles --scene $1 --frames 100000 >$1 & p=$!; \
        {{ for line in $(seq $((n % 3 + 2))); do read line; done; kill -9 $p; }} <$1; \
        wait $p; echo ended $?; done; }}; \
        kills knot & kills sharing & wait; gles --scene knot --frames 2 >/dev/null; echo counting again; read go",
        KILLS / 2
    );
    let mut guest = start(kernel, "2", &command, &[])?;
    guest.wait_for("counting", LIMIT)?;
    let before = Held::by(guest.process())?;
    println!("before: {before}");
    guest.type_line("go")?;
    guest.wait_for("counting again", KILLS_LIMIT)?;
    // What a process leaves is taken away when it ends, and that may still be going on.
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut after = Held::by(guest.process())?;
    while !after.at_most(&before) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        after = Held::by(guest.process())?;
    }
    println!("after:  {after}");
    guest.type_line("go")?;
    let written = written(&guest.wait(LIMIT)?)?;
    // 128 and the number of SIGKILL.
    let kills = written.iter().filter(|line| *line == "ended 137").count();
    ensure!(
        kills == KILLS,
        "{kills} programs of {KILLS} were killed while they drew: {written:?}"
    );
    ensure!(
        after.at_most(&before),
        "more is held in L1 after {KILLS} kills: {after}; before: {before}"
    );
    Ok(())
}

/// What L1 holds for a guest.
struct Held {
    /// mini-vmm's file descriptors, by what they are of.
    descriptors: BTreeMap<String, usize>,
    /// mini-vmm's mappings of GPU memory.
    mappings: usize,
    /// Open files of all DRM drivers, by DRM's own list.
    clients: usize,
    /// dma-bufs of the whole machine, by the kernel's own list.
    dma_bufs: usize,
    /// Memory of the whole machine in shmem but the guest's, where virtio_gpu has its GEM objects, in kB.
    shmem: usize,
}

impl Held {
    fn by(process: u32) -> Result<Self, Failure> {
        let mut descriptors = BTreeMap::new();
        // A daemon shares the guest's memory, of which the guest uses more and more.
        let mut guest_memory = 0;
        for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
            let path = entry?.path();
            // One may be closed meanwhile.
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            if target.to_string_lossy().contains("guest-memory") {
                // In units of 512 bytes.
                guest_memory += fs::metadata(&path)?.blocks() as usize / 2;
            }
            // `anon_inode:[eventfd]`, `/dmabuf:`, `socket:[123]`: without numbers.
            let name = target.to_string_lossy();
            let name = name.trim_end_matches(|c: char| c.is_ascii_digit() || "[]".contains(c));
            *descriptors.entry(name.to_owned()).or_default() += 1;
        }
        let maps = fs::read_to_string(format!("/proc/{process}/maps"))?;
        let mappings = maps
            .lines()
            .filter(|line| line.contains("/dev/dri/") || line.contains("dmabuf"))
            .count();
        let mut clients = 0;
        for entry in fs::read_dir("/sys/kernel/debug/dri")? {
            // The first line has the columns' names.
            let list = fs::read_to_string(entry?.path().join("clients")).unwrap_or_default();
            clients += list.lines().count().saturating_sub(1);
        }
        let dma_bufs = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo")?;
        let dma_bufs = dma_bufs.lines().find_map(|line| {
            let (count, _) = line.strip_prefix("Total ")?.split_once(' ')?;
            count.parse().ok()
        });
        let memory = fs::read_to_string("/proc/meminfo")?;
        let shmem = memory.lines().find_map(|line| {
            let kilobytes = line.strip_prefix("Shmem:")?.strip_suffix("kB")?;
            kilobytes.trim().parse::<usize>().ok()
        });
        let shmem = shmem.ok_or("the kernel does not say how much is in shmem")?;
        Ok(Held {
            descriptors,
            mappings,
            clients,
            dma_bufs: dma_bufs.ok_or("the kernel does not list its dma-bufs")?,
            shmem: shmem.saturating_sub(guest_memory),
        })
    }

    /// Whether nothing is more than in `before`. Log files of this machine are in shmem, too: less than one program has
    /// there is not counted.
    fn at_most(&self, before: &Held) -> bool {
        const LOGS: usize = 512;
        let count = |held: &Held, name: &str| held.descriptors.get(name).copied().unwrap_or(0);
        self.descriptors
            .keys()
            .all(|name| count(self, name) <= count(before, name))
            && self.mappings <= before.mappings
            && self.clients <= before.clients
            && self.dma_bufs <= before.dma_bufs
            && self.shmem <= before.shmem + LOGS
    }
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "descriptors {:?}, {} mappings of GPU memory, {} DRM files, {} dma-bufs, {} kB of shmem",
            self.descriptors, self.mappings, self.clients, self.dma_bufs, self.shmem
        )
    }
}
