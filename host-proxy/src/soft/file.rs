//! An open file of the embedded GPU: its handles and what each ioctl does.

use super::Guest;
use super::buffer::{Buffer, DmaBuf};
use super::command;
use super::engine::Job;
use super::fence::{self, Fence, SyncFile, lock};
use super::handle::Handles;
use super::syncobj::{Syncobj, SyncobjFile, Wait, wait_points};
use crate::call::Call;
use crate::cancel::Cancel;
use crate::driver::{HostObject, Mapping};
use pvgpu_protocol::Errno;
use pvgpu_protocol::at;
use pvgpu_protocol::family::core::{
    self as drm, PrimeFdToHandle, PrimeHandleToFd, SyncobjArray, SyncobjFdToHandle,
    SyncobjHandleToFd, SyncobjQuery, SyncobjTimelineSignal, SyncobjTimelineWait, SyncobjWait,
    Version,
};
use pvgpu_protocol::family::soft::{self, Submit};
use std::any::Any;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// An open file.
pub(super) struct File {
    guest: Arc<Guest>,
    /// Its queue, which is also its timeline.
    queue: u64,
    /// Whether reads wait.
    blocking: bool,
    buffers: Mutex<Handles<Buffer>>,
    syncobjs: Mutex<Handles<Syncobj>>,
}

impl Drop for File {
    fn drop(&mut self) {
        self.guest.scheduler.close(self.queue);
    }
}

impl HostObject for File {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        match call.ioctl().command {
            drm::VERSION => self.version(call),
            drm::GET_CAP => update(call, get_cap),
            // About mode setting only: the kernel refuses it on render nodes.
            drm::SET_CLIENT_CAP => Err(Errno::EACCES),
            drm::GEM_CLOSE => self.gem_close(call),
            drm::PRIME_HANDLE_TO_FD => self.prime_handle_to_fd(call),
            drm::PRIME_FD_TO_HANDLE => self.prime_fd_to_handle(call),
            drm::SYNCOBJ_CREATE => update(call, |create| self.syncobj_create(create)),
            drm::SYNCOBJ_DESTROY => self.syncobj_destroy(call),
            drm::SYNCOBJ_HANDLE_TO_FD => self.syncobj_handle_to_fd(call),
            drm::SYNCOBJ_FD_TO_HANDLE => self.syncobj_fd_to_handle(call),
            drm::SYNCOBJ_WAIT => self.syncobj_wait(call, cancel),
            drm::SYNCOBJ_RESET => self.syncobj_each(call, |syncobj| syncobj.set(None)),
            drm::SYNCOBJ_SIGNAL => {
                self.syncobj_each(call, |syncobj| syncobj.set(Some(Fence::signaled())))
            }
            drm::SYNCOBJ_TIMELINE_WAIT => self.syncobj_timeline_wait(call, cancel),
            drm::SYNCOBJ_QUERY => self.syncobj_query(call),
            drm::SYNCOBJ_TRANSFER => self.syncobj_transfer(call, cancel),
            drm::SYNCOBJ_TIMELINE_SIGNAL => self.syncobj_timeline_signal(call),
            drm::SYNCOBJ_EVENTFD => Err(Errno::EOPNOTSUPP),
            soft::DRM_IOCTL_SOFT_GETPARAM => update(call, |get| self.get_param(get)),
            soft::DRM_IOCTL_SOFT_GEM_CREATE => update(call, |create| self.gem_create(create)),
            soft::DRM_IOCTL_SOFT_GEM_MMAP => update(call, |mmap: &mut soft::GemMmap| {
                mmap.offset = self.buffer(mmap.handle)?.offset();
                Ok(())
            }),
            soft::DRM_IOCTL_SOFT_GEM_INFO => update(call, |info| self.gem_info(info)),
            soft::DRM_IOCTL_SOFT_SUBMIT => self.submit(call),
            soft::DRM_IOCTL_SOFT_WAIT => update(call, |wait| self.wait(wait, cancel)),
            soft::DRM_IOCTL_SOFT_GET_RESET_STATS => update(call, |stats| self.reset_stats(stats)),
            _ => Err(Errno::ENOTTY),
        }
    }

    fn mapping(&self, offset: u64, length: u64, _protection: u32) -> Result<Mapping, Errno> {
        let buffer = lock(&self.buffers).find(|buffer| buffer.offset() == offset);
        buffer.ok_or(Errno::EINVAL)?.mapping(length)
    }

    /// Nothing to read ever comes: there are no events.
    fn poll(&self, _: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        fence::poll(&[Fence::pending(0, 0)], 0, timeout, cancel)
    }

    fn read(&self, _: &mut [u8], cancel: &Cancel) -> Result<usize, Errno> {
        match self.blocking {
            true => self.poll(0, None, cancel).map(|_| 0),
            false => Err(Errno::EAGAIN),
        }
    }
}

