//! What can be seen without a GPU: refusals, addresses and descriptors that stay here, interruption.
//! The same driver on real nodes is tested in the testbed (`tests/e2e/src/testbed/drm.rs`).

#![allow(unsafe_code)]

use super::*;
use crate::call::Owned;
use pvgpu_protocol::family::{core, virtio_gpu};
use pvgpu_protocol::layout::PRESENT;
use pvgpu_protocol::schema::Space;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;
use zerocopy::IntoBytes;

fn memfd() -> OwnedFd {
    // SAFETY: a C string, and a descriptor that nobody else has.
    unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which nobody else has then.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// A file that owns every handle, in a session with these objects.
struct Owner(Vec<Arc<dyn HostObject>>);

impl Owned for Owner {
    fn owns(&self, _: Space, _: u32) -> bool {
        true
    }

    fn object(&self, id: i32) -> Result<Arc<dyn HostObject>, Errno> {
        let object = usize::try_from(id).ok().and_then(|id| self.0.get(id));
        object.cloned().ok_or(Errno::EBADF)
    }
}

fn call(driver: &str, command: u32, payload: &[u8], objects: Vec<Arc<dyn HostObject>>) -> Call {
    let ioctl = family::find(family::of_driver(driver), command).unwrap();
    Call::new(ioctl, command, payload, &Owner(objects), 1 << 20).unwrap()
}

/// A submission with commands, a buffer and fences both ways.
fn execbuffer(object: Arc<dyn HostObject>) -> Call {
    let mut payload = virtio_gpu::Execbuffer {
        flags: virtio_gpu::exec::FENCE_FD_IN | virtio_gpu::exec::FENCE_FD_OUT,
        size: 8,
        command: PRESENT,
        bo_handles: PRESENT,
        num_bo_handles: 1,
        fence_fd: 0,
        ..Default::default()
    }
    .as_bytes()
    .to_vec();
    payload.extend_from_slice(b"commands");
    payload.extend_from_slice(&7u32.to_le_bytes());
    call("virtio_gpu", virtio_gpu::EXECBUFFER, &payload, vec![object])
}

/// What the argument holds while the kernel has it.
///
/// # Safety
/// `argument` must be the address of an argument in its newest form.
unsafe fn seen(argument: *mut u8) -> virtio_gpu::Execbuffer {
    // SAFETY: the caller's word; `perform_by` keeps it alive and aligned.
    unsafe { argument.cast::<virtio_gpu::Execbuffer>().read() }
}

#[test]
fn the_kernel_gets_addresses_and_descriptors_and_the_guest_gets_none_back() {
    let fence: Arc<dyn HostObject> = Arc::new(DrmObject(memfd()));
    let number = fence.fd().unwrap().as_raw_fd();
    let mut call = execbuffer(Arc::clone(&fence));
    let result = ioctl::perform_by(&mut call, |command, argument| {
        assert_eq!(command, virtio_gpu::EXECBUFFER);
        // SAFETY: an Execbuffer with 8 bytes of commands and one handle.
        unsafe {
            let seen = seen(argument);
            assert_eq!(seen.fence_fd, number);
            let commands = std::ptr::with_exposed_provenance::<[u8; 8]>(seen.command as usize);
            assert_eq!(&commands.read(), b"commands");
            let handles = std::ptr::with_exposed_provenance::<u32>(seen.bo_handles as usize);
            assert_eq!(handles.read(), 7);
            assert_eq!((seen.in_syncobjs, seen.out_syncobjs), (0, 0));
        }
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    });
    assert_eq!(errno(result.unwrap_err()), Errno::EINVAL);
    let back: virtio_gpu::Execbuffer = call.read_argument();
    assert_eq!((back.command, back.bo_handles), (PRESENT, PRESENT));
    assert_eq!((back.in_syncobjs, back.fence_fd), (0, -1));
    // The fence is still the session's: a failed call must not have closed it.
    drop(call);
    assert!(fence.fd().unwrap().try_clone_to_owned().is_ok());
    assert_eq!(Arc::strong_count(&fence), 1);
}

#[test]
fn a_descriptor_that_the_kernel_gives_out_is_closed_with_its_last_reference() {
    let fence: Arc<dyn HostObject> = Arc::new(DrmObject(memfd()));
    let mut call = execbuffer(fence);
    let (made, other) = pipe();
    let made = made.into_raw_fd();
    // SAFETY: clears the only flag of a descriptor that is open.
    unsafe { libc::fcntl(made, libc::F_SETFD, 0) };
    ioctl::perform_by(&mut call, |_, argument| {
        let field = virtio_gpu::Execbuffer::SCHEMA
            .fields
            .iter()
            .find(|field| field.name == "fence_fd");
        // SAFETY: the place of `fence_fd` in an Execbuffer.
        unsafe {
            argument
                .add(field.unwrap().offset.into())
                .cast::<i32>()
                .write_unaligned(made)
        };
        Ok(0)
    })
    .unwrap();
    let field = call.fds_out().next().unwrap();
    let object = call.object(u16::try_from(field).unwrap()).unwrap();
    assert_eq!(object.fd().unwrap().as_raw_fd(), made);
    // SAFETY: asks for the flags of a descriptor that is open.
    let flags = unsafe { libc::fcntl(made, libc::F_GETFD) };
    assert_eq!(
        flags,
        libc::FD_CLOEXEC,
        "a program that this one starts would get it"
    );
    assert_eq!(call.read_argument::<virtio_gpu::Execbuffer>().fence_fd, -1);
    // The write end of a pipe knows whether anybody has the read end.
    let hung_up = |fd: &OwnedFd| {
        poll(
            fd,
            libc::POLLOUT as u32,
            Some(Duration::ZERO),
            &Cancel::new(),
        )
    };
    assert_eq!(hung_up(&other).unwrap() & libc::POLLERR as u32, 0);
    drop(call);
    assert_ne!(hung_up(&other).unwrap() & libc::POLLERR as u32, 0);
}

#[test]
fn an_older_submission_keeps_its_commands() {
    use pvgpu_protocol::schema::command;
    for size in [32, 40] {
        let argument = virtio_gpu::Execbuffer {
            size: 64,
            command: PRESENT,
            ..Default::default()
        };
        let mut payload = argument.as_bytes()[..size].to_vec();
        payload.extend_from_slice(&[0xcc; 64]);
        let command = command::with_size(virtio_gpu::EXECBUFFER, size as u16);
        let mut call = call("virtio_gpu", command, &payload, Vec::new());
        ioctl::perform_by(&mut call, |seen, argument| {
            assert_eq!(seen, command);
            // SAFETY: the older form starts with 8 bytes and the address of 64 bytes of commands.
            unsafe {
                let address = argument.add(8).cast::<u64>().read() as usize;
                let commands = std::ptr::with_exposed_provenance::<[u8; 64]>(address);
                assert_eq!(commands.read(), [0xcc; 64]);
            }
            Ok(0)
        })
        .unwrap();
    }
}

#[test]
fn no_time_of_the_host_goes_back_to_the_guest() {
    let mut payload = core::SyncobjWait {
        handles: PRESENT,
        timeout_nsec: 1_000_000_000,
        count_handles: 1,
        flags: core::syncobj::WAIT_DEADLINE,
        deadline_nsec: 5,
        ..Default::default()
    }
    .as_bytes()
    .to_vec();
    payload.extend_from_slice(&3u32.to_le_bytes());
    let mut call = call("vgem", core::SYNCOBJ_WAIT, &payload, Vec::new());
    let there: core::SyncobjWait = call.read_argument();
    assert!(there.timeout_nsec > 1_000_000_000 && there.deadline_nsec > 5);
    call.publish(|_| Ok(1)).unwrap();
    let back: core::SyncobjWait = call.read_argument();
    assert_eq!((back.timeout_nsec, back.deadline_nsec), (0, 0));
}

#[test]
fn an_object_without_a_descriptor_is_a_bad_one() {
    struct Nothing;
    impl HostObject for Nothing {
        fn poll(&self, _: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
            Ok(0)
        }
    }
    let mut call = execbuffer(Arc::new(Nothing));
    let result = ioctl::perform_by(&mut call, |_, _| panic!("the kernel was called"));
    assert_eq!(errno(result.unwrap_err()), Errno::EBADF);
}

#[test]
fn a_real_ioctl_on_something_else_is_refused_by_the_kernel() {
    let file = DrmFile(memfd());
    let mut version = core::Version {
        name_len: 16,
        name: PRESENT,
        ..Default::default()
    }
    .as_bytes()
    .to_vec();
    version.extend_from_slice(&[0xaa; 16]);
    let mut call = call("vgem", core::VERSION, &version, Vec::new());
    assert_eq!(file.ioctl(&mut call, &Cancel::new()), Err(Errno::ENOTTY));
    assert_eq!(call.read_argument::<core::Version>().name, PRESENT);
}

#[test]
fn what_is_not_a_drm_node_is_refused_with_a_remedy() {
    let says = |path: &str| DrmDriver::new(path).unwrap_err().to_string();
    assert!(says("/dev/dri/no-such-node").starts_with("there is no /dev/dri/no-such-node: "));
    let (reader, _writer) = pipe();
    let memory = memfd();
    for path in [
        "/dev/null".to_owned(),
        "/".to_owned(),
        format!("/proc/self/fd/{}", reader.as_raw_fd()),
        format!("/proc/self/fd/{}", memory.as_raw_fd()),
    ] {
        let error = says(&path);
        assert!(
            error.starts_with(&format!("{path} is not a DRM node: ")),
            "{error}"
        );
        assert!(error.contains("/dev/dri/renderD*") && error.lines().count() == 1);
    }
}

#[test]
fn every_refusal_is_one_line_with_a_remedy() {
    let path = PathBuf::from("/dev/dri/card9");
    let error = || io::Error::from_raw_os_error(libc::EIO);
    for refusal in [
        DrmError::Permission { path: path.clone() },
        DrmError::Unknown {
            path: path.clone(),
            driver: "i915".into(),
            known: "vgem".into(),
        },
        DrmError::Io {
            path,
            error: error(),
        },
        DrmError::Signal {
            signal: 35,
            error: error(),
        },
    ] {
        let text = refusal.to_string();
        assert!(text.contains(": ") && text.lines().count() == 1, "{text}");
    }
}

/// Runs `wait` on a thread, cancels it again and again after a moment, and returns what it gave.
fn cancelled<R: Send>(wait: impl FnOnce(&Cancel) -> R + Send) -> R {
    interrupt::install().unwrap();
    let cancel = Cancel::new();
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| send.send(wait(&cancel)).unwrap());
        assert!(
            receive.recv_timeout(Duration::from_millis(50)).is_err(),
            "it did not wait"
        );
        for _ in 0..1000 {
            cancel.cancel();
            if let Ok(result) = receive.recv_timeout(Duration::from_millis(10)) {
                return result;
            }
        }
        panic!("it did not end");
    })
}

