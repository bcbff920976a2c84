//! What programs of two guests do with their device files, in any order, on one embedded GPU: open, draw, share, wait, cancel, end.
//!
//! Input: steps. Most are valid: they name what is there. Every request must get exactly one answer, every accepted watch at most
//! one event; and when both guests are gone, all GPU memory and all that they had mapped is free again. The first guest has an
//! aperture; the second one maps with pages of its own, and no other byte of its memory may change.

use crate::{hello, ioctl, judge, request};
use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::session::{Pending, Response, Session};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::family::core::{self, syncobj};
use pvgpu_protocol::family::soft::{self, param};
use pvgpu_protocol::layout::align;
use pvgpu_protocol::wire::{
    CancelRequest, MapPagesRequest, MapRequest, MapResponse, OpenRequest, Operation, PAGE_SIZE,
    PageRange, PollRequest, ReadRequest, UnmapRequest, WatchRequest, open,
};
use std::collections::HashSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of GPU memory: few, so that it runs out.
const MEMORY: u64 = 1 << 20;
/// Bytes of the first guest's aperture, and bytes of the second one's memory that it maps with.
const APERTURE: u64 = 64 << 10;
/// Bytes of the second guest's memory that nothing may touch, behind those.
const UNTOUCHED: usize = 64 << 10;
/// Bytes that any response fits into.
const ROOM: usize = 4096;
/// How long the GPU may take to let go of what a guest had. It takes microseconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most steps of an input: later ones tell no more.
const STEPS: usize = 64;

/// What each guest may use: little, so that limits are reached.
const LIMITS: Limits = Limits {
    message: 16 << 10,
    objects: 12,
    in_flight: 8,
    mapped: 1 << 20,
    memory: 1 << 19,
    handles: 24,
};

/// The GPU of both guests. It stays, since its threads take longer to start than an input to run.
static GPU: LazyLock<Arc<SoftDriver>> = LazyLock::new(|| {
    let config = SoftConfig {
        memory: MEMORY,
        buffers: 64,
        engines: 2,
        watchdog: Duration::from_millis(20),
        sandbox: Sandbox::Off,
    };
    Arc::new(SoftDriver::new(config).expect("threads"))
});

/// The aperture of the first guest.
static FIRST: LazyLock<Arc<Aperture>> =
    LazyLock::new(|| Arc::new(Aperture::reserve(APERTURE).expect("address space")));

/// The memory of the second guest.
static MEMORY_OF_SECOND: LazyLock<GuestMemoryAtomic<GuestMemoryMmap>> = LazyLock::new(|| {
    let range = (GuestAddress(0), APERTURE as usize + UNTOUCHED);
    let memory = GuestMemoryMmap::from_ranges(&[range]).expect("memory");
    GuestMemoryAtomic::new(memory)
});

/// One of what there is: a number that is taken modulo how many there are. High ones name something that is not there.
type Choice = u8;

/// What a program does.
#[derive(Arbitrary, Debug)]
enum Step {
    Open {
        nonblock: bool,
    },
    Close {
        object: Choice,
    },
    Create {
        file: Choice,
        pages: u8,
    },
    CloseHandle {
        file: Choice,
        handle: Choice,
    },
    Map {
        file: Choice,
        handle: Choice,
        pages: u8,
    },
    MapObject {
        object: Choice,
        pages: u8,
    },
    Unmap {
        mapping: Choice,
    },
    Submit(Submission),
    Wait {
        file: Choice,
        seqno: u8,
        handle: Choice,
        buffer: bool,
        wait: Timeout,
    },
    Export {
        file: Choice,
        handle: Choice,
    },
    Import {
        file: Choice,
        object: Choice,
    },
    SyncobjCreate {
        file: Choice,
        signaled: bool,
    },
    SyncobjDestroy {
        file: Choice,
        handle: Choice,
    },
    SyncobjExport {
        file: Choice,
        handle: Choice,
        fence: bool,
    },
    SyncobjImport {
        file: Choice,
        object: Choice,
        handle: Choice,
        fence: bool,
    },
    SyncobjWait {
        file: Choice,
        handles: [Choice; 2],
        flags: u8,
        wait: Timeout,
    },
    SyncobjTimelineWait {
        file: Choice,
        handles: [Choice; 2],
        point: u8,
        flags: u8,
        wait: Timeout,
    },
    SyncobjChange {
        file: Choice,
        handle: Choice,
        signal: bool,
    },
    SyncobjTimelineSignal {
        file: Choice,
        handle: Choice,
        point: u8,
    },
    SyncobjQuery {
        file: Choice,
        handle: Choice,
    },
    SyncobjTransfer {
        file: Choice,
        from: Choice,
        to: Choice,
        points: [u8; 2],
        wait: bool,
    },
    Poll {
        object: Choice,
        events: u8,
        wait: Timeout,
    },
    Watch {
        object: Choice,
        events: u8,
    },
    Cancel {
        back: u8,
    },
    Read {
        object: Choice,
        length: u8,
    },
    Size {
        object: Choice,
    },
    Memory {
        file: Choice,
        param: u8,
    },
    End,
}

