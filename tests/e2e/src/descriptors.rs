//! Checks of the file descriptors that a DRM node gives and takes: dma-bufs, sync files, syncobj files, and poll and read of
//! the node itself. `node-descriptors` runs them natively in L1 and on pvgpu's node in L2; they hold on both.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::{core, soft, vgem, virtio_gpu};
use pvgpu_scenarios::DeviceFile;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromBytes, IntoBytes};

use crate::drm_ioctl::{self, Kind, Mapping, Node};
use crate::{ensure, modules, syscall};

pub mod calls;

/// Why a check failed.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A sentence with underscores, and the check of it.
pub type Check = (&'static str, fn(&Gpu) -> Result<(), Failure>);

/// On every driver.
const BUFFERS: &[Check] = &[
    ("a_dma_buf_is_as_long_as_its_buffer", length),
    ("a_dma_buf_is_open_as_its_flags_say", flags),
    (
        "two_processes_share_memory_through_a_dma_buf",
        shared_memory,
    ),
    (
        "a_buffer_that_is_imported_twice_has_one_handle",
        imported_twice,
    ),
    ("a_dma_buf_outlives_its_handle_and_its_node", outlives),
    ("descriptors_of_another_sort_are_refused", wrong_descriptors),
    ("syncobjs_pass_between_processes_or_are_refused", syncobjs),
    ("polling_a_node_without_events_takes_its_time", idle_node),
    ("a_node_without_events_has_nothing_to_read", nothing_to_read),
];

/// Where a submission gives a fence.
const FENCES: &[Check] = &[
    ("who_polls_a_fence_sees_it_signal", polled_fence),
    ("who_asks_for_a_fences_status_sees_it_signal", asked_fence),
    ("a_submission_waits_for_any_sync_file", fences_in),
    (
        "hundreds_of_fences_that_nobody_waits_for_cost_nothing",
        dropped_fences,
    ),
    ("threads_wait_for_fences_and_close_them_at_once", threads),
];

/// Where fences can be told to signal late.
const VGEM: &[Check] = &[("the_processor_waits_for_the_fences_of_a_buffer", cpu_access)];

/// Where submissions can be made that do not end soon.
const LATE: &[Check] = &[
    ("a_late_fence_keeps_its_pollers_waiting", late_fence),
    (
        "late_fences_can_be_closed_and_their_holders_killed",
        abandoned_fences,
    ),
    (
        "more_late_fences_than_the_host_watches_at_a_time_all_signal",
        many_late_fences,
    ),
];

/// On pvgpu's node alone; the last one takes the device away.
const GUEST: &[Check] = &[("the_module_stays_while_a_descriptor_is_open", module_in_use)];
/// The same where fences can be late.
const GUEST_LATE: &[Check] = &[
    (
        "the_module_stays_while_a_fence_is_open",
        module_in_use_by_fence,
    ),
    (
        "a_fence_of_a_device_that_is_gone_signals_an_error",
        lost_device,
    ),
];

/// The GPU under test.
pub struct Gpu {
    /// Its driver's name.
    pub driver: String,
}

/// A buffer of [`SIZE`] bytes.
struct Buffer {
    handle: u32,
    mapping: Mapping,
}

/// Of each buffer: 128 by 128 pixels.
const SIZE: usize = 128 * 128 * 4;
/// For what is to happen.
const SOON: Duration = Duration::from_secs(20);
/// For what is not to happen.
const WHILE: Duration = Duration::from_millis(100);

/// Runs all checks for the driver, those of a guest too if it is one, and says how each ended. The number of failures.
pub fn run(gpu: &Gpu, guest: bool) -> usize {
    let driver = gpu.driver.as_str();
    let mut checks = BUFFERS.to_vec();
    match driver {
        "vgem" => checks.extend(VGEM),
        "soft" => checks.extend(FENCES.iter().chain(LATE)),
        _ => checks.extend(FENCES),
    }
    if guest {
        checks.extend(GUEST);
        if driver == "soft" {
            checks.extend(GUEST_LATE);
        }
    }
    let mut failed = 0;
    for (name, check) in checks {
        match check(gpu) {
            Ok(()) => println!("ok {name}"),
            Err(failure) => {
                failed += 1;
                println!("FAILED {name}: {failure}");
            }
        }
    }
    failed
}

/// An error if they differ.
fn same<T: PartialEq + Debug>(what: &str, found: T, expected: T) -> Result<(), Failure> {
    ensure!(found == expected, "{what} is {found:?}, not {expected:?}");
    Ok(())
}

fn failed(step: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| format!("{step}: {errno}").into()
}

/// Issues an ioctl and gives the argument back.
fn ioctl<T: FromBytes + IntoBytes>(
    node: &mut Node,
    step: &'static str,
    command: u32,
    mut argument: T,
) -> Result<T, Failure> {
    node.ioctl(command, &mut argument).map_err(failed(step))?;
    Ok(argument)
}

impl Gpu {
    fn open(&self) -> io::Result<Node> {
        let kind = match self.driver.as_str() {
            "vgem" => Kind::Card,
            _ => Kind::Render,
        };
        drm_ioctl::find(&self.driver, kind)
    }

    fn buffer(&self, node: &mut Node) -> Result<Buffer, Failure> {
        let (handle, offset) = match self.driver.as_str() {
            "vgem" => {
                let size = vgem::CreateDumb {
                    width: 128,
                    height: 128,
                    bpp: 32,
                    ..Default::default()
                };
                let handle = ioctl(node, "CREATE_DUMB", vgem::CREATE_DUMB, size)?.handle;
                let map = vgem::MapDumb {
                    handle,
                    ..Default::default()
                };
                (handle, ioctl(node, "MAP_DUMB", vgem::MAP_DUMB, map)?.offset)
            }
            "soft" => {
                let size = soft::GemCreate {
                    size: SIZE as u64,
                    ..Default::default()
                };
                let create = soft::DRM_IOCTL_SOFT_GEM_CREATE;
                let handle = ioctl(node, "GEM_CREATE", create, size)?.handle;
                let map = soft::GemMmap {
                    handle,
                    ..Default::default()
                };
                let map = ioctl(node, "GEM_MMAP", soft::DRM_IOCTL_SOFT_GEM_MMAP, map)?;
                (handle, map.offset)
            }
            _ => {
                let size = virtio_gpu::ResourceCreate {
                    target: 2,
                    format: 67,
                    bind: 1 << 3,
                    width: 128,
                    height: 128,
                    depth: 1,
                    array_size: 1,
                    size: SIZE as u32,
                    ..Default::default()
                };
                let create = virtio_gpu::RESOURCE_CREATE;
                let handle = ioctl(node, "RESOURCE_CREATE", create, size)?.bo_handle;
                let map = virtio_gpu::Map {
                    handle,
                    ..Default::default()
                };
                (handle, ioctl(node, "MAP", virtio_gpu::MAP, map)?.offset)
            }
        };
        let mapping = Node::map(node, offset, SIZE)?;
        Ok(Buffer { handle, mapping })
    }

    /// Submits commands that do nothing, behind the fence `after`, and gives their fence.
    fn submit(&self, node: &mut Node, after: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Failure> {
        self.submit_with(node, &[], after)
    }

    /// As [`Gpu::submit`], with the handles of buffers that the commands may use.
    fn submit_with(
        &self,
        node: &mut Node,
        buffers: &[u32],
        after: Option<BorrowedFd<'_>>,
    ) -> Result<OwnedFd, Failure> {
        let count = u32::try_from(buffers.len())?;
        let buffers = buffers.as_ptr().expose_provenance() as u64;
        let fence_in = after.map_or(-1, |fence| fence.as_raw_fd());
        let words = [0u32; 2];
        let commands = words.as_ptr().expose_provenance() as u64;
        let fence = match self.driver.as_str() {
            "soft" => {
                let submit = soft::Submit {
                    flags: soft::SUBMIT_FENCE_FD_OUT
                        | after.map_or(0, |_| soft::SUBMIT_FENCE_FD_IN),
                    buffers,
                    buffer_count: count,
                    fence_fd: fence_in,
                    ..Default::default()
                };
                ioctl(node, "SUBMIT", soft::DRM_IOCTL_SOFT_SUBMIT, submit)?.fence_fd
            }
            _ => {
                let flags = virtio_gpu::exec::FENCE_FD_OUT
                    | after.map_or(0, |_| virtio_gpu::exec::FENCE_FD_IN);
                let submit = virtio_gpu::Execbuffer {
                    flags,
                    size: 8,
                    command: commands,
                    bo_handles: buffers,
                    num_bo_handles: count,
                    fence_fd: fence_in,
                    ..Default::default()
                };
                ioctl(node, "EXECBUFFER", virtio_gpu::EXECBUFFER, submit)?.fence_fd
            }
        };
        Ok(calls::take(fence)?)
    }

    /// Without an aperture, what was written to a mapping reaches the buffer, and what was written elsewhere comes from there, when
    /// the GPU is told of the buffer and waited for (`docs/architecture.md`). Otherwise there is one memory.
    fn synchronize(&self, node: &mut Node, handle: u32) -> Result<(), Failure> {
        if modules::has_aperture()? {
            return Ok(());
        }
        drop(self.submit_with(node, &[handle], None)?);
        match self.driver.as_str() {
            "soft" => {
                let wait = soft::Wait {
                    deadline_ns: i64::MAX,
                    handle,
                    flags: soft::WAIT_BUFFER,
                    ..Default::default()
                };
                ioctl(node, "WAIT", soft::DRM_IOCTL_SOFT_WAIT, wait).map(drop)
            }
            _ => {
                let wait = virtio_gpu::Wait { handle, flags: 0 };
                ioctl(node, "WAIT", virtio_gpu::WAIT, wait).map(drop)
            }
        }
    }

    /// Starts this program again as `--child WHAT`, with one end of a socket as its standard input.
    fn child(&self, what: &str) -> Result<(UnixStream, Child), Failure> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(SOON))?;
        let child = Command::new("/proc/self/exe")
            .args(["--driver", &self.driver, "--child", what])
            .stdin(OwnedFd::from(theirs))
            .spawn()?;
        Ok((ours, child))
    }
}

