//! One request queue: slots in memory that the device can reach, the virtqueue of `virtio-drivers` under them, and the
//! decision when a doorbell or an interrupt is needed. Used by [`super::channel`] only.
//!
//! Two things the virtqueue leaves to us. It rings the doorbell by comparing indexes that wrap as if they did not, and
//! it asks for an interrupt with every buffer; so the event index (virtio 1.2, sections 2.7.7 and 2.7.10) is handled
//! here. And it allocates a table for each request when indirect descriptors are negotiated; so they are not: a
//! request takes two descriptors, one for the device to read and one for it to write.
#![allow(unsafe_code)]

use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, Ordering, fence};

use pvgpu_protocol::Errno;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What the port needs of the machine beside memory for devices ([`Hal`]).
///
/// # Safety
///
/// [`Platform::dma_address`] must return what [`Hal::dma_alloc`] returned with that physical address, for any address within
/// the allocation.
pub unsafe trait Platform: Hal {
    /// Where the driver finds memory that the device finds at `address`; it is part of a live `dma_alloc`.
    fn dma_address(address: PhysAddr) -> NonNull<u8>;

    /// Nanoseconds of a clock that never goes back.
    fn now_ns() -> u64;

    /// Number of interrupts so far that may have come from the device; it wraps.
    fn interrupts() -> u32;

    /// Sleeps until [`Platform::interrupts`] is no longer `seen`, or not much longer than `at_most_ns`.
    fn sleep(seen: u32, at_most_ns: u64);
}

/// Size of the virtqueue in descriptors.
pub const QUEUE_SIZE: usize = 128;
/// Requests in flight: each takes two descriptors.
pub const SLOTS: usize = QUEUE_SIZE / 2;
/// Memory that each slot owns in bytes. A request that with its response needs more borrows a larger buffer.
pub const SLOT_SIZE: usize = PAGE_SIZE;
/// Largest request and largest response in bytes: what a host accepts unless it is told otherwise.
pub const MESSAGE_MAX: usize = 4 << 20;
/// The response starts on a cache line of its own.
const CACHE_LINE: usize = 64;
/// While interrupts are unwanted, the used event is kept about this far ahead of what was used.
const FAR_AHEAD: u16 = 0x8000;

/// Pages that device and driver share.
#[derive(Debug)]
struct Pages<P: Hal> {
    physical: PhysAddr,
    start: NonNull<u8>,
    count: usize,
    platform: core::marker::PhantomData<P>,
}

impl<P: Hal> Pages<P> {
    fn new(count: usize) -> Result<Self, Errno> {
        let (physical, start) = P::dma_alloc(count, BufferDirection::Both);
        if physical == 0 {
            return Err(Errno::ENOMEM);
        }
        Ok(Self {
            physical,
            start,
            count,
            platform: core::marker::PhantomData,
        })
    }

    fn size(&self) -> usize {
        self.count * PAGE_SIZE
    }
}

impl<P: Hal> Drop for Pages<P> {
    fn drop(&mut self) {
        // SAFETY: exactly what `dma_alloc` returned in `new`, given back once.
        unsafe { P::dma_dealloc(self.physical, self.start, self.count) };
    }
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nobody has it.
    Free,
    /// The driver writes the request.
    Filling,
    /// The device has it, under this token.
    InFlight,
    /// The device still has it, but nobody waits for the response any more.
    Abandoned,
    /// The device wrote this many bytes of response.
    Complete(usize),
}

/// Room for one request and its response.
#[derive(Debug)]
struct SlotBuffer<P: Hal> {
    state: State,
    /// The slot's own page, or `large`.
    start: NonNull<u8>,
    /// Bytes of request, at `start`.
    request: usize,
    /// Where the response starts.
    response_offset: usize,
    /// Bytes of room for the response.
    response: usize,
    /// A buffer borrowed for a large request.
    large: Option<Pages<P>>,
}

