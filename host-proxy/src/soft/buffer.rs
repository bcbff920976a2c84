//! Buffer objects of the embedded GPU, and the memory they may take.
//!
//! A buffer lives as long as anyone refers to it: a handle of a file, a submission, an exported dma-buf. What is
//! mapped keeps its memory through the descriptor that [`Buffer::mapping`] gives.

use super::fence::{self, Fence, lock};
use super::memory::{Memory, PAGE};
use crate::cancel::Cancel;
use crate::driver::{HostObject, Mapping};
use crate::logging::guest_log;
use pvgpu_protocol::Errno;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Where the first buffer can be mapped: beyond all offsets of a 32-bit `mmap`, as DRM does it.
const FIRST_OFFSET: u64 = 1 << 32;

/// What all buffers of a device may take.
#[derive(Debug)]
pub(super) struct Account {
    /// Bytes that may be used.
    limit: u64,
    /// Buffers that may exist: each takes a file descriptor of this process.
    buffers_max: u64,
    used: AtomicU64,
    buffers: AtomicU64,
    next_offset: AtomicU64,
}

impl Account {
    pub(super) fn new(limit: u64, buffers_max: u64) -> Self {
        Self {
            limit,
            buffers_max,
            used: AtomicU64::new(0),
            buffers: AtomicU64::new(0),
            next_offset: AtomicU64::new(FIRST_OFFSET),
        }
    }

    /// Bytes of the device.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are free.
    pub(super) fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used.load(Ordering::Relaxed))
    }
}

/// Adds to a counter unless it would exceed the limit.
fn take(counter: &AtomicU64, amount: u64, limit: u64) -> Result<u64, Errno> {
    counter
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |value| {
            value.checked_add(amount).filter(|sum| *sum <= limit)
        })
        .map_err(|_| Errno::ENOMEM)
}

/// A part of the account, given back when it is dropped.
#[derive(Debug)]
struct Share {
    account: Arc<Account>,
    size: u64,
}

impl Share {
    fn take(account: &Arc<Account>, size: u64) -> Result<Self, Errno> {
        take(&account.buffers, 1, account.buffers_max)?;
        if let Err(error) = take(&account.used, size, account.limit) {
            account.buffers.fetch_sub(1, Ordering::Relaxed);
            return Err(error);
        }
        Ok(Self {
            account: account.clone(),
            size,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.size, Ordering::Relaxed);
        self.account.buffers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A buffer object.
pub(super) struct Buffer {
    memory: Memory,
    share: Share,
    /// Where the device file maps it; no other buffer of the device ever has the same.
    offset: u64,
    /// The last submission of each file that uses it, unless that is finished.
    fences: Mutex<Vec<Arc<Fence>>>,
}

impl Buffer {
    /// Makes a buffer of `size` bytes, rounded up to pages: `EINVAL` for none, `ENOMEM` when there is no room.
    pub(super) fn new(account: &Arc<Account>, size: u64) -> Result<Arc<Self>, Errno> {
        let size = match size.checked_next_multiple_of(PAGE) {
            Some(0) => return Err(Errno::EINVAL),
            Some(size) => size,
            None => return Err(Errno::ENOMEM),
        };
        let share = Share::take(account, size)?;
        let offset = take(&account.next_offset, size, i64::MAX as u64)?;
        let memory = Memory::new(size).map_err(|error| {
            guest_log!(debug, "no memory for a buffer of {size} bytes: {error}");
            Errno::ENOMEM
        })?;
        Ok(Arc::new(Self {
            memory,
            share,
            offset,
            fences: Mutex::default(),
        }))
    }

    /// Whether it belongs to the device with this account.
    pub(super) fn belongs_to(&self, account: &Arc<Account>) -> bool {
        Arc::ptr_eq(&self.share.account, account)
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.share.size
    }

    /// Where the device file maps it.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Its bytes.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What to map for its first `length` bytes: `EINVAL` for none, for more than it has, for parts of pages.
    pub(super) fn mapping(&self, length: u64) -> Result<Mapping, Errno> {
        if length == 0 || !length.is_multiple_of(PAGE) || length > self.size() {
            return Err(Errno::EINVAL);
        }
        match self.memory.descriptor() {
            Ok(fd) => Ok(Mapping { fd, offset: 0 }),
            Err(_) => Err(Errno::EMFILE),
        }
    }

    /// Adds a submission that uses it, in place of the one before it on the same timeline.
    pub(super) fn add_fence(&self, fence: &Arc<Fence>) {
        let mut fences = lock(&self.fences);
        fences.retain(|other| !other.is_signaled() && other.timeline() != fence.timeline());
        fences.push(fence.clone());
    }

    /// The last submission of each file that uses it, unless that is finished.
    pub(super) fn fences(&self) -> Vec<Arc<Fence>> {
        let mut fences = lock(&self.fences);
        fences.retain(|fence| !fence.is_signaled());
        fences.clone()
    }
}

/// A buffer given out as a file descriptor (dma-buf).
pub(super) struct DmaBuf(pub(super) Arc<Buffer>);

impl HostObject for DmaBuf {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.0.size())
    }

    fn mapping(&self, offset: u64, length: u64, _protection: u32) -> Result<Mapping, Errno> {
        match offset {
            0 => self.0.mapping(length),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Ready for reading and writing when no submission uses it.
    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        let ready = events & ((libc::POLLIN | libc::POLLOUT) as u32);
        let fences = match ready {
            0 => vec![Fence::pending(0, 0)],
            _ => self.0.fences(),
        };
        fence::poll(&fences, ready, timeout, cancel)
    }
}
