//! What the messages of a front end mean for the device: memory, rings, configuration, the channel back.
//!
//! The rings of a front end start one after the other, the session with the first of them. It ends when one of them is stopped:
//! whatever was in flight is done or cancelled before the front end hears that, and nothing touches the guest's memory
//! afterwards. The crate `vhost-user-backend` would wait for the doorbells itself, in threads between the front end and the queues' own,
//! which poll: here the front end's descriptor wakes a queue's thread directly.

use super::shmem::Region;
use crate::aperture::Aperture;
use crate::device::{Device, Interrupt};
use crate::logging::guest_log;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError, RwLock};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Marks the doorbell of the event queue.
const EVENT_QUEUE: u64 = 1;

/// Most regions of a guest's memory: as many as QEMU has (VHOST_USER_MAX_RAM_SLOTS), which takes what is mapped in the aperture for
/// memory, too, and shows it.
const REGIONS_MAX: u64 = 512;

/// A device and the front end that it is connected to.
pub struct BackEnd {
    device: Device,
    /// Size of the aperture where the front end has shared-memory regions; 0 for none.
    aperture: u64,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Where the front end has the regions: its address, the guest's, and the length.
    places: Vec<Place>,
    rings: Vec<Ring>,
    calls: Arc<Calls>,
    region: Option<Arc<Region>>,
    /// Waits for the front end, and for the doorbell of the event queue, which has no thread of its own.
    epoll: Option<Arc<Epoll>>,
    event_doorbell: Option<File>,
}

/// A region of the guest's memory in the front end's address space.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    user: u64,
    guest: u64,
    length: u64,
}

/// What a front end has said of a ring.
#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    addresses: Option<Addresses>,
    base: u16,
    /// It has a doorbell, which is what sets it up.
    ready: bool,
    enabled: bool,
    /// The device works on it.
    started: bool,
}

/// Guest-physical addresses of a ring's parts.
#[derive(Clone, Copy)]
struct Addresses {
    descriptors: u64,
    available: u64,
    used: u64,
}

/// The front end's descriptors for interrupts, by queue; it may leave out those that its guest has none for.
struct Calls(Vec<RwLock<Option<File>>>);

impl Calls {
    fn set(&self, queue: usize, call: Option<File>) {
        if let Some(slot) = self.0.get(queue) {
            *slot.write().unwrap_or_else(PoisonError::into_inner) = call;
        }
    }
}

impl Interrupt for Calls {
    fn signal_queue(&self, queue: u16) {
        let Some(slot) = self.0.get(usize::from(queue)) else {
            return;
        };
        let call = slot.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut call) = call.as_ref() {
            // Fails when an interrupt is pending, or for what is no eventfd.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }

    /// The configuration never changes.
    fn signal_config(&self) {}
}

impl BackEnd {
    /// A back end for `device`, whose doorbells must be workers'. The aperture has that size, a multiple of the page size, where the
    /// front end can have one; 0 for none.
    pub fn new(device: Device, aperture: u64) -> Self {
        let queues = device.queue_max_sizes().len();
        Self {
            aperture,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            places: Vec::new(),
            rings: vec![Ring::default(); queues],
            calls: Arc::new(Calls((0..queues).map(|_| RwLock::default()).collect())),
            region: None,
            epoll: None,
            event_doorbell: None,
            device,
        }
    }

    /// A front end is there; `epoll` is what its thread waits on.
    pub(super) fn connect(&mut self, epoll: Arc<Epoll>) {
        self.epoll = Some(epoll);
    }

    /// The front end is gone: everything is as it was before it came.
    pub(super) fn disconnect(&mut self) {
        self.reset_rings();
        self.device.set_aperture(None);
        self.region = None;
        self.features = 0;
        self.protocol = VhostUserProtocolFeatures::empty();
        self.replace_memory(GuestMemoryMmap::new());
        self.places.clear();
        self.epoll = None;
    }

    /// The front end has rung the doorbell of the event queue.
    pub(super) fn event_queue_notified(&self) {
        self.device.notify(self.event_queue());
    }

