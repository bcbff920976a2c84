//! A [`Channel`] that drives the host proxy in this process: no VM, no virtqueue, no copy through guest memory.
//!
//! For tests and fuzzing of everything from marshalling to the host driver. Requests that may wait complete from the
//! proxy's own threads, as they do behind a virtqueue.

use pvgpu_guest_driver::channel::{Channel, Slot};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::session::{Pending, Response, Session};
use pvgpu_host_proxy::{Errno, Limits};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Most bytes of a message: more than any session's limit, so that the session's own check is tested.
const MESSAGE_MAX: usize = 64 << 20;
/// How long a wait for what a restarted proxy may have lost takes before the session is told.
const LONG: Duration = Duration::from_millis(10);
/// How long a response may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The proxy's session as a channel.
pub struct Loopback {
    session: Session,
    slots: Vec<Option<Message>>,
    start: Instant,
    interrupted: bool,
    restarted: bool,
    events: Receiver<Pending>,
    submitted: u64,
}

/// A request and its response.
struct Message {
    request: Vec<u8>,
    room: usize,
    response: Option<Vec<u8>>,
    arrives: (Sender<Vec<u8>>, Receiver<Vec<u8>>),
}

impl Loopback {
    /// A channel to that session.
    pub fn new(session: Session) -> Self {
        Self::with_events(session, channel().1)
    }

    /// A channel to a new session that reports events.
    pub fn watching(
        driver: Arc<dyn HostDriver>,
        aperture: Option<Arc<Aperture>>,
        limits: Limits,
    ) -> Self {
        let (report, events) = channel();
        let report = move |event| report.send(event).unwrap_or(());
        let session = Session::with_report(driver, aperture, limits, Arc::new(report));
        Self::with_events(session, events)
    }

    fn with_events(session: Session, events: Receiver<Pending>) -> Self {
        Self {
            session,
            slots: Vec::new(),
            start: Instant::now(),
            interrupted: false,
            restarted: false,
            events,
            submitted: 0,
        }
    }

    /// Waits for the next event.
    pub fn event(&self) -> Pending {
        let event = self.events.recv_timeout(PATIENCE);
        event.expect("an event")
    }

    /// The next event, if there is one already.
    pub fn event_now(&self) -> Option<Pending> {
        self.events.try_recv().ok()
    }

    /// Interrupts the next wait, as a signal does.
    pub fn interrupt_next_wait(&mut self) {
        self.interrupted = true;
    }

    /// From now on `session` has the requests, and the answers to those in flight are lost: what a front end does that outlives
    /// its back end and does not tell the guest.
    pub fn restart(&mut self, session: Session) {
        for message in self.slots.iter_mut().flatten() {
            message.arrives = channel();
        }
        self.session = session;
        self.restarted = true;
    }

    /// Requests that it has carried so far.
    pub fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Slots that were not given back.
    pub fn slots_taken(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Sends a whole message, header included, and returns the response: for requests no guest driver would send.
    pub fn raw(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        let slot = self.begin(request.len(), room).expect("a slot");
        self.request(&slot).copy_from_slice(request);
        self.submit(&slot, request.len()).expect("submitted");
        self.wait(&slot).expect("a response");
        let response = self.response(&slot).to_vec();
        self.end(slot);
        response
    }

    fn message(&mut self, slot: &Slot) -> &mut Message {
        self.slots[slot.0].as_mut().expect("a slot that was begun")
    }
}

/// The bytes of a response, gaps filled with zeros.
fn bytes_of(response: &Response) -> Vec<u8> {
    let mut bytes = vec![0; response.length()];
    let written: Result<(), std::convert::Infallible> = response.write(|offset, part| {
        bytes[offset..offset + part.len()].copy_from_slice(part);
        Ok(())
    });
    let Ok(()) = written;
    bytes
}

impl Channel for Loopback {
    fn max_message(&self) -> usize {
        MESSAGE_MAX
    }

    fn begin(&mut self, request: usize, response: usize) -> Result<Slot, Errno> {
        if request.max(response) > self.max_message() {
            return Err(Errno::E2BIG);
        }
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[index] = Some(Message {
            request: vec![0xa5; request],
            room: response,
            response: None,
            arrives: channel(),
        });
        Ok(Slot(index))
    }

    fn request(&mut self, slot: &Slot) -> &mut [u8] {
        &mut self.message(slot).request
    }

    fn submit(&mut self, slot: &Slot, length: usize) -> Result<(), Errno> {
        let message = self.message(slot);
        let request = message.request[..length].to_vec();
        let (room, sender) = (message.room, message.arrives.0.clone());
        let response = self.session.perform(&request, room, || {
            // The receiver is gone if the test has given up on the request.
            Box::new(move |response| sender.send(bytes_of(&response)).unwrap_or(()))
        });
        self.message(slot).response = response.as_ref().map(bytes_of);
        self.submitted += 1;
        Ok(())
    }

    fn doorbell(&mut self) {}

    fn is_complete(&mut self, slot: &Slot) -> bool {
        let message = self.message(slot);
        if message.response.is_none() {
            message.response = message.arrives.1.try_recv().ok();
        }
        message.response.is_some()
    }

    fn wait(&mut self, slot: &Slot) -> Result<(), Errno> {
        if std::mem::take(&mut self.interrupted) {
            return Err(Errno::EINTR);
        }
        let (patience, late) = match self.restarted {
            true => (LONG, Errno::ETIMEDOUT),
            false => (PATIENCE, Errno::EIO),
        };
        let message = self.message(slot);
        if message.response.is_none() {
            message.response = message.arrives.1.recv_timeout(patience).ok();
        }
        message.response.as_ref().map(drop).ok_or(late)
    }

    fn response(&self, slot: &Slot) -> &[u8] {
        let message = self.slots[slot.0].as_ref();
        message
            .and_then(|message| message.response.as_deref())
            .unwrap_or_default()
    }

    fn end(&mut self, slot: Slot) {
        self.slots[slot.0] = None;
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
