//! One guest's connection: what it has open, what it may use, and how each of its operations is performed.
//!
//! [`crate::device`] hands over a copied request ([`Session::perform`]) and gets a [`Response`], at once or later
//! from another thread. Everything here works on that copy alone. Ending the session ([`Session::end`], or dropping
//! it) cancels what waits and releases every file, object and mapping.

use crate::aperture::Aperture;
use crate::call::{Call, HandleChange, Owned};
use crate::cancel::Cancel;
use crate::driver::{HostDriver, HostObject, Mapping};
use crate::limit::{Budget, Limit};
use crate::logging::guest_log;
use crate::sandbox::Filter;
use crate::shadow::{Pages, Scratch, Shadow};
use crate::statistics::{self, Counters, SessionState, SessionStatus, Statistics, Usage};
use crate::worker::{Job, Workers};
use pvgpu_protocol::control::{self, Hello, HelloReply, Limits};
use pvgpu_protocol::schema::{Coherence, Space};
use pvgpu_protocol::wire::{
    self, CancelRequest, IoctlRequest, MapPagesRequest, MapRequest, MapResponse, OpenRequest,
    Operation, PAGE_RANGES_MAX, PAGE_SIZE, PageRange, PollRequest, ReadRequest, RequestHeader,
    ResponseHeader, SizeResponse, UnmapRequest, WatchRequest,
};
use pvgpu_protocol::{Errno, family};
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant, SystemTime};
use vm_memory::GuestAddressSpace;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a response without payload.
pub const RESPONSE_HEADER: usize = size_of::<ResponseHeader>();

/// Processor time that requests which may wait get in a second, unless the device is configured otherwise: that of four
/// processors.
pub const WORKER_TIME: Duration = Duration::from_secs(4);

/// Most mappings with pages of the guest at a time (`ENOMEM`): as many as an aperture takes, for the same reason.
const SHADOWS_MAX: usize = 16_384;

/// One guest's connection to a host driver. Dropping it ends it.
pub struct Session(Arc<Shared>);

/// What the session shares with its requests that wait.
struct Shared {
    driver: Arc<dyn HostDriver>,
    aperture: Option<Arc<Aperture>>,
    /// What mappings with pages of the guest need, if it may make some.
    pages: Option<Pages>,
    limits: Limits,
    state: Mutex<State>,
    workers: Workers,
    /// Where the events of watches go.
    report: Option<Report>,
    counters: Arc<Counters>,
    /// Bytes of GPU memory, the sum of its [`Charge`]s.
    memory: Arc<AtomicU64>,
    /// Handles of all files, the sum of theirs.
    handles: Arc<AtomicU64>,
    /// What is left of the time of worker threads.
    worker_time: Arc<Budget>,
    since: SystemTime,
}

#[derive(Default)]
struct State {
    /// Whether the hello was said.
    open: bool,
    /// Who has said it, in its own words.
    guest: String,
    /// Whether the session is over.
    ended: bool,
    next_object: i32,
    objects: HashMap<i32, Object>,
    /// Aperture offset to length, in bytes.
    mappings: HashMap<u64, u64>,
    /// Whether the guest may map with its own pages, since both sides have said that they can.
    maps_pages: bool,
    /// Mappings with pages of the guest, by their numbers.
    shadows: HashMap<u64, Shadowed>,
    next_shadow: u64,
    /// Bytes in `mappings` and `shadows`.
    mapped: u64,
    /// Requests that may wait, by their ids. `None` for a watch that is over but for its event.
    in_flight: HashMap<u64, Option<Arc<Cancel>>>,
    /// How many of them are watches.
    watches: usize,
}

/// What an object id names.
#[derive(Clone)]
enum Object {
    File(Arc<File>),
    /// What an ioctl gave out as a file descriptor, with the GPU memory that it keeps.
    Shared(Arc<dyn HostObject>, Vec<Arc<Charge>>),
}

impl Object {
    fn host(&self) -> &Arc<dyn HostObject> {
        match self {
            Self::File(file) => &file.host,
            Self::Shared(object, _) => object,
        }
    }
}

/// An open file: one host open file description and the handles that it owns.
struct File {
    host: Arc<dyn HostObject>,
    nonblocking: bool,
    handles: Mutex<Handles>,
    /// Held shared by calls that create or export handles, alone by those that close some: what is booked for a number
    /// is then what the host has under it. No such call waits.
    table: RwLock<()>,
}

/// A mapping with pages of the guest.
struct Shadowed {
    shadow: Arc<Shadow>,
    length: u64,
    /// The file through which it was made; none for one of another object.
    file: Weak<File>,
    /// The buffer's GPU memory, by which it is known: all handles and objects of a buffer have the same.
    memory: Vec<Weak<Charge>>,
}

impl Shadowed {
    /// Whether its buffer has some of this memory.
    fn is_of(&self, memory: &HashSet<*const Charge>) -> bool {
        let mut own = self.memory.iter();
        own.any(|charge| memory.contains(&charge.as_ptr()))
    }
}

/// A file's handles.
type Handles = HashMap<(Space, u32), Handle>;

/// What is booked for a handle.
struct Handle {
    /// The GPU memory that it keeps.
    memory: Vec<Arc<Charge>>,
    /// Where in the file it can be mapped, once an ioctl has told.
    offset: Option<u64>,
    /// Its place among the guest's handles.
    _place: Option<Charge>,
}

/// What counts against a limit of the guest for as long as it is kept: GPU memory in bytes, or one handle.
struct Charge {
    amount: u64,
    total: Arc<AtomicU64>,
}