/// One request queue.
///
/// The device must be reset before a queue is dropped, since the queue gives the memory back.
#[derive(Debug)]
pub struct RequestQueue<P: Platform> {
    ring: VirtQueue<P, QUEUE_SIZE>,
    index: u16,
    event_index: bool,
    /// In the driver area: the used index behind which the device interrupts us.
    used_event: NonNull<AtomicU16>,
    /// In the device area: the available index behind which we ring the doorbell.
    avail_event: NonNull<AtomicU16>,
    /// Requests made available so far, and of those the ones that the last look at the doorbell covered; both wrap.
    submitted: u16,
    rung: u16,
    /// Responses taken so far; wraps.
    taken: u16,
    /// `taken` when the used event was last moved out of the way.
    moved: u16,
    /// The device broke the rules: it returned a token that is not in flight.
    broken: bool,
    slots: Vec<SlotBuffer<P>>,
    free: Vec<u16>,
    /// Slot in flight under each token.
    tokens: [Option<u16>; QUEUE_SIZE],
    /// Large buffers that no slot has borrowed.
    spare: Vec<Pages<P>>,
    /// The slots' own pages.
    pages: Pages<P>,
}

// SAFETY: the pointers are to memory that this queue owns (`Pages`, the virtqueue's rings), which any thread may use.
unsafe impl<P: Platform> Send for RequestQueue<P> {}

impl<P: Platform> RequestQueue<P> {
    /// Sets up queue `index` of a device that negotiated `event_index` or not.
    pub fn new<T: Transport>(
        transport: &mut T,
        index: u16,
        event_index: bool,
    ) -> Result<Self, virtio_drivers::Error> {
        let mut placed = Placed {
            transport,
            driver_area: 0,
            device_area: 0,
        };
        // The event index is ours to handle, so the virtqueue is told that there is none.
        let ring = VirtQueue::<P, QUEUE_SIZE>::new(&mut placed, index, false, false)?;
        // The driver area is two u16, the ring of u16, then the used event (virtio 1.2, section 2.7.6); the device area
        // two u16, the ring of two u32, then the available event (section 2.7.8).
        let used_event = placed.driver_area + 4 + 2 * QUEUE_SIZE as u64;
        let avail_event = placed.device_area + 4 + 8 * QUEUE_SIZE as u64;
        let pages = Pages::<P>::new(SLOTS).map_err(|_| virtio_drivers::Error::DmaError)?;
        let slots = (0..SLOTS)
            .map(|slot| SlotBuffer {
                state: State::Free,
                // SAFETY: within the `SLOTS` pages just allocated.
                start: unsafe { pages.start.add(slot * SLOT_SIZE) },
                request: 0,
                response_offset: 0,
                response: 0,
                large: None,
            })
            .collect();
        let queue = Self {
            ring,
            index,
            event_index,
            used_event: P::dma_address(used_event).cast(),
            avail_event: P::dma_address(avail_event).cast(),
            submitted: 0,
            rung: 0,
            taken: 0,
            moved: 0,
            broken: false,
            slots,
            free: (0..SLOTS as u16).rev().collect(),
            tokens: [None; QUEUE_SIZE],
            spare: Vec::new(),
            pages,
        };
        Ok(queue)
    }

    /// Takes a free slot with room for that many bytes of request (at least one) and response. `EAGAIN` when all are in use,
    /// `E2BIG` when either is more than [`MESSAGE_MAX`], `ENOMEM` when there is no memory for it.
    pub fn begin(&mut self, request: usize, response: usize) -> Result<u16, Errno> {
        if request > MESSAGE_MAX || response > MESSAGE_MAX {
            return Err(Errno::E2BIG);
        }
        let request = request.max(1);
        let response_offset = request.next_multiple_of(CACHE_LINE);
        let size = response_offset + response;
        let slot = *self.free.last().ok_or(Errno::EAGAIN)?;
        let large = if size > SLOT_SIZE {
            Some(self.large_buffer(size)?)
        } else {
            None
        };
        let buffer = &mut self.slots[usize::from(slot)];
        if let Some(large) = large {
            buffer.start = large.start;
            buffer.large = Some(large);
        }
        buffer.state = State::Filling;
        buffer.request = request;
        buffer.response_offset = response_offset;
        buffer.response = response;
        self.free.pop();
        Ok(slot)
    }

