//! A vhost-user front end that outlives its back end and says nothing of it to the guest, as Cloud Hypervisor does: for tests of
//! a guest that has to notice by itself.
//!
//! It stands between a real front end and the back ends that listen at one socket, one after the other. It passes messages on;
//! when the back end is gone, it waits for the next one, repeats what has set the device up, and gives each ring as its base
//! the available index: requests in flight, and buffers for events, are lost.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Messages of the vhost-user protocol.
mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const RESET_DEVICE: u32 = 34;
    /// Those that have an answer of their own: features, ring base, protocol features, queue number, configuration, status,
    /// shared memory.
    pub const ANSWERED: [u32; 8] = [
        GET_FEATURES,
        GET_VRING_BASE,
        GET_PROTOCOL_FEATURES,
        17,
        24,
        36,
        40,
        44,
    ];
}

/// What sets a device up, in the order in which a back end wants it: first the device, then each ring.
const DEVICE: [u32; 7] = [
    request::SET_OWNER,
    request::GET_FEATURES,
    request::GET_PROTOCOL_FEATURES,
    request::SET_PROTOCOL_FEATURES,
    request::SET_FEATURES,
    request::SET_BACKEND_REQ_FD,
    request::SET_MEM_TABLE,
];
const RING: [u32; 7] = [
    request::SET_VRING_NUM,
    request::SET_VRING_ADDR,
    request::SET_VRING_BASE,
    request::SET_VRING_CALL,
    request::SET_VRING_ERR,
    request::SET_VRING_KICK,
    request::SET_VRING_ENABLE,
];
/// In a message's flags: it wants an answer.
const NEED_REPLY: u32 = 1 << 3;
/// Most bytes of a message: more than any has.
const MESSAGE: usize = 64 << 10;
/// How often it looks whether the back end is still there, and whether there is another one.
const POLL: Duration = Duration::from_millis(5);
/// How long the front end is silent when it has answered all that it was asked.
const QUIET: Duration = Duration::from_millis(50);
/// How long it waits for another one.
const PATIENCE: Duration = Duration::from_secs(60);

/// The front end. It goes when the real one does.
pub struct SilentFrontEnd {
    restarts: Arc<AtomicU32>,
}

impl SilentFrontEnd {
    /// Listens at `socket` for one front end, for the back ends that listen at `back_end`.
    pub fn start(socket: &Path, back_end: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let restarts = Arc::new(AtomicU32::new(0));
        let (counter, back_end) = (Arc::clone(&restarts), back_end.to_owned());
        thread::spawn(move || {
            // It ends when either side has gone for good, or breaks the protocol: then the guest's test fails.
            let Ok((front, _)) = listener.accept() else {
                return;
            };
            let relay = Relay::new(front, back_end, counter).and_then(|mut relay| relay.run());
            if let Err(error) = relay {
                eprintln!("silent front end: {error}");
            }
        });
        Ok(Self { restarts })
    }

    /// How often it has gone over to another back end.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::SeqCst)
    }
}

struct Message {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    file: Option<File>,
}

