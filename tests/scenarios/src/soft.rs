//! The scenario of `soft`, the embedded GPU: the demo's picture, drawn twice into two buffers, the second time behind
//! the first by a syncobj; shared with a second file by PRIME; a chain of matrix products, behind each other by fence
//! file descriptors, checked against the CPU's. [`breaks`] is the other side: what the GPU does with commands that fault or hang.

use alloc::vec;
use alloc::vec::Vec;

use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core::{
    GEM_CLOSE, GemClose, PRIME_FD_TO_HANDLE, PRIME_HANDLE_TO_FD, PrimeFdToHandle, PrimeHandleToFd,
    SYNCOBJ_CREATE, SYNCOBJ_DESTROY, SYNCOBJ_FD_TO_HANDLE, SYNCOBJ_WAIT, SyncobjCreate,
    SyncobjDestroy, SyncobjFdToHandle, SyncobjWait, prime, syncobj,
};
use pvgpu_protocol::family::soft::{
    COMMAND_SET, CopyBytes, DRM_IOCTL_SOFT_GEM_CREATE, DRM_IOCTL_SOFT_GEM_INFO,
    DRM_IOCTL_SOFT_GEM_MMAP, DRM_IOCTL_SOFT_GET_RESET_STATS, DRM_IOCTL_SOFT_GETPARAM,
    DRM_IOCTL_SOFT_SUBMIT, DRM_IOCTL_SOFT_WAIT, GemCreate, GemInfo, GemMmap, GetParam,
    GetResetStats, Hang, MATMUL_ACCUMULATE, MatMul, Matrix, SUBMIT_FENCE_FD_IN,
    SUBMIT_FENCE_FD_OUT, Store, Stream, Submit, Sync, Wait, feature, param,
};
use zerocopy::IntoBytes;

use crate::landscape::{self, HEIGHT, SWATCHES, WIDTH};
use crate::steps::{Failure, Report, Steps, address, expect_driver};
use crate::{DeviceFile, Mapping, Picture, check};

/// How long anything may take before the GPU counts as dead.
const PATIENCE_NS: u64 = 60_000_000_000;

/// A matrix product that is large enough to be worth a GPU: rows of A, columns of A, columns of B.
const PRODUCT: [usize; 3] = [96, 160, 112];

/// A buffer object.
struct Buffer {
    handle: u32,
    /// In bytes: whole pages.
    size: usize,
}

/// A device file with some calls on this GPU.
type Gpu<'a, D, R> = Steps<'a, D, R>;

/// Runs the scenario.
pub fn draw<D: DeviceFile>(file: &mut D, report: &mut impl Report) -> Result<Picture, Failure> {
    let mut other = file.open_again().map_err(|errno| Failure::Call {
        step: "open again",
        errno,
    })?;
    let mut gpu = Steps { file, report };
    expect_driver(&mut gpu, b"soft")?;
    ask(&mut gpu)?;

    let length = (WIDTH * HEIGHT * 4) as usize;
    let commands = gpu.call("write the commands", |_| landscape::commands())?;
    let [first, second] = [create(&mut gpu, length)?, create(&mut gpu, length)?];
    let mapping = map(&mut gpu, &first)?;
    let [drawn, repeated] = [new_syncobj(&mut gpu)?, new_syncobj(&mut gpu)?];

    // Both are queued before either is done; the second one waits for the first.
    let one = submit(&mut gpu, &commands, &[&first], &[], &[drawn])?;
    let two = submit(&mut gpu, &commands, &[&second], &[drawn], &[repeated])?;
    check!(
        (one, two) == (1, 2),
        "the first two submissions of a file have numbers {one} and {two}"
    );
    wait_syncobj(&mut gpu, "SYNCOBJ_WAIT for the drawing", drawn)?;
    let mut rgba = vec![0; length];
    gpu.call("read back", |_| {
        mapping.read(0, &mut rgba);
        Ok(())
    })?;
    wait_syncobj(&mut gpu, "SYNCOBJ_WAIT for the second drawing", repeated)?;
    for seqno in [one, two] {
        finished(&mut gpu, seqno)?;
    }

    let picture = Picture {
        width: WIDTH,
        height: HEIGHT,
        rgba,
    };
    examine(&picture)?;
    let again = through(&mut gpu, &mut other, &second, length)?;
    check!(
        again == picture.rgba,
        "the same commands drew two different pictures"
    );
    drop(mapping);
    multiply(&mut gpu)?;

    for syncobj in [drawn, repeated] {
        destroy_syncobj(&mut gpu, syncobj)?;
    }
    for buffer in [first, second] {
        close(&mut gpu, &buffer)?;
    }
    Ok(picture)
}

