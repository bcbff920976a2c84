//! Command streams: parsed and checked when they are submitted, executed by an engine.
//!
//! [`parse`] turns the private copy of a stream into [`Command`]s that hold nothing but checked values: every range
//! lies in its buffer, every count has its limit, and all commands together cost no more than
//! [`soft::WORK_MAX`](pvgpu_protocol::family::soft::WORK_MAX). `EINVAL` for anything wrong, `E2BIG` for too much.

use super::buffer::Buffer;
use super::engine::{Progress, Stop};
use super::{matrix, raster};
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::soft::{
    self, BLIT_BLEND, BLIT_SMOOTH, DIMENSION_MAX, Header, MATMUL_ACCUMULATE, MATRIX_MAX,
    WORK_COMMAND, WORK_MAX, WORK_ROW, opcode,
};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a pixel.
pub(super) const PIXEL: u64 = 4;
/// Bytes copied between two questions whether to go on.
const CHUNK: u64 = 1 << 20;

/// A checked command.
pub(super) enum Command {
    /// `FILL`.
    Fill {
        /// Pixels to fill.
        target: View,
        /// What to store in each.
        color: [u8; 4],
    },
    /// `COPY`.
    Copy(CopyBytes),
    /// `BLIT`.
    Blit {
        /// Pixels to read.
        source: View,
        /// Pixels to write.
        target: View,
        /// Put over the target instead of in its place.
        blend: bool,
        /// Interpolate when scaling.
        smooth: bool,
    },
    /// `PATH`.
    Path(Box<raster::PathFill>),
    /// `MATMUL`.
    MatMul(Box<matrix::MatMul>),
    /// `STORE`: the only command whose address is not checked yet.
    Store {
        /// Where.
        buffer: Arc<Buffer>,
        /// Where in it.
        offset: u64,
        /// What.
        value: u32,
    },
    /// `HANG`.
    Hang,
}

/// A rectangle of pixels that lies in its buffer.
pub(super) struct View {
    /// Where.
    pub(super) buffer: Arc<Buffer>,
    /// First byte.
    pub(super) offset: u64,
    /// Bytes from one row to the next.
    pub(super) stride: u64,
    /// Pixels in a row.
    pub(super) width: u32,
    /// Rows.
    pub(super) height: u32,
}

impl View {
    /// Copies pixels of one row, from `x` on, to a private buffer.
    pub(super) fn read(&self, x: u32, y: u32, to: &mut [u8]) -> Result<(), Stop> {
        Ok(self.buffer.memory().read(self.at(x, y), to)?)
    }

    /// Copies a private buffer to pixels of one row, from `x` on.
    pub(super) fn write(&self, x: u32, y: u32, from: &[u8]) -> Result<(), Stop> {
        Ok(self.buffer.memory().write(self.at(x, y), from)?)
    }

    fn at(&self, x: u32, y: u32) -> u64 {
        let row = u64::from(y).saturating_mul(self.stride);
        let column = u64::from(x).saturating_mul(PIXEL);
        self.offset.saturating_add(row).saturating_add(column)
    }

    /// Its bytes, for the work that it makes.
    fn bytes(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * PIXEL
    }
}

/// Ranges of bytes in buffers.
pub(super) struct CopyBytes {
    source: Arc<Buffer>,
    target: Arc<Buffer>,
    source_offset: u64,
    target_offset: u64,
    length: u64,
}

/// Parses a stream whose commands name the buffers of this list.
pub(super) fn parse(stream: &[u8], buffers: &[Arc<Buffer>]) -> Result<Vec<Command>, Errno> {
    let mut parser = Parser { buffers, work: 0 };
    let mut commands = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let (header, _) = Header::read_from_prefix(rest).map_err(|_| Errno::EINVAL)?;
        let size = usize::try_from(header.size).map_err(|_| Errno::EINVAL)?;
        if size < size_of::<Header>() || !size.is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        let (bytes, next) = rest.split_at_checked(size).ok_or(Errno::EINVAL)?;
        rest = next;
        parser.charge(WORK_COMMAND)?;
        commands.extend(parser.command(&header, bytes)?);
    }
    Ok(commands)
}

/// Whether `length` bytes at `offset` lie in a buffer of `size` bytes.
fn fits(offset: u64, length: u64, size: u64) -> Result<(), Errno> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

