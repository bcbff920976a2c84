//! The client's side of the control socket: one question, one answer.
//!
//! For `pvgpu-ctl` and for programs of others that watch a proxy.

use super::record::{self, Command, REPLY_LIMIT, Refusal, Reply, VERSION};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long a proxy may take: it serves others first.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// There is no such socket.
    #[error(
        "there is no {0}: start the proxy with its control socket there (mini-vmm run --control SOCKET)"
    )]
    Missing(String),
    /// The socket's proxy is gone.
    #[error("nobody serves {0} any more: its proxy has been killed")]
    Dead(String),
    /// It is somebody else's.
    #[error("{0} is not for this user: ask as the one that runs the proxy, or as root")]
    Forbidden(String),
    /// It has closed the connection instead.
    #[error("the proxy at {0} gives no answer: it has ended, or does not serve this user")]
    Closed(String),
    /// The socket cannot be used.
    #[error("cannot ask {0}: {1}")]
    Io(String, io::Error),
    /// It speaks another version.
    #[error(
        "{0} is served in version {1} of the control protocol, this program speaks {VERSION}: use the pvgpu-ctl of the proxy's version"
    )]
    Version(String, u8),
    /// It is no proxy.
    #[error(
        "what serves {0} is no proxy, or of another version: use the pvgpu-ctl of the proxy's version"
    )]
    Malformed(String),
    /// It does not do what it is asked to.
    #[error("{0}")]
    Refused(Refusal),
}

/// Asks the proxy at that socket; `file` is for [`Command::StartTrace`]. The reply is never a refusal.
pub fn ask(socket: &Path, command: &Command, file: Option<&File>) -> Result<Reply, AskError> {
    let name = || socket.display().to_string();
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => AskError::Missing(name()),
        io::ErrorKind::ConnectionRefused => AskError::Dead(name()),
        io::ErrorKind::PermissionDenied => AskError::Forbidden(name()),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => AskError::Closed(name()),
        io::ErrorKind::WouldBlock => AskError::Io(
            name(),
            io::Error::other(format!("no answer in {PATIENCE:?}")),
        ),
        _ => AskError::Io(name(), error),
    };
    let stream = UnixStream::connect(socket).map_err(failed)?;
    let timeout = Some(PATIENCE);
    stream.set_read_timeout(timeout).map_err(failed)?;
    stream.set_write_timeout(timeout).map_err(failed)?;
    let request = record::encode_request(command);
    let file = file.map(File::as_raw_fd);
    stream
        .send_with_fds(&[request.as_slice()], file.as_slice())
        .map_err(|error| failed(error.into()))?;
    let mut bytes = Vec::new();
    let most = u64::try_from(REPLY_LIMIT + 1).unwrap_or(u64::MAX);
    (&stream)
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match record::decode_reply(&bytes) {
        Ok(Reply::Refused(refusal)) => Err(AskError::Refused(refusal)),
        Ok(reply) => Ok(reply),
        Err(Some(version)) => Err(AskError::Version(name(), version)),
        Err(None) if bytes.is_empty() => Err(AskError::Closed(name())),
        Err(None) => Err(AskError::Malformed(name())),
    }
}
