//! A GPU whose device is another process, `pvgpu-proxyd`: the front end of vhost-user.
//!
//! `gpu` attaches a [`FrontEnd`] to the transport like a device of this process. Doorbells and interrupts pass between guest and
//! daemon without this process; what is here sets that up, takes the daemon's buffer objects into the aperture, and notices
//! when the daemon is gone. A thread of its own (`Link::run`) does the latter two, so that no vCPU waits for a daemon that is not
//! there. The daemon is not trusted with more than the guest's memory: what it sends is checked, and a wrong message is the same as
//! its end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pvgpu_host_proxy::aperture::{Reservation, Window};
use pvgpu_host_proxy::device::{ActivateError, DEVICE_ID};
use pvgpu_host_proxy::sandbox::Allowed;
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserMMap,
    VhostUserMMapFlags, VhostUserMsgValidator, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::layout;
use crate::memory::Range;
use crate::virtio::{Backend, Line};

/// Most descriptors of a queue, whatever more the daemon might have.
const QUEUE_SIZE: u16 = 256;
/// Most queues that a daemon can have here.
const QUEUES_MAX: u64 = 128;
/// How much of the configuration space is read; all of it that is defined is shorter.
const CONFIG_SIZE: u32 = 64;
/// How often it is looked whether the daemon is there again, in milliseconds.
const RETRY_MS: i32 = 100;
/// How long a message may take that has begun to arrive.
const PATIENCE: Duration = Duration::from_secs(2);

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why there is no connection to a daemon.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody is there.
    #[error("cannot connect to {}: {error}; start pvgpu-proxyd --socket {} first", socket.display(), socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// It does not answer as it should.
    #[error("what serves {} is no pvgpu-proxyd that this program can use: {cause}", socket.display())]
    Daemon {
        /// The socket.
        socket: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// It is another one than before.
    #[error("the pvgpu-proxyd at {} is another one than this guest was started with: start it with the same options", .0.display())]
    Changed(PathBuf),
}

/// What the threads that talk to a daemon do on top: vCPUs, and the one that looks after it.
pub(crate) static CALLS: &[Allowed] = &[
    Allowed::any(libc::SYS_sendmsg, "messages to the GPU's daemon"),
    Allowed::any(libc::SYS_recvmsg, "its answers and requests"),
    Allowed::any(libc::SYS_shutdown, "a daemon that does not answer"),
];

/// What a daemon offers; the guest has seen it, so a daemon that comes back must offer the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub features: u64,
    pub queues: usize,
    pub config: Vec<u8>,
    /// Size of the aperture; 0 for none.
    pub aperture: u64,
}

/// A connected daemon.
pub(crate) struct Connection {
    messages: Frontend,
    stream: UnixStream,
    /// Where the daemon's requests arrive; none where there is no aperture.
    channel: Option<UnixStream>,
}

/// Connects to the daemon at `socket`; `begun` sees the connection before anybody waits for answers on it.
pub(crate) fn connect(
    socket: &PathBuf,
    with_aperture: bool,
    begun: impl FnOnce(&UnixStream) -> io::Result<()>,
) -> Result<(Connection, Offer), LinkError> {
    let connected = UnixStream::connect(socket).and_then(|stream| {
        begun(&stream)?;
        Ok(stream)
    });
    let stream = connected.map_err(|error| LinkError::Connect {
        socket: socket.clone(),
        error,
    })?;
    negotiate(stream, with_aperture).map_err(|cause| LinkError::Daemon {
        socket: socket.clone(),
        cause,
    })
}

/// Whether somebody answers: one who serves another front end accepts the connection, and no more.
fn probe(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = [FrontendReq::GET_FEATURES as u32, VERSION, 0];
    stream.write_all(&request.map(u32::to_ne_bytes).concat())?;
    stream.read_exact(&mut [0; HEADER + 8])?;
    stream.set_read_timeout(None)
}

