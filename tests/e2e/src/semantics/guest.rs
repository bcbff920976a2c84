//! What only pvgpu's node in a guest can be asked: a device that is taken away, a module that is unloaded, a 32-bit
//! program. The first process of the guest calls [`run`] (`l2.semantics=DRIVER` on its command line).

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_HANDLE_TO_FD, PrimeHandleToFd, prime,
};

use super::system::{self, fork, ioctl, ioctl_32, map_shared, now_ns, peek, poke, unmap};
use super::{Check, Failure, Gpu, Mapped, pages, word};
use crate::{modules, syscall};

/// The checks that a native node cannot be asked, or answers in another way.
pub const CHECKS: &[Check] = &[
    Check {
        name: "an ioctl of a 32-bit program",
        run: compat,
        expected: "ENOTTY",
    },
    Check {
        name: "the module while its node is open, mapped, and neither",
        run: in_use,
        expected: "refused, refused",
    },
    Check {
        name: "the device is taken away under a program",
        run: lost,
        expected: "waiting ENODEV, ioctl ENODEV, mmap ENODEV, - -, of a dma-buf - -, module refused",
    },
    Check {
        name: "the device is given back",
        run: returned,
        expected: "1 2",
    },
    Check {
        name: "the device is taken away and given back, again and again",
        run: again,
        expected: "1 2",
    },
];

const DRIVER: &str = "/sys/bus/virtio/drivers/pvgpu";

fn compat(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let low = system::map_low()?;
    let seen = word(ioctl_32(fd.as_fd(), GEM_CLOSE, low));
    unmap(low, system::PAGE)?;
    Ok(Some(seen))
}

fn unload() -> &'static str {
    match syscall::unload_module(c"pvgpu") {
        Ok(()) => "unloaded",
        Err(_) => "refused",
    }
}

fn in_use(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let Mapped {
        fd,
        buffer,
        address,
    } = Mapped::new(gpu, 1)?;
    let open = unload();
    drop(fd);
    let mapped = unload();
    unmap(address, buffer.length)?;
    Ok(Some(format!("{open}, {mapped}")))
}

/// The name of the device on the virtio bus that the guest driver is for.
pub fn device() -> Result<String, Failure> {
    for entry in fs::read_dir("/sys/bus/virtio/devices")? {
        let entry = entry?;
        let alias = fs::read_to_string(entry.path().join("modalias"))?;
        if modules::is_for(modules::GUEST_DRIVER, alias.trim())? {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err("there is no device on the virtio bus that the guest driver is for".into())
}

fn unbind() -> Result<(), Failure> {
    Ok(fs::write(format!("{DRIVER}/unbind"), device()?)?)
}

fn bind(gpu: &Gpu) -> Result<(), Failure> {
    fs::write(format!("{DRIVER}/bind"), device()?)?;
    match gpu.path.exists() {
        true => Ok(()),
        false => Err(format!("{} is not there again", gpu.path.display()).into()),
    }
}

fn lost(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 2)?;
    let mut export = PrimeHandleToFd {
        handle: it.buffer.handle,
        flags: prime::CLOEXEC | prime::RDWR,
        fd: -1,
    };
    ioctl(it.fd.as_fd(), PRIME_HANDLE_TO_FD, &mut export)?;
    let exported = system::borrow(export.fd, |fd| map_shared(fd, 0, it.buffer.length))?;
    system::close(export.fd);
    poke(exported, 1)?;
    // Only the embedded GPU has a call that waits for ever.
    let waiting = match gpu.driver.as_str() {
        "soft" => gpu.work(it.fd.as_fd())?,
        _ => None,
    };
    let waiter = fork(|| match &waiting {
        Some(work) => match gpu.wait(it.fd.as_fd(), work, now_ns() + 60_000_000_000) {
            Err(Errno::ENODEV) => 0,
            _ => 1,
        },
        None => 0,
    })?;
    let mut waiter = waiter;
    thread::sleep(Duration::from_millis(100));
    let started = Instant::now();
    unbind()?;
    let waited = match waiter.wait(Duration::from_secs(5))? {
        system::Ended::Code(0) => "ENODEV".to_owned(),
        other => format!("{other:?}"),
    };
    if started.elapsed() > Duration::from_secs(5) {
        return Err(format!("it took {:?}", started.elapsed()).into());
    }
    let call = ioctl(
        it.fd.as_fd(),
        GEM_CLOSE,
        &mut GemClose {
            handle: it.buffer.handle,
            pad: 0,
        },
    );
    let mapped = map_shared(it.fd.as_fd(), it.buffer.offset, it.buffer.length);
    let memory = format!(
        "{}, of a dma-buf {}",
        pages(it.address, 2),
        pages(exported, 2)
    );
    if gpu.path.exists() || gpu.open().is_ok() {
        return Err("the node of a lost device can be opened".into());
    }
    let module = unload();
    unmap(it.address, it.buffer.length)?;
    unmap(exported, it.buffer.length)?;
    Ok(Some(format!(
        "waiting {waited}, ioctl {}, mmap {}, {memory}, module {module}",
        word(call),
        word(mapped)
    )))
}

fn draw(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 2)?;
    let seen = pages(it.address, 2);
    unmap(it.address, it.buffer.length)?;
    Ok(Some(seen))
}

