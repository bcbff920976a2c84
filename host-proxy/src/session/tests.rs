//! What a session counts while a guest uses one file from several queues at a time, in front of the embedded GPU; and
//! drivers that take too long or panic.

use super::*;
use crate::clock::thread_ns;
use crate::driver::Identity;
use crate::sandbox::Filter;
use crate::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::family::core::{
    self, GemClose, PrimeHandleToFd, SyncobjCreate, SyncobjDestroy,
};
use pvgpu_protocol::family::soft::{DRM_IOCTL_SOFT_GEM_CREATE, GemCreate};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The embedded GPU, whose exports stay in the driver until told to return, or for a while.
struct SlowExport {
    driver: SoftDriver,
    hook: Arc<Mutex<(Sender<()>, Receiver<()>)>>,
}

struct SlowFile {
    file: Arc<dyn HostObject>,
    hook: Arc<Mutex<(Sender<()>, Receiver<()>)>>,
}

impl HostDriver for SlowExport {
    fn identity(&self) -> &crate::driver::Identity {
        self.driver.identity()
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        let file = self.driver.open(flags)?;
        let hook = Arc::clone(&self.hook);
        Ok(Arc::new(SlowFile { file, hook }))
    }
}

impl HostObject for SlowFile {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let result = self.file.ioctl(call, cancel);
        if call.command() == core::PRIME_HANDLE_TO_FD {
            let hook = self.hook.lock().unwrap();
            hook.0.send(()).unwrap();
            let _ = hook.1.recv_timeout(Duration::from_millis(300));
        }
        result
    }

    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        self.file.poll(events, timeout, cancel)
    }
}

fn soft() -> SoftDriver {
    SoftDriver::new(SoftConfig::default()).unwrap()
}

/// A session that has said hello.
fn session(driver: impl HostDriver + 'static, limits: Limits) -> Session {
    greeted(Session::new(Arc::new(driver), None, limits))
}

/// Says hello.
fn greeted(session: Session) -> Session {
    let hello = Hello::new("test");
    let mut record = [0; 64];
    let length = control::encode(&hello, &mut record).unwrap();
    assert_eq!(perform(&session, Operation::Hello, 0, &record[..length]), 0);
    session
}

fn answer(session: &Session, operation: Operation, object: i32, body: &[u8]) -> Response {
    let header = RequestHeader::new(operation, u32::try_from(object).unwrap(), 1);
    let request = [header.as_bytes(), body].concat();
    let answer = session.perform(&request, 4096, || panic!("a request that waits"));
    answer.unwrap()
}

fn perform(session: &Session, operation: Operation, object: i32, body: &[u8]) -> i32 {
    answer(session, operation, object, body).result()
}

fn open(session: &Session) -> i32 {
    let flags = OpenRequest {
        flags: wire::open::RDWR.into(),
        reserved: 0.into(),
    };
    perform(session, Operation::Open, 0, flags.as_bytes())
}

/// Performs an ioctl and reads the argument back.
fn ioctl<T>(session: &Session, file: i32, command: u32, argument: &mut T) -> i32
where
    T: IntoBytes + FromBytes + Immutable,
{
    let header = IoctlRequest {
        command: command.into(),
        reserved: 0.into(),
    };
    let body = [header.as_bytes(), argument.as_bytes()].concat();
    let response = answer(session, Operation::Ioctl, file, &body);
    let write = |offset: usize, bytes: &[u8]| {
        if offset == RESPONSE_HEADER {
            *argument = T::read_from_bytes(bytes).unwrap();
        }
        Ok::<(), ()>(())
    };
    response.write(write).unwrap();
    response.result()
}

fn create(session: &Session, file: i32) -> u32 {
    let mut create = GemCreate {
        size: PAGE_SIZE,
        ..Default::default()
    };
    let result = ioctl(session, file, DRM_IOCTL_SOFT_GEM_CREATE, &mut create);
    assert_eq!(result, 0);
    create.handle
}

#[test]
fn memory_counts_when_its_handle_is_closed_while_it_is_being_exported() {
    let (exporting, has_exported) = channel();
    let (go_on, wait) = channel();
    let driver = SlowExport {
        driver: soft(),
        hook: Arc::new(Mutex::new((exporting, wait))),
    };
    let session = session(driver, Limits::default());
    let file = open(&session);
    let handle = create(&session, file);
    std::thread::scope(|scope| {
        let export = scope.spawn(|| {
            let mut export = PrimeHandleToFd {
                handle,
                ..Default::default()
            };
            ioctl(&session, file, core::PRIME_HANDLE_TO_FD, &mut export)
        });
        has_exported.recv().unwrap();
        let mut close = GemClose { handle, pad: 0 };
        assert_eq!(ioctl(&session, file, core::GEM_CLOSE, &mut close), 0);
        let _ = go_on.send(());
        assert_eq!(export.join().unwrap(), 0);
    });
    assert_eq!(session.usage().objects, 2);
    assert_eq!(session.usage().memory, PAGE_SIZE);
}

