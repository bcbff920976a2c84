//! Where front ends come from: a socket in the file system, one that systemd has made, or a connection that is there already.
//!
//! `pvgpu-proxyd` makes it before it enters the sandbox. Sockets are for their user alone (mode 0600).

use crate::control::BindError;
use crate::control::socket::listen;
use crate::descriptors::inherited;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// The first descriptor of those that systemd hands over.
const FIRST: i32 = 3;

/// Where front ends come from.
#[derive(Debug)]
pub enum Source {
    /// One after the other.
    Listener(UnixListener),
    /// This one.
    Connection(UnixStream),
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The socket cannot be made.
    #[error("{0} (--socket PATH)")]
    Socket(#[from] BindError),
    /// Nothing was handed over.
    #[error(
        "{descriptor} is no descriptor of a Unix stream socket ({error}): give a --fd N that was left open for this program"
    )]
    Descriptor {
        /// Its number.
        descriptor: i32,
        /// The kernel's answer.
        error: io::Error,
    },
    /// systemd handed over more or fewer than one.
    #[error(
        "systemd has handed {0} sockets over, but one is needed: put one ListenStream= into the socket unit"
    )]
    Sockets(String),
}

impl Source {
    /// Listens on a socket at `path`; in the place of one that nobody serves any more.
    pub fn listen(path: &Path) -> Result<Self, SourceError> {
        Ok(Self::Listener(listen(path)?))
    }

    /// The connection with this number.
    pub fn connection(descriptor: i32) -> Result<Self, SourceError> {
        let inherited = inherited(descriptor)
            .map(UnixStream::from)
            .and_then(|stream| stream.peer_addr().map(|_| stream));
        let stream = inherited.map_err(|error| SourceError::Descriptor { descriptor, error })?;
        Ok(Self::Connection(stream))
    }

    /// The socket that systemd has handed over (`LISTEN_FDS`, sd_listen_fds(3)), if it has.
    pub fn activated() -> Result<Option<Self>, SourceError> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        if variable("LISTEN_PID") != std::process::id().to_string() {
            return Ok(None);
        }
        let count = variable("LISTEN_FDS");
        if count != "1" {
            return Err(SourceError::Sockets(count));
        }
        let inherited = inherited(FIRST)
            .map(UnixListener::from)
            .and_then(|listener| listener.local_addr().map(|_| listener));
        let listener = inherited.map_err(|error| SourceError::Descriptor {
            descriptor: FIRST,
            error,
        })?;
        Ok(Some(Self::Listener(listener)))
    }
}
