//! Mapping with pages of the guest, for a guest without an aperture: what reaches the host at which ioctl, what comes back, and
//! what never does.

use pvgpu_e2e::device_channel::DeviceHost;
use pvgpu_e2e::gate::GateDriver;
use pvgpu_e2e::loopback::Loopback;
use pvgpu_e2e::recording::{Record, Recording, STRIDE};
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{Mapping, ObjectId, Session};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::device::DeviceConfig;
use pvgpu_host_proxy::limit::Limit;
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family::core::{self, GemClose, PrimeFdToHandle, PrimeHandleToFd};
use pvgpu_protocol::family::virtio_gpu::{
    self, Execbuffer, Map, ResourceCreate, TransferToHost, WAIT_NOWAIT, Wait,
};
use pvgpu_protocol::wire::{
    MapPagesRequest, Operation, PAGE_SIZE, PageRange, RequestHeader, ResponseHeader, open,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

const RAM: u64 = 1 << 20;
/// Pages of a buffer of the tests.
const PAGES: u64 = 2;
const IN: u32 = 1;

struct Guest {
    session: Session<'static, Loopback>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    record: Arc<Record>,
    /// Memory of all buffers.
    objects: Arc<File>,
    file: ObjectId,
    caller: Flat,
}

fn ram() -> GuestMemoryAtomic<GuestMemoryMmap> {
    let range = (GuestAddress(0), RAM as usize);
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&[range]).unwrap())
}

impl Guest {
    fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let driver = Recording::default();
        let (record, objects, memory) = (driver.record(), driver.memory(), ram());
        let host = HostSession::without_aperture(Arc::new(driver), memory.clone(), limits, None);
        let mut session = Session::connect(Loopback::new(host.unwrap()), "test").unwrap();
        assert!(session.host().maps_pages);
        let file = session.open(open::RDWR).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: every argument in this file is a live local with pointers to live locals, or null.
        let caller = unsafe { Flat::new() };
        Self {
            session,
            memory,
            record,
            objects,
            file,
            caller,
        }
    }

    fn ioctl<T: IntoBytes + FromBytes>(&mut self, file: ObjectId, command: u32, argument: &mut T) {
        let address = argument as *mut T as u64;
        let result = self.session.ioctl(file, command, address, &mut self.caller);
        assert_eq!(result, Ok(0), "{command:#x}");
    }

    /// A new buffer: its handle.
    fn create(&mut self) -> u32 {
        let mut create = ResourceCreate {
            size: u32::try_from(PAGES * PAGE_SIZE).unwrap(),
            ..Default::default()
        };
        self.ioctl(self.file, virtio_gpu::RESOURCE_CREATE, &mut create);
        create.bo_handle
    }

    /// Asks where the buffer can be mapped.
    fn offset(&mut self, file: ObjectId, handle: u32) -> u64 {
        let mut map = Map {
            handle,
            ..Default::default()
        };
        self.ioctl(file, virtio_gpu::MAP, &mut map);
        assert_eq!(map.offset, u64::from(handle) * STRIDE);
        map.offset
    }

    /// Maps a whole buffer with pages from this one on.
    fn map(&mut self, handle: u32, page: u64) -> Mapping {
        let offset = self.offset(self.file, handle);
        self.try_map(offset, PAGES, page).unwrap()
    }

    fn try_map(&mut self, offset: u64, pages: u64, page: u64) -> Result<Mapping, Errno> {
        let range = PageRange {
            address: (page * PAGE_SIZE).into(),
            length: (pages * PAGE_SIZE).into(),
        };
        let length = pages * PAGE_SIZE;
        self.session
            .map_pages(self.file, offset, length, 3, &[range])
    }

    fn write(&self, page: u64, bytes: &[u8]) {
        let memory = self.memory.memory();
        memory
            .write_slice(bytes, GuestAddress(page * PAGE_SIZE))
            .unwrap();
    }

    fn read<const N: usize>(&self, page: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let memory = self.memory.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE))
            .unwrap();
        bytes
    }

    fn gpu_writes(&self, handle: u32, bytes: &[u8]) {
        let offset = u64::from(handle) * STRIDE;
        self.objects.write_all_at(bytes, offset).unwrap();
    }

    fn gpu_reads<const N: usize>(&self, handle: u32) -> [u8; N] {
        let mut bytes = [0; N];
        let offset = u64::from(handle) * STRIDE;
        self.objects.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn execbuffer(&mut self, handles: &[u32]) {
        let mut submit = Execbuffer {
            bo_handles: handles.as_ptr() as u64,
            num_bo_handles: u32::try_from(handles.len()).unwrap(),
            ..Default::default()
        };
        self.ioctl(self.file, virtio_gpu::EXECBUFFER, &mut submit);
    }

    fn transfer(&mut self, bo_handle: u32) {
        let mut transfer = TransferToHost {
            bo_handle,
            ..Default::default()
        };
        self.ioctl(self.file, virtio_gpu::TRANSFER_TO_HOST, &mut transfer);
    }

    fn wait(&mut self, file: ObjectId, handle: u32) {
        let flags = WAIT_NOWAIT;
        self.ioctl(file, virtio_gpu::WAIT, &mut Wait { handle, flags });
    }

    fn export(&mut self, handle: u32) -> ObjectId {
        let mut export = PrimeHandleToFd {
            handle,
            ..Default::default()
        };
        self.ioctl(self.file, core::PRIME_HANDLE_TO_FD, &mut export);
        ObjectId(export.fd)
    }

    fn import(&mut self, file: ObjectId, object: ObjectId) -> u32 {
        let mut import = PrimeFdToHandle {
            fd: object.0,
            ..Default::default()
        };
        self.ioctl(file, core::PRIME_FD_TO_HANDLE, &mut import);
        import.handle
    }

    fn close(&mut self, handle: u32) {
        let mut close = GemClose { handle, pad: 0 };
        self.ioctl(self.file, core::GEM_CLOSE, &mut close);
    }

    fn mapped(&mut self) -> u64 {
        self.session.channel().session().usage().mapped
    }
}

