//! The virtio device: queues in, interrupts out, one session per activation.
//!
//! A VMM owns a [`Device`] and drives it from its transport (virtio-mmio, PCI, vhost-user): it activates the device
//! with guest memory and queues, forwards doorbells and resets. Everything between a descriptor chain and the session
//! is here; nothing here knows which hypervisor or transport it is.
//!
//! How a VMM uses it (and its logger should be a [`Limited`](crate::logging::Limited) one):
//!
//! ```no_run
//! use pvgpu_host_proxy::aperture::{Aperture, Reservation, Window};
//! use pvgpu_host_proxy::device::{DEVICE_ID, Device, DeviceConfig, Doorbell, Interrupt};
//! use pvgpu_host_proxy::drm::DrmDriver;
//! use std::sync::Arc;
//! use virtio_queue::Queue;
//! use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! /// The device's interrupt line: here an eventfd that is an irqfd of the VM.
//! struct Line(EventFd);
//!
//! impl Interrupt for Line {
//!     fn signal_queue(&self, _queue: u16) {
//!         let _ = self.0.write(1); // fails only when an interrupt is pending anyway
//!     }
//!     fn signal_config(&self) {
//!         let _ = self.0.write(1);
//!     }
//! }
//!
//! fn plug_in(
//!     memory: GuestMemoryAtomic<GuestMemoryMmap>, // all RAM of the guest
//!     features: u64,                              // those that the guest accepted
//!     queues: Vec<Queue>,                         // as the guest has set them up
//!     irqfd: EventFd,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     // The host addresses of the aperture become one memory slot of the VM, and its guest-physical address the
//!     // device's shared-memory region 0.
//!     let window = Arc::new(Reservation::new(4 << 30)?);
//!     let (_slot_address, _slot_size) = (window.host_address(), window.size());
//!
//!     let driver = Arc::new(DrmDriver::new("/dev/dri/renderD128")?);
//!     let config = DeviceConfig {
//!         request_queues: 4, // one per vCPU
//!         doorbell: Doorbell::Worker,
//!         ..DeviceConfig::default()
//!     };
//!     let mut device = Device::new(driver, Some(Aperture::new(window)), config)?;
//!
//!     // The transport identifies the device to the guest ...
//!     let _ = (DEVICE_ID, device.features(), device.queue_max_sizes());
//!     device.read_config(0, &mut [0; 8]);
//!     // ... starts it when the guest writes DRIVER_OK ...
//!     device.activate(memory, features, queues, Arc::new(Line(irqfd)))?;
//!     // ... shows DEVICE_NEEDS_RESET in its status register while this is true ...
//!     let _ = device.needs_reset();
//!     // ... and hands doorbells on: as ioeventfds (here), or by a call on each write to QueueNotify.
//!     match device.doorbell(0) {
//!         Some(_ioeventfd) => {}
//!         None => device.notify(0),
//!     }
//!     // The guest has reset the device, or is gone. Its memory may be unmapped after this.
//!     device.reset();
//!     Ok(())
//! }
//! ```

use crate::aperture::Aperture;
use crate::bell::Bell;
use crate::descriptor::{Malformed, Writable, copy_in};
use crate::driver::HostDriver;
use crate::event::EventQueue;
use crate::limit::Limit;
use crate::monitor::Monitor;
use crate::sandbox::{Allowed, DEVICE, Filter, Sandbox, THREAD};
use crate::session::{RESPONSE_HEADER, Report, Response, Session, WORKER_TIME};
use crate::shadow::{Pages, Scratch};
use crate::statistics::{Counters, Statistics};
use crate::trace::Trace;
use crate::virtqueue::{Shared, Virtqueue};
use pvgpu_protocol::control::Limits;
use pvgpu_protocol::wire::{CONFIG_MAGIC, ConfigSpace, VERSION};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

pub use crate::virtqueue::Interrupt;
pub use pvgpu_protocol::wire::DEVICE_ID;

/// How many times a queue's thread polls before it looks at the clock.
const CLOCK_PERIOD: u32 = 32;

/// Who handles the requests of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// The thread that calls [`Device::notify`]: the lowest latency of a single request.
    Inline,
    /// A thread of the queue behind an eventfd, which polls for a while before it sleeps: the highest throughput.
    Worker,
}