#[test]
fn handles_are_limited_for_all_files_together() {
    let limits = Limits {
        handles: 3,
        ..Limits::default()
    };
    let session = session(soft(), limits);
    let (first, second) = (open(&session), open(&session));
    let make = |file| {
        let mut create = SyncobjCreate::default();
        let result = ioctl(&session, file, core::SYNCOBJ_CREATE, &mut create);
        (result, create.handle)
    };
    let no_memory = -Errno::ENOMEM.number();
    let (_, handle) = make(first);
    create(&session, first);
    assert_eq!(make(second).0, 0);
    assert_eq!((make(first).0, make(second).0), (no_memory, no_memory));

    let mut destroy = SyncobjDestroy { handle, pad: 0 };
    let destroyed = ioctl(&session, first, core::SYNCOBJ_DESTROY, &mut destroy);
    assert_eq!((destroyed, make(second).0), (0, 0));
    assert_eq!(make(second).0, no_memory);
    assert_eq!(perform(&session, Operation::Close, first, &[]), 0);
    assert_eq!((make(second).0, make(second).0), (0, no_memory));
}

/// A driver for tests of what a host driver must not do.
struct Bad {
    identity: Identity,
    file: fn() -> Arc<dyn HostObject>,
}

impl Bad {
    fn new(file: fn() -> Arc<dyn HostObject>) -> Self {
        let identity = Identity {
            name: "vgem".into(),
            version: [1, 0, 0],
            date: String::new(),
            description: String::new(),
        };
        Self { identity, file }
    }
}

impl HostDriver for Bad {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, _: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Ok((self.file)())
    }
}

/// Its polls keep the processor busy.
struct Busy;

impl HostObject for Busy {
    fn poll(&self, _: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        let begin = thread_ns();
        while thread_ns() - begin < 2_000_000 {}
        Ok(1)
    }
}

/// Polls a file with a timeout and waits for the result.
fn poll_for_long(session: &Session, file: i32) -> i32 {
    let header = RequestHeader::new(Operation::Poll, u32::try_from(file).unwrap(), 1);
    let poll = PollRequest {
        events: 1.into(),
        reserved: 0.into(),
        timeout_ns: (-1).into(),
    };
    let request = [header.as_bytes(), poll.as_bytes()].concat();
    let (sender, result) = channel();
    let complete = || -> Complete { Box::new(move |done| sender.send(done.result()).unwrap()) };
    match session.perform(&request, 4096, complete) {
        Some(response) => response.result(),
        None => result.recv().unwrap(),
    }
}

#[test]
fn worker_time_over_the_limit_is_eagain_until_it_has_come_back() {
    let limits = Limits::default();
    let time = Duration::from_millis(20);
    let driver = Arc::new(Bad::new(|| Arc::new(Busy)));
    let counters = Arc::default();
    let session = Session::with_counters(
        driver,
        None,
        limits,
        time,
        None,
        None,
        counters,
        Filter::OFF,
    );
    let session = greeted(session);
    let file = open(&session);
    let begin = std::time::Instant::now();
    let mut performed = 0;
    let refused = loop {
        match poll_for_long(&session, file) {
            1 => performed += 1,
            other => break other,
        }
    };
    assert_eq!(refused, -Errno::EAGAIN.number());
    assert_eq!(session.statistics().reached(Limit::WorkerTime), 1);
    // A second's time was saved up and some has come in since. One poll may go beyond it.
    let paid = time + time.mul_f64(begin.elapsed().as_secs_f64());
    let most = 1 + paid.as_millis() / 2;
    assert!((4..=most).contains(&performed), "{performed} of {most}");
    // What does not wait is not concerned, and the time comes back: 10 ms in half a second.
    assert_eq!(perform(&session, Operation::Nop, 0, &[]), 0);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(poll_for_long(&session, file), 1);
    assert_eq!(session.statistics().reached(Limit::WorkerTime), 1);
}

/// It panics whatever it is asked.
struct Panicking;

impl HostObject for Panicking {
    fn poll(&self, _: u32, _: Option<Duration>, _: &Cancel) -> Result<u32, Errno> {
        panic!("poll")
    }

    fn mapping(&self, _: u64, _: u64, _: u32) -> Result<Mapping, Errno> {
        panic!("mapping")
    }

    fn size(&self) -> Result<u64, Errno> {
        panic!("size")
    }
}

impl Drop for Panicking {
    fn drop(&mut self) {
        panic!("drop")
    }
}

#[test]
fn a_host_driver_that_panics_fails_that_request_and_leaves_nothing_booked() {
    let aperture = Arc::new(Aperture::reserve(1 << 20).unwrap());
    let driver = Arc::new(Bad::new(|| Arc::new(Panicking)));
    let session = greeted(Session::new(driver, Some(aperture), Limits::default()));
    let file = open(&session);
    let map = MapRequest {
        offset: 0.into(),
        length: PAGE_SIZE.into(),
        protection: 1.into(),
        reserved: 0.into(),
    };
    let io = -Errno::EIO.number();
    assert_eq!(perform(&session, Operation::Map, file, map.as_bytes()), io);
    assert_eq!(perform(&session, Operation::Size, file, &[]), io);
    assert_eq!(poll_for_long(&session, file), io);
    assert_eq!(perform(&session, Operation::Close, file, &[]), io);
    let usage = session.usage();
    assert_eq!((usage.objects, usage.mapped, usage.in_flight), (0, 0, 0));
    // The end of the session drops the last one.
    open(&session);
    session.end();
    assert_eq!(session.usage().objects, 0);

    let driver = Arc::new(Bad::new(|| panic!("open")));
    let session = greeted(Session::new(driver, None, Limits::default()));
    assert_eq!(open(&session), io);
    assert_eq!(session.usage().objects, 0);
}