/// Commands for a queue.
#[derive(Arbitrary, Debug)]
struct Submission {
    file: Choice,
    buffers: [Choice; 2],
    commands: Vec<Drawing>,
    before: Option<(Choice, u8)>,
    after: Option<(Choice, u8)>,
    fence_in: Option<Choice>,
    fence_out: bool,
}

/// A command.
#[derive(Arbitrary, Debug)]
enum Drawing {
    Fill {
        color: [u8; 4],
    },
    Copy {
        length: u8,
    },
    Store {
        offset: u16,
        value: u32,
    },
    /// Rarely: it takes as long as the watchdog's patience.
    Hang {
        really: u8,
    },
}

/// How long something waits.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Timeout {
    None,
    Short(u8),
    ForEver,
}

impl Timeout {
    fn nanoseconds(self) -> i64 {
        match self {
            Self::None => 0,
            Self::Short(microseconds) => 1000 * i64::from(microseconds),
            Self::ForEver => i64::MAX,
        }
    }
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    // Too few bytes are no input.
    let _ = play(Unstructured::new(bytes));
}

fn play(mut input: Unstructured<'_>) -> Result<()> {
    let mut guests = [0, 1].map(Guest::new);
    for step in input.arbitrary_iter::<(bool, Step)>()?.take(STEPS) {
        let (second, step) = step?;
        let guest = &mut guests[usize::from(second)];
        guest.step(step);
        guest.collect();
    }
    guests.into_iter().for_each(Guest::end);
    for (number, mut guest) in [0, 1].map(|number| (number, Guest::new(number))) {
        guest.step(Step::Open { nonblock: false });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let free = guest.param(param::MEMORY_FREE);
            if free == MEMORY {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{free} of {MEMORY} bytes are free"
            );
            std::thread::yield_now();
        }
        let pages = u8::try_from(APERTURE / PAGE_SIZE).expect("few");
        guest.step(Step::Create { file: 0, pages });
        guest.step(Step::Map {
            file: 0,
            handle: 0,
            pages,
        });
        let all = (number as u64, APERTURE);
        assert_eq!(
            guest.mappings,
            [all],
            "guest {number}: a mapping was left behind"
        );
        guest.end();
    }
    Ok(())
}

/// The answer to a request that waited, with its id.
type Later = (u64, Response);

struct Guest {
    number: usize,
    session: Session,
    files: Vec<i32>,
    objects: Vec<i32>,
    handles: Vec<u32>,
    syncobjs: Vec<u32>,
    /// Offset and length of each.
    mappings: Vec<(u64, u64)>,
    next_id: u64,
    /// Requests that wait.
    waiting: HashSet<u64>,
    /// Watches that were accepted.
    watches: HashSet<u64>,
    /// Where the answers to those come.
    later: (Sender<Later>, Receiver<Later>),
    events: Receiver<Pending>,
}

