//! Descriptors of the node: several opens, copies of one by `dup`, `fork` and `exec`, and what closing them ends.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::Command;
use std::time::Duration;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{GEM_CLOSE, GemClose};

use super::system::{self, PAGE, fork, ioctl, ioctl_at, map_shared, peek, poke, unmap};
use super::{Check, Failure, Gpu, Mapped, word};

/// The checks.
pub const CHECKS: &[Check] = &[
    Check {
        name: "a handle is its open's own",
        run: own_handles,
        expected: "other open EINVAL, own ok, again EINVAL",
    },
    Check {
        name: "dup is the same open",
        run: duplicated,
        expected: "6, last close ok",
    },
    Check {
        name: "fork shares the open, and a child's end leaves it",
        run: forked,
        expected: "child's Code(0), handle ok",
    },
    Check {
        name: "exec keeps a descriptor without O_CLOEXEC and closes others",
        run: executed,
        expected: "ok EBADF",
    },
    Check {
        name: "an argument at a bad address, a position, a write",
        run: oddities,
        expected: "EFAULT, ok, EINVAL",
    },
    Check {
        name: "a hundred opens, each with a buffer that is mapped",
        run: hundred,
        expected: "ok",
    },
];

fn close_handle(fd: BorrowedFd<'_>, handle: u32) -> Result<i32, Errno> {
    ioctl(fd, GEM_CLOSE, &mut GemClose { handle, pad: 0 })
}

fn own_handles(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let (one, two) = (gpu.open()?, gpu.open()?);
    let buffer = gpu.buffer(one.as_fd(), 1)?;
    let others = close_handle(two.as_fd(), buffer.handle);
    let own = close_handle(one.as_fd(), buffer.handle);
    let again = close_handle(one.as_fd(), buffer.handle);
    Ok(Some(format!(
        "other open {}, own {}, again {}",
        word(others),
        word(own),
        word(again)
    )))
}

fn duplicated(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let copy = fd.try_clone()?;
    let buffer = gpu.buffer(fd.as_fd(), 1)?;
    drop(fd);
    let address = map_shared(copy.as_fd(), buffer.offset, buffer.length)?;
    poke(address, 6)?;
    let byte = peek(address)?;
    unmap(address, buffer.length)?;
    let closed = close_handle(copy.as_fd(), buffer.handle);
    Ok(Some(format!("{byte}, last close {}", word(closed))))
}

fn forked(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let it = Mapped::new(gpu, 1)?;
    // Handles are numbers from 1 on that are given again: the child's is the next one.
    let mut child = fork(|| match gpu.buffer(it.fd.as_fd(), 1) {
        Ok(buffer) => i32::from(buffer.handle != it.buffer.handle + 1),
        Err(_) => 2,
    })?;
    let ended = child.wait(Duration::from_secs(10))?;
    let handle = close_handle(it.fd.as_fd(), it.buffer.handle + 1);
    unmap(it.address, it.buffer.length)?;
    Ok(Some(format!("child's {ended:?}, handle {}", word(handle))))
}

/// The program starts itself again ([`after_exec`]).
fn executed(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let (kept, closed) = (gpu.open()?, gpu.open()?);
    system::keep_on_exec(kept.as_fd())?;
    let output = Command::new(std::env::current_exe()?)
        .args(["--driver", &gpu.driver, "--after-exec"])
        .args([kept.as_raw_fd().to_string(), closed.as_raw_fd().to_string()])
        .output()?;
    Ok(Some(
        String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    ))
}

/// What can be done with descriptors of these numbers.
pub fn after_exec(gpu: &Gpu, descriptors: &[i32]) -> String {
    let words = descriptors.iter().map(|fd| {
        let path = format!("/proc/self/fd/{fd}");
        // The library opens nothing at numbers that high before main.
        if std::fs::read_link(&path).is_ok_and(|target| target == gpu.path) {
            word(system::borrow(*fd, |fd| gpu.buffer(fd, 1)))
        } else {
            "EBADF".to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn oddities(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let fd = gpu.open()?;
    let argument = word(ioctl_at(fd.as_fd(), GEM_CLOSE, PAGE));
    let position = word(system::seek(fd.as_fd()));
    let written = word(system::write(fd.as_fd(), b"x"));
    Ok(Some(format!("{argument}, {position}, {written}")))
}

fn hundred(gpu: &Gpu) -> Result<Option<String>, Failure> {
    let all: Vec<Mapped> = (0..100)
        .map(|_| Mapped::new(gpu, 1))
        .collect::<Result<_, Errno>>()?;
    for (it, byte) in all.iter().zip(0..) {
        poke(it.address, byte)?;
    }
    let right = all
        .iter()
        .zip(0..)
        .all(|(it, byte)| peek(it.address) == Ok(byte));
    for it in &all {
        unmap(it.address, it.buffer.length)?;
    }
    Ok(Some(if right { "ok" } else { "mixed up" }.to_owned()))
}
