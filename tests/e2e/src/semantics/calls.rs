//! Calls that signals interrupt, that end with their process, that come from many threads, and that are large.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_HANDLE_TO_FD, PrimeHandleToFd, prime,
};
use pvgpu_protocol::family::virtio_gpu::{EXECBUFFER, Execbuffer};

use super::system::{
    self, Ended, exit_now, fork, ioctl, map_shared, now_ns, peek, poke, unmap, with_alarms,
};
use super::{Check, Failure, Gpu, Work, word};

/// The checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "a signal without SA_RESTART ends a waiting call",
        run: interrupted,
        expected: "EINTR, soon",
    },
    Check {
        name: "a signal with SA_RESTART does not",
        run: restarted,
        expected: "waited to its end, with signals",
    },
    Check {
        name: "SIGKILL ends a process that waits",
        run: killed,
        expected: "Signal(9)",
    },
    Check {
        name: "a thread's exit ends another one that waits",
        run: exited,
        expected: "Code(5)",
    },
    Check {
        name: "short calls never fail by signals",
        run: short_calls,
        expected: "all right, with signals",
    },
    Check {
        name: "processes killed while they make descriptors",
        run: killed_makers,
        expected: "all by Signal(9)",
    },
    Check {
        name: "a descriptor whose number cannot be written",
        run: unwritable,
        expected: "EFAULT",
    },
    Check {
        name: "four threads at once, beside one that waits",
        run: threads,
        expected: "all right",
    },
    Check {
        name: "a request of almost 4 MiB",
        run: large,
        expected: "ok ok ok",
    },
];

/// For ever, for a test.
const LONG_NS: i64 = 8_000_000_000;
/// How long to try to meet a GPU at work. A try takes a second on a busy machine, and most delays are wrong for it.
const TRYING: Duration = Duration::from_secs(40);
/// What is not for ever.
const SOON: Duration = Duration::from_secs(4);

/// Tries until the result is the one that is to be seen: work of a GPU that is not for ever may be done before a signal comes.
/// The embedded GPU's is, so there is one try.
fn tries(
    gpu: &Gpu,
    expected: &str,
    one: impl Fn(BorrowedFd<'_>, &Work, Duration) -> Result<String, Failure>,
) -> Result<Option<String>, Failure> {
    let mut seen = String::new();
    let deadline = Instant::now() + TRYING;
    for milliseconds in [0, 1, 2, 5, 10, 20].into_iter().cycle() {
        let fd = gpu.open()?;
        let Some(work) = gpu.work(fd.as_fd())? else {
            return Ok(None);
        };
        let for_ever = matches!(work, Work::Syncobj(_));
        let milliseconds = if for_ever { 20 } else { milliseconds };
        seen = one(fd.as_fd(), &work, Duration::from_millis(milliseconds))?;
        if for_ever || seen == expected || Instant::now() > deadline {
            break;
        }
    }
    Ok(Some(seen))
}

fn interrupted(gpu: &Gpu) -> Result<Option<String>, Failure> {
    tries(gpu, "EINTR, soon", |fd, work, delay| {
        let started = Instant::now();
        let wait = || gpu.wait(fd, work, now_ns() + LONG_NS);
        let (result, _) = with_alarms(delay + Duration::from_millis(1), false, wait);
        let soon = if started.elapsed() < SOON {
            "soon"
        } else {
            "late"
        };
        Ok(format!("{}, {soon}", word(result)))
    })
}

fn restarted(gpu: &Gpu) -> Result<Option<String>, Failure> {
    tries(gpu, "waited to its end, with signals", |fd, work, delay| {
        let deadline = now_ns() + 600_000_000;
        let wait = || gpu.wait(fd, work, deadline);
        let (result, alarms) = with_alarms(delay + Duration::from_millis(5), true, wait);
        // The embedded GPU's wait ends with its deadline, the other one with its work.
        let ended = match word(result).as_str() {
            "ETIME" if now_ns() >= deadline => "waited to its end".to_owned(),
            "ok" => "waited to its end".to_owned(),
            other => format!("ended with {other}"),
        };
        let with = if alarms == 0 { "without" } else { "with" };
        Ok(format!("{ended}, {with} signals"))
    })
}

fn killed(gpu: &Gpu) -> Result<Option<String>, Failure> {
    tries(gpu, "Signal(9)", |fd, work, delay| {
        let mut child = fork(|| {
            let result = gpu.wait(fd, work, now_ns() + LONG_NS);
            i32::from(result.is_err())
        })?;
        thread::sleep(delay);
        child.signal(libc::SIGKILL);
        Ok(format!("{:?}", child.wait(SOON)?))
    })
}

fn exited(gpu: &Gpu) -> Result<Option<String>, Failure> {
    tries(gpu, "Code(5)", |fd, work, delay| {
        let mut child = fork(|| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    let _ = gpu.wait(fd, work, now_ns() + LONG_NS);
                    exit_now(6);
                });
                thread::sleep(delay);
                exit_now(5)
            })
        })?;
        Ok(format!("{:?}", child.wait(SOON)?))
    })
}