/// `EINVAL` unless it holds.
pub(super) fn ensure(valid: bool) -> Result<(), Errno> {
    match valid {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

/// A command that is its struct and nothing else.
fn whole<T: FromBytes>(bytes: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(bytes).map_err(|_| Errno::EINVAL)
}

/// Rows of items of 4 bytes in a buffer: checks that all lie in it.
fn check_rows(
    buffer: &Buffer,
    offset: u64,
    stride: u32,
    width: u32,
    height: u32,
) -> Result<(), Errno> {
    let (stride, width, height) = (u64::from(stride), u64::from(width), u64::from(height));
    ensure(stride.is_multiple_of(4) && offset.is_multiple_of(4) && stride >= width * 4)?;
    let last = stride
        .checked_mul(height.saturating_sub(1))
        .ok_or(Errno::EINVAL)?;
    let length = last.checked_add(width * 4).ok_or(Errno::EINVAL)?;
    fits(offset, length, buffer.size())
}

struct Parser<'a> {
    buffers: &'a [Arc<Buffer>],
    work: u64,
}

impl Parser<'_> {
    /// Adds to the work of the submission.
    fn charge(&mut self, work: u64) -> Result<(), Errno> {
        self.work = self.work.saturating_add(work);
        match self.work <= WORK_MAX {
            true => Ok(()),
            false => Err(Errno::E2BIG),
        }
    }

    fn buffer(&self, place: u32) -> Result<Arc<Buffer>, Errno> {
        let place = usize::try_from(place).map_err(|_| Errno::EINVAL)?;
        self.buffers.get(place).cloned().ok_or(Errno::EINVAL)
    }

    /// The whole surface.
    fn surface(&self, surface: &soft::Surface) -> Result<View, Errno> {
        let soft::Surface {
            stride,
            offset,
            width,
            height,
            ..
        } = *surface;
        let buffer = self.buffer(surface.buffer)?;
        let dimensions = 1..=DIMENSION_MAX;
        ensure(dimensions.contains(&width) && dimensions.contains(&height))?;
        check_rows(&buffer, offset, stride, width, height)?;
        Ok(View {
            buffer,
            offset,
            stride: stride.into(),
            width,
            height,
        })
    }

    /// A part of a surface.
    fn part(&self, surface: &soft::Surface, part: &soft::Rectangle) -> Result<View, Errno> {
        let whole = self.surface(surface)?;
        ensure(part.width > 0 && part.height > 0)?;
        fits(part.x.into(), part.width.into(), whole.width.into())?;
        fits(part.y.into(), part.height.into(), whole.height.into())?;
        Ok(View {
            offset: whole.at(part.x, part.y),
            width: part.width,
            height: part.height,
            ..whole
        })
    }

    fn matrix(
        &self,
        matrix: &soft::Matrix,
        rows: u32,
        columns: u32,
    ) -> Result<matrix::Matrix, Errno> {
        let buffer = self.buffer(matrix.buffer)?;
        let dimensions = 1..=MATRIX_MAX;
        ensure(dimensions.contains(&rows) && dimensions.contains(&columns))?;
        check_rows(&buffer, matrix.offset, matrix.stride, columns, rows)?;
        Ok(matrix::Matrix {
            buffer,
            offset: matrix.offset,
            stride: matrix.stride.into(),
        })
    }

    /// One command; none when there is nothing to do.
    fn command(&mut self, header: &Header, bytes: &[u8]) -> Result<Option<Command>, Errno> {
        let flags = header.flags;
        let allowed = |allowed: u16| ensure(flags & !allowed == 0);
        Ok(Some(match header.opcode {
            opcode::FILL => {
                let fill: soft::Fill = whole(bytes)?;
                allowed(0)?;
                ensure(fill.pad == 0)?;
                let target = self.part(&fill.target, &fill.rectangle)?;
                self.charge(target.bytes() + u64::from(target.height) * WORK_ROW)?;
                Command::Fill {
                    target,
                    color: fill.color,
                }
            }
            opcode::COPY => {
                let copy: soft::CopyBytes = whole(bytes)?;
                allowed(0)?;
                ensure(copy.length > 0)?;
                let (source, target) = (self.buffer(copy.source)?, self.buffer(copy.target)?);
                fits(copy.source_offset, copy.length, source.size())?;
                fits(copy.target_offset, copy.length, target.size())?;
                self.charge(copy.length.saturating_mul(2))?;
                Command::Copy(CopyBytes {
                    source,
                    target,
                    source_offset: copy.source_offset,
                    target_offset: copy.target_offset,
                    length: copy.length,
                })
            }
            opcode::BLIT => {
                let blit: soft::Blit = whole(bytes)?;
                allowed(BLIT_BLEND | BLIT_SMOOTH)?;
                let source = self.part(&blit.source, &blit.source_rectangle)?;
                let target = self.part(&blit.target, &blit.target_rectangle)?;
                // A row of the source may be read again for every row of the target.
                let row = u64::from(source.width).max(target.width.into()) * PIXEL;
                self.charge((row * 2 + WORK_ROW) * u64::from(target.height))?;
                Command::Blit {
                    source,
                    target,
                    blend: flags & BLIT_BLEND != 0,
                    smooth: flags & BLIT_SMOOTH != 0,
                }
            }
            opcode::PATH => {
                let (path, data) =
                    soft::Path::read_from_prefix(bytes).map_err(|_| Errno::EINVAL)?;
                let target = self.surface(&path.target)?;
                let Some(fill) = raster::PathFill::new(&path, data, target)? else {
                    return Ok(None);
                };
                self.charge(fill.work())?;
                Command::Path(Box::new(fill))
            }
            opcode::MATMUL => {
                let product: soft::MatMul = whole(bytes)?;
                allowed(MATMUL_ACCUMULATE)?;
                ensure(product.pad == 0)?;
                let soft::MatMul { m, k, n, .. } = product;
                let product = matrix::MatMul {
                    a: self.matrix(&product.a, m, k)?,
                    b: self.matrix(&product.b, k, n)?,
                    c: self.matrix(&product.c, m, n)?,
                    m,
                    k,
                    n,
                    accumulate: flags & MATMUL_ACCUMULATE != 0,
                };
                self.charge(product.work())?;
                Command::MatMul(Box::new(product))
            }
            opcode::STORE => {
                let store: soft::Store = whole(bytes)?;
                allowed(0)?;
                ensure(store.offset.is_multiple_of(4))?;
                Command::Store {
                    buffer: self.buffer(store.buffer)?,
                    offset: store.offset,
                    value: store.value,
                }
            }
            opcode::HANG => {
                let _: soft::Hang = whole(bytes)?;
                allowed(0)?;
                Command::Hang
            }
            _ => return Err(Errno::EINVAL),
        }))
    }
}

