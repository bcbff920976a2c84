//! Guests of the embedded GPU that bring their sessions into a state and go no further: for tests and `cargo xtask soak`,
//! which end the session there and look for what is left.
#![allow(unsafe_code)]

use crate::device_channel::{DeviceHost, SPARE};
use crate::loopback::Loopback;
use pvgpu_guest_driver::channel::Channel;
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{Mapping, ObjectId, Session};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_host_proxy::soft::SoftConfig;
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_FD_TO_HANDLE, PRIME_HANDLE_TO_FD, PrimeFdToHandle, PrimeHandleToFd,
    SYNCOBJ_CREATE, SYNCOBJ_FD_TO_HANDLE, SYNCOBJ_HANDLE_TO_FD, SYNCOBJ_WAIT, SyncobjCreate,
    SyncobjFdToHandle, SyncobjHandleToFd, SyncobjWait, prime, syncobj,
};
use pvgpu_protocol::family::soft::{
    DRM_IOCTL_SOFT_GEM_CREATE, DRM_IOCTL_SOFT_GEM_MMAP, DRM_IOCTL_SOFT_GETPARAM,
    DRM_IOCTL_SOFT_SUBMIT, DRM_IOCTL_SOFT_WAIT, Fill, GemCreate, GemMmap, GetParam, Hang,
    Rectangle, SUBMIT_FENCE_FD_OUT, Stream, Submit, Surface, Wait, param,
};
use pvgpu_protocol::wire::{
    OpenRequest, Operation, PageRange, PollRequest, ReadRequest, RequestHeader, open, protection,
};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

/// How far a guest gets before its session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has said nothing.
    Fresh,
    /// It has said hello.
    Hello,
    /// It has opened files, and closed one.
    Files,
    /// It has buffer objects, and has closed one.
    Buffers,
    /// It has syncobjs.
    Syncobjs,
    /// It has mapped buffers into the aperture, and unmapped one.
    Mapped,
    /// As [`State::Mapped`], with pages of its own, since it has no aperture.
    MappedPages,
    /// It has exported a dma-buf, a sync file and a syncobj, and imported them into another file.
    Exported,
    /// Commands of its are executed.
    Running,
    /// Commands of its hang.
    Hung,
    /// Requests of all kinds that wait do so on worker threads.
    Blocked,
    /// It watches files and fences.
    Watching,
    /// It has canceled requests that wait, and one of them twice.
    Canceled,
    /// It has reached its limits of files, of memory and of requests in flight.
    Limited,
    /// It has sent requests that are refused at every step.
    Refused,
    /// It has sent requests of all kinds at once and awaited none.
    Busy,
}

/// All of them.
pub const STATES: &[State] = &[
    State::Fresh,
    State::Hello,
    State::Files,
    State::Buffers,
    State::Syncobjs,
    State::Mapped,
    State::MappedPages,
    State::Exported,
    State::Running,
    State::Hung,
    State::Blocked,
    State::Watching,
    State::Canceled,
    State::Limited,
    State::Refused,
    State::Busy,
];

/// What the guests may use: little, so that [`State::Limited`] is soon reached.
pub const LIMITS: Limits = Limits {
    message: 16 << 10,
    objects: 12,
    in_flight: 12,
    mapped: 64 << 10,
    memory: 256 << 10,
    handles: 64,
};

/// The GPU for them: no hang is ended by the watchdog, only by the end of its session.
pub const GPU: SoftConfig = SoftConfig {
    memory: 16 << 20,
    buffers: 1024,
    engines: 1,
    watchdog: Duration::from_secs(3600),
    sandbox: Sandbox::On,
};

/// How a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A session without a device is dropped.
    Dropped,
    /// A session without a device is ended while another thread sends requests.
    Interrupted,
    /// The device is reset.
    Reset(Doorbell),
    /// The device is activated once more, then dropped.
    Activated(Doorbell),
    /// The device is dropped.
    DeviceDropped(Doorbell),
}