fn negotiate(stream: UnixStream, with_aperture: bool) -> Result<(Connection, Offer), String> {
    let said = |error: vhost::Error| error.to_string();
    let failed = |error: io::Error| error.to_string();
    probe(&stream)
        .map_err(|error| format!("it does not answer ({error}), or serves another VMM"))?;
    let mut messages = Frontend::from_stream(stream.try_clone().map_err(failed)?, QUEUES_MAX);
    messages.set_owner().map_err(said)?;
    let features = messages.get_features().map_err(said)?;
    if features & PROTOCOL_FEATURES == 0 || features & 1 << VIRTIO_F_VERSION_1 == 0 {
        return Err("it offers no vhost-user protocol features, or no virtio 1".into());
    }
    let mut wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK;
    let offered = messages.get_protocol_features().map_err(said)?;
    if !offered.contains(wanted) {
        return Err("it has no MQ, CONFIG or REPLY_ACK".into());
    }
    let shared = VhostUserProtocolFeatures::SHMEM
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::BACKEND_SEND_FD;
    if with_aperture && offered.contains(shared) {
        wanted |= shared;
    }
    messages.set_protocol_features(wanted).map_err(said)?;
    messages.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let queues = messages.get_queue_num().map_err(said)?;
    let queues = usize::try_from(queues.min(QUEUES_MAX)).unwrap_or(0);
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = messages
        .get_config(0, CONFIG_SIZE, flags, &[0; CONFIG_SIZE as usize])
        .map_err(said)?;
    let mut aperture = 0;
    let mut channel = None;
    if wanted.contains(shared) {
        let regions = messages.get_shmem_config().map_err(said)?;
        aperture = match regions.nregions {
            0 => 0,
            _ => regions.memory_sizes.first().copied().unwrap_or(0),
        };
        let (ours, daemons) = UnixStream::pair().map_err(failed)?;
        ours.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        messages.set_backend_request_fd(&daemons).map_err(said)?;
        channel = Some(ours);
    }
    let offer = Offer {
        features: features & !PROTOCOL_FEATURES,
        queues,
        config,
        aperture,
    };
    let connection = Connection {
        messages,
        stream,
        channel,
    };
    Ok((connection, offer))
}

/// What the transport and the thread that looks after the daemon share.
pub(crate) struct Link {
    socket: PathBuf,
    offer: Offer,
    window: Option<Arc<Reservation>>,
    connection: Mutex<Option<Arc<Connection>>>,
    /// Ends the thread.
    end: EventFd,
    /// It has been told to end.
    ended: AtomicBool,
    /// A connection that is not one yet.
    begun: Mutex<Option<UnixStream>>,
}

/// Whom the thread tells what has become of the daemon.
pub(crate) trait Guest: Send + Sync {
    /// The device does nothing any more until it is reset.
    fn device_lost(&self);
    /// A reset would help now.
    fn device_found(&self);
}

impl Link {
    pub(crate) fn new(
        socket: PathBuf,
        connection: Connection,
        offer: Offer,
        window: Option<Arc<Reservation>>,
    ) -> io::Result<Self> {
        Ok(Self {
            socket,
            offer,
            window,
            connection: Mutex::new(Some(Arc::new(connection))),
            end: EventFd::new(0)?,
            ended: AtomicBool::new(false),
            begun: Mutex::default(),
        })
    }

