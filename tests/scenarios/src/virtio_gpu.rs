//! The scenario of `virtio_gpu` with 3D, on its render node: what Mesa's driver does at start and for one frame.
//! Asks for parameters and capabilities, makes a vertex buffer and a render target, uploads vertices, submits two
//! command streams that clear and draw, downloads the picture and checks it.

use alloc::vec;
use alloc::vec::Vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{GEM_CLOSE, GemClose};
use pvgpu_protocol::family::virtio_gpu::{
    Box3d, EXECBUFFER, Execbuffer, GET_CAPS, GETPARAM, GetCaps, GetParam, MAP, Map,
    RESOURCE_CREATE, RESOURCE_INFO, ResourceCreate, ResourceInfo, TRANSFER_FROM_HOST,
    TRANSFER_TO_HOST, TransferFromHost, TransferToHost, WAIT, Wait, exec, param,
};

use crate::steps::{Failure, Report, Steps, address, address_mut, expect_driver};
use crate::virgl::{Format, Stage, Stream, VertexElement, bind, target};
use crate::{DeviceFile, Mapping, Picture, check};

/// Size of the picture in pixels.
const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
/// Pixels around the drawing that keep the colour of the clear.
const MARGIN: u32 = 16;

/// Red, green, blue, alpha.
type Colour = [u8; 4];

const CLEAR: Colour = [0x12, 0x0f, 0x1f, 0xff];
/// The sky from the first row over the middle to the last row.
const SKY: [Colour; 3] = [
    [0x24, 0x1a, 0x5c, 0xff],
    [0xb8, 0x47, 0x76, 0xff],
    [0xff, 0xb8, 0x6c, 0xff],
];
/// Vertices of the sky: two bands of two triangles.
const SKY_VERTICES: u32 = 12;
const PETALS: usize = 12;
/// How far the petals reach, the whole height being 2.
const PETAL_TIP: f32 = 0.82;
/// Alpha of a petal at the centre and at its tip.
const PETAL_ALPHA: [u8; 2] = [0xe0, 0x80];

/// One vertex: position, then colour.
#[derive(Clone, Copy)]
struct Vertex {
    position: [f32; 2],
    colour: [f32; 4],
}

/// Bytes of a vertex in the vertex buffer.
const VERTEX_SIZE: u32 = 24;

const VERTEX_SHADER: &str = "VERT
DCL IN[0]
DCL IN[1]
DCL OUT[0], POSITION
DCL OUT[1], GENERIC[0]
IMM[0] FLT32 { 0.0000, 1.0000, 0.0000, 0.0000}
  0: MOV OUT[0].xy, IN[0].xyxx
  1: MOV OUT[0].zw, IMM[0].xxxy
  2: MOV OUT[1], IN[1]
  3: END
";

const FRAGMENT_SHADER: &str = "FRAG
DCL IN[0], GENERIC[0], PERSPECTIVE
DCL OUT[0], COLOR
  0: MOV OUT[0], IN[0]
  1: END
";

/// What Mesa asks for.
const PARAMETERS: [(u64, &str); 7] = [
    (param::FEATURES_3D, "GETPARAM 3D_FEATURES"),
    (param::CAPSET_QUERY_FIX, "GETPARAM CAPSET_QUERY_FIX"),
    (param::RESOURCE_BLOB, "GETPARAM RESOURCE_BLOB"),
    (param::HOST_VISIBLE, "GETPARAM HOST_VISIBLE"),
    (param::CROSS_DEVICE, "GETPARAM CROSS_DEVICE"),
    (param::CONTEXT_INIT, "GETPARAM CONTEXT_INIT"),
    (param::SUPPORTED_CAPSET_IDS, "GETPARAM SUPPORTED_CAPSET_IDs"),
];

/// Number, version and size of the two capability sets of virgl (`virgl_caps_v1` and `_v2` in virgl_hw.h; of the
/// second one, which grows, as much as all its versions have).
const CAPABILITY_SETS: [(u32, u32, usize, &str); 2] = [
    (1, 1, 308, "GET_CAPS virgl"),
    (2, 2, 700, "GET_CAPS virgl 2"),
];

