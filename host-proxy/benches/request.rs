//! What the proxy itself takes for a request: decoding, validation, the embedded GPU's answer, without any transport.
//! `cargo bench -p pvgpu-host-proxy`; `cargo xtask bench` measures the whole way.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_main};
use pvgpu_host_proxy::Limits;
use pvgpu_host_proxy::session::{RESPONSE_HEADER, Session};
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_protocol::control::{self, Hello};
use pvgpu_protocol::family::soft;
use pvgpu_protocol::layout::PRESENT;
use pvgpu_protocol::wire::{IoctlRequest, OpenRequest, Operation, RequestHeader, open};
use zerocopy::IntoBytes;

/// Room for every response here.
const ROOM: usize = RESPONSE_HEADER + 4096;

fn message(operation: Operation, object: i32, parts: &[&[u8]]) -> Vec<u8> {
    let header = RequestHeader::new(operation, object.cast_unsigned(), 1);
    [&[header.as_bytes()], parts].concat().concat()
}

fn ioctl(file: i32, command: u32, parts: &[&[u8]]) -> Vec<u8> {
    let body = IoctlRequest {
        command: command.into(),
        reserved: 0.into(),
    };
    message(
        Operation::Ioctl,
        file,
        &[&[body.as_bytes()], parts].concat(),
    )
}

/// Performs a request that does not wait, and returns its result.
fn perform(session: &Session, request: &[u8]) -> i32 {
    let response = session
        .perform(request, ROOM, || unreachable!("no request here waits"))
        .expect("an answer at once");
    let written = response.write(|_, bytes| {
        black_box(bytes);
        Ok::<(), ()>(())
    });
    written.expect("writing cannot fail");
    response.result()
}

/// A session with an open file.
fn connect() -> (Session, i32) {
    let driver = SoftDriver::new(SoftConfig::default()).expect("the embedded GPU");
    let session = Session::new(Arc::new(driver), None, Limits::default());
    let hello = Hello::new("bench");
    let mut record = [0; 128];
    let length = control::encode(&hello, &mut record).expect("a short record");
    let hello = message(Operation::Hello, 0, &[&record[..length]]);
    assert_eq!(perform(&session, &hello), 0);
    let flags = OpenRequest {
        flags: open::RDWR.into(),
        reserved: 0.into(),
    };
    let file = perform(&session, &message(Operation::Open, 0, &[flags.as_bytes()]));
    assert!(file > 0, "open gave {file}");
    (session, file)
}

fn requests(criterion: &mut Criterion) {
    let (session, file) = connect();
    let nop = message(Operation::Nop, 0, &[]);
    criterion.bench_function("no-op", |bench| {
        bench.iter(|| assert_eq!(perform(&session, black_box(&nop)), 0));
    });

    let argument = soft::GetParam::default();
    let getparam = ioctl(file, soft::DRM_IOCTL_SOFT_GETPARAM, &[argument.as_bytes()]);
    criterion.bench_function("GETPARAM", |bench| {
        bench.iter(|| assert_eq!(perform(&session, black_box(&getparam)), 0));
    });

    // No command starts with zeros, so the driver refuses them as soon as it has them.
    for size in [64, 64 << 10, 1 << 20] {
        let commands = vec![0; size];
        let argument = soft::Submit {
            commands: PRESENT,
            commands_size: size as u32,
            ..Default::default()
        };
        let submit = ioctl(
            file,
            soft::DRM_IOCTL_SOFT_SUBMIT,
            &[argument.as_bytes(), &commands],
        );
        let mut group = criterion.benchmark_group("SUBMIT that is refused");
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("{size} bytes"), |bench| {
            bench.iter(|| assert_eq!(perform(&session, black_box(&submit)), -libc::EINVAL));
        });
        group.finish();
    }
}

#[allow(
    missing_docs,
    reason = "the macro makes a function without documentation"
)]
mod group {
    criterion::criterion_group!(benches, super::requests);
}
criterion_main!(group::benches);