/// Handles an ioctl that reads and writes nothing but its argument. The argument goes back even on error.
fn update<T: FromBytes + IntoBytes + Immutable>(
    call: &mut Call,
    operation: impl FnOnce(&mut T) -> Result<(), Errno>,
) -> Result<i32, Errno> {
    let mut argument = call.read_argument();
    let result = operation(&mut argument);
    call.write_argument(&argument);
    result.map(|()| 0)
}

fn get_cap(get: &mut drm::GetCap) -> Result<(), Errno> {
    get.value = match get.capability {
        drm::cap::PRIME => 3, // import and export
        drm::cap::TIMESTAMP_MONOTONIC | drm::cap::SYNCOBJ | drm::cap::SYNCOBJ_TIMELINE => 1,
        // As the kernel for a driver without mode setting.
        _ => return Err(Errno::EOPNOTSUPP),
    };
    Ok(())
}

/// The 32-bit numbers in an array.
fn words(array: &[u8]) -> impl Iterator<Item = u32> {
    let words = array.chunks_exact(4);
    words.map(|word| word.try_into().map_or(0, u32::from_le_bytes))
}

/// The 64-bit numbers in an array.
fn points(array: &[u8]) -> Vec<u64> {
    let points = array.chunks_exact(8);
    points
        .map(|point| point.try_into().map_or(0, u64::from_le_bytes))
        .collect()
}

/// The object behind a file descriptor field, if it is of that type.
fn object<T: 'static>(call: &Call, field: u16) -> Option<&T> {
    let object: &dyn Any = &**call.object(field)?;
    object.downcast_ref()
}

/// A deadline of `CLOCK_MONOTONIC`: what is negative is over.
fn deadline(nanoseconds: i64) -> u64 {
    u64::try_from(nanoseconds).unwrap_or(0)
}

impl File {
    pub(super) fn open(guest: &Arc<Guest>, blocking: bool) -> Self {
        Self {
            queue: guest.scheduler.open(),
            guest: guest.clone(),
            blocking,
            buffers: Mutex::default(),
            syncobjs: Mutex::default(),
        }
    }

    fn buffer(&self, handle: u32) -> Result<Arc<Buffer>, Errno> {
        lock(&self.buffers).get(handle).ok_or(Errno::ENOENT)
    }

    fn syncobj(&self, handle: u32) -> Result<Arc<Syncobj>, Errno> {
        lock(&self.syncobjs).get(handle).ok_or(Errno::ENOENT)
    }

    /// The strings are cut off at the room that there is; the lengths always come back whole.
    fn version(&self, call: &mut Call) -> Result<i32, Errno> {
        let identity = &self.guest.device.identity;
        let texts = [
            (at!(Version.name), &identity.name),
            (at!(Version.date), &identity.date),
            (at!(Version.desc), &identity.description),
        ];
        for (field, text) in texts {
            let room = call.array_mut(field).iter_mut();
            room.zip(text.bytes()).for_each(|(to, from)| *to = from);
        }
        let length = |text: &str| u64::try_from(text.len()).unwrap_or(0);
        update(call, |version: &mut Version| {
            let [major, minor, patchlevel] = identity.version;
            version.version_major = major;
            version.version_minor = minor;
            version.version_patchlevel = patchlevel;
            version.name_len = length(&identity.name);
            version.date_len = length(&identity.date);
            version.desc_len = length(&identity.description);
            Ok(())
        })
    }