impl Guest {
    fn new(number: usize) -> Self {
        let (report, events) = channel();
        let report = move |event| report.send(event).unwrap_or(());
        let (gpu, report) = (GPU.clone(), Arc::new(report));
        let session = match number {
            0 => Session::with_report(gpu, Some(FIRST.clone()), LIMITS, report),
            _ => Session::without_aperture(gpu, MEMORY_OF_SECOND.clone(), LIMITS, Some(report))
                .expect("scratch memory"),
        };
        let mut guest = Self {
            number,
            session,
            files: Vec::new(),
            objects: Vec::new(),
            handles: Vec::new(),
            syncobjs: Vec::new(),
            mappings: Vec::new(),
            next_id: 1,
            waiting: HashSet::new(),
            watches: HashSet::new(),
            later: channel(),
            events,
        };
        let (result, _) = guest.send(&hello(), 0).expect("a hello does not wait");
        assert_eq!(result, 0, "no session");
        guest
    }

    /// Sends a request. `None` when it waits.
    fn send(&mut self, request: &[u8], id: u64) -> Option<(i32, Vec<u8>)> {
        let sender = self.later.0.clone();
        let response = self.session.perform(request, ROOM, || {
            Box::new(move |response| sender.send((id, response)).unwrap_or(()))
        });
        match response {
            Some(response) => Some(judge(&response, id, ROOM)),
            None => {
                self.waiting.insert(id);
                None
            }
        }
    }

    /// Takes the answers and events that are there.
    fn collect(&mut self) {
        while let Ok((id, response)) = self.later.1.try_recv() {
            assert!(self.waiting.remove(&id), "a second answer");
            judge(&response, id, ROOM);
        }
        while let Ok(event) = self.events.try_recv() {
            let id = event.event().id.get();
            assert!(self.watches.remove(&id), "an event that nobody waits for");
        }
    }

    /// Ends the session; whatever waits is answered.
    fn end(mut self) {
        self.session.end();
        self.collect();
        assert!(
            self.waiting.is_empty(),
            "{} answers are missing",
            self.waiting.len()
        );
        let usage = self.session.usage();
        assert_eq!(
            (usage.objects, usage.mapped, usage.memory, usage.in_flight),
            (0, 0, 0, 0)
        );
        let mut untouched = vec![1; UNTOUCHED];
        let memory = MEMORY_OF_SECOND.memory();
        let read = memory.read_slice(&mut untouched, GuestAddress(APERTURE));
        read.expect("memory");
        assert!(
            untouched.iter().all(|byte| *byte == 0),
            "memory was touched that was never given"
        );
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// An operation with a body and no payload.
    fn operate<B: IntoBytes + Immutable>(
        &mut self,
        operation: Operation,
        object: i32,
        body: &B,
    ) -> Option<(i32, Vec<u8>)> {
        let id = self.id();
        self.send(&request(operation, object, id, body, &[]), id)
    }

    /// An ioctl with an argument and arrays that go in. Gives the argument that comes back after success.
    fn ioctl<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        file: Choice,
        command: u32,
        argument: &T,
        arrays: &[&[u8]],
    ) -> Option<T> {
        let file = choose(&self.files, file);
        let mut payload = argument.as_bytes().to_vec();
        for array in arrays.iter().filter(|array| !array.is_empty()) {
            payload.resize(align(payload.len()), 0);
            payload.extend(*array);
        }
        let id = self.id();
        let (result, bytes) = self.send(&ioctl(file, id, command, &payload), id)?;
        let (argument, _) = T::read_from_prefix(&bytes).ok()?;
        (result >= 0).then_some(argument)
    }

    fn handle(&self, choice: Choice) -> u32 {
        choose(&self.handles, choice)
    }

    fn syncobj(&self, choice: Choice) -> u32 {
        choose(&self.syncobjs, choice)
    }

    /// A file or another object.
    fn object(&self, choice: Choice) -> i32 {
        choose(&[&self.files[..], &self.objects].concat(), choice)
    }

    fn param(&mut self, param: u64) -> u64 {
        let get = soft::GetParam { param, value: 0 };
        let got = self.ioctl(0, soft::DRM_IOCTL_SOFT_GETPARAM, &get, &[]);
        got.expect("a parameter").value
    }

