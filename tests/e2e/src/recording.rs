//! A host driver that records what reaches it, for tests of everything in front of a driver.
//!
//! It speaks the schemas of `virtio_gpu`, answers every ioctl with success, gives out handles, and waits where the
//! real driver would until it is cancelled.

use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity, Mapping};
use pvgpu_protocol::family::{core, virtio_gpu};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The driver.
pub struct Recording {
    identity: Identity,
    record: Arc<Record>,
}

/// What has reached it.
#[derive(Default)]
pub struct Record {
    calls: Mutex<Vec<(u32, Vec<u8>)>>,
    open: AtomicUsize,
    next_handle: AtomicU32,
}

impl Record {
    /// The command and the bytes of every ioctl so far.
    pub fn calls(&self) -> Vec<(u32, Vec<u8>)> {
        self.calls.lock().expect("no panic while recording").clone()
    }

    /// How many files and other objects are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Default for Recording {
    fn default() -> Self {
        Self {
            identity: Identity {
                name: "virtio_gpu".into(),
                version: [0, 1, 0],
                date: "0".into(),
                description: "recording".into(),
            },
            record: Arc::default(),
        }
    }
}

impl Recording {
    /// What will have reached it.
    pub fn record(&self) -> Arc<Record> {
        Arc::clone(&self.record)
    }
}

impl HostDriver for Recording {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, _flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        Ok(Arc::new(Object::new(Arc::clone(&self.record))))
    }
}

struct Object(Arc<Record>);

impl Object {
    fn new(record: Arc<Record>) -> Self {
        record.open.fetch_add(1, Ordering::SeqCst);
        Self(record)
    }

    fn wait(cancel: &Cancel, timeout: Duration) -> Result<(), Errno> {
        let (wake, woken) = channel();
        let wake = Arc::new(move || wake.send(()).unwrap_or(()));
        match cancel.interruptible(wake, || woken.recv_timeout(timeout))? {
            Ok(()) => Err(Errno::EINTR),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl HostObject for Object {
    fn ioctl(&self, call: &mut Call, cancel: &Cancel) -> Result<i32, Errno> {
        let bytes = call.bytes_mut().to_vec();
        let mut calls = self.0.calls.lock().expect("no panic while recording");
        calls.push((call.command(), bytes));
        drop(calls);
        if call.may_block() {
            Self::wait(cancel, Duration::from_secs(60))?;
        }
        if call.command() == virtio_gpu::RESOURCE_CREATE {
            let mut argument: virtio_gpu::ResourceCreate = call.read_argument();
            argument.bo_handle = self.0.next_handle.fetch_add(1, Ordering::SeqCst) + 1;
            call.write_argument(&argument);
        }
        if call.command() == core::PRIME_FD_TO_HANDLE {
            let mut argument: core::PrimeFdToHandle = call.read_argument();
            argument.handle = self.0.next_handle.fetch_add(1, Ordering::SeqCst) + 1;
            call.write_argument(&argument);
        }
        let out: Vec<_> = call.fds_out().collect();
        for field in out {
            call.put_object(field, Arc::new(Self::new(Arc::clone(&self.0))));
        }
        Ok(0)
    }

    fn mapping(&self, offset: u64, length: u64, _protection: u32) -> Result<Mapping, Errno> {
        let file = tempfile::tempfile().map_err(|_| Errno::ENOMEM)?;
        file.set_len(offset + length).map_err(|_| Errno::ENOMEM)?;
        Ok(Mapping {
            fd: OwnedFd::from(file),
            offset,
        })
    }

    fn poll(&self, _: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        Self::wait(cancel, timeout.unwrap_or(Duration::from_secs(60)))?;
        Ok(0)
    }
}