/// Executes a command.
pub(super) fn execute(command: &Command, progress: &Progress) -> Result<(), Stop> {
    match command {
        Command::Fill { target, color } => raster::fill(target, *color, progress),
        Command::Copy(copy) => copy.execute(progress),
        Command::Blit {
            source,
            target,
            blend,
            smooth,
        } => raster::blit(source, target, *blend, *smooth, progress),
        Command::Path(path) => path.execute(progress),
        Command::MatMul(product) => product.execute(progress),
        Command::Store {
            buffer,
            offset,
            value,
        } => Ok(buffer.memory().write(*offset, value.as_bytes())?),
        Command::Hang => Err(progress.hang()),
    }
}

impl CopyBytes {
    /// Copies in pieces; backwards when the target lies behind the source, since they may overlap.
    fn execute(&self, progress: &Progress) -> Result<(), Stop> {
        let mut piece = vec![0; usize::try_from(self.length.min(CHUNK)).unwrap_or(0)];
        let backwards = self.target_offset > self.source_offset;
        let mut done = 0;
        while done < self.length {
            progress.check()?;
            let length = (self.length - done).min(CHUNK);
            let at = match backwards {
                true => self.length - done - length,
                false => done,
            };
            let bytes = usize::try_from(length)
                .ok()
                .and_then(|length| piece.get_mut(..length));
            let bytes = bytes.unwrap_or_default();
            self.source.memory().read(self.source_offset + at, bytes)?;
            self.target.memory().write(self.target_offset + at, bytes)?;
            done += length;
        }
        Ok(())
    }
}
