//! A host driver that records what reaches it, for tests of everything in front of a driver.
//!
//! It speaks the schemas of `virtio_gpu`, answers every ioctl with success, gives out handles and offsets, and waits where the
//! real driver would until it is cancelled. One that inspects ([`Recording::inspecting`]) never waits, and looks at every call
//! as the kernel behind a real node would ([`crate::inspection`]).

use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity, Mapping};
use pvgpu_protocol::schema::{Coherence, Kind};
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::inspection::{Seen, inspect};

/// What a read of any of its objects gives.
pub const TO_READ: &[u8] = b"an event of the host";
/// What the size of any of its objects is.
pub const SIZE: u64 = 12 << 12;

/// Where a buffer can be mapped: at its handle times this.
pub const STRIDE: u64 = 1 << 20;

/// The driver.
pub struct Recording {
    identity: Identity,
    record: Arc<Record>,
    memory: Arc<File>,
}

/// What has reached it.
#[derive(Default)]
pub struct Record {
    calls: Mutex<Vec<(u32, Vec<u8>)>>,
    open: AtomicUsize,
    /// Handles given out so far, all files together: 1, 2, ...
    handles: AtomicU32,
    /// Events that a poll of any object finds.
    ready: AtomicU32,
    /// What has been seen, if it inspects.
    inspected: Option<Mutex<Inspected>>,
}

/// What inspection has found.
#[derive(Clone, Debug, Default)]
pub struct Inspected {
    /// Host addresses of guest memory.
    pub guest: Vec<Range<usize>>,
    /// Every call.
    pub seen: Vec<Seen>,
    /// The first call that must never have come so far.
    pub violation: Option<String>,
}

impl Record {
    /// The command and the bytes of every ioctl so far.
    pub fn calls(&self) -> Vec<(u32, Vec<u8>)> {
        self.calls.lock().expect("no panic while recording").clone()
    }

    /// No call may point to these host addresses: there is memory of the guest.
    pub fn forbid(&self, guest: Range<usize>) {
        self.inspect(|inspected| inspected.guest.push(guest));
    }

    /// What inspection has found so far; nothing unless it inspects.
    pub fn inspected(&self) -> Inspected {
        self.inspect(|inspected| inspected.clone())
            .unwrap_or_default()
    }

    /// How many calls inspection has seen so far.
    pub fn seen(&self) -> usize {
        self.inspect(|inspected| inspected.seen.len())
            .unwrap_or_default()
    }

    fn inspect<T>(&self, change: impl FnOnce(&mut Inspected) -> T) -> Option<T> {
        let mut inspected = self
            .inspected
            .as_ref()?
            .lock()
            .expect("no panic while inspecting");
        Some(change(&mut inspected))
    }

    /// Looks at a call as the kernel would. `EIO` for one that must never have come so far.
    fn look_at(&self, call: &mut Call) -> Result<(), Errno> {
        let guest = self.inspect(|inspected| inspected.guest.clone());
        let given = self.handles.load(Ordering::SeqCst);
        let owned = |handle| (1..=given).contains(&handle);
        let seen = inspect(call, owned, &guest.unwrap_or_default());
        let result = seen.as_ref().map(drop).map_err(|_| Errno::EIO);
        self.inspect(|inspected| match seen {
            Ok(seen) => inspected.seen.push(seen),
            Err(violation) => drop(inspected.violation.get_or_insert(violation)),
        });
        result
    }

    /// From now on, a poll of any object finds these events, if it is for them.
    pub fn set_ready(&self, events: u32) {
        self.ready.store(events, Ordering::SeqCst);
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
            memory: Arc::new(memory().expect("a temporary file")),
        }
    }
}

/// What all mappings show; made here, since the threads that map may open no files.
fn memory() -> std::io::Result<File> {
    let file = tempfile::tempfile()?;
    file.set_len(1 << 40)?;
    Ok(file)
}

impl Recording {
    /// One that inspects every call, and never waits.
    pub fn inspecting() -> Self {
        Self {
            record: Arc::new(Record {
                inspected: Some(Mutex::default()),
                ..Record::default()
            }),
            ..Self::default()
        }
    }

    /// The memory of all objects: a mapping of any shows what lies here at its offset.
    pub fn memory(&self) -> Arc<File> {
        Arc::clone(&self.memory)
    }

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
        Ok(Arc::new(Object::new(&self.record, &self.memory)))
    }
}

struct Object(Arc<Record>, Arc<File>);

impl Object {
    fn new(record: &Arc<Record>, memory: &Arc<File>) -> Self {
        record.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(record), Arc::clone(memory))
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
        match self.0.inspected {
            Some(_) => self.0.look_at(call)?,
            None if call.may_block() => Self::wait(cancel, Duration::from_secs(60))?,
            None => {}
        }
        for field in call.ioctl().argument.fields {
            let (Kind::NewHandle(_), Some(bytes)) =
                (field.rules[0].kind, call.bytes_mut().get_mut(field.range()))
            else {
                continue;
            };
            let handle = self.0.handles.fetch_add(1, Ordering::SeqCst) + 1;
            bytes.copy_from_slice(&handle.to_le_bytes());
        }
        if let Coherence::Offset(field) = call.ioctl().coherence {
            let handles = call.ioctl().argument.fields.iter();
            let handles =
                handles.filter(|field| matches!(field.rules[0].kind, Kind::Handle { .. }));
            let handle: u64 = handles.map(|field| field.read(call.argument())).sum();
            let field = usize::from(field);
            if let Some(bytes) = call.bytes_mut().get_mut(field..field + 8) {
                bytes.copy_from_slice(&(handle * STRIDE).to_le_bytes());
            }
        }
        let out: Vec<_> = call.fds_out().collect();
        for field in out {
            call.put_object(field, Arc::new(Self::new(&self.0, &self.1)));
        }
        Ok(0)
    }

    fn mapping(&self, offset: u64, _length: u64, _protection: u32) -> Result<Mapping, Errno> {
        let file = self.1.try_clone().map_err(|_| Errno::EMFILE)?;
        Ok(Mapping {
            fd: OwnedFd::from(file),
            offset,
        })
    }

    fn read(&self, buffer: &mut [u8], _: &Cancel) -> Result<usize, Errno> {
        let length = buffer.len().min(TO_READ.len());
        buffer[..length].copy_from_slice(&TO_READ[..length]);
        Ok(length)
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(SIZE)
    }

    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        let ready = events & self.0.ready.load(Ordering::SeqCst);
        if ready != 0 {
            return Ok(ready);
        }
        Self::wait(cancel, timeout.unwrap_or(Duration::from_secs(60)))?;
        Ok(0)
    }
}
