//! Waiting: submissions, buffers, sync files and syncobjs.

use super::*;

fn export(client: &Client, handle: u32, flags: u32) -> Result<i32, Errno> {
    let mut export = drm::SyncobjHandleToFd {
        handle,
        flags,
        ..drm::SyncobjHandleToFd::default()
    };
    client.ioctl(drm::SYNCOBJ_HANDLE_TO_FD, &mut export)?;
    Ok(export.fd)
}

fn import(client: &Client, handle: u32, fd: i32, flags: u32) -> Result<u32, Errno> {
    let mut import = drm::SyncobjFdToHandle {
        handle,
        flags,
        fd,
        pad: 0,
    };
    client.ioctl(drm::SYNCOBJ_FD_TO_HANDLE, &mut import)?;
    Ok(import.handle)
}

/// Waits for points and gives `first_signaled`.
fn wait_points(
    client: &Client,
    points: &[(u32, u64)],
    flags: u32,
    timeout_nsec: i64,
) -> Result<u32, Errno> {
    let mut wait = drm::SyncobjTimelineWait {
        handles: 1,
        points: 2,
        timeout_nsec,
        count_handles: points.len() as u32,
        flags,
        ..drm::SyncobjTimelineWait::default()
    };
    let handles: Vec<u32> = points.iter().map(|(handle, _)| *handle).collect();
    let numbers: Vec<u64> = points.iter().map(|(_, point)| *point).collect();
    let mut arrays = [handles.as_bytes().to_vec(), numbers.as_bytes().to_vec()];
    let command = drm::SYNCOBJ_TIMELINE_WAIT;
    client.ioctl_with(command, &mut wait, &mut arrays, &Cancel::new())?;
    Ok(wait.first_signaled)
}

/// Waits for the fences of binary syncobjs.
fn wait_binary(client: &Client, handles: &[u32], flags: u32, timeout: i64) -> Result<u32, Errno> {
    let mut wait = drm::SyncobjWait {
        handles: 1,
        timeout_nsec: timeout,
        count_handles: handles.len() as u32,
        flags,
        ..drm::SyncobjWait::default()
    };
    let mut arrays = [handles.as_bytes().to_vec()];
    client.ioctl_with(drm::SYNCOBJ_WAIT, &mut wait, &mut arrays, &Cancel::new())?;
    Ok(wait.first_signaled)
}

fn query(client: &Client, handles: &[u32], flags: u32) -> Result<Vec<u64>, Errno> {
    let mut query = drm::SyncobjQuery {
        handles: 1,
        points: 2,
        count_handles: handles.len() as u32,
        flags,
    };
    let mut arrays = [handles.as_bytes().to_vec(), vec![0; 8 * handles.len()]];
    client.ioctl_with(drm::SYNCOBJ_QUERY, &mut query, &mut arrays, &Cancel::new())?;
    let points = arrays[1].chunks(8).map(|point| point.try_into().unwrap());
    Ok(points.map(u64::from_le_bytes).collect())
}

fn array(client: &Client, command: u32, handles: &[u32]) -> Result<i32, Errno> {
    let mut names = drm::SyncobjArray {
        handles: 1,
        count_handles: handles.len() as u32,
        pad: 0,
    };
    let mut arrays = [handles.as_bytes().to_vec()];
    client.ioctl_with(command, &mut names, &mut arrays, &Cancel::new())
}

fn sync(handle: u32, point: u64) -> soft::Sync {
    soft::Sync {
        handle,
        flags: 0,
        point,
    }
}

#[test]
fn waiting_for_a_submission_ends_at_the_deadline() {
    let driver = driver();
    let client = Client::new(&driver);
    let seqno = client.submit(&hang(), &[]).unwrap();
    assert_eq!(client.wait_for(seqno, 0), Err(Errno::ETIME));
    assert_eq!(client.wait_for(seqno, -5), Err(Errno::ETIME));
    assert_eq!(client.wait_for(seqno, 1_000_000), Err(Errno::ETIME));
    assert_eq!(client.wait_for(seqno, i64::MAX), Ok(-Errno::EIO.number()));
    assert_eq!(client.wait_for(seqno, 0), Ok(-Errno::EIO.number()));
}

#[test]
fn a_submission_that_was_never_made_cannot_be_waited_for() {
    let driver = driver();
    let client = Client::new(&driver);
    assert_eq!(client.wait_for(0, 0), Err(Errno::EINVAL));
    assert_eq!(client.wait_for(1, 0), Err(Errno::EINVAL));
    let seqno = client.submit(&[], &[]).unwrap();
    assert_eq!(seqno, 1);
    assert_eq!(client.wait(1), 0);
    assert_eq!(client.wait_for(2, LONG), Err(Errno::EINVAL));
    assert_eq!(client.wait_for(u64::MAX, LONG), Err(Errno::EINVAL));
}