    /// The smallest spare buffer of at least that size, or a new one: of a power of two, so that it can be used again.
    fn large_buffer(&mut self, size: usize) -> Result<Pages<P>, Errno> {
        let fitting = (0..self.spare.len())
            .filter(|index| self.spare[*index].size() >= size)
            .min_by_key(|index| self.spare[*index].size());
        match fitting {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => Pages::new(size.next_power_of_two() / PAGE_SIZE),
        }
    }

    /// The slot's request, for the driver to write. Empty when the slot is not being filled.
    pub fn request(&mut self, slot: u16) -> &mut [u8] {
        match self.slots.get(usize::from(slot)) {
            Some(buffer) if buffer.state == State::Filling => {
                // SAFETY: the bytes belong to this slot, were zeroed when allocated, and the device does not have them.
                unsafe { core::slice::from_raw_parts_mut(buffer.start.as_ptr(), buffer.request) }
            }
            _ => &mut [],
        }
    }

    /// Makes the first `length` bytes of the slot's request available to the device. `EINVAL` when the slot is not being
    /// filled, or has no such number of bytes.
    pub fn submit(&mut self, slot: u16, length: usize) -> Result<(), Errno> {
        let buffer = self.slots.get_mut(usize::from(slot)).ok_or(Errno::EINVAL)?;
        if buffer.state != State::Filling || length == 0 || length > buffer.request {
            return Err(Errno::EINVAL);
        }
        buffer.request = length;
        let (request, response) = buffer.halves();
        // SAFETY: the memory stays the slot's until `take` has popped the token: while the slot is in flight, nothing here
        // touches it (`request` and `response` look at the state), and `end` refuses it.
        let token = unsafe {
            if response.is_empty() {
                self.ring.add(&[request], &mut [])
            } else {
                self.ring.add(&[request], &mut [response])
            }
        }
        .map_err(|_| Errno::EAGAIN)?;
        buffer.state = State::InFlight;
        self.tokens[usize::from(token)] = Some(slot);
        self.submitted = self.submitted.wrapping_add(1);
        Ok(())
    }

    /// Whether the device wants to be told of what was submitted since the last time this was asked.
    pub fn needs_doorbell(&mut self) -> bool {
        let before = core::mem::replace(&mut self.rung, self.submitted);
        if before == self.submitted {
            return false;
        }
        // The device looks for more requests after it has asked for a doorbell; so must we look at what it asked for after
        // the requests are visible.
        fence(Ordering::SeqCst);
        if self.event_index {
            // SAFETY: within the device area of this live virtqueue; the device writes it, so it is only read atomically.
            let event = unsafe { self.avail_event.as_ref() }.load(Ordering::Relaxed);
            passes(event, before, self.submitted)
        } else {
            self.ring.should_notify()
        }
    }

    /// Takes every response that the device has returned.
    pub fn take(&mut self) {
        while !self.broken {
            let Some(token) = self.ring.peek_used() else {
                break;
            };
            let Some(slot) = self
                .tokens
                .get_mut(usize::from(token))
                .and_then(Option::take)
            else {
                self.broken = true;
                break;
            };
            let buffer = &mut self.slots[usize::from(slot)];
            let (request, response) = buffer.halves();
            let room = response.len();
            // SAFETY: the very buffers that `submit` added under this token.
            let written = unsafe {
                if response.is_empty() {
                    self.ring.pop_used(token, &[request], &mut [])
                } else {
                    self.ring.pop_used(token, &[request], &mut [response])
                }
            };
            let Ok(written) = written else {
                self.broken = true;
                break;
            };
            self.taken = self.taken.wrapping_add(1);
            let abandoned = buffer.state == State::Abandoned;
            buffer.state = State::Complete((written as usize).min(room));
            if abandoned {
                self.end(slot);
            }
        }
    }

    /// Whether the slot's response is there.
    pub fn is_complete(&self, slot: u16) -> bool {
        matches!(
            self.slots.get(usize::from(slot)),
            Some(SlotBuffer {
                state: State::Complete(_),
                ..
            })
        )
    }

    /// Whether the device has the slot.
    #[cfg(test)]
    fn is_in_flight(&self, slot: u16) -> bool {
        matches!(
            self.slots.get(usize::from(slot)),
            Some(SlotBuffer {
                state: State::InFlight,
                ..
            })
        )
    }