/// Submits, to the soft GPU, commands that never end; it resets itself after some seconds.
pub fn hang(node: &mut Node) -> Result<OwnedFd, Failure> {
    let mut room = [0; 64];
    let mut stream = soft::Stream::new(&mut room);
    let hang = soft::Hang::default();
    stream
        .push(0, &hang)
        .map_err(failed("write the commands"))?;
    let commands = stream.bytes();
    let submit = soft::Submit {
        commands: commands.as_ptr().expose_provenance() as u64,
        commands_size: commands.len() as u32,
        flags: soft::SUBMIT_FENCE_FD_OUT,
        ..Default::default()
    };
    let submit = ioctl(node, "SUBMIT", soft::DRM_IOCTL_SOFT_SUBMIT, submit)?;
    Ok(calls::take(submit.fence_fd)?)
}

const OPEN: u32 = core::prime::CLOEXEC | core::prime::RDWR;

fn export(node: &mut Node, handle: u32, flags: u32) -> Result<OwnedFd, Failure> {
    let export = core::PrimeHandleToFd {
        handle,
        flags,
        fd: -1,
    };
    let export = ioctl(node, "PRIME_HANDLE_TO_FD", core::PRIME_HANDLE_TO_FD, export)?;
    Ok(calls::take(export.fd)?)
}