#[test]
fn a_submission_of_long_ago_counts_as_done() {
    let driver = driver();
    let client = Client::new(&driver);
    for _ in 0..2000 {
        let seqno = client.submit(&[], &[]).unwrap();
        client.wait(seqno);
    }
    assert_eq!(client.wait_for(1, 0), Ok(0));
}

#[test]
fn a_cancelled_wait_is_interrupted_and_the_submission_goes_on() {
    let driver = driver();
    let client = Client::new(&driver);
    let seqno = client.submit(&hang(), &[]).unwrap();
    let cancel = Cancel::new();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut wait = soft::Wait {
                seqno,
                deadline_ns: LONG,
                ..soft::Wait::default()
            };
            client.ioctl_with(DRM_IOCTL_SOFT_WAIT, &mut wait, &mut [], &cancel)
        });
        while !waiting.is_finished() {
            cancel.cancel();
        }
        assert_eq!(waiting.join().unwrap(), Err(Errno::EINTR));
    });
    assert_eq!(client.wait(seqno), -Errno::EIO.number());
}

#[test]
fn waiting_for_a_buffer_waits_for_the_submissions_of_all_files() {
    let driver = driver();
    let (one, other) = (Client::new(&driver), Client::new(&driver));
    let handle = one.create(PAGE);
    let mut prime = drm::PrimeHandleToFd {
        handle,
        ..drm::PrimeHandleToFd::default()
    };
    one.ioctl(drm::PRIME_HANDLE_TO_FD, &mut prime).unwrap();
    let mut prime = drm::PrimeFdToHandle {
        fd: other.receive(one.given(prime.fd)),
        ..drm::PrimeFdToHandle::default()
    };
    other.ioctl(drm::PRIME_FD_TO_HANDLE, &mut prime).unwrap();
    let wait = |deadline_ns| {
        let mut wait = soft::Wait {
            handle,
            flags: WAIT_BUFFER,
            deadline_ns,
            ..soft::Wait::default()
        };
        one.ioctl(DRM_IOCTL_SOFT_WAIT, &mut wait)
            .map(|_| wait.error)
    };
    assert_eq!(wait(0), Ok(0));
    other.submit(&hang(), &[prime.handle]).unwrap();
    assert_eq!(one.info(handle).busy, 1);
    assert_eq!(wait(0), Err(Errno::ETIME));
    assert_eq!(wait(LONG), Ok(-Errno::EIO.number()));
    assert_eq!(one.info(handle).busy, 0);
}

#[test]
fn a_fence_of_one_file_holds_up_another_file_but_nobody_else() {
    let driver = driver_with(SoftConfig {
        engines: 2,
        watchdog: Duration::from_millis(250),
        ..SoftConfig::default()
    });
    let [slow, waiting, third] = [(); 3].map(|()| Client::new(&driver));
    // The file that waits needs only the fence to be handed to it.
    let submit = slow
        .submit_all(&hang(), &[], [&[], &[]], (SUBMIT_FENCE_FD_OUT, -1))
        .unwrap();
    let fence = waiting.receive(slow.given(submit.fence_fd));
    let flags = SUBMIT_FENCE_FD_IN | SUBMIT_FENCE_FD_OUT;
    let submit = waiting
        .submit_all(&[], &[], [&[], &[]], (flags, fence))
        .unwrap();
    assert_ne!(submit.fence_fd, fence);
    assert_eq!(third.wait(third.submit(&[], &[]).unwrap()), 0);
    assert_eq!(slow.wait_for(1, 0), Err(Errno::ETIME));
    assert_eq!(waiting.wait_for(submit.seqno, 0), Err(Errno::ETIME));
    // Its own sync file becomes ready when the slow one has been reset.
    let object = waiting.given(submit.fence_fd);
    let poll = |timeout| object.poll(libc::POLLIN as u32, timeout, &Cancel::new());
    assert_eq!(poll(Some(Duration::ZERO)), Ok(0));
    assert_eq!(poll(None), Ok(libc::POLLIN as u32));
    assert_eq!(slow.wait_for(1, 0), Ok(-Errno::EIO.number()));
    assert_eq!(waiting.wait_for(submit.seqno, 0), Ok(0));
    let any: &dyn Any = &*object;
    let SyncFile(fence) = any.downcast_ref().unwrap();
    assert_eq!(fence.status(), Some(Ok(())));
}

