//! The host driver `drm` on the kernel's own drivers, called as the session calls it, without a guest.
//!
//! Every handle counts as owned here, so that a wrong one reaches the kernel: what the kernel says of it is what the
//! schemas must say.

use super::{Failure, Test};
use crate::drm_ioctl::{Kind as Node, Mapping, export_sync_file, find};
use crate::ensure;
use crate::loopback_file::LoopbackFile;
use pvgpu_host_proxy::call::{Call, Owned};
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject};
use pvgpu_host_proxy::drm::DrmDriver;
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::{self, core, vgem, virtio_gpu};
use pvgpu_protocol::layout::{PRESENT, align};
use pvgpu_protocol::schema::{Element, Ioctl, Kind, Space, Struct, command};
use pvgpu_protocol::wire::open;
use pvgpu_scenarios::DeviceFile;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const TESTS: &[Test] = &[
    Test {
        name: "drm_driver_gives_the_version_and_writes_no_more_than_its_text",
        run: version,
    },
    Test {
        name: "drm_driver_gives_dumb_buffers_that_other_files_see_through_prime",
        run: dumb_and_prime,
    },
    Test {
        name: "drm_driver_lets_a_dumb_buffer_be_made_on_the_card_node_only",
        run: dumb_on_render_node,
    },
    Test {
        name: "drm_driver_gives_parameters_and_capsets_of_virtio_gpu",
        run: parameters,
    },
    Test {
        name: "drm_driver_submits_in_every_form_of_the_struct",
        run: submissions,
    },
    Test {
        name: "drm_driver_ends_a_submission_that_waits_for_a_fence_when_it_is_cancelled",
        run: cancelled_submission,
    },
    Test {
        name: "drm_driver_ends_a_poll_of_a_busy_buffer_when_it_is_cancelled",
        run: cancelled_poll,
    },
    Test {
        name: "a_watch_of_a_busy_buffer_is_reported_when_its_fence_is_signaled_or_it_is_cancelled",
        run: watched_buffer,
    },
    Test {
        name: "a_watch_of_a_submissions_fence_is_reported_when_the_gpu_is_done",
        run: watched_submission,
    },
    Test {
        name: "drm_driver_waits_for_synchronization_objects_where_the_kernel_has_them",
        run: synchronization_objects,
    },
    Test {
        name: "the_kernel_says_of_unknown_handles_what_the_schemas_say",
        run: unknown_handles,
    },
];

/// An open file of a real driver, in a session that owns every handle.
struct File {
    driver: DrmDriver,
    host: Arc<dyn HostObject>,
    objects: Vec<Arc<dyn HostObject>>,
}

impl Owned for File {
    fn owns(&self, _: Space, _: u32) -> bool {
        true
    }

    fn object(&self, id: i32) -> Result<Arc<dyn HostObject>, Errno> {
        let object = usize::try_from(id).ok().and_then(|id| self.objects.get(id));
        object.cloned().ok_or(Errno::EBADF)
    }
}

impl File {
    fn open(driver: &str, node: Node) -> Result<Self, Failure> {
        let driver = DrmDriver::new(find(driver, node)?.path)?;
        let host = driver.open(open::RDWR)?;
        Ok(Self {
            driver,
            host,
            objects: Vec::new(),
        })
    }

