//! The embedded GPU as the session sees it: validated calls on its files, mappings, and objects that are given out.

use super::buffer::DmaBuf;
use super::fence::SyncFile;
use super::{SoftConfig, SoftDriver};
use crate::call::{Call, Owned};
use crate::cancel::Cancel;
use crate::driver::{HostDriver, HostObject, Mapping};
use pvgpu_protocol::Errno;
use pvgpu_protocol::family::core as drm;
use pvgpu_protocol::family::soft::{self, *};
use pvgpu_protocol::family::{find, of_driver};
use pvgpu_protocol::layout::{Layout, Payload, lay_out};
use pvgpu_protocol::schema::{Space, command};
use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

mod drawing;
mod objects;
mod queues;
mod waits;

const PAGE: u64 = 4096;
/// Longer than any test takes.
const LONG: i64 = 60_000_000_000;

/// A GPU that does not wait long for a hang to end.
fn driver() -> SoftDriver {
    driver_with(SoftConfig {
        watchdog: Duration::from_millis(250),
        ..SoftConfig::default()
    })
}

/// A GPU whose watchdog stays silent however slow the machine is.
fn patient_driver() -> SoftDriver {
    driver_with(SoftConfig {
        watchdog: Duration::from_secs(60),
        ..SoftConfig::default()
    })
}

fn driver_with(config: SoftConfig) -> SoftDriver {
    SoftDriver::new(config).unwrap()
}

/// A program with one open file, and the objects that it was given.
struct Client {
    file: Arc<dyn HostObject>,
    objects: Mutex<Vec<Arc<dyn HostObject>>>,
}

/// Knows all objects and claims to own every handle, so that the driver's own checks are seen.
impl Owned for Client {
    fn owns(&self, _: Space, _: u32) -> bool {
        true
    }

    fn object(&self, id: i32) -> Result<Arc<dyn HostObject>, Errno> {
        let objects = self.objects.lock().unwrap();
        let id = usize::try_from(id).map_err(|_| Errno::EBADF)?;
        objects.get(id).cloned().ok_or(Errno::EBADF)
    }
}

/// Gathers a call: a pointer is the place of an array, counted from 1.
struct Gather<'a> {
    bytes: Vec<u8>,
    arrays: &'a [Vec<u8>],
}

impl Payload for Gather<'_> {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn gather(&mut self, address: u64, offset: usize, length: usize) -> Result<(), Errno> {
        self.bytes.resize(offset, 0);
        let array = &self.arrays[address as usize - 1];
        self.bytes.extend_from_slice(&array[..length]);
        Ok(())
    }
}

impl Client {
    fn new(driver: &SoftDriver) -> Self {
        Self {
            file: driver.open(0).unwrap(),
            objects: Mutex::default(),
        }
    }

    /// Adds an object of another program.
    fn receive(&self, object: Arc<dyn HostObject>) -> i32 {
        let mut objects = self.objects.lock().unwrap();
        objects.push(object);
        objects.len() as i32 - 1
    }

    fn given(&self, id: i32) -> Arc<dyn HostObject> {
        self.object(id).unwrap()
    }

