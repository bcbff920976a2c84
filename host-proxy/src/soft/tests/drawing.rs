//! What commands do to memory.

use super::*;

/// A pixel of a picture that starts the bytes.
fn pixel(bytes: &[u8], width: u32, x: u32, y: u32) -> [u8; 4] {
    let start = ((y * width + x) * 4) as usize;
    bytes[start..start + 4].try_into().unwrap()
}

#[test]
fn a_fill_changes_its_rectangle_and_nothing_else() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let target = Surface {
        offset: 16,
        stride: 64,
        width: 10,
        height: 8,
        buffer: 0,
    };
    let command = Fill {
        target,
        rectangle: rectangle(2, 1, 3, 4),
        color: [1, 2, 3, 4],
        ..Fill::default()
    };
    client.run(
        &stream(|stream| stream.push(0, &command).unwrap()),
        &[buffer],
    );
    let mut expected = vec![0; PAGE as usize];
    for y in 1..5 {
        for x in 2..5 {
            let at = 16 + y * 64 + x * 4;
            expected[at..at + 4].copy_from_slice(&[1, 2, 3, 4]);
        }
    }
    assert_eq!(client.map(buffer).bytes(), expected);
}

#[test]
fn a_copy_may_overlap_in_either_direction() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let size = 3 << 20; // more than is copied at once
    let buffer = client.create(size);
    let map = client.map(buffer);
    let before: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
    for (source, target) in [(4096, 1), (1, 4096), (0, 2 << 20), (2 << 20, 0), (5, 5)] {
        map.write(0, &before);
        let length = size as usize - source.max(target);
        let command = CopyBytes {
            source_offset: source as u64,
            target_offset: target as u64,
            length: length as u64,
            ..CopyBytes::default()
        };
        client.run(
            &stream(|stream| stream.push(0, &command).unwrap()),
            &[buffer],
        );
        let mut expected = before.clone();
        expected.copy_within(source..source + length, target);
        assert!(map.bytes() == expected, "{source} to {target}");
    }
}

/// Runs one blit from a picture with these rows to a picture with those, and gives the latter.
fn blit(
    flags: u16,
    (source, source_part): (&[[u8; 4]], Rectangle),
    (target, target_part): (&[[u8; 4]], Rectangle),
    (source_width, target_width): (u32, u32),
) -> Vec<u8> {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffers = [client.create(PAGE), client.create(PAGE)];
    client.map(buffers[0]).write(0, source.as_bytes());
    let map = client.map(buffers[1]);
    map.write(0, target.as_bytes());
    let command = Blit {
        source: surface(0, source_width, source.len() as u32 / source_width),
        target: surface(1, target_width, target.len() as u32 / target_width),
        source_rectangle: source_part,
        target_rectangle: target_part,
        ..Blit::default()
    };
    client.run(
        &stream(|stream| stream.push(flags, &command).unwrap()),
        &buffers,
    );
    map.bytes()[..target.len() * 4].to_vec()
}

#[test]
fn a_blit_copies_its_rectangle() {
    let source: Vec<[u8; 4]> = (0..16).map(|at| [at, at, at, 255]).collect();
    let seen = blit(
        0,
        (&source, rectangle(1, 2, 2, 2)),
        (&[[9; 4]; 9], rectangle(0, 1, 2, 2)),
        (4, 3),
    );
    let mut expected = [[9; 4]; 9];
    expected[3] = source[9];
    expected[4] = source[10];
    expected[6] = source[13];
    expected[7] = source[14];
    assert_eq!(seen, expected.as_bytes());
}

#[test]
fn a_scaled_blit_repeats_the_nearest_pixel_or_mixes_the_nearest_four() {
    let source = [[0, 0, 0, 255], [200, 100, 40, 255]];
    let parts = (rectangle(0, 0, 2, 1), rectangle(0, 0, 4, 2));
    let seen = |flags| blit(flags, (&source, parts.0), (&[[9; 4]; 8], parts.1), (2, 4));
    let nearest = [source[0], source[0], source[1], source[1]];
    assert_eq!(seen(0), [nearest, nearest].as_bytes());
    let mixed = [source[0], [50, 25, 10, 255], [150, 75, 30, 255], source[1]];
    assert_eq!(seen(BLIT_SMOOTH), [mixed, mixed].as_bytes());
}

