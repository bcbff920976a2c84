//! What of the sandbox needs a kernel with Landlock or a real node. That every test with a guest passes with the sandbox on
//! shows that it is not too strict.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_host_proxy::files;

use super::{Failure, Test};
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "landlock_keeps_a_thread_to_the_devices_that_it_is_given",
        run: landlock,
    },
    Test {
        name: "mini_vmm_check_finds_seccomp_and_landlock",
        run: check,
    },
    Test {
        name: "the_thread_that_opens_the_node_is_filtered_and_opens_it",
        run: opener,
    },
];

/// What a thread that may open one device can open.
struct Opens {
    restricted: bool,
    device: bool,
    other: bool,
    new: bool,
}

fn landlock() -> Result<(), Failure> {
    let (other, new) = ("/tmp/other", "/tmp/new");
    fs::write(other, "other")?;
    let writes = |path| File::options().write(true).open(path).is_ok();
    // A thread's own, so that only it is restricted.
    let thread = std::thread::spawn(move || -> std::io::Result<Opens> {
        Ok(Opens {
            restricted: files::restrict(&[Path::new("/dev/null")], None)?,
            device: writes("/dev/null"),
            other: File::open(other).is_ok(),
            new: File::create(new).is_ok(),
        })
    });
    let opens = thread.join().map_err(|_| "the thread has panicked")??;
    ensure!(opens.restricted, "the kernel has no Landlock");
    ensure!(opens.device, "what was given is refused");
    ensure!(!opens.other, "a file that was not given can be read");
    ensure!(!opens.new, "a file can be created");
    ensure!(
        File::open(other).is_ok(),
        "another thread is restricted as well"
    );
    Ok(())
}

fn check() -> Result<(), Failure> {
    let output = Command::new("/bin/mini-vmm").arg("check").output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    for line in ["(seccomp): yes", "(Landlock): yes"] {
        ensure!(said.contains(line), "mini-vmm check does not say `{line}`");
    }
    Ok(())
}

/// Names and numbers of filters of the threads of this process.
fn filters() -> Result<Vec<(String, u32)>, Failure> {
    let mut threads = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        // One that has ended meanwhile has none.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name));
            value
                .map(|value| value.trim().to_owned())
                .ok_or("no such line")
        };
        threads.push((field("Name:")?, field("Seccomp_filters:")?.parse()?));
    }
    Ok(threads)
}

fn opener() -> Result<(), Failure> {
    let driver = DrmDriver::new(find("virtio_gpu", Kind::Render)?.path)?;
    let calls = driver.system_calls()?;
    ensure!(
        calls.iter().any(|call| call.why == "DRM_IOCTL_VIRTGPU_MAP"),
        "the schemas' ioctls are not among the driver's calls"
    );
    let file = driver
        .open(2)
        .map_err(|error| format!("cannot open the node: {error:?}"))?;
    ensure!(file.fd().is_some(), "an open file has no descriptor");
    let threads = filters()?;
    let opener = threads.iter().find(|(name, _)| name == "pvgpu-opener");
    ensure!(
        opener.is_some_and(|(_, filters)| *filters > 0),
        "no filtered thread pvgpu-opener: {threads:?}"
    );
    drop((file, driver));
    // A thread that was joined is still in /proc for a moment.
    let deadline = Instant::now() + Duration::from_secs(10);
    while filters()?.iter().any(|(name, _)| name == "pvgpu-opener") {
        ensure!(Instant::now() < deadline, "the thread outlives its driver");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