impl Charge {
    /// Books so much, unless that is over the limit.
    fn new(total: &Arc<AtomicU64>, amount: u64, limit: u64) -> Option<Self> {
        let add = |sum: u64| sum.checked_add(amount).filter(|sum| *sum <= limit);
        total
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .ok()?;
        let total = Arc::clone(total);
        Some(Self { amount, total })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.total.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

impl File {
    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The GPU memory of the buffer that the file has in this range; `EINVAL` when it has none, as the kernel says.
    fn memory_at(&self, range: &Range<u64>) -> Result<Vec<Arc<Charge>>, Errno> {
        let handles = self.handles();
        let mut buffers = handles.values().filter_map(|handle| {
            let start = handle.offset?;
            let amounts = handle.memory.iter().map(|charge| charge.amount);
            let size = amounts.fold(0, u64::saturating_add);
            (start <= range.start && range.end <= start.saturating_add(size)).then_some(handle)
        });
        let buffer = buffers.next().ok_or(Errno::EINVAL)?;
        Ok(buffer.memory.clone())
    }
}

/// What an ioctl is allowed to do.
struct Admitted {
    /// The GPU memory that it allocates, or that the objects which it imports keep.
    memory: Vec<Arc<Charge>>,
    /// A place for each handle that it creates.
    places: Vec<Charge>,
    /// The handles that it creates (not known yet) and closes.
    changes: Vec<HandleChange>,
}

/// The answer to a request.
pub struct Response {
    id: u64,
    result: Result<i32, Errno>,
    payload: Payload,
}

enum Payload {
    None,
    Bytes(Vec<u8>),
    /// The bytes of an ioctl that go back.
    Call(Call),
}

/// Completes a request that did not complete at once.
pub type Complete = Box<dyn FnOnce(Response) + Send>;

/// Takes the events of watches, from any thread. It must not wait for the guest.
pub trait Reporter: Send + Sync {
    /// Whether there is a way to the guest.
    fn is_there(&self) -> bool;
    /// Takes an event.
    fn report(&self, event: Pending);
}

impl<F: Fn(Pending) + Send + Sync> Reporter for F {
    fn is_there(&self) -> bool {
        true
    }

    fn report(&self, event: Pending) {
        self(event);
    }
}

/// What takes a session's events.
pub type Report = Arc<dyn Reporter>;

/// The event that ends a watch, before the guest has it. Until this is dropped, the watch's id counts as in use.
pub struct Pending {
    event: wire::Event,
    _id: Booked,
}

impl Pending {
    /// What the guest is to get.
    pub fn event(&self) -> wire::Event {
        self.event
    }
}

/// A place among the requests in flight, given back when dropped.
struct Booked {
    /// Not an owner: events are kept by what the session itself reports to.
    session: Weak<Shared>,
    id: u64,
    watch: bool,
}

impl Booked {
    /// There is nothing to cancel any more. `false` when the session has ended.
    fn settle(&self) -> bool {
        let Some(session) = self.session.upgrade() else {
            return false;
        };
        let mut state = session.state();
        if let Some(cancel) = state.in_flight.get_mut(&self.id) {
            *cancel = None;
        }
        !state.ended
    }
}

impl Drop for Booked {
    fn drop(&mut self) {
        if let Some(session) = self.session.upgrade() {
            let mut state = session.state();
            state.in_flight.remove(&self.id);
            state.watches -= usize::from(self.watch);
        }
    }
}

impl Response {
    fn new(id: u64, result: Result<i32, Errno>) -> Self {
        Self {
            id,
            result,
            payload: Payload::None,
        }
    }

    /// `-errno`, or the operation's value.
    pub fn result(&self) -> i32 {
        match self.result {
            Ok(value) => value,
            Err(errno) => -errno.number(),
        }
    }

    fn count(&self, counters: &Counters) {
        if let Err(errno) = self.result {
            counters.failed(errno);
        }
    }

    /// Bytes of header and payload.
    pub fn length(&self) -> usize {
        RESPONSE_HEADER + self.payload_length()
    }

    fn payload_length(&self) -> usize {
        match &self.payload {
            Payload::None => 0,
            Payload::Bytes(bytes) => bytes.len(),
            Payload::Call(call) => call.response_length(),
        }
    }

    /// Hands out the response in parts, each with its offset; bytes between them are not written.
    pub fn write<E>(&self, mut part: impl FnMut(usize, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let header = ResponseHeader {
            id: self.id.into(),
            result: self.result().into(),
            length: u32::try_from(self.payload_length())
                .unwrap_or(u32::MAX)
                .into(),
        };
        part(0, header.as_bytes())?;
        match &self.payload {
            Payload::None => Ok(()),
            Payload::Bytes(bytes) => part(RESPONSE_HEADER, bytes),
            Payload::Call(call) => call
                .response_parts()
                .try_for_each(|(offset, bytes)| part(RESPONSE_HEADER + offset, bytes)),
        }
    }
}

/// Splits the body of an operation from the payload behind it.
fn body<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<(&T, &[u8]), Errno> {
    T::ref_from_prefix(bytes).map_err(|_| Errno::EINVAL)
}

/// The body of an operation that has no payload.
fn only_body<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<&T, Errno> {
    T::ref_from_bytes(bytes).map_err(|_| Errno::EINVAL)
}

/// `Err(errno)` unless the condition holds.
fn require(condition: bool, errno: Errno) -> Result<(), Errno> {
    if condition { Ok(()) } else { Err(errno) }
}

/// The range of an object that a guest wants to map, and its protection.
fn mapped_range(offset: u64, length: u64, protection: U32) -> Result<(Range<u64>, u32), Errno> {
    let allowed = wire::protection::READ | wire::protection::WRITE;
    require(protection.get() & !allowed == 0, Errno::EINVAL)?;
    let aligned = offset.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
    require(aligned && length != 0, Errno::EINVAL)?;
    let end = offset.checked_add(length).ok_or(Errno::EOVERFLOW)?;
    Ok((offset..end, protection.get()))
}

/// Runs what calls the host driver. A host driver must not panic; if it does, only this request fails.
fn guard<T>(call: impl FnOnce() -> T) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| {
        guest_log!(
            error,
            "the host driver has panicked: the request fails with EIO"
        );
        Errno::EIO
    })
}

impl Session {
    /// A session that waits for its hello. Without an aperture, mapping is refused; and so is watching, since there is
    /// nobody to report events to.
    pub fn new(
        driver: Arc<dyn HostDriver>,
        aperture: Option<Arc<Aperture>>,
        limits: Limits,
    ) -> Self {
        Self::with_counters(
            driver,
            aperture,
            limits,
            WORKER_TIME,
            None,
            None,
            Arc::default(),
            Filter::OFF,
        )
    }