#[test]
fn a_blit_that_shrinks_takes_pixels_from_all_of_the_source() {
    let source: Vec<[u8; 4]> = (0..8).map(|at| [at; 4]).collect();
    let seen = blit(
        0,
        (&source, rectangle(0, 0, 8, 1)),
        (&[[9; 4]; 2], rectangle(0, 0, 2, 1)),
        (8, 2),
    );
    assert_eq!(seen, [[2_u8; 4], [6; 4]].as_bytes());
}

#[test]
fn blending_puts_premultiplied_pixels_over_others() {
    let source = [[0; 4], [128, 0, 0, 128], [10, 20, 30, 255], [255; 4]];
    let target = [
        [7, 8, 9, 255],
        [0, 200, 100, 255],
        [1; 4],
        [255, 255, 255, 0],
    ];
    let whole = rectangle(0, 0, 4, 1);
    let seen = blit(BLIT_BLEND, (&source, whole), (&target, whole), (4, 4));
    let expected = [target[0], [128, 100, 50, 255], source[2], [255; 4]];
    assert_eq!(seen, expected.as_bytes());
}

/// A path of one colour.
fn solid(target: Surface, color: [f32; 4]) -> Path {
    Path {
        target,
        color,
        transform: IDENTITY,
        ..Path::default()
    }
}

/// The corners of a rectangle.
fn corners(left: f32, top: f32, right: f32, bottom: f32) -> [[f32; 2]; 4] {
    [[left, top], [right, top], [right, bottom], [left, bottom]]
}

const POLYGON: [u8; 5] = [verb::MOVE, verb::LINE, verb::LINE, verb::LINE, verb::CLOSE];

/// Draws one path into an empty picture.
fn draw(
    flags: u16,
    path: &Path,
    points: &[[f32; 2]],
    stops: &[soft::Stop],
    verbs: &[u8],
) -> Vec<u8> {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let target = path.target;
    let buffer = client.create(u64::from(target.stride) * u64::from(target.height));
    let stream = stream(|stream| stream.push_path(flags, path, points, stops, verbs).unwrap());
    client.run(&stream, &[buffer]);
    client.map(buffer).bytes()
}

#[test]
fn the_edge_of_a_path_is_smooth_unless_it_is_aliased() {
    let path = solid(surface(0, 32, 32), [1.0, 0.0, 0.0, 1.0]);
    let points = corners(4.0, 4.0, 8.5, 8.0);
    let smooth = draw(0, &path, &points, &[], &POLYGON);
    assert_eq!(pixel(&smooth, 32, 4, 4), [255, 0, 0, 255]);
    assert_eq!(pixel(&smooth, 32, 7, 7), [255, 0, 0, 255]);
    assert_eq!(pixel(&smooth, 32, 3, 4), [0; 4]);
    assert_eq!(pixel(&smooth, 32, 4, 8), [0; 4]);
    let [red, _, _, alpha] = pixel(&smooth, 32, 8, 5);
    assert!((112..144).contains(&red) && red == alpha, "{red}");
    let aliased = draw(PATH_ALIASED, &path, &points, &[], &POLYGON);
    assert!([0, 255].contains(&pixel(&aliased, 32, 8, 5)[0]));
}

#[test]
fn the_fill_rule_decides_about_the_inside_of_the_inside() {
    let path = solid(surface(0, 32, 32), [0.0, 1.0, 0.0, 1.0]);
    let points = [
        corners(2.0, 2.0, 30.0, 30.0),
        corners(10.0, 10.0, 20.0, 20.0),
    ]
    .concat();
    let verbs = [POLYGON, POLYGON].concat();
    let winding = draw(0, &path, &points, &[], &verbs);
    let even_odd = draw(PATH_EVEN_ODD, &path, &points, &[], &verbs);
    assert_eq!(pixel(&winding, 32, 15, 15), [0, 255, 0, 255]);
    assert_eq!(pixel(&even_odd, 32, 15, 15), [0; 4]);
    assert_eq!(pixel(&even_odd, 32, 5, 5), [0, 255, 0, 255]);
}

