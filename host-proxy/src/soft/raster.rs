//! Drawing on an engine: fill, blit and anti-aliased paths.
//!
//! Everything works on private copies of a few rows, in pieces between which the engine may be stopped.

use super::command::{PIXEL, View, ensure};
use super::engine::{Progress, Stop};
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::soft::{
    self, COORDINATE_MAX, PATH_ALIASED, PATH_EVEN_ODD, PATH_REPLACE, POINTS_MAX, STOPS_MAX,
    WORK_COMMAND, WORK_PIXEL, paint, spread, verb,
};
use tiny_skia::{
    BlendMode, Color, FillRule, GradientStop, LinearGradient, Paint, PathBuilder, PixmapMut, Point,
    RadialGradient, Shader, SpreadMode, Transform,
};
use zerocopy::FromBytes;

/// Bytes drawn between two questions whether to go on.
const CHUNK: u64 = 1 << 20;
/// Pixels in a row of a tile of a path: below what `tiny-skia` would split up itself.
const TILE_WIDTH: u32 = 4096;
/// Rows of a tile of a path.
const TILE_HEIGHT: u32 = 64;
/// Paths that are flatter or narrower have no inside.
const NOTHING: f32 = 1.0 / 2048.0;

/// Bytes of that many pixels.
fn bytes_of(pixels: u32) -> usize {
    usize::try_from(u64::from(pixels) * PIXEL).unwrap_or(0)
}

/// Rows of so many pixels that are drawn between two questions whether to go on.
fn rows_at_once(width: u32) -> u32 {
    let rows = CHUNK / (u64::from(width) * PIXEL).max(1);
    u32::try_from(rows).unwrap_or(u32::MAX).max(1)
}

/// Stores one pixel everywhere.
pub(super) fn fill(target: &View, color: [u8; 4], progress: &Progress) -> Result<(), Stop> {
    let mut row = vec![0; bytes_of(target.width)];
    row.chunks_exact_mut(4)
        .for_each(|pixel| pixel.copy_from_slice(&color));
    let at_once = rows_at_once(target.width);
    for y in 0..target.height {
        if y.is_multiple_of(at_once) {
            progress.check()?;
        }
        target.write(0, y, &row)?;
    }
    Ok(())
}

/// Where a pixel of the target comes from, along one axis.
#[derive(Clone, Copy)]
struct Sample {
    /// The pixel of the source.
    first: u32,
    /// The pixel after it, or the same at the edge.
    second: u32,
    /// How much of the second, of 256.
    weight: u32,
}

impl Sample {
    /// The source of pixel `index` when `source` pixels become `target` pixels.
    fn new(index: u32, source: u32, target: u32, smooth: bool) -> Self {
        let (index, source, target) = (u64::from(index), u64::from(source), u64::from(target));
        let last = source.saturating_sub(1);
        // Centre of the target's pixel in the source, in 512ths of a pixel.
        let centre = (2 * index + 1) * source * 256 / target.max(1);
        let narrow = |value: u64| u32::try_from(value.min(last)).unwrap_or(0);
        if !smooth {
            let first = narrow(centre / 512);
            return Self {
                first,
                second: first,
                weight: 0,
            };
        }
        let position = centre.saturating_sub(256) / 2;
        Self {
            first: narrow(position / 256),
            second: narrow(position / 256 + 1),
            weight: u32::try_from(position % 256).unwrap_or(0),
        }
    }

    fn mix(self, first: u8, second: u8) -> u8 {
        let sum = u32::from(first) * (256 - self.weight) + u32::from(second) * self.weight;
        u8::try_from((sum + 128) >> 8).unwrap_or(u8::MAX)
    }
}