    /// Whether the device broke the rules; nothing will complete any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Asks for an interrupt with the next response. False when a response is there already, which then may not interrupt.
    pub fn wants_interrupt(&mut self) -> bool {
        if self.event_index {
            // SAFETY: within the driver area of this live virtqueue; the device only reads it.
            unsafe { self.used_event.as_ref() }.store(self.taken, Ordering::Relaxed);
        } else {
            self.ring.set_dev_notify(true);
        }
        // The device looks at what we asked for after it has returned a response; so must we look for responses after we asked.
        fence(Ordering::SeqCst);
        !self.ring.can_pop()
    }

    /// Asks for no interrupts. With the event index that is a place far ahead, which has to be moved on now and then.
    pub fn wants_no_interrupt(&mut self, at_once: bool) {
        if !at_once && self.taken.wrapping_sub(self.moved) < FAR_AHEAD / 2 {
            return;
        }
        self.moved = self.taken;
        if self.event_index {
            // SAFETY: within the driver area of this live virtqueue; the device only reads it.
            unsafe { self.used_event.as_ref() }
                .store(self.taken.wrapping_add(FAR_AHEAD), Ordering::Relaxed);
        } else {
            self.ring.set_dev_notify(false);
        }
    }

    /// What the device wrote. Empty unless the slot is complete.
    pub fn response(&self, slot: u16) -> &[u8] {
        match self.slots.get(usize::from(slot)) {
            Some(SlotBuffer {
                state: State::Complete(written),
                start,
                response_offset,
                ..
            }) => {
                // SAFETY: the bytes belong to this slot, which the device has given back; `take` bounded their number.
                unsafe {
                    core::slice::from_raw_parts(start.add(*response_offset).as_ptr(), *written)
                }
            }
            _ => &[],
        }
    }

    /// Gives the slot back. One in flight stays taken until the device, which may still write to it, returns it.
    pub fn end(&mut self, slot: u16) {
        let Some(buffer) = self.slots.get_mut(usize::from(slot)) else {
            return;
        };
        match buffer.state {
            State::Free | State::Abandoned => return,
            State::InFlight => {
                buffer.state = State::Abandoned;
                return;
            }
            State::Filling | State::Complete(_) => buffer.state = State::Free,
        }
        if let Some(large) = buffer.large.take() {
            // SAFETY: within the slots' own pages.
            buffer.start = unsafe { self.pages.start.add(usize::from(slot) * SLOT_SIZE) };
            self.spare.push(large);
        }
        self.free.push(slot);
    }

    /// Its number on the device.
    pub fn index(&self) -> u16 {
        self.index
    }
}

impl<P: Hal> SlotBuffer<P> {
    /// Request and response as the virtqueue takes them. They must not outlive the call to it.
    fn halves<'a>(&mut self) -> (&'a [u8], &'a mut [u8]) {
        // SAFETY: two ranges of this slot's own memory that do not overlap (`begin`); the callers are about to give them to the
        // device, or to take them back, and touch nothing of them.
        unsafe {
            (
                core::slice::from_raw_parts(self.start.as_ptr(), self.request),
                core::slice::from_raw_parts_mut(
                    self.start.add(self.response_offset).as_ptr(),
                    self.response,
                ),
            )
        }
    }
}

/// Whether going from index `before` to index `after` passes `event` (`vring_need_event`, virtio 1.2, section 2.7.10).
fn passes(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

/// A transport that remembers where a virtqueue was placed.
struct Placed<'t, T> {
    transport: &'t mut T,
    driver_area: PhysAddr,
    device_area: PhysAddr,
}