/// How a device is set up.
#[derive(Debug)]
pub struct DeviceConfig {
    /// Number of request queues, one per vCPU at best; the event queue comes on top.
    pub request_queues: u16,
    /// Most descriptors of one queue, a power of two.
    pub queue_size: u16,
    /// Who handles requests.
    pub doorbell: Doorbell,
    /// How long a queue's thread polls at most before it sleeps ([`Doorbell::Worker`]).
    pub poll: Duration,
    /// What the guest may use.
    pub limits: Limits,
    /// Processor time that requests which may wait get in a second, on all worker threads together (`EAGAIN`). One second
    /// is saved up at most; what a request takes too much, later ones have to wait for.
    pub worker_time: Duration,
    /// Where to record every request from the beginning; [`Device::monitor`] switches it at run time.
    pub trace: Option<File>,
    /// Most bytes of that file; later requests are counted ([`Statistics::untraced`]), not recorded.
    pub trace_limit: u64,
    /// Whether the device's own threads are filtered. Those of the VMM are its own business, with
    /// [`Device::system_calls`].
    pub sandbox: Sandbox,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            request_queues: 1,
            queue_size: 256,
            doorbell: Doorbell::Worker,
            poll: Duration::from_micros(100),
            limits: Limits::default(),
            worker_time: WORKER_TIME,
            trace: None,
            trace_limit: 1 << 30,
            sandbox: Sandbox::default(),
        }
    }
}

/// Why a device could not be activated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The guest has not accepted what the device needs.
    #[error(
        "the guest did not accept VIRTIO_F_VERSION_1, without which the device has no defined layout"
    )]
    Features,
    /// More or fewer queues than the device has.
    #[error("{0} queues were set up, but the device has {1}")]
    Queues(usize, usize),
    /// A queue outside of guest memory.
    #[error("queue {0} does not lie in guest memory")]
    Memory(usize),
    /// The threads or eventfds could not be had.
    #[error("cannot start a queue's thread: {0}")]
    Thread(#[from] io::Error),
}

/// A paravirtual GPU for guests whose memory is an `M`: any of `vm-memory`'s, with a bitmap of what the device has written
/// (`GuestMemoryAtomic<GuestMemoryMmap<AtomicBitmap>>`) or without one.
pub struct Device<M = GuestMemoryAtomic<GuestMemoryMmap>>
where
    M: GuestAddressSpace + Send + Sync + 'static,
{
    driver: Arc<dyn HostDriver>,
    aperture: Option<Arc<Aperture>>,
    /// For mappings with pages of the guest; none with an aperture.
    scratch: Option<Arc<Scratch>>,
    config: ConfigSpace,
    poll: Duration,
    limits: Limits,
    worker_time: Duration,
    queue_sizes: Vec<u16>,
    doorbells: Vec<Arc<Bell>>,
    counters: Arc<Counters>,
    trace: Arc<Trace>,
    monitor: Monitor,
    off: Arc<AtomicBool>,
    system_calls: Vec<Allowed>,
    filter: Filter,
    active: Option<Active<M>>,
}

/// What exists between activation and reset.
struct Active<M> {
    session: Arc<Session>,
    queues: Vec<Arc<RequestQueue<M>>>,
    events: Arc<EventQueue<M>>,
    threads: Vec<JoinHandle<()>>,
    /// Whether the guest has accepted VIRTIO_F_EVENT_IDX.
    event_idx: bool,
    closing: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
}

/// A request queue and where its responses go.
struct RequestQueue<M> {
    ring: Virtqueue<M>,
    /// Where requests are copied to, while no thread is at it.
    buffer: Mutex<Vec<u8>>,
    trace: Arc<Trace>,
}