fn import(node: &mut Node, fd: i32) -> Result<u32, Errno> {
    let mut import = core::PrimeFdToHandle {
        fd,
        ..Default::default()
    };
    node.ioctl(core::PRIME_FD_TO_HANDLE, &mut import)?;
    Ok(import.handle)
}

fn close(node: &mut Node, handle: u32) -> Result<(), Failure> {
    let close = core::GemClose { handle, pad: 0 };
    ioctl(node, "GEM_CLOSE", core::GEM_CLOSE, close).map(drop)
}

/// What a buffer is filled with.
fn pattern(seed: u8) -> Vec<u8> {
    (0..SIZE)
        .map(|index| (index * 31 / 7) as u8 ^ seed)
        .collect()
}

fn holds(mapping: &Mapping, seed: u8) -> bool {
    let mut bytes = vec![0; SIZE];
    pvgpu_scenarios::Mapping::read(mapping, 0, &mut bytes);
    bytes == pattern(seed)
}

fn fill(mapping: &mut Mapping, seed: u8) {
    pvgpu_scenarios::Mapping::write(mapping, 0, &pattern(seed));
}

fn ended(child: &mut Child) -> Result<(), Failure> {
    let status = child.wait()?;
    ensure!(status.success(), "the other process ended with {status}");
    Ok(())
}

// --- dma-bufs ---

fn length(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    same("the size", calls::size(dma_buf.as_fd())?, SIZE as u64)?;
    let beyond = Mapping::new(dma_buf.as_fd(), SIZE as u64, 4096);
    let error = beyond.err().and_then(|error| error.raw_os_error());
    same("mapping beyond the end", error, Some(libc::EINVAL))
}