/// Runs the scenario.
pub fn draw<D: DeviceFile>(file: &mut D, report: &mut impl Report) -> Result<Picture, Failure> {
    let mut steps = Steps { file, report };
    expect_driver(&mut steps, b"virtio_gpu")?;
    ask(&mut steps)?;

    let vertices = scene();
    let vertex_bytes = bytes_of(&vertices);
    let size = vertex_bytes.len() as u32;
    let buffer = create(
        &mut steps,
        "RESOURCE_CREATE vertices",
        ResourceCreate {
            target: target::BUFFER,
            format: Format::R8Unorm as u32,
            bind: bind::VERTEX_BUFFER,
            width: size,
            height: 1,
            size,
            ..Default::default()
        },
    )?;
    let picture_size = WIDTH * HEIGHT * 4;
    let texture = create(
        &mut steps,
        "RESOURCE_CREATE render target",
        ResourceCreate {
            target: target::TEXTURE_2D,
            format: Format::R8G8B8A8Unorm as u32,
            bind: bind::RENDER_TARGET | bind::SAMPLER_VIEW,
            width: WIDTH,
            height: HEIGHT,
            size: picture_size,
            ..Default::default()
        },
    )?;
    check!(
        buffer.bo_handle != texture.bo_handle && buffer.res_handle != texture.res_handle,
        "two resources share a handle: {buffer:?}, {texture:?}"
    );

    let mut upload = map(&mut steps, buffer.bo_handle, vertex_bytes.len())?;
    steps.call("write vertices", |_| {
        upload.write(0, &vertex_bytes);
        Ok(())
    })?;
    steps.ioctl(
        "TRANSFER_TO_HOST",
        TRANSFER_TO_HOST,
        TransferToHost {
            bo_handle: buffer.bo_handle,
            r#box: Box3d {
                w: size,
                h: 1,
                d: 1,
                ..Default::default()
            },
            ..Default::default()
        },
    )?;

    // Two submissions, the second behind a fence of the first.
    let resources = [&buffer, &texture];
    let fence = submit(
        &mut steps,
        "EXECBUFFER with a fence out",
        &background(&buffer, &texture),
        resources,
        None,
    )?;
    let fence = submit(
        &mut steps,
        "EXECBUFFER with a fence in and out",
        &petals(vertices.len() as u32),
        resources,
        Some(fence),
    )?;
    steps.call("close the last fence", |file| file.close_fd(fence))?;
    let finished = Wait {
        handle: texture.bo_handle,
        flags: 0,
    };
    steps.ioctl("WAIT for the drawing", WAIT, finished)?;

    // The mapping is filled with what no picture has, to see that the download writes all of it.
    let mut download = map(&mut steps, texture.bo_handle, picture_size as usize)?;
    let mut rgba = vec![0; picture_size as usize];
    download.write(0, &rgba);
    steps.ioctl(
        "TRANSFER_FROM_HOST",
        TRANSFER_FROM_HOST,
        TransferFromHost {
            bo_handle: texture.bo_handle,
            r#box: Box3d {
                w: WIDTH,
                h: HEIGHT,
                d: 1,
                ..Default::default()
            },
            ..Default::default()
        },
    )?;
    steps.ioctl("WAIT for the download", WAIT, finished)?;
    steps.call("read back", |_| {
        download.read(0, &mut rgba);
        Ok(())
    })?;

    drop((upload, download));
    for resource in [buffer, texture] {
        let handle = resource.bo_handle;
        steps.ioctl("GEM_CLOSE", GEM_CLOSE, GemClose { handle, pad: 0 })?;
        steps.refused(
            "MAP of a closed handle",
            MAP,
            Map {
                handle,
                ..Default::default()
            },
            Errno::ENOENT,
        )?;
    }

    let picture = Picture {
        width: WIDTH,
        height: HEIGHT,
        rgba,
    };
    examine(&picture)?;
    Ok(picture)
}

/// Parameters and capabilities: what a driver must know before it can do anything.
fn ask<D: DeviceFile, R: Report>(steps: &mut Steps<'_, D, R>) -> Result<(), Failure> {
    for (number, step) in PARAMETERS {
        let mut value = [0; 4];
        steps.ioctl(
            step,
            GETPARAM,
            GetParam {
                param: number,
                value: address_mut(&mut value),
            },
        )?;
        let value = u32::from_le_bytes(value);
        check!(
            number != param::FEATURES_3D || value == 1,
            "GETPARAM 3D_FEATURES is {value}: the GPU has no 3D (virgl)"
        );
    }
    for (cap_set_id, cap_set_ver, size, step) in CAPABILITY_SETS {
        let mut set = vec![0; size];
        steps.ioctl(
            step,
            GET_CAPS,
            GetCaps {
                cap_set_id,
                cap_set_ver,
                addr: address_mut(&mut set),
                size: size as u32,
                pad: 0,
            },
        )?;
        // The set's version, then 16 words of bits: the formats that can be sampled.
        check!(
            set[..4] == cap_set_ver.to_le_bytes() && set[4..68].iter().any(|byte| *byte != 0),
            "{step} gave a set that starts with {:?} and has no texture format",
            &set[..4]
        );
    }
    Ok(())
}

