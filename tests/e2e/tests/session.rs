//! What a session promises, in front of a host driver that records what reaches it: bad requests never do.

use pvgpu_e2e::gate::{Gate, GateDriver};
use pvgpu_e2e::loopback::Loopback;
use pvgpu_e2e::recording::{Record, Recording, SIZE, TO_READ};
use pvgpu_guest_driver::channel::Channel;
use pvgpu_guest_driver::flat::Flat;
use pvgpu_guest_driver::session::{ObjectId, Session};
use pvgpu_host_proxy::aperture::Aperture;
use pvgpu_host_proxy::limit::Limit;
use pvgpu_host_proxy::session::Session as HostSession;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family::core::{self, GemClose, PrimeFdToHandle, PrimeHandleToFd};
use pvgpu_protocol::family::soft::{self, Hang, Stream, Submit};
use pvgpu_protocol::family::vgem;
use pvgpu_protocol::family::virtio_gpu::{self, Execbuffer, GetParam, Map, ResourceCreate, Wait};
use pvgpu_protocol::schema::command;
use pvgpu_protocol::wire::{
    IoctlRequest, MapRequest, OpenRequest, Operation, ReadRequest, RequestHeader, ResponseHeader,
    open,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

struct Guest {
    session: Session<'static, Loopback>,
    record: Arc<Record>,
    aperture: Arc<Aperture>,
    file: ObjectId,
    caller: Flat,
}

impl Guest {
    fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let driver = Recording::default();
        let record = driver.record();
        let aperture = Arc::new(Aperture::reserve(1 << 20).unwrap());
        let host = HostSession::new(Arc::new(driver), Some(Arc::clone(&aperture)), limits);
        let mut session = Session::connect(Loopback::new(host), "test").unwrap();
        let file = session.open(open::RDWR).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: every argument in this file is a live local with pointers to live locals, or null.
        let caller = unsafe { Flat::new() };
        Self {
            session,
            record,
            aperture,
            file,
            caller,
        }
    }

    fn ioctl<T: IntoBytes + FromBytes>(
        &mut self,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno> {
        self.ioctl_on(self.file, command, argument)
    }

    fn ioctl_on<T: IntoBytes + FromBytes>(
        &mut self,
        file: ObjectId,
        command: u32,
        argument: &mut T,
    ) -> Result<i32, Errno> {
        let address = argument as *mut T as u64;
        self.session.ioctl(file, command, address, &mut self.caller)
    }

    fn create(&mut self, size: u32) -> Result<u32, Errno> {
        let mut argument = ResourceCreate {
            size,
            ..Default::default()
        };
        self.ioctl(virtio_gpu::RESOURCE_CREATE, &mut argument)?;
        Ok(argument.bo_handle)
    }

    /// Makes a buffer and gives its memory out as an object.
    fn export(&mut self) -> ObjectId {
        let mut export = PrimeHandleToFd {
            handle: self.create(4096).unwrap(),
            ..Default::default()
        };
        self.ioctl(core::PRIME_HANDLE_TO_FD, &mut export).unwrap();
        ObjectId(export.fd)
    }

    /// Sends an ioctl that no guest driver would send, and returns the result of the response.
    fn raw_ioctl(&mut self, command: u32, payload: &[u8]) -> i32 {
        let body = IoctlRequest {
            command: command.into(),
            reserved: 0.into(),
        };
        let file = self.file;
        self.raw(Operation::Ioctl.number(), file, body.as_bytes(), payload)
    }

    fn raw(&mut self, operation: u16, object: ObjectId, body: &[u8], payload: &[u8]) -> i32 {
        let header = RequestHeader {
            operation: operation.into(),
            flags: 0.into(),
            object: (object.0 as u32).into(),
            id: 77.into(),
        };
        let request = [header.as_bytes(), body, payload].concat();
        let response = self.session.channel().raw(&request, 1 << 16);
        let (header, _) = ResponseHeader::read_from_prefix(&response).unwrap();
        assert_eq!(header.id, 77);
        header.result.get()
    }

    /// How often the guest has reached that limit, and that it has reached no other.
    fn reached(&mut self, limit: Limit) -> u64 {
        let statistics = self.session.channel().session().statistics();
        for other in Limit::ALL {
            assert!(
                other == limit || statistics.reached(other) == 0,
                "{other:?}"
            );
        }
        statistics.reached(limit)
    }

    /// Runs `test` and checks that no ioctl reached the host driver in it.
    fn without_reaching_the_driver<T>(&mut self, test: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.record.calls().len();
        let result = test(self);
        assert_eq!(
            self.record.calls().len(),
            before,
            "an ioctl reached the host driver"
        );
        result
    }
}

#[test]
fn an_unknown_or_refused_ioctl_gets_the_errno_of_a_render_node_on_both_sides() {
    let mut guest = Guest::new();
    for (ioctl, errno) in [
        (command::iowr::<Map>(0x7f), Errno::EINVAL),
        (vgem::CREATE_DUMB, Errno::EACCES),
        (virtio_gpu::MAP ^ 0x100, Errno::ENOTTY),
    ] {
        let result = guest.without_reaching_the_driver(|guest| guest.raw_ioctl(ioctl, &[0; 16]));
        assert_eq!(result, -errno.number(), "{ioctl:#x}");
        let result = guest.ioctl(ioctl, &mut Map::default());
        assert_eq!(result, Err(errno), "{ioctl:#x}");
    }
}

#[test]
fn a_struct_of_the_wrong_size_is_einval() {
    let mut guest = Guest::new();
    let command = command::with_size(virtio_gpu::MAP, 24);
    let result = guest.without_reaching_the_driver(|guest| guest.raw_ioctl(command, &[0; 24]));
    assert_eq!(result, -Errno::EINVAL.number());
}

#[test]
fn a_payload_longer_or_shorter_than_its_struct_says_is_einval() {
    let mut guest = Guest::new();
    for length in [0, 8, 15, 17, 24] {
        let result = guest.without_reaching_the_driver(|guest| {
            guest.raw_ioctl(virtio_gpu::MAP, &vec![0; length])
        });
        assert_eq!(result, -Errno::EINVAL.number(), "{length} bytes");
    }
}

#[test]
fn a_reserved_flag_is_einval() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    let mut wait = Wait { handle, flags: 2 };
    let result =
        guest.without_reaching_the_driver(|guest| guest.ioctl(virtio_gpu::WAIT, &mut wait));
    assert_eq!(result, Err(Errno::EINVAL));
}

