//! Who is at the other end of a local socket, as the kernel knows it, and the descriptors that come from there.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The user that this process acts for.
pub(super) fn own_user() -> u32 {
    // SAFETY: touches no memory and cannot fail.
    unsafe { libc::geteuid() }
}

/// The user that the client's process acted for when it connected.
pub(super) fn user(client: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = libc::socklen_t::try_from(size_of_val(&peer)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to `peer`, which has so many and takes any.
    let result = unsafe {
        libc::getsockopt(
            client.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(peer.uid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One message and the file that came with it, if any. An error if there were several, none of which is kept.
pub(super) fn receive(
    client: &UnixStream,
    message: &mut [u8],
) -> io::Result<(usize, Option<File>)> {
    // The kernel has room for two wherever there is room for one, and gives as many; `recv_with_fd` would forget the second.
    let mut descriptors = [-1; 2];
    let mut parts = [libc::iovec {
        iov_base: message.as_mut_ptr().cast(),
        iov_len: message.len(),
    }];
    // SAFETY: the only part is `message`, which is borrowed until then and takes any bytes.
    let (length, count) = unsafe { client.recv_with_fds(&mut parts, &mut descriptors)? };
    let descriptors = descriptors.into_iter().take(count);
    // SAFETY: these are new, and nobody else knows them.
    let mut files = descriptors.map(|descriptor| unsafe { File::from_raw_fd(descriptor) });
    match (files.next(), files.next()) {
        (Some(_), Some(_)) => Err(io::ErrorKind::InvalidData.into()),
        (file, _) => Ok((length, file)),
    }
}
