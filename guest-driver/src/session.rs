//! A guest's session with the proxy: the hello, then every operation of the protocol as a method.
//!
//! The test guest, the Linux module and the tests call it. It owns the [`Channel`], knows which schemas the host
//! driver speaks, and holds nothing else: the state of files and objects is the host's. So where many callers come at
//! once, each makes a session of its own on the one connection ([`Session::share`]) and shares nothing but the device
//! and the answers that cannot change ([`Session::with_constants`]).
//!
//! A session that the proxy has lost, since it was restarted, gives `ENODEV` from then on; another one needs another channel.

use crate::channel::{Channel, Slot};
use crate::constants::{Constants, Draft};
use crate::marshal::{Caller, erase_outputs, gather, scatter};
use crate::version;
use arrayvec::ArrayString;
use pvgpu_protocol::control::{self, DriverIdentity, Hello, HelloReply, Limits};
use pvgpu_protocol::family::{self, Family};
use pvgpu_protocol::layout::Layout;
use pvgpu_protocol::schema::{Answer, Ioctl};
use pvgpu_protocol::wire::{
    CancelRequest, IoctlRequest, MapPagesRequest, MapRequest, MapResponse, OpenRequest, Operation,
    PageRange, PollRequest, ReadRequest, RequestHeader, ResponseHeader, SizeResponse, UnmapRequest,
    WatchRequest,
};
use pvgpu_protocol::{Errno, wire};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const REQUEST_HEADER: usize = size_of::<RequestHeader>();
const RESPONSE_HEADER: usize = size_of::<ResponseHeader>();
const IOCTL_HEADER: usize = REQUEST_HEADER + size_of::<IoctlRequest>();
/// Waits for the answer to a hello, each of about a second.
const HELLO_WAITS: u32 = 10;
/// Payload bytes that an ioctl is given at first; most need less.
const IOCTL_ROOM: usize = 1024;

/// A session with the proxy.
pub struct Session<'a, C: Channel> {
    channel: C,
    next_id: u64,
    host: Host,
    constants: Option<&'a Constants>,
}

/// What the proxy has said of itself in the hello.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Name of the host driver.
    pub driver: ArrayString<32>,
    /// Its version.
    pub driver_version: [i32; 3],
    /// What this guest may use.
    pub limits: Limits,
    /// Size of the aperture in bytes.
    pub aperture: u64,
    /// Whether there is [`Session::map_pages`] instead.
    pub maps_pages: bool,
    /// Its date and its description; none when one is longer than a driver's ever are.
    texts: Option<[ArrayString<64>; 2]>,
    families: &'static [&'static Family],
}

impl Host {
    /// What the host driver's `DRM_IOCTL_VERSION` says.
    fn identity(&self) -> Option<DriverIdentity<'_>> {
        let [date, description] = self.texts.as_ref()?;
        Some(DriverIdentity {
            name: &self.driver,
            version: self.driver_version,
            date,
            description,
        })
    }
}

/// An open file, or another object that an ioctl gave out: its id in the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectId(pub i32);

/// A request in flight. It must be finished; the device writes to its buffers until then.
#[derive(Debug)]
#[must_use = "a request that is not finished keeps its buffers"]
pub struct Pending {
    slot: Slot,
    id: u64,
}

impl Pending {
    /// The id that names it to [`Session::cancel`].
    pub fn id(&self) -> u64 {
        self.id
    }
}

/// An ioctl in flight.
#[derive(Debug)]
#[must_use = "an ioctl that is not finished keeps its buffers"]
pub struct PendingIoctl {
    /// The request.
    pub request: Pending,
    ioctl: &'static Ioctl,
    layout: Layout,
    address: u64,
}