    fn event_queue(&self) -> u16 {
        u16::try_from(self.rings.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Forgets all rings.
    fn reset_rings(&mut self) {
        self.stop();
        for index in 0..self.rings.len() {
            let _ = self.set_doorbell(index, None);
            self.calls.set(index, None);
        }
        self.rings.fill(Ring::default());
    }

    /// Ends the session, if there is one. Nothing touches the guest's memory afterwards.
    fn stop(&mut self) {
        if let Some(region) = &self.region {
            region.close();
        }
        let bases = self.device.stop();
        if let Some(region) = &self.region {
            region.reopen();
        }
        for (ring, base) in self.rings.iter_mut().zip(bases) {
            if std::mem::take(&mut ring.started) {
                ring.base = base;
            }
        }
    }

    /// Starts all rings that are to run and do not, and the session with the first one.
    fn start(&mut self) -> Result<()> {
        let negotiated = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() & self.features != 0;
        for index in 0..self.rings.len() {
            let Some(ring) = self.rings.get(index).copied() else {
                continue;
            };
            // A front end that cannot enable rings never disables them.
            let runs = ring.ready && (ring.enabled || !negotiated);
            let (Some(addresses), true, false) = (ring.addresses, runs, ring.started) else {
                continue;
            };
            self.start_ring(index, ring, addresses)
                .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
            if let Some(ring) = self.rings.get_mut(index) {
                ring.started = true;
            }
        }
        Ok(())
    }

    fn start_ring(
        &mut self,
        index: usize,
        ring: Ring,
        addresses: Addresses,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let sizes = self.device.queue_max_sizes().to_vec();
        let new = || -> std::result::Result<Vec<_>, virtio_queue::Error> {
            sizes.iter().map(|size| Queue::new(*size)).collect()
        };
        let mut queues = new()?;
        let queue = queues.get_mut(index).ok_or("no such queue")?;
        queue.try_set_size(ring.size)?;
        queue.try_set_desc_table_address(GuestAddress(addresses.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(addresses.available))?;
        queue.try_set_used_ring_address(GuestAddress(addresses.used))?;
        queue.set_next_avail(ring.base);
        // Where it goes on is in the ring: what was in flight at a stop is lost.
        let used = queue.used_idx(&*self.memory.memory(), std::sync::atomic::Ordering::Acquire)?;
        queue.set_next_used(used.0);
        queue.set_ready(true);
        if self.device.is_active() {
            let queue = std::mem::take(queue);
            let index = u16::try_from(index)?;
            return Ok(self.device.start_queue(index, queue)?);
        }
        let calls = Arc::clone(&self.calls);
        let memory = self.memory.clone();
        Ok(self.device.activate(memory, self.features, queues, calls)?)
    }

    /// Takes the descriptor that rings the doorbell of a queue.
    fn set_doorbell(&mut self, index: usize, ring: Option<File>) -> io::Result<()> {
        let queue = u16::try_from(index).unwrap_or(u16::MAX);
        if queue != self.event_queue() {
            return self.device.watch_doorbell(queue, ring);
        }
        let Some(epoll) = &self.epoll else {
            return Ok(());
        };
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, EVENT_QUEUE);
        if let Some(before) = self.event_doorbell.take() {
            epoll.ctl(ControlOperation::Delete, before.as_raw_fd(), event)?;
        }
        if let Some(ring) = ring {
            epoll.ctl(ControlOperation::Add, ring.as_raw_fd(), event)?;
            self.event_doorbell = Some(ring);
        }
        Ok(())
    }

    fn replace_memory(&self, memory: GuestMemoryMmap) {
        let lock = self.memory.lock();
        lock.unwrap_or_else(PoisonError::into_inner).replace(memory);
    }

    /// The guest-physical address of what the front end has at `user`.
    fn guest_address(&self, user: u64) -> Result<u64> {
        let place = self.places.iter().find_map(|place| {
            let offset = user.checked_sub(place.user)?;
            (offset < place.length).then(|| place.guest.checked_add(offset))?
        });
        place.ok_or(Error::InvalidParam)
    }
}

impl Place {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self {
            user: region.user_addr,
            guest: region.guest_phys_addr,
            length: region.memory_size,
        }
    }
}

/// Maps a region of the guest's memory. What cannot be mapped is a hole: a front end may show what is no RAM.
fn map(region: &VhostUserMemoryRegion, file: File) -> Option<GuestRegionMmap> {
    let Place { guest, length, .. } = Place::of(region);
    match region.mmap_region(file) {
        Ok(mapping) => GuestRegionMmap::new(mapping, GuestAddress(guest)),
        Err(error) => {
            guest_log!(
                warn,
                "{length} bytes of the guest's memory at {guest:#x} cannot be mapped ({error}): requests that lie there will fail"
            );
            None
        }
    }
}

/// What the device does not do.
fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for BackEnd {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_rings();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mappings = regions.iter().zip(files);
        let mappings = mappings.filter_map(|(region, file)| map(region, file));
        let memory = GuestMemoryMmap::from_regions(mappings.collect());
        self.replace_memory(memory.map_err(|_| Error::InvalidParam)?);
        self.places = regions.iter().map(Place::of).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            descriptors: self.guest_address(descriptor)?,
            available: self.guest_address(available)?,
            used: self.guest_address(used)?,
        };
        self.ring(index)?.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        if self.ring(index)?.started {
            self.stop();
        }
        let at = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.set_doorbell(at, None)
            .map_err(Error::ReqHandlerError)?;
        self.calls.set(at, None);
        let ring = self.ring(index)?;
        ring.ready = false;
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, doorbell: Option<File>) -> Result<()> {
        self.ring(index.into())?;
        // Without one, the front end wants its rings polled for ever.
        if doorbell.is_none() {
            return unsupported();
        }
        self.set_doorbell(index.into(), doorbell)
            .map_err(Error::ReqHandlerError)?;
        self.ring(index.into())?.ready = true;
        self.start()
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        self.ring(index.into())?;
        if let Some(call) = &call {
            // `UnixStream` has a way to say that of any descriptor.
            let call = UnixStream::from(OwnedFd::from(
                call.try_clone().map_err(Error::ReqHandlerError)?,
            ));
            call.set_nonblocking(true).map_err(Error::ReqHandlerError)?;
        }
        self.calls.set(index.into(), call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _error: Option<File>) -> Result<()> {
        self.ring(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if self.aperture != 0 {
            features |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let features = VhostUserProtocolFeatures::from_bits(features);
        let offered = self.get_protocol_features()?;
        self.protocol = features
            .filter(|features| offered.contains(*features))
            .ok_or(Error::FeatureMismatch)?;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        if enable {
            return self.start();
        }
        if self.ring(index)?.started {
            self.stop();
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // `vhost` lets no range pass that ends beyond the 4 KiB of a configuration.
        let size = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let mut config = vec![0; size];
        self.device.read_config(offset.into(), &mut config);
        Ok(config)
    }

    /// A guest may write there, but nothing comes of it.
    fn set_config(
        &mut self,
        _offset: u32,
        _config: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        Ok(())
    }

    fn set_backend_req_fd(&mut self, front_end: Backend) {
        let wanted = VhostUserProtocolFeatures::SHMEM | VhostUserProtocolFeatures::REPLY_ACK;
        if self.aperture == 0 || !self.protocol.contains(wanted) {
            return;
        }
        self.stop();
        let region = Arc::new(Region::new(front_end, self.aperture));
        self.device
            .set_aperture(Some(Aperture::new(Arc::clone(&region) as _)));
        self.region = Some(region);
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.places.len() as u64 >= REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        if let Some(mapping) = map(region, file) {
            let memory = self.memory.memory().insert_region(Arc::new(mapping));
            self.replace_memory(memory.map_err(|_| Error::InvalidParam)?);
        }
        self.places.push(Place::of(region));
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let place = Place::of(region);
        let mut places = self.places.iter();
        let index = places.position(|other| *other == place);
        self.places.swap_remove(index.ok_or(Error::InvalidParam)?);
        // A hole has no mapping.
        let memory = self.memory.memory();
        let removed = memory.remove_region(GuestAddress(place.guest), place.length);
        if let Ok((memory, _)) = removed {
            self.replace_memory(memory);
        }
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        let regions = u32::from(self.aperture != 0);
        Ok(VhostUserShMemConfig::new(regions, &[self.aperture]))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
