//! The demo's picture as a command stream of the soft GPU: a lake in the mountains at dawn. It uses all of the GPU's
//! drawing commands: paths with colours and gradients, blits of single rows (the reflection), fills.
//!
//! Nothing here is random and nothing uses more than additions and multiplications of `f32`: every machine makes the
//! same commands.

use alloc::vec;
use alloc::vec::Vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::soft::{
    BLIT_SMOOTH, Blit, Fill, IDENTITY, Path, Rectangle, Stop, Stream, Surface, paint, spread,
};

use crate::outline::Outline;

/// Size of the picture in pixels.
pub const WIDTH: u32 = 1280;
/// Size of the picture in pixels.
pub const HEIGHT: u32 = 720;
/// Most bytes that the commands take.
const COMMANDS_MAX: usize = 256 << 10;

/// The first row of the lake.
const SHORE: u32 = 476;
/// Middle of the sun.
const SUN: [f32; 2] = [822.0, 432.0];

/// Squares of plain colours in the lower right corner, filled last: premultiplied red, green, blue, alpha. Each pixel
/// of them is known exactly.
pub const SWATCHES: [[u8; 4]; 6] = [
    [0x14, 0x1b, 0x41, 0xff],
    [0x4b, 0x38, 0x6d, 0xff],
    [0xa8, 0x54, 0x7c, 0xff],
    [0xee, 0x8a, 0x72, 0xff],
    [0xff, 0xc1, 0x85, 0xff],
    [0xff, 0xf0, 0xc9, 0xff],
];

/// Where swatch `index` is.
pub fn swatch(index: u32) -> Rectangle {
    const SIDE: u32 = 14;
    let count = SWATCHES.len() as u32;
    Rectangle {
        x: WIDTH - 26 - (count - index) * (SIDE + 4),
        y: HEIGHT - 24 - SIDE,
        width: SIDE,
        height: SIDE,
    }
}

/// Red, green, blue from 0 to 255, and alpha from 0 to 1.
type Colour = ([u8; 3], f32);

/// The commands that draw the picture into the first buffer of the submission's list; at offset 0, rows without gaps.
pub fn commands() -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; COMMANDS_MAX];
    let mut easel = Easel {
        stream: Stream::new(&mut buffer),
    };
    easel.sky()?;
    easel.stars()?;
    easel.sun()?;
    easel.clouds()?;
    easel.mountains()?;
    easel.lake()?;
    easel.forest()?;
    easel.vignette()?;
    easel.word_mark()?;
    easel.swatches()?;
    Ok(easel.stream.bytes().to_vec())
}

/// A command stream that draws into one picture.
struct Easel<'a> {
    stream: Stream<'a>,
}

const TARGET: Surface = Surface {
    buffer: 0,
    stride: WIDTH * 4,
    offset: 0,
    width: WIDTH,
    height: HEIGHT,
};

