//! Command streams of the embedded GPU: parsed, then executed by an engine on a few small buffers.
//!
//! Input: a byte of modes, then the stream as it is, or steps that make one of nearly valid commands. A stream that is refused
//! changes nothing; one that is executed ends, with a fault only where it
//! stores a number outside of a buffer, and changes no buffer that it does not name.

use arbitrary::{Arbitrary, Result, Unstructured};
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::{Call, Owned};
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::family::soft::{self, opcode};
use pvgpu_protocol::family::{find, of_driver};
use pvgpu_protocol::layout::align;
use pvgpu_protocol::schema::Space;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of the buffers. Streams name the first two; nothing may ever change the third.
const BUFFERS: [u64; 3] = [16 << 10, 4 << 10, 4 << 10];
/// Bytes that the longest stream of steps takes.
const STREAM: usize = 8 << 10;

/// The GPU. It stays, since its thread takes longer to start than a stream to run. Its watchdog is more patient than the
/// fuzzer, which takes a stream that does not end for a finding.
static GPU: LazyLock<SoftDriver> = LazyLock::new(|| {
    let config = SoftConfig {
        watchdog: Duration::from_secs(60),
        sandbox: Sandbox::Off,
        ..SoftConfig::default()
    };
    SoftDriver::new(config).expect("a thread")
});

/// Every handle is the file's: the driver must know better.
struct All;

impl Owned for All {
    fn owns(&self, _: Space, _: u32) -> bool {
        true
    }

    fn object(&self, _: i32) -> std::result::Result<Arc<dyn HostObject>, Errno> {
        Err(Errno::EBADF)
    }
}