#[test]
fn a_fence_that_is_none_is_refused() {
    let driver = driver();
    let client = Client::new(&driver);
    let submit = |fd| client.submit_all(&[], &[], [&[], &[]], (SUBMIT_FENCE_FD_IN, fd));
    let file = client.receive(client.file.clone());
    assert_eq!(submit(file).err(), Some(Errno::EINVAL));
    assert_eq!(submit(-1).err(), Some(Errno::EBADF));
    let seqno = client.submit(&[], &[]).unwrap();
    assert_eq!(seqno, 1, "refused submissions are not counted");
}

#[test]
fn a_submission_signals_points_and_waits_for_points() {
    let driver = driver();
    let client = Client::new(&driver);
    let [binary, timeline] = [(); 2].map(|()| client.syncobj(0));
    let both = [sync(binary, 0), sync(timeline, 5)];
    let wait = client.submit_all(&[], &[], [&both[..1], &[]], (0, -1));
    assert_eq!(wait.err(), Some(Errno::EINVAL), "no fence yet");
    let slow = client.submit_all(&hang(), &[], [&[], &both], (0, -1));
    slow.unwrap();
    assert_eq!(query(&client, &[binary, timeline], 0), Ok(vec![0, 0]));
    let submitted = drm::syncobj::QUERY_LAST_SUBMITTED;
    assert_eq!(query(&client, &[timeline], submitted), Ok(vec![5]));
    let second = client
        .submit_all(&[], &[], [&both, &[sync(timeline, 8)]], (0, -1))
        .unwrap();
    assert_eq!(
        wait_points(&client, &[(timeline, 8)], 0, 0),
        Err(Errno::ETIME)
    );
    assert_eq!(wait_points(&client, &[(timeline, 8)], 0, LONG), Ok(0));
    assert_eq!(client.wait_for(second.seqno, 0), Ok(0));
    assert_eq!(wait_binary(&client, &[binary], 0, 0), Ok(0));
    assert_eq!(query(&client, &[timeline], 0), Ok(vec![8]));
}

#[test]
fn syncobjs_are_created_signaled_reset_and_destroyed() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.syncobj(drm::syncobj::CREATE_SIGNALED);
    assert_eq!(wait_binary(&client, &[handle], 0, 0), Ok(0));
    array(&client, drm::SYNCOBJ_RESET, &[handle]).unwrap();
    assert_eq!(wait_binary(&client, &[handle], 0, 0), Err(Errno::EINVAL));
    let for_submit = drm::syncobj::WAIT_FOR_SUBMIT;
    let result = wait_binary(&client, &[handle], for_submit, 1_000_000);
    assert_eq!(result, Err(Errno::ETIME));
    array(&client, drm::SYNCOBJ_SIGNAL, &[handle]).unwrap();
    assert_eq!(wait_binary(&client, &[handle], 0, 0), Ok(0));
    let mut destroy = drm::SyncobjDestroy { handle, pad: 0 };
    client.ioctl(drm::SYNCOBJ_DESTROY, &mut destroy).unwrap();
    let again = client.ioctl(drm::SYNCOBJ_DESTROY, &mut destroy);
    assert_eq!(again, Err(Errno::EINVAL));
    assert_eq!(wait_binary(&client, &[handle], 0, 0), Err(Errno::ENOENT));
    assert_eq!(
        array(&client, drm::SYNCOBJ_SIGNAL, &[handle]),
        Err(Errno::ENOENT)
    );
    assert_eq!(array(&client, drm::SYNCOBJ_RESET, &[]), Err(Errno::EINVAL));
    assert_eq!(query(&client, &[], 0), Err(Errno::EINVAL));
    assert_eq!(wait_binary(&client, &[], 0, 0), Ok(0));
    let mut eventfd = drm::SyncobjEventfd {
        handle,
        fd: client.receive(client.file.clone()),
        ..drm::SyncobjEventfd::default()
    };
    let result = client.ioctl(drm::SYNCOBJ_EVENTFD, &mut eventfd);
    assert_eq!(result, Err(Errno::EOPNOTSUPP));
}

#[test]
fn a_wait_for_any_names_the_one_and_a_wait_for_all_needs_all() {
    let driver = driver();
    let client = Client::new(&driver);
    let handles = [client.syncobj(0), client.syncobj(1)];
    let slow = client.submit_all(&hang(), &[], [&[], &[sync(handles[0], 0)]], (0, -1));
    slow.unwrap();
    assert_eq!(wait_binary(&client, &handles, 0, LONG), Ok(1));
    let all = drm::syncobj::WAIT_ALL;
    assert_eq!(
        wait_binary(&client, &handles, all, 1_000_000),
        Err(Errno::ETIME)
    );
    assert_eq!(wait_binary(&client, &handles, all, LONG), Ok(0));
}