impl Message {
    /// Receives one; `None` at the end of the stream, `WouldBlock` when the stream has a time limit and nothing comes.
    fn receive(mut from: &UnixStream) -> io::Result<Option<Self>> {
        let mut header = [0; 12];
        let received = from.recv_with_fd(&mut header);
        let (length, file) =
            received.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        if length == 0 {
            return Ok(None);
        }
        // What has begun comes soon.
        let limit = from.read_timeout()?;
        from.set_read_timeout(Some(PATIENCE))?;
        from.read_exact(&mut header[length..])?;
        let [request, flags, size] = [0, 4, 8].map(|at| word(&header, at));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MESSAGE {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut body = vec![0; size];
        from.read_exact(&mut body)?;
        from.set_read_timeout(limit)?;
        Ok(Some(Self {
            request,
            flags,
            body,
            file,
        }))
    }

    fn send(&self, to: &UnixStream) -> io::Result<()> {
        let size = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        let header = [self.request, self.flags, size].map(u32::to_le_bytes);
        let bytes = [header.as_flattened(), &self.body].concat();
        let fds: Vec<_> = self.file.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = to.send_with_fds(&[&bytes[..]], &fds);
        let sent = sent.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let mut to = to;
        to.write_all(&bytes[sent..])
    }

    fn is_answered(&self) -> bool {
        self.flags & NEED_REPLY != 0 || request::ANSWERED.contains(&self.request)
    }

    /// The ring that it is about, if it is about one.
    fn ring(&self) -> Option<u32> {
        let about = RING.contains(&self.request) || self.request == request::GET_VRING_BASE;
        // With a descriptor comes a longer word whose lowest byte is the index.
        about.then(|| word(&self.body, 0) & 0xff)
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

struct Relay {
    front: UnixStream,
    back: UnixStream,
    back_end: PathBuf,
    /// What has set up the device.
    device: BTreeMap<u32, Message>,
    /// What has set up each ring.
    rings: BTreeMap<u32, BTreeMap<u32, Message>>,
    restarts: Arc<AtomicU32>,
}

impl Relay {
    fn new(front: UnixStream, back_end: PathBuf, restarts: Arc<AtomicU32>) -> io::Result<Self> {
        front.set_read_timeout(Some(POLL))?;
        Ok(Self {
            back: UnixStream::connect(&back_end)?,
            front,
            back_end,
            device: BTreeMap::new(),
            rings: BTreeMap::new(),
            restarts,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            if self.back_is_gone()? {
                self.restart()?;
            }
            let message = match Message::receive(&self.front) {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            let answer = loop {
                match self.ask(&message) {
                    Ok(answer) => break answer,
                    Err(_) => self.restart()?,
                }
            };
            if let Some(answer) = answer {
                answer.send(&self.front)?;
            }
            self.note(message);
        }
    }

    /// Whether the back end has ended. It speaks on this connection only when it is asked.
    fn back_is_gone(&self) -> io::Result<bool> {
        self.back.set_nonblocking(true)?;
        let received = self.back.recv_with_fd(&mut [0]);
        self.back.set_nonblocking(false)?;
        Ok(match received {
            Ok((length, _)) => length == 0,
            Err(error) => error.errno() != libc::EAGAIN,
        })
    }

    /// Sends a message to the back end; its answer, if it has one.
    fn ask(&self, message: &Message) -> io::Result<Option<Message>> {
        message.send(&self.back)?;
        if !message.is_answered() {
            return Ok(None);
        }
        let answer = Message::receive(&self.back)?;
        answer.map(Some).ok_or(ErrorKind::UnexpectedEof.into())
    }

    /// Remembers what has set the device up.
    fn note(&mut self, message: Message) {
        match (message.request, message.ring()) {
            (request::GET_VRING_BASE, Some(ring)) => {
                self.rings.remove(&ring);
            }
            (request, Some(ring)) => {
                self.rings.entry(ring).or_default().insert(request, message);
            }
            (request::RESET_DEVICE, _) => self.rings.clear(),
            (request, None) if DEVICE.contains(&request) => {
                self.device.insert(request, message);
            }
            _ => {}
        }
    }

    /// Waits for the next back end and sets it up.
    fn restart(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Ok(back) = UnixStream::connect(&self.back_end) {
                self.back = back;
                if self.repeat().is_ok() {
                    self.restarts.fetch_add(1, Ordering::SeqCst);
                    return Ok(());
                }
            }
            thread::sleep(POLL);
        }
        Err(ErrorKind::TimedOut.into())
    }

    /// Answers to requests of the back end that is gone would be taken for answers to requests of the next one.
    fn drain_answers(&self) -> io::Result<()> {
        let channel = self.device.get(&request::SET_BACKEND_REQ_FD);
        let Some(channel) = channel.and_then(|message| message.file.as_ref()) else {
            return Ok(());
        };
        let mut channel = UnixStream::from(OwnedFd::from(channel.try_clone()?));
        channel.set_read_timeout(Some(QUIET))?;
        let drained = loop {
            match channel.read(&mut [0; 64]) {
                Ok(0) => break Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        channel.set_read_timeout(None)?;
        drained
    }

    fn repeat(&self) -> io::Result<()> {
        self.drain_answers()?;
        let mut device = DEVICE.iter().filter_map(|request| self.device.get(request));
        device.try_for_each(|message| self.repeat_one(message))?;
        for (index, ring) in &self.rings {
            for request in RING {
                match (request, ring.get(&request)) {
                    (request::SET_VRING_BASE, Some(message)) => {
                        let base = self.available(ring)?;
                        let body = [*index, base.into()].map(u32::to_le_bytes);
                        self.repeat_one(&Message {
                            body: body.as_flattened().to_vec(),
                            file: None,
                            ..*message
                        })?;
                    }
                    (_, Some(message)) => self.repeat_one(message)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Sends a message once more; its answer, if there is one, says nothing new.
    fn repeat_one(&self, message: &Message) -> io::Result<()> {
        let early = [request::SET_OWNER, request::SET_PROTOCOL_FEATURES];
        let message = Message {
            flags: match early.contains(&message.request) {
                // Answers have not been agreed upon.
                true => message.flags & !NEED_REPLY,
                false => message.flags,
            },
            body: message.body.clone(),
            file: message.file.as_ref().map(File::try_clone).transpose()?,
            request: message.request,
        };
        self.ask(&message).map(drop)
    }

    /// The available index of a ring, as its driver has left it in guest memory.
    fn available(&self, ring: &BTreeMap<u32, Message>) -> io::Result<u16> {
        let address = ring.get(&request::SET_VRING_ADDR);
        // Index and flags, then the addresses of the descriptors, the used and the available ring.
        let address = address.map(|message| long(&message.body, 24));
        let table = self.device.get(&request::SET_MEM_TABLE);
        let (address, table) = address.zip(table).ok_or(ErrorKind::NotFound)?;
        let memory = table.file.as_ref().ok_or(ErrorKind::NotFound)?;
        // The number of regions, then of each: guest address, size, user address, offset in the file.
        let [size, user, offset] = [16, 24, 32].map(|at| long(&table.body, at));
        let inside = address.checked_sub(user).filter(|inside| *inside < size);
        let place = offset + inside.ok_or(ErrorKind::NotFound)?;
        let mut index = [0; 2];
        memory.read_exact_at(&mut index, place + 2)?;
        Ok(u16::from_le_bytes(index))
    }
}