    fn ioctl(&self, command: u32) -> &'static Ioctl {
        let families = family::of_driver(&self.driver.identity().name);
        let found = family::find(families, command).or_else(|_| family::find(family::ALL, command));
        found.unwrap_or_else(|_| panic!("no schema for {command:#x}"))
    }

    /// A validated call, with the arrays that go in.
    fn prepare(&self, command: u32, argument: &[u8], arrays: &[&[u8]]) -> Result<Call, Errno> {
        let mut payload = argument.to_vec();
        for array in arrays {
            payload.resize(align(payload.len()), 0);
            payload.extend_from_slice(array);
        }
        Call::new(self.ioctl(command), command, &payload, self, 1 << 20)
    }

    /// Performs a call; the argument is what comes back.
    fn perform<T: FromBytes + IntoBytes + Immutable>(
        &self,
        command: u32,
        argument: &mut T,
        arrays: &[&[u8]],
    ) -> Result<Call, Errno> {
        let mut call = self.prepare(command, argument.as_bytes(), arrays)?;
        let result = self.host.ioctl(&mut call, &Cancel::new());
        *argument = call.read_argument();
        result.map(|_| call)
    }

    /// A buffer of vgem and where it can be mapped.
    fn dumb(&self) -> Result<(vgem::CreateDumb, u64), Errno> {
        let mut dumb = vgem::CreateDumb {
            width: 64,
            height: 16,
            bpp: 32,
            ..Default::default()
        };
        self.perform(vgem::CREATE_DUMB, &mut dumb, &[])?;
        Ok((dumb, self.offset(dumb.handle)?))
    }

    fn offset(&self, handle: u32) -> Result<u64, Errno> {
        let mut map = vgem::MapDumb {
            handle,
            ..Default::default()
        };
        self.perform(vgem::MAP_DUMB, &mut map, &[])?;
        Ok(map.offset)
    }

    /// A buffer as a dma-buf.
    fn export(&self, handle: u32) -> Result<Arc<dyn HostObject>, Failure> {
        let mut prime = core::PrimeHandleToFd {
            handle,
            flags: core::prime::RDWR | core::prime::CLOEXEC,
            ..Default::default()
        };
        let call = self.perform(core::PRIME_HANDLE_TO_FD, &mut prime, &[])?;
        ensure!(prime.fd == -1, "a descriptor number {} came back", prime.fd);
        Ok(given(&call)?)
    }
}

/// The object that a call gave out.
fn given(call: &Call) -> Result<Arc<dyn HostObject>, Errno> {
    let field = call
        .fds_out()
        .next()
        .and_then(|field| u16::try_from(field).ok());
    field
        .and_then(|field| call.object(field))
        .cloned()
        .ok_or(Errno::EBADF)
}

/// The memory of an object.
fn map(object: &dyn HostObject, offset: u64, length: u64) -> Result<Mapping, Failure> {
    let mapping = object.mapping(offset, length, 3)?;
    Ok(Mapping::new(
        mapping.fd.as_fd(),
        mapping.offset,
        usize::try_from(length)?,
    )?)
}

/// Open descriptors of this process.
fn descriptors() -> Result<usize, Failure> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

/// Runs `wait` on a thread, makes sure that it waits, and cancels it as the worker pool does.
fn cancelled<R: Send>(wait: impl FnOnce(&Cancel) -> R + Send) -> Result<R, Failure> {
    let cancel = Cancel::new();
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| send.send(wait(&cancel)).ok());
        let early = receive.recv_timeout(Duration::from_millis(200)).is_ok();
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            cancel.cancel();
            if let Ok(result) = receive.recv_timeout(Duration::from_millis(5)) {
                ensure!(!early, "it did not wait");
                return Ok(result);
            }
            ensure!(!early, "it did not wait");
        }
        Err("cancelling did not end it".into())
    })
}

fn version() -> Result<(), Failure> {
    let file = File::open("vgem", Node::Card)?;
    ensure!(
        file.driver.identity().name == "vgem",
        "{:?}",
        file.driver.identity()
    );
    let mut lengths = core::Version::default();
    file.perform(core::VERSION, &mut lengths, &[])?;
    ensure!(
        lengths.name_len == 4,
        "the name has {} bytes",
        lengths.name_len
    );
    ensure!(
        lengths.version_major == file.driver.identity().version[0],
        "{lengths:?}"
    );
    for (room, expected) in [(2, &b"vg"[..]), (8, &b"vgem\xee\xee\xee\xee"[..])] {
        let mut version = core::Version {
            name_len: room,
            name: PRESENT,
            ..Default::default()
        };
        let bytes = vec![0xee; usize::try_from(room)?];
        let call = file.perform(core::VERSION, &mut version, &[&bytes])?;
        let name = call.array(offset(core::Version::SCHEMA, "name"));
        ensure!(name == expected, "room for {room} bytes gave {name:?}");
        ensure!(
            version.name == PRESENT,
            "an address came back: {:#x}",
            version.name
        );
    }
    Ok(())
}