/// All of them.
pub const ENDS: &[End] = &[
    End::Dropped,
    End::Interrupted,
    End::Reset(Doorbell::Worker),
    End::Reset(Doorbell::Inline),
    End::Activated(Doorbell::Worker),
    End::Activated(Doorbell::Inline),
    End::DeviceDropped(Doorbell::Worker),
    End::DeviceDropped(Doorbell::Inline),
];

/// Opens a session, brings it into that state and ends it there.
pub fn open_and_end(driver: &Arc<dyn HostDriver>, state: State, end: End) -> Result<(), String> {
    let reached = |result: Result<(), Errno>| {
        result.map_err(|errno| format!("cannot reach {state:?} ({end:?}): {errno:?}"))
    };
    let device = |doorbell| {
        let config = DeviceConfig {
            doorbell,
            limits: LIMITS,
            // Threads that do nothing but poll would only slow each other down.
            poll: Duration::from_micros(10),
            ..DeviceConfig::default()
        };
        let aperture = state != State::MappedPages;
        let device = DeviceHost::with_aperture(Arc::clone(driver), config, aperture);
        device.map_err(|error| error.to_string())
    };
    let activate_and_reach = |device: &mut DeviceHost| {
        let channel = device.activate().map_err(|error| error.to_string())?;
        reached(reach(state, channel))
    };
    match end {
        End::Dropped if state == State::MappedPages => {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]);
            let memory = GuestMemoryAtomic::new(memory.map_err(|error| error.to_string())?);
            let session = HostSession::without_aperture(Arc::clone(driver), memory, LIMITS, None);
            let session = session.map_err(|error| error.to_string())?;
            reached(reach(state, Loopback::new(session)))
        }
        End::Dropped => {
            let aperture = Aperture::reserve(1 << 20).map_err(|error| error.to_string())?;
            let driver = Arc::clone(driver);
            let channel = Loopback::watching(driver, Some(Arc::new(aperture)), LIMITS);
            reached(reach(state, channel))
        }
        End::Interrupted => interrupt(driver).map_err(|error| error.to_string()),
        End::Reset(doorbell) => {
            let mut device = device(doorbell)?;
            activate_and_reach(&mut device)?;
            device.reset();
            match device.device().statistics().usage {
                None => Ok(()),
                Some(usage) => Err(format!("after a reset of {state:?} there is {usage:?}")),
            }
        }
        End::Activated(doorbell) => {
            let mut device = device(doorbell)?;
            activate_and_reach(&mut device)?;
            activate_and_reach(&mut device)
        }
        End::DeviceDropped(doorbell) => activate_and_reach(&mut device(doorbell)?),
    }
}

/// Ends a session while another thread opens, polls and closes files in it as fast as it can.
fn interrupt(driver: &Arc<dyn HostDriver>) -> std::io::Result<()> {
    let aperture = Arc::new(Aperture::reserve(1 << 20)?);
    let session = HostSession::new(Arc::clone(driver), Some(aperture), LIMITS);
    let (begin, begun) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let perform = |request: &[u8]| {
                let response = session.perform(request, 4096, || Box::new(|_| ()));
                response.map_or(0, |response| response.result())
            };
            perform(&hello());
            for id in 1.. {
                let file = perform(&open_request(id));
                perform(&poll_request(id + 1000, file, -1));
                perform(&poll_request(id + 2000, file, 0));
                perform(&message(Operation::Close, file, id, &[]));
                begin.send(()).unwrap_or(());
                if file == -Errno::ENODEV.number() || file == -Errno::ENOTCONN.number() {
                    break;
                }
            }
        });
        // The other one is at its second round or later.
        begun.recv().unwrap_or(());
        session.end();
    });
    Ok(())
}

fn message(operation: Operation, object: i32, id: u64, body: &[u8]) -> Vec<u8> {
    let header = RequestHeader::new(operation, object.cast_unsigned(), id);
    [header.as_bytes(), body].concat()
}

