//! One buffer, two processes: this one draws into it and passes it on as a dma-buf; the second one, which is this program
//! again, makes a texture of it, reads that back, draws with it, and sends both results home.
//!
//! The socket between them is the second one's standard input. First a dma-buf travels with its [`Description`]
//! (`SCM_RIGHTS`); then, for each frame, its number goes there, and the fingerprint of what the second process found in the
//! buffer comes back with the pixels of what it drew.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pvgpu_scenarios::Picture;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::egl::Image;
use crate::gbm::DmaBuf;
use crate::geometry::sin_cos;
use crate::gl::{Blend, Filter, Mesh, Program, Shape, Target, Texture, Wrap};
use crate::scene::{Entry, Failure, SIZE, Scene, Stage};
use crate::scenes::square;
use crate::scenes::triangles::{Rosette, rosette};

/// What is wrong with the two processes.
#[derive(Debug, thiserror::Error)]
pub enum SharingError {
    /// Nothing to share on.
    #[error("this scene shares a buffer, which needs a DRM node: give one with --node")]
    NoNode,
    /// It did not start.
    #[error("cannot start the second process: {0}")]
    Start(io::Error),
    /// It ended, or takes longer than [`PATIENCE`].
    #[error("the second process does not answer ({0}): it says why on standard error")]
    Silent(io::Error),
    /// This is the second process, and its standard input is not the socket.
    #[error("the second process is started by the scenes sharing and export alone ({0})")]
    Input(io::Error),
    /// The two processes see different pixels in one buffer.
    #[error(
        "frame {frame}: the second process finds {found:016x} in the shared buffer, the first one drew {drawn:016x}"
    )]
    Differs {
        /// Which one.
        frame: u32,
        /// The fingerprint in the second process.
        found: u64,
        /// The fingerprint in the first process.
        drawn: u64,
    },
}

/// How long a process waits for the other: far more than any frame takes, emulated or not.
const PATIENCE: Duration = Duration::from_secs(60);

/// The argument that makes this program the second process.
pub const SECOND_PROCESS: &str = "second-process";

/// Bytes of a picture of the second process.
const PIXELS: usize = (SIZE * SIZE * 4) as usize;

/// What travels beside a dma-buf's descriptor: numbers, least significant byte first.
struct Description([u8; 28]);

impl Description {
    fn of(buffer: &DmaBuf) -> Description {
        let numbers = [
            buffer.width,
            buffer.height,
            buffer.stride,
            buffer.offset,
            buffer.format,
            buffer.modifier as u32,
            (buffer.modifier >> 32) as u32,
        ];
        let mut bytes = [0; 28];
        for (place, number) in bytes.chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        Description(bytes)
    }

    fn with(self, fd: std::os::fd::OwnedFd) -> DmaBuf {
        let number = |index: usize| {
            let bytes = self.0.as_chunks::<4>().0;
            u32::from_le_bytes(bytes[index])
        };
        DmaBuf {
            fd,
            width: number(0),
            height: number(1),
            stride: number(2),
            offset: number(3),
            format: number(4),
            modifier: u64::from(number(5)) | u64::from(number(6)) << 32,
        }
    }
}

/// The second process, as the first one sees it. It ends with this value.
struct Second {
    process: Child,
    socket: Option<UnixStream>,
}

impl Second {
    /// Starts it on `node` and passes it the buffer.
    fn start(node: &Path, buffer: &DmaBuf) -> Result<Second, SharingError> {
        let (socket, theirs) = UnixStream::pair().map_err(SharingError::Start)?;
        let program = std::env::current_exe().map_err(SharingError::Start)?;
        let process = Command::new(program)
            .arg("--node")
            .arg(node)
            .arg(SECOND_PROCESS)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .spawn()
            .map_err(SharingError::Start)?;
        socket
            .set_read_timeout(Some(PATIENCE))
            .map_err(SharingError::Start)?;
        let second = Second {
            process,
            socket: Some(socket),
        };
        let description = Description::of(buffer);
        second
            .socket()?
            .send_with_fd(&description.0[..], buffer.fd.as_raw_fd())
            .map_err(|error| SharingError::Silent(error.into()))?;
        Ok(second)
    }

    fn socket(&self) -> Result<&UnixStream, SharingError> {
        self.socket
            .as_ref()
            .ok_or_else(|| SharingError::Silent(io::ErrorKind::NotConnected.into()))
    }

    /// Has it draw a frame: what it found in the buffer, and its picture.
    fn frame(&self, frame: u32) -> Result<(u64, Picture), SharingError> {
        let mut socket = self.socket()?;
        let mut fingerprint = [0; 8];
        let mut rgba = vec![0; PIXELS];
        let mut exchange = || -> io::Result<()> {
            socket.write_all(&frame.to_le_bytes())?;
            socket.read_exact(&mut fingerprint)?;
            socket.read_exact(&mut rgba)
        };
        exchange().map_err(SharingError::Silent)?;
        let picture = Picture {
            width: SIZE,
            height: SIZE,
            rgba,
        };
        Ok((u64::from_le_bytes(fingerprint), picture))
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // Its standard input ends, and so does it.
        self.socket = None;
        let _ = self.process.wait();
    }
}

/// The scene, in the first process.
pub struct Shared {
    rosette: Rosette,
    buffer: Target,
    second: Second,
    frame: u32,
}