/// What the GPU is: it must have all that the scenario uses.
fn ask<D: DeviceFile, R: Report>(gpu: &mut Gpu<'_, D, R>) -> Result<(), Failure> {
    const NEEDED: u64 = feature::FENCE_FD
        | feature::SYNCOBJ
        | feature::COPY_ENGINE
        | feature::PATH
        | feature::MATMUL;
    let set = parameter(gpu, "GETPARAM COMMAND_SET", param::COMMAND_SET)?;
    let features = parameter(gpu, "GETPARAM FEATURES", param::FEATURES)?;
    let free = parameter(gpu, "GETPARAM MEMORY_FREE", param::MEMORY_FREE)?;
    check!(
        set == COMMAND_SET && features & NEEDED == NEEDED,
        "command set {set} with features {features:#x} cannot draw this picture: it needs set {COMMAND_SET}, {NEEDED:#x}"
    );
    check!(
        free >= 64 << 20,
        "only {free} bytes of GPU memory are free: give the GPU 64 MiB or more"
    );
    Ok(())
}

fn parameter<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    step: &'static str,
    param: u64,
) -> Result<u64, Failure> {
    let asked = GetParam { param, value: 0 };
    Ok(gpu.ioctl(step, DRM_IOCTL_SOFT_GETPARAM, asked)?.value)
}

fn create<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    size: usize,
) -> Result<Buffer, Failure> {
    let wanted = GemCreate {
        size: size as u64,
        ..Default::default()
    };
    let handle = gpu
        .ioctl("GEM_CREATE", DRM_IOCTL_SOFT_GEM_CREATE, wanted)?
        .handle;
    let info = gpu.ioctl(
        "GEM_INFO",
        DRM_IOCTL_SOFT_GEM_INFO,
        GemInfo {
            handle,
            ..Default::default()
        },
    )?;
    check!(
        handle != 0 && info.size == (size as u64).next_multiple_of(4096) && info.busy == 0,
        "GEM_CREATE of {size} bytes gave handle {handle}, GEM_INFO says {info:?}"
    );
    Ok(Buffer {
        handle,
        size: info.size as usize,
    })
}

fn map<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    buffer: &Buffer,
) -> Result<D::Mapping, Failure> {
    let wanted = GemMmap {
        handle: buffer.handle,
        ..Default::default()
    };
    let offset = gpu
        .ioctl("GEM_MMAP", DRM_IOCTL_SOFT_GEM_MMAP, wanted)?
        .offset;
    gpu.map("mmap", offset, buffer.size)
}

fn close<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    buffer: &Buffer,
) -> Result<(), Failure> {
    let handle = buffer.handle;
    gpu.ioctl("GEM_CLOSE", GEM_CLOSE, GemClose { handle, pad: 0 })?;
    gpu.refused(
        "GEM_MMAP of a closed handle",
        DRM_IOCTL_SOFT_GEM_MMAP,
        GemMmap {
            handle,
            ..Default::default()
        },
        Errno::ENOENT,
    )
}

fn new_syncobj<D: DeviceFile, R: Report>(gpu: &mut Gpu<'_, D, R>) -> Result<u32, Failure> {
    let made = gpu.ioctl("SYNCOBJ_CREATE", SYNCOBJ_CREATE, SyncobjCreate::default())?;
    Ok(made.handle)
}

fn destroy_syncobj<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    handle: u32,
) -> Result<(), Failure> {
    let destroy = SyncobjDestroy { handle, pad: 0 };
    gpu.ioctl("SYNCOBJ_DESTROY", SYNCOBJ_DESTROY, destroy)?;
    Ok(())
}