#[test]
fn what_a_guest_writes_reaches_the_buffers_that_an_execbuffer_or_a_transfer_names_and_no_others() {
    let mut guest = Guest::new();
    let buffers = [guest.create(), guest.create(), guest.create()];
    for (page, buffer) in (0..).step_by(2).zip(buffers) {
        guest.map(buffer, page);
        guest.write(page, b"old");
    }
    guest.execbuffer(&buffers[..2]);
    assert_eq!(
        buffers.map(|buffer| guest.gpu_reads(buffer)),
        [*b"old", *b"old", [0; 3]]
    );
    for page in [0, 2, 4] {
        guest.write(page, b"new");
    }
    guest.transfer(buffers[2]);
    assert_eq!(
        buffers.map(|buffer| guest.gpu_reads(buffer)),
        [*b"old", *b"old", *b"new"]
    );
}

#[test]
fn what_the_gpu_writes_is_there_after_a_wait_for_that_buffer() {
    let mut guest = Guest::new();
    let buffers = [guest.create(), guest.create()];
    guest.gpu_writes(buffers[0], b"before");
    for (page, buffer) in [(0, buffers[0]), (2, buffers[1])] {
        guest.map(buffer, page);
    }
    assert_eq!((guest.read(0), guest.read(2)), (*b"before", [0; 6]));
    for buffer in buffers {
        guest.gpu_writes(buffer, b"drawn!");
    }
    guest.wait(guest.file, buffers[1]);
    assert_eq!((guest.read(0), guest.read(2)), (*b"before", *b"drawn!"));
    guest.wait(guest.file, buffers[0]);
    assert_eq!(guest.read(0), *b"drawn!");
}

#[test]
fn a_part_of_a_buffer_is_mapped_where_it_lies_and_nothing_beyond_it() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let offset = guest.offset(guest.file, buffer);
    let end = offset + PAGE_SIZE;
    guest.objects.write_all_at(b"second", end).unwrap();
    guest.try_map(end, 1, 0).unwrap();
    assert_eq!(guest.read(0), *b"second");
    for (offset, pages) in [
        (end, 2),
        (offset, 3),
        (offset - PAGE_SIZE, 1),
        (offset + STRIDE, 1),
    ] {
        let refused = guest.try_map(offset, pages, 0);
        assert_eq!(refused, Err(Errno::EINVAL), "{pages} pages at {offset:#x}");
    }
}

