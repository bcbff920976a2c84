//! What a program sees when the host loses all that it has open on its GPU, and when the GPU comes back: `node-recovery` runs it in
//! a Linux guest, with `testbed/recovery.rs` on the host, which waits for its lines and takes the GPU away.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core;
use pvgpu_scenarios::{DeviceFile, Picture, soft, virtio_gpu};

use crate::descriptors::{calls, hang};
use crate::drm_ioctl::Node;
use crate::ensure;
use crate::semantics::{Failure, Gpu, system};

/// Said when calls wait: the host may take the GPU away now.
pub const WAITING: &str = "recovery: waiting";
/// Said when all of them have heard of that, and what is open is dead: the host may give the GPU back now.
pub const LOST: &str = "recovery: lost";
/// Said when the GPU has come back and nothing waits: the host may give it another time, and types a line after that.
pub const IDLE: &str = "recovery: idle";

/// For what is to happen: the guest must notice by itself, and the testbed is slow.
const SOON: Duration = Duration::from_secs(15);
/// For the GPU to come back.
const PATIENCE: Duration = Duration::from_secs(60);

/// The whole story, on the node of that driver: `soft` or `virtio_gpu`.
pub fn run(driver: &str) -> Result<(), Failure> {
    let gpu = Gpu::find(driver)?;
    let path = &gpu.path;
    let mut before = Node::open(path)?;
    ask(&mut before)?;

    let file = gpu.open()?;
    let buffer = gpu.buffer(file.as_fd(), 1)?;
    let mapped = system::map_shared(file.as_fd(), buffer.offset, buffer.length)?;
    system::poke(mapped, 7)?;
    ensure!(system::peek(mapped)? == 7, "the mapping does not work");
    waits_end(driver, path)?;

    // Nobody has told this file yet.
    gone("an ioctl", ask(&mut before))?;
    let again = system::map_shared(file.as_fd(), buffer.offset, buffer.length);
    gone("mmap", again.map(drop))?;
    let touched = system::peek(mapped);
    ensure!(
        touched == Err(Errno::EFAULT),
        "a lost mapping reads {touched:?}"
    );
    println!("{LOST}");

    let mut after = open_again(path)?;
    let mut other = Node::open(path)?;
    gone("an ioctl", ask(&mut before))?;
    // What these have on the host had numbers that others have there now.
    system::unmap(mapped, buffer.length)?;
    drop((file, before));
    draw(driver, &mut after)?;
    ask(&mut other)?;
    drop((after, other));

    println!("{IDLE}");
    io::stdin().read_line(&mut String::new())?;
    // The first one to open it is the first one to notice.
    let mut third = Node::open(path)?;
    draw(driver, &mut third)
}

/// Has calls wait in every way that there is, until they end since the session is lost.
fn waits_end(driver: &str, path: &Path) -> Result<(), Failure> {
    let [reader, poller, mut waiter] = [(); 3].map(|()| Node::open(path));
    let (reader, poller) = (reader?, poller?);
    // The embedded GPU alone has what never ends by itself; its hang does in some seconds.
    let syncobj = match driver {
        "soft" => {
            let mut create = core::SyncobjCreate::default();
            let waiter = waiter.as_mut().map_err(|error| error.to_string())?;
            waiter.ioctl(core::SYNCOBJ_CREATE, &mut create)?;
            Some(create.handle)
        }
        _ => None,
    };
    let mut hung = Node::open(path)?;
    let started = Instant::now();
    thread::scope(|scope| {
        let read = scope.spawn(|| calls::read(reader.as_fd(), &mut [0; 64]).map(drop));
        let polled = scope.spawn(|| calls::poll(poller.as_fd(), libc::POLLIN, PATIENCE));
        let waited = scope.spawn(|| match (syncobj, waiter.as_mut()) {
            (Some(handle), Ok(waiter)) => wait_for_ever(waiter, handle),
            _ => Err(Errno::ENODEV),
        });
        thread::sleep(Duration::from_millis(300));
        let fence = match driver {
            "soft" => Some(hang(&mut hung).map_err(|error| -> Failure { error })?),
            _ => None,
        };
        println!("{WAITING}");
        if let Some(fence) = &fence {
            let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
            let status = calls::status(fence.as_fd())?;
            ensure!(
                (events, status) == (libc::POLLIN, -libc::ENODEV),
                "the fence of a lost submission has events {events:#x}, status {status}"
            );
        }
        let panicked = |_| "a waiting thread has panicked";
        let read = read.join().map_err(panicked)?;
        let errno = read.as_ref().err().and_then(io::Error::raw_os_error);
        ensure!(errno == Some(libc::ENODEV), "read has ended with {read:?}");
        let polled = polled.join().map_err(panicked)??;
        ensure!(
            polled == libc::POLLERR | libc::POLLHUP,
            "poll has ended with {polled:#x}"
        );
        gone("an ioctl that waits", waited.join().map_err(panicked)?)
    })?;
    let taken = started.elapsed();
    println!(
        "recovery: all calls have ended after {} ms",
        taken.as_millis()
    );
    ensure!(taken < SOON, "the guest has noticed after {taken:?} only");
    Ok(())
}

fn wait_for_ever(node: &mut Node, handle: u32) -> Result<(), Errno> {
    let handles = [handle];
    let mut wait = core::SyncobjWait {
        handles: handles.as_ptr().expose_provenance() as u64,
        timeout_nsec: i64::MAX,
        count_handles: 1,
        flags: core::syncobj::WAIT_FOR_SUBMIT,
        ..Default::default()
    };
    node.ioctl(core::SYNCOBJ_WAIT, &mut wait).map(drop)
}

/// An ioctl that every driver has, but answers itself only as long as it lives.
fn ask(node: &mut Node) -> Result<(), Errno> {
    let mut capability = core::GetCap {
        capability: core::cap::PRIME,
        ..Default::default()
    };
    node.ioctl(core::GET_CAP, &mut capability).map(drop)
}

fn gone(what: &str, result: Result<(), Errno>) -> Result<(), Failure> {
    ensure!(
        result == Err(Errno::ENODEV),
        "{what} on what was open before has given {result:?}"
    );
    Ok(())
}

/// Opens the node as soon as that works. Until then there is no device.
fn open_again(path: &Path) -> Result<Node, Failure> {
    let started = Instant::now();
    loop {
        match Node::open(path) {
            Ok(node) => {
                let taken = started.elapsed().as_millis();
                println!("recovery: the node is back after {taken} ms");
                return Ok(node);
            }
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(error.into()),
            Err(error) if started.elapsed() >= PATIENCE => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn draw(driver: &str, node: &mut Node) -> Result<(), Failure> {
    let picture: Picture = match driver {
        "soft" => soft::draw(node, &mut |_, _| {})?,
        _ => virtio_gpu::draw(node, &mut |_, _| {})?,
    };
    println!(
        "picture {}x{} {:016x}",
        picture.width,
        picture.height,
        picture.fingerprint()
    );
    Ok(())
}
