//! Submissions: order, failure, limits.

use super::*;

#[test]
fn a_hang_ends_in_a_reset_and_the_next_submission_runs() {
    let driver = driver();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let hung = client.submit(&hang(), &[]).unwrap();
    let next = stream(|stream| stream.push(0, &store(0, 8, 7)).unwrap());
    let next = client.submit(&next, &[buffer]).unwrap();
    assert_eq!(client.wait(next), 0);
    assert_eq!(client.wait(hung), -Errno::EIO.number());
    assert_eq!(client.map(buffer).bytes()[8..12], 7_u32.to_le_bytes());
    let stats = client.stats();
    assert_eq!((stats.resets, stats.hangs, stats.faults), (1, 1, 0));
    assert_eq!(stats.banned, 0);
}

#[test]
fn a_submission_does_not_wait_for_its_execution() {
    let driver = driver();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let seqnos = [(); 3].map(|()| client.submit(&hang(), &[buffer]).unwrap());
    assert_eq!(seqnos, [1, 2, 3]);
    assert_eq!(client.info(buffer).busy, 1);
    assert_eq!(client.wait_for(1, 0), Err(Errno::ETIME));
}

#[test]
fn submissions_of_a_file_are_executed_in_order_even_by_several_engines() {
    let driver = driver_with(SoftConfig {
        engines: 4,
        ..SoftConfig::default()
    });
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let map = client.map(buffer);
    for round in 0..200 {
        let values = [1, 2, 3, 4].map(|value| round * 4 + value);
        let submit = |value| {
            let stream = stream(|stream| stream.push(0, &store(0, 0, value)).unwrap());
            client.submit(&stream, &[buffer]).unwrap()
        };
        let [.., last] = values.map(submit);
        assert_eq!(client.wait(last), 0);
        assert_eq!(map.bytes()[..4], values[3].to_le_bytes());
    }
}

#[test]
fn a_fault_ends_its_submission_and_no_other() {
    let driver = driver();
    let (one, other) = (Client::new(&driver), Client::new(&driver));
    for offset in [PAGE, PAGE - 4 + 8, u64::MAX - 3, 1 << 63] {
        let buffer = one.create(PAGE);
        let stream = stream(|stream| {
            stream.push(0, &store(0, PAGE - 4, 1)).unwrap();
            stream.push(0, &store(0, offset, 2)).unwrap();
            stream.push(0, &store(0, 0, 3)).unwrap();
        });
        let seqno = one.submit(&stream, &[buffer]).unwrap();
        assert_eq!(one.wait(seqno), -Errno::EFAULT.number());
        let bytes = one.map(buffer).bytes();
        assert_eq!((bytes[4092], bytes[0]), (1, 0), "before it and after it");
    }
    assert_eq!(one.stats().faults, 4);
    let stats = other.stats();
    assert_eq!((stats.faults, stats.hangs, stats.resets), (0, 0, 0));
    let stream = stream(|stream| stream.push(0, &store(0, 0, 1)).unwrap());
    one.run(&stream, &[one.create(PAGE)]);
    other.run(&stream, &[other.create(PAGE)]);
}

#[test]
fn a_file_that_hangs_too_often_is_banned_and_another_is_not() {
    let driver = driver_with(SoftConfig {
        watchdog: Duration::from_millis(10),
        ..SoftConfig::default()
    });
    let (guilty, innocent) = (Client::new(&driver), Client::new(&driver));
    // More than it may: the rest is dropped without hanging.
    let seqnos: Vec<_> = (0..10)
        .map(|_| guilty.submit(&hang(), &[]).unwrap())
        .collect();
    let errors: Vec<_> = seqnos.into_iter().map(|seqno| guilty.wait(seqno)).collect();
    let (hung, dropped) = (-Errno::EIO.number(), -Errno::ECANCELED.number());
    let limit = HANGS_MAX as usize;
    assert_eq!(errors[..limit], [hung; HANGS_MAX as usize]);
    assert!(errors[limit..].iter().all(|error| *error == dropped));
    let stats = guilty.stats();
    assert_eq!(
        (stats.banned, stats.hangs, stats.resets),
        (1, HANGS_MAX, HANGS_MAX)
    );
    assert_eq!(guilty.submit(&[], &[]), Err(Errno::EIO));
    let stats = innocent.stats();
    assert_eq!((stats.banned, stats.hangs, stats.resets), (0, 0, HANGS_MAX));
    assert_eq!(innocent.wait(innocent.submit(&[], &[]).unwrap()), 0);
}