    fn ioctl<T>(&self, command: u32, argument: &mut T) -> Result<i32, Errno>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        self.ioctl_with(command, argument, &mut [], &Cancel::new())
    }

    /// An ioctl whose pointer fields name `arrays`; times are from now on. What comes out replaces what went in.
    fn ioctl_with<T>(
        &self,
        command: u32,
        argument: &mut T,
        arrays: &mut [Vec<u8>],
        cancel: &Cancel,
    ) -> Result<i32, Errno>
    where
        T: FromBytes + IntoBytes + Immutable,
    {
        let schema = find(of_driver("soft"), command)?;
        let mut gather = Gather {
            bytes: argument.as_bytes().to_vec(),
            arrays,
        };
        let mut layout = Layout::default();
        lay_out(schema, command::size(command), &mut gather, &mut layout)?;
        let payload = gather.bytes;
        assert_eq!(payload.len(), layout.request);
        let mut call = Call::new(schema, command, &payload, self, 16 << 20)?;
        let result = self.file.ioctl(&mut call, cancel);
        if result.is_ok() {
            call.publish(|object| Ok(self.receive(object))).unwrap();
        }
        *argument = call.read_argument();
        let out: Vec<_> = call
            .arrays()
            .filter(|(array, _)| array.response.is_some() && array.length > 0)
            .map(|(array, range)| (array.field, range))
            .collect();
        for (field, range) in out {
            let address = u64::from_le_bytes(payload[field..field + 8].try_into().unwrap());
            arrays[address as usize - 1] = call.bytes_mut()[range].to_vec();
        }
        result
    }

    fn create(&self, size: u64) -> u32 {
        let mut create = GemCreate {
            size,
            ..GemCreate::default()
        };
        self.ioctl(DRM_IOCTL_SOFT_GEM_CREATE, &mut create).unwrap();
        create.handle
    }

    fn close(&self, handle: u32) -> Result<i32, Errno> {
        self.ioctl(drm::GEM_CLOSE, &mut drm::GemClose { handle, pad: 0 })
    }

    fn offset(&self, handle: u32) -> u64 {
        let mut mmap = GemMmap {
            handle,
            ..GemMmap::default()
        };
        self.ioctl(DRM_IOCTL_SOFT_GEM_MMAP, &mut mmap).unwrap();
        mmap.offset
    }

    fn size(&self, handle: u32) -> u64 {
        self.info(handle).size
    }

    fn info(&self, handle: u32) -> GemInfo {
        let mut info = GemInfo {
            handle,
            ..GemInfo::default()
        };
        self.ioctl(DRM_IOCTL_SOFT_GEM_INFO, &mut info).unwrap();
        info
    }

    fn param(&self, param: u64) -> u64 {
        let mut get = GetParam { param, value: 0 };
        self.ioctl(DRM_IOCTL_SOFT_GETPARAM, &mut get).unwrap();
        get.value
    }

    /// The buffer, mapped as the aperture maps it.
    fn map(&self, handle: u32) -> Mapped {
        let (offset, size) = (self.offset(handle), self.size(handle));
        Mapped::new(self.file.mapping(offset, size, 3).unwrap(), size)
    }

    /// Submits with these handles, syncobjs to wait for and to signal; `flags` and the fence as in the ioctl.
    fn submit_all(
        &self,
        stream: &[u8],
        buffers: &[u32],
        syncs: [&[soft::Sync]; 2],
        fence: (u32, i32),
    ) -> Result<Submit, Errno> {
        let mut arrays = [
            stream.to_vec(),
            buffers.as_bytes().to_vec(),
            syncs[0].as_bytes().to_vec(),
            syncs[1].as_bytes().to_vec(),
        ];
        let mut submit = Submit {
            commands: 1,
            buffers: 2,
            in_syncs: 3,
            out_syncs: 4,
            commands_size: stream.len() as u32,
            buffer_count: buffers.len() as u32,
            in_sync_count: syncs[0].len() as u32,
            out_sync_count: syncs[1].len() as u32,
            flags: fence.0,
            fence_fd: fence.1,
            seqno: 0,
        };
        self.ioctl_with(
            DRM_IOCTL_SOFT_SUBMIT,
            &mut submit,
            &mut arrays,
            &Cancel::new(),
        )?;
        Ok(submit)
    }

    fn submit(&self, stream: &[u8], buffers: &[u32]) -> Result<u64, Errno> {
        let submit = self.submit_all(stream, buffers, [&[], &[]], (0, -1))?;
        Ok(submit.seqno)
    }

    /// Waits for a submission and gives its error.
    fn wait(&self, seqno: u64) -> i32 {
        self.wait_for(seqno, LONG).unwrap()
    }

    fn wait_for(&self, seqno: u64, nanoseconds: i64) -> Result<i32, Errno> {
        let mut wait = soft::Wait {
            seqno,
            deadline_ns: nanoseconds,
            ..soft::Wait::default()
        };
        self.ioctl(DRM_IOCTL_SOFT_WAIT, &mut wait)?;
        Ok(wait.error)
    }

    /// Submits and waits for success.
    fn run(&self, stream: &[u8], buffers: &[u32]) {
        let seqno = self.submit(stream, buffers).unwrap();
        assert_eq!(self.wait(seqno), 0);
    }

    fn syncobj(&self, flags: u32) -> u32 {
        let mut create = drm::SyncobjCreate { handle: 0, flags };
        self.ioctl(drm::SYNCOBJ_CREATE, &mut create).unwrap();
        create.handle
    }

    fn stats(&self) -> GetResetStats {
        let mut stats = GetResetStats::default();
        self.ioctl(DRM_IOCTL_SOFT_GET_RESET_STATS, &mut stats)
            .unwrap();
        stats
    }
}

/// A buffer's pages.
struct Mapped(MmapRegion);

impl Mapped {
    fn new(mapping: Mapping, size: u64) -> Self {
        let offset = FileOffset::new(mapping.fd.into(), mapping.offset);
        Self(MmapRegion::from_file(offset, size as usize).unwrap())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.size()];
        self.0
            .get_slice(0, bytes.len())
            .unwrap()
            .copy_to(&mut bytes);
        bytes
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let slice = self.0.get_slice(offset, bytes.len()).unwrap();
        slice.copy_from(bytes);
    }
}

/// A stream of commands.
fn stream(build: impl FnOnce(&mut Stream<'_>)) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 20];
    let mut stream = Stream::new(&mut buffer);
    build(&mut stream);
    stream.bytes().to_vec()
}

fn hang() -> Vec<u8> {
    stream(|stream| stream.push(0, &Hang::default()).unwrap())
}

/// A picture that starts its buffer, rows without gaps.
fn surface(buffer: u32, width: u32, height: u32) -> Surface {
    Surface {
        buffer,
        stride: width * 4,
        offset: 0,
        width,
        height,
    }
}

fn rectangle(x: u32, y: u32, width: u32, height: u32) -> Rectangle {
    Rectangle {
        x,
        y,
        width,
        height,
    }
}

/// Fills a whole picture.
fn fill(target: Surface, color: [u8; 4]) -> Fill {
    Fill {
        target,
        rectangle: rectangle(0, 0, target.width, target.height),
        color,
        ..Fill::default()
    }
}

fn store(buffer: u32, offset: u64, value: u32) -> Store {
    Store {
        buffer,
        offset,
        value,
        ..Store::default()
    }
}

/// A small generator of numbers, the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Now and then something nasty.
    fn float(&mut self) -> f32 {
        match self.next() % 16 {
            0 => f32::from_bits(self.next() as u32),
            1 => [
                f32::NAN,
                f32::INFINITY,
                f32::MAX,
                f32::MIN_POSITIVE,
                -0.0,
                65_536.0,
                -65_536.0,
                1e-30,
            ][(self.next() % 8) as usize],
            2..6 => (self.next() % 131_072) as f32 - 65_536.0,
            _ => (self.next() % 8000) as f32 / 100.0 - 8.0,
        }
    }
}