    fn map(&mut self, object: i32, offset: u64, pages: u8) {
        if self.number == 1 {
            return self.map_pages(object, offset, pages);
        }
        let body = MapRequest {
            offset: offset.into(),
            length: (u64::from(pages) * PAGE_SIZE).into(),
            protection: 3.into(),
            reserved: 0.into(),
        };
        if let Some((0, bytes)) = self.operate(Operation::Map, object, &body) {
            let mapped = MapResponse::read_from_bytes(&bytes).expect("16 bytes");
            let (offset, length) = (mapped.aperture_offset.get(), mapped.length.get());
            assert!(length == u64::from(pages) * PAGE_SIZE && offset + length <= APERTURE);
            let overlap =
                |(start, size): &(u64, u64)| *start < offset + length && offset < start + size;
            assert!(
                !self.mappings.iter().any(overlap),
                "mapped over another mapping"
            );
            self.mappings.push((offset, length));
        }
    }

    /// Maps with pages of this guest: the last one first, so that none follows the one before, and all of them again and again.
    fn map_pages(&mut self, object: i32, offset: u64, pages: u8) {
        let length = u64::from(pages) * PAGE_SIZE;
        let body = MapPagesRequest {
            offset: offset.into(),
            length: length.into(),
            protection: 3.into(),
            ranges: u32::from(pages).into(),
        };
        let range = |page: u8| PageRange {
            address: (APERTURE - PAGE_SIZE - u64::from(page) * PAGE_SIZE % APERTURE).into(),
            length: PAGE_SIZE.into(),
        };
        let ranges: Vec<_> = (0..pages).map(range).collect();
        let id = self.id();
        let request = request(Operation::MapPages, object, id, &body, ranges.as_bytes());
        if let Some((0, bytes)) = self.send(&request, id) {
            let mapped = MapResponse::read_from_bytes(&bytes).expect("16 bytes");
            let (number, mapped) = (mapped.aperture_offset.get(), mapped.length.get());
            assert!(mapped == length && !self.mappings.iter().any(|(other, _)| *other == number));
            self.mappings.push((number, length));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Open { nonblock } => {
                let flags = open::RDWR | if nonblock { open::NONBLOCK } else { 0 };
                let body = OpenRequest {
                    flags: flags.into(),
                    reserved: 0.into(),
                };
                if let Some((file @ 1.., _)) = self.operate(Operation::Open, 0, &body) {
                    self.files.push(file);
                }
            }
            Step::Close { object } => {
                let object = self.object(object);
                if let Some((0, _)) = self.operate(Operation::Close, object, &()) {
                    self.files.retain(|other| *other != object);
                    self.objects.retain(|other| *other != object);
                }
            }
            Step::Create { file, pages } => {
                let create = soft::GemCreate {
                    size: u64::from(pages) * PAGE_SIZE,
                    ..Default::default()
                };
                let created = self.ioctl(file, soft::DRM_IOCTL_SOFT_GEM_CREATE, &create, &[]);
                self.handles.extend(created.map(|created| created.handle));
            }
            Step::CloseHandle { file, handle } => {
                let handle = self.handle(handle);
                let close = core::GemClose { handle, pad: 0 };
                self.ioctl(file, core::GEM_CLOSE, &close, &[]);
            }
            Step::Map {
                file,
                handle,
                pages,
            } => {
                let mmap = soft::GemMmap {
                    handle: self.handle(handle),
                    ..Default::default()
                };
                let found = self.ioctl(file, soft::DRM_IOCTL_SOFT_GEM_MMAP, &mmap, &[]);
                if let Some(found) = found {
                    let file = choose(&self.files, file);
                    self.map(file, found.offset, pages);
                }
            }
            Step::MapObject { object, pages } => {
                let object = self.object(object);
                self.map(object, 0, pages);
            }
            Step::Unmap { mapping } => {
                let (offset, length) = choose(&self.mappings, mapping);
                let body = UnmapRequest {
                    aperture_offset: offset.into(),
                    length: length.into(),
                };
                let unmapped = self.operate(Operation::Unmap, 0, &body);
                let known = self.mappings.iter().position(|at| *at == (offset, length));
                assert_eq!(
                    unmapped.map(|(result, _)| result == 0),
                    Some(known.is_some())
                );
                known.map(|index| self.mappings.swap_remove(index));
            }
            Step::Submit(submission) => self.submit(&submission),
            Step::Wait {
                file,
                seqno,
                handle,
                buffer,
                wait,
            } => {
                let wait = soft::Wait {
                    seqno: if buffer { 0 } else { seqno.into() },
                    deadline_ns: wait.nanoseconds(),
                    handle: if buffer { self.handle(handle) } else { 0 },
                    flags: u32::from(buffer) * soft::WAIT_BUFFER,
                    ..Default::default()
                };
                self.ioctl(file, soft::DRM_IOCTL_SOFT_WAIT, &wait, &[]);
            }
            Step::Export { file, handle } => {
                let export = core::PrimeHandleToFd {
                    handle: self.handle(handle),
                    flags: core::prime::RDWR,
                    fd: 0,
                };
                let exported = self.ioctl(file, core::PRIME_HANDLE_TO_FD, &export, &[]);
                self.objects.extend(exported.map(|exported| exported.fd));
            }
            Step::Import { file, object } => {
                let import = core::PrimeFdToHandle {
                    fd: self.object(object),
                    ..Default::default()
                };
                let imported = self.ioctl(file, core::PRIME_FD_TO_HANDLE, &import, &[]);
                self.handles
                    .extend(imported.map(|imported| imported.handle));
            }
            Step::Memory { file, param } => {
                let get = soft::GetParam {
                    param: param.into(),
                    value: 0,
                };
                self.ioctl(file, soft::DRM_IOCTL_SOFT_GETPARAM, &get, &[]);
            }
            Step::End => {
                let number = self.number;
                std::mem::replace(self, Self::new(number)).end();
            }
            Step::Poll { .. }
            | Step::Watch { .. }
            | Step::Cancel { .. }
            | Step::Read { .. }
            | Step::Size { .. } => self.wait_step(&step),
            _ => self.syncobj_step(&step),
        }
    }