    fn connection(&self) -> MutexGuard<'_, Option<Arc<Connection>>> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn begun(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends [`Link::run`], and whoever waits for the daemon.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let _ = self.end.write(1);
        if let Some(begun) = &*self.begun() {
            let _ = begun.shutdown(Shutdown::Both);
        }
        if let Some(connection) = &*self.connection() {
            connection.close();
        }
    }

    /// Serves the daemon's requests, tells the guest when it is gone, and looks for it again, until the machine ends.
    pub(crate) fn run(&self, guest: &dyn Guest) {
        if let Err(error) = self.look_after(guest) {
            log::error!("cannot wait for the GPU's daemon: {error}; the guest has lost its GPU");
            guest.device_lost();
        }
    }

    fn look_after(&self, guest: &dyn Guest) -> io::Result<()> {
        loop {
            let connection = self.connection().clone();
            if let Some(connection) = connection {
                match self.serve(&connection) {
                    Ok(false) => return Ok(()),
                    Ok(true) => {}
                    Err(error) => log::warn!("the GPU's daemon has misbehaved: {error}"),
                }
                connection.close();
                *self.connection() = None;
                if let Some(window) = &self.window {
                    window.unmap_all()?;
                }
                log::warn!(
                    "the GPU's daemon at {} is gone: the guest has lost its GPU until the daemon is there again",
                    self.socket.display()
                );
                guest.device_lost();
            }
            if !self.reconnect()? {
                return Ok(());
            }
            log::warn!("the GPU's daemon is there again");
            guest.device_found();
        }
    }

    /// Tries until there is a daemon; whether there is one, rather than an end.
    fn reconnect(&self) -> io::Result<bool> {
        let epoll = Epoll::new()?;
        watch(&epoll, &self.end, EventSet::IN, END)?;
        let mut told = false;
        while wait(&epoll, RETRY_MS)? != Some(END) {
            let connected = connect(&self.socket, self.window.is_some(), |stream| {
                *self.begun() = Some(stream.try_clone()?);
                match self.ended.load(Ordering::SeqCst) {
                    true => stream.shutdown(Shutdown::Both),
                    false => Ok(()),
                }
            });
            *self.begun() = None;
            let connected = connected.and_then(|(connection, offer)| match offer == self.offer {
                true => Ok(connection),
                false => Err(LinkError::Changed(self.socket.clone())),
            });
            match connected {
                Ok(connection) => {
                    *self.connection() = Some(Arc::new(connection));
                    return Ok(true);
                }
                // Nobody is there yet.
                Err(LinkError::Connect { .. }) => {}
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        log::warn!("{error}");
                    }
                }
            }
        }
        Ok(false)
    }

    /// Handles the daemon's requests until it goes; whether that was it, rather than the end of the machine.
    fn serve(&self, connection: &Connection) -> io::Result<bool> {
        let epoll = Epoll::new()?;
        watch(&epoll, &self.end, EventSet::IN, END)?;
        watch(&epoll, &connection.stream, EventSet::READ_HANG_UP, MESSAGES)?;
        let requests = connection.channel.as_ref().zip(self.window.as_deref());
        if let Some((channel, _)) = requests {
            watch(&epoll, channel, EventSet::IN, CHANNEL)?;
        }
        loop {
            match (wait(&epoll, -1)?, requests) {
                (Some(END), _) => return Ok(false),
                (Some(CHANNEL), Some((channel, window))) if handle(channel, window)? => {}
                (Some(_), _) => return Ok(true),
                (None, _) => {}
            }
        }
    }
}

/// What the thread waits for: the end of the machine, the end of the daemon, the daemon's requests.
const END: u64 = 0;
const MESSAGES: u64 = 1;
const CHANNEL: u64 = 2;

fn watch(epoll: &Epoll, file: &impl AsRawFd, events: EventSet, data: u64) -> io::Result<()> {
    let event = EpollEvent::new(events, data);
    epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event)
}

/// The least of what is ready within so many milliseconds.
fn wait(epoll: &Epoll, timeout: i32) -> io::Result<Option<u64>> {
    let mut events = [EpollEvent::default(); 3];
    let ready = match epoll.wait(timeout, &mut events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        ready => ready?,
    };
    let ready = events.iter().take(ready);
    Ok(ready.map(EpollEvent::data).min())
}

impl Connection {
    /// Whoever waits for the daemon waits no longer.
    fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Length of a message's header: request, flags and length of what follows, 4 bytes each.
const HEADER: usize = 12;
/// Flags of a header: the version, and those of all headers.
const VERSION: u32 = 1;

/// Handles one request of the daemon; false when it is gone. A wrong request is an error.
fn handle(mut channel: &UnixStream, window: &Reservation) -> io::Result<bool> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let mut header = [0; HEADER];
    let (count, file) = channel.recv_with_fd(&mut header)?;
    if count == 0 {
        return Ok(false);
    }
    let rest = header.get_mut(count..).ok_or_else(malformed)?;
    channel.read_exact(rest)?;
    let [request, flags, size] = words(&header);
    let mut body = VhostUserMMap::default();
    if flags & !VhostUserHeaderFlag::NEED_REPLY.bits() != VERSION
        || usize::try_from(size) != Ok(body.as_slice().len())
    {
        return Err(malformed());
    }
    channel.read_exact(body.as_mut_slice())?;
    let result = match BackendReq::try_from(request) {
        Ok(BackendReq::SHMEM_MAP) => place(window, &body, file),
        Ok(BackendReq::SHMEM_UNMAP) => {
            checked(&body).and_then(|()| window.unmap(body.shm_offset, body.len))
        }
        _ => return Err(malformed()),
    };
    if flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0 {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let status = u64::from(result.is_err());
        let reply = [request, flags, 8].map(u32::to_ne_bytes).concat();
        channel.write_all(&[&reply[..], &status.to_ne_bytes()].concat())?;
    }
    Ok(true)
}