impl Easel<'_> {
    fn solid(&mut self, outline: &Outline, colour: Colour) -> Result<(), Errno> {
        let path = Path {
            target: TARGET,
            paint: paint::SOLID,
            color: floats(colour),
            transform: IDENTITY,
            ..Default::default()
        };
        self.stream
            .push_path(0, &path, &outline.points, &[], &outline.verbs)
    }

    /// Fills with colours that change from one point to the other, evenly spaced unless their place is given.
    fn linear(
        &mut self,
        outline: &Outline,
        [start, end]: [[f32; 2]; 2],
        stops: &[(f32, Colour)],
    ) -> Result<(), Errno> {
        let path = Path {
            target: TARGET,
            paint: paint::LINEAR,
            spread: spread::PAD,
            start,
            end,
            transform: IDENTITY,
            ..Default::default()
        };
        self.gradient(outline, &path, stops)
    }

    /// Fills with colours that change from the centre outwards.
    fn radial(
        &mut self,
        outline: &Outline,
        centre: [f32; 2],
        radius: f32,
        stops: &[(f32, Colour)],
    ) -> Result<(), Errno> {
        let path = Path {
            target: TARGET,
            paint: paint::RADIAL,
            spread: spread::PAD,
            start: centre,
            radius,
            transform: IDENTITY,
            ..Default::default()
        };
        self.gradient(outline, &path, stops)
    }

    fn gradient(
        &mut self,
        outline: &Outline,
        path: &Path,
        stops: &[(f32, Colour)],
    ) -> Result<(), Errno> {
        let stops: Vec<Stop> = stops
            .iter()
            .map(|(offset, colour)| Stop {
                offset: *offset,
                color: floats(*colour),
            })
            .collect();
        self.stream
            .push_path(0, path, &outline.points, &stops, &outline.verbs)
    }

    /// From the night above to the dawn at the horizon.
    fn sky(&mut self) -> Result<(), Errno> {
        let mut all = Outline::new();
        all.rectangle(0.0, 0.0, WIDTH as f32, HEIGHT as f32);
        let stops = [
            (0.0, ([0x09, 0x0d, 0x2b], 1.0)),
            (0.28, ([0x1c, 0x1f, 0x55], 1.0)),
            (0.52, ([0x4d, 0x35, 0x7d], 1.0)),
            (0.72, ([0xa9, 0x52, 0x83], 1.0)),
            (0.86, ([0xf0, 0x86, 0x72], 1.0)),
            (1.0, ([0xff, 0xca, 0x84], 1.0)),
        ];
        self.linear(&all, [[0.0, 0.0], [0.0, SHORE as f32 - 16.0]], &stops)
    }

    /// Fewer and fainter towards the dawn; some shine.
    fn stars(&mut self) -> Result<(), Errno> {
        for number in 0..190 {
            let x = noise(1, number) * WIDTH as f32;
            let height = noise(2, number);
            let y = height * height * 300.0;
            let light = (1.0 - y / 300.0) * (0.25 + 0.75 * noise(3, number));
            let size = 0.5 + 0.9 * noise(4, number) * noise(4, number);
            let mut star = Outline::new();
            star.circle([x, y], size);
            self.solid(&star, ([0xf4, 0xf1, 0xff], light))?;
            if number % 19 == 0 {
                let mut halo = Outline::new();
                halo.circle([x, y], 9.0);
                let stops = [
                    (0.0, ([0xcf, 0xd6, 0xff], 0.55 * light)),
                    (1.0, ([0xcf, 0xd6, 0xff], 0.0)),
                ];
                self.radial(&halo, [x, y], 9.0, &stops)?;
                let mut rays = Outline::new();
                let (long, thin) = (8.0, 0.7);
                rays.polygon(&[[x - long, y], [x, y - thin], [x + long, y], [x, y + thin]])
                    .polygon(&[[x, y - long], [x + thin, y], [x, y + long], [x - thin, y]]);
                self.solid(&rays, ([0xff, 0xff, 0xff], 0.8 * light))?;
            }
        }
        Ok(())
    }

    /// A wide glow, a narrow one, and the disc.
    fn sun(&mut self) -> Result<(), Errno> {
        let glow: [(f32, &[(f32, Colour)]); 3] = [
            (
                560.0,
                &[
                    (0.0, ([0xff, 0xc4, 0x7a], 0.62)),
                    (0.35, ([0xff, 0x9a, 0x6a], 0.30)),
                    (1.0, ([0xff, 0x70, 0x70], 0.0)),
                ],
            ),
            (
                170.0,
                &[
                    (0.0, ([0xff, 0xf0, 0xc0], 0.95)),
                    (0.4, ([0xff, 0xd8, 0x90], 0.45)),
                    (1.0, ([0xff, 0xb8, 0x70], 0.0)),
                ],
            ),
            (
                43.0,
                &[
                    (0.0, ([0xff, 0xff, 0xf4], 1.0)),
                    (0.8, ([0xff, 0xf7, 0xd6], 1.0)),
                    (1.0, ([0xff, 0xe9, 0xb0], 1.0)),
                ],
            ),
        ];
        for (radius, stops) in glow {
            let mut disc = Outline::new();
            disc.circle(SUN, radius);
            self.radial(&disc, SUN, radius, stops)?;
        }
        Ok(())
    }

    /// Long thin clouds, lit from below.
    fn clouds(&mut self) -> Result<(), Errno> {
        const CLOUDS: [[f32; 4]; 9] = [
            [180.0, 300.0, 210.0, 9.0],
            [330.0, 318.0, 150.0, 6.0],
            [560.0, 262.0, 190.0, 7.0],
            [700.0, 338.0, 260.0, 9.0],
            [960.0, 300.0, 230.0, 10.0],
            [1120.0, 322.0, 190.0, 7.0],
            [1010.0, 236.0, 150.0, 5.0],
            [420.0, 366.0, 220.0, 6.0],
            [1180.0, 368.0, 200.0, 6.0],
        ];
        for [x, y, length, thick] in CLOUDS {
            let mut cloud = Outline::new();
            cloud
                .start([x - length, y])
                .curve([x - length * 0.4, y - thick * 0.9], [x, y - thick * 0.7])
                .curve(
                    [x + length * 0.3, y - thick * 2.4],
                    [x + length, y - thick * 0.2],
                )
                .curve(
                    [x + length * 0.3, y + thick * 1.5],
                    [x - length * 0.1, y + thick * 0.6],
                )
                .curve([x - length * 0.5, y + thick * 1.2], [x - length, y])
                .close();
            let ends = [[0.0, y - thick * 1.2], [0.0, y + thick]];
            let stops = [
                (0.0, ([0x6a, 0x3f, 0x80], 0.38)),
                (0.6, ([0xd9, 0x6c, 0x86], 0.50)),
                (1.0, ([0xff, 0xb3, 0x86], 0.62)),
            ];
            self.linear(&cloud, ends, &stops)?;
        }
        Ok(())
    }

    /// Four ranges, each nearer, darker and clearer than the one before, with mist at their feet.
    fn mountains(&mut self) -> Result<(), Errno> {
        let shore = SHORE as f32;
        let mist = [0xf4, 0xa0, 0x86];
        let ranges: [(u32, f32, f32, f32, [u8; 3], f32); 4] = [
            // Seed, height of the base line above the shore, reach, roughness, colour, mist.
            (11, 54.0, 96.0, 300.0, [0xb0, 0x62, 0x86], 0.85),
            (23, 30.0, 128.0, 235.0, [0x7e, 0x48, 0x7e], 0.62),
            (37, 14.0, 120.0, 175.0, [0x4c, 0x33, 0x6a], 0.42),
            (51, 4.0, 62.0, 120.0, [0x26, 0x22, 0x4c], 0.20),
        ];
        for (seed, base, reach, span, colour, haze) in ranges {
            let height = |x: f32| {
                let away = (x - SUN[0]) / WIDTH as f32;
                // Lower where the sun is, so that it shines through a valley.
                let valley = (0.35 + 3.4 * away * away).min(1.0);
                base + reach * valley * ridge(seed, x / span)
            };
            let mut range = Outline::new();
            range.start([-4.0, shore]);
            let mut x = -4.0;
            while x < WIDTH as f32 + 6.0 {
                range.line([x, shore - height(x)]);
                x += 5.0;
            }
            range.line([x, shore]).close();
            let stops = [
                (0.0, (colour, 1.0)),
                (0.45, (colour, 1.0)),
                (1.0, (mixed(colour, mist, haze), 1.0)),
            ];
            let top = shore - base - reach * 0.9;
            self.linear(&range, [[0.0, top], [0.0, shore]], &stops)?;
        }
        Ok(())
    }

    /// Each row of the water is a row of the land, mirrored, and shifted by ripples that grow towards the front.
    fn lake(&mut self) -> Result<(), Errno> {
        for row in 0..HEIGHT - SHORE {
            let depth = row as f32 / (HEIGHT - SHORE) as f32;
            // Steeper towards the front: waves become longer, and so does what they show.
            let from = (row as f32 * (1.05 + 0.75 * depth)) as u32 + 1;
            let swing = 1.5 + 15.0 * depth;
            let phase = row as f32 / (2.6 + 9.0 * depth);
            let ripple = wave(phase) * 0.7 + wave(phase * 2.37 + 0.4) * 0.3;
            let room = 18.0;
            let source_rectangle = Rectangle {
                x: (room + swing * ripple) as u32,
                y: SHORE - from.min(SHORE),
                width: WIDTH - 2 * room as u32,
                height: 1,
            };
            let target_rectangle = Rectangle {
                x: 0,
                y: SHORE + row,
                width: WIDTH,
                height: 1,
            };
            let blit = Blit {
                source: TARGET,
                target: TARGET,
                source_rectangle,
                target_rectangle,
                ..Default::default()
            };
            self.stream.push(BLIT_SMOOTH, &blit)?;
        }
        // Water swallows light, the more the steeper one looks into it.
        let mut water = Outline::new();
        let (shore, bottom) = (SHORE as f32, HEIGHT as f32);
        water.rectangle(0.0, shore, WIDTH as f32, bottom - shore);
        let stops = [
            (0.0, ([0x2a, 0x1d, 0x4f], 0.10)),
            (0.25, ([0x1d, 0x1a, 0x4a], 0.34)),
            (1.0, ([0x07, 0x0b, 0x28], 0.86)),
        ];
        self.linear(&water, [[0.0, shore], [0.0, bottom]], &stops)?;
        // A line of mist on the far shore.
        let mut mist = Outline::new();
        mist.ellipse([WIDTH as f32 * 0.6, shore], WIDTH as f32 * 0.62, 6.0);
        let stops = [
            (0.0, ([0xff, 0xd9, 0xb0], 0.0)),
            (0.5, ([0xff, 0xd9, 0xb0], 0.34)),
            (1.0, ([0xff, 0xd9, 0xb0], 0.0)),
        ];
        self.linear(&mist, [[0.0, shore - 6.0], [0.0, shore + 6.0]], &stops)?;
        // The sun's path over the water.
        for number in 0..150 {
            let depth = noise(61, number);
            let y = shore + 5.0 + depth * depth * (bottom - shore - 40.0);
            let spread = 16.0 + 105.0 * depth;
            let x = SUN[0] + (noise(62, number) + noise(63, number) - 1.0) * spread;
            let length = 4.0 + 26.0 * depth * noise(64, number);
            let mut glint = Outline::new();
            glint.ellipse([x, y], length, 0.6 + 1.3 * depth);
            let light = (0.70 - 0.42 * depth) * (0.35 + 0.65 * noise(65, number));
            self.solid(&glint, ([0xff, 0xdc, 0x9c], light))?;
        }
        Ok(())
    }

    /// The near shore: dark firs on both sides.
    fn forest(&mut self) -> Result<(), Errno> {
        let (width, bottom) = (WIDTH as f32, HEIGHT as f32);
        for (layer, colour, scale) in [
            (0u32, [0x12, 0x13, 0x33], 0.72f32),
            (1, [0x06, 0x08, 0x1b], 1.0),
        ] {
            let drop = if layer == 0 { 34.0 } else { 0.0 };
            // The bank: high at the sides, under the lower edge in the middle.
            let bank = |x: f32| {
                let side = (x / width - 0.56) * 2.0;
                let rise = (side * side * side * side * 230.0 - 34.0).min(170.0);
                bottom - rise - drop - 10.0 * ridge(71 + layer, x / 90.0)
            };
            let mut wood = Outline::new();
            wood.start([-10.0, bottom + 10.0]);
            let mut x = -10.0;
            while x <= width + 10.0 {
                wood.line([x, bank(x).min(bottom + 10.0)]);
                x += 10.0;
            }
            wood.line([width + 10.0, bottom + 10.0]).close();
            for number in 0..64 {
                let x = noise(72 + 10 * layer, number) * (width + 40.0) - 20.0;
                let foot = bank(x) + 6.0;
                if foot > bottom - 6.0 {
                    continue;
                }
                let tall = (52.0 + 92.0 * noise(73 + 10 * layer, number)) * scale;
                fir(&mut wood, [x, foot], tall);
            }
            self.solid(&wood, (colour, 1.0))?;
        }
        Ok(())
    }

    /// "pvgpu" in the sky, with a shadow.
    fn word_mark(&mut self) -> Result<(), Errno> {
        let mut shadow = Outline::new();
        letters(&mut shadow, [85.0, 86.5], 0.62);
        self.solid(&shadow, ([0x05, 0x06, 0x1c], 0.45))?;
        let mut word = Outline::new();
        letters(&mut word, [82.0, 82.0], 0.62);
        let stops = [
            (0.0, ([0xff, 0xff, 0xff], 1.0)),
            (0.55, ([0xff, 0xe6, 0xc4], 1.0)),
            (1.0, ([0xff, 0xa9, 0x84], 1.0)),
        ];
        self.linear(&word, [[0.0, 82.0], [0.0, 178.0]], &stops)
    }

    /// Corners are a little darker.
    fn vignette(&mut self) -> Result<(), Errno> {
        let mut all = Outline::new();
        all.rectangle(0.0, 0.0, WIDTH as f32, HEIGHT as f32);
        let stops = [
            (0.0, ([0, 0, 0], 0.0)),
            (0.62, ([0, 0, 0], 0.0)),
            (1.0, ([0x02, 0x02, 0x10], 0.42)),
        ];
        let centre = [WIDTH as f32 * 0.52, HEIGHT as f32 * 0.5];
        self.radial(&all, centre, 800.0, &stops)
    }

    fn swatches(&mut self) -> Result<(), Errno> {
        for (index, color) in (0..).zip(SWATCHES) {
            let fill = Fill {
                target: TARGET,
                rectangle: swatch(index),
                color,
                ..Default::default()
            };
            self.stream.push(0, &fill)?;
        }
        Ok(())
    }
}

