//! What a guest gets without asking the host's driver is what that would have said: constants and refusals, held against
//! the kernel's own nodes; and a Linux guest asks for nothing that it knows.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_protocol::Errno;
use pvgpu_protocol::control::decode_trace;
use pvgpu_protocol::family;
use pvgpu_protocol::schema::Answer;
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use zerocopy::FromBytes;

use super::linux::draw;
use super::pictures::VIRTIO_GPU;
use super::{Failure, Test};
use crate::constants::compare;
use crate::drm_ioctl::{Kind, find};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "answers_of_the_guest_driver_are_those_of_the_kernels_vgem",
        run: || same_answers("vgem", Kind::Render),
    },
    Test {
        name: "answers_of_the_guest_driver_are_those_of_the_kernels_virtio_gpu",
        run: || same_answers("virtio_gpu", Kind::Render),
    },
    Test {
        name: "the_kernels_render_nodes_refuse_what_the_tables_refuse",
        run: refusals,
    },
    Test {
        name: "a_linux_guest_never_asks_for_the_version_and_once_for_what_cannot_change",
        run: questions_of_a_guest,
    },
];

fn same_answers(driver: &str, kind: Kind) -> Result<(), Failure> {
    let driver: Arc<dyn HostDriver> = Arc::new(DrmDriver::new(find(driver, kind)?.path)?);
    let local = compare(&driver)?;
    // Every VERSION twice, and at least two capabilities.
    ensure!(local >= 32, "only {local} answers were the guest driver's");
    Ok(())
}

fn refusals() -> Result<(), Failure> {
    for driver in ["vgem", "virtio_gpu"] {
        let node = find(driver, Kind::Render)?;
        let mut seen = 0;
        for number in 0..=u8::MAX {
            let command = u32::from(b'd') << 8 | u32::from(number);
            // Those of the card node that vgem's guests use.
            let dumb = (0xb2..=0xb4).contains(&number);
            let expected = match family::find(family::of_driver(driver), command) {
                Ok(_) if dumb => Errno::EACCES,
                Ok(_) => continue,
                Err(errno) => errno,
            };
            let found = node.refuses(b'd', number);
            // Linux before 6.8 still knows that DRM1 was there, and not yet `MODE_CLOSEFB`.
            let before = match number {
                0x03..0x40 if expected == Errno::EINVAL => Errno::EACCES,
                0xd0 => Errno::EINVAL,
                _ => expected,
            };
            ensure!(
                found == Some(expected) || found == Some(before),
                "{driver} says {found:?} to ioctl {number:#x}, the tables say {expected}"
            );
            seen += 1;
        }
        ensure!(seen > 200, "only {seen} ioctls were tried on {driver}");
        let other = node.refuses(b'e', 0);
        ensure!(
            other == Some(Errno::ENOTTY),
            "{driver} says {other:?} to an ioctl of another type"
        );
    }
    Ok(())
}

fn questions_of_a_guest() -> Result<(), Failure> {
    let path = std::env::temp_dir().join("questions.trace");
    let argument = path.to_str().ok_or("a path that is no text")?;
    draw("6.1", &VIRTIO_GPU, "inline", &["--trace", argument])?;
    let trace = fs::read(&path)?;
    fs::remove_file(&path)?;
    let families = family::of_driver("virtio_gpu");
    let (mut rest, mut ioctls, mut hellos) = (&trace[..], 0, 0);
    let mut answered = BTreeSet::new();
    let mut constants = 0;
    while !rest.is_empty() {
        let (record, length) = decode_trace(rest).map_err(|errno| format!("the trace: {errno}"))?;
        rest = &rest[length..];
        let (header, body) = RequestHeader::read_from_prefix(record.request)
            .map_err(|_| "a request without a header")?;
        match Operation::from_number(header.operation.get()) {
            Some(Operation::Hello) => {
                hellos += 1;
                answered.clear();
            }
            Some(Operation::Ioctl) => {
                let (ioctl, payload) =
                    IoctlRequest::read_from_prefix(body).map_err(|_| "an ioctl without command")?;
                let schema = family::find(families, ioctl.command.get())
                    .map_err(|errno| format!("an ioctl that is refused was sent: {errno}"))?;
                ioctls += 1;
                ensure!(
                    schema.answer != Answer::Identity,
                    "the guest has sent {}",
                    schema.name
                );
                if record.result >= 0 && schema.is_constant(payload) {
                    constants += 1;
                    ensure!(
                        answered.insert(body),
                        "the guest has sent {} again, which it knew",
                        schema.name
                    );
                }
            }
            _ => {}
        }
    }
    ensure!(
        hellos == 2 && ioctls > 20 && constants > 0,
        "{hellos} hellos, {ioctls} ioctls and {constants} constants are not two runs of a program that draws"
    );
    Ok(())
}
