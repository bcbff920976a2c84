//! The control socket's file: for its user alone, put where nobody serves one any more, removed in the end. A daemon's socket for
//! front ends is made likewise.

use std::fs::{self, Permissions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket that clients can connect to. Dropping it removes its file.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process serves it.
    #[error("another process serves {}: end that one or choose another path", .0.display())]
    Served(PathBuf),
    /// There is something else.
    #[error("{} exists and is no socket: remove it or choose another path", .0.display())]
    NoSocket(PathBuf),
    /// It cannot be made.
    #[error("cannot make the socket {}: {}; choose a path of at most 107 bytes in a directory that you can write to", .0.display(), .1)]
    Io(PathBuf, io::Error),
}

impl Socket {
    /// Makes the socket, in the place of one that nobody serves, with mode 0600.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let listener = listen(path)?;
        let path = path.to_owned();
        Ok(Self { path, listener })
    }

    /// For [`super::serve`].
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// The same for a process that may not remove the file in the end: it stays, and the next socket takes its place.
    pub fn into_listener(self) -> io::Result<UnixListener> {
        ManuallyDrop::new(self).listener()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// A socket at `path` for its user alone, in the place of one that nobody serves any more. Its file stays.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |error| BindError::Io(path.to_owned(), error);
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let file = fs::symlink_metadata(path).map_err(failed)?;
            if !file.file_type().is_socket() {
                return Err(BindError::NoSocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(failed(error)),
                Ok(_) => return Err(BindError::Served(path.to_owned())),
            }
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}