fn offset(structure: &Struct, name: &str) -> u16 {
    let field = structure.fields.iter().find(|field| field.name == name);
    field.unwrap_or_else(|| panic!("no field {name}")).offset
}

fn dumb_and_prime() -> Result<(), Failure> {
    let before = descriptors()?;
    {
        let mut file = File::open("vgem", Node::Card)?;
        let (dumb, place) = file.dumb()?;
        ensure!(dumb.pitch == 256 && dumb.size == 4096, "{dumb:?}");
        let memory = map(&*file.host, place, dumb.size)?;
        (0..memory.words())
            .for_each(|index| memory.write(index, !u32::try_from(index).unwrap_or(0)));
        let dma_buf = file.export(dumb.handle)?;
        file.objects.push(Arc::clone(&dma_buf));

        let mut back = core::PrimeFdToHandle::default();
        file.perform(core::PRIME_FD_TO_HANDLE, &mut back, &[])?;
        ensure!(
            back.handle == dumb.handle,
            "the same file got handle {}",
            back.handle
        );

        let mut other = File::open("vgem", Node::Card)?;
        ensure!(
            other.offset(dumb.handle) == Err(Errno::ENOENT),
            "another file knows the handle"
        );
        other.objects.push(Arc::clone(&dma_buf));
        let mut import = core::PrimeFdToHandle::default();
        other.perform(core::PRIME_FD_TO_HANDLE, &mut import, &[])?;
        let imported = map(&*other.host, other.offset(import.handle)?, dumb.size)?;
        let direct = map(&*dma_buf, 0, dumb.size)?;
        for index in 0..memory.words() {
            let (written, seen) = (
                memory.read(index),
                (imported.read(index), direct.read(index)),
            );
            ensure!(
                seen == (written, written),
                "word {index}: {written:#x}, {seen:x?}"
            );
        }
        let mut close = core::GemClose {
            handle: dumb.handle,
            ..Default::default()
        };
        file.perform(core::GEM_CLOSE, &mut close, &[])?;
        ensure!(
            file.offset(dumb.handle) == Err(Errno::ENOENT),
            "the handle outlives GEM_CLOSE"
        );
    }
    let after = descriptors()?;
    ensure!(
        after == before,
        "{before} descriptors before, {after} after"
    );
    Ok(())
}

fn dumb_on_render_node() -> Result<(), Failure> {
    let file = File::open("vgem", Node::Render)?;
    let result = file.dumb().map(drop);
    ensure!(result == Err(Errno::EACCES), "{result:?}");
    let mut capability = core::SetClientCap::default();
    let result = file
        .perform(core::SET_CLIENT_CAP, &mut capability, &[])
        .map(drop);
    ensure!(result == Err(Errno::EACCES), "{result:?}");
    Ok(())
}

fn parameter(file: &File, param: u64) -> Result<i32, Errno> {
    let mut argument = virtio_gpu::GetParam {
        param,
        value: PRESENT,
    };
    let call = file.perform(virtio_gpu::GETPARAM, &mut argument, &[&[0; 4]])?;
    let value = call.array(offset(virtio_gpu::GetParam::SCHEMA, "value"));
    Ok(value.try_into().map_or(0, i32::from_ne_bytes))
}