fn flags(gpu: &Gpu) -> Result<(), Failure> {
    for (flags, access) in [
        (0, libc::O_RDONLY),
        (core::prime::CLOEXEC, libc::O_RDONLY),
        (core::prime::RDWR, libc::O_RDWR),
        (OPEN, libc::O_RDWR),
    ] {
        let mut node = gpu.open()?;
        let buffer = gpu.buffer(&mut node)?;
        let dma_buf = export(&mut node, buffer.handle, flags)?;
        let of_file = calls::fcntl(dma_buf.as_fd(), libc::F_GETFL, 0)? & libc::O_ACCMODE;
        same("the access mode", of_file, access)?;
        let of_fd = calls::fcntl(dma_buf.as_fd(), libc::F_GETFD, 0)?;
        let close = i32::from(flags & core::prime::CLOEXEC != 0) * libc::FD_CLOEXEC;
        same("close-on-exec", of_fd, close)?;
        let written = Mapping::new(dma_buf.as_fd(), 0, SIZE);
        let error = written.err().and_then(|error| error.raw_os_error());
        let expected = (access == libc::O_RDONLY).then_some(libc::EACCES);
        same("mapping it to be written", error, expected)?;
    }
    Ok(())
}

fn shared_memory(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let mut buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    fill(&mut buffer.mapping, 1);
    gpu.synchronize(&mut node, buffer.handle)?;
    let (socket, mut child) = gpu.child("memory")?;
    socket.send_with_fd(&[0u8][..], dma_buf.as_raw_fd())?;
    drop(dma_buf);
    ended(&mut child)?;
    gpu.synchronize(&mut node, buffer.handle)?;
    ensure!(
        holds(&buffer.mapping, 2),
        "what the other process has written is not there"
    );
    Ok(())
}

/// The other process of [`shared_memory`]: sees the first pattern in what it is sent, writes the second one through the node.
fn child_memory(gpu: &Gpu, sent: &File) -> Result<(), Failure> {
    let mapping = Mapping::new(sent.as_fd(), 0, SIZE)?;
    ensure!(
        holds(&mapping, 1),
        "the dma-buf does not hold what was written"
    );
    let mut node = gpu.open()?;
    import(&mut node, sent.as_raw_fd()).map_err(failed("PRIME_FD_TO_HANDLE"))?;
    let mut mapping = mapping;
    calls::dma_buf_sync(sent.as_fd(), calls::sync::WRITE)?;
    fill(&mut mapping, 2);
    calls::dma_buf_sync(sent.as_fd(), calls::sync::WRITE | calls::sync::END)?;
    Ok(())
}

fn imported_twice(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    let fd = dma_buf.as_raw_fd();
    same(
        "imported where it is from",
        import(&mut node, fd),
        Ok(buffer.handle),
    )?;
    let mut other = gpu.open()?;
    let first = import(&mut other, fd).map_err(failed("PRIME_FD_TO_HANDLE"))?;
    same("imported again", import(&mut other, fd), Ok(first))?;
    let again = export(&mut other, first, OPEN)?;
    let fd = again.as_raw_fd();
    same(
        "exported and imported again",
        import(&mut other, fd),
        Ok(first),
    )?;
    same("and at home", import(&mut node, fd), Ok(buffer.handle))
}

fn outlives(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let Buffer {
        handle,
        mut mapping,
    } = gpu.buffer(&mut node)?;
    fill(&mut mapping, 3);
    let dma_buf = export(&mut node, handle, OPEN)?;
    drop(mapping);
    close(&mut node, handle)?;
    let gone = node.ioctl(
        core::PRIME_HANDLE_TO_FD,
        &mut core::PrimeHandleToFd {
            handle,
            flags: OPEN,
            fd: -1,
        },
    );
    same("exporting the closed handle", gone, Err(Errno::ENOENT))?;
    drop(node);
    let mapping = Mapping::new(dma_buf.as_fd(), 0, SIZE)?;
    drop(dma_buf);
    ensure!(holds(&mapping, 3), "its memory was lost");
    Ok(())
}

