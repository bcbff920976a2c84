//! Handles, memory, mappings and PRIME.

use super::*;

fn export(client: &Client, handle: u32) -> Result<i32, Errno> {
    let mut prime = drm::PrimeHandleToFd {
        handle,
        flags: drm::prime::RDWR,
        fd: 0,
    };
    client.ioctl(drm::PRIME_HANDLE_TO_FD, &mut prime)?;
    Ok(prime.fd)
}

fn import(client: &Client, fd: i32) -> Result<u32, Errno> {
    let mut prime = drm::PrimeFdToHandle {
        fd,
        ..drm::PrimeFdToHandle::default()
    };
    client.ioctl(drm::PRIME_FD_TO_HANDLE, &mut prime)?;
    Ok(prime.handle)
}

#[test]
fn handles_are_the_lowest_free_numbers() {
    let driver = driver();
    let client = Client::new(&driver);
    let handles = [(); 3].map(|()| client.create(1));
    assert_eq!(handles, [1, 2, 3]);
    client.close(2).unwrap();
    client.close(1).unwrap();
    assert_eq!([(); 3].map(|()| client.create(1)), [1, 2, 4]);
}

#[test]
fn a_closed_handle_is_unknown_to_every_ioctl() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.create(PAGE);
    client.close(handle).unwrap();
    assert_eq!(client.close(handle), Err(Errno::EINVAL));
    assert_eq!(export(&client, handle), Err(Errno::ENOENT));
    assert_eq!(client.submit(&[], &[handle]), Err(Errno::ENOENT));
    let mut mmap = GemMmap {
        handle,
        ..GemMmap::default()
    };
    let result = client.ioctl(DRM_IOCTL_SOFT_GEM_MMAP, &mut mmap);
    assert_eq!(result, Err(Errno::ENOENT));
    let mut info = GemInfo {
        handle,
        ..GemInfo::default()
    };
    let result = client.ioctl(DRM_IOCTL_SOFT_GEM_INFO, &mut info);
    assert_eq!(result, Err(Errno::ENOENT));
    let mut wait = soft::Wait {
        handle,
        flags: WAIT_BUFFER,
        ..soft::Wait::default()
    };
    let result = client.ioctl(DRM_IOCTL_SOFT_WAIT, &mut wait);
    assert_eq!(result, Err(Errno::ENOENT));
}

#[test]
fn a_handle_of_one_file_means_nothing_to_another() {
    let driver = driver();
    let (one, other) = (Client::new(&driver), Client::new(&driver));
    let handle = one.create(PAGE);
    assert_eq!(other.close(handle), Err(Errno::EINVAL));
    let offset = one.offset(handle);
    let foreign = other.file.mapping(offset, PAGE, 3);
    assert_eq!(foreign.err(), Some(Errno::EINVAL));
    one.file.mapping(offset, PAGE, 3).unwrap();
}

#[test]
fn memory_is_whole_pages_of_zeros_and_comes_back_when_it_is_closed() {
    let driver = driver_with(SoftConfig {
        memory: 10 * PAGE,
        ..SoftConfig::default()
    });
    let client = Client::new(&driver);
    let create = |size| {
        let mut create = GemCreate {
            size,
            ..GemCreate::default()
        };
        let result = client.ioctl(DRM_IOCTL_SOFT_GEM_CREATE, &mut create);
        result.map(|_| create.handle)
    };
    let handle = create(7 * PAGE + 1).unwrap();
    assert_eq!(client.size(handle), 8 * PAGE);
    assert!(client.map(handle).bytes().iter().all(|byte| *byte == 0));
    assert_eq!(create(0), Err(Errno::EINVAL));
    for size in [3 * PAGE, u64::MAX, u64::MAX - PAGE, i64::MAX as u64] {
        assert_eq!(create(size), Err(Errno::ENOMEM), "{size}");
    }
    assert_eq!(client.param(param::MEMORY_SIZE), 10 * PAGE);
    assert_eq!(client.param(param::MEMORY_FREE), 2 * PAGE);
    create(2 * PAGE).unwrap();
    client.close(handle).unwrap();
    assert_eq!(client.param(param::MEMORY_FREE), 8 * PAGE);
    create(8 * PAGE).unwrap();
}