fn hello() -> Vec<u8> {
    use pvgpu_protocol::control::{Hello, encode};
    let hello = Hello::new("interrupted");
    let mut record = [0; 64];
    let length = encode(&hello, &mut record).unwrap_or(0);
    message(Operation::Hello, 0, 0, &record[..length])
}

fn open_request(id: u64) -> Vec<u8> {
    let body = OpenRequest {
        flags: open::RDWR.into(),
        reserved: 0.into(),
    };
    message(Operation::Open, 0, id, body.as_bytes())
}

fn poll_request(id: u64, file: i32, timeout_ns: i64) -> Vec<u8> {
    let body = PollRequest {
        events: 1.into(),
        reserved: 0.into(),
        timeout_ns: timeout_ns.into(),
    };
    message(Operation::Poll, file, id, body.as_bytes())
}

/// Bytes of GPU memory that are free, as a guest of its own finds them.
pub fn free_memory(driver: &Arc<dyn HostDriver>) -> Result<u64, Errno> {
    let mut guest = Guest::new(Loopback::watching(Arc::clone(driver), None, LIMITS))?;
    let asked = GetParam {
        param: param::MEMORY_FREE,
        value: 0,
    };
    Ok(guest
        .ioctl(guest.file, DRM_IOCTL_SOFT_GETPARAM, asked)?
        .value)
}

/// A guest with a file.
struct Guest<C: Channel> {
    session: Session<'static, C>,
    caller: Flat,
    file: ObjectId,
}

/// Brings a session into a state, and drops the guest's side of it.
fn reach<C: Channel>(state: State, channel: C) -> Result<(), Errno> {
    match state {
        State::Fresh => return Ok(()),
        State::Hello => return Session::connect(channel, "hello").map(drop),
        _ => {}
    }
    let mut guest = Guest::new(channel)?;
    match state {
        State::Fresh | State::Hello => Ok(()),
        State::Files => guest.files(),
        State::Buffers => guest.buffers(),
        State::Syncobjs => guest.syncobjs(),
        State::Mapped | State::MappedPages => guest.mapped(),
        State::Exported => guest.exported(),
        State::Running => guest.running(),
        State::Hung => guest.hung().map(drop),
        State::Blocked => guest.blocked().map(drop),
        State::Watching => guest.watching(),
        State::Canceled => guest.canceled(),
        State::Limited => guest.limited(),
        State::Refused => guest.refused(),
        State::Busy => guest.busy(),
    }
}

/// An error, unless the result is this one.
fn expect<T>(result: Result<T, Errno>, errno: Errno) -> Result<(), Errno> {
    match result {
        Err(found) if found == errno => Ok(()),
        Err(found) => Err(found),
        Ok(_) => Err(Errno::EPROTO),
    }
}

impl<C: Channel> Guest<C> {
    fn new(channel: C) -> Result<Self, Errno> {
        let mut session = Session::connect(channel, "state")?;
        let file = session.open(open::RDWR)?;
        // SAFETY: every argument in this file lives until its call is answered, or is not touched by the answer of one that
        // is never taken; so does what it points to.
        let caller = unsafe { Flat::new() };
        Ok(Self {
            session,
            caller,
            file,
        })
    }

    fn ioctl<T: IntoBytes + FromBytes>(
        &mut self,
        file: ObjectId,
        command: u32,
        mut argument: T,
    ) -> Result<T, Errno> {
        let address = (&raw mut argument).expose_provenance() as u64;
        self.session
            .ioctl(file, command, address, &mut self.caller)?;
        Ok(argument)
    }

    /// Sends an ioctl and does not wait; gives its id.
    fn start<T: IntoBytes + FromBytes>(
        &mut self,
        command: u32,
        mut argument: T,
    ) -> Result<u64, Errno> {
        let address = (&raw mut argument).expose_provenance() as u64;
        let pending = self
            .session
            .start_ioctl(self.file, command, address, &self.caller)?;
        self.session.channel().doorbell();
        Ok(pending.request.id())
    }