fn parameters() -> Result<(), Failure> {
    let file = File::open("virtio_gpu", Node::Render)?;
    let three_d = parameter(&file, virtio_gpu::param::FEATURES_3D);
    ensure!(three_d == Ok(1), "3D_FEATURES is {three_d:?}");
    let unknown = parameter(&file, 9999);
    ensure!(
        unknown == Err(Errno::EINVAL),
        "parameter 9999 is {unknown:?}"
    );
    let other = File::open("vgem", Node::Render)?;
    let unknown = parameter(&other, virtio_gpu::param::FEATURES_3D);
    ensure!(
        unknown == Err(Errno::EINVAL),
        "GETPARAM on vgem says {unknown:?}"
    );

    let mut caps = virtio_gpu::GetCaps {
        cap_set_id: 1,
        cap_set_ver: 1,
        addr: PRESENT,
        size: 4096,
        ..Default::default()
    };
    let call = file.perform(virtio_gpu::GET_CAPS, &mut caps, &[&[0xee; 4096]])?;
    let bytes = call.array(offset(virtio_gpu::GetCaps::SCHEMA, "addr"));
    let native = find("virtio_gpu", Node::Render)?.virtgpu_capabilities(1, 1, 308)?;
    ensure!(
        bytes.get(..308) == Some(&native[..]),
        "the capset differs from the native one"
    );
    ensure!(
        bytes.ends_with(&[0xee; 64]),
        "bytes beyond the capset were touched"
    );
    Ok(())
}

/// Two NOPs of virgl.
const COMMANDS: &[u8] = &[0; 8];

fn submit(file: &File, flags: u32, size: u16) -> Result<(Call, Result<i32, Errno>), Errno> {
    let argument = virtio_gpu::Execbuffer {
        flags,
        size: 8,
        command: PRESENT,
        ..Default::default()
    };
    let bytes = &argument.as_bytes()[..size.into()];
    let command = command::with_size(virtio_gpu::EXECBUFFER, size);
    let mut call = file.prepare(command, bytes, &[COMMANDS])?;
    let result = file.host.ioctl(&mut call, &Cancel::new());
    Ok((call, result))
}

fn submissions() -> Result<(), Failure> {
    let before = descriptors()?;
    {
        let file = File::open("virtio_gpu", Node::Render)?;
        for size in [32, 40, virtio_gpu::Execbuffer::SCHEMA.size] {
            let (_, plain) = submit(&file, 0, size)?;
            ensure!(plain == Ok(0), "a form of {size} bytes: {plain:?}");
            let (call, fenced) = submit(&file, virtio_gpu::exec::FENCE_FD_OUT, size)?;
            ensure!(
                fenced == Ok(0),
                "a form of {size} bytes with a fence: {fenced:?}"
            );
            let fence = given(&call)?;
            let limit = Some(Duration::from_secs(5));
            let ready = fence.poll(1, limit, &Cancel::new())?;
            ensure!(ready == 1, "the fence says {ready:#x}");
        }
    }
    let after = descriptors()?;
    ensure!(
        after == before,
        "{before} descriptors before, {after} after"
    );
    Ok(())
}

/// A sync file of the kernel.
struct SyncFile(OwnedFd);

