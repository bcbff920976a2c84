//! A host driver that judges every call by its schema, and answers at once with whatever a driver may answer.
//!
//! For targets in front of a driver. It speaks the schemas of any driver, and panics when a call reaches it that the schema
//! does not allow or that is not what the guest has sent. Its answers come from a seed; it never waits.

use pvgpu_e2e::conformance::{differences, structs, violations};
use pvgpu_host_proxy::Errno;
use pvgpu_host_proxy::call::Call;
use pvgpu_host_proxy::cancel::Cancel;
use pvgpu_host_proxy::driver::{HostDriver, HostObject, Identity};
use pvgpu_protocol::schema::{Element, Kind, Space};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The drivers whose schemas it can speak.
pub const DRIVERS: [&str; 3] = ["soft", "vgem", "virtio_gpu"];

/// The driver.
pub struct Answering {
    identity: Identity,
    answers: Arc<Answers>,
}

/// What it was asked, and what it will answer.
#[derive(Default)]
pub struct Answers(Mutex<State>);

#[derive(Default)]
struct State {
    /// Where its answers come from.
    seed: u64,
    /// The session's limit on messages.
    limit: usize,
    /// The payload that the next call must come from, if the target knows it.
    payload: Option<Vec<u8>>,
    answered: Option<Answered>,
}

/// A call that was performed.
pub struct Answered {
    /// Its bytes as they came.
    pub before: Vec<u8>,
    /// Its bytes as they went.
    pub after: Vec<u8>,
    /// Bytes of its argument.
    pub argument: usize,
    /// Its arrays: where their pointer field lies, where they lie, whether they come in and out, and their elements.
    pub arrays: Vec<(usize, Range<usize>, bool, bool, Element)>,
}

impl Answering {
    /// A driver of that name, with the session's limit on messages.
    pub fn new(name: &str, seed: u64, limit: u32) -> Self {
        let answers = Answers::default();
        answers.state().seed = seed | 1;
        answers.state().limit = usize::try_from(limit).expect("64 bits");
        Self {
            identity: Identity {
                name: name.into(),
                version: [0, 1, 0],
                date: "0".into(),
                description: "answering".into(),
            },
            answers: Arc::new(answers),
        }
    }

    /// What it was asked.
    pub fn answers(&self) -> Arc<Answers> {
        Arc::clone(&self.answers)
    }
}

impl Answers {
    /// The next call must have come from this payload.
    pub fn expect(&self, payload: &[u8]) {
        self.state().payload = Some(payload.to_vec());
    }

    /// The last call since this was asked.
    pub fn take(&self) -> Option<Answered> {
        self.state().answered.take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("a finding ends the process")
    }
}

impl State {
    /// The next number of a sequence in which neighbours have nothing in common (xorshift).
    fn next(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    fn scribble(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            piece.copy_from_slice(&random[..piece.len()]);
        }
    }
}

impl HostDriver for Answering {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn open(&self, flags: u32) -> Result<Arc<dyn HostObject>, Errno> {
        assert_eq!(flags & !0o4002, 0, "flags that no guest may use");
        Ok(Arc::new(File {
            answers: self.answers(),
            handles: Mutex::default(),
        }))
    }
}

/// An open file, or an object that it has given out.
struct File {
    answers: Arc<Answers>,
    handles: Mutex<HashSet<(Space, u32)>>,
}

impl HostObject for File {
    fn ioctl(&self, call: &mut Call, _: &Cancel) -> Result<i32, Errno> {
        let mut state = self.answers.state();
        let mut handles = self.handles.lock().expect("a finding ends the process");
        let mut faults = violations(call, state.limit, &|space, handle| {
            handles.contains(&(space, handle))
        });
        if let Some(payload) = state.payload.take() {
            faults.extend(differences(call, &payload));
        }
        assert!(faults.is_empty(), "{}", faults.join("\n"));

        let before = call.bytes_mut().to_vec();
        let arrays: Vec<_> = call
            .arrays()
            .map(|(array, range)| {
                let pointer = array.pointer;
                let (goes_in, comes_out) = (pointer.direction.is_in(), pointer.direction.is_out());
                (array.field, range, goes_in, comes_out, pointer.element)
            })
            .collect();
        let succeeds = !state.next().is_multiple_of(8);
        for (structure, range) in structs(call) {
            let sent = before.get(range.clone()).unwrap_or_default();
            for field in structure.fields {
                let place = range.start + usize::from(field.offset);
                let place = place..place + usize::from(field.size);
                if field.range().end > sent.len() {
                    continue;
                }
                let bytes = &mut call.bytes_mut()[place];
                let handle = u32::try_from(field.read(sent));
                match *field.kind(structure, sent) {
                    Kind::Output => state.scribble(bytes),
                    Kind::NewHandle(space) if succeeds => {
                        // Sometimes one that the file has already, as an import may.
                        let handle = 1 + u32::try_from(state.next() % 16).expect("below 16");
                        bytes.copy_from_slice(&handle.to_le_bytes());
                        handles.insert((space, handle));
                    }
                    Kind::ClosedHandle { space, .. } if succeeds => {
                        handles.remove(&(space, handle.expect("32 bits")));
                    }
                    _ => {}
                }
            }
        }
        for (_, range, _, comes_out, element) in &arrays {
            if *comes_out && !matches!(element, Element::Struct(_)) {
                state.scribble(&mut call.bytes_mut()[range.clone()]);
            }
        }
        let out: Vec<_> = call.fds_out().collect();
        for field in out {
            if succeeds && !state.next().is_multiple_of(4) {
                let object = Self {
                    answers: Arc::clone(&self.answers),
                    handles: Mutex::default(),
                };
                call.put_object(field, Arc::new(object));
            }
        }
        state.answered = Some(Answered {
            before,
            after: call.bytes_mut().to_vec(),
            argument: call.argument().len(),
            arrays,
        });
        match succeeds {
            true => Ok(0),
            false => Err(Errno::ENOSPC),
        }
    }

    /// Bit 0 is there at once, bit 2 as soon as somebody waits for it.
    fn poll(&self, events: u32, timeout: Option<Duration>, cancel: &Cancel) -> Result<u32, Errno> {
        match timeout {
            _ if cancel.is_cancelled() => Err(Errno::EINTR),
            Some(Duration::ZERO) => Ok(events & 1),
            _ => Ok(events & 5),
        }
    }

    fn read(&self, buffer: &mut [u8], _: &Cancel) -> Result<usize, Errno> {
        let length = buffer.len().min(32);
        self.answers.state().scribble(&mut buffer[..length]);
        Ok(length)
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(4096)
    }
}