fn returned(gpu: &Gpu) -> Result<Option<String>, Failure> {
    bind(gpu)?;
    draw(gpu)
}

/// While children use it.
fn again(gpu: &Gpu) -> Result<Option<String>, Failure> {
    for _ in 0..5 {
        let users: Result<Vec<_>, Errno> = (0..2)
            .map(|_| {
                fork(|| {
                    // Whatever comes, until the node is gone.
                    while let Ok(it) = Mapped::try_new(gpu, 2) {
                        let _ = (poke(it.address, 1), peek(it.page(1)));
                        let _ = unmap(it.address, it.buffer.length);
                    }
                    0
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(60));
        unbind()?;
        for mut user in users? {
            let ended = user.wait(Duration::from_secs(10))?;
            if ended != system::Ended::Code(0) {
                return Err(format!("a program on the lost device: {ended:?}").into());
            }
        }
        bind(gpu)?;
    }
    draw(gpu)
}

/// Kilobytes of a line of `/proc/meminfo`.
fn meminfo(name: &str) -> Result<i64, Failure> {
    let all = fs::read_to_string("/proc/meminfo")?;
    let line = all
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line
        .ok_or(format!("/proc/meminfo has no {name}"))?
        .trim_end_matches("kB")
        .trim()
        .parse()?)
}

/// What the kernel has allocated for itself, in kilobytes: slabs and page tables of its own.
fn allocated() -> Result<i64, Failure> {
    Ok(meminfo("SUnreclaim")? + meminfo("VmallocUsed")? + meminfo("Percpu")?)
}

/// The bits of `/proc/sys/kernel/tainted` that a module from outside of the kernel sets (`TAINT_OOT_MODULE`,
/// `TAINT_UNSIGNED_MODULE`); all others are the kernel's complaints.
const OUR_TAINT: u64 = 1 << 12 | 1 << 13;

/// Loads the module, runs the program with all checks, unloads the module; then loads and unloads it until a leak would show.
pub fn run(driver: &str) -> Result<(), String> {
    check(driver).map_err(|error| format!("node-semantics: {error}"))
}

fn program(arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new("/bin/node-semantics")
        .args(arguments)
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("the checks ended with {status}").into()),
    }
}

fn check(driver: &str) -> Result<(), Failure> {
    for (kind, target) in [(c"sysfs", c"/sys"), (c"debugfs", c"/sys/kernel/debug")] {
        let folder = target.to_string_lossy().into_owned();
        if kind == c"sysfs" {
            fs::create_dir_all(&folder)?;
        }
        // Whoever was here before may have mounted it.
        if fs::read_dir(Path::new(&folder))?.next().is_none() {
            syscall::mount(kind, target, kind, c"")?;
        }
    }
    modules::load_all()?;
    // The module is loaded for each of both, so that a test can look at the first one's requests alone.
    modules::load_guest_driver()?;
    // The range of the aperture: without a reservation as write-back a processor would not cache what a program maps.
    let memory_types = fs::read_to_string("/sys/kernel/debug/x86/pat_memtype_list")?;
    program(&["--driver", driver])?;
    modules::unload_guest_driver()?;
    modules::load_guest_driver()?;
    program(&["--driver", driver, "--guest"])?;
    if modules::has_aperture()? && !memory_types.lines().any(|line| line.contains("write-back")) {
        return Err(format!("the aperture is not mapped write-back: {memory_types}").into());
    }
    modules::unload_guest_driver()?;
    let mut before = 0;
    const ROUNDS: i64 = 40;
    for round in 0..ROUNDS {
        // Caches fill in the first ones.
        if round == 10 {
            before = allocated()?;
        }
        modules::load_guest_driver()?;
        drop(Gpu::find(driver)?);
        modules::unload_guest_driver()?;
    }
    let grown = allocated()? - before;
    println!(
        "semantics: {} loads more: {grown} kB more of the kernel's memory",
        ROUNDS - 10
    );
    // A kernel that checks itself keeps what was freed for a while, and looks for leaks itself.
    let looks_itself = fs::exists("/sys/kernel/debug/kmemleak")?;
    if grown > ROUNDS * 8 && !looks_itself {
        return Err(format!("the kernel's memory has grown by {grown} kB").into());
    }
    let tainted: u64 = fs::read_to_string("/proc/sys/kernel/tainted")?
        .trim()
        .parse()?;
    if tainted & !OUR_TAINT != 0 {
        return Err(format!("the kernel is tainted: {tainted}").into());
    }
    Ok(())
}
