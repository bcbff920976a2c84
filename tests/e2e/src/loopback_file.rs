//! A DRM device file behind guest driver and host proxy, both in this process: everything of pvgpu but the virtqueue
//! and the VM. The scenarios draw through it in tests that need neither KVM nor a guest.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use pvgpu_guest_driver::channel::Channel;
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{Mapping, ObjectId, Session};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::aperture::{Aperture, Reservation};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::{PageRange, open, protection};
use pvgpu_scenarios::DeviceFile;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::loopback::Loopback;

/// Room for the buffers of every scenario.
const APERTURE: u64 = 256 << 20;

/// What the files of one guest share.
struct Guest {
    session: RefCell<Session<'static, Loopback>>,
    memory: Memory,
    /// Bytes of the guest's own memory that it has mapped with; none are used again.
    used: Cell<u64>,
}

/// Where mappings are.
enum Memory {
    Aperture(Arc<Reservation>),
    /// In the guest's own memory.
    Guest(GuestMemoryAtomic<GuestMemoryMmap>),
}

/// An open file.
pub struct LoopbackFile {
    guest: Rc<Guest>,
    file: ObjectId,
}

impl LoopbackFile {
    /// A new guest of that host driver, with one file.
    pub fn open(driver: Arc<dyn HostDriver>) -> io::Result<Self> {
        let reservation = Arc::new(Reservation::new(APERTURE)?);
        let aperture = Arc::new(Aperture::new(Arc::clone(&reservation) as _));
        let channel = Loopback::watching(driver, Some(aperture), Limits::default());
        Self::connect(channel, Memory::Aperture(reservation))
    }

    /// As [`LoopbackFile::open`], but the guest has no aperture, and maps with pages of its own.
    pub fn open_without_aperture(driver: Arc<dyn HostDriver>) -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), APERTURE as usize)]);
        let memory = GuestMemoryAtomic::new(memory.map_err(io::Error::other)?);
        let limits = Limits::default();
        let session = HostSession::without_aperture(driver, memory.clone(), limits, None)?;
        Self::connect(Loopback::new(session), Memory::Guest(memory))
    }

    fn connect(channel: Loopback, memory: Memory) -> io::Result<Self> {
        let session = Session::connect(channel, "loopback").map_err(io::Error::other)?;
        let guest = Rc::new(Guest {
            session: RefCell::new(session),
            memory,
            used: Cell::new(0),
        });
        Self::open_in(&guest).map_err(io::Error::other)
    }

    /// The events that are there of what a file descriptor stands for; if there are none, [`LoopbackFile::event`] gives
    /// them later, with this id.
    pub fn watch(&self, id: u64, fd: i32, events: u32) -> Result<u32, Errno> {
        let mut session = self.guest.session.borrow_mut();
        session.watch(id, ObjectId(fd), events)
    }

    /// Ends a watch.
    pub fn cancel(&self, id: u64) -> Result<(), Errno> {
        self.guest.session.borrow_mut().cancel(id)
    }

    /// Waits for the next event: its id, and what is there.
    pub fn event(&self) -> (u64, u32) {
        let event = self.guest.session.borrow_mut().channel().event().event();
        (event.id.get(), event.events.get())
    }

    /// Whether an event has come already.
    pub fn has_event(&self) -> bool {
        let mut session = self.guest.session.borrow_mut();
        session.channel().event_now().is_some()
    }

    fn open_in(guest: &Rc<Guest>) -> Result<Self, Errno> {
        let file = guest.session.borrow_mut().open(open::RDWR)?;
        Ok(Self {
            guest: Rc::clone(guest),
            file,
        })
    }
}

impl Drop for LoopbackFile {
    fn drop(&mut self) {
        // As close(2) in a destructor: nobody is there to hear of an error.
        let _ = self.guest.session.borrow_mut().close(self.file);
    }
}

impl DeviceFile for LoopbackFile {
    type Mapping = LoopbackMapping;

    fn open_again(&self) -> Result<Self, Errno> {
        Self::open_in(&self.guest)
    }

    fn ioctl<T: FromBytes + IntoBytes>(
        &mut self,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno> {
        // SAFETY: the scenario's promise (`DeviceFile::ioctl`): its pointers are addresses of memory that it keeps.
        let mut caller = unsafe { Flat::new() };
        let address = std::ptr::from_mut(argument).expose_provenance() as u64;
        let mut session = self.guest.session.borrow_mut();
        session.ioctl(self.file, command, address, &mut caller)
    }

    fn map(&mut self, offset: u64, length: usize) -> Result<LoopbackMapping, Errno> {
        let access = protection::READ | protection::WRITE;
        let mut session = self.guest.session.borrow_mut();
        let length = length as u64;
        let (mapping, place) = match &self.guest.memory {
            Memory::Aperture(_) => {
                let mapping = session.map(self.file, offset, length, access)?;
                (mapping, mapping.aperture_offset)
            }
            Memory::Guest(_) => {
                let place = self.guest.used.get();
                let pages = PageRange {
                    address: place.into(),
                    length: length.into(),
                };
                self.guest.used.set(place + length);
                let mapping = session.map_pages(self.file, offset, length, access, &[pages])?;
                (mapping, place)
            }
        };
        Ok(LoopbackMapping {
            guest: Rc::clone(&self.guest),
            mapping,
            place,
        })
    }

    fn close_fd(&mut self, fd: i32) -> Result<(), Errno> {
        self.guest.session.borrow_mut().close(ObjectId(fd))
    }

    fn now_ns(&self) -> u64 {
        self.guest.session.borrow_mut().channel().now_ns()
    }
}

/// A buffer object in the aperture, or in pages of the guest.
pub struct LoopbackMapping {
    guest: Rc<Guest>,
    mapping: Mapping,
    /// Where it starts in the one or the other.
    place: u64,
}

impl LoopbackMapping {
    /// Address of `length` bytes at `offset`, which must lie inside.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let end = offset.checked_add(length).map(|end| end as u64);
        assert!(
            end.is_some_and(|end| end <= self.mapping.length),
            "{length} bytes at {offset} are outside of {:?}",
            self.mapping
        );
        let place = self.place + offset as u64;
        match &self.guest.memory {
            Memory::Aperture(reservation) => {
                std::ptr::with_exposed_provenance_mut((reservation.host_address() + place) as usize)
            }
            Memory::Guest(memory) => {
                let address = memory.memory().get_host_address(GuestAddress(place));
                address.expect("a mapping lies inside of the guest's memory")
            }
        }
    }
}

impl Drop for LoopbackMapping {
    fn drop(&mut self) {
        // As munmap(2) in a destructor: nobody is there to hear of an error.
        let _ = self.guest.session.borrow_mut().unmap(self.mapping);
    }
}

impl pvgpu_scenarios::Mapping for LoopbackMapping {
    fn len(&self) -> usize {
        self.mapping.length as usize
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range, which aperture or memory keep mapped; `bytes` is not part of it.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }
}