impl HostObject for SyncFile {
    fn poll(&self, _: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        Err(Errno::EINVAL)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// A dma-buf that is busy until its fence is signaled, 10 seconds at most.
fn busy_buffer(file: &File) -> Result<(Arc<dyn HostObject>, u32), Failure> {
    let (dumb, _) = file.dumb()?;
    let dma_buf = file.export(dumb.handle)?;
    let mut attach = vgem::FenceAttach {
        handle: dumb.handle,
        flags: vgem::FENCE_WRITE,
        ..Default::default()
    };
    file.perform(vgem::FENCE_ATTACH, &mut attach, &[])?;
    Ok((dma_buf, attach.out_fence))
}

fn signal(file: &File, fence: u32) -> Result<(), Errno> {
    let mut signal = vgem::FenceSignal {
        fence,
        ..Default::default()
    };
    file.perform(vgem::FENCE_SIGNAL, &mut signal, &[]).map(drop)
}

fn cancelled_submission() -> Result<(), Failure> {
    let vgem = File::open("vgem", Node::Card)?;
    let mut gpu = File::open("virtio_gpu", Node::Render)?;
    let (dma_buf, fence) = busy_buffer(&vgem)?;
    let fd = dma_buf.fd().ok_or("the dma-buf has no descriptor")?;
    gpu.objects.push(Arc::new(SyncFile(export_sync_file(fd)?)));
    let argument = virtio_gpu::Execbuffer {
        flags: virtio_gpu::exec::FENCE_FD_IN,
        size: 8,
        command: PRESENT,
        ..Default::default()
    };
    let mut call = gpu.prepare(virtio_gpu::EXECBUFFER, argument.as_bytes(), &[COMMANDS])?;
    ensure!(call.may_block(), "the schema says that it never waits");
    let result = cancelled(|cancel| gpu.host.ioctl(&mut call, cancel))?;
    ensure!(result == Err(Errno::EINTR), "it ended with {result:?}");
    let back: virtio_gpu::Execbuffer = call.read_argument();
    ensure!((back.fence_fd, back.command) == (-1, PRESENT), "{back:?}");
    // The same call goes through once the fence is signaled.
    signal(&vgem, fence)?;
    let result = gpu.host.ioctl(&mut call, &Cancel::new());
    ensure!(
        result == Ok(0),
        "with its fence signaled it ended with {result:?}"
    );
    let again = signal(&vgem, fence);
    ensure!(
        again == Err(Errno::ENOENT),
        "signaling twice gave {again:?}"
    );
    Ok(())
}

fn cancelled_poll() -> Result<(), Failure> {
    const IN: u32 = 1;
    let file = File::open("vgem", Node::Card)?;
    let (dma_buf, fence) = busy_buffer(&file)?;
    let now = dma_buf.poll(IN, Some(Duration::ZERO), &Cancel::new());
    ensure!(now == Ok(0), "a busy buffer is ready: {now:?}");
    let short = dma_buf.poll(IN, Some(Duration::from_millis(50)), &Cancel::new());
    ensure!(short == Ok(0), "a busy buffer is ready: {short:?}");
    let result = cancelled(|cancel| dma_buf.poll(IN, None, cancel))?;
    ensure!(result == Err(Errno::EINTR), "it ended with {result:?}");
    signal(&file, fence)?;
    let ready = dma_buf.poll(IN, Some(Duration::from_secs(5)), &Cancel::new());
    ensure!(ready == Ok(IN), "with its fence signaled it says {ready:?}");
    Ok(())
}

fn watched_buffer() -> Result<(), Failure> {
    const IN: u32 = 1;
    let before = descriptors()?;
    {
        let path = find("vgem", Node::Card)?.path;
        let mut file = LoopbackFile::open(Arc::new(DrmDriver::new(path)?))?;
        let mut dumb = vgem::CreateDumb {
            width: 64,
            height: 16,
            bpp: 32,
            ..Default::default()
        };
        file.ioctl(vgem::CREATE_DUMB, &mut dumb)?;
        let mut export = core::PrimeHandleToFd {
            handle: dumb.handle,
            ..Default::default()
        };
        file.ioctl(core::PRIME_HANDLE_TO_FD, &mut export)?;
        let mut attach = vgem::FenceAttach {
            handle: dumb.handle,
            flags: vgem::FENCE_WRITE,
            ..Default::default()
        };
        file.ioctl(vgem::FENCE_ATTACH, &mut attach)?;
        for id in [1 << 40, 2 << 40, 3 << 40] {
            let ready = file.watch(id, export.fd, IN)?;
            ensure!(ready == 0, "a busy buffer is ready: {ready:#x}");
        }
        file.cancel(2 << 40)?;
        let event = file.event();
        ensure!(event == (2 << 40, 0), "the cancelled watch says {event:x?}");
        file.close_fd(export.fd)?;
        thread::sleep(Duration::from_millis(50));
        ensure!(!file.has_event(), "an event before the fence is signaled");
        let mut signal = vgem::FenceSignal {
            fence: attach.out_fence,
            ..Default::default()
        };
        file.ioctl(vgem::FENCE_SIGNAL, &mut signal)?;
        let mut events = [file.event(), file.event()];
        events.sort_unstable();
        let expected = [(1 << 40, IN), (3 << 40, IN)];
        ensure!(events == expected, "the events are {events:x?}");
        ensure!(!file.has_event(), "one event too many");
        // What is still watched goes with the session.
        file.ioctl(core::PRIME_HANDLE_TO_FD, &mut export)?;
        file.ioctl(vgem::FENCE_ATTACH, &mut attach)?;
        let ready = file.watch(1 << 40, export.fd, IN)?;
        ensure!(ready == 0, "a buffer that is busy again is ready");
    }
    let after = descriptors()?;
    ensure!(
        after == before,
        "{before} descriptors before, {after} after"
    );
    Ok(())
}

fn watched_submission() -> Result<(), Failure> {
    const IN: u32 = 1;
    let path = find("virtio_gpu", Node::Render)?.path;
    let mut file = LoopbackFile::open(Arc::new(DrmDriver::new(path)?))?;
    for id in 1..=20 {
        let mut submit = virtio_gpu::Execbuffer {
            flags: virtio_gpu::exec::FENCE_FD_OUT,
            size: 8,
            command: COMMANDS.as_ptr().expose_provenance() as u64,
            ..Default::default()
        };
        file.ioctl(virtio_gpu::EXECBUFFER, &mut submit)?;
        let ready = file.watch(id << 40, submit.fence_fd, IN)?;
        let event = match ready {
            0 => file.event(),
            ready => (id << 40, ready),
        };
        ensure!(event == (id << 40, IN), "submission {id} says {event:x?}");
        file.close_fd(submit.fence_fd)?;
    }
    Ok(())
}

fn synchronization_objects() -> Result<(), Failure> {
    let file = File::open("virtio_gpu", Node::Render)?;
    let mut capability = core::GetCap {
        capability: core::cap::SYNCOBJ,
        ..Default::default()
    };
    file.perform(core::GET_CAP, &mut capability, &[])?;
    let mut create = core::SyncobjCreate::default();
    let created = file
        .perform(core::SYNCOBJ_CREATE, &mut create, &[])
        .map(drop);
    if capability.value == 0 {
        // virtio_gpu has them since Linux 6.6.
        ensure!(
            created == Err(Errno::EOPNOTSUPP),
            "without them CREATE gives {created:?}"
        );
        return Ok(());
    }
    created?;
    let wait = core::SyncobjWait {
        handles: PRESENT,
        count_handles: 1,
        flags: core::syncobj::WAIT_FOR_SUBMIT,
        ..Default::default()
    };
    let handles = create.handle.to_ne_bytes();
    let result = file
        .perform(core::SYNCOBJ_WAIT, &mut wait.clone(), &[&handles])
        .map(drop);
    ensure!(result == Err(Errno::ETIME), "asking gives {result:?}");
    // The kernel counts in its ticks, of which an emulated machine gets some late and together.
    let start = Instant::now();
    let mut soon = core::SyncobjWait {
        timeout_nsec: 200_000_000,
        ..wait
    };
    let result = file
        .perform(core::SYNCOBJ_WAIT, &mut soon, &[&handles])
        .map(drop);
    ensure!(result == Err(Errno::ETIME), "waiting gives {result:?}");
    ensure!(
        start.elapsed() >= Duration::from_millis(100),
        "it waited {:?}",
        start.elapsed()
    );
    let ever = core::SyncobjWait {
        timeout_nsec: i64::MAX,
        ..wait
    };
    let mut call = file.prepare(core::SYNCOBJ_WAIT, ever.as_bytes(), &[&handles])?;
    let result = cancelled(|cancel| file.host.ioctl(&mut call, cancel))?;
    ensure!(result == Err(Errno::EINTR), "it ended with {result:?}");
    let mut array = core::SyncobjArray {
        handles: PRESENT,
        count_handles: 1,
        ..Default::default()
    };
    file.perform(core::SYNCOBJ_SIGNAL, &mut array, &[&handles])?;
    file.perform(core::SYNCOBJ_WAIT, &mut soon, &[&handles])?;
    let mut export = core::SyncobjHandleToFd {
        handle: create.handle,
        flags: core::syncobj::EXPORT_SYNC_FILE,
        ..Default::default()
    };
    let call = file.perform(core::SYNCOBJ_HANDLE_TO_FD, &mut export, &[])?;
    let ready = given(&call)?.poll(1, Some(Duration::from_secs(5)), &Cancel::new());
    ensure!(ready == Ok(1), "a signaled sync file says {ready:?}");
    Ok(())
}

/// Each ioctl with a handle, with one that does not exist. Synchronization objects count where the kernel has them.
fn unknown_handles() -> Result<(), Failure> {
    const UNKNOWN: u32 = 0xdead;
    let mut seen = 0;
    for (name, node) in [("vgem", Node::Card), ("virtio_gpu", Node::Render)] {
        let file = File::open(name, node)?;
        let mut capability = core::GetCap {
            capability: core::cap::SYNCOBJ_TIMELINE,
            ..Default::default()
        };
        file.perform(core::GET_CAP, &mut capability, &[])?;
        let mut spaces = vec![Space::Gem];
        if capability.value != 0 {
            spaces.push(Space::Syncobj);
        }
        for ioctl in family::of_driver(name)
            .iter()
            .flat_map(|family| family.ioctls)
        {
            for field in ioctl.argument.fields {
                let mut argument = vec![0u8; ioctl.argument.size.into()];
                let mut arrays: Vec<&[u8]> = Vec::new();
                let handles = UNKNOWN.to_ne_bytes();
                let (space, unknown) = match *field.kind(ioctl.argument, &argument) {
                    Kind::Handle { space, unknown } | Kind::ClosedHandle { space, unknown } => {
                        field.write(&mut argument, UNKNOWN.into());
                        (space, unknown)
                    }
                    Kind::Pointer(pointer) => {
                        let Element::Handles { space, unknown } = pointer.element else {
                            continue;
                        };
                        let pvgpu_protocol::schema::Count::Field(count) = pointer.count else {
                            continue;
                        };
                        field.write(&mut argument, PRESENT);
                        let count = ioctl
                            .argument
                            .fields
                            .iter()
                            .find(|field| field.offset == count);
                        count.ok_or("no count")?.write(&mut argument, 1);
                        arrays.push(&handles);
                        (space, unknown)
                    }
                    _ => continue,
                };
                if !spaces.contains(&space) {
                    continue;
                }
                let mut call = match file.prepare(ioctl.command, &argument, &arrays) {
                    Ok(call) => call,
                    // An eventfd or another array that must be there too.
                    Err(Errno::EBADF | Errno::EFAULT) => continue,
                    Err(error) => return Err(format!("{}: {error}", ioctl.name).into()),
                };
                let result = file.host.ioctl(&mut call, &Cancel::new());
                ensure!(
                    result == Err(unknown),
                    "{} of {name} with an unknown `{}` gives {result:?}, the schema says {unknown}",
                    ioctl.name,
                    field.name
                );
                seen += 1;
            }
        }
    }
    // GEM handles: two in the core for each driver, three of vgem, six of virtio_gpu.
    ensure!(seen >= 13, "only {seen} handles were tried");
    Ok(())
}