#[test]
fn only_so_many_buffers_can_exist() {
    let driver = driver_with(SoftConfig {
        buffers: 2,
        ..SoftConfig::default()
    });
    let client = Client::new(&driver);
    let handle = client.create(PAGE);
    client.create(PAGE);
    let mut create = GemCreate {
        size: PAGE,
        ..GemCreate::default()
    };
    let result = client.ioctl(DRM_IOCTL_SOFT_GEM_CREATE, &mut create);
    assert_eq!(result, Err(Errno::ENOMEM));
    client.close(handle).unwrap();
    client.create(PAGE);
}

#[test]
fn a_mapping_needs_the_buffers_own_offset_and_no_more_than_its_length() {
    let driver = driver();
    let client = Client::new(&driver);
    let handles = [client.create(2 * PAGE), client.create(PAGE)];
    let offset = client.offset(handles[0]);
    assert_ne!(offset, client.offset(handles[1]));
    let try_map = |offset, length| client.file.mapping(offset, length, 3).err();
    assert_eq!(try_map(offset, 2 * PAGE), None);
    assert_eq!(try_map(offset, PAGE), None);
    for (offset, length) in [
        (offset, 3 * PAGE),
        (offset, 0),
        (offset, 100),
        (offset, !(PAGE - 1)),
        (offset + PAGE, PAGE),
        (0, PAGE),
        (u64::MAX, PAGE),
    ] {
        assert_eq!(try_map(offset, length), Some(Errno::EINVAL));
    }
    client.close(handles[0]).unwrap();
    assert_eq!(try_map(offset, PAGE), Some(Errno::EINVAL));
}

#[test]
fn what_is_mapped_stays_after_everything_else_is_gone() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.create(PAGE);
    let map = client.map(handle);
    map.write(0, b"still here");
    drop((client, driver));
    assert_eq!(&map.bytes()[..10], b"still here");
}

#[test]
fn an_exported_buffer_is_shared_with_the_file_that_imports_it() {
    let driver = driver();
    let (one, other) = (Client::new(&driver), Client::new(&driver));
    let handle = one.create(PAGE);
    let object = one.given(export(&one, handle).unwrap());
    let imported = import(&other, other.receive(object.clone())).unwrap();
    other.map(imported).write(5, &[42]);
    assert_eq!(one.map(handle).bytes()[5], 42);
    // It lives as long as anyone has it.
    one.close(handle).unwrap();
    assert_eq!(other.map(imported).bytes()[5], 42);
    other.close(imported).unwrap();
    let mapping = object.mapping(0, PAGE, 3).unwrap();
    assert_eq!(Mapped::new(mapping, PAGE).bytes()[5], 42);
    assert_eq!(object.mapping(PAGE, PAGE, 3).err(), Some(Errno::EINVAL));
    let free = other.param(param::MEMORY_FREE);
    drop(object);
    one.objects.lock().unwrap().clear();
    other.objects.lock().unwrap().clear();
    assert_eq!(other.param(param::MEMORY_FREE), free + PAGE);
}

#[test]
fn importing_a_buffer_that_the_file_has_gives_the_handle_it_has() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.create(PAGE);
    let fd = export(&client, handle).unwrap();
    assert_eq!(import(&client, fd), Ok(handle));
    client.close(handle).unwrap();
    assert_eq!(client.close(handle), Err(Errno::EINVAL));
    let again = import(&client, fd).unwrap();
    assert_eq!(import(&client, fd), Ok(again));
}

#[test]
fn what_is_no_buffer_of_this_device_cannot_be_imported() {
    let (driver, foreign) = (driver(), driver());
    let (client, other) = (Client::new(&driver), Client::new(&foreign));
    let handle = other.create(PAGE);
    let object = other.given(export(&other, handle).unwrap());
    assert_eq!(import(&client, client.receive(object)), Err(Errno::EINVAL));
    let file = client.receive(other.file.clone());
    assert_eq!(import(&client, file), Err(Errno::EINVAL));
    assert_eq!(import(&client, 77), Err(Errno::EBADF));
}