    fn get_param(&self, get: &mut soft::GetParam) -> Result<(), Errno> {
        use soft::{feature, param};
        let account = &self.guest.device.account;
        get.value = match get.param {
            param::COMMAND_SET => soft::COMMAND_SET,
            param::FEATURES => {
                feature::FENCE_FD
                    | feature::SYNCOBJ
                    | feature::COPY_ENGINE
                    | feature::PATH
                    | feature::MATMUL
            }
            param::ENGINES => self.guest.device.config.engines.into(),
            param::MEMORY_SIZE => account.limit(),
            param::MEMORY_FREE => account.free(),
            param::COMMANDS_SIZE_MAX => soft::COMMANDS_SIZE_MAX.into(),
            param::BUFFERS_MAX => soft::BUFFERS_MAX.into(),
            param::SYNCS_MAX => soft::SYNCS_MAX.into(),
            param::DIMENSION_MAX => soft::DIMENSION_MAX.into(),
            param::MATRIX_MAX => soft::MATRIX_MAX.into(),
            param::WORK_MAX => soft::WORK_MAX,
            param::WATCHDOG_NS => {
                u64::try_from(self.guest.scheduler.watchdog().as_nanos()).unwrap_or(u64::MAX)
            }
            param::HANGS_MAX => soft::HANGS_MAX,
            param::QUEUE_MAX => soft::QUEUE_MAX.into(),
            _ => return Err(Errno::EINVAL),
        };
        Ok(())
    }

    fn gem_create(&self, create: &mut soft::GemCreate) -> Result<(), Errno> {
        let buffer = Buffer::new(&self.guest.device.account, create.size)?;
        create.handle = lock(&self.buffers).add(buffer)?;
        Ok(())
    }

    fn gem_info(&self, info: &mut soft::GemInfo) -> Result<(), Errno> {
        let buffer = self.buffer(info.handle)?;
        info.size = buffer.size();
        info.busy = u32::try_from(buffer.fences().len()).unwrap_or(u32::MAX);
        Ok(())
    }

    fn gem_close(&self, call: &Call) -> Result<i32, Errno> {
        let close: drm::GemClose = call.read_argument();
        let closed = lock(&self.buffers).remove(close.handle);
        closed.map(|_| 0).ok_or(Errno::EINVAL)
    }

    fn prime_handle_to_fd(&self, call: &mut Call) -> Result<i32, Errno> {
        let prime: PrimeHandleToFd = call.read_argument();
        let buffer = self.buffer(prime.handle)?;
        let field = at!(PrimeHandleToFd.fd);
        call.put_object(field.into(), Arc::new(DmaBuf(buffer)));
        Ok(0)
    }

    fn prime_fd_to_handle(&self, call: &mut Call) -> Result<i32, Errno> {
        let DmaBuf(buffer) = object(call, at!(PrimeFdToHandle.fd)).ok_or(Errno::EINVAL)?;
        if !buffer.belongs_to(&self.guest.device.account) {
            return Err(Errno::EINVAL);
        }
        let handle = lock(&self.buffers).find_or_add(buffer)?;
        update(call, |prime: &mut PrimeFdToHandle| {
            prime.handle = handle;
            Ok(())
        })
    }

    fn syncobj_create(&self, create: &mut drm::SyncobjCreate) -> Result<(), Errno> {
        let signaled = create.flags & drm::syncobj::CREATE_SIGNALED != 0;
        create.handle = lock(&self.syncobjs).add(Syncobj::new(signaled, &self.guest.points))?;
        Ok(())
    }

    fn syncobj_destroy(&self, call: &Call) -> Result<i32, Errno> {
        let destroy: drm::SyncobjDestroy = call.read_argument();
        let destroyed = lock(&self.syncobjs).remove(destroy.handle);
        destroyed.map(|_| 0).ok_or(Errno::EINVAL)
    }

    fn syncobj_handle_to_fd(&self, call: &mut Call) -> Result<i32, Errno> {
        let export: SyncobjHandleToFd = call.read_argument();
        let object: Arc<dyn HostObject> = if export.flags & drm::syncobj::EXPORT_SYNC_FILE != 0 {
            Arc::new(SyncFile(self.syncobj(export.handle)?.fence(0)?))
        } else {
            let syncobj = self.syncobj(export.handle).map_err(|_| Errno::EINVAL)?;
            Arc::new(SyncobjFile(syncobj))
        };
        call.put_object(at!(SyncobjHandleToFd.fd).into(), object);
        Ok(0)
    }