#[test]
fn a_handle_of_another_file_is_enoent() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    let other = guest.session.open(open::RDWR).unwrap();
    let mut map = Map {
        handle,
        ..Default::default()
    };
    let result =
        guest.without_reaching_the_driver(|guest| guest.ioctl_on(other, virtio_gpu::MAP, &mut map));
    assert_eq!(result, Err(Errno::ENOENT));
    assert_eq!(guest.ioctl(virtio_gpu::MAP, &mut map), Ok(0));
}

#[test]
fn a_handle_in_an_array_is_checked_too() {
    let mut guest = Guest::new();
    let mut handles = [guest.create(4096).unwrap(), 99];
    let commands = [0u32; 4];
    let mut exec = Execbuffer {
        size: 16,
        command: commands.as_ptr() as u64,
        bo_handles: handles.as_ptr() as u64,
        num_bo_handles: 2,
        ..Default::default()
    };
    let result =
        guest.without_reaching_the_driver(|guest| guest.ioctl(virtio_gpu::EXECBUFFER, &mut exec));
    assert_eq!(result, Err(Errno::ENOENT));
    handles[1] = handles[0];
    exec.bo_handles = handles.as_ptr() as u64;
    assert_eq!(guest.ioctl(virtio_gpu::EXECBUFFER, &mut exec), Ok(0));
}

#[test]
fn a_pointer_count_over_its_limit_is_e2big() {
    let mut guest = Guest::new();
    let exec = Execbuffer {
        bo_handles: 1,
        num_bo_handles: virtio_gpu::BUFFERS_MAX + 1,
        ..Default::default()
    };
    let result = guest.without_reaching_the_driver(|guest| {
        guest.raw_ioctl(virtio_gpu::EXECBUFFER, exec.as_bytes())
    });
    assert_eq!(result, -Errno::E2BIG.number());
}