#[test]
fn a_dma_buf_is_ready_when_no_submission_uses_it() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.create(PAGE);
    let object = client.given(export(&client, handle).unwrap());
    let poll = |timeout| object.poll(libc::POLLOUT as u32, timeout, &Cancel::new());
    assert_eq!(poll(Some(Duration::ZERO)), Ok(libc::POLLOUT as u32));
    client.submit(&hang(), &[handle]).unwrap();
    assert_eq!(poll(Some(Duration::ZERO)), Ok(0));
    assert_eq!(poll(None), Ok(libc::POLLOUT as u32));
    let any: &dyn Any = &*object;
    let DmaBuf(buffer) = any.downcast_ref().unwrap();
    assert!(buffer.fences().is_empty());
}

#[test]
fn the_version_is_cut_off_at_the_room_but_its_length_is_whole() {
    let driver = driver();
    let client = Client::new(&driver);
    let mut version = drm::Version {
        name_len: 2,
        name: 1,
        desc_len: 60,
        desc: 2,
        ..drm::Version::default()
    };
    let mut arrays = [vec![b'-'; 2], vec![b'-'; 60]];
    client
        .ioctl_with(drm::VERSION, &mut version, &mut arrays, &Cancel::new())
        .unwrap();
    let number = [
        version.version_major,
        version.version_minor,
        version.version_patchlevel,
    ];
    assert_eq!(number, driver.identity().version);
    assert_eq!(arrays[0], b"so");
    let description = driver.identity().description.as_bytes();
    assert_eq!((version.name_len, version.date_len), (4, 8));
    assert_eq!(version.desc_len, description.len() as u64);
    assert_eq!(&arrays[1][..description.len()], description);
    assert!(
        arrays[1][description.len()..]
            .iter()
            .all(|byte| *byte == b'-')
    );
}

#[test]
fn capabilities_are_those_of_a_driver_without_mode_setting() {
    let driver = driver();
    let client = Client::new(&driver);
    let cap = |capability| {
        let mut get = drm::GetCap {
            capability,
            value: 0,
        };
        client.ioctl(drm::GET_CAP, &mut get).map(|_| get.value)
    };
    assert_eq!(cap(drm::cap::PRIME), Ok(3));
    assert_eq!(cap(drm::cap::SYNCOBJ), Ok(1));
    assert_eq!(cap(drm::cap::SYNCOBJ_TIMELINE), Ok(1));
    assert_eq!(cap(drm::cap::DUMB_BUFFER), Err(Errno::EOPNOTSUPP));
    let mut set = drm::SetClientCap::default();
    let result = client.ioctl(drm::SET_CLIENT_CAP, &mut set);
    assert_eq!(result, Err(Errno::EACCES));
    let unknown = client.ioctl(
        DRM_IOCTL_SOFT_GETPARAM,
        &mut GetParam {
            param: 99,
            value: 0,
        },
    );
    assert_eq!(unknown, Err(Errno::EINVAL));
}

#[test]
fn reading_a_file_waits_for_an_event_that_never_comes() {
    let driver = driver();
    let file = driver.open(0).unwrap();
    let cancel = Cancel::new();
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| file.read(&mut [0; 64], &cancel));
        while !reading.is_finished() {
            cancel.cancel();
        }
        assert_eq!(reading.join().unwrap(), Err(Errno::EINTR));
    });
    let file = driver.open(pvgpu_protocol::wire::open::NONBLOCK).unwrap();
    let cancel = Cancel::new();
    assert_eq!(file.read(&mut [0; 64], &cancel), Err(Errno::EAGAIN));
    let timeout = Some(Duration::from_millis(1));
    assert_eq!(file.poll(libc::POLLIN as u32, timeout, &cancel), Ok(0));
}