/// Makes a resource and asks the driver what it has made.
fn create<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    step: &'static str,
    wanted: ResourceCreate,
) -> Result<ResourceCreate, Failure> {
    let made = steps.ioctl(
        step,
        RESOURCE_CREATE,
        ResourceCreate {
            depth: 1,
            array_size: 1,
            ..wanted
        },
    )?;
    let info = steps.ioctl(
        "RESOURCE_INFO",
        RESOURCE_INFO,
        ResourceInfo {
            bo_handle: made.bo_handle,
            ..Default::default()
        },
    )?;
    check!(
        made.bo_handle != 0
            && made.res_handle != 0
            && info.res_handle == made.res_handle
            && info.size >= wanted.size,
        "{step} of {} bytes gave {made:?}, RESOURCE_INFO says {info:?}",
        wanted.size
    );
    Ok(made)
}

fn map<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    handle: u32,
    length: usize,
) -> Result<D::Mapping, Failure> {
    let map = steps.ioctl(
        "MAP",
        MAP,
        Map {
            handle,
            ..Default::default()
        },
    )?;
    steps.map("mmap", map.offset, length.next_multiple_of(4096))
}

/// Submits commands and gives their fence. With a fence, waits for that one first and closes it.
fn submit<D: DeviceFile, R: Report>(
    steps: &mut Steps<'_, D, R>,
    step: &'static str,
    commands: &[u8],
    resources: [&ResourceCreate; 2],
    after: Option<i32>,
) -> Result<i32, Failure> {
    let handles = resources.map(|resource| resource.bo_handle.to_le_bytes());
    let fence_in = after.map_or(0, |_| exec::FENCE_FD_IN);
    let submitted = steps.ioctl(
        step,
        EXECBUFFER,
        Execbuffer {
            flags: exec::FENCE_FD_OUT | fence_in,
            size: commands.len() as u32,
            command: address(commands),
            bo_handles: address(handles.as_flattened()),
            num_bo_handles: handles.len() as u32,
            fence_fd: after.unwrap_or(-1),
            ..Default::default()
        },
    )?;
    check!(
        submitted.fence_fd >= 0,
        "{step} gave file descriptor {}",
        submitted.fence_fd
    );
    if let Some(fence) = after {
        steps.call("close the fence", |file| file.close_fd(fence))?;
    }
    Ok(submitted.fence_fd)
}

/// The first commands: all state, the clear, the sky.
fn background(buffer: &ResourceCreate, texture: &ResourceCreate) -> Vec<u8> {
    let mut stream = Stream::new();
    stream.create_surface(1, texture.res_handle, Format::R8G8B8A8Unorm);
    stream.set_framebuffer(1);
    stream.set_viewport(WIDTH as f32, HEIGHT as f32);
    stream.clear(CLEAR.map(unit));
    stream.blend_over(2);
    stream.rasterize_filled(3);
    stream.test_nothing(4);
    stream.shader(5, Stage::Vertex, VERTEX_SHADER);
    stream.shader(6, Stage::Fragment, FRAGMENT_SHADER);
    let elements = [
        VertexElement {
            offset: 0,
            format: Format::R32G32Float,
        },
        VertexElement {
            offset: 8,
            format: Format::R32G32B32A32Float,
        },
    ];
    stream.vertex_elements(7, &elements);
    stream.set_vertex_buffer(buffer.res_handle, VERTEX_SIZE);
    stream.draw_triangles(0, SKY_VERTICES);
    stream.bytes()
}

/// The second commands: the rest of the vertices, with the same state.
fn petals(vertices: u32) -> Vec<u8> {
    let mut stream = Stream::new();
    stream.draw_triangles(SKY_VERTICES, vertices - SKY_VERTICES);
    stream.bytes()
}

/// A colour component from 0 to 1.
fn unit(component: u8) -> f32 {
    f32::from(component) / 255.0
}

/// The drawing, every three vertices a triangle: the sky, then petals over it.
fn scene() -> Vec<Vertex> {
    let mut vertices = Vec::new();
    let vertex = |position, colour: Colour| Vertex {
        position,
        colour: colour.map(unit),
    };
    let (x, y) = (
        1.0 - 2.0 * MARGIN as f32 / WIDTH as f32,
        1.0 - 2.0 * MARGIN as f32 / HEIGHT as f32,
    );
    for (from, to, band) in [(-y, 0.0, 0), (0.0, y, 1)] {
        let (above, below) = (SKY[band], SKY[band + 1]);
        let corners = [
            vertex([-x, from], above),
            vertex([x, from], above),
            vertex([x, to], below),
            vertex([-x, to], below),
        ];
        vertices.extend([0, 1, 2, 0, 2, 3].map(|corner| corners[corner]));
    }
    for petal in 0..PETALS {
        let [red, green, blue] = petal_colour(petal);
        let [inner, outer] = PETAL_ALPHA.map(|alpha| [red, green, blue, alpha]);
        let centre = vertex([0.0, 0.0], inner);
        let tip = vertex(position(petal, [0.0, -PETAL_TIP]), outer);
        for side in [-0.16, 0.16] {
            let side = vertex(position(petal, [side, -0.42]), inner);
            vertices.extend([centre, side, tip]);
        }
    }
    vertices
}