/// A fir with its foot at a point: a trunk and branches that become wider downwards.
fn fir(wood: &mut Outline, [x, foot]: [f32; 2], tall: f32) {
    const TIERS: u32 = 7;
    let half = tall * 0.21;
    wood.start([x, foot - tall]);
    for tier in 1..=TIERS {
        let down = tier as f32 / TIERS as f32;
        let (y, reach) = (foot - tall * (1.0 - down * 0.93), half * down);
        wood.line([x + reach, y]);
        if tier < TIERS {
            wood.line([x + reach * 0.42, y - tall * 0.018]);
        }
    }
    wood.line([x + half * 0.12, foot - tall * 0.07])
        .line([x + half * 0.12, foot])
        .line([x - half * 0.12, foot])
        .line([x - half * 0.12, foot - tall * 0.07]);
    for tier in (1..=TIERS).rev() {
        let down = tier as f32 / TIERS as f32;
        let (y, reach) = (foot - tall * (1.0 - down * 0.93), half * down);
        if tier < TIERS {
            wood.line([x - reach * 0.42, y - tall * 0.018]);
        }
        wood.line([x - reach, y]);
    }
    wood.close();
}

/// The letters p, v, g, p, u from circles and straight lines. At scale 1 a small letter is 100 high and wide.
fn letters(word: &mut Outline, [left, top]: [f32; 2], scale: f32) {
    const OUTER: f32 = 50.0;
    const INNER: f32 = 29.0;
    const STEM: f32 = OUTER - INNER;
    // Where each letter starts: round and slanted sides stand closer.
    const WORD: [(u8, f32); 5] = [
        (b'p', 0.0),
        (b'v', 107.0),
        (b'g', 214.0),
        (b'p', 337.0),
        (b'u', 455.0),
    ];
    for (letter, start) in WORD {
        let at = |x: f32, y: f32| [left + (start + x) * scale, top + y * scale];
        let bar = |word: &mut Outline, x: f32, y: f32, height: f32| {
            let [x, y] = at(x, y);
            word.rectangle(x, y, STEM * scale, height * scale);
        };
        let ring = |word: &mut Outline| {
            word.circle(at(50.0, 50.0), OUTER * scale)
                .hole(at(50.0, 50.0), INNER * scale);
        };
        match letter {
            b'p' => {
                ring(word);
                bar(word, 0.0, 0.0, 150.0);
            }
            b'g' => {
                ring(word);
                bar(word, 100.0 - STEM, 0.0, 101.0);
                word.bowl(at(50.0, 101.0), OUTER * scale, INNER * scale);
            }
            b'u' => {
                bar(word, 0.0, 0.0, 51.0);
                bar(word, 100.0 - STEM, 0.0, 100.0);
                word.bowl(at(50.0, 50.0), OUTER * scale, INNER * scale);
            }
            _ => {
                word.polygon(&[
                    at(0.0, 0.0),
                    at(24.0, 0.0),
                    at(50.0, 70.0),
                    at(76.0, 0.0),
                    at(100.0, 0.0),
                    at(62.0, 100.0),
                    at(38.0, 100.0),
                ]);
            }
        }
    }
}