fn wrong_descriptors(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let null = File::open("/dev/null")?;
    let closed = {
        let file = File::open("/dev/null")?;
        file.as_raw_fd()
    };
    let other = gpu.open()?;
    same(
        "a file as a dma-buf",
        import(&mut node, null.as_raw_fd()),
        Err(Errno::EINVAL),
    )?;
    same(
        "a node as a dma-buf",
        import(&mut node, other.as_fd().as_raw_fd()),
        Err(Errno::EINVAL),
    )?;
    same(
        "a closed descriptor",
        import(&mut node, closed),
        Err(Errno::EBADF),
    )?;
    same("no descriptor", import(&mut node, -1), Err(Errno::EBADF))?;
    let buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    match gpu.driver.as_str() {
        "vgem" => {}
        "soft" => {
            let mut submit = soft::Submit {
                flags: soft::SUBMIT_FENCE_FD_IN,
                fence_fd: dma_buf.as_raw_fd(),
                ..Default::default()
            };
            let result = node.ioctl(soft::DRM_IOCTL_SOFT_SUBMIT, &mut submit);
            same("a dma-buf as a fence", result, Err(Errno::EINVAL))?;
        }
        _ => {
            let mut submit = virtio_gpu::Execbuffer {
                flags: virtio_gpu::exec::FENCE_FD_IN,
                fence_fd: dma_buf.as_raw_fd(),
                ..Default::default()
            };
            let result = node.ioctl(virtio_gpu::EXECBUFFER, &mut submit);
            same("a dma-buf as a fence", result, Err(Errno::EINVAL))?;
        }
    }
    Ok(())
}

fn cpu_access(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    let attach = vgem::FenceAttach {
        handle: buffer.handle,
        flags: vgem::FENCE_WRITE,
        ..Default::default()
    };
    let fence = ioctl(&mut node, "FENCE_ATTACH", vgem::FENCE_ATTACH, attach)?.out_fence;
    calls::alarm(WHILE)?;
    let interrupted = calls::dma_buf_sync(dma_buf.as_fd(), calls::sync::READ);
    let errno = interrupted.err().and_then(|error| error.raw_os_error());
    same("waiting with a signal", errno, Some(libc::EINTR))?;
    let started = Instant::now();
    thread::scope(|scope| {
        let signal = scope.spawn(|| {
            thread::sleep(WHILE);
            let signal = vgem::FenceSignal { fence, flags: 0 };
            ioctl(&mut node, "FENCE_SIGNAL", vgem::FENCE_SIGNAL, signal).map(drop)
        });
        calls::dma_buf_sync(dma_buf.as_fd(), calls::sync::READ)?;
        let waited = started.elapsed();
        ensure!(waited >= WHILE, "it waited for {waited:?} only");
        signal.join().map_err(|_| "the signaling thread panicked")?
    })?;
    calls::dma_buf_sync(dma_buf.as_fd(), calls::sync::READ | calls::sync::END)?;
    Ok(())
}

// --- syncobjs ---

fn syncobj(node: &mut Node, flags: u32) -> Result<u32, Errno> {
    let mut create = core::SyncobjCreate { handle: 0, flags };
    node.ioctl(core::SYNCOBJ_CREATE, &mut create)?;
    Ok(create.handle)
}

fn syncobj_to_fd(node: &mut Node, handle: u32, flags: u32) -> Result<OwnedFd, Errno> {
    let mut export = core::SyncobjHandleToFd {
        handle,
        flags,
        fd: -1,
        pad: 0,
    };
    node.ioctl(core::SYNCOBJ_HANDLE_TO_FD, &mut export)?;
    calls::take(export.fd).map_err(|_| Errno::EPROTO)
}

fn fd_to_syncobj(node: &mut Node, fd: i32, handle: u32, flags: u32) -> Result<u32, Errno> {
    let mut import = core::SyncobjFdToHandle {
        handle,
        flags,
        fd,
        pad: 0,
    };
    node.ioctl(core::SYNCOBJ_FD_TO_HANDLE, &mut import)?;
    Ok(import.handle)
}

fn wait_syncobj(node: &mut Node, handle: u32, timeout: Duration) -> Result<(), Errno> {
    let handles = [handle];
    let mut wait = core::SyncobjWait {
        handles: handles.as_ptr().expose_provenance() as u64,
        timeout_nsec: (node.now_ns() + timeout.as_nanos() as u64).cast_signed(),
        count_handles: 1,
        flags: core::syncobj::WAIT_FOR_SUBMIT,
        ..Default::default()
    };
    node.ioctl(core::SYNCOBJ_WAIT, &mut wait).map(drop)
}