fn words(header: &[u8; HEADER]) -> [u32; 3] {
    let mut words = header.chunks_exact(4).map(|word| {
        let bytes = <[u8; 4]>::try_from(word).unwrap_or_default();
        u32::from_ne_bytes(bytes)
    });
    [(); 3].map(|()| words.next().unwrap_or_default())
}

/// Maps what the daemon asks for.
fn place(window: &Reservation, request: &VhostUserMMap, file: Option<File>) -> io::Result<()> {
    checked(request)?;
    let file = file.ok_or(io::ErrorKind::InvalidInput)?;
    if request.flags != VhostUserMMapFlags::WRITABLE.bits() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The reservation refuses what does not lie in it, or overlaps another mapping.
    window.map(request.shm_offset, request.len, &file, request.fd_offset)
}

/// Whether its numbers make sense, and it is for the region that there is.
fn checked(request: &VhostUserMMap) -> io::Result<()> {
    let region = u32::from(request.shmid) == layout::APERTURE_REGION;
    match region && request.is_valid() {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// The front end, as the transport sees it.
pub struct FrontEnd {
    link: Arc<Link>,
    queue_sizes: Vec<u16>,
    kicks: Vec<EventFd>,
    /// The guest's RAM: where it is, and the file behind it.
    ram: Vec<(Range, File)>,
    /// The daemon that works on the guest's queues, and which of them.
    running: Option<(Arc<Connection>, Vec<usize>)>,
}

impl FrontEnd {
    pub(crate) fn new(link: Arc<Link>, ram: Vec<(Range, File)>) -> io::Result<Self> {
        let queues = link.offer.queues;
        let kicks = (0..queues).map(|_| EventFd::new(0));
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; queues],
            kicks: kicks.collect::<Result<_, _>>()?,
            link,
            ram,
            running: None,
        })
    }

    /// What a doorbell signals, by queue.
    pub(crate) fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Where a guest-physical address is in this process; what is in no RAM, the daemon refuses.
    fn user_address(&self, guest: u64) -> u64 {
        let mut ranges = self.ram.iter().map(|(range, _)| range);
        let range = ranges.find(|range| guest >= range.guest && guest - range.guest < range.size);
        range.map_or(u64::MAX, |range| range.host + (guest - range.guest))
    }

    fn set_up(
        &self,
        daemon: &Connection,
        features: u64,
        queues: &[Queue],
        line: &dyn Line,
    ) -> vhost::Result<()> {
        let mut messages = daemon.messages.clone();
        messages.set_features(features | PROTOCOL_FEATURES)?;
        let regions = self
            .ram
            .iter()
            .map(|(range, file)| VhostUserMemoryRegionInfo {
                guest_phys_addr: range.guest,
                memory_size: range.size,
                userspace_addr: range.host,
                mmap_offset: 0,
                mmap_handle: file.as_raw_fd(),
            });
        messages.set_mem_table(&regions.collect::<Vec<_>>())?;
        let ready = || queues.iter().enumerate().filter(|(_, queue)| queue.ready());
        for (index, queue) in ready() {
            messages.set_vring_num(index, queue.size())?;
            messages.set_vring_base(index, 0)?;
            let addresses = VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: self.user_address(queue.desc_table()),
                used_ring_addr: self.user_address(queue.used_ring()),
                avail_ring_addr: self.user_address(queue.avail_ring()),
                log_addr: None,
            };
            messages.set_vring_addr(index, &addresses)?;
            if let Some(call) = u16::try_from(index)
                .ok()
                .and_then(|queue| line.event(queue))
            {
                messages.set_vring_call(index, &call)?;
            }
            if let Some(kick) = self.kicks.get(index) {
                messages.set_vring_kick(index, kick)?;
            }
        }
        ready().try_for_each(|(index, _)| messages.set_vring_enable(index, true))
    }
}