/// Queues commands and gives the submission's number.
fn submit<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    commands: &[u8],
    buffers: &[&Buffer],
    after: &[u32],
    signals: &[u32],
) -> Result<u64, Failure> {
    let handles: Vec<u32> = buffers.iter().map(|buffer| buffer.handle).collect();
    let syncs = |handles: &[u32]| -> Vec<Sync> {
        let sync = |handle: &u32| Sync {
            handle: *handle,
            ..Default::default()
        };
        handles.iter().map(sync).collect()
    };
    let (after, signals) = (syncs(after), syncs(signals));
    let submitted = gpu.ioctl(
        "SUBMIT",
        DRM_IOCTL_SOFT_SUBMIT,
        Submit {
            in_syncs: address(after.as_bytes()),
            out_syncs: address(signals.as_bytes()),
            in_sync_count: after.len() as u32,
            out_sync_count: signals.len() as u32,
            ..submission(commands, &handles)
        },
    )?;
    Ok(submitted.seqno)
}

/// Queues commands behind that fence, if there is one, and asks for theirs.
fn submit_fenced<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    commands: &[u8],
    buffers: &[&Buffer],
    after: Option<i32>,
) -> Result<Submit, Failure> {
    let handles: Vec<u32> = buffers.iter().map(|buffer| buffer.handle).collect();
    let fence_in = after.map_or(0, |_| SUBMIT_FENCE_FD_IN);
    let submitted = gpu.ioctl(
        "SUBMIT with fences",
        DRM_IOCTL_SOFT_SUBMIT,
        Submit {
            flags: SUBMIT_FENCE_FD_OUT | fence_in,
            fence_fd: after.unwrap_or(-1),
            ..submission(commands, &handles)
        },
    )?;
    check!(
        submitted.fence_fd >= 0,
        "SUBMIT gave the fence file descriptor {}",
        submitted.fence_fd
    );
    Ok(submitted)
}

fn submission(commands: &[u8], handles: &[u32]) -> Submit {
    Submit {
        commands: address(commands),
        buffers: address(handles.as_bytes()),
        commands_size: commands.len() as u32,
        buffer_count: handles.len() as u32,
        ..Default::default()
    }
}

fn wait_syncobj<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    step: &'static str,
    handle: u32,
) -> Result<(), Failure> {
    let handles = [handle];
    let wait = SyncobjWait {
        handles: address(handles.as_bytes()),
        timeout_nsec: deadline(gpu),
        count_handles: 1,
        flags: syncobj::WAIT_ALL,
        ..Default::default()
    };
    gpu.ioctl(step, SYNCOBJ_WAIT, wait)?;
    Ok(())
}

fn deadline<D: DeviceFile, R: Report>(gpu: &Gpu<'_, D, R>) -> i64 {
    (gpu.file.now_ns() + PATIENCE_NS) as i64
}

/// Waits for a submission; gives how it ended, zero or a negative errno.
fn outcome<D: DeviceFile, R: Report>(gpu: &mut Gpu<'_, D, R>, seqno: u64) -> Result<i32, Failure> {
    let wait = Wait {
        seqno,
        deadline_ns: deadline(gpu),
        ..Default::default()
    };
    Ok(gpu.ioctl("WAIT", DRM_IOCTL_SOFT_WAIT, wait)?.error)
}

/// Waits for a submission that must succeed.
fn finished<D: DeviceFile, R: Report>(gpu: &mut Gpu<'_, D, R>, seqno: u64) -> Result<(), Failure> {
    let error = outcome(gpu, seqno)?;
    check!(error == 0, "submission {seqno} ended with error {error}");
    Ok(())
}

/// Reads a buffer through a second file, to which it travels as a file descriptor.
fn through<D: DeviceFile, R: Report>(
    gpu: &mut Gpu<'_, D, R>,
    other: &mut D,
    buffer: &Buffer,
    length: usize,
) -> Result<Vec<u8>, Failure> {
    let exported = gpu.ioctl(
        "PRIME_HANDLE_TO_FD",
        PRIME_HANDLE_TO_FD,
        PrimeHandleToFd {
            handle: buffer.handle,
            flags: prime::CLOEXEC | prime::RDWR,
            fd: -1,
        },
    )?;
    let mut second = Steps {
        file: other,
        report: &mut *gpu.report,
    };
    let imported = second.ioctl(
        "PRIME_FD_TO_HANDLE (second file)",
        PRIME_FD_TO_HANDLE,
        PrimeFdToHandle {
            fd: exported.fd,
            ..Default::default()
        },
    )?;
    let imported = Buffer {
        handle: imported.handle,
        size: buffer.size,
    };
    let mapping = map(&mut second, &imported)?;
    let mut bytes = vec![0; length];
    second.call("read back (second file)", |_| {
        mapping.read(0, &mut bytes);
        Ok(())
    })?;
    drop(mapping);
    close(&mut second, &imported)?;
    gpu.call("close the exported fd", |file| file.close_fd(exported.fd))?;
    Ok(bytes)
}