fn syncobjs(gpu: &Gpu) -> Result<(), Failure> {
    const SYNC_FILE: u32 = core::syncobj::EXPORT_SYNC_FILE;
    let mut node = gpu.open()?;
    let offered = core::GetCap {
        capability: core::cap::SYNCOBJ,
        value: 0,
    };
    if ioctl(&mut node, "GET_CAP", core::GET_CAP, offered)?.value == 0 {
        return same(
            "a syncobj of a driver without",
            syncobj(&mut node, 0),
            Err(Errno::EOPNOTSUPP),
        );
    }
    // As itself, to another process.
    let handle = syncobj(&mut node, 0).map_err(failed("SYNCOBJ_CREATE"))?;
    let fd = syncobj_to_fd(&mut node, handle, 0).map_err(failed("SYNCOBJ_HANDLE_TO_FD"))?;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    same("its name", name.to_str(), Some("anon_inode:syncobj_file"))?;
    let early = wait_syncobj(&mut node, handle, WHILE);
    same("waiting before it is signaled", early, Err(Errno::ETIME))?;
    let (socket, mut child) = gpu.child("syncobj")?;
    socket.send_with_fd(&[0u8][..], fd.as_raw_fd())?;
    wait_syncobj(&mut node, handle, SOON).map_err(failed("SYNCOBJ_WAIT"))?;
    ended(&mut child)?;
    same(
        "a syncobj as a dma-buf",
        import(&mut node, fd.as_raw_fd()),
        Err(Errno::EINVAL),
    )?;
    // Its fence as a sync file, into another one.
    let fence = syncobj_to_fd(&mut node, handle, SYNC_FILE).map_err(failed("export the fence"))?;
    let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
    same("poll of its fence", events, libc::POLLIN)?;
    let other = syncobj(&mut node, 0).map_err(failed("SYNCOBJ_CREATE"))?;
    let none = syncobj_to_fd(&mut node, other, SYNC_FILE).map(drop);
    same("the fence of one without", none, Err(Errno::EINVAL))?;
    fd_to_syncobj(&mut node, fence.as_raw_fd(), other, SYNC_FILE)
        .map_err(failed("import the fence"))?;
    wait_syncobj(&mut node, other, SOON).map_err(failed("SYNCOBJ_WAIT"))?;
    let wrong = fd_to_syncobj(&mut node, fence.as_raw_fd(), 0, 0);
    same("a fence as a syncobj", wrong, Err(Errno::EINVAL))?;
    let wrong = fd_to_syncobj(&mut node, fd.as_raw_fd(), other, SYNC_FILE);
    same("a syncobj as a fence", wrong, Err(Errno::EINVAL))
}

/// The other process of [`syncobjs`]: signals what it is sent.
fn child_syncobj(gpu: &Gpu, sent: &File) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let fd = sent.as_raw_fd();
    let handle = fd_to_syncobj(&mut node, fd, 0, 0).map_err(failed("SYNCOBJ_FD_TO_HANDLE"))?;
    let handles = [handle];
    let signal = core::SyncobjArray {
        handles: handles.as_ptr().expose_provenance() as u64,
        count_handles: 1,
        pad: 0,
    };
    ioctl(&mut node, "SYNCOBJ_SIGNAL", core::SYNCOBJ_SIGNAL, signal).map(drop)
}

// --- sync files ---

fn polled_fence(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let fence = gpu.submit(&mut node, None)?;
    let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
    same("poll", events, libc::POLLIN)?;
    same("its status", calls::status(fence.as_fd())?, 1)?;
    let fence = gpu.submit(&mut node, None)?;
    let events = calls::epoll(fence.as_fd(), libc::EPOLLIN as u32, SOON)?;
    same("epoll", events, libc::EPOLLIN as u32)?;
    let flags = calls::fcntl(fence.as_fd(), libc::F_GETFD, 0)?;
    same("close-on-exec", flags, libc::FD_CLOEXEC)
}

fn asked_fence(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let fence = gpu.submit(&mut node, None)?;
    let started = Instant::now();
    while calls::status(fence.as_fd())? == 0 {
        ensure!(started.elapsed() < SOON, "it never signaled");
        thread::sleep(Duration::from_millis(1));
    }
    same("its status", calls::status(fence.as_fd())?, 1)
}