fn short_calls(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let calls = || {
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let buffer = gpu.buffer(fd.as_fd(), 1)?;
            let address = map_shared(fd.as_fd(), buffer.offset, buffer.length)?;
            unmap(address, buffer.length)?;
            ioctl(
                fd.as_fd(),
                GEM_CLOSE,
                &mut GemClose {
                    handle: buffer.handle,
                    pad: 0,
                },
            )?;
            drop(gpu.open()?);
        }
        Ok(())
    };
    let (result, alarms) = with_alarms(Duration::from_millis(3), false, calls);
    let result: Result<(), pvgpu_protocol::Errno> = result;
    let right = result.map_or_else(|errno| errno.to_string(), |()| "all right".to_owned());
    Ok(Some(format!(
        "{right}, with{} signals",
        if alarms == 0 { "out" } else { "" }
    )))
}

/// Each child makes dma-bufs until it is killed; what a killed call has made must not be left on the host.
fn killed_makers(gpu: &Gpu) -> Result<Option<String>, Failure> {
    for round in 0..20 {
        let mut child = fork(|| {
            let Ok(fd) = gpu.open() else { return 1 };
            let Ok(buffer) = gpu.buffer(fd.as_fd(), 1) else {
                return 2;
            };
            loop {
                let mut export = PrimeHandleToFd {
                    handle: buffer.handle,
                    flags: prime::CLOEXEC | prime::RDWR,
                    fd: -1,
                };
                if ioctl(fd.as_fd(), PRIME_HANDLE_TO_FD, &mut export).is_err() {
                    return 3;
                }
                system::close(export.fd);
            }
        })?;
        thread::sleep(Duration::from_millis(20 + 7 * round));
        child.signal(libc::SIGKILL);
        let ended = child.wait(SOON)?;
        if ended != Ended::Signal(libc::SIGKILL) {
            return Ok(Some(format!("round {round}: {ended:?}")));
        }
    }
    Ok(Some("all by Signal(9)".to_owned()))
}

/// The argument is in memory that can only be read; what the call has made must not be left on the host either.
fn unwritable(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let buffer = gpu.buffer(fd.as_fd(), 1)?;
    let page = system::map_low()?;
    let export = PrimeHandleToFd {
        handle: buffer.handle,
        flags: prime::CLOEXEC | prime::RDWR,
        fd: -1,
    };
    system::store(page, export);
    system::protect(page, system::PAGE, libc::PROT_READ)?;
    let seen = word(system::ioctl_at(fd.as_fd(), PRIME_HANDLE_TO_FD, page));
    unmap(page, system::PAGE)?;
    Ok(Some(seen))
}

fn threads(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let work = gpu.work(fd.as_fd())?;
    let calls = |number: u8| {
        for round in 0..100 {
            let buffer = gpu.buffer(fd.as_fd(), 2)?;
            let address = map_shared(fd.as_fd(), buffer.offset, buffer.length)?;
            poke(address, number)?;
            thread::yield_now();
            let byte = peek(address)?;
            unmap(address, buffer.length)?;
            ioctl(
                fd.as_fd(),
                GEM_CLOSE,
                &mut GemClose {
                    handle: buffer.handle,
                    pad: 0,
                },
            )?;
            if byte != number {
                return Ok(format!("thread {number} reads {byte} in round {round}"));
            }
        }
        Ok("all right".to_owned())
    };
    let results: Vec<Result<String, pvgpu_protocol::Errno>> = thread::scope(|scope| {
        if let Some(work) = &work {
            let fd = &fd;
            scope.spawn(move || gpu.wait(fd.as_fd(), work, now_ns() + 1_000_000_000));
        }
        let threads: Vec<_> = (1..=4)
            .map(|number| scope.spawn(move || calls(number)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Ok("panicked".to_owned())))
            .collect()
    });
    for result in results {
        let result = word_or(result);
        if result != "all right" {
            return Ok(Some(result));
        }
    }
    Ok(Some("all right".to_owned()))
}

fn word_or(result: Result<String, pvgpu_protocol::Errno>) -> String {
    result.unwrap_or_else(|errno| errno.to_string())
}

/// Commands that do nothing: `VIRGL_CCMD_NOP` with as many words behind it as its header can say.
fn large(gpu: &Gpu) -> Result<Option<String>, Failure> {
    if gpu.driver != "virtio_gpu" {
        return Ok(None);
    }
    const WORDS: u32 = 0xffff;
    const COMMANDS: usize = 15;
    let fd = gpu.open()?;
    let mut command = vec![0u32; WORDS as usize + 1];
    command[0] = WORDS << 16;
    let stream = command.repeat(COMMANDS);
    let words: Result<Vec<String>, Failure> = (0..3)
        .map(|_| {
            let mut execute = Execbuffer {
                command: stream.as_ptr() as u64,
                size: u32::try_from(stream.len() * 4)?,
                fence_fd: -1,
                ..Default::default()
            };
            Ok(word(ioctl(fd.as_fd(), EXECBUFFER, &mut execute)))
        })
        .collect();
    Ok(Some(words?.join(" ")))
}