/// Checks the picture where it is known: the swatches exactly, every pixel opaque, and neither flat nor noise.
fn examine(picture: &Picture) -> Result<(), Failure> {
    for (index, colour) in (0..).zip(SWATCHES) {
        let place = landscape::swatch(index);
        for y in place.y..place.y + place.height {
            for x in place.x..place.x + place.width {
                check!(
                    picture.pixel(x, y) == colour,
                    "pixel ({x}, {y}) is {:?}, but was filled with {colour:?}",
                    picture.pixel(x, y)
                );
            }
        }
    }
    let clear = picture
        .rgba
        .chunks_exact(4)
        .position(|pixel| pixel[3] != 0xff);
    check!(
        clear.is_none(),
        "pixel number {} is not opaque: something of the picture is missing",
        clear.unwrap_or(0)
    );
    check!(
        picture.colours(5000) == 5000,
        "only {} different colours: gradients are missing",
        picture.colours(5000)
    );
    // The sun is brighter than the sky above, which is brighter than the night.
    let light = |x, y| {
        let [red, green, blue, _] = picture.pixel(x, y).map(u32::from);
        red + green + blue
    };
    let lights = [light(822, 398), light(822, 300), light(640, 60)];
    check!(
        lights[0] > lights[1] && lights[1] > lights[2],
        "sun, dawn and night have lights {lights:?}, which is not a sunrise"
    );
    Ok(())
}

/// Multiplies two matrices of small whole numbers: every sum is exact, in whatever order it is made. Three submissions,
/// each behind the fence of the one before: the product, the product once more on top, a copy of the result.
fn multiply<D: DeviceFile, R: Report>(gpu: &mut Gpu<'_, D, R>) -> Result<(), Failure> {
    let [m, k, n] = PRODUCT;
    let number = |index: usize, seed: usize| ((index * 37 + seed) % 17) as f32 - 8.0;
    let a: Vec<f32> = (0..m * k).map(|index| number(index, 5)).collect();
    let b: Vec<f32> = (0..k * n).map(|index| number(index, 11)).collect();
    let (from_b, from_c) = (m * k * 4, (m * k + k * n) * 4);
    let factors = create(gpu, from_c + m * n * 4)?;
    let copy = create(gpu, m * n * 4)?;
    let mut mapping = map(gpu, &factors)?;
    mapping.write(0, a.as_bytes());
    mapping.write(from_b, b.as_bytes());

    let matrix = |offset: usize, columns: usize| Matrix {
        buffer: 0,
        stride: columns as u32 * 4,
        offset: offset as u64,
    };
    let product = MatMul {
        a: matrix(0, k),
        b: matrix(from_b, n),
        c: matrix(from_c, n),
        m: m as u32,
        k: k as u32,
        n: n as u32,
        ..Default::default()
    };
    let copied = CopyBytes {
        source: 0,
        target: 1,
        source_offset: from_c as u64,
        length: (m * n * 4) as u64,
        ..Default::default()
    };
    let chain = [
        stream(|stream| stream.push(0, &product))?,
        stream(|stream| stream.push(MATMUL_ACCUMULATE, &product))?,
        stream(|stream| stream.push(0, &copied))?,
    ];
    let (mut fence, mut last) = (None, 0);
    for commands in &chain {
        let submitted = submit_fenced(gpu, commands, &[&factors, &copy], fence)?;
        if let Some(fence) = fence.replace(submitted.fence_fd) {
            gpu.call("close the fence", |file| file.close_fd(fence))?;
        }
        last = submitted.seqno;
    }
    // The last fence becomes a syncobj's: what Vulkan drivers do to wait for a fence of somebody else.
    let syncobj = new_syncobj(gpu)?;
    if let Some(fd) = fence {
        let import = SyncobjFdToHandle {
            handle: syncobj,
            flags: syncobj::IMPORT_SYNC_FILE,
            fd,
            pad: 0,
        };
        gpu.ioctl(
            "SYNCOBJ_FD_TO_HANDLE of a fence",
            SYNCOBJ_FD_TO_HANDLE,
            import,
        )?;
        gpu.call("close the fence", |file| file.close_fd(fd))?;
    }
    wait_syncobj(gpu, "SYNCOBJ_WAIT for the products", syncobj)?;
    finished(gpu, last)?;

    let copy_mapping = map(gpu, &copy)?;
    let mut result = vec![0f32; m * n];
    gpu.call("read the products", |_| {
        copy_mapping.read(0, result.as_mut_bytes());
        Ok(())
    })?;
    for (index, found) in result.iter().enumerate() {
        let (row, column) = (index / n, index % n);
        let sum: f32 = (0..k).map(|i| a[row * k + i] * b[i * n + column]).sum();
        check!(
            *found == 2.0 * sum,
            "twice the product's row {row}, column {column} is {found}, not {}",
            2.0 * sum
        );
    }
    drop((mapping, copy_mapping));
    destroy_syncobj(gpu, syncobj)?;
    close(gpu, &copy)?;
    close(gpu, &factors)
}