fn fences_in(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let first = gpu.submit(&mut node, None)?;
    let second = gpu.submit(&mut node, Some(first.as_fd()))?;
    let mut other = gpu.open()?;
    let third = gpu.submit(&mut other, Some(second.as_fd()))?;
    // Maybe signaled already, then the merged one is so from the start.
    let merged = calls::merge(second.as_fd(), third.as_fd())?;
    let fourth = gpu.submit(&mut node, Some(merged.as_fd()))?;
    let events = calls::poll(fourth.as_fd(), libc::POLLIN, SOON)?;
    same("poll of the last one", events, libc::POLLIN)?;
    for (name, fence) in [("first", &first), ("merged", &merged)] {
        let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
        same(
            name,
            (events, calls::status(fence.as_fd())?),
            (libc::POLLIN, 1),
        )?;
    }
    let signaled = calls::merge(first.as_fd(), fourth.as_fd())?;
    same(
        "two that have signaled",
        calls::status(signaled.as_fd())?,
        1,
    )?;
    let last = gpu.submit(&mut node, Some(signaled.as_fd()))?;
    let events = calls::poll(last.as_fd(), libc::POLLIN, SOON)?;
    same("poll behind signaled ones", events, libc::POLLIN)
}

fn dropped_fences(gpu: &Gpu) -> Result<(), Failure> {
    for _ in 0..4 {
        let mut node = gpu.open()?;
        let fences: Result<Vec<_>, _> = (0..100).map(|_| gpu.submit(&mut node, None)).collect();
        drop(fences?);
    }
    polled_fence(gpu)
}

fn threads(gpu: &Gpu) -> Result<(), Failure> {
    let rounds = |thread: u64| {
        let mut node = gpu.open()?;
        let mut last = gpu.submit(&mut node, None)?;
        for round in 0..60 {
            let fence = gpu.submit(&mut node, Some(last.as_fd()))?;
            match (round + thread) % 4 {
                // Closed with nobody interested, just after somebody was, and while it is in another one.
                0 => {}
                1 => drop(calls::poll(fence.as_fd(), libc::POLLIN, Duration::ZERO)?),
                2 => drop(calls::merge(fence.as_fd(), last.as_fd())?),
                _ => {
                    let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
                    same("poll", events, libc::POLLIN)?;
                }
            }
            last = fence;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| scope.spawn(move || rounds(thread)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })
}

fn late_fence(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let quick = gpu.submit(&mut node, None)?;
    let events = calls::poll(quick.as_fd(), libc::POLLIN, SOON)?;
    same("poll of the quick one", events, libc::POLLIN)?;
    let fence = hang(&mut node)?;
    let events = calls::poll(fence.as_fd(), libc::POLLIN, WHILE)?;
    same("poll of the late one", events, 0)?;
    same("its status", calls::status(fence.as_fd())?, 0)?;
    let events = calls::epoll(fence.as_fd(), libc::EPOLLIN as u32, WHILE)?;
    same("epoll", events, 0)?;
    // With another one that has long signaled, it is late still.
    let merged = calls::merge(fence.as_fd(), quick.as_fd())?;
    let events = calls::poll(merged.as_fd(), libc::POLLIN, WHILE)?;
    same("poll of both", events, 0)?;
    let events = calls::poll(merged.as_fd(), libc::POLLIN, SOON)?;
    same("poll of both at last", events, libc::POLLIN)?;
    let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
    same("poll of the late one at last", events, libc::POLLIN)
}

/// More than a host watches at a time; it says that it has no room, and is asked again.
fn many_late_fences(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let mut other = gpu.open()?;
    let mut fences = vec![hang(&mut node)?];
    for _ in 0..150 {
        fences.push(gpu.submit(&mut node, None)?);
        fences.push(gpu.submit(&mut other, None)?);
    }
    for fence in &fences {
        calls::poll(fence.as_fd(), libc::POLLIN, Duration::ZERO)?;
    }
    for fence in &fences {
        let events = calls::poll(fence.as_fd(), libc::POLLIN, SOON)?;
        same("poll at last", events, libc::POLLIN)?;
    }
    Ok(())
}

fn abandoned_fences(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let fence = hang(&mut node)?;
    same("poll", calls::poll(fence.as_fd(), libc::POLLIN, WHILE)?, 0)?;
    let (socket, mut child) = gpu.child("hold")?;
    socket.send_with_fd(&[0u8][..], fence.as_raw_fd())?;
    drop((fence, node));
    // It says so when it polls, and is killed within that.
    let mut ready = [0];
    let count = socket.recv_with_fd(&mut ready)?.0;
    same("the other process's byte", count, 1)?;
    thread::sleep(WHILE);
    child.kill()?;
    child.wait()?;
    polled_fence(gpu)
}

/// The other process of [`abandoned_fences`]: polls what it is sent until it is killed.
fn child_hold(socket: &UnixStream, sent: &File) -> Result<(), Failure> {
    io::Write::write_all(&mut &*socket, &[1])?;
    calls::poll(sent.as_fd(), libc::POLLIN, SOON)?;
    thread::sleep(SOON);
    Ok(())
}

/// What `Gpu::child` has started.
pub fn child(gpu: &Gpu, what: &str) -> Result<(), Failure> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut byte = [0];
    let (_, sent) = socket.recv_with_fd(&mut byte)?;
    let sent = sent.ok_or("no descriptor came")?;
    match what {
        "memory" => child_memory(gpu, &sent),
        "syncobj" => child_syncobj(gpu, &sent),
        "hold" => child_hold(&socket, &sent),
        _ => Err(format!("there is no other process called {what}").into()),
    }
}