impl Shared {
    /// Shares a buffer of GBM, which this process imports too.
    pub fn of_buffer(stage: &Stage) -> Result<Shared, Failure> {
        let display = stage.gl.context().display();
        let gbm = display.gbm().ok_or(SharingError::NoNode)?;
        let buffer = gbm.render_buffer(SIZE, SIZE)?;
        let texture = imported(stage, &buffer)?;
        Shared::new(stage, texture, &buffer)
    }

    /// Shares a texture that EGL exports.
    pub fn of_texture(stage: &Stage) -> Result<Shared, Failure> {
        let texture = Texture::new(&stage.gl, SIZE, SIZE, Filter::Linear, Wrap::Clamp)?;
        let buffer = texture.image()?.export(SIZE, SIZE)?;
        Shared::new(stage, texture, &buffer)
    }

    fn new(stage: &Stage, texture: Texture, buffer: &DmaBuf) -> Result<Shared, Failure> {
        let node = stage.node.as_ref().ok_or(SharingError::NoNode)?;
        Ok(Shared {
            rosette: Rosette::new(stage)?,
            buffer: Target::new(&stage.gl, texture)?,
            second: Second::start(node, buffer)?,
            frame: 0,
        })
    }
}

impl Scene for Shared {
    /// The frame's number, then the rosette.
    fn compute(&self, frame: u32) -> Vec<f32> {
        let mut numbers = rosette(frame + 45);
        numbers.insert(0, frame as f32);
        numbers
    }

    fn draw(&mut self, _canvas: &Target, numbers: &[f32]) -> Result<(), Failure> {
        if let Some((frame, vertices)) = numbers.split_first() {
            self.frame = *frame as u32;
            self.rosette.draw(&self.buffer, vertices)?;
        }
        Ok(())
    }

    fn picture(&mut self, _canvas: &Target) -> Result<Picture, Failure> {
        // Reading waits for the GPU: what the second process sees is complete.
        let drawn = self.buffer.read()?.fingerprint();
        let (found, picture) = self.second.frame(self.frame)?;
        match found == drawn {
            true => Ok(picture),
            false => Err(SharingError::Differs {
                frame: self.frame,
                found,
                drawn,
            }
            .into()),
        }
    }
}

/// A texture that is a dma-buf.
fn imported(stage: &Stage, buffer: &DmaBuf) -> Result<Texture, Failure> {
    let image = Image::import(stage.gl.context().display(), buffer)?;
    let texture = Texture::of_image(&stage.gl, &image, buffer.width, buffer.height)?;
    Ok(texture)
}

/// What the second process does until its standard input ends.
pub fn second_process(node: Option<&Path>) -> Result<(), Failure> {
    let node = node.ok_or(SharingError::NoNode)?;
    let input = io::stdin().as_fd().try_clone_to_owned();
    let mut socket = UnixStream::from(input.map_err(SharingError::Input)?);
    let mut description = Description([0; 28]);
    let (size, file) = socket
        .recv_with_fd(&mut description.0)
        .map_err(|error| SharingError::Input(error.into()))?;
    let Some(file) = file.filter(|_| size == description.0.len()) else {
        return Err(SharingError::Input(io::ErrorKind::InvalidData.into()).into());
    };
    let entry = Entry {
        name: SECOND_PROCESS,
        about: "",
        version: 2,
        node: true,
        make: |_| Err(SharingError::NoNode.into()),
    };
    let stage = Stage::new(Some(node.to_owned()), &entry)?;
    let shared = Target::new(&stage.gl, imported(&stage, &description.with(file.into()))?)?;
    let program = square::program(&stage.gl, square::PLAIN)?;
    let mut mesh = square::mesh(&stage.gl)?;
    loop {
        let mut frame = [0; 4];
        match socket.read_exact(&mut frame) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(SharingError::Input(error).into()),
        }
        let found = shared.read()?.fingerprint();
        collage(
            &stage.canvas,
            &shared.texture,
            &program,
            &mut mesh,
            u32::from_le_bytes(frame),
        );
        let picture = stage.canvas.read()?;
        let mut answer = || -> io::Result<()> {
            socket.write_all(&found.to_le_bytes())?;
            socket.write_all(&picture.rgba)
        };
        answer().map_err(SharingError::Silent)?;
    }
}

/// Draws four small copies of the texture and a turned one over them.
fn collage(canvas: &Target, texture: &Texture, program: &Program, mesh: &mut Mesh, frame: u32) {
    canvas.bind();
    let gl = canvas.gl();
    gl.blend(Blend::Off);
    gl.clear([0.1, 0.1, 0.14]);
    program.texture("picture", 0, texture);
    let (sine, cosine) = sin_cos(frame as f32 / 60.0);
    let square = |middle: [f32; 2], [x_axis, y_axis]: [[f32; 2]; 2]| {
        let corner = |x: f32, y: f32| {
            let (u, v) = (2.0 * x - 1.0, 2.0 * y - 1.0);
            let place = [
                middle[0] + u * x_axis[0] + v * y_axis[0],
                middle[1] + u * x_axis[1] + v * y_axis[1],
            ];
            (place, [x, y])
        };
        square::vertices([
            corner(0.0, 0.0),
            corner(1.0, 0.0),
            corner(1.0, 1.0),
            corner(0.0, 1.0),
        ])
    };
    let mut vertices = Vec::new();
    for middle in [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]] {
        vertices.extend(square(middle, [[0.46, 0.0], [0.0, 0.46]]));
    }
    let half = 0.42;
    let axes = [[cosine * half, sine * half], [-sine * half, cosine * half]];
    vertices.extend(square([0.0, 0.0], axes));
    mesh.upload(&vertices);
    mesh.draw(program, Shape::Triangles);
}