/// Two files: the second one's first submission, of these commands, waits until the first one is dropped.
fn stuck_queue(driver: &SoftDriver, stream: &[u8]) -> (Client, Client) {
    let (slow, client) = (Client::new(driver), Client::new(driver));
    let fence = client.receive(submit_with_fence(&slow, &hang(), &[]));
    client
        .submit_all(stream, &[], [&[], &[]], (SUBMIT_FENCE_FD_IN, fence))
        .unwrap();
    (slow, client)
}

#[test]
fn a_full_queue_says_so_and_takes_more_when_there_is_room() {
    let driver = patient_driver();
    let (slow, client) = stuck_queue(&driver, &[]);
    assert_eq!(client.param(param::QUEUE_MAX), u64::from(QUEUE_MAX));
    for _ in 1..QUEUE_MAX {
        client.submit(&[], &[]).unwrap();
    }
    assert_eq!(client.submit(&[], &[]), Err(Errno::EAGAIN));
    drop(slow);
    assert_eq!(client.wait(QUEUE_MAX.into()), 0);
    assert_eq!(client.submit(&[], &[]), Ok(u64::from(QUEUE_MAX) + 1));
}

#[test]
fn a_queue_holds_only_so_many_bytes_of_commands() {
    let driver = patient_driver();
    // Commands that are done at once, but as many as a stream can hold.
    let many = stream(|stream| while stream.push(0, &store(0, 0, 1)).is_ok() {});
    let fill = |client: &Client, buffer| {
        let mut submitted = 0;
        while client.submit(&many, &[buffer]).is_ok() {
            submitted += 1;
        }
        assert_eq!(client.submit(&many, &[buffer]), Err(Errno::EAGAIN));
        submitted
    };
    let (slow, client) = stuck_queue(&driver, &[]);
    let buffer = client.create(PAGE);
    let submitted = fill(&client, buffer);
    assert!((1..16).contains(&submitted), "{submitted}");
    // What was executed takes no room any more.
    drop(slow);
    assert_eq!(client.wait(1 + submitted), 0);
    let (_slow, next) = stuck_queue(&driver, &[]);
    let buffer = next.create(PAGE);
    assert_eq!(fill(&next, buffer), submitted);
}

#[test]
fn all_queues_together_hold_only_so_many_bytes_of_commands() {
    let driver = patient_driver();
    let many = stream(|stream| while stream.push(0, &store(0, 0, 1)).is_ok() {});
    let mut clients = Vec::new();
    // Every file is far below its own limit with one of them.
    let error = loop {
        let (slow, client) = stuck_queue(&driver, &[]);
        let buffer = client.create(PAGE);
        let submitted = client.submit(&many, &[buffer]);
        clients.push((slow, client));
        if let Err(error) = submitted {
            break error;
        }
    };
    assert_eq!(error, Errno::EAGAIN);
    assert!((10..256).contains(&clients.len()), "{}", clients.len());
    // What was dropped takes no room any more.
    clients.clear();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    assert_eq!(client.wait(client.submit(&many, &[buffer]).unwrap()), 0);
}

#[test]
fn queues_take_turns() {
    let driver = driver();
    let (busy, quick) = (Client::new(&driver), Client::new(&driver));
    // Three hangs would be over first if the queues did not take turns.
    let seqnos = [(); 3].map(|()| busy.submit(&hang(), &[]).unwrap());
    let seqno = quick.submit(&[], &[]).unwrap();
    assert_eq!(quick.wait(seqno), 0);
    assert_eq!(busy.wait_for(seqnos[2], 0), Err(Errno::ETIME));
}

