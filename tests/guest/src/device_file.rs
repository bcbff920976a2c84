//! The GPU's DRM device file as the shared scenarios see it ([`pvgpu_scenarios::DeviceFile`]), over a session of this guest.
#![allow(unsafe_code)]

use alloc::rc::Rc;
use core::cell::RefCell;

use pvgpu_guest_driver::baremetal::SharedMemory;
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{Mapping, ObjectId};
use pvgpu_protocol::Errno;
use pvgpu_protocol::wire::{PageRange, open, protection};
use pvgpu_scenarios::DeviceFile;
use zerocopy::{FromBytes, IntoBytes};

use crate::clock;
use crate::dma::Pages;
use crate::gpu::GuestSession;
use crate::physical::SharedRange;

/// The session that the files of this guest share.
pub type SharedSession = Rc<RefCell<GuestSession>>;

/// An open file.
pub struct GuestFile {
    session: SharedSession,
    aperture: Option<SharedMemory>,
    file: ObjectId,
}

impl GuestFile {
    /// Opens the device.
    pub fn open(session: &SharedSession, aperture: Option<SharedMemory>) -> Result<Self, Errno> {
        let file = session.borrow_mut().open(open::RDWR)?;
        Ok(Self {
            session: Rc::clone(session),
            aperture,
            file,
        })
    }
}

impl Drop for GuestFile {
    fn drop(&mut self) {
        // As close(2) in a destructor: nobody is there to hear of an error.
        let _ = self.session.borrow_mut().close(self.file);
    }
}

impl DeviceFile for GuestFile {
    type Mapping = GuestMapping;

    fn open_again(&self) -> Result<Self, Errno> {
        Self::open(&self.session, self.aperture)
    }

    fn ioctl<T: FromBytes + IntoBytes>(
        &mut self,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno> {
        // SAFETY: the scenario's promise (`DeviceFile::ioctl`): its pointers are addresses of memory that it keeps alive.
        let mut caller = unsafe { Flat::new() };
        let argument = core::ptr::from_mut(argument).expose_provenance() as u64;
        self.session
            .borrow_mut()
            .ioctl(self.file, command, argument, &mut caller)
    }

    fn map(&mut self, offset: u64, length: usize) -> Result<GuestMapping, Errno> {
        let mut session = self.session.borrow_mut();
        let protection = protection::READ | protection::WRITE;
        let Some(aperture) = self.aperture else {
            if !session.host().maps_pages {
                return Err(Errno::ENODEV);
            }
            let pages = Pages::new(length).ok_or(Errno::ENOMEM)?;
            let range = PageRange {
                address: pages.address().into(),
                length: (pages.len() as u64).into(),
            };
            // When it fails, the pages may be the host's, if it has not answered.
            let mapping =
                session.map_pages(self.file, offset, length as u64, protection, &[range])?;
            return Ok(GuestMapping {
                session: Rc::clone(&self.session),
                mapping,
                range: SharedRange::of_pages(&pages),
                pages: Some(pages),
                length,
            });
        };
        let mapping = session.map(self.file, offset, length as u64, protection)?;
        let range = SharedRange::new(aperture, mapping.aperture_offset, mapping.length)
            .filter(|range| range.len() >= length);
        match range {
            Some(range) => Ok(GuestMapping {
                session: Rc::clone(&self.session),
                mapping,
                range,
                pages: None,
                length,
            }),
            None => {
                session.unmap(mapping)?;
                Err(Errno::EPROTO)
            }
        }
    }

    fn close_fd(&mut self, fd: i32) -> Result<(), Errno> {
        self.session.borrow_mut().close(ObjectId(fd))
    }

    fn now_ns(&self) -> u64 {
        clock::now_ns()
    }
}

/// A buffer object in the aperture, or in pages of this guest.
pub struct GuestMapping {
    session: SharedSession,
    mapping: Mapping,
    range: SharedRange,
    pages: Option<Pages>,
    length: usize,
}

impl Drop for GuestMapping {
    fn drop(&mut self) {
        // As munmap(2) in a destructor: nobody is there to hear of an error. The pages are then the host's for ever.
        let unmapped = self.session.borrow_mut().unmap(self.mapping);
        if let (Ok(()), Some(pages)) = (unmapped, self.pages.take()) {
            pages.free();
        }
    }
}

impl pvgpu_scenarios::Mapping for GuestMapping {
    fn len(&self) -> usize {
        self.length
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.range.read(offset, bytes);
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.range.write(offset, bytes);
    }
}