#[test]
fn a_buffer_is_the_same_under_the_handles_of_two_files_and_as_an_object() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    guest.map(buffer, 0);
    let object = guest.export(buffer);
    let other = guest.session.open(open::RDWR).unwrap();
    let imported = guest.import(other, object);
    guest.gpu_writes(buffer, b"drawn");
    guest.wait(other, imported);
    assert_eq!(guest.read(0), *b"drawn");
    // The object's own memory is elsewhere in this driver: all that counts is when it is copied.
    let range = [PageRange {
        address: (4 * PAGE_SIZE).into(),
        length: PAGE_SIZE.into(),
    }];
    guest
        .session
        .map_pages(object, 0, PAGE_SIZE, 3, &range)
        .unwrap();
    guest.write(4, b"through the object");
    guest.execbuffer(&[buffer]);
    let mut found = [0; 18];
    guest.objects.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found, *b"through the object");
}

#[test]
fn a_mapping_outlives_its_handle_and_is_synchronized_through_another_one() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let mapping = guest.map(buffer, 0);
    let object = guest.export(buffer);
    guest.close(buffer);
    let offset = u64::from(buffer) * STRIDE;
    assert_eq!(guest.try_map(offset, 1, 4), Err(Errno::EINVAL));
    guest.gpu_writes(buffer, b"drawn");
    assert_eq!(guest.read(0), [0; 5]);
    let again = guest.import(guest.file, object);
    guest.wait(guest.file, again);
    assert_eq!(guest.read(0), *b"drawn");
    assert_eq!(guest.session.unmap(mapping), Ok(()));
}

#[test]
fn what_a_guest_has_written_is_still_in_the_buffer_when_it_is_unmapped_and_mapped_again() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let mapping = guest.map(buffer, 0);
    guest.write(0, b"kept");
    guest.session.unmap(mapping).unwrap();
    assert_eq!(guest.gpu_reads(buffer), *b"kept");
    guest.map(buffer, 4);
    assert_eq!(guest.read(4), *b"kept");
}

#[test]
fn what_the_gpu_writes_is_there_when_the_buffers_object_is_ready() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    guest.map(buffer, 0);
    let object = guest.export(buffer);
    guest.gpu_writes(buffer, b"drawn");
    assert_eq!(guest.session.poll(object, IN, 0), Ok(0));
    assert_eq!(guest.read(0), [0; 5]);
    guest.record.set_ready(IN);
    assert_eq!(guest.session.poll(object, IN, 0), Ok(IN));
    assert_eq!(guest.read(0), *b"drawn");
}

#[test]
fn nothing_is_copied_once_a_mapping_is_removed_or_the_session_has_ended() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let removed = guest.map(buffer, 0);
    guest.map(buffer, 2);
    guest.session.unmap(removed).unwrap();
    assert_eq!(guest.session.unmap(removed), Err(Errno::EINVAL));
    guest.gpu_writes(buffer, b"drawn");
    guest.wait(guest.file, buffer);
    assert_eq!((guest.read(0), guest.read(2)), ([0; 5], *b"drawn"));
    guest.session.channel().session().end();
    assert_eq!(guest.mapped(), 0);
    guest.gpu_writes(buffer, b"later");
    let mut wait = Wait {
        handle: buffer,
        flags: WAIT_NOWAIT,
    };
    let address = &raw mut wait as u64;
    let file = guest.file;
    let result = guest
        .session
        .ioctl(file, virtio_gpu::WAIT, address, &mut guest.caller);
    assert_eq!(result, Err(Errno::ENODEV));
    assert_eq!(guest.read(2), *b"drawn");
}

#[test]
fn pages_outside_of_the_guests_memory_are_efault_and_leave_nothing_booked() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let offset = guest.offset(guest.file, buffer);
    for page in [
        RAM / PAGE_SIZE,
        RAM / PAGE_SIZE - 1,
        u64::MAX / PAGE_SIZE - 1,
    ] {
        assert_eq!(
            guest.try_map(offset, PAGES, page),
            Err(Errno::EFAULT),
            "{page:#x}"
        );
    }
    assert_eq!(guest.mapped(), 0);
    guest.map(buffer, RAM / PAGE_SIZE - PAGES);
    assert_eq!(guest.mapped(), PAGES * PAGE_SIZE);
}

#[test]
fn bytes_mapped_over_the_limit_are_enomem_until_some_are_unmapped() {
    let mut guest = Guest::with_limits(Limits {
        mapped: 3 * PAGE_SIZE,
        ..Limits::default()
    });
    let buffer = guest.create();
    let offset = guest.offset(guest.file, buffer);
    let first = guest.try_map(offset, 2, 0).unwrap();
    assert_eq!(guest.try_map(offset, 2, 2), Err(Errno::ENOMEM));
    let statistics = guest.session.channel().session().statistics();
    assert_eq!(statistics.reached(Limit::Mapped), 1);
    guest.session.unmap(first).unwrap();
    guest.try_map(offset, 2, 2).unwrap();
}