/// Copies pixels, scaled when the sizes differ, over the target or in its place.
pub(super) fn blit(
    source: &View,
    target: &View,
    blend: bool,
    smooth: bool,
    progress: &Progress,
) -> Result<(), Stop> {
    let scaled = source.width != target.width || source.height != target.height;
    let smooth = smooth && scaled;
    let columns: Vec<_> = (0..target.width)
        .map(|x| Sample::new(x, source.width, target.width, smooth))
        .collect();
    let mut upper = vec![0; bytes_of(source.width)];
    let mut lower = upper.clone();
    let mut row = vec![0; bytes_of(target.width)];
    let mut below = row.clone();
    let at_once = rows_at_once(source.width.max(target.width));
    for y in 0..target.height {
        if y.is_multiple_of(at_once) {
            progress.check()?;
        }
        let line = Sample::new(y, source.height, target.height, smooth);
        source.read(0, line.first, &mut upper)?;
        if smooth {
            source.read(0, line.second, &mut lower)?;
            mix_row(&mut upper, &lower, line);
        }
        match scaled {
            true => scale_row(&upper, &columns, &mut row),
            false => row.copy_from_slice(&upper),
        }
        if blend {
            target.read(0, y, &mut below)?;
            over_row(&mut row, &below);
        }
        target.write(0, y, &row)?;
    }
    Ok(())
}

/// Mixes two rows of the source.
fn mix_row(upper: &mut [u8], lower: &[u8], line: Sample) {
    upper
        .iter_mut()
        .zip(lower)
        .for_each(|(upper, lower)| *upper = line.mix(*upper, *lower));
}

/// Makes a row of the target from one of the source.
fn scale_row(source: &[u8], columns: &[Sample], row: &mut [u8]) {
    let pixel = |x: u32| {
        let start = bytes_of(x);
        source.get(start..start + 4).unwrap_or(&[0; 4])
    };
    for (column, target) in columns.iter().zip(row.chunks_exact_mut(4)) {
        let pair = pixel(column.first).iter().zip(pixel(column.second));
        target
            .iter_mut()
            .zip(pair)
            .for_each(|(target, (first, second))| *target = column.mix(*first, *second));
    }
}

/// Puts a row over another one (Porter-Duff "over" on premultiplied pixels).
fn over_row(row: &mut [u8], below: &[u8]) {
    for (pixel, below) in row.chunks_exact_mut(4).zip(below.chunks_exact(4)) {
        let alpha = pixel.last().copied().unwrap_or(u8::MAX);
        let through = u32::from(u8::MAX - alpha);
        for (value, below) in pixel.iter_mut().zip(below) {
            let product = u32::from(*below) * through + 128;
            let rest = (product + (product >> 8)) >> 8;
            *value = u8::try_from(u32::from(*value) + rest).unwrap_or(u8::MAX);
        }
    }
}

/// A path to fill.
pub(super) struct PathFill {
    target: View,
    /// In pixels of the target.
    path: tiny_skia::Path,
    paint: Paint<'static>,
    rule: FillRule,
    /// The pixels that it may touch, columns and rows.
    columns: (u32, u32),
    rows: (u32, u32),
    points: u32,
}

impl PathFill {
    /// Checks a path; `data` is what follows the struct. `None` when there is nothing to draw.
    pub(super) fn new(
        command: &soft::Path,
        data: &[u8],
        target: View,
    ) -> Result<Option<Self>, Errno> {
        let flags = command.header.flags;
        ensure(flags & !(PATH_EVEN_ODD | PATH_ALIASED | PATH_REPLACE) == 0)?;
        let counts = 1..=POINTS_MAX;
        ensure(counts.contains(&command.point_count) && counts.contains(&command.verb_count))?;
        let (points, rest) = elements::<[f32; 2]>(data, command.point_count)?;
        ensure(command.stop_count <= STOPS_MAX)?;
        let (stops, rest) = elements::<soft::Stop>(rest, command.stop_count)?;
        let (verbs, rest) = elements::<u8>(rest, command.verb_count)?;
        ensure(rest.len() < 8 && rest.iter().all(|byte| *byte == 0))?;

        let [sx, ky, kx, sy, tx, ty] = command.transform;
        let transform = Transform::from_row(sx, ky, kx, sy, tx, ty);
        ensure(transform.is_finite())?;
        let shader = shader(command, &stops, transform)?;
        let Some(path) = build(&points, &verbs)? else {
            return Ok(None);
        };
        let path = path.transform(transform).ok_or(Errno::EINVAL)?;
        let bounds = path.bounds();
        let edges = [bounds.left(), bounds.top(), bounds.right(), bounds.bottom()];
        ensure(edges.iter().all(|edge| edge.abs() <= COORDINATE_MAX))?;
        let columns = pixels(bounds.left(), bounds.right(), target.width);
        let rows = pixels(bounds.top(), bounds.bottom(), target.height);
        if columns.0 >= columns.1 || rows.0 >= rows.1 {
            return Ok(None);
        }
        let even_odd = flags & PATH_EVEN_ODD != 0;
        let replace = flags & PATH_REPLACE != 0;
        Ok(Some(Self {
            target,
            path,
            paint: Paint {
                shader,
                blend_mode: match replace {
                    true => BlendMode::Source,
                    false => BlendMode::SourceOver,
                },
                anti_alias: flags & PATH_ALIASED == 0,
                ..Paint::default()
            },
            rule: match even_odd {
                true => FillRule::EvenOdd,
                false => FillRule::Winding,
            },
            columns,
            rows,
            points: command.point_count,
        }))
    }