    /// Sends a message as it is, and does not wait.
    fn send(&mut self, bytes: &[u8], room: usize) -> Result<(), Errno> {
        let channel = self.session.channel();
        let slot = channel.begin(bytes.len(), room)?;
        channel.request(&slot).copy_from_slice(bytes);
        channel.submit(&slot, bytes.len())?;
        channel.doorbell();
        Ok(())
    }

    fn buffer(&mut self, size: u64) -> Result<u32, Errno> {
        let wanted = GemCreate {
            size,
            ..Default::default()
        };
        let made = self.ioctl(self.file, DRM_IOCTL_SOFT_GEM_CREATE, wanted)?;
        Ok(made.handle)
    }

    fn syncobj(&mut self) -> Result<u32, Errno> {
        let made = self.ioctl(self.file, SYNCOBJ_CREATE, SyncobjCreate::default())?;
        Ok(made.handle)
    }

    /// Where in the file a buffer is to be mapped.
    fn map_offset(&mut self, handle: u32) -> Result<u64, Errno> {
        let wanted = GemMmap {
            handle,
            ..Default::default()
        };
        let wanted = self.ioctl(self.file, DRM_IOCTL_SOFT_GEM_MMAP, wanted)?;
        Ok(wanted.offset)
    }

    fn map(&mut self, handle: u32, length: u64) -> Result<(), Errno> {
        let offset = self.map_offset(handle)?;
        let access = protection::READ | protection::WRITE;
        self.map_at(offset, length, access).map(drop)
    }

    /// Maps into the aperture, or with pages of a device's guest that nothing else uses.
    fn map_at(&mut self, offset: u64, length: u64, access: u32) -> Result<Mapping, Errno> {
        if !self.session.host().maps_pages {
            return self.session.map(self.file, offset, length, access);
        }
        let pages = PageRange {
            address: SPARE.into(),
            length: length.into(),
        };
        self.session
            .map_pages(self.file, offset, length, access, &[pages])
    }