impl<T: Transport> Transport for Placed<'_, T> {
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.driver_area = driver_area;
        self.device_area = device_area;
        self.transport
            .queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn device_type(&self) -> DeviceType {
        self.transport.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.transport.read_device_features()
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.transport.write_driver_features(driver_features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.transport.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.transport.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.transport.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.transport.set_status(status);
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.transport.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.transport.requires_legacy_layout()
    }

    fn queue_unset(&mut self, queue: u16) {
        self.transport.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.transport.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.transport.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.transport.read_config_generation()
    }

    fn read_config_space<V: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<V> {
        self.transport.read_config_space(offset)
    }

    fn write_config_space<V: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: V,
    ) -> virtio_drivers::Result<()> {
        self.transport.write_config_space(offset, value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmio::MmioTransport;
    use super::super::mmio::tests::{window, words};
    use super::*;
    use crate::baremetal::fake::Fake;
    use safe_mmio::UniqueMmioPointer;
    use std::vec;

    /// The other side of the rings.
    struct FakeDevice {
        descriptors: u64,
        driver: u64,
        device: u64,
        seen: u16,
        used: u16,
    }

    /// A chain that the device has taken.
    struct Chain {
        head: u16,
        request: Vec<u8>,
        response: u64,
        room: u32,
    }

    impl FakeDevice {
        fn read<T: Copy>(address: u64) -> T {
            // SAFETY: within rings or buffers of the live queue.
            unsafe { core::ptr::with_exposed_provenance::<T>(address as usize).read_volatile() }
        }

        fn write<T>(address: u64, value: T) {
            // SAFETY: within rings or buffers of the live queue.
            unsafe {
                core::ptr::with_exposed_provenance_mut::<T>(address as usize).write_volatile(value)
            };
        }

        fn descriptor(&self, index: u16) -> (u64, u32, u16, u16) {
            let at = self.descriptors + 16 * u64::from(index);
            (
                Self::read(at),
                Self::read(at + 8),
                Self::read(at + 12),
                Self::read(at + 14),
            )
        }

        fn next(&mut self) -> Option<Chain> {
            if Self::read::<u16>(self.driver + 2) == self.seen {
                return None;
            }
            let head: u16 =
                Self::read(self.driver + 4 + 2 * u64::from(self.seen % QUEUE_SIZE as u16));
            self.seen = self.seen.wrapping_add(1);
            let (address, length, flags, next) = self.descriptor(head);
            let request = (0..u64::from(length))
                .map(|offset| Self::read(address + offset))
                .collect();
            let (response, room) = if flags & 1 != 0 {
                let (address, length, flags, _) = self.descriptor(next);
                assert_eq!(flags, 2, "the second descriptor is for the device to write");
                (address, length)
            } else {
                (0, 0)
            };
            Some(Chain {
                head,
                request,
                response,
                room,
            })
        }

        fn complete(&mut self, chain: &Chain, response: &[u8]) {
            assert!(response.len() <= chain.room as usize);
            for (offset, byte) in (0..).zip(response) {
                Self::write(chain.response + offset, *byte);
            }
            self.push(u32::from(chain.head), response.len() as u32);
        }

        fn push(&mut self, id: u32, length: u32) {
            let element = self.device + 4 + 8 * u64::from(self.used % QUEUE_SIZE as u16);
            Self::write(element, id);
            Self::write(element + 4, length);
            self.used = self.used.wrapping_add(1);
            Self::write(self.device + 2, self.used);
        }

        fn set_avail_event(&self, index: u16) {
            Self::write(self.device + 4 + 8 * QUEUE_SIZE as u64, index);
        }

        fn used_event(&self) -> u16 {
            Self::read(self.driver + 4 + 2 * QUEUE_SIZE as u64)
        }
    }

    fn queue() -> (RequestQueue<Fake>, FakeDevice) {
        let mut registers = window();
        let mut transport =
            MmioTransport::from_registers(UniqueMmioPointer::from(&mut registers)).unwrap();
        let queue = RequestQueue::new(&mut transport, 0, true).unwrap();
        drop(transport);
        let words = words(&registers);
        let address =
            |offset: usize| u64::from(words[offset / 4]) | u64::from(words[offset / 4 + 1]) << 32;
        let device = FakeDevice {
            descriptors: address(0x80),
            driver: address(0x90),
            device: address(0xa0),
            seen: 0,
            used: 0,
        };
        (queue, device)
    }

    fn submit(queue: &mut RequestQueue<Fake>, request: &[u8], response: usize) -> u16 {
        let slot = queue.begin(request.len(), response).unwrap();
        queue.request(slot).copy_from_slice(request);
        queue.submit(slot, request.len()).unwrap();
        slot
    }

    #[test]
    fn a_response_arrives_in_the_slot_of_its_request() {
        let (mut queue, mut device) = queue();
        let slot = submit(&mut queue, b"question", 100);
        queue.take();
        assert!(!queue.is_complete(slot));
        let chain = device.next().unwrap();
        assert_eq!(chain.request, b"question");
        assert_eq!(chain.room, 100);
        device.complete(&chain, b"answer");
        queue.take();
        assert!(queue.is_complete(slot));
        assert_eq!(queue.response(slot), b"answer");
        queue.end(slot);
        assert_eq!(queue.response(slot), b"");
    }

    #[test]
    fn responses_out_of_order_reach_their_slots_many_times_around_the_ring() {
        let (mut queue, mut device) = queue();
        for round in 0..2000u32 {
            let requests = [round * 3, round * 3 + 1, round * 3 + 2];
            let slots = requests.map(|request| submit(&mut queue, &request.to_le_bytes(), 8));
            let chains = [
                device.next().unwrap(),
                device.next().unwrap(),
                device.next().unwrap(),
            ];
            for index in [2, 0, 1] {
                device.complete(&chains[index], &chains[index].request);
            }
            queue.take();
            for (slot, request) in slots.into_iter().zip(requests) {
                assert_eq!(queue.response(slot), request.to_le_bytes());
                queue.end(slot);
            }
        }
        assert!(!queue.is_broken());
    }

    #[test]
    fn when_all_slots_are_in_flight_the_next_must_try_again() {
        let (mut queue, mut device) = queue();
        let slots: Vec<u16> = (0..SLOTS).map(|_| submit(&mut queue, b"x", 1)).collect();
        assert_eq!(queue.begin(1, 1), Err(Errno::EAGAIN));
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        queue.take();
        assert_eq!(
            queue.begin(1, 1),
            Err(Errno::EAGAIN),
            "not before the slot is ended"
        );
        queue.end(slots[0]);
        assert_eq!(queue.begin(1, 1), Ok(slots[0]));
    }

    #[test]
    fn a_large_request_borrows_a_buffer_and_brings_it_back() {
        let (mut queue, mut device) = queue();
        for _ in 0..3 {
            let request = vec![7; 1 << 20];
            let slot = submit(&mut queue, &request, 3 << 20);
            let chain = device.next().unwrap();
            assert_eq!(chain.request, request);
            assert_eq!(chain.room, 3 << 20);
            device.complete(&chain, &[9; 5000]);
            queue.take();
            assert_eq!(queue.response(slot), [9; 5000]);
            queue.end(slot);
            assert_eq!(queue.spare.len(), 1);
        }
        assert_eq!(queue.begin(MESSAGE_MAX + 1, 1), Err(Errno::E2BIG));
        assert_eq!(queue.begin(usize::MAX, usize::MAX), Err(Errno::E2BIG));
        let slot = submit(&mut queue, b"small again", 16);
        assert_eq!(device.next().unwrap().request, b"small again");
        assert!(queue.is_in_flight(slot));
    }

    #[test]
    fn a_slot_in_flight_can_neither_be_written_nor_read() {
        let (mut queue, mut device) = queue();
        let slot = submit(&mut queue, b"x", 1);
        assert!(queue.request(slot).is_empty());
        assert!(queue.response(slot).is_empty());
        assert_eq!(queue.submit(slot, 1), Err(Errno::EINVAL));
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        queue.take();
        assert_eq!(queue.response(slot), b"y");
        assert!(queue.request(slot).is_empty());
    }

    #[test]
    fn a_slot_ended_in_flight_is_free_only_when_the_device_returns_it() {
        let (mut queue, mut device) = queue();
        let slots: Vec<u16> = (0..SLOTS).map(|_| submit(&mut queue, b"x", 1)).collect();
        queue.end(slots[3]);
        queue.end(slots[3]);
        assert_eq!(queue.begin(1, 1), Err(Errno::EAGAIN));
        let chains: Vec<Chain> = core::iter::from_fn(|| device.next()).collect();
        device.complete(&chains[3], b"y");
        queue.take();
        assert_eq!(queue.begin(1, 1), Ok(slots[3]));
        assert_eq!(queue.begin(1, 1), Err(Errno::EAGAIN));
    }

    #[test]
    fn only_the_submitted_part_of_a_request_reaches_the_device() {
        let (mut queue, mut device) = queue();
        let slot = queue.begin(1000, 10).unwrap();
        queue.request(slot).fill(1);
        assert_eq!(queue.submit(slot, 1001), Err(Errno::EINVAL));
        assert_eq!(queue.submit(slot, 0), Err(Errno::EINVAL));
        queue.submit(slot, 30).unwrap();
        assert_eq!(device.next().unwrap().request, [1; 30]);
    }

    #[test]
    fn a_device_that_claims_to_have_written_too_much_is_not_believed() {
        let (mut queue, mut device) = queue();
        let slot = submit(&mut queue, b"x", 4);
        let chain = device.next().unwrap();
        device.push(u32::from(chain.head), u32::MAX);
        queue.take();
        assert_eq!(queue.response(slot).len(), 4);
    }

    #[test]
    fn a_token_that_is_not_in_flight_breaks_the_queue() {
        for token in [5, 127, 128, 0xffff] {
            let (mut queue, mut device) = queue();
            let slot = submit(&mut queue, b"x", 4);
            device.push(token, 4);
            queue.take();
            assert!(queue.is_broken());
            assert!(!queue.is_complete(slot));
        }
    }

    #[test]
    fn one_doorbell_covers_all_requests_and_is_not_rung_for_a_busy_device() {
        let (mut queue, mut device) = queue();
        assert!(!queue.needs_doorbell(), "nothing was submitted");
        device.set_avail_event(0);
        for _ in 0..SLOTS {
            submit(&mut queue, b"x", 1);
        }
        assert!(queue.needs_doorbell());
        assert!(!queue.needs_doorbell());
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        queue.take();
        queue.end(
            (0..SLOTS as u16)
                .find(|slot| queue.is_complete(*slot))
                .unwrap(),
        );
        submit(&mut queue, b"x", 1);
        assert!(!queue.needs_doorbell(), "the device asked for none since");
        device.set_avail_event(SLOTS as u16 + 1);
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        queue.take();
        queue.end(
            (0..SLOTS as u16)
                .find(|slot| queue.is_complete(*slot))
                .unwrap(),
        );
        submit(&mut queue, b"x", 1);
        assert!(queue.needs_doorbell());
    }

    #[test]
    fn no_doorbell_is_lost_where_the_index_wraps() {
        assert!(passes(0xfffd, 0xfffb, 2));
        assert!(passes(0xffff, 0xffff, 0));
        assert!(!passes(2, 0xfffb, 2));
        assert!(!passes(100, 5000, 5001));
        assert!(passes(5000, 5000, 5001));
    }

    #[test]
    fn a_polling_driver_keeps_the_interrupt_out_of_reach_for_ever() {
        let (mut queue, mut device) = queue();
        queue.wants_no_interrupt(true);
        for _ in 0..70_000 {
            let slot = submit(&mut queue, b"x", 1);
            let chain = device.next().unwrap();
            let before = device.used;
            device.complete(&chain, b"y");
            assert!(!passes(device.used_event(), before, device.used));
            queue.take();
            queue.wants_no_interrupt(false);
            queue.end(slot);
        }
    }

    #[test]
    fn a_sleeping_driver_is_interrupted_by_the_next_response_and_not_for_one_it_can_see() {
        let (mut queue, mut device) = queue();
        let slots = [submit(&mut queue, b"x", 1), submit(&mut queue, b"x", 1)];
        assert!(queue.wants_interrupt(), "there is nothing to see yet");
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        assert!(passes(device.used_event(), 0, device.used));
        assert!(!queue.wants_interrupt(), "a response is there");
        queue.take();
        assert!(queue.is_complete(slots[0]));
        assert!(queue.wants_interrupt());
        let chain = device.next().unwrap();
        device.complete(&chain, b"y");
        assert!(passes(device.used_event(), 1, device.used));
    }
}