#[test]
fn a_guest_does_not_wait_for_the_submissions_of_another() {
    let driver = driver_with(SoftConfig {
        watchdog: Duration::from_secs(3600),
        ..SoftConfig::default()
    });
    let guest = |_| driver.for_session().unwrap();
    let of_guest = |guest: &Arc<dyn HostDriver>| Client {
        file: guest.open(0).unwrap(),
        objects: Mutex::default(),
    };
    let [busy, quick] = [0, 1].map(guest);
    let quick = of_guest(&quick);
    // All files of the busy guest are full of work that takes minutes, or for ever.
    let large = stream(|stream| {
        for _ in 0..4 {
            stream
                .push(0, &fill(surface(0, 8000, 8000), [1; 4]))
                .unwrap();
        }
    });
    for work in [hang(), large] {
        let files = [(); 4].map(|()| of_guest(&busy));
        for file in &files {
            let buffer = file.create(8000 * 8000 * 4);
            for _ in 0..QUEUE_MAX {
                file.submit(&work, &[buffer]).unwrap();
            }
        }
        for _ in 0..100 {
            let seqno = quick.submit(&[], &[]).unwrap();
            assert_eq!(quick.wait(seqno), 0);
        }
        let last = QUEUE_MAX.into();
        let pending = |file: &Client| file.wait_for(last, 0) == Err(Errno::ETIME);
        assert!(files.iter().all(pending));
    }
}

/// The fence of a submission, as another program has it.
fn submit_with_fence(client: &Client, stream: &[u8], buffers: &[u32]) -> Arc<dyn HostObject> {
    let submit = client
        .submit_all(stream, buffers, [&[], &[]], (SUBMIT_FENCE_FD_OUT, -1))
        .unwrap();
    client.given(submit.fence_fd)
}

/// Waits for a sync file and tells how its fence ended.
fn outcome(object: &Arc<dyn HostObject>) -> Result<(), Errno> {
    let ready = object.poll(libc::POLLIN as u32, None, &Cancel::new());
    assert_eq!(ready, Ok(libc::POLLIN as u32));
    let any: &dyn Any = &**object;
    let SyncFile(fence) = any.downcast_ref().unwrap();
    fence.status().unwrap()
}

#[test]
fn closing_a_file_stops_what_runs_and_drops_what_waits() {
    let driver = driver_with(SoftConfig {
        watchdog: Duration::from_secs(3600),
        ..SoftConfig::default()
    });
    let (client, other) = (Client::new(&driver), Client::new(&driver));
    let free = other.param(param::MEMORY_FREE);
    let buffer = client.create(PAGE);
    let running = submit_with_fence(&client, &hang(), &[buffer]);
    let queued = submit_with_fence(&client, &hang(), &[buffer]);
    drop(client);
    assert_eq!(outcome(&running), Err(Errno::ECANCELED));
    assert_eq!(outcome(&queued), Err(Errno::ECANCELED));
    assert_eq!(other.wait(other.submit(&[], &[]).unwrap()), 0);
    assert_eq!(other.param(param::MEMORY_FREE), free);
    assert_eq!(other.stats().resets, 0);
}

#[test]
fn closing_a_file_whose_work_waits_for_another_file_drops_it() {
    let driver = driver();
    let (slow, client) = (Client::new(&driver), Client::new(&driver));
    let fence = client.receive(submit_with_fence(&slow, &hang(), &[]));
    let flags = SUBMIT_FENCE_FD_IN | SUBMIT_FENCE_FD_OUT;
    let submit = client
        .submit_all(&[], &[], [&[], &[]], (flags, fence))
        .unwrap();
    let waiting = client.given(submit.fence_fd);
    drop(client);
    assert_eq!(outcome(&waiting), Err(Errno::ECANCELED));
    assert_eq!(slow.wait_for(1, 0), Err(Errno::ETIME));
    assert_eq!(slow.wait(1), -Errno::EIO.number());
}

