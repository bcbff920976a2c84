//! Opens the node for threads that may open nothing: a thread of its own, started before any of them.
//!
//! All that it takes is the flags of an open; the path is the one that the VMM has named, and no guest's byte is ever in its
//! hands. Its filter lets it open files, but not create any.

use super::open;
use crate::sandbox::{Allowed, Filter, SandboxError, THREAD};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What the thread does beyond [`THREAD`].
pub static OPENER: &[Allowed] = &[Allowed::without(
    libc::SYS_openat,
    2,
    !(libc::O_ACCMODE | libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned(),
    "the node, for each file that a guest opens",
)];

/// The flags of an open and where the file goes.
type Request = (u32, Sender<io::Result<File>>);

/// The thread. It ends with this object.
#[derive(Debug)]
pub(super) struct Opener {
    /// `None` only while it is dropped.
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Opener {
    /// Starts the thread, for this node.
    pub(super) fn new(path: PathBuf, filter: &Filter) -> io::Result<Self> {
        let (requests, inbox): (_, Receiver<Request>) = channel();
        let serve = move || {
            while let Ok((flags, answer)) = inbox.recv() {
                // Fails when the one who asked is gone.
                let _ = answer.send(open(&path, flags));
            }
        };
        Ok(Self {
            requests: Some(requests),
            thread: Some(filter.spawn("pvgpu-opener".into(), serve)?),
        })
    }

    /// The filter of the thread.
    pub(super) fn filter() -> Result<Filter, SandboxError> {
        Filter::new(crate::sandbox::Sandbox::On, THREAD.iter().chain(OPENER))
    }

    /// Opens the node with these flags of [`pvgpu_protocol::wire::open`].
    pub(super) fn open(&self, flags: u32) -> io::Result<File> {
        let ended = || io::Error::from_raw_os_error(libc::EIO);
        let (answer, file) = channel();
        let requests = self.requests.as_ref().ok_or_else(ended)?;
        requests.send((flags, answer)).map_err(|_| ended())?;
        file.recv().map_err(|_| ended())?
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.requests = None;
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread that opens the GPU's node has panicked");
        }
    }
}