#[test]
fn a_transform_moves_and_scales_a_path() {
    let path = Path {
        transform: [2.0, 0.0, 0.0, 3.0, 4.0, 5.0],
        ..solid(surface(0, 32, 32), [1.0; 4])
    };
    let seen = draw(0, &path, &corners(0.0, 0.0, 4.0, 4.0), &[], &POLYGON);
    for y in 0..32 {
        for x in 0..32 {
            let inside = (4..12).contains(&x) && (5..17).contains(&y);
            let expected = if inside { [255; 4] } else { [0; 4] };
            assert_eq!(pixel(&seen, 32, x, y), expected, "{x}, {y}");
        }
    }
}

#[test]
fn a_replacing_path_takes_the_old_pixels_away() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let target = surface(0, 32, 32);
    let path = solid(target, [1.0, 1.0, 1.0, 0.5]);
    let points = corners(0.0, 0.0, 32.0, 32.0);
    for (flags, expected) in [(0, 255), (PATH_REPLACE, 128)] {
        let stream = stream(|stream| {
            stream.push(0, &fill(target, [255; 4])).unwrap();
            stream
                .push_path(flags, &path, &points, &[], &POLYGON)
                .unwrap();
        });
        client.run(&stream, &[buffer]);
        let [.., alpha] = pixel(&client.map(buffer).bytes(), 32, 9, 9);
        assert_eq!(alpha, expected);
    }
}

const BLACK_TO_WHITE: [soft::Stop; 2] = [
    soft::Stop {
        offset: 0.0,
        color: [0.0, 0.0, 0.0, 1.0],
    },
    soft::Stop {
        offset: 1.0,
        color: [1.0; 4],
    },
];

#[test]
fn a_linear_gradient_runs_from_start_to_end_across_tiles() {
    let path = Path {
        paint: paint::LINEAR,
        end: [0.0, 256.0],
        color: [0.0; 4],
        ..solid(surface(0, 16, 256), [0.0; 4])
    };
    let points = corners(0.0, 0.0, 16.0, 256.0);
    let seen = draw(0, &path, &points, &BLACK_TO_WHITE, &POLYGON);
    for y in 0..256 {
        let [red, green, blue, alpha] = pixel(&seen, 16, 8, y);
        assert!(red.abs_diff(y as u8) <= 1, "{red} in row {y}");
        assert_eq!((green, blue, alpha), (red, red, 255));
    }
}

#[test]
fn a_radial_gradient_grows_from_its_centre_and_spreads() {
    let path = Path {
        paint: paint::RADIAL,
        start: [32.0, 32.0],
        radius: 16.0,
        ..solid(surface(0, 64, 64), [0.0; 4])
    };
    let points = corners(0.0, 0.0, 64.0, 64.0);
    let seen = |spread| {
        let path = Path { spread, ..path };
        let picture = draw(0, &path, &points, &BLACK_TO_WHITE, &POLYGON);
        [32, 40, 47, 56, 62].map(|x| pixel(&picture, 64, x, 32)[0])
    };
    let near = |seen: [u8; 5], expected: [u8; 5]| {
        let pairs = seen.into_iter().zip(expected);
        assert!(
            pairs.into_iter().all(|(a, b)| a.abs_diff(b) <= 12),
            "{seen:?}"
        );
    };
    near(seen(spread::PAD), [8, 135, 247, 255, 255]);
    near(seen(spread::REFLECT), [8, 135, 247, 120, 24]);
    near(seen(spread::REPEAT), [8, 135, 247, 135, 231]);
}

