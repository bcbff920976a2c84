//! What a session counts while a guest uses one file from several queues at a time, in front of the embedded GPU.

use super::*;
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
    let session = Session::new(Arc::new(driver), None, limits);
    let hello = Hello {
        version_min: wire::VERSION,
        version_max: wire::VERSION,
        features: 0,
        guest: "test",
    };
    let mut record = [0; 64];
    let length = control::encode(&hello, &mut record).unwrap();
    assert_eq!(perform(&session, Operation::Hello, 0, &record[..length]), 0);
    session
}

fn answer(session: &Session, operation: Operation, object: i32, body: &[u8]) -> Response {
    let header = RequestHeader {
        operation: operation.number().into(),
        flags: 0.into(),
        object: u32::try_from(object).unwrap().into(),
        id: 1.into(),
    };
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