/// A range of an object in the aperture, or in pages of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where it starts in the aperture, in bytes; with pages of the guest, its number.
    pub aperture_offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl<'a, C: Channel> Session<'a, C> {
    /// Says hello. `EOPNOTSUPP` when the proxy speaks another version of the protocol, `EPROTO` when it answers
    /// something else than a hello, `EIO` when it does not answer.
    pub fn connect(mut channel: C, guest: &str) -> Result<Self, Errno> {
        let hello = Hello::new(guest);
        let mut record = [0; 128];
        let length = control::encode(&hello, &mut record)?;
        let payload = record.get(..length).ok_or(Errno::E2BIG)?;
        let pending = start(
            &mut channel,
            (Operation::Hello, 0, 0),
            &(),
            payload,
            control::RECORD_LIMIT,
        )?;
        channel.doorbell();
        let mut waits = (0..HELLO_WAITS).map(|_| channel.wait(&pending.slot));
        let waited = waits.find(|waited| *waited != Err(Errno::ETIMEDOUT));
        let waited = waited.unwrap_or(Err(Errno::EIO));
        let take = |_, payload: &[u8]| {
            let reply: HelloReply<'_> = control::decode(payload)?;
            let driver = ArrayString::from(reply.driver.name).map_err(|_| Errno::EPROTO)?;
            let texts = [reply.driver.date, reply.driver.description].map(ArrayString::from);
            Ok(Host {
                driver,
                texts: match texts {
                    [Ok(date), Ok(description)] => Some([date, description]),
                    _ => None,
                },
                driver_version: reply.driver.version,
                limits: reply.limits,
                aperture: reply.aperture,
                maps_pages: reply.features & wire::feature::MAP_PAGES != 0,
                families: family::of_driver(reply.driver.name),
            })
        };
        let host = waited.and_then(|()| answer(&channel, &pending, take));
        channel.end(pending.slot);
        Ok(Self {
            channel,
            next_id: 1,
            host: host?,
            constants: None,
        })
    }

    /// One more caller's session on a connection that [`Session::connect`] has made: `channel` leads to the same device,
    /// `host` is what that said. Its requests have the ids after `first_id`, which must be nobody else's.
    pub fn share(channel: C, host: Host, first_id: u64) -> Self {
        Self {
            channel,
            next_id: first_id,
            host,
            constants: None,
        }
    }

    /// Lets [`Session::ioctl`] answer from `constants` what cannot change, and from the hello who the host driver is. The
    /// table must be used for this connection alone. Without one, every ioctl is sent.
    ///
    /// Such an answer says nothing of the file: a call on one that is not open gets it, too.
    pub fn with_constants(mut self, constants: &'a Constants) -> Self {
        self.constants = Some(constants);
        self
    }

    /// What the proxy has said of itself.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The channel.
    pub fn channel(&mut self) -> &mut C {
        &mut self.channel
    }

    /// Opens the device; the flags are those of [`wire::open`].
    pub fn open(&mut self, flags: u32) -> Result<ObjectId, Errno> {
        let body = OpenRequest {
            flags: flags.into(),
            reserved: 0.into(),
        };
        self.call(Operation::Open, 0, &body).map(ObjectId)
    }

    /// Closes a file or another object.
    pub fn close(&mut self, object: ObjectId) -> Result<(), Errno> {
        self.call(Operation::Close, object.0, &()).map(drop)
    }

    /// Performs an ioctl of `caller`, whose argument lies at `address`, and waits for it. One whose wait is interrupted is
    /// cancelled: its result is then `EINTR`, or its own if it was too late for that.
    pub fn ioctl<M: Caller + ?Sized>(
        &mut self,
        file: ObjectId,
        command: u32,
        address: u64,
        caller: &mut M,
    ) -> Result<i32, Errno> {
        let ioctl = family::find(self.host.families, command)?;
        let size = ioctl.accept(command)?;
        let constants = match ioctl.answer {
            Answer::Forwarded => None,
            _ => self.constants.filter(|known| !known.device_is_gone()),
        };
        if let (Answer::Identity, Some(_)) = (ioctl.answer, constants)
            && let Some(identity) = self.host.identity()
        {
            return version::answer(&identity, address, caller);
        }
        let mut layout = Layout::default();
        let slot = self.gather(ioctl, size, address, caller, &mut layout)?;
        let mut draft = None;
        if let Some(constants) = constants {
            let buffer = self.channel.request(&slot);
            let payload = buffer.get_mut(IOCTL_HEADER..).unwrap_or_default();
            match recall(constants, ioctl, command, &layout, payload) {
                Recalled::Answer(answer) => {
                    let result = scatter(ioctl, &layout, address, caller, answer).map(|()| 0);
                    self.channel.end(slot);
                    return result;
                }
                Recalled::Question(noted) => draft = noted,
            }
        }
        let request = self.submit(file, command, slot, &layout)?;
        self.channel.doorbell();
        let result = self
            .settle(&request)
            .and_then(|()| self.take(&request, ioctl, &layout, address, caller, draft));
        self.channel.end(request.slot);
        if let Some(constants) = self.constants {
            constants.heard(result);
        }
        result
    }

    /// Submits an ioctl without ringing the doorbell or waiting.
    pub fn start_ioctl<M: Caller + ?Sized>(
        &mut self,
        file: ObjectId,
        command: u32,
        address: u64,
        caller: &M,
    ) -> Result<PendingIoctl, Errno> {
        let ioctl = family::find(self.host.families, command)?;
        let size = ioctl.accept(command)?;
        let mut layout = Layout::default();
        let slot = self.gather(ioctl, size, address, caller, &mut layout)?;
        let request = self.submit(file, command, slot, &layout)?;
        Ok(PendingIoctl {
            request,
            ioctl,
            layout,
            address,
        })
    }

    /// Takes the result of an ioctl that is complete ([`Session::is_complete`], [`Session::wait`]).
    pub fn finish_ioctl<M: Caller + ?Sized>(
        &mut self,
        pending: PendingIoctl,
        caller: &mut M,
    ) -> Result<i32, Errno> {
        let PendingIoctl {
            request,
            ioctl,
            ref layout,
            address,
        } = pending;
        let result = self.take(&request, ioctl, layout, address, caller, None);
        self.channel.end(request.slot);
        result
    }

    /// Gathers an ioctl's argument, and all that its pointers reach, into a slot that has room for the response.
    fn gather<M: Caller + ?Sized>(
        &mut self,
        ioctl: &'static Ioctl,
        size: u16,
        address: u64,
        caller: &M,
        layout: &mut Layout,
    ) -> Result<Slot, Errno> {
        let now = self.channel.now_ns();
        let (mut request, mut response) = (IOCTL_ROOM, IOCTL_ROOM);
        let limit = usize::try_from(self.host.limits.message).unwrap_or(usize::MAX);
        loop {
            // The proxy would return a longer request unanswered.
            if request.saturating_add(IOCTL_HEADER) > limit {
                return Err(Errno::E2BIG);
            }
            let slot = self
                .channel
                .begin(IOCTL_HEADER + request, RESPONSE_HEADER + response)?;
            let buffer = self.channel.request(&slot);
            let payload = buffer.get_mut(IOCTL_HEADER..).unwrap_or_default();
            match gather(ioctl, size, address, caller, now, payload, layout) {
                Ok(()) if layout.response <= response => return Ok(slot),
                Ok(()) => response = layout.response,
                Err(Errno::ENOSPC) if layout.request > request => request = layout.request,
                Err(errno) => {
                    self.channel.end(slot);
                    return Err(errno);
                }
            }
            // The caller's arrays are longer than the buffers: once more with longer ones.
            self.channel.end(slot);
        }
    }

    /// Submits an ioctl that was gathered into `slot`.
    fn submit(
        &mut self,
        file: ObjectId,
        command: u32,
        slot: Slot,
        layout: &Layout,
    ) -> Result<Pending, Errno> {
        let body = IoctlRequest {
            command: command.into(),
            reserved: 0.into(),
        };
        let id = self.new_id();
        let header = RequestHeader::new(Operation::Ioctl, file.0.cast_unsigned(), id);
        let buffer = self.channel.request(&slot);
        let length = write(buffer, &[header.as_bytes(), body.as_bytes()]) + layout.request;
        match self.channel.submit(&slot, length) {
            Ok(()) => Ok(Pending { slot, id }),
            Err(errno) => {
                self.channel.end(slot);
                Err(errno)
            }
        }
    }

    /// Takes the result of an ioctl that is complete, whose answer the draft was for.
    fn take<M: Caller + ?Sized>(
        &self,
        request: &Pending,
        ioctl: &'static Ioctl,
        layout: &Layout,
        address: u64,
        caller: &mut M,
        draft: Option<Draft<'_>>,
    ) -> Result<i32, Errno> {
        let response = self.channel.response(&request.slot);
        let (result, payload) = split_response(response, request.id)?;
        if let (0, Some(draft)) = (result, draft) {
            draft.complete(payload);
        }
        // The driver's bytes come back even with an error; those of a request that was rejected do not.
        if !payload.is_empty() {
            scatter(ioctl, layout, address, caller, payload)?;
        }
        to_result(result)
    }

    /// Maps a range of an object into the aperture.
    pub fn map(
        &mut self,
        object: ObjectId,
        offset: u64,
        length: u64,
        protection: u32,
    ) -> Result<Mapping, Errno> {
        let body = MapRequest {
            offset: offset.into(),
            length: length.into(),
            protection: protection.into(),
            reserved: 0.into(),
        };
        let what = (Operation::Map, object.0, self.new_id());
        self.call_as(what, &body, &[], size_of::<MapResponse>(), mapping)
    }

    /// Maps a range of an object with pages of this guest, for a host without aperture ([`Host::maps_pages`]): `ranges` are as
    /// long as it is. They show the object's contents from then on, as of the points that its ioctls' schemas name
    /// ([`pvgpu_protocol::schema::Coherence`]), and the host writes to them until [`Session::unmap`] has succeeded or the device
    /// has been reset.
    pub fn map_pages(
        &mut self,
        object: ObjectId,
        offset: u64,
        length: u64,
        protection: u32,
        ranges: &[PageRange],
    ) -> Result<Mapping, Errno> {
        let body = MapPagesRequest {
            offset: offset.into(),
            length: length.into(),
            protection: protection.into(),
            ranges: u32::try_from(ranges.len())
                .map_err(|_| Errno::E2BIG)?
                .into(),
        };
        let what = (Operation::MapPages, object.0, self.new_id());
        let room = size_of::<MapResponse>();
        self.call_as(what, &body, ranges.as_bytes(), room, mapping)
    }

    /// Removes a mapping.
    pub fn unmap(&mut self, mapping: Mapping) -> Result<(), Errno> {
        let body = UnmapRequest {
            aperture_offset: mapping.aperture_offset.into(),
            length: mapping.length.into(),
        };
        self.call(Operation::Unmap, 0, &body).map(drop)
    }

    /// Waits until one of `events` is there, for `timeout_ns` (zero asks only, less waits for ever).
    pub fn poll(&mut self, object: ObjectId, events: u32, timeout_ns: i64) -> Result<u32, Errno> {
        let body = PollRequest {
            events: events.into(),
            reserved: 0.into(),
            timeout_ns: timeout_ns.into(),
        };
        self.call(Operation::Poll, object.0, &body)
            .map(i32::cast_unsigned)
    }

    /// As [`Session::poll`], but does not wait: gives the events that are there. If there are none, the host reports them
    /// later by exactly one [`wire::Event`] with this `id`, which must be that of no other request. It may have done so
    /// before this returns. [`Session::cancel`] ends it sooner.
    pub fn watch(&mut self, id: u64, object: ObjectId, events: u32) -> Result<u32, Errno> {
        let body = WatchRequest {
            events: events.into(),
            reserved: 0.into(),
        };
        let watch = (Operation::Watch, object.0, id);
        self.call_as(watch, &body, &[], 0, |events, _| Ok(events.cast_unsigned()))
    }

    /// Size of an object in bytes; `ESPIPE` when it has none.
    pub fn size(&mut self, object: ObjectId) -> Result<u64, Errno> {
        let room = size_of::<SizeResponse>();
        self.call_with(Operation::Size, object.0, &(), room, |_, payload| {
            let size = SizeResponse::ref_from_bytes(payload).map_err(|_| Errno::EPROTO)?;
            Ok(size.size.get())
        })
    }

    /// Reads from a file into `bytes` and returns how many there were.
    pub fn read(&mut self, file: ObjectId, bytes: &mut [u8]) -> Result<usize, Errno> {
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
        let body = ReadRequest {
            length: length.into(),
            reserved: 0.into(),
        };
        self.call_with(Operation::Read, file.0, &body, bytes.len(), |_, payload| {
            let target = bytes.get_mut(..payload.len()).ok_or(Errno::EPROTO)?;
            target.copy_from_slice(payload);
            Ok(payload.len())
        })
    }

    /// Cancels a request in flight, which then completes with `EINTR`; `ENOENT` when it is done already.
    pub fn cancel(&mut self, id: u64) -> Result<(), Errno> {
        let body = CancelRequest { id: id.into() };
        self.call(Operation::Cancel, 0, &body).map(drop)
    }

    /// Does nothing, and waits for it.
    pub fn nop(&mut self) -> Result<(), Errno> {
        self.call(Operation::Nop, 0, &()).map(drop)
    }

    /// Submits a request that does nothing, without ringing the doorbell or waiting.
    pub fn start_nop(&mut self) -> Result<Pending, Errno> {
        let id = self.new_id();
        start(&mut self.channel, (Operation::Nop, 0, id), &(), &[], 0)
    }

    /// Whether a request is complete. Never waits.
    pub fn is_complete(&mut self, pending: &Pending) -> bool {
        self.channel.is_complete(&pending.slot)
    }

    /// Rings the doorbell for all submitted requests and waits until this one is complete. `ENODEV` when it never will be,
    /// since the proxy does not know the session any more.
    pub fn wait(&mut self, pending: &Pending) -> Result<(), Errno> {
        self.channel.doorbell();
        match self.channel.wait(&pending.slot) {
            Err(Errno::ETIMEDOUT) => self.settle_slowly(pending),
            waited => waited,
        }
    }

    /// Takes the result of a request that is complete.
    pub fn finish(&mut self, pending: Pending) -> Result<i32, Errno> {
        let result = split_response(self.channel.response(&pending.slot), pending.id)
            .and_then(|(result, _)| to_result(result));
        self.channel.end(pending.slot);
        result
    }

    fn call<B: IntoBytes + Immutable>(
        &mut self,
        operation: Operation,
        object: i32,
        body: &B,
    ) -> Result<i32, Errno> {
        self.call_with(operation, object, body, 0, |result, _| Ok(result))
    }

    fn call_with<B: IntoBytes + Immutable, T>(
        &mut self,
        operation: Operation,
        object: i32,
        body: &B,
        room: usize,
        take: impl FnOnce(i32, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let id = self.new_id();
        self.call_as((operation, object, id), body, &[], room, take)
    }

    fn call_as<B: IntoBytes + Immutable, T>(
        &mut self,
        what: (Operation, i32, u64),
        body: &B,
        payload: &[u8],
        room: usize,
        take: impl FnOnce(i32, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let pending = start(&mut self.channel, what, body, payload, room)?;
        self.channel.doorbell();
        let result = self
            .settle(&pending)
            .and_then(|()| answer(&self.channel, &pending, take));
        self.channel.end(pending.slot);
        result
    }

    /// Starts a request that does nothing and leaves its answer to whoever takes what the device returns: it is
    /// `ENOTCONN` when the proxy does not know this session.
    pub fn ask(&mut self) -> Result<(), Errno> {
        let pending = self.start_nop()?;
        self.channel.doorbell();
        self.channel.end(pending.slot);
        Ok(())
    }

    /// Waits until a request is complete. When the wait is interrupted, cancels the request, which then completes soon: its
    /// result is always taken, so what it has made on the host is never left without an owner.
    /// When it takes long, asks the proxy whether it still knows the session; `ENODEV` if not.
    fn settle(&mut self, pending: &Pending) -> Result<(), Errno> {
        match self.channel.wait(&pending.slot) {
            Err(Errno::EINTR) => self.cancel_and_settle(pending),
            Err(Errno::ETIMEDOUT) => self.settle_slowly(pending),
            waited => waited,
        }
    }

    /// The proxy may be merely slow, or away for a while; then one question is lost as the request was, so there are more, less
    /// and less often: each keeps a slot until the device returns it.
    #[cold]
    fn settle_slowly(&mut self, pending: &Pending) -> Result<(), Errno> {
        let mut asked: Option<Pending> = None;
        let mut silence = 0_u32;
        let waited = loop {
            match asked.take() {
                Some(nop) if self.is_complete(&nop) => {
                    silence = 0;
                    if self.finish(nop) == Err(Errno::ENODEV) {
                        break Err(Errno::ENODEV);
                    }
                }
                Some(nop) if silence.is_power_of_two() => self.channel.end(nop.slot),
                waits => asked = waits,
            }
            if asked.is_none() {
                // Without a free slot, later.
                asked = self.start_nop().ok();
                self.channel.doorbell();
            }
            silence += 1;
            match self.channel.wait(&pending.slot) {
                Err(Errno::ETIMEDOUT) => {}
                Err(Errno::EINTR) => break self.cancel_and_settle(pending),
                waited => break waited,
            }
        };
        if let Some(nop) = asked {
            self.channel.end(nop.slot);
        }
        waited
    }

    #[cold]
    fn cancel_and_settle(&mut self, pending: &Pending) -> Result<(), Errno> {
        self.channel.cancelling();
        let body = CancelRequest {
            id: pending.id.into(),
        };
        let cancel = (Operation::Cancel, 0, self.new_id());
        // If it cannot be sent, the request takes its own time.
        let cancel = start(&mut self.channel, cancel, &body, &[], 0);
        self.channel.doorbell();
        let waited = self.channel.wait(&pending.slot);
        if let Ok(cancel) = cancel {
            self.channel.end(cancel.slot);
        }
        waited
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// What is known of the answer to an ioctl.
enum Recalled<'a, 'b> {
    /// All: this is the response's payload.
    Answer(&'b [u8]),
    /// Nothing yet. If it is to be known the next time, there is a draft.
    Question(Option<Draft<'a>>),
}

/// Looks for the answer to an ioctl that was gathered at the start of `payload`, and puts it there instead.
fn recall<'a, 'b>(
    constants: &'a Constants,
    ioctl: &'static Ioctl,
    command: u32,
    layout: &Layout,
    payload: &'b mut [u8],
) -> Recalled<'a, 'b> {
    if !ioctl.is_constant(payload.get(..layout.argument).unwrap_or_default()) {
        return Recalled::Question(None);
    }
    erase_outputs(ioctl, layout, payload);
    match constants.answer(command, payload, layout.request) {
        Some(length) => Recalled::Answer(payload.get(..length).unwrap_or_default()),
        None => {
            let question = payload.get(..layout.request).unwrap_or_default();
            Recalled::Question(constants.draft(command, question))
        }
    }
}

/// Writes the parts one after the other and returns their length; parts that do not fit are left out.
fn write(mut buffer: &mut [u8], parts: &[&[u8]]) -> usize {
    let mut length = 0;
    for part in parts {
        if let Some((to, rest)) = buffer.split_at_mut_checked(part.len()) {
            to.copy_from_slice(part);
            (buffer, length) = (rest, length + part.len());
        } else {
            buffer = &mut [];
        }
    }
    length
}

/// Submits a request with `room` bytes for the response's payload.
fn start<C: Channel, B: IntoBytes + Immutable>(
    channel: &mut C,
    (operation, object, id): (Operation, i32, u64),
    body: &B,
    payload: &[u8],
    room: usize,
) -> Result<Pending, Errno> {
    let header = RequestHeader::new(operation, object.cast_unsigned(), id);
    let parts = [header.as_bytes(), body.as_bytes(), payload];
    let length = parts.iter().map(|part| part.len()).sum();
    let slot = channel.begin(length, RESPONSE_HEADER + room)?;
    write(channel.request(&slot), &parts);
    match channel.submit(&slot, length) {
        Ok(()) => Ok(Pending { slot, id }),
        Err(errno) => {
            channel.end(slot);
            Err(errno)
        }
    }
}

/// The mapping that a response tells of.
fn mapping(_: i32, payload: &[u8]) -> Result<Mapping, Errno> {
    let map = MapResponse::ref_from_bytes(payload).map_err(|_| Errno::EPROTO)?;
    Ok(Mapping {
        aperture_offset: map.aperture_offset.get(),
        length: map.length.get(),
    })
}

/// Takes the result of a request that is complete.
fn answer<C: Channel, T>(
    channel: &C,
    pending: &Pending,
    take: impl FnOnce(i32, &[u8]) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let (result, payload) = split_response(channel.response(&pending.slot), pending.id)?;
    take(to_result(result)?, payload)
}

/// The result and the payload of the response to that request; `EPROTO` when it is something else.
fn split_response(response: &[u8], id: u64) -> Result<(i32, &[u8]), Errno> {
    let (header, payload) =
        wire::ResponseHeader::ref_from_prefix(response).map_err(|_| Errno::EPROTO)?;
    let length = usize::try_from(header.length.get()).map_err(|_| Errno::EPROTO)?;
    let payload = payload.get(..length).ok_or(Errno::EPROTO)?;
    if header.id.get() != id {
        return Err(Errno::EPROTO);
    }
    Ok((header.result.get(), payload))
}

/// A proxy that knows nothing of a session in which a hello was said has lost it, and with it all that was open.
fn to_result(result: i32) -> Result<i32, Errno> {
    match result {
        0.. => Ok(result),
        _ => match Errno::new(result.saturating_neg()) {
            Errno::ENOTCONN => Err(Errno::ENODEV),
            errno => Err(errno),
        },
    }
}