#[test]
fn curves_are_drawn() {
    // A circle of four cubics around (32, 32).
    const R: f32 = 20.0;
    const K: f32 = R * 0.552_284_8;
    let at = |x: f32, y: f32| [32.0 + x, 32.0 + y];
    let points = [
        at(R, 0.0),
        at(R, K),
        at(K, R),
        at(0.0, R),
        at(-K, R),
        at(-R, K),
        at(-R, 0.0),
        at(-R, -K),
        at(-K, -R),
        at(0.0, -R),
        at(K, -R),
        at(R, -K),
        at(R, 0.0),
    ];
    let verbs = [
        verb::MOVE,
        verb::CUBIC,
        verb::CUBIC,
        verb::CUBIC,
        verb::CUBIC,
        verb::CLOSE,
    ];
    let path = solid(surface(0, 64, 64), [1.0; 4]);
    let seen = draw(0, &path, &points, &[], &verbs);
    let area: f64 = seen
        .chunks(4)
        .map(|pixel| f64::from(pixel[0]) / 255.0)
        .sum();
    assert!((area - std::f64::consts::PI * 400.0).abs() < 5.0, "{area}");
    let quad = [verb::MOVE, verb::QUAD, verb::CLOSE];
    let seen = draw(
        0,
        &path,
        &[[0.0, 0.0], [60.0, 0.0], [60.0, 60.0]],
        &[],
        &quad,
    );
    let area: f64 = seen
        .chunks(4)
        .map(|pixel| f64::from(pixel[0]) / 255.0)
        .sum();
    assert!((area - 1200.0).abs() < 20.0, "{area}"); // two thirds of the triangle
}

#[test]
fn a_path_outside_of_the_picture_or_without_extent_draws_nothing() {
    let path = solid(surface(0, 32, 32), [1.0; 4]);
    let outside = [
        corners(-60_000.0, 0.0, -5.0, 32.0),
        corners(40.0, 0.0, 60_000.0, 32.0),
        corners(5.0, 5.0, 5.0, 5.0),
        corners(0.0, 7.3, 32.0, 7.3),
        corners(7.3, 0.0, 7.3, 32.0),
    ];
    for points in outside {
        let seen = draw(0, &path, &points, &[], &POLYGON);
        assert!(seen.iter().all(|byte| *byte == 0), "{points:?}");
    }
    let seen = draw(
        0,
        &path,
        &corners(-60_000.0, -60_000.0, 60_000.0, 60_000.0),
        &[],
        &POLYGON,
    );
    assert!(seen.iter().all(|byte| *byte == 255));
}

#[test]
fn no_path_makes_an_engine_panic_or_run_long() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffer = client.create(64 * PAGE);
    let map = client.map(buffer);
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    let garbage: Vec<u8> = (0..64 * PAGE).map(|_| numbers.next() as u8).collect();
    map.write(0, &garbage);
    let mut drawn = 0;
    for round in 0..3000 {
        let mut points = Vec::new();
        let mut verbs = vec![verb::MOVE];
        for _ in 0..numbers.next() % 20 {
            verbs.push((numbers.next() % 5) as u8);
        }
        let needed: usize = verbs
            .iter()
            .map(|verb| [1, 1, 2, 3, 0][usize::from(*verb)])
            .sum();
        // Every second path has only tame numbers, so that most of those are drawn.
        let tame = round % 2 == 0;
        let value = |numbers: &mut Numbers| match tame {
            true => (numbers.next() % 60_000) as f32 / 100.0 - 100.0,
            false => numbers.float(),
        };
        points.resize_with(needed, || [value(&mut numbers), value(&mut numbers)]);
        let paint = (numbers.next() % 3) as u32;
        let gradient = paint != paint::SOLID;
        let mut pair = || [value(&mut numbers), value(&mut numbers)];
        let (start, end) = (pair(), pair());
        let path = Path {
            paint,
            start: if gradient { start } else { [0.0; 2] },
            end: if paint == paint::LINEAR {
                end
            } else {
                [0.0; 2]
            },
            radius: if paint == paint::RADIAL {
                end[0].abs()
            } else {
                0.0
            },
            spread: if gradient {
                (numbers.next() % 3) as u32
            } else {
                0
            },
            color: if gradient { [0.0; 4] } else { [0.5; 4] },
            transform: if tame {
                IDENTITY
            } else {
                [(); 6].map(|()| numbers.float())
            },
            ..solid(surface(0, 256, 256), [0.0; 4])
        };
        let stops = if gradient { &BLACK_TO_WHITE[..] } else { &[] };
        let flags = (numbers.next() % 8) as u16;
        let stream = stream(|stream| {
            stream
                .push_path(flags, &path, &points, stops, &verbs)
                .unwrap()
        });
        match client.submit(&stream, &[buffer]) {
            Ok(seqno) => {
                assert_eq!(client.wait(seqno), 0, "{path:?} {points:?} {verbs:?}");
                drawn += 1;
            }
            Err(error) => assert_eq!(error, Errno::EINVAL),
        }
    }
    assert!(drawn > 1000, "{drawn}");
}