    fn syncobj_fd_to_handle(&self, call: &mut Call) -> Result<i32, Errno> {
        let import: SyncobjFdToHandle = call.read_argument();
        let field = at!(SyncobjFdToHandle.fd);
        if import.flags & drm::syncobj::IMPORT_SYNC_FILE != 0 {
            let SyncFile(fence) = object(call, field).ok_or(Errno::EINVAL)?;
            self.syncobj(import.handle)?.set(Some(fence.clone()));
            return Ok(0);
        }
        let SyncobjFile(syncobj) = object(call, field).ok_or(Errno::EINVAL)?;
        let handle = lock(&self.syncobjs).add(syncobj.clone())?;
        update(call, |import: &mut SyncobjFdToHandle| {
            import.handle = handle;
            Ok(())
        })
    }

    /// The syncobjs that an array of handles names.
    fn syncobjs(&self, handles: &[u8]) -> Result<Vec<Arc<Syncobj>>, Errno> {
        let syncobjs = lock(&self.syncobjs);
        words(handles)
            .map(|handle| syncobjs.get(handle).ok_or(Errno::ENOENT))
            .collect()
    }

    fn syncobj_each(&self, call: &Call, change: impl Fn(&Syncobj)) -> Result<i32, Errno> {
        let syncobjs = self.syncobjs(call.array(at!(SyncobjArray.handles)))?;
        if syncobjs.is_empty() {
            return Err(Errno::EINVAL);
        }
        syncobjs.iter().for_each(|syncobj| change(syncobj));
        Ok(0)
    }

    fn syncobj_wait(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let syncobjs = self.syncobjs(call.array(at!(SyncobjWait.handles)))?;
        let points: Vec<_> = syncobjs.into_iter().map(|syncobj| (syncobj, 0)).collect();
        update(call, |wait: &mut SyncobjWait| {
            let until = deadline(wait.timeout_nsec);
            wait.first_signaled = wait_syncobjs(&points, wait.flags, until, cancel)?;
            Ok(())
        })
    }

    fn syncobj_timeline_wait(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let syncobjs = self.syncobjs(call.array(at!(SyncobjTimelineWait.handles)))?;
        let numbers = points(call.array(at!(SyncobjTimelineWait.points)));
        let numbers = numbers.into_iter().chain(std::iter::repeat(0));
        let points: Vec<_> = syncobjs.into_iter().zip(numbers).collect();
        update(call, |wait: &mut SyncobjTimelineWait| {
            let until = deadline(wait.timeout_nsec);
            wait.first_signaled = wait_syncobjs(&points, wait.flags, until, cancel)?;
            Ok(())
        })
    }

    fn syncobj_query(&self, call: &mut Call) -> Result<i32, Errno> {
        let query: SyncobjQuery = call.read_argument();
        let syncobjs = self.syncobjs(call.array(at!(SyncobjQuery.handles)))?;
        if syncobjs.is_empty() {
            return Err(Errno::EINVAL);
        }
        let last_submitted = query.flags & drm::syncobj::QUERY_LAST_SUBMITTED != 0;
        let points = call.array_mut(at!(SyncobjQuery.points));
        for (syncobj, point) in syncobjs.iter().zip(points.chunks_exact_mut(8)) {
            point.copy_from_slice(&syncobj.query(last_submitted).to_le_bytes());
        }
        Ok(0)
    }

    fn syncobj_transfer(&self, call: &Call, cancel: &Cancel) -> Result<i32, Errno> {
        let transfer: drm::SyncobjTransfer = call.read_argument();
        let target = self.syncobj(transfer.dst_handle)?;
        let source = self.syncobj(transfer.src_handle)?;
        if transfer.flags & drm::syncobj::WAIT_FOR_SUBMIT != 0 {
            let what = Wait {
                all: true,
                for_submit: true,
                available: true,
            };
            // The kernel gives up after this time, too.
            let until = crate::clock::monotonic_ns().saturating_add(5_000_000_000);
            wait_points(&[(source.clone(), transfer.src_point)], what, until, cancel)?;
        }
        let fence = source.fence(transfer.src_point)?;
        target.check_room()?;
        target.attach(transfer.dst_point, fence);
        Ok(0)
    }

