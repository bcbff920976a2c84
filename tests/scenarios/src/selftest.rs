//! Calls that must fail, and with which errno, whatever host driver is behind pvgpu. Only for files of pvgpu: a driver
//! by itself answers some of them differently.

use alloc::vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_FD_TO_HANDLE, PRIME_HANDLE_TO_FD, PrimeFdToHandle, PrimeHandleToFd,
    SYNCOBJ_CREATE, SYNCOBJ_WAIT, SYNCOBJS_MAX, SyncobjCreate, SyncobjWait, VERSION,
    VERSION_TEXT_MAX, Version,
};
use pvgpu_protocol::family::soft::{DRM_IOCTL_SOFT_GEM_CREATE, GemCreate};
use pvgpu_protocol::family::vgem::{CREATE_DUMB, CreateDumb};
use pvgpu_protocol::family::virtio_gpu::{RESOURCE_CREATE, ResourceCreate};
use pvgpu_protocol::schema::command::{iowr, with_size};
use zerocopy::IntoBytes;

use crate::steps::{Failure, Report, Steps, address, address_mut, driver_name};
use crate::virgl::{Format, bind, target};
use crate::{DeviceFile, check, soft};

/// Runs all of them; on the embedded GPU, those that break it as well.
pub fn run<D: DeviceFile>(file: &mut D, report: &mut impl Report) -> Result<(), Failure> {
    let mut other = file.open_again().map_err(|errno| Failure::Call {
        step: "open again",
        errno,
    })?;
    let mut steps = Steps { file, report };
    unknown(&mut steps)?;
    steps.refused(
        "SYNCOBJ_CREATE with an unknown flag",
        SYNCOBJ_CREATE,
        SyncobjCreate {
            flags: 1 << 31,
            ..Default::default()
        },
        Errno::EINVAL,
    )?;
    pointers(&mut steps)?;
    descriptors(&mut steps)?;

    let (name, length) = driver_name(&mut steps)?;
    let name = &name[..length];
    let handle = buffer(&mut steps, name)?;
    let export = PrimeHandleToFd {
        handle,
        ..Default::default()
    };
    steps.refused(
        "PRIME_HANDLE_TO_FD with an unknown flag",
        PRIME_HANDLE_TO_FD,
        PrimeHandleToFd {
            flags: 1 << 4,
            ..export
        },
        Errno::EINVAL,
    )?;
    let mut second = Steps {
        file: &mut other,
        report: &mut *steps.report,
    };
    second.refused(
        "PRIME_HANDLE_TO_FD of another file's handle",
        PRIME_HANDLE_TO_FD,
        export,
        Errno::ENOENT,
    )?;
    second.refused(
        "GEM_CLOSE of another file's handle",
        GEM_CLOSE,
        GemClose { handle, pad: 0 },
        Errno::EINVAL,
    )?;
    // The first file's handle is still its own.
    let exported = steps.ioctl("PRIME_HANDLE_TO_FD", PRIME_HANDLE_TO_FD, export)?;
    steps.call("close the exported fd", |file| file.close_fd(exported.fd))?;
    steps.refused(
        "PRIME_FD_TO_HANDLE of a closed fd",
        PRIME_FD_TO_HANDLE,
        PrimeFdToHandle {
            fd: exported.fd,
            ..Default::default()
        },
        Errno::EBADF,
    )?;
    steps.ioctl("GEM_CLOSE", GEM_CLOSE, GemClose { handle, pad: 0 })?;
    steps.refused(
        "GEM_CLOSE of a closed handle",
        GEM_CLOSE,
        GemClose { handle, pad: 0 },
        Errno::EINVAL,
    )?;
    if let Ok(mapping) = steps.file.map(1 << 46, 4096) {
        drop(mapping);
        check!(false, "mmap at an offset that no MAP ioctl gave succeeded");
    }
    if name == b"soft" {
        soft::breaks(steps.file, steps.report)?;
    }
    Ok(())
}