impl Backend for FrontEnd {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        self.link.offer.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = self.link.offer.config.iter().copied().skip(offset);
        data.iter_mut()
            .zip(config.chain(std::iter::repeat(0)))
            .for_each(|(to, from)| *to = from);
    }

    fn raises_interrupts(&self) -> bool {
        true
    }

    fn activate(
        &mut self,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        features: u64,
        queues: Vec<Queue>,
        line: Arc<dyn Line>,
    ) -> Result<(), String> {
        // A guest must not get this front end disconnected.
        let memory = memory.memory();
        let mut rings = queues.iter();
        if let Some(index) = rings.position(|queue| queue.ready() && !queue.is_valid(&*memory)) {
            return Err(ActivateError::Memory(index).to_string());
        }
        let daemon = self.link.connection().clone();
        let daemon = daemon.ok_or("its daemon is not there")?;
        let set_up = self.set_up(&daemon, features, &queues, &*line);
        set_up.map_err(|error| {
            // Whatever it has done of it: it shall not go on with that.
            daemon.close();
            format!("its daemon refuses ({error})")
        })?;
        let ready = queues.iter().enumerate().filter(|(_, queue)| queue.ready());
        self.running = Some((daemon, ready.map(|(index, _)| index).collect()));
        Ok(())
    }

    /// The doorbells that reach this process.
    fn notify(&self, queue: u16) {
        if let Some(kick) = self.kicks.get(usize::from(queue)) {
            let _ = kick.write(1);
        }
    }

    /// A daemon has no way to say so; of one that is gone the transport hears from who looks after the connection.
    fn needs_reset(&self) -> bool {
        false
    }

    fn reset(&mut self) {
        let Some((daemon, queues)) = self.running.take() else {
            return;
        };
        let messages = &daemon.messages;
        // With the answer, the daemon no longer touches the guest's memory. One that does not answer is dead, or as good as that.
        let stop = |index| messages.get_vring_base(index);
        if queues
            .into_iter()
            .try_for_each(|index| stop(index).map(drop))
            .is_err()
        {
            daemon.close();
        }
        if let Some(window) = &self.link.window
            && let Err(error) = window.unmap_all()
        {
            log::error!("cannot take the GPU's memory out of the guest: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    /// What a daemon asks for, and whether it gets it; an error when the connection ends over it.
    fn ask(
        window: &Reservation,
        request: u32,
        body: VhostUserMMap,
        file: bool,
    ) -> io::Result<bool> {
        let (ours, mut daemons) = UnixStream::pair().unwrap();
        let header = [request, VERSION | 8, 40].map(u32::to_ne_bytes).concat();
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(16 * PAGE).unwrap();
        let message = [&header[..], body.as_slice()].concat();
        match file {
            true => daemons
                .send_with_fd(&message[..], memory.as_raw_fd())
                .unwrap(),
            false => daemons.write(&message).unwrap(),
        };
        assert!(handle(&ours, window)?);
        let mut reply = [0; 20];
        daemons.read_exact(&mut reply).unwrap();
        let [answers, flags, size, status, high] =
            [0, 4, 8, 12, 16].map(|at| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap()));
        assert_eq!((answers, flags, size, high), (request, VERSION | 4, 8, 0));
        Ok(status == 0)
    }

    fn map(offset: u64, length: u64) -> VhostUserMMap {
        VhostUserMMap {
            shm_offset: offset,
            len: length,
            flags: VhostUserMMapFlags::WRITABLE.bits(),
            ..VhostUserMMap::default()
        }
    }

    const MAP: u32 = BackendReq::SHMEM_MAP as u32;
    const UNMAP: u32 = BackendReq::SHMEM_UNMAP as u32;

    #[test]
    fn a_daemon_maps_only_free_ranges_of_whole_pages_in_the_region_that_there_is() {
        let window = Reservation::new(8 * PAGE).unwrap();
        let asks = |request, body| ask(&window, request, body, request == MAP).unwrap();
        assert!(asks(MAP, map(2 * PAGE, 2 * PAGE)));
        for (offset, length) in [
            (3 * PAGE, PAGE),
            (PAGE, 2 * PAGE),
            (0, 8 * PAGE),
            (7 * PAGE, 2 * PAGE),
            (8 * PAGE, PAGE),
            (0, 0),
            (1, PAGE),
            (0, 100),
            (u64::MAX - PAGE + 1, PAGE),
            (PAGE, u64::MAX),
        ] {
            assert!(!asks(MAP, map(offset, length)), "{offset:#x}+{length:#x}");
        }
        assert!(!asks(
            MAP,
            VhostUserMMap {
                shmid: 1,
                ..map(0, PAGE)
            }
        ));
        assert!(!asks(
            MAP,
            VhostUserMMap {
                flags: 0,
                ..map(0, PAGE)
            }
        ));
        assert!(!asks(
            MAP,
            VhostUserMMap {
                fd_offset: 1,
                ..map(0, PAGE)
            }
        ));
        assert!(!ask(&window, MAP, map(0, PAGE), false).unwrap());
        // Only what is mapped can be unmapped, and then be mapped again.
        for (offset, length) in [(0, PAGE), (2 * PAGE, PAGE), (3 * PAGE, PAGE)] {
            assert!(!asks(UNMAP, map(offset, length)), "{offset:#x}+{length:#x}");
        }
        assert!(asks(UNMAP, map(2 * PAGE, 2 * PAGE)));
        assert!(asks(MAP, map(PAGE, 2 * PAGE)));
    }

    #[test]
    fn a_daemon_that_asks_for_something_else_or_half_is_as_good_as_gone() {
        let window = Reservation::new(8 * PAGE).unwrap();
        assert!(ask(&window, 3, map(0, PAGE), false).is_err());
        assert!(ask(&window, 77, map(0, PAGE), false).is_err());
        for message in [&[0xff; 12][..], &[0xff; 5]] {
            let (ours, mut daemons) = UnixStream::pair().unwrap();
            daemons.write_all(message).unwrap();
            drop(daemons);
            assert!(handle(&ours, &window).is_err());
        }
        let (ours, daemons) = UnixStream::pair().unwrap();
        drop(daemons);
        assert!(!handle(&ours, &window).unwrap());
    }

    #[test]
    fn a_daemon_that_serves_another_vmm_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _busy = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = connect(&socket, true, |_| Ok(())).map(drop).unwrap_err();
        assert!(error.to_string().contains("serves another VMM"), "{error}");
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named_with_the_remedy() {
        let error = connect(&"/nowhere/socket".into(), true, |_| Ok(()))
            .map(drop)
            .unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("start pvgpu-proxyd --socket /nowhere/socket"),
            "{error}"
        );
    }

    /// A daemon that can be killed, as a thread.
    struct Daemon(UnixStream, std::thread::JoinHandle<()>);

    impl Daemon {
        /// Serves one front end that connects to `socket`, from now on.
        fn listen(socket: &std::path::Path) -> std::thread::JoinHandle<Self> {
            use pvgpu_host_proxy::device::{Device, DeviceConfig};
            use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
            use pvgpu_host_proxy::vhost_user::{BackEnd, serve};
            let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
            let device = Device::new(driver, None, DeviceConfig::default()).unwrap();
            let back_end = Arc::new(Mutex::new(BackEnd::new(device, 16 * PAGE)));
            let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
            std::thread::spawn(move || {
                let (connection, _) = listener.accept().unwrap();
                let ours = connection.try_clone().unwrap();
                let served = std::thread::spawn(move || serve(connection, &back_end).unwrap());
                Self(ours, served)
            })
        }

        fn kill(self, socket: &std::path::Path) {
            std::fs::remove_file(socket).unwrap();
            self.0.shutdown(std::net::Shutdown::Both).unwrap();
            self.1.join().unwrap();
        }
    }

    /// A driver that drives no more than registers and one ring, whose requests are one descriptor of no bytes: they come back.
    struct Driver(
        crate::virtio_mmio::VirtioMmio<crate::gpu::GpuDevice>,
        crate::memory::Ram,
    );

    impl Driver {
        fn read(&self, offset: u64) -> u32 {
            use crate::bus::MmioDevice;
            let mut value = [0; 4];
            self.0.read(offset, &mut value);
            u32::from_le_bytes(value)
        }

        fn write(&self, offset: u64, value: u32) {
            use crate::bus::MmioDevice;
            self.0.write(offset, &value.to_le_bytes());
        }

        fn store(&self, address: u64, value: u16) {
            use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
            let memory = self.1.map().memory();
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }

        fn used(&self) -> u16 {
            use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
            self.1
                .map()
                .memory()
                .read_obj(GuestAddress(0x3002))
                .unwrap()
        }

        /// Resets the device and starts it; its status then.
        fn start(&self) -> u32 {
            use crate::virtio_mmio::register::*;
            self.write(STATUS, 0);
            for status in [1, 3] {
                self.write(STATUS, status);
            }
            self.write(DRIVER_FEATURES_SEL, 1);
            self.write(DRIVER_FEATURES, 1);
            self.write(STATUS, 11);
            self.store(0x2002, 0);
            self.store(0x3002, 0);
            for (register, value) in [
                (QUEUE_SEL, 0),
                (QUEUE_NUM, 8),
                (QUEUE_DESC_LOW, 0x1000),
                (QUEUE_DRIVER_LOW, 0x2000),
                (QUEUE_DEVICE_LOW, 0x3000),
                (QUEUE_READY, 1),
                (STATUS, 15),
            ] {
                self.write(register, value);
            }
            self.read(STATUS)
        }

        /// Makes a request, and waits until it is back.
        fn request(&self) {
            let count = self.used() + 1;
            self.store(0x2002, count);
            self.write(crate::virtio_mmio::register::QUEUE_NOTIFY, 0);
            self.wait_until("the request is back", || self.used() == count);
        }

        fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
            let deadline = std::time::Instant::now() + Duration::from_secs(60);
            while !done() {
                assert!(std::time::Instant::now() < deadline, "never: {what}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn a_guest_whose_daemon_is_gone_needs_a_reset_and_works_after_one_when_it_is_there_again() {
        use crate::virtio_mmio::register::{INTERRUPT_ACK, INTERRUPT_STATUS, STATUS};
        const NEEDS_RESET: u32 = 64;
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let daemon = Daemon::listen(&socket);
        let ram = crate::memory::Ram::shareable(4 << 20).unwrap();
        let shared = ram.shared();
        let shared = shared.map(|(range, file)| (range, file.try_clone().unwrap()));
        let (connection, offer) = connect(&socket, true, |_| Ok(())).unwrap();
        let window = Arc::new(Reservation::new(offer.aperture).unwrap());
        let link = Link::new(socket.clone(), connection, offer, Some(window));
        let link = Arc::new(link.unwrap());
        let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let front_end = FrontEnd::new(Arc::clone(&link), shared.collect()).unwrap();
        let device = crate::gpu::GpuDevice::VhostUser(front_end);
        let memory = ram.map().clone();
        let transport = crate::virtio_mmio::VirtioMmio::new(device, memory, None, Arc::new(event));
        let driver = Driver(transport, ram);
        let looks_after = {
            let (link, device) = (Arc::clone(&link), Arc::clone(&driver.0));
            std::thread::spawn(move || link.run(&*device))
        };
        let daemon = daemon.join().unwrap();
        assert_eq!(driver.start(), 15);
        driver.request();
        assert_eq!(
            driver.read(INTERRUPT_STATUS),
            1,
            "any interrupt may be a queue's"
        );

        daemon.kill(&socket);
        driver.wait_until("it needs a reset", || {
            driver.read(STATUS) & NEEDS_RESET != 0
        });
        assert_eq!(
            driver.read(INTERRUPT_STATUS),
            2,
            "a configuration interrupt alone"
        );
        assert_ne!(driver.start() & NEEDS_RESET, 0, "there is no daemon");
        driver.write(INTERRUPT_ACK, 2);

        let daemon = Daemon::listen(&socket);
        driver.wait_until("the guest hears of it", || {
            driver.read(INTERRUPT_STATUS) & 2 != 0
        });
        let daemon = daemon.join().unwrap();
        assert_eq!(driver.start(), 15);
        driver.request();
        // The machine ends.
        link.end();
        looks_after.join().unwrap();
        daemon.1.join().unwrap();
    }
}