#[test]
fn timelines_are_signaled_and_transferred() {
    let driver = driver();
    let client = Client::new(&driver);
    let [source, target] = [(); 2].map(|()| client.syncobj(0));
    let mut signal = drm::SyncobjTimelineSignal {
        handles: 1,
        points: 2,
        count_handles: 1,
        flags: 0,
    };
    let mut arrays = [source.as_bytes().to_vec(), 7_u64.as_bytes().to_vec()];
    let command = drm::SYNCOBJ_TIMELINE_SIGNAL;
    client
        .ioctl_with(command, &mut signal, &mut arrays, &Cancel::new())
        .unwrap();
    assert_eq!(query(&client, &[source], 0), Ok(vec![7]));
    assert_eq!(
        wait_points(&client, &[(source, 8)], 0, 0),
        Err(Errno::EINVAL)
    );
    let transfer = |src_point, dst_point, flags| {
        let mut transfer = drm::SyncobjTransfer {
            src_handle: source,
            dst_handle: target,
            src_point,
            dst_point,
            flags,
            pad: 0,
        };
        client.ioctl(drm::SYNCOBJ_TRANSFER, &mut transfer)
    };
    transfer(7, 3, 0).unwrap();
    assert_eq!(query(&client, &[target], 0), Ok(vec![3]));
    assert_eq!(transfer(9, 4, 0), Err(Errno::EINVAL));
    // A fence that is attached while the transfer waits for it.
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| transfer(9, 0, drm::syncobj::WAIT_FOR_SUBMIT));
        client
            .submit_all(&[], &[], [&[], &[sync(source, 9)]], (0, -1))
            .unwrap();
        transfer.join().unwrap().unwrap();
    });
    assert_eq!(wait_binary(&client, &[target], 0, LONG), Ok(0));
}

#[test]
fn waiting_for_availability_does_not_wait_for_the_signal() {
    let driver = driver();
    let client = Client::new(&driver);
    let handle = client.syncobj(0);
    let available = drm::syncobj::WAIT_AVAILABLE;
    let points = [(handle, 4)];
    assert_eq!(
        wait_points(&client, &points, available, 0),
        Err(Errno::ETIME)
    );
    let submit = client
        .submit_all(&hang(), &[], [&[], &[sync(handle, 4)]], (0, -1))
        .unwrap();
    assert_eq!(wait_points(&client, &points, available, 0), Ok(0));
    assert_eq!(client.wait_for(submit.seqno, 0), Err(Errno::ETIME));
}

#[test]
fn a_syncobj_is_shared_through_its_file_and_a_fence_through_a_sync_file() {
    let driver = driver();
    let (one, other) = (Client::new(&driver), Client::new(&driver));
    let handle = one.syncobj(0);
    let empty = export(&one, handle, drm::syncobj::EXPORT_SYNC_FILE);
    assert_eq!(empty, Err(Errno::EINVAL));
    let file = one.given(export(&one, handle, 0).unwrap());
    let shared = import(&other, 0, other.receive(file.clone()), 0).unwrap();
    array(&other, drm::SYNCOBJ_SIGNAL, &[shared]).unwrap();
    assert_eq!(wait_binary(&one, &[handle], 0, 0), Ok(0));
    // A sync file holds the fence of its time.
    let fence = export(&one, handle, drm::syncobj::EXPORT_SYNC_FILE).unwrap();
    let fence = one.given(fence);
    array(&one, drm::SYNCOBJ_RESET, &[handle]).unwrap();
    let target = other.syncobj(0);
    let flags = drm::syncobj::IMPORT_SYNC_FILE;
    import(&other, target, other.receive(fence), flags).unwrap();
    assert_eq!(wait_binary(&other, &[target], 0, 0), Ok(0));
    let wrong = import(&other, target, other.receive(file), flags);
    assert_eq!(wrong, Err(Errno::EINVAL));
    let wrong = import(&other, 0, other.receive(one.file.clone()), 0);
    assert_eq!(wrong, Err(Errno::EINVAL));
    let unknown = export(&one, 99, drm::syncobj::EXPORT_SYNC_FILE);
    assert_eq!(unknown, Err(Errno::ENOENT));
    assert_eq!(export(&one, 99, 0), Err(Errno::EINVAL));
}