    fn submit(&mut self, submission: &Submission) {
        let handles = submission.buffers.map(|choice| self.handle(choice));
        let buffers: Vec<u8> = handles
            .iter()
            .flat_map(|handle| handle.to_le_bytes())
            .collect();
        let mut memory = [0; 2048];
        let mut stream = soft::Stream::new(&mut memory);
        for drawing in &submission.commands {
            let pushed = match *drawing {
                Drawing::Fill { color } => {
                    let target = soft::Surface {
                        buffer: 0,
                        stride: 128,
                        offset: 0,
                        width: 32,
                        height: 32,
                    };
                    let rectangle = soft::Rectangle {
                        x: 0,
                        y: 0,
                        width: 32,
                        height: 32,
                    };
                    let fill = soft::Fill {
                        target,
                        rectangle,
                        color,
                        ..Default::default()
                    };
                    stream.push(0, &fill)
                }
                Drawing::Copy { length } => {
                    let copy = soft::CopyBytes {
                        source: 0,
                        target: 1,
                        target_offset: u64::from(length) * 8,
                        length: u64::from(length),
                        ..Default::default()
                    };
                    stream.push(0, &copy)
                }
                Drawing::Store { offset, value } => {
                    let store = soft::Store {
                        buffer: 1,
                        value,
                        offset: u64::from(offset) * 4,
                        ..Default::default()
                    };
                    stream.push(0, &store)
                }
                Drawing::Hang { really: 255 } => stream.push(0, &soft::Hang::default()),
                Drawing::Hang { .. } => Ok(()),
            };
            if pushed.is_err() {
                break;
            }
        }
        let sync = |(choice, point): (Choice, u8)| soft::Sync {
            handle: self.syncobj(choice),
            flags: 0,
            point: point.into(),
        };
        let (before, after) = (submission.before.map(sync), submission.after.map(sync));
        let bytes =
            |sync: &Option<soft::Sync>| sync.map_or(Vec::new(), |sync| sync.as_bytes().to_vec());
        let (before, after) = (bytes(&before), bytes(&after));
        let commands = stream.bytes();
        let fence_in = submission.fence_in.map_or(0, |_| soft::SUBMIT_FENCE_FD_IN);
        let fence_out = u32::from(submission.fence_out) * soft::SUBMIT_FENCE_FD_OUT;
        let count = |bytes: &[u8], size: usize| u32::try_from(bytes.len() / size).expect("few");
        let argument = soft::Submit {
            commands: u64::from(!commands.is_empty()),
            buffers: 1,
            in_syncs: u64::from(!before.is_empty()),
            out_syncs: u64::from(!after.is_empty()),
            commands_size: count(commands, 1),
            buffer_count: 2,
            in_sync_count: count(&before, size_of::<soft::Sync>()),
            out_sync_count: count(&after, size_of::<soft::Sync>()),
            flags: fence_in | fence_out,
            fence_fd: submission.fence_in.map_or(-1, |choice| self.object(choice)),
            seqno: 0,
        };
        let commands = commands.to_vec();
        let arrays = [&commands[..], &buffers, &before, &after];
        let submitted = self.ioctl(
            submission.file,
            soft::DRM_IOCTL_SOFT_SUBMIT,
            &argument,
            &arrays,
        );
        if let Some(submitted) = submitted.filter(|_| submission.fence_out) {
            self.objects.push(submitted.fence_fd);
        }
    }