    /// As [`Session::new`], reporting what the guest watches.
    pub fn with_report(
        driver: Arc<dyn HostDriver>,
        aperture: Option<Arc<Aperture>>,
        limits: Limits,
        report: Report,
    ) -> Self {
        Self::with_counters(
            driver,
            aperture,
            limits,
            WORKER_TIME,
            None,
            Some(report),
            Arc::default(),
            Filter::OFF,
        )
    }

    /// As [`Session::new`], for a guest with that memory and no aperture: it may map with pages of its own. With `report`, it
    /// may watch.
    pub fn without_aperture(
        driver: Arc<dyn HostDriver>,
        memory: impl GuestAddressSpace + Send + Sync + 'static,
        limits: Limits,
        report: Option<Report>,
    ) -> io::Result<Self> {
        let pages = Pages::new(memory, &Arc::new(Scratch::new()?));
        Ok(Self::with_counters(
            driver,
            None,
            limits,
            WORKER_TIME,
            Some(pages),
            report,
            Arc::default(),
            Filter::OFF,
        ))
    }

    /// As [`Session::with_report`], counting into `counters`, with its threads under that filter. Requests that may wait get
    /// `worker_time` of processor time in a second. With `pages` and without an aperture, the guest may map with its own pages
    /// what the driver's tables say how to keep up.
    #[allow(clippy::too_many_arguments)] // all that a device has for its session
    pub(crate) fn with_counters(
        driver: Arc<dyn HostDriver>,
        aperture: Option<Arc<Aperture>>,
        limits: Limits,
        worker_time: Duration,
        pages: Option<Pages>,
        report: Option<Report>,
        counters: Arc<Counters>,
        filter: Filter,
    ) -> Self {
        let own = guard(|| driver.for_session()).ok().flatten();
        let driver = own.unwrap_or(driver);
        let possible = aperture.is_none() && family::maps_pages(driver.families());
        Self(Arc::new(Shared {
            driver,
            aperture,
            pages: pages.filter(|_| possible),
            limits,
            state: Mutex::default(),
            workers: Workers::new(filter),
            report,
            counters,
            memory: Arc::default(),
            handles: Arc::default(),
            worker_time: Arc::new(Budget::new(worker_time)),
            since: SystemTime::now(),
        }))
    }

