//! A trace that is replayed gives what it recorded, and says so when it does not.

mod guest_program;

use std::fs;
use std::sync::Arc;

use guest_program::{guest, with_kvm};
use pvgpu_e2e::guest_vm::Lines;
use pvgpu_e2e::replay::{Difference, ReplayError, replay};
use pvgpu_host_proxy::device::{DeviceConfig, Doorbell};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::{Errno, Limits};
use pvgpu_mini_vmm::{Console, DumpTarget, Ending, Gpu, Vm, VmConfig};
use pvgpu_protocol::control::{self, Hello, TraceRecord, encode_trace};
use pvgpu_protocol::wire::{Operation, PollRequest, RequestHeader};
use tempfile::NamedTempFile;
use zerocopy::IntoBytes;

fn soft() -> Arc<dyn HostDriver> {
    Arc::new(SoftDriver::new(SoftConfig::default()).unwrap())
}

/// What a guest's run leaves in a trace.
fn record(scenario: &str, doorbell: Doorbell) -> Vec<u8> {
    let trace = NamedTempFile::new().unwrap();
    let config = VmConfig {
        cmdline: format!("scenario={scenario}"),
        gpu: Some(Gpu::InProcess {
            driver: soft(),
            aperture: 256 << 20,
            device: DeviceConfig {
                doorbell,
                trace: Some(trace.reopen().unwrap()),
                ..DeviceConfig::default()
            },
        }),
        console: Console::output(Lines::new(|_| ())),
        dump: Some(DumpTarget::Memory),
        ..VmConfig::new(guest())
    };
    let outcome = Vm::new(config).unwrap().run().unwrap();
    assert_eq!(outcome.ending, Ending::Exit { code: 0 });
    fs::read(trace.path()).unwrap()
}

#[test]
fn a_recorded_guest_replays_with_the_same_results() {
    if !with_kvm() {
        return;
    }
    for (scenario, doorbell) in [("selftest", Doorbell::Inline), ("draw", Doorbell::Worker)] {
        let trace = record(scenario, doorbell);
        let replay = replay(&trace, &soft(), Limits::default()).unwrap();
        assert_eq!(replay.differences, [], "{scenario}");
        assert_eq!(replay.sessions, 1, "{scenario}");
        assert!(replay.requests > 30, "{scenario}: {}", replay.requests);
    }
}

/// A trace of made-up requests: when each came, its operation, object and body, and its result.
fn trace(requests: &[(u64, Operation, u32, &[u8], i32)]) -> Vec<u8> {
    let mut trace = Vec::new();
    for (id, &(time_ns, operation, object, body, result)) in (0u64..).zip(requests) {
        let header = RequestHeader::new(operation, object, id);
        let record = TraceRecord {
            time_ns,
            duration_ns: 1,
            queue: 0,
            result,
            request: &[header.as_bytes(), body].concat(),
        };
        let mut bytes = [0; 256];
        let length = encode_trace(&record, &mut bytes).unwrap();
        trace.extend(&bytes[..length]);
    }
    trace
}

fn hello() -> Vec<u8> {
    let hello = Hello::new("test");
    let mut bytes = [0; 64];
    let length = control::encode(&hello, &mut bytes).unwrap();
    bytes[..length].to_vec()
}

const OPEN: [u8; 8] = [2, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn a_result_that_differs_from_the_trace_is_named() {
    let recorded = trace(&[
        (1, Operation::Hello, 0, &hello(), 0),
        (2, Operation::Open, 0, &OPEN, 1),
        (3, Operation::Close, 1, &[], -Errno::EIO.number()),
        // In the order of time, not of the file.
        (5, Operation::Open, 0, &OPEN, 3),
        (4, Operation::Open, 0, &OPEN, 2),
    ]);
    let replay = replay(&recorded, &soft(), Limits::default()).unwrap();
    let difference = Difference {
        record: 2,
        operation: Some(Operation::Close.number()),
        recorded: -Errno::EIO.number(),
        replayed: Some(0),
    };
    assert_eq!((replay.requests, replay.differences), (5, vec![difference]));
}

#[test]
fn a_second_hello_that_succeeded_begins_a_session_of_its_own_and_ends_what_waits() {
    let wait = PollRequest {
        events: 1.into(),
        reserved: 0.into(),
        timeout_ns: (-1).into(),
    };
    let recorded = trace(&[
        (1, Operation::Hello, 0, &hello(), 0),
        (2, Operation::Open, 0, &OPEN, 1),
        (
            3,
            Operation::Poll,
            1,
            wait.as_bytes(),
            -Errno::EINTR.number(),
        ),
        (9, Operation::Hello, 0, &hello(), 0),
        (10, Operation::Open, 0, &OPEN, 1),
        (11, Operation::Hello, 0, &hello(), -Errno::EBUSY.number()),
    ]);
    let replay = replay(&recorded, &soft(), Limits::default()).unwrap();
    assert_eq!((replay.sessions, replay.differences), (2, vec![]));
}

#[test]
fn a_trace_that_ends_within_a_record_is_refused() {
    let mut recorded = trace(&[(1, Operation::Nop, 0, &[], 0)]);
    let whole = recorded.len();
    recorded.extend_from_within(..whole - 1);
    let refused = replay(&recorded, &soft(), Limits::default());
    assert!(matches!(refused, Err(ReplayError::Record(at)) if at == whole));
}