fn floats(([red, green, blue], alpha): Colour) -> [f32; 4] {
    let unit = |component: u8| f32::from(component) / 255.0;
    [unit(red), unit(green), unit(blue), alpha]
}

fn mixed(one: [u8; 3], other: [u8; 3], part: f32) -> [u8; 3] {
    core::array::from_fn(|index| {
        let (one, other) = (f32::from(one[index]), f32::from(other[index]));
        (one + (other - one) * part) as u8
    })
}

/// A number from 0 to 1 that looks random (the finalizer of MurmurHash3).
fn noise(seed: u32, number: u32) -> f32 {
    let mut hash = seed.wrapping_mul(0x9e37_79b9) ^ number.wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    (hash >> 8 ^ hash >> 24) as f32 / (1 << 24) as f32
}

/// Heights of a mountain range, about 0 to 1: folded value noise in five octaves.
fn ridge(seed: u32, place: f32) -> f32 {
    let (mut sum, mut weight, mut place) = (0.0, 0.5, place + 64.0);
    for octave in 0..6 {
        let cell = place as u32;
        let part = place - cell as f32;
        let smooth = part * part * (3.0 - 2.0 * part);
        let (left, right) = (noise(seed + octave, cell), noise(seed + octave, cell + 1));
        let value = left + (right - left) * smooth;
        // Folded in the middle: peaks instead of hills.
        let fold = 1.0 - (2.0 * value - 1.0).abs();
        sum += weight * fold;
        weight *= 0.47;
        place *= 2.03;
    }
    sum
}

