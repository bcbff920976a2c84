//! Guests that share one embedded GPU in one process: what one does to the others' latency.

use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::soft::{
    DRM_IOCTL_SOFT_GEM_CREATE, DRM_IOCTL_SOFT_SUBMIT, DRM_IOCTL_SOFT_WAIT, Fill, GemCreate, Hang,
    IDENTITY, MatMul, Matrix, PATH_EVEN_ODD, POINTS_MAX, Path, Rectangle, Stream, Submit, Surface,
    Wait, verb,
};
use pvgpu_scenarios::DeviceFile;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Round trips that are measured at a time.
const ROUND_TRIPS: usize = 400;
/// Files over which a hostile guest spreads its work.
const FILES: usize = 4;

/// An open file with a buffer.
struct File {
    file: LoopbackFile,
    buffer: u32,
}

impl File {
    /// The first file of a guest with a session of its own.
    fn of_new_guest(driver: &Arc<SoftDriver>, size: u64) -> Self {
        let driver = Arc::clone(driver) as Arc<dyn HostDriver>;
        Self::with_buffer(LoopbackFile::open(driver).unwrap(), size)
    }

    /// Another file of the same guest.
    fn another(&self, size: u64) -> Self {
        Self::with_buffer(self.file.open_again().unwrap(), size)
    }

    fn with_buffer(mut file: LoopbackFile, size: u64) -> Self {
        let mut create = GemCreate {
            size,
            ..GemCreate::default()
        };
        file.ioctl(DRM_IOCTL_SOFT_GEM_CREATE, &mut create).unwrap();
        let buffer = create.handle;
        Self { file, buffer }
    }

    fn submit(&mut self, stream: &[u8]) -> Result<u64, Errno> {
        let buffers = [self.buffer];
        let mut submit = Submit {
            commands: stream.as_ptr().expose_provenance() as u64,
            commands_size: u32::try_from(stream.len()).unwrap(),
            buffers: buffers.as_ptr().expose_provenance() as u64,
            buffer_count: 1,
            fence_fd: -1,
            ..Submit::default()
        };
        self.file.ioctl(DRM_IOCTL_SOFT_SUBMIT, &mut submit)?;
        Ok(submit.seqno)
    }

    /// Submits and waits for the end.
    fn round_trip(&mut self, stream: &[u8]) -> Duration {
        let start = Instant::now();
        let seqno = self.submit(stream).unwrap();
        let mut wait = Wait {
            seqno,
            deadline_ns: i64::MAX,
            ..Wait::default()
        };
        self.file.ioctl(DRM_IOCTL_SOFT_WAIT, &mut wait).unwrap();
        assert_eq!(wait.error, 0);
        start.elapsed()
    }

    /// The median of many round trips with a small picture, after a few that do not count.
    fn median(&mut self) -> Duration {
        let stream = small();
        let trip = |_| self.round_trip(&stream);
        let mut trips: Vec<_> = (0..ROUND_TRIPS + 20).map(trip).skip(20).collect();
        trips.sort();
        trips[trips.len() / 2]
    }
}

fn stream(push: impl FnOnce(&mut Stream<'_>)) -> Vec<u8> {
    let mut memory = vec![0; 1 << 20];
    let mut stream = Stream::new(&mut memory);
    push(&mut stream);
    let length = stream.bytes().len();
    memory.truncate(length);
    memory
}

fn surface(width: u32, height: u32) -> Surface {
    Surface {
        buffer: 0,
        stride: width * 4,
        offset: 0,
        width,
        height,
    }
}

fn fill(width: u32, height: u32) -> Vec<u8> {
    let fill = Fill {
        target: surface(width, height),
        rectangle: Rectangle {
            x: 0,
            y: 0,
            width,
            height,
        },
        color: [1, 2, 3, 4],
        ..Fill::default()
    };
    stream(|stream| stream.push(0, &fill).unwrap())
}

fn small() -> Vec<u8> {
    fill(64, 64)
}

/// Bytes of the buffer for a small picture.
const SMALL: u64 = 64 * 64 * 4;
/// Bytes of the buffers that the dearest streams use.
const LARGE: u64 = 64 << 20;

/// Streams that keep an engine busy for as long as a submission can: together all kinds of work.
fn dearest() -> [(&'static str, Vec<u8>); 4] {
    let matrix = |part: u64| Matrix {
        buffer: 0,
        stride: 2048 * 4,
        offset: part << 24,
    };
    let product = MatMul {
        a: matrix(0),
        b: matrix(1),
        c: matrix(2),
        m: 2048,
        k: 2000,
        n: 2000,
        ..MatMul::default()
    };
    // A zigzag from edge to edge, as many points as there may be.
    let points: Vec<_> = (0..POINTS_MAX)
        .map(|point| [(point % 2 * 4000) as f32, (point * 7919 % 3000) as f32])
        .collect();
    let verbs: Vec<_> = (0..POINTS_MAX)
        .map(|point| if point == 0 { verb::MOVE } else { verb::LINE })
        .collect();
    let path = Path {
        target: surface(4096, 3000),
        color: [0.5; 4],
        transform: IDENTITY,
        ..Path::default()
    };
    let product = stream(|stream| stream.push(0, &product).unwrap());
    let path = stream(|stream| {
        stream
            .push_path(PATH_EVEN_ODD, &path, &points, &[], &verbs)
            .unwrap();
    });
    let hang = stream(|stream| stream.push(0, &Hang::default()).unwrap());
    [
        ("products of matrices", product),
        ("paths with many points", path),
        ("large fills", fill(4096, 4096).repeat(8)),
        ("hangs", hang),
    ]
}

/// Measures round trips while another guest submits this stream to all of its files without end, at most every `pause`.
fn disturbed(
    driver: &Arc<SoftDriver>,
    file: &mut File,
    stream: &[u8],
    pause: Duration,
) -> Duration {
    let done = AtomicBool::new(false);
    let (begin, has_begun) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let first = File::of_new_guest(driver, LARGE);
            let others: Vec<_> = (1..FILES).map(|_| first.another(LARGE)).collect();
            let mut files: Vec<_> = std::iter::once(first).chain(others).collect();
            // A few wait in every queue, so that an engine always has work.
            for file in (0..FILES).cycle().take(4 * FILES) {
                files[file].submit(stream).unwrap();
            }
            begin.send(()).unwrap();
            for file in (0..FILES).cycle() {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                // A queue that is full says so.
                let submitted = files[file].submit(stream);
                assert!(matches!(submitted, Ok(_) | Err(Errno::EAGAIN)));
                std::thread::sleep(pause);
            }
        });
        has_begun.recv().unwrap();
        let median = file.median();
        done.store(true, Ordering::Relaxed);
        median
    })
}

#[test]
fn another_guests_work_does_not_double_the_latency_of_a_round_trip() {
    let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
    let mut file = File::of_new_guest(&driver, SMALL);
    let flood = ("a flood of small submissions", small(), Duration::ZERO);
    let dearest = dearest().map(|(what, stream)| (what, stream, Duration::from_millis(1)));
    for (what, stream, pause) in std::iter::once(flood).chain(dearest) {
        // Other processes disturb, too: the best of three counts. Without fair service it is hundreds every time.
        let mut ratio = || {
            let alone = file.median();
            let together = disturbed(&driver, &mut file, &stream, pause);
            let ratio = together.as_secs_f64() / alone.as_secs_f64();
            println!("{what}: median {together:?}, alone {alone:?}, ratio {ratio:.2}");
            ratio
        };
        assert!((0..3).any(|_| ratio() < 2.0), "{what}");
    }
}