    fn syncobj_timeline_signal(&self, call: &Call) -> Result<i32, Errno> {
        let syncobjs = self.syncobjs(call.array(at!(SyncobjTimelineSignal.handles)))?;
        if syncobjs.is_empty() {
            return Err(Errno::EINVAL);
        }
        let numbers = points(call.array(at!(SyncobjTimelineSignal.points)));
        let numbers = numbers.into_iter().chain(std::iter::repeat(0));
        syncobjs
            .iter()
            .try_for_each(|syncobj| syncobj.check_room())?;
        for (syncobj, point) in syncobjs.iter().zip(numbers) {
            syncobj.attach(point, Fence::signaled());
        }
        Ok(0)
    }

    /// The syncobjs and points of a list of a submission.
    fn syncs(&self, array: &[u8]) -> Result<Vec<(Arc<Syncobj>, u64)>, Errno> {
        array
            .chunks_exact(size_of::<soft::Sync>())
            .map(|bytes| {
                let sync = soft::Sync::read_from_bytes(bytes).map_err(|_| Errno::EINVAL)?;
                Ok((self.syncobj(sync.handle)?, sync.point))
            })
            .collect()
    }

    fn submit(&self, call: &mut Call) -> Result<i32, Errno> {
        let mut submit: Submit = call.read_argument();
        let buffers = words(call.array(at!(Submit.buffers)))
            .map(|handle| self.buffer(handle))
            .collect::<Result<Vec<_>, _>>()?;
        let mut waits = Vec::new();
        for (syncobj, point) in self.syncs(call.array(at!(Submit.in_syncs)))? {
            waits.push(syncobj.fence(point)?);
        }
        if submit.flags & soft::SUBMIT_FENCE_FD_IN != 0 {
            let SyncFile(fence) = object(call, at!(Submit.fence_fd)).ok_or(Errno::EINVAL)?;
            waits.push(fence.clone());
        }
        let signals = self.syncs(call.array(at!(Submit.out_syncs)))?;
        signals
            .iter()
            .try_for_each(|(syncobj, _)| syncobj.check_room())?;
        let stream = call.array(at!(Submit.commands));
        let job = Job {
            commands: command::parse(stream, &buffers)?,
            length: stream.len(),
            buffers,
            waits,
        };
        let (seqno, fence) = self.guest.scheduler.submit(self.queue, job)?;
        for (syncobj, point) in signals {
            syncobj.attach(point, fence.clone());
        }
        submit.seqno = seqno;
        call.write_argument(&submit);
        if submit.flags & soft::SUBMIT_FENCE_FD_OUT != 0 {
            call.put_object(at!(Submit.fence_fd).into(), Arc::new(SyncFile(fence)));
        }
        Ok(0)
    }

    fn wait(&self, wait: &mut soft::Wait, cancel: &Cancel) -> Result<(), Errno> {
        let fences = match wait.flags & soft::WAIT_BUFFER {
            0 => vec![self.guest.scheduler.fence(self.queue, wait.seqno)?],
            _ => self.buffer(wait.handle)?.fences(),
        };
        let status = fence::wait_all(&fences, Some(deadline(wait.deadline_ns)), cancel)?;
        wait.error = status.err().map_or(0, |error| -error.number());
        Ok(())
    }

    fn reset_stats(&self, stats: &mut soft::GetResetStats) -> Result<(), Errno> {
        let faults = self.guest.scheduler.faults(self.queue);
        stats.banned = (faults.hangs >= soft::HANGS_MAX).into();
        stats.resets = faults.resets;
        stats.hangs = faults.hangs;
        stats.faults = faults.faults;
        Ok(())
    }
}

fn wait_syncobjs(
    points: &[(Arc<Syncobj>, u64)],
    flags: u32,
    deadline: u64,
    cancel: &Cancel,
) -> Result<u32, Errno> {
    if points.is_empty() {
        return Ok(0);
    }
    let what = Wait {
        all: flags & drm::syncobj::WAIT_ALL != 0,
        for_submit: flags & drm::syncobj::WAIT_FOR_SUBMIT != 0,
        available: flags & drm::syncobj::WAIT_AVAILABLE != 0,
    };
    wait_points(points, what, deadline, cancel)
}