#[test]
fn requests_that_the_protocol_forbids_get_their_errno() {
    let mut guest = Guest::new();
    let buffer = guest.create();
    let offset = guest.offset(guest.file, buffer);
    let page = PageRange {
        address: 0.into(),
        length: PAGE_SIZE.into(),
    };
    let valid = MapPagesRequest {
        offset: offset.into(),
        length: PAGE_SIZE.into(),
        protection: 3.into(),
        ranges: 1.into(),
    };
    let mut send = |object: ObjectId, body: MapPagesRequest, payload: &[u8]| {
        let header = RequestHeader::new(Operation::MapPages, object.0.cast_unsigned(), 9);
        let request = [header.as_bytes(), body.as_bytes(), payload].concat();
        let response = guest.session.channel().raw(&request, 64);
        let (header, _) = ResponseHeader::read_from_prefix(&response).unwrap();
        Errno::new(-header.result.get())
    };
    let file = guest.file;
    for (body, payload, errno) in [
        (
            MapPagesRequest {
                protection: 4.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
        (
            MapPagesRequest {
                offset: 1.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
        (
            MapPagesRequest {
                length: 0.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
        (
            MapPagesRequest {
                offset: (!0xfff).into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EOVERFLOW,
        ),
        (
            MapPagesRequest {
                ranges: 65_537.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::E2BIG,
        ),
        (
            MapPagesRequest {
                ranges: 2.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
        (
            MapPagesRequest {
                ranges: 0.into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
        (valid, &page.as_bytes()[..15], Errno::EINVAL),
        (valid, &[], Errno::EINVAL),
        (
            MapPagesRequest {
                length: (2 * PAGE_SIZE).into(),
                ..valid
            },
            page.as_bytes(),
            Errno::EINVAL,
        ),
    ] {
        assert_eq!(send(file, body, payload), errno, "{body:?}");
    }
    assert_eq!(send(ObjectId(99), valid, page.as_bytes()), Errno::EBADF);
    assert_eq!(guest.mapped(), 0);
}

#[test]
fn only_a_guest_that_can_and_a_driver_with_points_of_synchronization_have_it_and_only_without_an_aperture()
 {
    let aperture = Arc::new(Aperture::reserve(1 << 20).unwrap());
    let limits = Limits::default();
    let with_aperture = HostSession::new(Arc::new(Recording::default()), Some(aperture), limits);
    let without_memory = HostSession::new(Arc::new(Recording::default()), None, limits);
    let vgem = HostSession::without_aperture(Arc::new(GateDriver::default()), ram(), limits, None);
    for host in [with_aperture, without_memory, vgem.unwrap()] {
        let mut session = Session::connect(Loopback::new(host), "test").unwrap();
        assert!(!session.host().maps_pages, "{:?}", session.host().driver);
        let file = session.open(open::RDWR).unwrap();
        let range = [PageRange {
            address: 0.into(),
            length: PAGE_SIZE.into(),
        }];
        let refused = session.map_pages(file, 0, PAGE_SIZE, 3, &range);
        assert_eq!(refused, Err(Errno::ENODEV));
    }
    // A guest that does not know of it.
    let host = HostSession::without_aperture(Arc::new(Recording::default()), ram(), limits, None);
    let mut channel = Loopback::new(host.unwrap());
    let hello = Hello {
        features: 0,
        ..Hello::new("old")
    };
    let mut record = [0; 64];
    let length = control::encode(&hello, &mut record).unwrap();
    let header = RequestHeader::new(Operation::Hello, 0, 1);
    let response = channel.raw(&[header.as_bytes(), &record[..length]].concat(), 4096);
    // Result, then version and features of the reply.
    assert_eq!(
        (&response[8..12], &response[16..18]),
        (&[0; 4][..], &[1, 0][..])
    );
}

#[test]
fn a_device_takes_pages_of_the_guest_exactly_while_it_has_no_aperture() {
    let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
    let mut host = DeviceHost::with_aperture(driver, DeviceConfig::default(), false).unwrap();
    for aperture in [false, true, false] {
        host.set_aperture(aperture).unwrap();
        let session = Session::connect(host.activate().unwrap(), "test").unwrap();
        let says = session.host();
        assert_eq!((says.aperture > 0, says.maps_pages), (aperture, !aperture));
    }
}