#[test]
fn an_ioctl_longer_than_the_guests_limit_is_e2big() {
    let limits = Limits {
        message: 4096,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let commands = [0u8; 4096];
    let mut exec = Execbuffer {
        size: 4096,
        command: commands.as_ptr() as u64,
        ..Default::default()
    };
    let result =
        guest.without_reaching_the_driver(|guest| guest.ioctl(virtio_gpu::EXECBUFFER, &mut exec));
    assert_eq!(
        result,
        Err(Errno::E2BIG),
        "the guest's driver knows the limit"
    );
    let result = guest
        .without_reaching_the_driver(|guest| guest.raw_ioctl(virtio_gpu::EXECBUFFER, &[0; 4097]));
    assert_eq!(result, -Errno::E2BIG.number(), "so does the host");
    assert_eq!(guest.reached(Limit::Message), 1);
    let file = guest.file;
    let mut bytes = [0; 4097];
    assert_eq!(guest.session.read(file, &mut bytes), Err(Errno::EINVAL));
    assert_eq!(guest.reached(Limit::Message), 2);
    exec.size = 2048;
    assert_eq!(guest.ioctl(virtio_gpu::EXECBUFFER, &mut exec), Ok(0));
    assert_eq!(guest.reached(Limit::Message), 2);
}

#[test]
fn a_read_gives_what_there_is_and_no_more_than_was_asked_for() {
    let mut guest = Guest::new();
    for flags in [open::RDWR, open::RDWR | open::NONBLOCK] {
        let file = guest.session.open(flags).unwrap();
        let mut bytes = [0xee; 64];
        assert_eq!(guest.session.read(file, &mut bytes), Ok(TO_READ.len()));
        assert_eq!(&bytes[..TO_READ.len()], TO_READ);
        assert_eq!(bytes[TO_READ.len()..], [0xee; 64][TO_READ.len()..]);
        let mut few = [0; 3];
        assert_eq!(guest.session.read(file, &mut few), Ok(3));
        assert_eq!(few, TO_READ[..3]);
    }
    assert_eq!(
        guest.session.read(ObjectId(99), &mut [0]),
        Err(Errno::EBADF)
    );
}

#[test]
fn a_read_that_has_no_room_or_is_not_of_a_file_is_einval() {
    let mut guest = Guest::new();
    let (file, read) = (guest.file, Operation::Read.number());
    let body = |length: u32, reserved: u32| ReadRequest {
        length: length.into(),
        reserved: reserved.into(),
    };
    // As much as `raw` has room for, and the header of the response beside it.
    for bad in [body(1 << 16, 0), body(4, 1)] {
        let result = guest.raw(read, file, bad.as_bytes(), &[]);
        assert_eq!(result, -Errno::EINVAL.number(), "{bad:?}");
    }
    let dma_buf = guest.export();
    let result = guest.raw(read, dma_buf, body(4, 0).as_bytes(), &[]);
    assert_eq!(result, -Errno::EINVAL.number());
}

#[test]
fn the_size_of_an_object_is_the_hosts_and_needs_room_and_no_body() {
    let mut guest = Guest::new();
    let dma_buf = guest.export();
    assert_eq!(guest.session.size(dma_buf), Ok(SIZE));
    assert_eq!(guest.session.size(ObjectId(99)), Err(Errno::EBADF));
    let size = Operation::Size.number();
    assert_eq!(guest.raw(size, dma_buf, &[], &[]), 0);
    let result = guest.raw(size, dma_buf, &[0], &[]);
    assert_eq!(result, -Errno::EINVAL.number(), "a body");
    let header = RequestHeader {
        operation: size.into(),
        flags: 0.into(),
        object: (dma_buf.0 as u32).into(),
        id: 1.into(),
    };
    let room = size_of::<ResponseHeader>() + 7;
    let response = guest.session.channel().raw(header.as_bytes(), room);
    let (header, _) = ResponseHeader::read_from_prefix(&response).unwrap();
    assert_eq!(header.result.get(), -Errno::EINVAL.number(), "no room");
}

#[test]
fn an_array_that_was_not_sent_is_einval() {
    let mut guest = Guest::new();
    let exec = Execbuffer {
        command: 1,
        size: 64,
        ..Default::default()
    };
    let result = guest.without_reaching_the_driver(|guest| {
        guest.raw_ioctl(virtio_gpu::EXECBUFFER, exec.as_bytes())
    });
    assert_eq!(result, -Errno::EINVAL.number());
}

#[test]
fn no_guest_address_reaches_the_host_driver() {
    let mut guest = Guest::new();
    let mut value = 0u64;
    let mut getparam = GetParam {
        param: 1,
        value: &raw mut value as u64,
    };
    let address = getparam.value;
    guest.ioctl(virtio_gpu::GETPARAM, &mut getparam).unwrap();
    assert_eq!(getparam.value, address, "the caller's pointer was changed");
    let (_, bytes) = guest.record.calls().pop().unwrap();
    let seen = GetParam::read_from_prefix(&bytes).unwrap().0;
    assert_eq!((seen.param, seen.value), (1, 1));
}

#[test]
fn output_fields_do_not_carry_the_guests_bytes_to_the_host_driver() {
    let mut guest = Guest::new();
    let mut create = ResourceCreate {
        bo_handle: 0xdead,
        res_handle: 0xbeef,
        ..Default::default()
    };
    guest
        .ioctl(virtio_gpu::RESOURCE_CREATE, &mut create)
        .unwrap();
    let (_, bytes) = guest.record.calls().pop().unwrap();
    let seen = ResourceCreate::read_from_prefix(&bytes).unwrap().0;
    assert_eq!((seen.bo_handle, seen.res_handle), (0, 0));
}

#[test]
fn a_closed_handle_is_unknown() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    let mut close = GemClose { handle, pad: 0 };
    assert_eq!(guest.ioctl(core::GEM_CLOSE, &mut close), Ok(0));
    let again = guest.without_reaching_the_driver(|guest| guest.ioctl(core::GEM_CLOSE, &mut close));
    assert_eq!(again, Err(Errno::EINVAL));
}

