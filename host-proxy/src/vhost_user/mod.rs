//! The device for a VMM in another process: a vhost-user back end.
//!
//! `pvgpu-proxyd` serves one front end after the other with a [`BackEnd`]. Messages are read and checked by the crate `vhost`;
//! what they mean for the device is in `handler`, how buffer objects get into the front end's guest in `shmem`, where front ends come
//! from in [`listener`]. A front end is trusted no more than its guest: what is malformed ends its connection, and nothing else.

mod handler;
pub mod listener;
mod shmem;

pub use handler::BackEnd;

use crate::sandbox::Allowed;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Marks the connection's events; the doorbell of the event queue has the other.
const CONNECTION: u64 = 0;

const MESSAGES: &str = "messages of the front end";

/// What the thread that serves front ends does on top of [`crate::device::Device::system_calls`].
pub static FRONT_END: &[Allowed] = &[
    Allowed::any(libc::SYS_accept4, "the next front end"),
    Allowed::any(libc::SYS_recvmsg, MESSAGES),
    Allowed::any(libc::SYS_sendmsg, MESSAGES),
    Allowed::any(libc::SYS_epoll_create1, MESSAGES),
    Allowed::any(libc::SYS_epoll_ctl, MESSAGES),
    Allowed::any(
        libc::SYS_getsockopt,
        "whether its other channel is a socket",
    ),
    Allowed::any(libc::SYS_lseek, "how long its guest's memory is"),
    Allowed::equal(
        libc::SYS_ioctl,
        1,
        FIONBIO,
        "interrupts must not wait for it",
    ),
];

#[allow(clippy::cast_possible_truncation)] // it has 16 bits
const FIONBIO: u32 = libc::FIONBIO as u32;

/// Why a front end was disconnected that has not gone by itself.
#[derive(Debug, thiserror::Error)]
pub enum Disconnected {
    /// It sent what makes no sense.
    #[error("the front end has sent what no front end may ({0}), and was disconnected")]
    Malformed(Error),
    /// It cannot be waited for.
    #[error("cannot wait for messages: {0}")]
    Wait(#[from] io::Error),
}

/// Serves a front end until it goes. Its guest's session has ended, and its memory is no longer mapped, when this returns.
pub fn serve(connection: UnixStream, back_end: &Arc<Mutex<BackEnd>>) -> Result<(), Disconnected> {
    let result = handle_messages(connection, back_end);
    lock(back_end).disconnect();
    result
}

fn lock(back_end: &Mutex<BackEnd>) -> std::sync::MutexGuard<'_, BackEnd> {
    back_end.lock().unwrap_or_else(PoisonError::into_inner)
}

fn handle_messages(
    connection: UnixStream,
    back_end: &Arc<Mutex<BackEnd>>,
) -> Result<(), Disconnected> {
    let epoll = Arc::new(Epoll::new()?);
    let event = EpollEvent::new(EventSet::IN, CONNECTION);
    epoll.ctl(ControlOperation::Add, connection.as_raw_fd(), event)?;
    lock(back_end).connect(Arc::clone(&epoll));
    let mut messages = BackendReqHandler::from_stream(connection, Arc::clone(back_end));
    loop {
        let mut events = [EpollEvent::default(); 2];
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        for event in events.iter().take(count) {
            if event.data() != CONNECTION {
                lock(back_end).event_queue_notified();
                continue;
            }
            match messages.handle_request() {
                Ok(()) => {}
                Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => {
                    return Ok(());
                }
                Err(error) => return Err(Disconnected::Malformed(error)),
            }
        }
    }
}