    fn wait_step(&mut self, step: &Step) {
        match *step {
            Step::Poll {
                object,
                events,
                wait,
            } => {
                let body = PollRequest {
                    events: u32::from(events).into(),
                    reserved: 0.into(),
                    timeout_ns: wait.nanoseconds().into(),
                };
                let object = self.object(object);
                self.operate(Operation::Poll, object, &body);
            }
            Step::Watch { object, events } => {
                let body = WatchRequest {
                    events: u32::from(events).into(),
                    reserved: 0.into(),
                };
                let object = self.object(object);
                // Its event may come before the answer.
                self.watches.insert(self.next_id + 1);
                let answer = self.operate(Operation::Watch, object, &body);
                if answer.is_some_and(|(result, _)| result != 0) {
                    let accepted = self.watches.remove(&self.next_id);
                    assert!(accepted, "refused, or ready at once, and yet an event");
                }
            }
            Step::Cancel { back } => {
                let id = self.next_id.saturating_sub(back.into());
                let cancelled =
                    self.operate(Operation::Cancel, 0, &CancelRequest { id: id.into() });
                assert!(cancelled.is_some(), "a cancel waits");
            }
            Step::Read { object, length } => {
                let body = ReadRequest {
                    length: u32::from(length).into(),
                    reserved: 0.into(),
                };
                let object = self.object(object);
                self.operate(Operation::Read, object, &body);
            }
            Step::Size { object } => {
                let object = self.object(object);
                self.operate(Operation::Size, object, &());
            }
            _ => {}
        }
    }