    /// What it costs, in the units of the command set.
    pub(super) fn work(&self) -> u64 {
        let width = u64::from(self.columns.1 - self.columns.0);
        let height = u64::from(self.rows.1 - self.rows.0);
        let tiles = width.div_ceil(TILE_WIDTH.into()) * height.div_ceil(TILE_HEIGHT.into());
        width * height * WORK_PIXEL + u64::from(self.points) * tiles * WORK_COMMAND
    }

    /// Draws tile after tile.
    pub(super) fn execute(&self, progress: &Progress) -> Result<(), Stop> {
        let mut y = self.rows.0;
        while y < self.rows.1 {
            let height = TILE_HEIGHT.min(self.rows.1 - y);
            let mut x = self.columns.0;
            while x < self.columns.1 {
                progress.check()?;
                let width = TILE_WIDTH.min(self.columns.1 - x);
                self.draw_tile(x, y, width, height)?;
                x += width;
            }
            y += height;
        }
        Ok(())
    }

    fn draw_tile(&self, x: u32, y: u32, width: u32, height: u32) -> Result<(), Stop> {
        let row = bytes_of(width);
        let mut pixels = vec![0; row * bytes_of(height) / bytes_of(1)];
        for (line, pixels) in (y..).zip(pixels.chunks_exact_mut(row)) {
            self.target.read(x, line, pixels)?;
        }
        #[allow(clippy::cast_precision_loss)] // both are below 2^24
        let (left, top) = (x as f32, y as f32);
        let bounds = self.path.bounds();
        let inside_width = (bounds.right() - left) - (bounds.left() - left);
        let inside_height = (bounds.bottom() - top) - (bounds.top() - top);
        let canvas = PixmapMut::from_bytes(&mut pixels, width, height);
        if let Some(mut canvas) = canvas
            && inside_width > NOTHING
            && inside_height > NOTHING
        {
            let transform = Transform::from_translate(-left, -top);
            canvas.fill_path(&self.path, &self.paint, self.rule, transform, None);
        }
        for (line, pixels) in (y..).zip(pixels.chunks_exact(row)) {
            self.target.write(x, line, pixels)?;
        }
        Ok(())
    }
}

/// `count` elements at the start of `data`, and what follows them.
fn elements<T: FromBytes + Copy>(data: &[u8], count: u32) -> Result<(Vec<T>, &[u8]), Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::EINVAL)?;
    let length = count.checked_mul(size_of::<T>()).ok_or(Errno::EINVAL)?;
    let (bytes, rest) = data.split_at_checked(length).ok_or(Errno::EINVAL)?;
    let elements = bytes.chunks_exact(size_of::<T>());
    let elements = elements.map(|bytes| T::read_from_bytes(bytes).map_err(|_| Errno::EINVAL));
    Ok((elements.collect::<Result<_, _>>()?, rest))
}