#[test]
fn the_last_file_may_outlive_the_driver() {
    let driver = driver();
    let client = Client::new(&driver);
    drop(driver);
    assert_eq!(client.wait(client.submit(&[], &[]).unwrap()), 0);
    let fence = submit_with_fence(&client, &hang(), &[]);
    drop(client);
    assert_eq!(outcome(&fence), Err(Errno::ECANCELED));
}

#[test]
fn memory_lives_until_the_submission_that_uses_it_is_finished() {
    let driver = driver();
    let client = Client::new(&driver);
    let free = client.param(param::MEMORY_FREE);
    let buffer = client.create(PAGE);
    let seqno = client.submit(&hang(), &[buffer]).unwrap();
    client.close(buffer).unwrap();
    assert_eq!(client.param(param::MEMORY_FREE), free - PAGE);
    client.wait(seqno);
    assert_eq!(client.param(param::MEMORY_FREE), free);
}

#[test]
fn many_threads_create_submit_wait_and_close_at_a_time() {
    let driver = driver_with(SoftConfig {
        engines: 3,
        ..SoftConfig::default()
    });
    let shared = Client::new(&driver);
    let free = shared.param(param::MEMORY_FREE);
    std::thread::scope(|scope| {
        for thread in 0..8_u32 {
            let (driver, shared) = (&driver, &shared);
            scope.spawn(move || {
                for round in 0..50 {
                    let own = Client::new(driver);
                    // Every second thread uses the one file that all share.
                    let client = if thread % 2 == 0 { &own } else { shared };
                    let value = thread * 1000 + round;
                    let buffer = client.create(2 * PAGE);
                    let stream = stream(|stream| {
                        let target = surface(0, 32, 64);
                        stream.push(0, &fill(target, value.to_le_bytes())).unwrap();
                    });
                    let seqno = client.submit(&stream, &[buffer]).unwrap();
                    assert_eq!(client.wait(seqno), 0);
                    let expected = value.to_le_bytes().repeat(2048);
                    assert!(client.map(buffer).bytes() == expected);
                    client.close(buffer).unwrap();
                    if round % 3 == 0 {
                        let buffer = own.create(PAGE);
                        own.submit(&hang(), &[buffer]).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(shared.wait(shared.submit(&[], &[]).unwrap()), 0);
    // Files that were closed with a hanging submission are stopped soon after.
    while shared.param(param::MEMORY_FREE) != free {
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_that_writes_what_an_engine_reads_harms_nobody() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffers = [client.create(64 * PAGE), client.create(64 * PAGE)];
    let map = client.map(buffers[0]);
    let target = surface(1, 128, 128);
    let parts = rectangle(0, 0, 128, 128);
    let command = Blit {
        source: surface(0, 128, 128),
        target,
        source_rectangle: parts,
        target_rectangle: parts,
        ..Blit::default()
    };
    let work = stream(|stream| {
        for _ in 0..20 {
            stream.push(BLIT_BLEND, &command).unwrap();
        }
    });
    let seqno = client.submit(&work, &buffers).unwrap();
    let mut value = 0_u8;
    while client.wait_for(seqno, 0) == Err(Errno::ETIME) {
        value = value.wrapping_add(1);
        map.write(0, &[value; 65_536]);
    }
    assert_eq!(client.wait(seqno), 0);
}

/// What a submission of these bytes says, with two buffers of a page each.
fn refused(stream: &[u8]) -> Result<(), Errno> {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffers = [client.create(PAGE), client.create(PAGE)];
    let submitted = client.submit(stream, &buffers);
    if submitted.is_err() {
        assert_eq!(client.info(buffers[0]).busy, 0);
    }
    submitted.map(|seqno| assert_eq!(client.wait(seqno), 0))
}

fn one<C: Command>(flags: u16, command: C) -> Vec<u8> {
    stream(|stream| stream.push(flags, &command).unwrap())
}

#[test]
fn a_malformed_stream_is_refused_as_a_whole() {
    let good = one(0, store(0, 0, 1));
    refused(&good).unwrap();
    refused(&[]).unwrap();
    let header = |opcode, flags, size: u32, length: usize| {
        let header = Header {
            opcode,
            flags,
            size,
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.resize(length, 0);
        bytes
    };
    let bad = [
        good[..20].to_vec(),
        [good.clone(), vec![0; 4]].concat(),
        [good.clone(), vec![0; 8]].concat(),
        header(opcode::STORE, 0, 32, 24),
        header(opcode::STORE, 0, 16, 24),
        header(opcode::STORE, 0, 0, 24),
        header(opcode::STORE, 0, u32::MAX, 24),
        header(opcode::STORE, 0, u32::MAX - 7, 24),
        header(opcode::STORE, 1, 24, 24),
        header(opcode::FILL, 0, 24, 24),
        header(opcode::HANG, 0, 16, 16),
        header(opcode::HANG, 1, 8, 8),
        header(opcode::PATH, 0, 8, 8),
        header(0, 0, 8, 8),
        header(999, 0, 8, 8),
        [good, header(999, 0, 8, 8)].concat(),
    ];
    for stream in bad {
        assert_eq!(refused(&stream), Err(Errno::EINVAL), "{stream:?}");
    }
}

#[test]
fn a_picture_must_lie_in_its_buffer() {
    let good = surface(0, 16, 16);
    refused(&one(0, fill(good, [0; 4]))).unwrap();
    refused(&one(0, fill(Surface { height: 64, ..good }, [0; 4]))).unwrap();
    refused(&one(
        0,
        fill(
            Surface {
                offset: 3072,
                ..good
            },
            [0; 4],
        ),
    ))
    .unwrap();
    let bad = [
        Surface { buffer: 2, ..good },
        Surface {
            buffer: u32::MAX,
            ..good
        },
        Surface { stride: 60, ..good },
        Surface { stride: 66, ..good },
        Surface {
            stride: u32::MAX - 3,
            ..good
        },
        Surface {
            offset: 3076,
            ..good
        },
        Surface { offset: 2, ..good },
        Surface {
            offset: u64::MAX - 3,
            ..good
        },
        Surface {
            offset: PAGE,
            ..good
        },
        Surface { width: 0, ..good },
        Surface { height: 0, ..good },
        Surface { height: 65, ..good },
        Surface {
            height: u32::MAX,
            ..good
        },
        Surface {
            width: DIMENSION_MAX + 1,
            stride: u32::MAX - 3,
            height: 1,
            ..good
        },
    ];
    for target in bad {
        let command = Fill {
            target,
            rectangle: rectangle(0, 0, 1, 1),
            ..Fill::default()
        };
        assert_eq!(refused(&one(0, command)), Err(Errno::EINVAL), "{target:?}");
    }
    let outside = [
        rectangle(0, 0, 0, 1),
        rectangle(0, 0, 1, 0),
        rectangle(16, 0, 1, 1),
        rectangle(0, 16, 1, 1),
        rectangle(1, 0, 16, 1),
        rectangle(u32::MAX, 0, 2, 1),
        rectangle(0, 1, 1, u32::MAX),
    ];
    for rectangle in outside {
        let command = Fill {
            target: good,
            rectangle,
            ..Fill::default()
        };
        assert_eq!(
            refused(&one(0, command)),
            Err(Errno::EINVAL),
            "{rectangle:?}"
        );
    }
    let padded = Fill {
        pad: 1,
        ..fill(good, [0; 4])
    };
    assert_eq!(refused(&one(0, padded)), Err(Errno::EINVAL));
}

#[test]
fn a_copy_and_a_product_must_lie_in_their_buffers() {
    let good = CopyBytes {
        target: 1,
        length: PAGE,
        ..CopyBytes::default()
    };
    refused(&one(0, good)).unwrap();
    let bad = [
        CopyBytes { length: 0, ..good },
        CopyBytes {
            length: PAGE + 1,
            ..good
        },
        CopyBytes { source: 2, ..good },
        CopyBytes { target: 2, ..good },
        CopyBytes {
            source_offset: 1,
            ..good
        },
        CopyBytes {
            target_offset: u64::MAX,
            ..good
        },
        CopyBytes {
            length: u64::MAX,
            source_offset: 1,
            ..good
        },
    ];
    for copy in bad {
        assert_eq!(refused(&one(0, copy)), Err(Errno::EINVAL), "{copy:?}");
    }
    let matrix = Matrix {
        buffer: 0,
        stride: 32,
        offset: 0,
    };
    let good = MatMul {
        a: matrix,
        b: matrix,
        c: Matrix {
            buffer: 1,
            ..matrix
        },
        m: 8,
        k: 8,
        n: 8,
        ..MatMul::default()
    };
    refused(&one(0, good)).unwrap();
    let bad = [
        MatMul { m: 0, ..good },
        MatMul { k: 0, ..good },
        MatMul { n: 9, ..good },
        MatMul { m: 129, ..good },
        MatMul {
            m: MATRIX_MAX + 1,
            ..good
        },
        MatMul { pad: 1, ..good },
        MatMul {
            a: Matrix {
                offset: PAGE,
                ..matrix
            },
            ..good
        },
        MatMul {
            b: Matrix {
                offset: u64::MAX - 3,
                ..matrix
            },
            ..good
        },
        MatMul {
            c: Matrix {
                buffer: 2,
                ..matrix
            },
            ..good
        },
        MatMul {
            c: Matrix {
                stride: 28,
                ..matrix
            },
            ..good
        },
        MatMul {
            a: Matrix {
                stride: 34,
                ..matrix
            },
            ..good
        },
    ];
    for product in bad {
        assert_eq!(refused(&one(0, product)), Err(Errno::EINVAL), "{product:?}");
    }
    assert_eq!(refused(&one(2, good)), Err(Errno::EINVAL));
}

#[test]
fn a_path_that_makes_no_sense_is_refused() {
    let target = surface(0, 16, 16);
    let good = Path {
        target,
        color: [0.5; 4],
        transform: IDENTITY,
        ..Path::default()
    };
    let line = [verb::MOVE, verb::LINE, verb::LINE];
    let points = [[1.0, 1.0], [9.0, 1.0], [5.0, 9.0]];
    let say = |flags, path: Path, points: &[[f32; 2]], stops: &[soft::Stop], verbs: &[u8]| {
        let stream = stream(|stream| {
            stream
                .push_path(flags, &path, points, stops, verbs)
                .unwrap()
        });
        refused(&stream)
    };
    assert_eq!(say(0, good, &points, &[], &line), Ok(()));
    let bad = Err(Errno::EINVAL);
    assert_eq!(say(8, good, &points, &[], &line), bad);
    assert_eq!(
        say(0, good, &points, &[], &[verb::LINE, verb::LINE, verb::LINE]),
        bad
    );
    assert_eq!(
        say(0, good, &points, &[], &[verb::MOVE, verb::LINE]),
        bad,
        "a point too many"
    );
    assert_eq!(
        say(0, good, &points[..2], &[], &line),
        bad,
        "a point too few"
    );
    assert_eq!(
        say(0, good, &points, &[], &[verb::MOVE, verb::LINE, 5]),
        bad
    );
    assert_eq!(say(0, good, &[], &[], &[verb::CLOSE]), bad);
    for value in [
        f32::NAN,
        f32::INFINITY,
        -f32::INFINITY,
        f32::MAX,
        70_000.0,
        -70_000.0,
    ] {
        let mut points = points;
        points[1][0] = value;
        assert_eq!(say(0, good, &points, &[], &line), bad, "{value}");
        let mut transform = IDENTITY;
        transform[4] = value;
        assert_eq!(say(0, Path { transform, ..good }, &points, &[], &line), bad);
        let color = [value, 0.0, 0.0, 1.0];
        assert_eq!(say(0, Path { color, ..good }, &points, &[], &line), bad);
    }
    let stop = |offset| soft::Stop {
        offset,
        color: [1.0; 4],
    };
    let linear = Path {
        paint: paint::LINEAR,
        color: [0.0; 4],
        end: [9.0, 9.0],
        ..good
    };
    let two = [stop(0.0), stop(1.0)];
    assert_eq!(say(0, linear, &points, &two, &line), Ok(()));
    assert_eq!(
        say(0, good, &points, &two, &line),
        bad,
        "stops of one colour"
    );
    assert_eq!(say(0, linear, &points, &two[..1], &line), bad);
    assert_eq!(say(0, linear, &points, &[stop(0.6), stop(0.5)], &line), bad);
    assert_eq!(say(0, linear, &points, &[stop(0.6), stop(1.5)], &line), bad);
    assert_eq!(
        say(0, linear, &points, &[stop(f32::NAN), stop(0.5)], &line),
        bad
    );
    assert_eq!(
        say(
            0,
            Path {
                spread: 3,
                ..linear
            },
            &points,
            &two,
            &line
        ),
        bad
    );
    assert_eq!(
        say(0, Path { paint: 3, ..linear }, &points, &two, &line),
        bad
    );
    assert_eq!(
        say(
            0,
            Path {
                radius: 1.0,
                ..linear
            },
            &points,
            &two,
            &line
        ),
        bad
    );
    let radial = Path {
        paint: paint::RADIAL,
        end: [0.0; 2],
        ..linear
    };
    assert_eq!(
        say(
            0,
            Path {
                radius: 1.0,
                ..radial
            },
            &points,
            &two,
            &line
        ),
        Ok(())
    );
    for radius in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(say(0, Path { radius, ..radial }, &points, &two, &line), bad);
    }
}

#[test]
fn a_submission_that_is_too_much_work_is_refused() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffer = client.create(256 << 20);
    let copy = CopyBytes {
        length: 128 << 20,
        target_offset: 128 << 20,
        ..CopyBytes::default()
    };
    let work = |count| stream(|stream| (0..count).for_each(|_| stream.push(0, &copy).unwrap()));
    assert_eq!(client.submit(&work(5), &[buffer]), Err(Errno::E2BIG));
    let product = MatMul {
        a: Matrix {
            stride: 16_384,
            ..Matrix::default()
        },
        b: Matrix {
            stride: 16_384,
            ..Matrix::default()
        },
        c: Matrix {
            stride: 16_384,
            offset: 128 << 20,
            ..Matrix::default()
        },
        m: 4096,
        k: 4096,
        n: 4096,
        ..MatMul::default()
    };
    assert_eq!(
        client.submit(&one(0, product), &[buffer]),
        Err(Errno::E2BIG)
    );
    let target = Surface {
        stride: 4 * 8192,
        ..surface(0, 8192, 8192)
    };
    let path = Path {
        target,
        color: [1.0; 4],
        transform: IDENTITY,
        ..Path::default()
    };
    let corners = [[0.0, 0.0], [8192.0, 0.0], [8192.0, 8192.0], [0.0, 8192.0]];
    let verbs = [verb::MOVE, verb::LINE, verb::LINE, verb::LINE];
    let path = stream(|stream| stream.push_path(0, &path, &corners, &[], &verbs).unwrap());
    assert_eq!(client.submit(&path, &[buffer]), Err(Errno::E2BIG));
    // Thin columns: few bytes, but many rows.
    let column = Surface {
        stride: 4 * 8192,
        ..surface(0, 1, 8192)
    };
    let columns = |count| {
        stream(|stream| {
            (0..count).for_each(|_| stream.push(0, &fill(column, [1; 4])).unwrap());
        })
    };
    assert_eq!(client.submit(&columns(2000), &[buffer]), Err(Errno::E2BIG));
    let seqno = client.submit(&columns(100), &[buffer]).unwrap();
    assert_eq!(client.wait(seqno), 0);
    let many = stream(|stream| while stream.push(0, &Hang::default()).is_ok() {});
    assert_eq!(many.len(), COMMANDS_SIZE_MAX as usize);
    let seqno = client.submit(&[], &[buffer]).unwrap();
    assert_eq!(client.wait(seqno), 0);
}

/// Whether any command of the stream hangs.
fn hangs(mut stream: &[u8]) -> bool {
    while let Ok((header, _)) = Header::read_from_prefix(stream) {
        if header.opcode == opcode::HANG {
            return true;
        }
        match stream.get(header.size.max(8) as usize..) {
            Some(rest) => stream = rest,
            None => return false,
        }
    }
    false
}

#[test]
fn no_stream_makes_an_engine_panic_or_touch_what_is_not_its_own() {
    let driver = patient_driver();
    let client = Client::new(&driver);
    let buffers = [client.create(PAGE), client.create(4 * PAGE)];
    // Not in the list: nothing may change it.
    let bystander = client.map(client.create(PAGE));
    bystander.write(0, &[0x5a; 4096]);
    let matrix = |buffer| Matrix {
        buffer,
        stride: 64,
        offset: 0,
    };
    let parts = rectangle(0, 0, 8, 8);
    let blit = Blit {
        source: surface(0, 16, 16),
        target: surface(1, 16, 16),
        source_rectangle: parts,
        target_rectangle: rectangle(1, 2, 13, 5),
        ..Blit::default()
    };
    let product = MatMul {
        a: matrix(0),
        b: matrix(0),
        c: matrix(1),
        m: 16,
        k: 16,
        n: 16,
        ..MatMul::default()
    };
    let copy = CopyBytes {
        target: 1,
        length: 100,
        ..CopyBytes::default()
    };
    let path = Path {
        target: surface(1, 32, 32),
        color: [0.5; 4],
        transform: IDENTITY,
        ..Path::default()
    };
    let good = stream(|stream| {
        stream.push(0, &fill(surface(0, 16, 16), [1; 4])).unwrap();
        stream.push(BLIT_BLEND | BLIT_SMOOTH, &blit).unwrap();
        stream.push(MATMUL_ACCUMULATE, &product).unwrap();
        let points = [[1.0, 1.0], [30.0, 5.0], [8.0, 30.0]];
        let verbs = [verb::MOVE, verb::QUAD, verb::CLOSE];
        stream.push_path(0, &path, &points, &[], &verbs).unwrap();
        stream.push(0, &store(0, 8, 1)).unwrap();
        stream.push(0, &copy).unwrap();
    });
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..5000 {
        let mut stream = good.clone();
        for _ in 0..=numbers.next() % 3 {
            let at = numbers.next() as usize % stream.len();
            stream[at] = match numbers.next() % 3 {
                0 => numbers.next() as u8,
                1 => [0, 0x7f, 0x80, 0xff][numbers.next() as usize % 4],
                _ => stream[at] ^ (1 << (numbers.next() % 8)),
            };
        }
        if hangs(&stream) {
            continue;
        }
        match client.submit(&stream, &buffers) {
            Ok(seqno) => {
                let error = client.wait(seqno);
                assert!([0, -Errno::EFAULT.number()].contains(&error), "{stream:?}");
                accepted += 1;
            }
            Err(error) => {
                assert!([Errno::EINVAL, Errno::E2BIG].contains(&error), "{error}");
                refused += 1;
            }
        }
    }
    assert!(accepted > 500 && refused > 500, "{accepted}, {refused}");
    assert_eq!(bystander.bytes(), [0x5a; 4096]);
}