    fn syncobj_step(&mut self, step: &Step) {
        let number = |number: u8| u32::from(number);
        match *step {
            Step::SyncobjCreate { file, signaled } => {
                let create = core::SyncobjCreate {
                    flags: u32::from(signaled) * syncobj::CREATE_SIGNALED,
                    ..Default::default()
                };
                let created = self.ioctl(file, core::SYNCOBJ_CREATE, &create, &[]);
                self.syncobjs.extend(created.map(|created| created.handle));
            }
            Step::SyncobjDestroy { file, handle } => {
                let handle = self.syncobj(handle);
                let destroy = core::SyncobjDestroy { handle, pad: 0 };
                self.ioctl(file, core::SYNCOBJ_DESTROY, &destroy, &[]);
            }
            Step::SyncobjExport {
                file,
                handle,
                fence,
            } => {
                let export = core::SyncobjHandleToFd {
                    handle: self.syncobj(handle),
                    flags: u32::from(fence) * syncobj::EXPORT_SYNC_FILE,
                    ..Default::default()
                };
                let exported = self.ioctl(file, core::SYNCOBJ_HANDLE_TO_FD, &export, &[]);
                self.objects.extend(exported.map(|exported| exported.fd));
            }
            Step::SyncobjImport {
                file,
                object,
                handle,
                fence,
            } => {
                let import = core::SyncobjFdToHandle {
                    handle: if fence { self.syncobj(handle) } else { 0 },
                    flags: u32::from(fence) * syncobj::IMPORT_SYNC_FILE,
                    fd: self.object(object),
                    pad: 0,
                };
                let imported = self.ioctl(file, core::SYNCOBJ_FD_TO_HANDLE, &import, &[]);
                self.syncobjs
                    .extend(imported.map(|imported| imported.handle));
            }
            Step::SyncobjWait {
                file,
                handles,
                flags,
                wait,
            } => {
                let handles = handles.map(|choice| self.syncobj(choice));
                let argument = core::SyncobjWait {
                    handles: 1,
                    timeout_nsec: wait.nanoseconds(),
                    count_handles: 2,
                    flags: number(flags % 16),
                    ..Default::default()
                };
                self.ioctl(file, core::SYNCOBJ_WAIT, &argument, &[handles.as_bytes()]);
            }
            Step::SyncobjTimelineWait {
                file,
                handles,
                point,
                flags,
                wait,
            } => {
                let handles = handles.map(|choice| self.syncobj(choice));
                let points = [u64::from(point), 0];
                let argument = core::SyncobjTimelineWait {
                    handles: 1,
                    points: 1,
                    timeout_nsec: wait.nanoseconds(),
                    count_handles: 2,
                    flags: number(flags % 16),
                    ..Default::default()
                };
                let arrays = [handles.as_bytes(), points.as_bytes()];
                self.ioctl(file, core::SYNCOBJ_TIMELINE_WAIT, &argument, &arrays);
            }
            Step::SyncobjChange {
                file,
                handle,
                signal,
            } => {
                let handle = self.syncobj(handle).to_le_bytes();
                let array = core::SyncobjArray {
                    handles: 1,
                    count_handles: 1,
                    pad: 0,
                };
                let command = if signal {
                    core::SYNCOBJ_SIGNAL
                } else {
                    core::SYNCOBJ_RESET
                };
                self.ioctl(file, command, &array, &[&handle]);
            }
            Step::SyncobjTimelineSignal {
                file,
                handle,
                point,
            } => {
                let handle = self.syncobj(handle).to_le_bytes();
                let signal = core::SyncobjTimelineSignal {
                    handles: 1,
                    points: 1,
                    count_handles: 1,
                    flags: 0,
                };
                let point = u64::from(point).to_le_bytes();
                self.ioctl(
                    file,
                    core::SYNCOBJ_TIMELINE_SIGNAL,
                    &signal,
                    &[&handle, &point],
                );
            }
            Step::SyncobjQuery { file, handle } => {
                let handle = self.syncobj(handle).to_le_bytes();
                let query = core::SyncobjQuery {
                    handles: 1,
                    points: 1,
                    count_handles: 1,
                    flags: number(handle[0] & 1),
                };
                self.ioctl(file, core::SYNCOBJ_QUERY, &query, &[&handle, &[0; 8]]);
            }
            Step::SyncobjTransfer {
                file,
                from,
                to,
                points,
                wait,
            } => {
                let transfer = core::SyncobjTransfer {
                    src_handle: self.syncobj(from),
                    dst_handle: self.syncobj(to),
                    src_point: points[0].into(),
                    dst_point: points[1].into(),
                    flags: u32::from(wait) * syncobj::WAIT_FOR_SUBMIT,
                    pad: 0,
                };
                self.ioctl(file, core::SYNCOBJ_TRANSFER, &transfer, &[]);
            }
            _ => {}
        }
    }
}

/// The chosen one, or something that is not there.
fn choose<T: Copy + Default>(all: &[T], choice: Choice) -> T {
    match all.len() {
        0 => T::default(),
        _ if choice > 250 => T::default(),
        count => all[usize::from(choice) % count],
    }
}