/// Ioctls that do not exist, and one of the wrong size.
fn unknown<D: DeviceFile, R: Report>(steps: &mut Steps<'_, D, R>) -> Result<(), Failure> {
    /// `DRM_IOCTL_SET_MASTER`, which has no argument, and an ioctl of another type.
    const SET_MASTER: u32 = 0x641e;
    const TCGETS: u32 = 0x5401;
    let ioctls = [
        ("an ioctl of no driver", iowr::<u64>(0x9f), Errno::EINVAL),
        ("SET_MASTER", SET_MASTER, Errno::EACCES),
        ("TCGETS", TCGETS, Errno::ENOTTY),
    ];
    for (step, command, errno) in ioctls {
        steps.refused(step, command, 0u64, errno)?;
    }
    for size in [0, 8, 56, 72] {
        steps.refused(
            "VERSION of a wrong size",
            with_size(VERSION, size),
            [0u64; 9],
            Errno::EINVAL,
        )?;
    }
    Ok(())
}

/// Arrays that are too long or not there.
fn pointers<D: DeviceFile, R: Report>(steps: &mut Steps<'_, D, R>) -> Result<(), Failure> {
    let handles = vec![1u32; SYNCOBJS_MAX as usize + 1];
    let wait = SyncobjWait {
        handles: address(handles.as_bytes()),
        count_handles: SYNCOBJS_MAX + 1,
        ..Default::default()
    };
    steps.refused(
        "SYNCOBJ_WAIT for too many",
        SYNCOBJ_WAIT,
        wait,
        Errno::E2BIG,
    )?;
    steps.refused(
        "SYNCOBJ_WAIT for some that are nowhere",
        SYNCOBJ_WAIT,
        SyncobjWait {
            handles: 0,
            count_handles: 1,
            ..wait
        },
        Errno::EFAULT,
    )?;
    let mut text = vec![0; VERSION_TEXT_MAX as usize + 1];
    steps.refused(
        "VERSION with too long a text",
        VERSION,
        Version {
            name_len: text.len() as u64,
            name: address_mut(&mut text),
            ..Default::default()
        },
        Errno::E2BIG,
    )?;
    steps.refused(
        "VERSION with an endless text",
        VERSION,
        Version {
            name_len: u64::MAX,
            name: address_mut(&mut text),
            ..Default::default()
        },
        Errno::E2BIG,
    )
}

/// File descriptors of nothing.
fn descriptors<D: DeviceFile, R: Report>(steps: &mut Steps<'_, D, R>) -> Result<(), Failure> {
    for fd in [-1, 0x7fff_ffff] {
        steps.refused(
            "PRIME_FD_TO_HANDLE of no fd",
            PRIME_FD_TO_HANDLE,
            PrimeFdToHandle {
                fd,
                ..Default::default()
            },
            Errno::EBADF,
        )?;
    }
    Ok(())
}

/// A buffer object of that host driver.
fn buffer<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    driver: &[u8],
) -> Result<u32, Failure> {
    match driver {
        b"soft" => {
            let create = GemCreate {
                size: 4096,
                ..Default::default()
            };
            let made = steps.ioctl("GEM_CREATE", DRM_IOCTL_SOFT_GEM_CREATE, create)?;
            Ok(made.handle)
        }
        b"vgem" => {
            let create = CreateDumb {
                height: 16,
                width: 16,
                bpp: 32,
                ..Default::default()
            };
            Ok(steps.ioctl("CREATE_DUMB", CREATE_DUMB, create)?.handle)
        }
        b"virtio_gpu" => {
            let create = ResourceCreate {
                target: target::BUFFER,
                format: Format::R8Unorm as u32,
                bind: bind::VERTEX_BUFFER,
                width: 4096,
                height: 1,
                depth: 1,
                array_size: 1,
                size: 4096,
                ..Default::default()
            };
            Ok(steps
                .ioctl("RESOURCE_CREATE", RESOURCE_CREATE, create)?
                .bo_handle)
        }
        other => {
            check!(
                false,
                "no way is known to make a buffer of the host driver {}",
                other.escape_ascii()
            );
            Ok(0)
        }
    }
}
