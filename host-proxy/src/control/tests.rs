//! The control socket and clients of every kind.

use super::*;
use crate::device::{Device, DeviceConfig};
use crate::soft::{SoftConfig, SoftDriver};
use crate::statistics::{Recording, SessionState, SessionStatus, Statistics, Usage};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A folder of its own for each test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pvgpu-control-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A device that no guest has started, and its socket.
struct Served {
    device: Device,
    _server: Server,
    socket: Socket,
    path: PathBuf,
    folder: Folder,
}

impl Served {
    fn new() -> Self {
        let folder = Folder::new();
        let path = folder.0.join("socket");
        let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
        let device = Device::new(driver, None, DeviceConfig::default()).unwrap();
        let socket = Socket::bind(&path).unwrap();
        let listener = socket.listener().unwrap();
        let server = serve(listener, device.monitor(), Sandbox::default()).unwrap();
        Self {
            device,
            _server: server,
            socket,
            path,
            folder,
        }
    }

    fn ask(&self, command: &Command, file: Option<&File>) -> Result<Reply, AskError> {
        ask(&self.path, command, file)
    }

    fn status(&self) -> Statistics {
        match self.ask(&Command::Status, None) {
            Ok(Reply::Status(statistics)) => *statistics,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(&self, command: &Command, file: Option<&File>) -> Refusal {
        match self.ask(command, file) {
            Err(AskError::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        }
    }
}

/// The most that statistics can be.
fn greatest() -> Statistics {
    use crate::latency::Histogram;
    use crate::statistics::Counters;
    use pvgpu_protocol::Errno;
    let counters = Counters::default();
    (0..=Errno::MAX).for_each(|number| counters.failed(Errno::new(number)));
    let histogram = Histogram::default();
    (0..64).for_each(|power| histogram.record(Duration::from_nanos(1 << power)));
    let mut statistics = counters.read();
    let most = u64::MAX;
    statistics
        .errors
        .iter_mut()
        .for_each(|error| error.1 = most);
    statistics
        .operations
        .iter_mut()
        .for_each(|operation| operation.1 = most);
    statistics
        .limits_reached
        .iter_mut()
        .for_each(|limit| limit.1 = most);
    let name = "n".repeat(crate::statistics::NAME_LIMIT);
    statistics.driver.name.clone_from(&name);
    statistics.driver.version = [i32::MIN; 3];
    statistics.session = Some(SessionStatus {
        state: SessionState::Ending,
        guest: name,
        since: most,
    });
    statistics.usage = Some(Usage {
        files: usize::MAX,
        objects: usize::MAX,
        mapped: most,
        memory: most,
        handles: most,
        in_flight: usize::MAX,
        watches: usize::MAX,
    });
    let limits = &mut statistics.limits;
    (
        limits.message,
        limits.objects,
        limits.in_flight,
        limits.handles,
    ) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
    (limits.mapped, limits.memory) = (most, most);
    statistics.trace = Recording::Ended;
    for counter in [
        &mut statistics.doorbells,
        &mut statistics.interrupts,
        &mut statistics.completed,
        &mut statistics.events,
        &mut statistics.rejected,
        &mut statistics.malformed,
        &mut statistics.untraced,
    ] {
        *counter = most;
    }
    statistics.at_once = crate::latency::Latency::greatest();
    statistics.waited = crate::latency::Latency::greatest();
    statistics
}

#[test]
fn the_greatest_statistics_fit_into_a_reply_and_come_back_as_they_were() {
    let greatest = greatest();
    let bytes = record::encode_reply(&Reply::Status(Box::new(greatest.clone())));
    let Ok(Reply::Status(back)) = record::decode_reply(&bytes) else {
        panic!("{} bytes: {:?}", bytes.len(), record::decode_reply(&bytes));
    };
    assert_eq!(format!("{back:?}"), format!("{greatest:?}"));
}

#[test]
fn a_status_is_what_the_device_says_of_itself() {
    let served = Served::new();
    let status = served.status();
    assert_eq!(
        format!("{status:?}"),
        format!("{:?}", served.device.statistics())
    );
    assert_eq!(
        (status.driver.name.as_str(), status.session),
        ("soft", None)
    );
}

#[test]
fn a_trace_is_started_and_stopped_and_goes_into_nothing_but_a_file_that_can_be_written() {
    let served = Served::new();
    let start = Command::StartTrace { limit: 4096 };
    let path = served.folder.0.join("trace");
    let file = File::create(&path).unwrap();
    assert_eq!(served.refusal(&Command::StopTrace, None), Refusal::NoTrace);
    assert_eq!(served.refusal(&start, None), Refusal::NoFile);
    let reader = File::open(&path).unwrap();
    assert_eq!(served.refusal(&start, Some(&reader)), Refusal::NotWritable);
    let null = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(served.refusal(&start, Some(&null)), Refusal::NotRegular);
    let (_reader, pipe) = io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert_eq!(served.refusal(&start, Some(&pipe)), Refusal::NotRegular);
    assert_eq!(served.status().trace, Recording::Off);

    assert!(matches!(served.ask(&start, Some(&file)), Ok(Reply::Done)));
    assert_eq!(served.status().trace, Recording::On);
    assert_eq!(served.refusal(&start, Some(&file)), Refusal::Busy);
    assert!(matches!(
        served.ask(&Command::StopTrace, None),
        Ok(Reply::Done)
    ));
    assert_eq!(served.status().trace, Recording::Off);
}

/// What the socket gives for these bytes.
fn answer(path: &Path, request: &[u8]) -> Vec<u8> {
    let mut client = UnixStream::connect(path).unwrap();
    // One that the other side has closed already takes no more.
    let _ = client.write_all(request);
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    answer
}

#[test]
fn garbage_gets_a_refusal_and_no_client_keeps_others_waiting_for_long() {
    let served = Served::new();
    let status = record::encode_request(&Command::Status);
    let refusal = record::encode_reply(&Reply::Refused(Refusal::Malformed));
    let mut garbage = vec![
        vec![0],
        vec![VERSION],
        vec![VERSION, 255],
        vec![VERSION + 1, 0],
        vec![0xff; record::REQUEST_LIMIT],
        vec![VERSION; 1 << 20],
        [&status[..], &[0]].concat(),
    ];
    garbage.extend((0..=255).map(|byte| vec![VERSION, 3, byte]));
    for request in &garbage {
        let answer = answer(&served.path, request);
        // What is longer than a request was cut off, and so may be the answer.
        let cut = request.len() > record::REQUEST_LIMIT && answer.is_empty();
        assert!(
            cut || answer == refusal,
            "{:?}",
            &request[..request.len().min(9)]
        );
    }

    // Nothing, half a request, and an answer that nobody takes.
    let begin = Instant::now();
    let silent: Vec<_> = (0..4)
        .map(|_| UnixStream::connect(&served.path).unwrap())
        .collect();
    (&silent[1]).write_all(&status[..1]).unwrap();
    (&silent[2]).write_all(&status).unwrap();
    silent[2].shutdown(std::net::Shutdown::Read).unwrap();
    assert_eq!(served.status().completed, 0);
    let waited = begin.elapsed();
    assert!(waited < PATIENCE * 4 + Duration::from_secs(2), "{waited:?}");

    // Descriptors that a request has no use for are not kept, nor more than it can have.
    let marked = served.folder.0.join("marked");
    let file = File::create(&marked).unwrap();
    for count in [2, 3, 100] {
        let client = UnixStream::connect(&served.path).unwrap();
        let many = vec![file.as_raw_fd(); count];
        client.send_with_fds(&[status.as_slice()], &many).unwrap();
        let _ = (&client).read_to_end(&mut Vec::new());
    }
    assert!(served.ask(&Command::Status, Some(&file)).is_ok());
    let start = Command::StartTrace { limit: 1 };
    let unwritable = File::open(&marked).unwrap();
    assert!(served.ask(&start, Some(&unwritable)).is_err());
    drop((file, unwritable));
    let descriptors = fs::read_dir("/proc/self/fd").unwrap();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    assert_eq!(links.filter(|link| *link == marked).count(), 0);
}

#[test]
fn a_socket_is_for_its_user_alone_and_gone_in_the_end() {
    use std::os::unix::fs::PermissionsExt;
    let served = Served::new();
    let mode = fs::metadata(&served.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let Served {
        socket,
        path,
        folder,
        ..
    } = served;
    drop(socket);
    assert!(!path.exists());
    assert!(matches!(
        ask(&path, &Command::Status, None),
        Err(AskError::Missing(_))
    ));
    drop(folder);
}

#[test]
fn a_socket_that_nobody_serves_is_replaced_and_nothing_else_is() {
    let folder = Folder::new();
    let path = folder.0.join("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(matches!(
        ask(&path, &Command::Status, None),
        Err(AskError::Dead(_))
    ));
    let socket = Socket::bind(&path).unwrap();
    assert!(matches!(Socket::bind(&path), Err(BindError::Served(_))));
    drop(socket);
    fs::write(&path, "mine").unwrap();
    assert!(matches!(Socket::bind(&path), Err(BindError::NoSocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    let missing = folder.0.join("missing/socket");
    assert!(matches!(Socket::bind(&missing), Err(BindError::Io(..))));
}

#[test]
fn a_server_of_another_version_or_kind_is_named() {
    let folder = Folder::new();
    let path = folder.0.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let asked = |bytes: &'static [u8]| {
        let listener = listener.try_clone().unwrap();
        let server = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = [0; 64];
            let _ = client.read(&mut request).unwrap();
            client.write_all(bytes).unwrap();
        });
        let error = ask(&path, &Command::Status, None).unwrap_err();
        server.join().unwrap();
        error
    };
    assert!(
        matches!(asked(&[VERSION + 1, 9, 9]), AskError::Version(_, version) if version == VERSION + 1)
    );
    assert!(matches!(asked(&[VERSION, 9, 9]), AskError::Malformed(_)));
    assert!(matches!(asked(&[VERSION; 1 << 14]), AskError::Malformed(_)));
    assert!(matches!(asked(&[]), AskError::Closed(_)));
}