#[test]
fn gpu_memory_over_the_limit_is_enomem_until_some_is_freed() {
    let limits = Limits {
        memory: 8192,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let first = guest.create(8192).unwrap();
    assert_eq!(
        guest.without_reaching_the_driver(|guest| guest.create(1)),
        Err(Errno::ENOMEM)
    );
    assert_eq!(guest.reached(Limit::Memory), 1);
    guest
        .ioctl(
            core::GEM_CLOSE,
            &mut GemClose {
                handle: first,
                pad: 0,
            },
        )
        .unwrap();
    guest.create(4096).unwrap();
    guest.session.close(guest.file).unwrap();
    assert_eq!(guest.session.channel().session().usage().memory, 0);
}

#[test]
fn exported_gpu_memory_counts_until_its_last_object_and_handle_are_gone() {
    let limits = Limits {
        memory: 8192,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let handle = guest.create(8192).unwrap();
    let mut prime = PrimeHandleToFd {
        handle,
        ..Default::default()
    };
    guest.ioctl(core::PRIME_HANDLE_TO_FD, &mut prime).unwrap();
    let mut close = GemClose { handle, pad: 0 };
    guest.ioctl(core::GEM_CLOSE, &mut close).unwrap();
    assert_eq!(guest.create(4096), Err(Errno::ENOMEM));

    let mut import = PrimeFdToHandle {
        fd: prime.fd,
        ..Default::default()
    };
    guest.ioctl(core::PRIME_FD_TO_HANDLE, &mut import).unwrap();
    guest.session.close(ObjectId(prime.fd)).unwrap();
    assert_eq!(guest.create(4096), Err(Errno::ENOMEM));
    close.handle = import.handle;
    guest.ioctl(core::GEM_CLOSE, &mut close).unwrap();
    assert!(guest.create(8192).is_ok());
}

#[test]
fn objects_over_the_limit_are_emfile_and_are_not_left_open() {
    let limits = Limits {
        objects: 2,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let handle = guest.create(4096).unwrap();
    let mut prime = PrimeHandleToFd {
        handle,
        ..Default::default()
    };
    guest.ioctl(core::PRIME_HANDLE_TO_FD, &mut prime).unwrap();
    assert_eq!(guest.session.open(open::RDWR), Err(Errno::EMFILE));
    let again = guest
        .without_reaching_the_driver(|guest| guest.ioctl(core::PRIME_HANDLE_TO_FD, &mut prime));
    assert_eq!(again, Err(Errno::EMFILE));
    assert_eq!(guest.reached(Limit::Objects), 2);
    assert_eq!(guest.record.open(), 2);
    guest.session.close(ObjectId(prime.fd)).unwrap();
    assert_eq!(guest.record.open(), 1);
    assert!(guest.session.open(open::RDWR).is_ok());
    assert_eq!(guest.reached(Limit::Objects), 2);
}

#[test]
fn handles_of_all_files_over_the_limit_are_enomem_until_some_are_closed() {
    let limits = Limits {
        handles: 2,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let handle = guest.create(4096).unwrap();
    guest.create(4096).unwrap();
    assert_eq!(
        guest.without_reaching_the_driver(|guest| guest.create(4096)),
        Err(Errno::ENOMEM)
    );
    assert_eq!(guest.reached(Limit::Handles), 1);
    let mut close = GemClose { handle, pad: 0 };
    guest.ioctl(core::GEM_CLOSE, &mut close).unwrap();
    guest.create(4096).unwrap();
    let first = std::mem::replace(&mut guest.file, guest.session.open(open::RDWR).unwrap());
    assert_eq!(guest.create(4096), Err(Errno::ENOMEM));
    guest.session.close(first).unwrap();
    guest.create(4096).unwrap();
}

#[test]
fn mapped_bytes_over_the_limit_are_enomem_until_some_are_unmapped() {
    let limits = Limits {
        mapped: 8192,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let file = guest.file;
    assert_eq!(guest.session.map(file, 0, 12288, 3), Err(Errno::ENOMEM));
    let mapping = guest.session.map(file, 0, 8192, 3).unwrap();
    assert_eq!(guest.session.map(file, 0, 4096, 3), Err(Errno::ENOMEM));
    assert_eq!(guest.reached(Limit::Mapped), 2);
    guest.session.unmap(mapping).unwrap();
    assert!(guest.session.map(file, 0, 4096, 3).is_ok());
}

#[test]
fn waiting_requests_over_the_limit_are_eagain() {
    let limits = Limits {
        in_flight: 1,
        ..Limits::default()
    };
    let mut guest = Guest::with_limits(limits);
    let handle = guest.create(4096).unwrap();
    let mut wait = Wait { handle, flags: 0 };
    let address = &raw mut wait as u64;
    let file = guest.file;
    let first = guest
        .session
        .start_ioctl(file, virtio_gpu::WAIT, address, &guest.caller)
        .unwrap();
    let mut second = Wait { handle, flags: 0 };
    assert_eq!(
        guest.ioctl(virtio_gpu::WAIT, &mut second),
        Err(Errno::EAGAIN)
    );
    assert_eq!(guest.reached(Limit::InFlight), 1);
    guest.session.cancel(first.request.id()).unwrap();
    guest.session.wait(&first.request).unwrap();
    let result = guest.session.finish_ioctl(first, &mut guest.caller);
    assert_eq!(result, Err(Errno::EINTR));
    let third = guest
        .session
        .start_ioctl(file, virtio_gpu::WAIT, address, &guest.caller)
        .unwrap();
    guest.session.cancel(third.request.id()).unwrap();
    guest.session.wait(&third.request).unwrap();
    let result = guest.session.finish_ioctl(third, &mut guest.caller);
    assert_eq!(result, Err(Errno::EINTR), "it has waited");
    assert_eq!(guest.reached(Limit::InFlight), 1);
}

#[test]
fn a_cancelled_request_is_eintr_and_a_finished_one_is_enoent() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    let mut wait = Wait { handle, flags: 0 };
    let address = &raw mut wait as u64;
    let file = guest.file;
    let pending = guest
        .session
        .start_ioctl(file, virtio_gpu::WAIT, address, &guest.caller)
        .unwrap();
    let id = pending.request.id();
    assert!(!guest.session.is_complete(&pending.request));
    guest.session.nop().unwrap();
    guest.session.cancel(id).unwrap();
    guest.session.wait(&pending.request).unwrap();
    let result = guest.session.finish_ioctl(pending, &mut guest.caller);
    assert_eq!(result, Err(Errno::EINTR));
    assert_eq!(guest.session.cancel(id), Err(Errno::ENOENT));
}

#[test]
fn an_ioctl_whose_wait_is_interrupted_is_cancelled_and_gives_its_slots_back() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    guest.session.channel().interrupt_next_wait();
    let mut wait = Wait { handle, flags: 0 };
    assert_eq!(guest.ioctl(virtio_gpu::WAIT, &mut wait), Err(Errno::EINTR));
    assert_eq!(guest.session.channel().slots_taken(), 0);
}

#[test]
fn an_ioctl_that_is_complete_when_its_wait_is_interrupted_keeps_its_result() {
    let mut guest = Guest::new();
    guest.session.channel().interrupt_next_wait();
    assert!(guest.create(4096).is_ok());
    guest.session.channel().interrupt_next_wait();
    assert!(guest.session.open(open::RDWR).is_ok());
    assert_eq!(guest.session.channel().slots_taken(), 0);
}

#[test]
fn a_mapping_is_undone_once_and_only_as_it_was_made() {
    let mut guest = Guest::new();
    let file = guest.file;
    let mapping = guest.session.map(file, 0, 8192, 3).unwrap();
    let half = pvgpu_guest_driver::session::Mapping {
        length: 4096,
        ..mapping
    };
    assert_eq!(guest.session.unmap(half), Err(Errno::EINVAL));
    guest.session.unmap(mapping).unwrap();
    assert_eq!(guest.session.unmap(mapping), Err(Errno::EINVAL));
}

#[test]
fn bad_mappings_are_refused() {
    let mut guest = Guest::new();
    let file = guest.file;
    assert_eq!(guest.session.map(file, 0, 0, 3), Err(Errno::EINVAL));
    assert_eq!(guest.session.map(file, 1, 4096, 3), Err(Errno::EINVAL));
    assert_eq!(guest.session.map(file, 0, 4095, 3), Err(Errno::EINVAL));
    assert_eq!(guest.session.map(file, 0, 4096, 8), Err(Errno::EINVAL));
    assert_eq!(
        guest.session.map(file, !0xfff, 4096, 3),
        Err(Errno::EOVERFLOW)
    );
    assert_eq!(guest.session.map(file, 0, 2 << 20, 3), Err(Errno::ENOSPC));
    assert_eq!(
        guest.session.map(ObjectId(99), 0, 4096, 3),
        Err(Errno::EBADF)
    );
    assert_eq!(guest.session.channel().session().usage().mapped, 0);
}

#[test]
fn requests_that_are_no_requests_get_an_errno() {
    let mut guest = Guest::new();
    let file = guest.file;
    assert_eq!(guest.raw(999, file, &[], &[]), -Errno::ENOSYS.number());
    assert_eq!(
        guest.raw(Operation::Open.number(), file, &[1], &[]),
        -Errno::EINVAL.number()
    );
    let flags = OpenRequest {
        flags: 0o100.into(),
        reserved: 0.into(),
    };
    let result = guest.raw(Operation::Open.number(), file, flags.as_bytes(), &[]);
    assert_eq!(result, -Errno::EINVAL.number());
    let nowhere = ObjectId(-1);
    let map = MapRequest::new_zeroed();
    let result = guest.raw(Operation::Map.number(), nowhere, map.as_bytes(), &[]);
    assert_eq!(result, -Errno::EBADF.number());
    let response = guest.session.channel().raw(&[1, 2, 3], 64);
    let (header, _) = ResponseHeader::read_from_prefix(&response).unwrap();
    assert_eq!(header.result.get(), -Errno::EPROTO.number());
}

#[test]
fn nothing_works_before_the_hello() {
    let host = HostSession::new(Arc::new(Recording::default()), None, Limits::default());
    let mut channel = Loopback::new(host);
    let header = RequestHeader::new(Operation::Open, 0, 1);
    let request = [header.as_bytes(), OpenRequest::new_zeroed().as_bytes()].concat();
    let nop = RequestHeader::new(Operation::Nop, 0, 2);
    for request in [&request, nop.as_bytes()] {
        let response = channel.raw(request, 64);
        let (header, _) = ResponseHeader::read_from_prefix(&response).unwrap();
        assert_eq!(header.result.get(), -Errno::ENOTCONN.number());
    }
}

fn another_host() -> HostSession {
    HostSession::new(Arc::new(Recording::default()), None, Limits::default())
}

#[test]
fn a_guest_hears_that_a_restarted_proxy_has_lost_its_session_whatever_it_asks() {
    let mut guest = Guest::new();
    let (record, file) = (Arc::clone(&guest.record), guest.file);
    guest.session.channel().restart(another_host());
    assert_eq!(record.open(), 0, "the old proxy's end has closed the file");
    let mut wait = Wait::default();
    let gone = Err(Errno::ENODEV);
    assert_eq!(guest.ioctl(virtio_gpu::WAIT, &mut wait), gone);
    assert_eq!(guest.session.nop(), Err(Errno::ENODEV));
    assert_eq!(guest.session.open(open::RDWR), Err(Errno::ENODEV));
    assert_eq!(guest.session.close(file), Err(Errno::ENODEV));
}

#[test]
fn a_request_that_a_restarted_proxy_has_never_seen_ends_and_does_not_wait_for_ever() {
    let mut guest = Guest::new();
    let file = guest.file;
    let mut wait = Wait {
        handle: guest.create(4096).unwrap(),
        ..Default::default()
    };
    let address = &raw mut wait as u64;
    let session = &mut guest.session;
    let pending = session
        .start_ioctl(file, virtio_gpu::WAIT, address, &guest.caller)
        .unwrap();
    session.channel().restart(another_host());
    assert_eq!(session.wait(&pending.request), Err(Errno::ENODEV));
}

#[test]
fn a_request_that_takes_long_is_waited_for_as_long_as_the_proxy_knows_the_session() {
    let mut guest = Guest::new();
    let file = guest.file;
    // The same proxy goes on, but the guest looks every 10 ms whether it does.
    let driver = GateDriver::default();
    let gate = driver.gate();
    let host = HostSession::new(Arc::new(driver), None, Limits::default());
    guest.session.channel().restart(host);
    let hello = |channel: &mut Loopback| {
        let mut record = [0; 64];
        let length = control::encode(&Hello::new("test"), &mut record).unwrap();
        let header = RequestHeader::new(Operation::Hello, 0, 1);
        let request = [header.as_bytes(), &record[..length]].concat();
        channel.raw(&request, 4096);
    };
    hello(guest.session.channel());
    assert_eq!(guest.session.open(open::RDWR), Ok(file));
    let opener = std::thread::spawn(move || {
        let start = Instant::now();
        while gate.waiting() == 0 {
            assert!(start.elapsed() < Duration::from_secs(30), "nobody waits");
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(300));
        gate.set(1);
    });
    let before = guest.session.channel().submitted();
    assert_eq!(guest.session.poll(file, 1, -1), Ok(1));
    opener.join().unwrap();
    let questions = guest.session.channel().submitted() - before - 1;
    assert!((2..=40).contains(&questions), "{questions} questions");
    assert_eq!(guest.session.channel().slots_taken(), 0);
}

#[test]
fn a_guest_that_dies_in_the_middle_of_a_request_leaves_nothing_behind() {
    let mut guest = Guest::new();
    let handle = guest.create(4096).unwrap();
    let (file, record, aperture) = (
        guest.file,
        Arc::clone(&guest.record),
        Arc::clone(&guest.aperture),
    );
    let mapping = guest.session.map(file, 0, 1 << 20, 3).unwrap();
    assert_eq!(mapping.length, 1 << 20);
    let mut wait = Wait { handle, flags: 0 };
    let address = &raw mut wait as u64;
    let pending = guest
        .session
        .start_ioctl(file, virtio_gpu::WAIT, address, &guest.caller)
        .unwrap();
    assert_eq!(record.open(), 1);
    drop(pending);
    drop(guest);
    assert_eq!(record.open(), 0);
    // The whole aperture is free again.
    let host = HostSession::new(
        Arc::new(Recording::default()),
        Some(aperture),
        Limits::default(),
    );
    let mut session = Session::connect(Loopback::new(host), "next").unwrap();
    let file = session.open(open::RDWR).unwrap();
    assert_eq!(session.map(file, 0, 1 << 20, 3), Ok(mapping));
    assert!(session.channel().max_message() > 0);
}

/// A guest that watches files which are ready when the test says so.
struct Watcher {
    session: Session<'static, Loopback>,
    gate: Arc<Gate>,
    file: ObjectId,
}

const IN: u32 = 1;
const ERROR: u32 = 8;
/// Ids of watches; those of other requests are smaller.
const ID: u64 = 1 << 40;

impl Watcher {
    fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let driver = GateDriver::default();
        let gate = driver.gate();
        let channel = Loopback::watching(Arc::new(driver), None, limits);
        let mut session = Session::connect(channel, "watcher").unwrap();
        let file = session.open(open::RDWR).unwrap();
        Self {
            session,
            gate,
            file,
        }
    }

    fn watch(&mut self, id: u64) -> Result<u32, Errno> {
        self.session.watch(id, self.file, IN)
    }

    /// The next event, as the guest gets it.
    fn event(&mut self) -> (u64, u32) {
        let event = self.session.channel().event().event();
        assert_eq!(event.reserved, 0);
        (event.id.get(), event.events.get())
    }

    fn no_event(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.session.channel().event_now().is_none()
    }

    fn in_flight(&mut self) -> usize {
        self.session.channel().session().usage().in_flight
    }

    fn settle(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.in_flight() > 0 {
            assert!(Instant::now() < deadline, "a watch does not end");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_watch_of_what_is_ready_says_so_and_no_event_follows() {
    let mut guest = Watcher::new();
    guest.gate.set(IN);
    assert_eq!(guest.watch(ID), Ok(IN));
    assert_eq!(guest.in_flight(), 0);
    assert!(guest.no_event());
}

#[test]
fn what_is_watched_is_reported_once_when_it_is_ready() {
    let mut guest = Watcher::new();
    assert_eq!(guest.watch(ID), Ok(0));
    assert_eq!(guest.in_flight(), 1);
    assert!(guest.no_event());
    guest.gate.set(IN);
    assert_eq!(guest.event(), (ID, IN));
    guest.settle();
    assert!(guest.no_event());
}

#[test]
fn an_error_of_what_is_watched_is_reported_though_nobody_asked_for_it() {
    let mut guest = Watcher::new();
    assert_eq!(guest.watch(ID), Ok(0));
    guest.gate.set(ERROR);
    assert_eq!(guest.event(), (ID, ERROR));
    guest.gate.set(0);
    assert_eq!(guest.watch(ID), Ok(0));
    guest.gate.fail(Errno::ENODEV);
    assert_eq!(guest.event(), (ID, ERROR));
    assert_eq!(guest.watch(ID), Err(Errno::ENODEV));
}

#[test]
fn a_cancelled_watch_is_reported_once_without_events() {
    let mut guest = Watcher::new();
    assert_eq!(guest.watch(ID), Ok(0));
    assert_eq!(guest.watch(ID + 1), Ok(0));
    guest.session.cancel(ID).unwrap();
    assert_eq!(guest.event(), (ID, 0));
    assert!(guest.no_event());
    assert_eq!(guest.in_flight(), 1);
    guest.gate.set(IN);
    assert_eq!(guest.event(), (ID + 1, IN));
}

#[test]
fn a_watch_keeps_the_closed_object_until_its_event() {
    let mut guest = Watcher::new();
    assert_eq!(guest.watch(ID), Ok(0));
    let file = guest.file;
    guest.session.close(file).unwrap();
    assert_eq!(guest.gate.open(), 1);
    assert_eq!(guest.watch(ID + 1), Err(Errno::EBADF));
    guest.gate.set(IN);
    assert_eq!(guest.event(), (ID, IN));
    assert_eq!(guest.gate.open(), 0);
}

#[test]
fn the_id_of_a_watch_is_in_use_until_the_guest_has_its_event() {
    let limits = Limits {
        in_flight: 2,
        ..Limits::default()
    };
    let mut guest = Watcher::with_limits(limits);
    assert_eq!((guest.watch(ID), guest.watch(ID + 1)), (Ok(0), Ok(0)));
    assert_eq!(guest.watch(ID + 2), Err(Errno::EAGAIN));
    guest.gate.set(IN);
    let kept = [
        guest.session.channel().event(),
        guest.session.channel().event(),
    ];
    guest.gate.set(0);
    assert_eq!(guest.watch(ID + 2), Err(Errno::EAGAIN));
    // There is nothing to cancel any more: the event comes.
    assert_eq!(guest.session.cancel(ID), Err(Errno::ENOENT));
    let [first, second] = kept;
    let free = first.event().id.get();
    drop(first);
    let taken = second.event().id.get();
    assert_eq!(guest.watch(taken), Err(Errno::EINVAL));
    assert_eq!(guest.watch(free), Ok(0));
    drop(second);
    guest.gate.set(IN);
    assert_eq!(guest.event(), (free, IN));
}

#[test]
fn a_session_that_ends_drops_its_watches_without_an_event() {
    let mut guest = Watcher::new();
    for id in ID..ID + 20 {
        assert_eq!(guest.watch(id), Ok(0));
    }
    guest.session.channel().session().end();
    assert_eq!((guest.gate.waiting(), guest.gate.open()), (0, 0));
    assert!(guest.session.channel().event_now().is_none());
}

#[test]
fn the_end_of_one_session_leaves_the_watches_of_another_alone() {
    let (mut ending, mut staying) = (Watcher::new(), Watcher::new());
    assert_eq!((ending.watch(ID), staying.watch(ID)), (Ok(0), Ok(0)));
    drop(ending);
    assert!(staying.no_event());
    staying.gate.set(IN);
    assert_eq!(staying.event(), (ID, IN));
}

#[test]
fn a_guest_without_a_place_for_events_cannot_watch() {
    let mut guest = Guest::new();
    let file = guest.file;
    assert_eq!(guest.session.watch(ID, file, IN), Err(Errno::EOPNOTSUPP));
}

#[test]
fn a_watched_fence_of_the_embedded_gpu_is_reported_when_the_work_ends() {
    let config = SoftConfig {
        watchdog: Duration::from_secs(1),
        ..SoftConfig::default()
    };
    let driver = Arc::new(SoftDriver::new(config).unwrap());
    let channel = Loopback::watching(driver, None, Limits::default());
    let mut session = Session::connect(channel, "watcher").unwrap();
    let file = session.open(open::RDWR).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: every argument in this file is a live local with pointers to live locals, or null.
    let mut caller = unsafe { Flat::new() };
    let mut bytes = [0; 64];
    let mut commands = Stream::new(&mut bytes);
    commands.push(0, &Hang::default()).unwrap();
    let mut submit = Submit {
        commands: commands.bytes().as_ptr().expose_provenance() as u64,
        commands_size: u32::try_from(commands.bytes().len()).unwrap(),
        flags: soft::SUBMIT_FENCE_FD_OUT,
        ..Default::default()
    };
    let address = &raw mut submit as u64;
    session
        .ioctl(file, soft::DRM_IOCTL_SOFT_SUBMIT, address, &mut caller)
        .unwrap();
    let fence = ObjectId(submit.fence_fd);
    assert_eq!(session.watch(ID, fence, IN), Ok(0));
    session.close(fence).unwrap();
    let event = session.channel().event().event();
    assert_eq!((event.id.get(), event.events.get()), (ID, IN));
}

#[test]
fn watches_leave_places_in_flight_to_requests_that_wait() {
    let mut guest = Watcher::with_limits(Limits {
        in_flight: 4,
        ..Limits::default()
    });
    for id in ID..ID + 3 {
        assert_eq!(guest.watch(id), Ok(0));
    }
    assert_eq!(guest.watch(ID + 3), Err(Errno::EAGAIN));
    let gate = Arc::clone(&guest.gate);
    let opened = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        gate.set(IN);
    });
    assert_eq!(guest.session.poll(guest.file, IN, -1), Ok(IN));
    opened.join().unwrap();
}