impl<M: GuestAddressSpace + Send + Sync + 'static> Device<M> {
    /// A device that is not active yet. Fails when the eventfds of its queues cannot be had, or the sandbox.
    pub fn new(
        driver: Arc<dyn HostDriver>,
        aperture: Option<Aperture>,
        config: DeviceConfig,
    ) -> io::Result<Self> {
        let queues = usize::from(config.request_queues) + 1;
        let doorbells = match config.doorbell {
            Doorbell::Inline => Vec::new(),
            Doorbell::Worker => (0..config.request_queues)
                .map(|_| Bell::new().map(Arc::new))
                .collect::<Result<_, _>>()?,
        };
        let counters = Arc::<Counters>::default();
        let trace = Arc::new(Trace::new(Arc::clone(&counters)));
        if let Some(file) = config.trace {
            trace
                .start(file, config.trace_limit)
                .map_err(io::Error::other)?;
        }
        let mut system_calls = [THREAD, DEVICE].concat();
        if config.sandbox == Sandbox::On {
            system_calls.extend(driver.system_calls()?);
        }
        Ok(Self {
            filter: Filter::new(config.sandbox, &system_calls)?,
            system_calls,
            monitor: Monitor::new(driver.identity(), config.limits, &counters, &trace),
            driver,
            scratch: match aperture {
                Some(_) => None,
                None => Some(Arc::new(Scratch::new()?)),
            },
            aperture: aperture.map(Arc::new),
            config: ConfigSpace {
                magic: CONFIG_MAGIC.into(),
                version: VERSION.into(),
                request_queues: config.request_queues.into(),
            },
            poll: config.poll,
            limits: config.limits,
            worker_time: config.worker_time,
            queue_sizes: vec![config.queue_size; queues],
            doorbells,
            counters,
            trace,
            off: Arc::default(),
            active: None,
        })
    }

    /// The virtio feature bits that it offers.
    pub fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// Most descriptors of each queue: the request queues, then the event queue.
    pub fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Reads the configuration space; bytes beyond it are zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = self.config.as_bytes().iter().copied().skip(offset);
        data.iter_mut()
            .zip(config.chain(std::iter::repeat(0)))
            .for_each(|(to, from)| *to = from);
    }

    /// Replaces the aperture that the guest's next session is to have; this one ends.
    pub fn set_aperture(&mut self, aperture: Option<Aperture>) {
        self.reset();
        self.aperture = aperture.map(Arc::new);
    }

    /// Starts a session on these queues, one for each of [`Device::queue_max_sizes`]. Queues that the guest has not
    /// made ready are left alone.
    pub fn activate(
        &mut self,
        memory: M,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), ActivateError> {
        self.reset();
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(ActivateError::Features);
        }
        if queues.len() != self.queue_sizes.len() {
            return Err(ActivateError::Queues(queues.len(), self.queue_sizes.len()));
        }
        let broken = queues
            .iter()
            .position(|queue| queue.ready() && !queue.is_valid(&*memory.memory()));
        if let Some(index) = broken {
            return Err(ActivateError::Memory(index));
        }
        let closing = Arc::new(AtomicBool::new(false));
        let scratch = self.scratch.as_ref();
        let pages = scratch.map(|scratch| Pages::new(memory.clone(), scratch));
        let broken = Arc::new(AtomicBool::new(false));
        let shared = Shared {
            memory,
            interrupt,
            counters: Arc::clone(&self.counters),
            broken: Arc::clone(&broken),
            closing: Arc::clone(&closing),
            off: Arc::clone(&self.off),
        };
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = (0..).zip(queues).map(|(index, mut queue)| {
            queue.set_event_idx(event_idx);
            Virtqueue::new(index, queue, shared.clone())
        });
        let requests = self.config.request_queues.get();
        let queues = rings.by_ref().take(requests.into()).map(|ring| {
            Arc::new(RequestQueue {
                ring,
                buffer: Mutex::default(),
                trace: Arc::clone(&self.trace),
            })
        });
        let queues = queues.collect();
        let events = rings.next().map(EventQueue::new).map(Arc::new);
        // There is one more queue than request queues.
        let events = events.ok_or(ActivateError::Queues(0, self.queue_sizes.len()))?;
        let report: Report = Arc::clone(&events) as _;
        let session = Session::with_counters(
            Arc::clone(&self.driver),
            self.aperture.clone(),
            self.limits,
            self.worker_time,
            pages,
            Some(report),
            Arc::clone(&self.counters),
            self.filter.clone(),
        );
        let session = Arc::new(session);
        // From here on, a reset undoes everything.
        self.monitor.watch(Some(Arc::clone(&session)));
        self.active = Some(Active {
            session,
            queues,
            events,
            threads: Vec::new(),
            event_idx,
            closing,
            broken,
        });
        (0..requests)
            .try_for_each(|index| self.start_thread(index))
            .map_err(|error| {
                self.reset();
                error.into()
            })
    }

    /// Starts a queue that was not ready at activation: where a front end starts one after the other. A queue that the device has
    /// not, or that is ready already, is left alone.
    pub fn start_queue(&mut self, index: u16, mut queue: Queue) -> Result<(), ActivateError> {
        let requests = self.config.request_queues.get();
        let Some(active) = &self.active else {
            return Ok(());
        };
        queue.set_event_idx(active.event_idx);
        let ring = match active.queues.get(usize::from(index)) {
            Some(queue) => &queue.ring,
            None if index == requests => active.events.ring(),
            None => return Ok(()),
        };
        if ring.ready() || !queue.ready() {
            return Ok(());
        }
        if !queue.is_valid(&*ring.memory()) {
            return Err(ActivateError::Memory(index.into()));
        }
        ring.start(queue);
        if index == requests {
            active.events.notified();
            return Ok(());
        }
        Ok(self.start_thread(index)?)
    }

    /// Whether there is a session.
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Starts the thread of a request queue, if this device has a doorbell for it and the guest has made it ready.
    fn start_thread(&mut self, index: u16) -> io::Result<()> {
        let index = usize::from(index);
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let (Some(queue), Some(bell)) = (active.queues.get(index), self.doorbells.get(index))
        else {
            return Ok(());
        };
        if queue.ring.ready() {
            let (queue, session) = (Arc::clone(queue), Arc::clone(&active.session));
            let (bell, poll) = (Arc::clone(bell), self.poll);
            let name = format!("pvgpu-queue{index}");
            let serve = move || queue.serve(&session, &bell, poll);
            active.threads.push(self.filter.spawn(name, serve)?);
        }
        Ok(())
    }

    /// The system calls that its methods make on the thread that calls them, for a VMM that filters its own threads: what
    /// it puts into its filter beside its own ([`Filter::new`], or another library's). Without the sandbox, those of the
    /// host driver are not among them.
    pub fn system_calls(&self) -> &[Allowed] {
        &self.system_calls
    }

    /// What an ioeventfd signals for that queue; `None` when [`Device::notify`] handles its doorbell itself: always for the
    /// event queue, since a guest is asked to ring there only when the device needs a buffer.
    pub fn doorbell(&self, queue: u16) -> Option<&EventFd> {
        self.doorbells
            .get(usize::from(queue))
            .map(|bell| bell.eventfd())
    }

    /// Lets another descriptor ring the doorbell of that queue too, for as long as `watch` is not called again: one that a front end in
    /// another process has chosen. `None` takes it away. Fails for a file that cannot be waited for.
    pub fn watch_doorbell(&self, queue: u16, ring: Option<File>) -> io::Result<()> {
        match self.doorbells.get(usize::from(queue)) {
            Some(bell) => bell.watch(ring),
            None => Ok(()),
        }
    }

    /// The guest has rung the doorbell of that queue.
    pub fn notify(&self, queue: u16) {
        if let Some(eventfd) = self.doorbell(queue) {
            // It fails only when the counter is full, and then the thread wakes anyway, and counts.
            let _ = eventfd.write(1);
            return;
        }
        self.counters.doorbells.fetch_add(1, Ordering::Relaxed);
        let Some(active) = &self.active else { return };
        match active.queues.get(usize::from(queue)) {
            Some(queue) => queue.drain(&active.session),
            None if queue == self.config.request_queues.get() => {
                active.events.notified();
            }
            None => {}
        }
    }

    /// Whether the guest has broken a ring and must reset the device: what the transport shows as DEVICE_NEEDS_RESET in the
    /// device's status. [`Interrupt::signal_config`] says when it becomes true; a reset ends it.
    pub fn needs_reset(&self) -> bool {
        let active = self.active.as_ref();
        active.is_some_and(|active| active.broken.load(Ordering::Acquire))
    }

    /// Set this from any thread, and [`Device::notify`] comes back after at most a queue full of requests: a guest can
    /// keep it busy for ever with requests that never end. For a VMM that ends; it is never taken back.
    pub fn off_switch(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.off)
    }

    /// Ends the session: everything that the guest had is closed and unmapped when this returns.
    pub fn reset(&mut self) {
        self.stop();
    }

    /// As [`Device::reset`]. Returns how far it has come in the available ring of each queue; of none, if it was not active.
    pub fn stop(&mut self) -> Vec<u16> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        active.closing.store(true, Ordering::Release);
        for bell in &self.doorbells {
            let _ = bell.eventfd().write(1);
        }
        for thread in active.threads {
            if thread.join().is_err() {
                log::error!("a queue's thread has panicked");
            }
        }
        active.session.end();
        self.monitor.watch(None);
        if let Some(aperture) = &self.aperture {
            aperture.discard();
        }
        let rings = active.queues.iter().map(|queue| &queue.ring);
        rings
            .chain([active.events.ring()])
            .map(Virtqueue::next_available)
            .collect()
    }

    /// What the device has counted since it was made, and what its session uses now.
    pub fn statistics(&self) -> Statistics {
        self.monitor.statistics()
    }

    /// What tells the same, and switches the trace, from any thread and without the device.
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }
}