/// A short command stream.
fn stream(write: impl FnOnce(&mut Stream<'_>) -> Result<(), Errno>) -> Result<Vec<u8>, Failure> {
    let mut bytes = [0; 256];
    let mut stream = Stream::new(&mut bytes);
    write(&mut stream).map_err(|errno| Failure::Call {
        step: "write the commands",
        errno,
    })?;
    Ok(stream.bytes().to_vec())
}

/// Makes the GPU fault and hang: each ends that submission with its errno and is counted, and the GPU goes on.
pub fn breaks<D: DeviceFile>(file: &mut D, report: &mut impl Report) -> Result<(), Failure> {
    let mut gpu = Steps { file, report };
    let buffer = create(&mut gpu, 4096)?;
    let mapping = map(&mut gpu, &buffer)?;
    let store = |offset: u64, value: u32| {
        let command = Store {
            buffer: 0,
            value,
            offset,
            ..Default::default()
        };
        stream(|stream| stream.push(0, &command))
    };
    let expect = |gpu: &mut Gpu<'_, D, _>, commands: &[u8], expected: Option<Errno>| {
        let seqno = submit(gpu, commands, &[&buffer], &[], &[])?;
        let (error, expected) = (outcome(gpu, seqno)?, expected.map_or(0, Errno::number));
        check!(
            error == -expected,
            "submission {seqno} ended with error {error}, not {}",
            -expected
        );
        Ok(())
    };
    expect(&mut gpu, &store(16, 0x600d_600d)?, None)?;
    expect(&mut gpu, &store(4096, 0xbad)?, Some(Errno::EFAULT))?;
    let hang = stream(|stream| stream.push(0, &Hang::default()))?;
    expect(&mut gpu, &hang, Some(Errno::EIO))?;
    expect(&mut gpu, &store(20, 0x0a11_0a11)?, None)?;

    let mut words = [0u32; 2];
    mapping.read(16, words.as_mut_bytes());
    check!(
        words == [0x600d_600d, 0x0a11_0a11],
        "what was stored before and after the reset reads {words:#x?}"
    );
    let stats = gpu.ioctl(
        "GET_RESET_STATS",
        DRM_IOCTL_SOFT_GET_RESET_STATS,
        GetResetStats::default(),
    )?;
    check!(
        stats.hangs == 1 && stats.faults == 1 && stats.resets >= 1 && stats.banned == 0,
        "after one fault and one hang: {stats:?}"
    );
    let nobody = [buffer.handle + 1000];
    gpu.refused(
        "SUBMIT of a buffer of nobody",
        DRM_IOCTL_SOFT_SUBMIT,
        Submit {
            buffers: address(nobody.as_bytes()),
            commands: address(&hang),
            commands_size: hang.len() as u32,
            buffer_count: 1,
            ..Default::default()
        },
        Errno::ENOENT,
    )?;
    drop(mapping);
    close(&mut gpu, &buffer)
}