/// The pixels that an interval touches, clipped to `0..limit`. The interval is finite.
fn pixels(from: f32, to: f32, limit: u32) -> (u32, u32) {
    // A float becomes the nearest integer that there is: casts saturate. One pixel more on each side for edges that
    // lie on a boundary after rounding.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (from, to) = ((from.floor() - 1.0) as u32, (to.ceil() + 1.0) as u32);
    (from.min(limit), to.min(limit))
}

/// Builds the path; `None` when it is nothing but a start.
fn build(points: &[[f32; 2]], verbs: &[u8]) -> Result<Option<tiny_skia::Path>, Errno> {
    ensure(verbs.first() == Some(&verb::MOVE))?;
    ensure(points.iter().flatten().all(|value| value.is_finite()))?;
    let mut points = points.iter().copied();
    let mut next = || points.next().ok_or(Errno::EINVAL);
    let mut path = PathBuilder::with_capacity(verbs.len(), verbs.len());
    for verb in verbs {
        match *verb {
            verb::MOVE => {
                let [x, y] = next()?;
                path.move_to(x, y);
            }
            verb::LINE => {
                let [x, y] = next()?;
                path.line_to(x, y);
            }
            verb::QUAD => {
                let ([x1, y1], [x, y]) = (next()?, next()?);
                path.quad_to(x1, y1, x, y);
            }
            verb::CUBIC => {
                let ([x1, y1], [x2, y2], [x, y]) = (next()?, next()?, next()?);
                path.cubic_to(x1, y1, x2, y2, x, y);
            }
            verb::CLOSE => path.close(),
            _ => return Err(Errno::EINVAL),
        }
    }
    ensure(points.next().is_none())?;
    match path.len() {
        0 | 1 => Ok(None),
        // The only other reason for no path is that its bounds are no finite rectangle.
        _ => path.finish().map(Some).ok_or(Errno::EINVAL),
    }
}

fn color([red, green, blue, alpha]: [f32; 4]) -> Result<Color, Errno> {
    Color::from_rgba(red, green, blue, alpha).ok_or(Errno::EINVAL)
}

/// The paint of a path whose coordinates become pixels by `transform`.
fn shader(
    command: &soft::Path,
    stops: &[soft::Stop],
    transform: Transform,
) -> Result<Shader<'static>, Errno> {
    let zero = |values: &[f32]| ensure(values.iter().all(|value| *value == 0.0));
    if command.paint == paint::SOLID {
        zero(&[command.start, command.end].concat())?;
        zero(&[command.radius])?;
        ensure(stops.is_empty() && command.spread == 0)?;
        return Ok(Shader::SolidColor(color(command.color)?));
    }
    zero(&command.color)?;
    ensure(stops.len() >= 2)?;
    let sorted = stops.is_sorted_by(|first, second| first.offset <= second.offset);
    let range = stops.iter().all(|stop| (0.0..=1.0).contains(&stop.offset));
    ensure(sorted && range)?;
    let stops = stops
        .iter()
        .map(|stop| Ok(GradientStop::new(stop.offset, color(stop.color)?)))
        .collect::<Result<Vec<_>, Errno>>()?;
    let spread = match command.spread {
        spread::PAD => SpreadMode::Pad,
        spread::REFLECT => SpreadMode::Reflect,
        spread::REPEAT => SpreadMode::Repeat,
        _ => return Err(Errno::EINVAL),
    };
    let all = [command.start, command.end].concat();
    let within = |value: &f32| value.abs() <= COORDINATE_MAX;
    ensure(all.iter().all(within) && within(&command.radius))?;
    let [x, y] = command.start;
    let start = Point::from_xy(x, y);
    let shader = match command.paint {
        paint::LINEAR => {
            zero(&[command.radius])?;
            let [x, y] = command.end;
            LinearGradient::new(start, Point::from_xy(x, y), stops, spread, transform)
        }
        paint::RADIAL => {
            zero(&command.end)?;
            ensure(command.radius > 0.0)?;
            RadialGradient::new(start, 0.0, start, command.radius, stops, spread, transform)
        }
        _ => return Err(Errno::EINVAL),
    };
    shader.ok_or(Errno::EINVAL)
}