impl<M: GuestAddressSpace + Send + Sync + 'static> Drop for Device<M> {
    fn drop(&mut self) {
        self.reset();
    }
}

impl<M: GuestAddressSpace + Send + Sync + 'static> RequestQueue<M> {
    /// The queue's thread: handles requests, polls for more, then sleeps until the doorbell rings.
    fn serve(self: &Arc<Self>, session: &Session, bell: &Bell, longest: Duration) {
        let mut buffer = Vec::new();
        // Polling adapts: as long as requests come while it polls, it goes on; otherwise it polls less.
        let mut poll = longest;
        while !self.ring.closing() {
            self.ring.set_notification(false);
            let deadline = Instant::now() + poll;
            let found = loop {
                // The clock may cost a system call: it is read once in a while.
                if (0..CLOCK_PERIOD).any(|_| self.handle_available(session, &mut buffer)) {
                    break true;
                }
                if self.ring.closing() {
                    return;
                }
                if Instant::now() >= deadline {
                    break false;
                }
            };
            if found {
                poll = longest;
                continue;
            }
            poll = (poll / 2).max(longest / 16);
            if !self.ring.set_notification(true) {
                bell.wait();
                self.ring
                    .counters()
                    .doorbells
                    .fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Handles requests on the calling thread until there are no more.
    fn drain(self: &Arc<Self>, session: &Session) {
        let spare = || self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = std::mem::take(&mut *spare());
        loop {
            self.ring.set_notification(false);
            self.handle_available(session, &mut buffer);
            // Asking for doorbells tells whether there are more.
            if self.ring.ends() || !self.ring.set_notification(true) {
                break;
            }
        }
        *spare() = buffer;
    }

    /// Handles the requests that are there now, at most a queue full of them, then interrupts the guest once if it
    /// wants that. Returns whether there was any.
    fn handle_available(self: &Arc<Self>, session: &Session, buffer: &mut Vec<u8>) -> bool {
        let memory = self.ring.memory();
        let limit = usize::try_from(session.limits().message).unwrap_or(usize::MAX);
        let mut used = false;
        let mut found = false;
        for _ in 0..self.ring.available(&memory) {
            if self.ring.closing() {
                return false;
            }
            // Another vCPU may have taken the last ones meanwhile.
            let Some(chain) = self.ring.pop(&memory) else {
                break;
            };
            found = true;
            let (writable, length) = match copy_in(chain, buffer, limit) {
                Ok(copied) if copied.0.length() >= RESPONSE_HEADER => copied,
                Ok((writable, _)) => {
                    self.ring.discard(&memory, writable.head());
                    continue;
                }
                Err((head, malformed)) => {
                    if malformed == Malformed::TooLong {
                        self.ring.counters().reached(Limit::Message);
                    }
                    self.ring.discard(&memory, head);
                    continue;
                }
            };
            let request = buffer.get(..length).unwrap_or_default();
            let arrival = self.trace.arrival();
            let room = writable.length();
            let mut later = Some(writable);
            let response = session.perform(request, room, || {
                let (queue, writable) = (Arc::clone(self), later.take());
                let traced = arrival.map(|arrival| (arrival, request.to_vec()));
                Box::new(move |response| {
                    let Some(writable) = writable else { return };
                    let memory = queue.ring.memory();
                    queue.complete(&memory, &writable, &response);
                    if let Some((arrival, request)) = traced {
                        queue.record(arrival, &request, &response);
                    }
                    queue.ring.interrupt(&memory);
                })
            });
            if let (Some(response), Some(writable)) = (response, later) {
                self.complete(&memory, &writable, &response);
                if let Some(arrival) = arrival {
                    self.record(arrival, request, &response);
                }
                used = true;
            }
        }
        if used {
            self.ring.interrupt(&memory);
        }
        found
    }

    /// Writes a response and puts its chain into the used ring.
    fn complete(&self, memory: &M::M, writable: &Writable, response: &Response) {
        let written = response.write(|offset, bytes| writable.write(memory, offset, bytes));
        let length = match written {
            Ok(()) => u32::try_from(response.length()).unwrap_or(0),
            Err(_) => 0,
        };
        self.ring
            .counters()
            .completed
            .fetch_add(1, Ordering::Relaxed);
        self.ring.add_used(memory, writable.head(), length);
    }

    fn record(&self, arrival: Instant, request: &[u8], response: &Response) {
        self.trace
            .record(self.ring.index, arrival, request, response.result());
    }
}