    /// Submits one command, which may use one buffer; gives the submission with its fence's file descriptor.
    fn submit(
        &mut self,
        flags: u32,
        buffer: Option<u32>,
        write: impl FnOnce(&mut Stream<'_>) -> Result<(), Errno>,
    ) -> Result<Submit, Errno> {
        let mut memory = [0; 256];
        let mut stream = Stream::new(&mut memory);
        write(&mut stream)?;
        let (commands, handles) = (stream.bytes(), [buffer.unwrap_or(0)]);
        let submit = Submit {
            commands: commands.as_ptr().expose_provenance() as u64,
            commands_size: commands.len() as u32,
            buffers: handles.as_ptr().expose_provenance() as u64,
            buffer_count: u32::from(buffer.is_some()),
            flags,
            fence_fd: -1,
            ..Default::default()
        };
        self.ioctl(self.file, DRM_IOCTL_SOFT_SUBMIT, submit)
    }

    fn files(&mut self) -> Result<(), Errno> {
        self.session.open(open::RDWR | open::NONBLOCK)?;
        let closed = self.session.open(open::RDWR)?;
        self.session.open(open::RDWR)?;
        self.session.close(closed)
    }

    fn buffers(&mut self) -> Result<(), Errno> {
        let handle = self.buffer(4096)?;
        self.buffer(16 << 10)?;
        let close = GemClose { handle, pad: 0 };
        self.ioctl(self.file, GEM_CLOSE, close)?;
        self.buffer(8192).map(drop)
    }

    fn syncobjs(&mut self) -> Result<(), Errno> {
        for flags in [0, syncobj::CREATE_SIGNALED, 0] {
            let create = SyncobjCreate { flags, handle: 0 };
            self.ioctl(self.file, SYNCOBJ_CREATE, create)?;
        }
        Ok(())
    }

    fn mapped(&mut self) -> Result<(), Errno> {
        let handle = self.buffer(8192)?;
        self.map(handle, 8192)?;
        self.map(handle, 4096)?;
        let handle = self.buffer(4096)?;
        self.map(handle, 4096)?;
        // A buffer that is mapped and has no handle any more.
        self.ioctl(self.file, GEM_CLOSE, GemClose { handle, pad: 0 })?;
        let handle = self.buffer(4096)?;
        let offset = self.map_offset(handle)?;
        let unmapped = self.map_at(offset, 4096, protection::READ)?;
        self.session.unmap(unmapped)
    }

    fn exported(&mut self) -> Result<(), Errno> {
        let other = self.session.open(open::RDWR)?;
        let export = PrimeHandleToFd {
            handle: self.buffer(8192)?,
            flags: prime::CLOEXEC | prime::RDWR,
            fd: -1,
        };
        let fd = self.ioctl(self.file, PRIME_HANDLE_TO_FD, export)?.fd;
        let import = PrimeFdToHandle {
            fd,
            ..Default::default()
        };
        self.ioctl(other, PRIME_FD_TO_HANDLE, import)?;
        let export = SyncobjHandleToFd {
            handle: self.syncobj()?,
            fd: -1,
            ..Default::default()
        };
        let fd = self.ioctl(self.file, SYNCOBJ_HANDLE_TO_FD, export)?.fd;
        let import = SyncobjFdToHandle {
            fd,
            ..Default::default()
        };
        self.ioctl(other, SYNCOBJ_FD_TO_HANDLE, import)?;
        self.hung()?;
        Ok(())
    }

    fn running(&mut self) -> Result<(), Errno> {
        let buffer = self.buffer(256 << 10)?;
        let fill = Fill {
            target: Surface {
                buffer: 0,
                stride: 1024,
                offset: 0,
                width: 256,
                height: 256,
            },
            rectangle: Rectangle {
                x: 0,
                y: 0,
                width: 256,
                height: 256,
            },
            color: [1, 2, 3, 4],
            ..Default::default()
        };
        for _ in 0..3 {
            self.submit(0, Some(buffer), |stream| stream.push(0, &fill))?;
        }
        Ok(())
    }

    /// Gives the number of the submission that hangs, and the object that is its fence.
    fn hung(&mut self) -> Result<(u64, ObjectId), Errno> {
        let submitted = self.submit(SUBMIT_FENCE_FD_OUT, None, |stream| {
            stream.push(0, &Hang::default())
        })?;
        // Behind it, with a buffer: dropped before it begins.
        let buffer = self.buffer(4096)?;
        let fill = Fill::default();
        let behind = self.submit(0, Some(buffer), |stream| stream.push(0, &fill));
        behind
            .map(drop)
            .or_else(|errno| expect::<()>(Err(errno), Errno::EINVAL))?;
        Ok((submitted.seqno, ObjectId(submitted.fence_fd)))
    }

    /// Gives the ids of the requests that wait.
    fn blocked(&mut self) -> Result<Vec<u64>, Errno> {
        let (seqno, fence) = self.hung()?;
        let handles = [self.syncobj()?];
        let wait = Wait {
            seqno,
            deadline_ns: i64::MAX,
            ..Default::default()
        };
        let syncobj = SyncobjWait {
            handles: handles.as_ptr().expose_provenance() as u64,
            count_handles: 1,
            timeout_nsec: i64::MAX,
            flags: syncobj::WAIT_FOR_SUBMIT,
            ..Default::default()
        };
        let mut ids = vec![
            self.start(DRM_IOCTL_SOFT_WAIT, wait)?,
            self.start(SYNCOBJ_WAIT, syncobj)?,
        ];
        let read = ReadRequest {
            length: 64.into(),
            reserved: 0.into(),
        };
        for (id, request) in [
            (7001, poll_request(7001, self.file.0, -1)),
            (7002, poll_request(7002, fence.0, 3_600_000_000_000)),
            (
                7003,
                message(Operation::Read, self.file.0, 7003, read.as_bytes()),
            ),
        ] {
            self.send(&request, 256)?;
            ids.push(id);
        }
        Ok(ids)
    }

    fn watching(&mut self) -> Result<(), Errno> {
        let (_, fence) = self.hung()?;
        for (id, object) in [(8001, self.file), (8002, fence), (8003, self.file)] {
            if self.session.watch(id, object, 1)? != 0 {
                return Err(Errno::EPROTO);
            }
        }
        // Two events, of which the device can write one; a file that is watched is closed.
        self.session.cancel(8002)?;
        self.session.cancel(8003)?;
        self.session.close(self.file)
    }

    fn canceled(&mut self) -> Result<(), Errno> {
        let ids = self.blocked()?;
        for id in &ids {
            // With a worker's doorbell, it may not have come yet; only what has is canceled.
            match self.session.cancel(*id) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        match self.session.cancel(ids[0]) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn limited(&mut self) -> Result<(), Errno> {
        expect(self.buffer(LIMITS.memory + 4096), Errno::ENOMEM)?;
        let buffer = self.buffer(64 << 10)?;
        self.map(buffer, 64 << 10)?;
        expect(self.map(buffer, 4096), Errno::ENOMEM)?;
        while let Ok(file) = self.session.open(open::RDWR) {
            self.send(&poll_request(9000 + file.0 as u64, file.0, -1), 64)?;
        }
        // An object of the host's that finds no place among the guest's.
        let export = PrimeHandleToFd {
            handle: buffer,
            flags: prime::CLOEXEC,
            fd: -1,
        };
        expect(
            self.ioctl(self.file, PRIME_HANDLE_TO_FD, export),
            Errno::EMFILE,
        )?;
        for id in 0..LIMITS.in_flight.into() {
            self.send(&poll_request(9100 + id, self.file.0, -1), 64)?;
        }
        Ok(())
    }

    fn refused(&mut self) -> Result<(), Errno> {
        let handle = 77;
        let map = GemMmap {
            handle,
            ..Default::default()
        };
        expect(
            self.ioctl(self.file, DRM_IOCTL_SOFT_GEM_MMAP, map),
            Errno::ENOENT,
        )?;
        expect(
            self.ioctl(ObjectId(99), GEM_CLOSE, GemClose { handle, pad: 0 }),
            Errno::EBADF,
        )?;
        let import = PrimeFdToHandle {
            fd: self.file.0,
            ..Default::default()
        };
        let refused = self.ioctl(self.file, PRIME_FD_TO_HANDLE, import);
        expect(refused.map(drop).and(Ok(())), Errno::EINVAL)?;
        let buffer = self.buffer(4096)?;
        expect(self.map(buffer, 8192), Errno::EINVAL)?;
        expect(self.session.size(self.file), Errno::ESPIPE)?;
        // No header, no known operation, a body that is too short, a response that finds no room.
        self.send(&[1, 2, 3], 64)?;
        self.send(&message(Operation::Map, self.file.0, 1, &[0; 4]), 64)?;
        self.send(&message(Operation::Ioctl, self.file.0, 2, &[0xff; 64]), 64)?;
        self.send(&open_request(3), 0)
    }

    fn busy(&mut self) -> Result<(), Errno> {
        for round in 0..4 {
            let wanted = GemCreate {
                size: 4096,
                ..Default::default()
            };
            self.start(DRM_IOCTL_SOFT_GEM_CREATE, wanted)?;
            self.start(SYNCOBJ_CREATE, SyncobjCreate::default())?;
            self.send(&open_request(6000 + round), 64)?;
            self.send(&poll_request(6100 + round, self.file.0, -1), 64)?;
            self.send(
                &message(Operation::Close, round as i32 + 2, 6200 + round, &[]),
                64,
            )?;
        }
        Ok(())
    }
}