/// Multiplies in a buffer of four pages: A, B and C on the first three.
fn multiply(flags: u16, (m, k, n): (u32, u32, u32), a: &[f32], b: &[f32], c: &[f32]) -> Vec<f32> {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffer = client.create(4 * PAGE);
    let map = client.map(buffer);
    map.write(0, a.as_bytes());
    map.write(4096, b.as_bytes());
    map.write(8192, c.as_bytes());
    let matrix = |page: u64, columns: u32| Matrix {
        buffer: 0,
        stride: columns * 4,
        offset: page * PAGE,
    };
    let command = MatMul {
        a: matrix(0, k),
        b: matrix(1, n),
        c: matrix(2, n),
        m,
        k,
        n,
        ..MatMul::default()
    };
    client.run(
        &stream(|stream| stream.push(flags, &command).unwrap()),
        &[buffer],
    );
    let bytes = &map.bytes()[8192..8192 + (m * n * 4) as usize];
    let values = bytes.chunks(4).map(|value| value.try_into().unwrap());
    values.map(f32::from_le_bytes).collect()
}

#[test]
fn matrices_multiply_and_add_up() {
    let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let b = [7.0, 8.0, 9.0, 10.0, 11.0, 12.0];
    let c = [1000.0; 4];
    let product = [58.0, 64.0, 139.0, 154.0];
    assert_eq!(multiply(0, (2, 3, 2), &a, &b, &c), product);
    let sum = product.map(|value| value + 1000.0);
    assert_eq!(multiply(MATMUL_ACCUMULATE, (2, 3, 2), &a, &b, &c), sum);
}

#[test]
fn matrices_with_gaps_between_rows_multiply_in_blocks() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    // Large enough for several blocks of rows; small integers, so that sums are exact.
    let (m, k, n) = (70_u32, 1100_u32, 1000_u32);
    let stride = 1200 * 4;
    let bytes = u64::from(stride * k);
    let buffers = [
        client.create(bytes),
        client.create(bytes),
        client.create(bytes),
    ];
    let value =
        |matrix: u32, row: u32, column: u32| ((row * 7 + column * (3 + matrix)) % 5) as f32 - 2.0;
    for (matrix, (rows, columns)) in [(0, (m, k)), (1, (k, n))] {
        let map = client.map(buffers[matrix as usize]);
        for row in 0..rows {
            let values: Vec<f32> = (0..columns)
                .map(|column| value(matrix, row, column))
                .collect();
            map.write((row * stride) as usize, values.as_bytes());
        }
    }
    let matrix = |buffer| Matrix {
        buffer,
        stride,
        offset: 0,
    };
    let command = MatMul {
        a: matrix(0),
        b: matrix(1),
        c: matrix(2),
        m,
        k,
        n,
        ..MatMul::default()
    };
    client.run(
        &stream(|stream| stream.push(0, &command).unwrap()),
        &buffers,
    );
    let seen = client.map(buffers[2]).bytes();
    for (row, column) in [(0, 0), (1, 999), (33, 500), (69, 0), (69, 999), (68, 123)] {
        let expected: f32 = (0..k)
            .map(|at| value(0, row, at) * value(1, at, column))
            .sum();
        let at = (row * stride + column * 4) as usize;
        assert_eq!(seen[at..at + 4], expected.to_le_bytes(), "{row}, {column}");
    }
    assert_eq!(seen[4000..4800], [0; 800], "between the rows");
}