/// A nearly valid command.
#[derive(Arbitrary, Debug)]
enum Step {
    Fill {
        target: Surface,
        part: Part,
        color: [u8; 4],
    },
    Copy {
        buffers: [u8; 2],
        offsets: [u16; 2],
        length: u16,
    },
    Blit {
        flags: u8,
        surfaces: [Surface; 2],
        parts: [Part; 2],
    },
    Path(Box<Path>),
    MatMul {
        flags: u8,
        matrices: [Matrix; 3],
        size: [u8; 3],
    },
    Store {
        buffer: u8,
        offset: u16,
        value: u32,
    },
    /// Anything under any opcode.
    Raw {
        opcode: u8,
        flags: u16,
        words: Vec<u64>,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Surface {
    buffer: u8,
    width: u8,
    height: u8,
    padding: u8,
    offset: u16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Part {
    x: u8,
    y: u8,
    width: u8,
    height: u8,
    whole: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Matrix {
    buffer: u8,
    offset: u16,
    padding: u8,
}

#[derive(Arbitrary, Debug)]
struct Path {
    flags: u8,
    target: Surface,
    paint: u8,
    spread: u8,
    radius: f32,
    color: [u8; 4],
    ends: [[f32; 2]; 2],
    transform: Option<[f32; 6]>,
    verbs: Vec<u8>,
    points: Vec<[i16; 2]>,
    far: Option<(u8, [f32; 2])>,
    stops: Vec<(u8, [u8; 4])>,
}

impl Surface {
    fn build(self) -> soft::Surface {
        let width = u32::from(self.width) + 1;
        soft::Surface {
            buffer: u32::from(self.buffer % 3),
            stride: (width + u32::from(self.padding % 4)) * 4,
            offset: u64::from(self.offset) * 4 % 2048,
            width,
            height: u32::from(self.height % 32) + 1,
        }
    }
}

impl Part {
    fn build(self, surface: &soft::Surface) -> soft::Rectangle {
        match self.whole {
            true => soft::Rectangle {
                x: 0,
                y: 0,
                width: surface.width,
                height: surface.height,
            },
            false => soft::Rectangle {
                x: u32::from(self.x) % surface.width,
                y: u32::from(self.y) % surface.height,
                width: self.width.into(),
                height: self.height.into(),
            },
        }
    }
}

impl Path {
    fn push(&self, stream: &mut soft::Stream<'_>) -> std::result::Result<(), Errno> {
        // As many points as the verbs take.
        let verbs: Vec<u8> = self.verbs.iter().map(|verb| verb % 6).collect();
        let needed = verbs
            .iter()
            .map(|verb| [1, 1, 2, 3, 0, 1][usize::from(*verb)]);
        let mut points: Vec<[f32; 2]> = self
            .points
            .iter()
            .map(|point| point.map(|at| f32::from(at) / 64.0))
            .chain(std::iter::repeat([3.0, 5.0]))
            .take(needed.sum())
            .collect();
        if let Some((index, far)) = self.far
            && let Some(point) = points.get_mut(usize::from(index))
        {
            *point = far;
        }
        let unit = |byte: u8| f32::from(byte) / 255.0;
        let paint = u32::from(self.paint % 4);
        let gradient = paint != soft::paint::SOLID;
        let mut stops: Vec<_> = self
            .stops
            .iter()
            .map(|(offset, color)| soft::Stop {
                offset: unit(*offset),
                color: color.map(unit),
            })
            .collect();
        stops.sort_by(|a, b| a.offset.total_cmp(&b.offset));
        let path = soft::Path {
            target: self.target.build(),
            paint,
            spread: u32::from(self.spread % 4) * u32::from(gradient),
            radius: if paint == soft::paint::RADIAL {
                self.radius
            } else {
                0.0
            },
            color: if gradient {
                [0.0; 4]
            } else {
                self.color.map(unit)
            },
            start: if gradient { self.ends[0] } else { [0.0; 2] },
            end: if paint == soft::paint::LINEAR {
                self.ends[1]
            } else {
                [0.0; 2]
            },
            transform: self.transform.unwrap_or(soft::IDENTITY),
            ..Default::default()
        };
        let stops = if gradient { &stops[..] } else { &[] };
        stream.push_path((self.flags % 16).into(), &path, &points, stops, &verbs)
    }
}

impl Step {
    fn push(&self, stream: &mut soft::Stream<'_>) -> std::result::Result<(), Errno> {
        match self {
            Self::Fill {
                target,
                part,
                color,
            } => {
                let target = target.build();
                let fill = soft::Fill {
                    target,
                    rectangle: part.build(&target),
                    color: *color,
                    ..Default::default()
                };
                stream.push(0, &fill)
            }
            Self::Copy {
                buffers,
                offsets,
                length,
            } => {
                let copy = soft::CopyBytes {
                    source: u32::from(buffers[0] % 3),
                    target: u32::from(buffers[1] % 3),
                    source_offset: u64::from(offsets[0] % 8192),
                    target_offset: u64::from(offsets[1] % 8192),
                    length: u64::from(length % 8192),
                    ..Default::default()
                };
                stream.push(0, &copy)
            }
            Self::Blit {
                flags,
                surfaces,
                parts,
            } => {
                let [source, target] = surfaces.map(Surface::build);
                let blit = soft::Blit {
                    source,
                    target,
                    source_rectangle: parts[0].build(&source),
                    target_rectangle: parts[1].build(&target),
                    ..Default::default()
                };
                stream.push((flags % 8).into(), &blit)
            }
            Self::Path(path) => path.push(stream),
            Self::MatMul {
                flags,
                matrices,
                size,
            } => {
                let [m, k, n] = size.map(|size| u32::from(size % 64));
                let matrix = |matrix: Matrix, columns: u32| soft::Matrix {
                    buffer: u32::from(matrix.buffer % 3),
                    stride: (columns + u32::from(matrix.padding % 4)) * 4,
                    offset: u64::from(matrix.offset) * 4 % 8192,
                };
                let product = soft::MatMul {
                    a: matrix(matrices[0], k),
                    b: matrix(matrices[1], n),
                    c: matrix(matrices[2], n),
                    m,
                    k,
                    n,
                    ..Default::default()
                };
                stream.push((flags % 4).into(), &product)
            }
            Self::Store {
                buffer,
                offset,
                value,
            } => {
                let store = soft::Store {
                    buffer: u32::from(buffer % 3),
                    value: *value,
                    offset: u64::from(*offset) * 4,
                    ..Default::default()
                };
                stream.push(0, &store)
            }
            Self::Raw { .. } => Ok(()),
        }
    }
}

/// Runs one input.
pub fn run(bytes: &[u8]) {
    let [mode, rest @ ..] = bytes else { return };
    let stream = match mode % 4 {
        0 => Ok(rest.to_vec()),
        _ => build(Unstructured::new(rest)),
    };
    // Too few bytes are no input.
    let Ok(stream) = stream else { return };
    // A command that never ends would take as long as the watchdog's patience.
    if !has(&stream, opcode::HANG) {
        execute(&stream);
    }
}

/// The stream of these steps.
fn build(mut input: Unstructured<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for step in input.arbitrary_iter::<Step>()? {
        let step = step?;
        if let Step::Raw {
            opcode,
            flags,
            words,
        } = &step
        {
            let header = soft::Header {
                opcode: (*opcode % 10).into(),
                flags: *flags,
                size: u32::try_from(8 * (words.len() + 1)).expect("short"),
            };
            bytes.extend(header.as_bytes());
            bytes.extend(words.as_bytes());
            continue;
        }
        let mut memory = [0; STREAM];
        let mut stream = soft::Stream::new(&mut memory);
        if step.push(&mut stream).is_ok() {
            bytes.extend(stream.bytes());
        }
    }
    Ok(bytes)
}

/// Whether the stream has such a command.
fn has(stream: &[u8], opcode: u16) -> bool {
    let mut rest = stream;
    while let Ok((header, _)) = soft::Header::read_from_prefix(rest) {
        if header.opcode == opcode {
            return true;
        }
        let size = usize::try_from(header.size).expect("64 bits").max(8);
        rest = rest.get(size..).unwrap_or_default();
    }
    false
}

/// Submits the stream to a new file, and waits for its end.
fn execute(stream: &[u8]) {
    let file = GPU.open(2).expect("a file");
    let buffers = BUFFERS.map(|size| {
        let create = soft::GemCreate {
            size,
            ..Default::default()
        };
        let created = ioctl(&*file, soft::DRM_IOCTL_SOFT_GEM_CREATE, &create, &[]);
        let handle = created.expect("GPU memory").handle;
        let mmap = soft::GemMmap {
            handle,
            ..Default::default()
        };
        let place = ioctl(&*file, soft::DRM_IOCTL_SOFT_GEM_MMAP, &mmap, &[]);
        let offset = place.expect("a buffer that there is").offset;
        let mapping = file.mapping(offset, size, 3).expect("a whole buffer");
        (handle, File::from(mapping.fd))
    });
    let list: Vec<u8> = buffers[..2]
        .iter()
        .flat_map(|(handle, _)| handle.to_le_bytes())
        .collect();
    let submit = soft::Submit {
        commands: u64::from(!stream.is_empty()),
        buffers: 1,
        commands_size: u32::try_from(stream.len()).expect("short"),
        buffer_count: 2,
        ..Default::default()
    };
    let submitted = ioctl(
        &*file,
        soft::DRM_IOCTL_SOFT_SUBMIT,
        &submit,
        &[stream, &list],
    );
    let untouched = match submitted {
        Ok(submitted) => {
            let wait = soft::Wait {
                seqno: submitted.seqno,
                deadline_ns: 60_000_000_000,
                ..Default::default()
            };
            let waited = ioctl(&*file, soft::DRM_IOCTL_SOFT_WAIT, &wait, &[]);
            let error = waited.expect("it ends").error;
            let fault = error == -Errno::EFAULT.number() && has(stream, opcode::STORE);
            assert!(error == 0 || fault, "ended with {error}");
            &buffers[2..]
        }
        Err(errno) => {
            let expected = [Errno::EINVAL, Errno::E2BIG, Errno::EFAULT];
            assert!(expected.contains(&errno), "refused with {errno:?}");
            &buffers[..]
        }
    };
    let mut bytes = [0; 16 << 10];
    for (handle, buffer) in untouched {
        let size = usize::try_from(BUFFERS[usize::try_from(*handle).expect("small") - 1]);
        let bytes = &mut bytes[..size.expect("small")];
        buffer.read_exact_at(bytes, 0).expect("a memfd");
        assert!(
            bytes.iter().all(|byte| *byte == 0),
            "buffer {handle} has changed, though it was not to"
        );
    }
}

/// Performs an ioctl with arrays that go in.
fn ioctl<T: FromBytes + IntoBytes + Immutable>(
    file: &dyn HostObject,
    command: u32,
    argument: &T,
    arrays: &[&[u8]],
) -> std::result::Result<T, Errno> {
    let mut payload = argument.as_bytes().to_vec();
    for array in arrays.iter().filter(|array| !array.is_empty()) {
        payload.resize(align(payload.len()), 0);
        payload.extend(*array);
    }
    let ioctl = find(of_driver("soft"), command)?;
    let mut call = Call::new(ioctl, command, &payload, &All, 1 << 20)?;
    file.ioctl(&mut call, &Cancel::new())?;
    Ok(call.read_argument())
}