// --- the node ---

fn idle_node(gpu: &Gpu) -> Result<(), Failure> {
    let node = gpu.open()?;
    for _ in 0..2 {
        let started = Instant::now();
        same("poll", calls::poll(node.as_fd(), libc::POLLIN, WHILE)?, 0)?;
        same(
            "epoll",
            calls::epoll(node.as_fd(), libc::EPOLLIN as u32, WHILE)?,
            0,
        )?;
        ensure!(started.elapsed() >= 2 * WHILE, "it took no time");
    }
    Ok(())
}

fn nothing_to_read(gpu: &Gpu) -> Result<(), Failure> {
    let node = gpu.open()?;
    let mut bytes = [0; 64];
    let number = |result: io::Result<usize>| result.map_err(|error| error.raw_os_error());
    calls::alarm(WHILE)?;
    let waited = calls::read(node.as_fd(), &mut bytes);
    same(
        "a read with a signal",
        number(waited),
        Err(Some(libc::EINTR)),
    )?;
    let flags = calls::fcntl(node.as_fd(), libc::F_GETFL, 0)?;
    calls::fcntl(node.as_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)?;
    for length in [0, 64] {
        let result = calls::read(node.as_fd(), &mut bytes[..length]);
        same(
            "a read that does not wait",
            number(result),
            Err(Some(libc::EAGAIN)),
        )?;
    }
    Ok(())
}

// --- the guest driver's module and device ---

fn refuses_to_go(what: &str) -> Result<(), Failure> {
    let unloaded = syscall::unload_module(c"pvgpu").is_ok();
    ensure!(!unloaded, "the module was unloaded while {what} was open");
    Ok(())
}

/// Unloads the module and loads it again, as the first process of the guest has.
fn load_again() -> Result<(), Failure> {
    modules::unload_guest_driver()?;
    Ok(modules::load_guest_driver()?)
}

fn module_in_use(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let buffer = gpu.buffer(&mut node)?;
    let dma_buf = export(&mut node, buffer.handle, OPEN)?;
    drop((buffer, node));
    refuses_to_go("a dma-buf")?;
    drop(dma_buf);
    load_again()
}

fn module_in_use_by_fence(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let fence = hang(&mut node)?;
    drop(node);
    refuses_to_go("a sync file")?;
    drop(fence);
    load_again()
}

fn lost_device(gpu: &Gpu) -> Result<(), Failure> {
    let mut node = gpu.open()?;
    let polled = hang(&mut node)?;
    let unasked = gpu.submit(&mut node, None)?;
    same("poll", calls::poll(polled.as_fd(), libc::POLLIN, WHILE)?, 0)?;
    let events = thread::scope(|scope| {
        let poller = scope.spawn(|| calls::poll(polled.as_fd(), libc::POLLIN, SOON));
        thread::sleep(WHILE);
        let folder = std::path::Path::new("/sys/bus/virtio/drivers/pvgpu");
        let device = std::fs::read_dir(folder)?
            .flatten()
            .find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.starts_with("virtio").then_some(name)
            })
            .ok_or("the driver has no device")?;
        std::fs::write(folder.join("unbind"), device)?;
        let events = poller.join().map_err(|_| "the polling thread panicked")?;
        Ok::<_, Failure>(events?)
    })?;
    let lost = -libc::ENODEV;
    let status = calls::status(polled.as_fd())?;
    same("the polled fence", (events, status), (libc::POLLIN, lost))?;
    let events = calls::poll(unasked.as_fd(), libc::POLLIN, SOON)?;
    let status = calls::status(unasked.as_fd())?;
    same("the other fence", (events, status), (libc::POLLIN, lost))?;
    let events = calls::poll(node.as_fd(), libc::POLLIN, SOON)?;
    same("poll of the node", events, libc::POLLERR | libc::POLLHUP)
}