/// Where a point of petal 0, which points up, lies in the petal of that number: turned by 30 degrees for each, and
/// narrowed so that pixels are square.
fn position(petal: usize, [mut x, mut y]: [f32; 2]) -> [f32; 2] {
    const COS_30: f32 = 0.866_025_4;
    const SIN_30: f32 = 0.5;
    for _ in 0..petal {
        (x, y) = (x * COS_30 - y * SIN_30, x * SIN_30 + y * COS_30);
    }
    [x * HEIGHT as f32 / WIDTH as f32, y]
}

/// Twelve colours around the wheel.
fn petal_colour(petal: usize) -> [u8; 3] {
    const FULL: u8 = 0xff;
    const HALF: u8 = 0x9c;
    const NONE: u8 = 0x38;
    const WHEEL: [u8; PETALS] = [
        FULL, FULL, FULL, HALF, NONE, NONE, NONE, NONE, NONE, HALF, FULL, FULL,
    ];
    [0, 8, 4].map(|turn| WHEEL[(petal + turn) % PETALS])
}

fn bytes_of(vertices: &[Vertex]) -> Vec<u8> {
    let floats = |vertex: &Vertex| {
        let [x, y] = vertex.position;
        let [r, g, b, a] = vertex.colour;
        [x, y, r, g, b, a].map(f32::to_le_bytes)
    };
    vertices
        .iter()
        .flat_map(floats)
        .collect::<Vec<_>>()
        .into_flattened()
}

/// Checks the picture where it can be computed: the margin exactly; the sky and the petals where one
/// covers the other, to the rounding of a GPU.
fn examine(picture: &Picture) -> Result<(), Failure> {
    for y in 0..HEIGHT {
        for x in 0..WIDTH {
            let inside =
                (MARGIN..WIDTH - MARGIN).contains(&x) && (MARGIN..HEIGHT - MARGIN).contains(&y);
            check!(
                inside || picture.pixel(x, y) == CLEAR,
                "pixel ({x}, {y}) of the margin is {:?}, not {CLEAR:?} as it was cleared",
                picture.pixel(x, y)
            );
        }
    }
    for y in (MARGIN..HEIGHT - MARGIN).step_by(7) {
        expect(picture, MARGIN + 4, y, sky(y))?;
        expect(picture, WIDTH - MARGIN - 5, y, sky(y))?;
    }
    for petal in 0..PETALS {
        // On the petal's axis, beyond where its neighbours reach.
        let part = 0.85;
        let [x, y] = position(petal, [0.0, -PETAL_TIP * part]);
        let column = ((x + 1.0) / 2.0 * WIDTH as f32) as u32;
        let row = ((y + 1.0) / 2.0 * HEIGHT as f32) as u32;
        let [inner, outer] = PETAL_ALPHA.map(unit);
        let alpha = inner + (outer - inner) * part;
        let [red, green, blue] = petal_colour(petal);
        let mut colour = sky(row);
        for (under, over) in colour.iter_mut().zip([red, green, blue]) {
            *under = f32::from(over) * alpha + *under * (1.0 - alpha);
        }
        expect(picture, column, row, colour)?;
    }
    check!(
        picture.colours(2000) == 2000,
        "only {} different colours: nothing is blended",
        picture.colours(2000)
    );
    Ok(())
}

/// Colour of the sky in that row, components from 0 to 255.
fn sky(row: u32) -> [f32; 3] {
    let half = HEIGHT as f32 / 2.0;
    let place = (row as f32 + 0.5 - half) / (half - MARGIN as f32);
    let (above, below, part) = if place < 0.0 {
        (SKY[0], SKY[1], place + 1.0)
    } else {
        (SKY[1], SKY[2], place)
    };
    core::array::from_fn(|index| {
        let (above, below) = (f32::from(above[index]), f32::from(below[index]));
        above + (below - above) * part
    })
}

/// Fails unless the pixel is that colour, give or take what GPUs round differently.
fn expect(picture: &Picture, x: u32, y: u32, colour: [f32; 3]) -> Result<(), Failure> {
    const TOLERANCE: f32 = 3.0;
    let found = picture.pixel(x, y);
    let near = found
        .iter()
        .zip(colour)
        .all(|(found, expected)| (f32::from(*found) - expected).abs() <= TOLERANCE);
    check!(
        near,
        "pixel ({x}, {y}) is {found:?}, but {colour:?} was drawn there"
    );
    Ok(())
}