#[test]
fn a_poll_that_waits_for_ever_ends_when_it_is_cancelled() {
    let (reader, _writer) = pipe();
    let file = DrmFile(reader);
    let result = cancelled(|cancel| file.poll(libc::POLLIN as u32, None, cancel));
    assert_eq!(result, Err(Errno::EINTR));
}

#[test]
fn a_read_that_waits_ends_when_it_is_cancelled() {
    let (reader, _writer) = pipe();
    let file = DrmFile(reader);
    let result = cancelled(|cancel| file.read(&mut [0; 16], cancel));
    assert_eq!(result, Err(Errno::EINTR));
}

#[test]
fn a_thread_that_blocks_all_signals_can_be_cancelled_too() {
    let (reader, _writer) = pipe();
    let file = DrmFile(reader);
    let result = cancelled(|cancel| {
        // SAFETY: a full set of signals, for this thread.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        }
        file.poll(libc::POLLIN as u32, None, cancel)
    });
    assert_eq!(result, Err(Errno::EINTR));
}

#[test]
fn a_signal_that_cancels_nothing_ends_no_wait() {
    interrupt::install().unwrap();
    let (reader, writer) = pipe();
    let file = DrmFile(reader);
    let thread_id = Mutex::new(None);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            // SAFETY: always valid to ask.
            *thread_id.lock().unwrap() = Some(unsafe { libc::pthread_self() });
            file.poll(
                libc::POLLIN as u32,
                Some(Duration::from_secs(60)),
                &Cancel::new(),
            )
        });
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(5));
            if let Some(id) = *thread_id.lock().unwrap() {
                // SAFETY: the thread waits for what is written below.
                unsafe { libc::pthread_kill(id, interrupt::signal()) };
            }
        }
        assert!(!waiting.is_finished());
        io::Write::write_all(&mut File::from(writer.try_clone().unwrap()), b"x").unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(libc::POLLIN as u32));
    });
    let mut byte = [0; 4];
    assert_eq!(file.read(&mut byte, &Cancel::new()), Ok(1));
}

#[test]
fn a_poll_is_over_when_its_time_is() {
    let (reader, _writer) = pipe();
    let file = DrmFile(reader);
    let poll = |timeout| file.poll(libc::POLLIN as u32, Some(timeout), &Cancel::new());
    let started = Instant::now();
    assert_eq!(poll(Duration::from_millis(30)), Ok(0));
    assert!(started.elapsed() >= Duration::from_millis(30));
    assert_eq!(poll(Duration::ZERO), Ok(0));
}

#[test]
fn a_mapping_has_a_descriptor_of_its_own() {
    let object = DrmObject(memfd());
    let mapping = object.mapping(8192, 4096, 3).unwrap();
    assert_eq!(mapping.offset, 8192);
    assert_ne!(mapping.fd.as_raw_fd(), object.0.as_raw_fd());
}