/// Between -1 and 1, with period 2: two parabolas that are close to a sine.
fn wave(phase: f32) -> f32 {
    let whole = phase as u32;
    let part = phase - whole as f32;
    let bow = 4.0 * part * (1.0 - part);
    if whole.is_multiple_of(2) { bow } else { -bow }
}

#[cfg(test)]
mod tests {
    use pvgpu_protocol::family::soft::{Header, opcode};
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn the_stream_is_whole_commands_and_uses_paths_blits_and_fills() {
        let bytes = commands().unwrap();
        let mut counts = [0; 8];
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (header, _) = Header::read_from_prefix(rest).unwrap();
            counts[usize::from(header.opcode)] += 1;
            rest = &rest[header.size as usize..];
        }
        assert!(counts[usize::from(opcode::PATH)] > 100);
        assert_eq!(
            counts[usize::from(opcode::BLIT)],
            HEIGHT as usize - SHORE as usize
        );
        assert_eq!(counts[usize::from(opcode::FILL)], SWATCHES.len());
    }

    #[test]
    fn the_land_is_high_enough_to_be_mirrored() {
        // The last row of the lake shows a row of the picture, not one above it.
        let row = (HEIGHT - SHORE - 1) as f32;
        assert!(row * 1.8 + 1.0 < SHORE as f32);
    }

    #[test]
    fn swatches_lie_in_the_picture_side_by_side() {
        for index in 0..SWATCHES.len() as u32 {
            let (this, next) = (swatch(index), swatch(index + 1));
            assert!(this.x + this.width < next.x);
            assert!(this.x + this.width <= WIDTH && this.y + this.height <= HEIGHT);
        }
    }
}