    /// What this guest may use.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// What the session has counted, and what it uses now.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            usage: Some(self.usage()),
            session: Some(self.status()),
            limits: self.0.limits,
            ..self.0.counters.read()
        }
    }

    /// Who the guest is, and how far the session has come.
    pub fn status(&self) -> SessionStatus {
        let since = self.0.since.duration_since(SystemTime::UNIX_EPOCH);
        let state = self.0.state();
        SessionStatus {
            state: match (state.ended, state.open) {
                (true, _) => SessionState::Ending,
                (false, true) => SessionState::Open,
                (false, false) => SessionState::Waiting,
            },
            guest: state.guest.clone(),
            since: since.unwrap_or_default().as_secs(),
        }
    }

    /// What the session uses now.
    pub fn usage(&self) -> Usage {
        self.0.usage()
    }

    /// Performs a request: the whole message, copied from the guest. `room` is how many bytes of response the
    /// guest has place for, at least [`RESPONSE_HEADER`].
    ///
    /// A request that may wait is completed from another thread, and `complete` is what it gets for that. All others
    /// are answered here.
    pub fn perform(
        &self,
        request: &[u8],
        room: usize,
        complete: impl FnOnce() -> Complete,
    ) -> Option<Response> {
        self.0.perform(request, room, complete)
    }

    /// Ends the session: cancels what waits, then closes and unmaps everything. Waits until the host driver has let
    /// go of the last request.
    pub fn end(&self) {
        self.0.end();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn perform(
        self: &Arc<Self>,
        request: &[u8],
        room: usize,
        complete: impl FnOnce() -> Complete,
    ) -> Option<Response> {
        let Ok((header, rest)) = RequestHeader::read_from_prefix(request) else {
            self.counters.rejected.fetch_add(1, Ordering::Relaxed);
            return Some(Response::new(0, Err(Errno::EPROTO)));
        };
        let id = header.id.get();
        let room = room.saturating_sub(RESPONSE_HEADER);
        let operation = Operation::from_number(header.operation.get());
        let timed = operation.is_some_and(|operation| self.counters.count(operation));
        let begin = timed.then(Instant::now);
        let result = match operation {
            Some(operation) => self.dispatch(operation, &header, rest, room, complete),
            None => Err(Errno::ENOSYS),
        };
        if let Ok(None) = &result {
            return None;
        }
        if let Some(begin) = begin {
            self.counters.at_once.record_since(begin);
        }
        match result {
            Ok(response) => {
                let answered = response.iter();
                answered.for_each(|response| response.count(&self.counters));
                response
            }
            Err(errno) => {
                self.counters.rejected.fetch_add(1, Ordering::Relaxed);
                self.counters.failed(errno);
                Some(Response::new(id, Err(errno)))
            }
        }
    }

    fn dispatch(
        self: &Arc<Self>,
        operation: Operation,
        header: &RequestHeader,
        rest: &[u8],
        room: usize,
        complete: impl FnOnce() -> Complete,
    ) -> Result<Option<Response>, Errno> {
        let id = header.id.get();
        let done = |value| Ok(Some(Response::new(id, Ok(value))));
        require(header.flags.get() == 0, Errno::EINVAL)?;
        let object_id = i32::try_from(header.object.get()).map_err(|_| Errno::EBADF)?;
        match operation {
            Operation::Hello => return self.hello(id, rest, room).map(Some),
            _ => require(self.state().open, Errno::ENOTCONN)?,
        }
        match operation {
            Operation::Hello | Operation::Nop => done(0),
            Operation::Open => done(self.open(only_body(rest)?)?),
            Operation::Close => {
                require(rest.is_empty(), Errno::EINVAL)?;
                self.close(object_id)?;
                done(0)
            }
            Operation::Ioctl => {
                let (ioctl, payload) = body::<IoctlRequest>(rest)?;
                require(ioctl.reserved == 0, Errno::EINVAL)?;
                self.ioctl(id, object_id, ioctl.command.get(), payload, room, complete)
            }
            Operation::Map | Operation::MapPages => {
                require(room >= size_of::<MapResponse>(), Errno::EINVAL)?;
                let mapped = match operation {
                    Operation::Map => self.map(object_id, only_body(rest)?)?,
                    _ => self.map_pages(object_id, rest)?,
                };
                Ok(Some(Response {
                    payload: Payload::Bytes(mapped.as_bytes().to_vec()),
                    ..Response::new(id, Ok(0))
                }))
            }
            Operation::Unmap => {
                self.unmap(only_body(rest)?)?;
                done(0)
            }
            Operation::Poll => {
                let poll: &PollRequest = only_body(rest)?;
                require(poll.reserved == 0, Errno::EINVAL)?;
                let object = self.object(object_id)?;
                let (events, timeout) = (poll.events.get(), poll.timeout_ns.get());
                let timeout = u64::try_from(timeout).ok().map(Duration::from_nanos);
                let session = Arc::clone(self);
                let ask = move |cancel: &Cancel| {
                    let ready = object.host().poll(events, timeout, cancel);
                    if let (Ok(1..), Object::Shared(_, memory)) = (ready, &object) {
                        let memory = memory.iter().map(Arc::as_ptr).collect();
                        let shadows = session.shadows(|shadowed| shadowed.is_of(&memory));
                        shadows.iter().for_each(|shadow| shadow.to_guest());
                    }
                    let value = ready.map(|ready| i32::try_from(ready).unwrap_or(0));
                    Response::new(id, value)
                };
                self.run(id, timeout != Some(Duration::ZERO), ask, complete)
            }
            Operation::Read => {
                let read: &ReadRequest = only_body(rest)?;
                require(read.reserved == 0, Errno::EINVAL)?;
                let Object::File(file) = self.object(object_id)? else {
                    return Err(Errno::EINVAL);
                };
                let length = usize::try_from(read.length.get()).map_err(|_| Errno::EINVAL)?;
                require(length <= room, Errno::EINVAL)?;
                self.within(Limit::Message, length <= self.message_limit())
                    .map_err(|_| Errno::EINVAL)?;
                let waits = !file.nonblocking;
                let ask = move |cancel: &Cancel| {
                    let mut bytes = vec![0; length];
                    let result = file.host.read(&mut bytes, cancel);
                    bytes.truncate(result.unwrap_or(0));
                    Response {
                        payload: Payload::Bytes(bytes),
                        ..Response::new(id, result.map(|count| i32::try_from(count).unwrap_or(0)))
                    }
                };
                self.run(id, waits, ask, complete)
            }
            Operation::Watch => {
                let watch: &WatchRequest = only_body(rest)?;
                require(watch.reserved == 0, Errno::EINVAL)?;
                let object = self.object(object_id)?;
                done(self.watch(id, object, watch.events.get())?)
            }
            Operation::Size => {
                require(rest.is_empty(), Errno::EINVAL)?;
                require(room >= size_of::<SizeResponse>(), Errno::EINVAL)?;
                let object = self.object(object_id)?;
                let size = guard(|| object.host().size()).flatten()?;
                let size = SizeResponse { size: size.into() };
                Ok(Some(Response {
                    payload: Payload::Bytes(size.as_bytes().to_vec()),
                    ..Response::new(id, Ok(0))
                }))
            }
            Operation::Cancel => {
                let cancel: &CancelRequest = only_body(rest)?;
                let found = self.state().in_flight.get(&cancel.id.get()).cloned();
                self.workers.cancel(found.flatten().ok_or(Errno::ENOENT)?);
                done(0)
            }
        }
    }

    /// Runs an operation here, or on a worker thread if it may wait.
    fn run(
        self: &Arc<Self>,
        id: u64,
        waits: bool,
        operation: impl FnOnce(&Cancel) -> Response + Send + 'static,
        complete: impl FnOnce() -> Complete,
    ) -> Result<Option<Response>, Errno> {
        let operation = move |cancel: &Cancel| {
            guard(|| operation(cancel)).unwrap_or_else(|errno| Response::new(id, Err(errno)))
        };
        if !waits {
            return Ok(Some(operation(&Cancel::new())));
        }
        let (booked, cancel) = self.book(id, self.limits.in_flight, false)?;
        let time = Arc::clone(&self.worker_time);
        let counters = Arc::clone(&self.counters);
        let begin = Instant::now();
        self.start(|| {
            let complete = complete();
            Box::new(move || {
                let response = time.spend_on(|| operation(&cancel));
                // The id is free again before the guest can see the response.
                drop((cancel, booked));
                response.count(&counters);
                counters.waited.record_since(begin);
                complete(response);
            })
        })?;
        Ok(None)
    }

    /// Counts a request as one in flight; `EAGAIN` when there are `limit` already.
    fn book(
        self: &Arc<Self>,
        id: u64,
        limit: u32,
        watch: bool,
    ) -> Result<(Booked, Arc<Cancel>), Errno> {
        let cancel = Arc::new(Cancel::new());
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut state = self.state();
        require(!state.ended, Errno::ENODEV)?;
        self.within(Limit::InFlight, state.in_flight.len() < limit)?;
        require(!state.in_flight.contains_key(&id), Errno::EINVAL)?;
        self.within(Limit::WorkerTime, self.worker_time.is_left())?;
        state.in_flight.insert(id, Some(Arc::clone(&cancel)));
        state.watches += usize::from(watch);
        let session = Arc::downgrade(self);
        Ok((Booked { session, id, watch }, cancel))
    }

    fn start(&self, job: impl FnOnce() -> Job) -> Result<(), Errno> {
        self.workers.run(job).map_err(|_| Errno::EAGAIN)
    }

    /// Refuses what is not within a limit, and counts that.
    fn within(&self, limit: Limit, holds: bool) -> Result<(), Errno> {
        if holds {
            return Ok(());
        }
        self.counters.reached(limit);
        Err(limit.errno())
    }

    /// Books what counts against a limit.
    fn charge(
        &self,
        limit: Limit,
        total: &Arc<AtomicU64>,
        amount: u64,
        most: u64,
    ) -> Result<Charge, Errno> {
        let charge = Charge::new(total, amount, most);
        self.within(limit, charge.is_some())?;
        charge.ok_or(limit.errno())
    }

    /// Gives the events that are there, or sees to it that they are reported.
    fn watch(self: &Arc<Self>, id: u64, object: Object, events: u32) -> Result<i32, Errno> {
        let report = self.report.clone().filter(|report| report.is_there());
        let report = report.ok_or(Errno::EOPNOTSUPP)?;
        let poll = move |timeout, cancel: &Cancel| {
            guard(|| object.host().poll(events, timeout, cancel)).flatten()
        };
        let ready = poll(Some(Duration::ZERO), &Cancel::new())?;
        if ready != 0 {
            return Ok(i32::try_from(ready).unwrap_or(0));
        }
        // Watches leave a quarter to requests: many of them must not keep a guest's calls from waiting.
        let limit = self.limits.in_flight;
        let (booked, cancel) = self.book(id, limit - limit / 4, true)?;
        let time = Arc::clone(&self.worker_time);
        self.start(|| {
            Box::new(move || {
                let events = match time.spend_on(|| poll(None, &cancel)) {
                    Ok(ready) => ready,
                    Err(Errno::EINTR) => 0,
                    Err(_) => u32::from(libc::POLLERR.unsigned_abs()),
                };
                drop((poll, cancel));
                if booked.settle() {
                    let event = wire::Event {
                        id: id.into(),
                        events: events.into(),
                        reserved: 0.into(),
                    };
                    report.report(Pending { event, _id: booked });
                }
            })
        })?;
        Ok(0)
    }

    fn hello(&self, id: u64, payload: &[u8], room: usize) -> Result<Response, Errno> {
        let hello: Hello<'_> = control::decode(payload)?;
        let range = hello.version_min..=hello.version_max;
        require(range.contains(&wire::VERSION), Errno::EOPNOTSUPP)?;
        let mut state = self.state();
        require(!state.open && !state.ended, Errno::EBUSY)?;
        let identity = self.driver.identity();
        let features = match self.pages {
            Some(_) => hello.features & wire::feature::MAP_PAGES,
            None => 0,
        };
        let reply = HelloReply {
            version: wire::VERSION,
            features,
            limits: self.limits,
            aperture: self.aperture.as_ref().map_or(0, |aperture| aperture.size()),
            driver: control::DriverIdentity {
                name: &identity.name,
                version: identity.version,
                date: &identity.date,
                description: &identity.description,
            },
        };
        let mut bytes = vec![0; control::RECORD_LIMIT.min(room)];
        let length = control::encode(&reply, &mut bytes)?;
        bytes.truncate(length);
        state.open = true;
        state.maps_pages = features & wire::feature::MAP_PAGES != 0;
        let guest: String = hello.guest.chars().take(64).collect();
        guest_log!(info, "session of {:?} on {}", guest, identity.name);
        state.guest = statistics::shortened(&guest);
        Ok(Response {
            payload: Payload::Bytes(bytes),
            ..Response::new(id, Ok(0))
        })
    }

    fn open(&self, open: &OpenRequest) -> Result<i32, Errno> {
        let flags = open.flags.get();
        let allowed = wire::open::RDWR | wire::open::NONBLOCK;
        require(flags & !allowed == 0 && open.reserved == 0, Errno::EINVAL)?;
        // Opening may be slow, so the lock is not held; the limit is checked again when the file goes in.
        self.room_for_object(&self.state())?;
        let host = guard(|| self.driver.open(flags)).flatten()?;
        let file = File {
            host,
            nonblocking: flags & wire::open::NONBLOCK != 0,
            handles: Mutex::default(),
            table: RwLock::default(),
        };
        self.insert(Object::File(Arc::new(file)))
    }

    fn close(&self, id: i32) -> Result<(), Errno> {
        let object = self.state().objects.remove(&id);
        // What it holds is let go of here, without the lock.
        let object = object.ok_or(Errno::EBADF)?;
        guard(|| drop(object))
    }

    fn ioctl(
        self: &Arc<Self>,
        id: u64,
        object: i32,
        command: u32,
        payload: &[u8],
        room: usize,
        complete: impl FnOnce() -> Complete,
    ) -> Result<Option<Response>, Errno> {
        let Object::File(file) = self.object(object)? else {
            return Err(Errno::ENOTTY);
        };
        let ioctl = family::find(self.driver.families(), command)?;
        let owned = OwnedBy {
            session: self,
            file: &file,
        };
        let call = Call::new(ioctl, command, payload, &owned, self.message_limit());
        self.within(Limit::Message, !matches!(call, Err(Errno::E2BIG)))?;
        let call = call?;
        require(call.response_length() <= room, Errno::EINVAL)?;
        let waits = call.may_block();
        let session = Arc::clone(self);
        let run = move |cancel: &Cancel| {
            let mut call = call;
            match session.admit(&call) {
                Ok(admitted) => Response {
                    result: session.execute(&file, &mut call, admitted, cancel),
                    payload: Payload::Call(call),
                    id,
                },
                Err(errno) => Response::new(id, Err(errno)),
            }
        };
        self.run(id, waits, run, complete)
    }

    /// Holds a validated ioctl against the guest's limits, and books the memory that it is about to allocate.
    fn admit(&self, call: &Call) -> Result<Admitted, Errno> {
        let changes = call.handle_changes();
        let creates = changes.iter().filter(|change| change.created);
        let places = creates
            .map(|_| self.charge(Limit::Handles, &self.handles, 1, self.limits.handles.into()))
            .collect::<Result<Vec<_>, _>>()?;
        let state = self.state();
        if call.fds_out().next().is_some() {
            self.room_for_object(&state)?;
        }
        let mut memory = Vec::new();
        for imported in call.fds().filter_map(|(_, imported)| imported) {
            let same = |object: &&Object| Arc::ptr_eq(imported, object.host());
            match state.objects.values().find(same) {
                Some(Object::Shared(_, kept)) => memory.extend(kept.iter().cloned()),
                Some(Object::File(_)) => {}
                // Closed meanwhile, and with it went what a new handle would have to keep.
                None => require(places.is_empty(), Errno::EBADF)?,
            }
        }
        let allocated = call.allocated_bytes();
        if allocated > 0 {
            let charge = self.charge(Limit::Memory, &self.memory, allocated, self.limits.memory)?;
            memory.push(Arc::new(charge));
        }
        Ok(Admitted {
            memory,
            places,
            changes,
        })
    }

    /// Performs an admitted ioctl and keeps the books of what it creates and closes.
    fn execute(
        &self,
        file: &File,
        call: &mut Call,
        admitted: Admitted,
        cancel: &Cancel,
    ) -> Result<i32, Errno> {
        let coherence = call.ioctl().coherence;
        if coherence == Coherence::ToHost {
            self.shadows_of(file, call)
                .iter()
                .for_each(|shadow| shadow.to_host());
        }
        let (result, exported) = self.execute_booked(file, call, admitted, cancel);
        if coherence == Coherence::ToGuest && result.is_ok() {
            self.shadows_of(file, call)
                .iter()
                .for_each(|shadow| shadow.to_guest());
        }
        call.publish(|object| self.insert(Object::Shared(object, exported.clone())))?;
        result
    }

    /// Performs an admitted ioctl; also tells what memory the objects keep that it gives out.
    fn execute_booked(
        &self,
        file: &File,
        call: &mut Call,
        Admitted {
            memory,
            places,
            changes,
        }: Admitted,
        cancel: &Cancel,
    ) -> (Result<i32, Errno>, Vec<Arc<Charge>>) {
        let closes = changes.iter().any(|change| !change.created);
        let exports = call.fds_out().next().is_some() && call.gem_handles().next().is_some();
        let alone = || file.table.write().unwrap_or_else(PoisonError::into_inner);
        let shared = || file.table.read().unwrap_or_else(PoisonError::into_inner);
        let _alone = closes.then(alone);
        let _shared = (!closes && (exports || !places.is_empty())).then(shared);
        // A closed handle leaves the books first: the host may give its number to another call at once.
        let closed: Vec<_> = changes
            .iter()
            .filter(|change| !change.created)
            .filter_map(|change| {
                let key = (change.space, change.handle);
                file.handles().remove(&key).map(|kept| (key, kept))
            })
            .collect();
        let exported = match exports {
            true => exported_memory(file, call),
            false => Ok(Vec::new()),
        };
        let (result, exported) = match exported {
            Ok(exported) => (file.host.ioctl(call, cancel), exported),
            Err(errno) => (Err(errno), Vec::new()),
        };
        match result {
            Ok(_) => {
                record_created(file, call, &memory, places);
                record_offset(file, call);
            }
            Err(_) => file.handles().extend(closed),
        }
        (result, exported)
    }

    fn map(&self, object: i32, map: &MapRequest) -> Result<MapResponse, Errno> {
        require(map.reserved == 0, Errno::EINVAL)?;
        let (range, protection) = mapped_range(map.offset.get(), map.length.get(), map.protection)?;
        let length = range.end - range.start;
        let aperture = self.aperture.as_ref().ok_or(Errno::ENODEV)?;
        let object = self.object(object)?;
        self.book_mapped(&mut self.state(), length)?;
        let host = || object.host().mapping(range.start, length, protection);
        let mapping: Result<Mapping, Errno> = guard(host).flatten();
        let result = mapping.and_then(|mapping| aperture.map(&mapping, length));
        let mut state = self.state();
        match result {
            Ok(aperture_offset) if !state.ended => {
                state.mappings.insert(aperture_offset, length);
                Ok(MapResponse {
                    aperture_offset: aperture_offset.into(),
                    length: length.into(),
                })
            }
            Ok(aperture_offset) => {
                aperture.unmap(aperture_offset, length);
                Err(Errno::ENODEV)
            }
            Err(errno) => {
                state.mapped = state.mapped.saturating_sub(length);
                Err(errno)
            }
        }
    }

    /// Books bytes that are about to be mapped.
    fn book_mapped(&self, state: &mut State, length: u64) -> Result<(), Errno> {
        require(!state.ended, Errno::ENODEV)?;
        let mapped = state.mapped.saturating_add(length);
        self.within(Limit::Mapped, mapped <= self.limits.mapped)?;
        state.mapped = mapped;
        Ok(())
    }

    fn map_pages(&self, object: i32, rest: &[u8]) -> Result<MapResponse, Errno> {
        let (map, ranges) = body::<MapPagesRequest>(rest)?;
        let (range, protection) = mapped_range(map.offset.get(), map.length.get(), map.protection)?;
        let length = range.end - range.start;
        require(map.ranges.get() <= PAGE_RANGES_MAX, Errno::E2BIG)?;
        let ranges = <[PageRange]>::ref_from_bytes(ranges).map_err(|_| Errno::EINVAL)?;
        require(
            u32::try_from(ranges.len()) == Ok(map.ranges.get()),
            Errno::EINVAL,
        )?;
        let pages = self.pages.as_ref().ok_or(Errno::ENODEV)?;
        require(self.state().maps_pages, Errno::ENODEV)?;
        let object = self.object(object)?;
        let (file, memory) = match &object {
            Object::File(file) => (Arc::downgrade(file), file.memory_at(&range)?),
            Object::Shared(_, memory) => (Weak::new(), memory.clone()),
        };
        require(!memory.is_empty(), Errno::ENODEV)?;
        {
            let mut state = self.state();
            require(state.shadows.len() < SHADOWS_MAX, Errno::ENOMEM)?;
            self.book_mapped(&mut state, length)?;
        }
        let write = protection & wire::protection::WRITE != 0;
        let host = || object.host().mapping(range.start, length, protection);
        let mapping: Result<Mapping, Errno> = guard(host).flatten();
        let result =
            mapping.and_then(|mapping| Shadow::new(pages, ranges, &mapping, length, write));
        let mut state = self.state();
        match result {
            Ok(shadow) if !state.ended => {
                state.next_shadow += 1;
                let number = state.next_shadow;
                let shadowed = Shadowed {
                    shadow: Arc::new(shadow),
                    length,
                    file,
                    memory: memory.iter().map(Arc::downgrade).collect(),
                };
                state.shadows.insert(number, shadowed);
                Ok(MapResponse {
                    aperture_offset: number.into(),
                    length: length.into(),
                })
            }
            Ok(_) => Err(Errno::ENODEV),
            Err(errno) => {
                state.mapped = state.mapped.saturating_sub(length);
                Err(errno)
            }
        }
    }

    /// The mappings with pages of the guest that a call is about: those of the buffers that it names, or if it names none, all
    /// that its file has made.
    fn shadows_of(&self, file: &File, call: &Call) -> Vec<Arc<Shadow>> {
        if self.pages.is_none() || self.state().shadows.is_empty() {
            return Vec::new();
        }
        let mut named = false;
        let mut memory = HashSet::new();
        let handles = file.handles();
        for handle in call.used_gem_handles() {
            named = true;
            if let Some(handle) = handles.get(&(Space::Gem, handle)) {
                memory.extend(handle.memory.iter().map(Arc::as_ptr));
            }
        }
        drop(handles);
        self.shadows(|shadowed| match named {
            true => shadowed.is_of(&memory),
            false => std::ptr::eq(shadowed.file.as_ptr(), file),
        })
    }

    fn shadows(&self, concerned: impl Fn(&Shadowed) -> bool) -> Vec<Arc<Shadow>> {
        let state = self.state();
        let shadows = state
            .shadows
            .values()
            .filter(|shadowed| concerned(shadowed));
        shadows
            .map(|shadowed| Arc::clone(&shadowed.shadow))
            .collect()
    }

    fn unmap(&self, unmap: &UnmapRequest) -> Result<(), Errno> {
        let (offset, length) = (unmap.aperture_offset.get(), unmap.length.get());
        let Some(aperture) = &self.aperture else {
            require(self.pages.is_some(), Errno::ENODEV)?;
            return self.unmap_pages(offset, length);
        };
        {
            let mut state = self.state();
            require(state.mappings.get(&offset) == Some(&length), Errno::EINVAL)?;
            state.mappings.remove(&offset);
            state.mapped = state.mapped.saturating_sub(length);
        }
        aperture.unmap(offset, length);
        Ok(())
    }

    fn unmap_pages(&self, number: u64, length: u64) -> Result<(), Errno> {
        let shadowed = {
            let mut state = self.state();
            let same = |shadowed: &&Shadowed| shadowed.length == length;
            require(
                state.shadows.get(&number).filter(same).is_some(),
                Errno::EINVAL,
            )?;
            state.mapped = state.mapped.saturating_sub(length);
            state.shadows.remove(&number)
        };
        if let Some(shadowed) = shadowed {
            // A program may map, write, unmap, and only then draw.
            shadowed.shadow.to_host();
            shadowed.shadow.end();
        }
        Ok(())
    }

    fn end(&self) {
        let (in_flight, objects, mappings, shadows) = {
            let mut state = self.state();
            state.ended = true;
            state.open = false;
            state.mapped = 0;
            let in_flight: Vec<_> = state.in_flight.values().flatten().cloned().collect();
            (
                in_flight,
                std::mem::take(&mut state.objects),
                std::mem::take(&mut state.mappings),
                std::mem::take(&mut state.shadows),
            )
        };
        for cancel in in_flight {
            self.workers.cancel(cancel);
        }
        self.workers.drain();
        if let Some(aperture) = &self.aperture {
            for (offset, length) in mappings {
                aperture.unmap(offset, length);
            }
        }
        for shadowed in shadows.values() {
            shadowed.shadow.end();
        }
        for object in objects {
            // Already said: the session ends all the same.
            let _ = guard(|| drop(object));
        }
    }

    fn usage(&self) -> Usage {
        let state = self.state();
        let is_file = |object: &&Object| matches!(object, Object::File(_));
        Usage {
            files: state.objects.values().filter(is_file).count(),
            objects: state.objects.len(),
            mapped: state.mapped,
            memory: self.memory.load(Ordering::Relaxed),
            handles: self.handles.load(Ordering::Relaxed),
            in_flight: state.in_flight.len(),
            watches: state.watches,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn message_limit(&self) -> usize {
        usize::try_from(self.limits.message).unwrap_or(usize::MAX)
    }

    fn object(&self, id: i32) -> Result<Object, Errno> {
        self.state().objects.get(&id).cloned().ok_or(Errno::EBADF)
    }

    fn room_for_object(&self, state: &State) -> Result<(), Errno> {
        let limit = usize::try_from(self.limits.objects).unwrap_or(usize::MAX);
        require(!state.ended, Errno::ENODEV)?;
        self.within(Limit::Objects, state.objects.len() < limit)
    }

    /// Gives an object the next free id. On failure the object is dropped, and with it what the host has opened.
    fn insert(&self, object: Object) -> Result<i32, Errno> {
        let mut state = self.state();
        self.room_for_object(&state)?;
        loop {
            // Ids start at 1 and are reused late, so that a guest's mistake rarely hits another object.
            state.next_object = state.next_object.checked_add(1).unwrap_or(1);
            let id = state.next_object;
            if let std::collections::hash_map::Entry::Vacant(entry) = state.objects.entry(id) {
                entry.insert(object);
                return Ok(id);
            }
        }
    }
}

/// The memory of the buffers that a call exports; `ENOENT` for one that was closed since it was checked.
fn exported_memory(file: &File, call: &Call) -> Result<Vec<Arc<Charge>>, Errno> {
    let handles = file.handles();
    let mut memory = Vec::new();
    for handle in call.gem_handles() {
        let booked = handles.get(&(Space::Gem, handle)).ok_or(Errno::ENOENT)?;
        memory.extend(booked.memory.iter().cloned());
    }
    Ok(memory)
}

/// Books the handles that a successful call has created; they keep `memory`.
fn record_created(file: &File, call: &Call, memory: &[Arc<Charge>], places: Vec<Charge>) {
    let mut handles = file.handles();
    let mut places = places.into_iter();
    for change in call.handle_changes() {
        if change.created && change.handle != 0 {
            // An import may return a handle that the file already has, which keeps what it kept.
            let key = (change.space, change.handle);
            handles.entry(key).or_insert_with(|| Handle {
                memory: memory.to_vec(),
                offset: None,
                _place: places.next(),
            });
        }
    }
}

/// Notes where a successful call has said that a buffer can be mapped.
fn record_offset(file: &File, call: &Call) {
    if let Some((handle, offset)) = call.mapping_offset()
        && let Some(handle) = file.handles().get_mut(&(Space::Gem, handle))
    {
        handle.offset = Some(offset);
    }
}

/// A file's handles and its session's objects.
struct OwnedBy<'a> {
    session: &'a Shared,
    file: &'a File,
}

impl Owned for OwnedBy<'_> {
    fn owns(&self, space: Space, handle: u32) -> bool {
        self.file.handles().contains_key(&(space, handle))
    }

    fn object(&self, id: i32) -> Result<Arc<dyn HostObject>, Errno> {
        self.session
            .object(id)
            .map(|object| Arc::clone(object.host()))
    }
}

#[cfg(test)]
mod tests;
