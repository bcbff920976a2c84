//! The control socket: shows an operator a running device, and switches its trace, for users of this machine that could do
//! the same to the process itself: its own user and root.
//!
//! A VMM or a daemon binds a [`Socket`] (or has a listener from elsewhere) and calls [`serve`] with the device's [`Monitor`];
//! `pvgpu-ctl` asks through [`ask`]. One thread serves one client at a time: a client sends one short record ([`Command`]),
//! with the descriptor of a file if it is for a trace, gets one back ([`Reply`]) and is closed. Whoever does not keep to that, or
//! takes longer than [`PATIENCE`], is closed without. The thread has a filter of its own and nothing that a device waits for.

mod client;
mod peer;
mod record;
pub(crate) mod socket;

use crate::logging::guest_log;
use crate::monitor::Monitor;
use crate::sandbox::{Allowed, Filter, Sandbox, THREAD};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

pub use client::{AskError, ask};
pub use record::{Command, Refusal, Reply, VERSION};
pub use socket::{BindError, Socket};

/// How long a client may take to send its request, and to take its answer; others wait meanwhile.
pub const PATIENCE: Duration = Duration::from_millis(200);

const CLIENTS: &str = "waits for clients, and takes one";

/// What the thread does beside what all do: it takes connections, messages and descriptors, but makes none.
pub static SYSTEM_CALLS: &[Allowed] = &[
    Allowed::any(libc::SYS_epoll_wait, CLIENTS),
    Allowed::any(libc::SYS_epoll_pwait, CLIENTS),
    Allowed::any(libc::SYS_accept4, CLIENTS),
    Allowed::equal(
        libc::SYS_getsockopt,
        2,
        libc::SO_PEERCRED.cast_unsigned(),
        "who the client is",
    ),
    Allowed::equal(
        libc::SYS_setsockopt,
        2,
        libc::SO_RCVTIMEO.cast_unsigned(),
        "how long it may take",
    ),
    Allowed::equal(
        libc::SYS_setsockopt,
        2,
        libc::SO_SNDTIMEO.cast_unsigned(),
        "how long it may take",
    ),
    Allowed::any(libc::SYS_recvmsg, "its request, and the file of a trace"),
    Allowed::any(libc::SYS_sendto, "its answer"),
    Allowed::equal(
        libc::SYS_statx,
        2,
        libc::AT_EMPTY_PATH.cast_unsigned(),
        "whether the file of a trace is one",
    ),
];

/// A control socket that is served. Dropping it ends that; the socket's file is [`Socket`]'s.
pub struct Server {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// Serves `listener` on a thread of its own, in the sandbox if that is on, until the result is dropped.
pub fn serve(listener: UnixListener, monitor: Monitor, sandbox: Sandbox) -> io::Result<Server> {
    let filter = Filter::new(sandbox, THREAD.iter().chain(SYSTEM_CALLS))?;
    let stop = EventFd::new(0)?;
    let epoll = Epoll::new()?;
    for (token, descriptor) in [(STOP, stop.as_raw_fd()), (CLIENT, listener.as_raw_fd())] {
        let event = EpollEvent::new(EventSet::IN, token);
        epoll.ctl(ControlOperation::Add, descriptor, event)?;
    }
    // Another process may share a listener that it has passed on, and take a client away from under `accept`.
    listener.set_nonblocking(true)?;
    let desk = Desk {
        listener,
        monitor,
        owner: peer::own_user(),
    };
    let thread = filter.spawn("pvgpu-control".into(), move || desk.serve(&epoll))?;
    Ok(Server {
        stop,
        thread: Some(thread),
    })
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails only when the counter is full, and then the thread has been told.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the control socket's thread has panicked");
        }
    }
}

/// What the events of the thread are about.
const STOP: u64 = 0;
const CLIENT: u64 = 1;

/// What the thread has.
struct Desk {
    listener: UnixListener,
    monitor: Monitor,
    /// Whose process this is.
    owner: u32,
}

impl Desk {
    fn serve(&self, epoll: &Epoll) {
        loop {
            let mut events = [EpollEvent::default(); 2];
            // Interrupted by a signal, it finds none.
            let found = epoll.wait(-1, &mut events).unwrap_or(0);
            let mut found = events.iter().take(found).map(EpollEvent::data);
            if found.clone().any(|token| token == STOP) {
                return;
            }
            if found.all(|token| token != CLIENT) {
                continue;
            }
            match self.listener.accept() {
                Ok((client, _)) => {
                    // A client that does not wait for its answer is its own business.
                    let _ = self.attend(&client);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    guest_log!(warn, "the control socket takes no clients: {error}");
                    // It may be a lack of descriptors, which does not pass at once.
                    thread::sleep(PATIENCE);
                }
            }
        }
    }

    /// One client, from its request to the answer.
    fn attend(&self, mut client: &UnixStream) -> io::Result<()> {
        let user = peer::user(client)?;
        if user != self.owner && user != 0 {
            guest_log!(warn, "the control socket does not serve user {user}");
            return Ok(());
        }
        client.set_read_timeout(Some(PATIENCE))?;
        client.set_write_timeout(Some(PATIENCE))?;
        // A whole request is one message; there is room for a byte too much, which makes it none.
        let mut request = [0; record::REQUEST_LIMIT + 1];
        let (length, file) = peer::receive(client, &mut request)?;
        let request = request.get(..length).unwrap_or_default();
        let reply = match record::decode_request(request) {
            Ok(command) => self.perform(&command, file),
            Err(refusal) => Reply::Refused(refusal),
        };
        client.write_all(&record::encode_reply(&reply))
    }

    fn perform(&self, command: &Command, file: Option<File>) -> Reply {
        let done = match command {
            Command::Status => return Reply::Status(Box::new(self.monitor.statistics())),
            Command::StartTrace { limit } => self.start_trace(file, *limit),
            Command::StopTrace => match self.monitor.stop_trace() {
                Ok(true) => Ok(()),
                Ok(false) => Err(Refusal::NoTrace),
                Err(error) => {
                    log::warn!("the end of the trace is missing: {error}");
                    Err(Refusal::TraceCut)
                }
            },
        };
        done.map_or_else(Reply::Refused, |()| Reply::Done)
    }

    /// Records in `file`, if the device's threads can write to it and never wait for whoever has sent it.
    fn start_trace(&self, file: Option<File>, limit: u64) -> Result<(), Refusal> {
        let mut file = file.ok_or(Refusal::NoFile)?;
        let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
        if !regular {
            return Err(Refusal::NotRegular);
        }
        // Nothing is written, but only what can be written to takes that.
        file.write(&[]).map_err(|_| Refusal::NotWritable)?;
        let started = self.monitor.start_trace(file, limit);
        started.map_err(|_| Refusal::Busy)
    }
}

#[cfg(test)]
mod tests;
