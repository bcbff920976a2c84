//! An operator looks at a guest that runs on this machine's KVM, and records what it asks.

mod guest_program;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest_program::{guest, with_kvm};
use pvgpu_e2e::guest_vm::{self, Lines};
use pvgpu_host_proxy::control::{AskError, Command, Refusal, Reply, Socket, ask, serve};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_host_proxy::statistics::{Recording, SessionState, Statistics};
use pvgpu_mini_vmm::{Ending, Vm};
use pvgpu_protocol::control::decode_trace;
use pvgpu_protocol::wire::Operation;

/// Longer than a guest takes to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn status(socket: &Path) -> Statistics {
    match ask(socket, &Command::Status, None) {
        Ok(Reply::Status(statistics)) => *statistics,
        other => panic!("no status: {other:?}"),
    }
}

/// The first status of which that is true.
fn wait_for(socket: &Path, what: &str, is: impl Fn(&Statistics) -> bool) -> Statistics {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let statistics = status(socket);
        if is(&statistics) {
            return statistics;
        }
        assert!(Instant::now() < deadline, "{what}: {statistics:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_operator_sees_the_session_of_a_running_guest_and_switches_its_trace_on_and_off() {
    if !with_kvm() {
        return;
    }
    for doorbell in [Doorbell::Inline, Doorbell::Worker] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
        let command_line = "scenario=bench measure=nop,getparam rounds=1000000";
        let lines = Lines::new(|_| ());
        let gpu = guest_vm::in_process(driver, doorbell);
        let config = guest_vm::config(guest(), command_line, gpu, lines);
        let vm = Vm::new(config).unwrap();
        let monitor = vm.monitor().unwrap();
        let server = serve(
            socket.listener().unwrap(),
            monitor.clone(),
            Sandbox::default(),
        );
        let server = server.unwrap();
        let stop = vm.stop();
        let machine = thread::spawn(move || vm.run().unwrap());

        let before = wait_for(&path, "no session", |now| {
            now.usage.is_some_and(|usage| usage.files > 0) && now.at_once.count() > 100
        });
        let session = before.session.as_ref().unwrap();
        assert_eq!(session.state, SessionState::Open);
        assert!(!session.guest.is_empty());
        assert_eq!(
            (before.driver.name.as_str(), before.trace),
            ("soft", Recording::Off)
        );
        let after = wait_for(&path, "no requests", |now| {
            now.completed > before.completed + 100
        });
        let latency = after.at_once.since(&before.at_once);
        let (half, most) = (latency.percentile(0.5), latency.percentile(0.999));
        assert!(half > Some(Duration::ZERO) && half <= most, "{latency:?}");

        let trace = folder.path().join("trace");
        let file = fs::File::create(&trace).unwrap();
        let start = Command::StartTrace { limit: 64 << 20 };
        assert!(matches!(ask(&path, &start, Some(&file)), Ok(Reply::Done)));
        let again = ask(&path, &start, Some(&file));
        assert!(
            matches!(again, Err(AskError::Refused(Refusal::Busy))),
            "{again:?}"
        );
        let tracing = status(&path);
        assert_eq!(tracing.trace, Recording::On);
        wait_for(&path, "nothing to record", |now| {
            now.completed > tracing.completed + 100
        });
        assert!(matches!(
            ask(&path, &Command::StopTrace, None),
            Ok(Reply::Done)
        ));
        let bytes = fs::read(&trace).unwrap();
        let stopped = status(&path);
        assert_eq!((stopped.trace, stopped.untraced), (Recording::Off, 0));
        let mut rest = &bytes[..];
        let mut records = 0;
        while !rest.is_empty() {
            let (record, length) = decode_trace(rest).expect("a whole record");
            let operation = u16::from_le_bytes([record.request[0], record.request[1]]);
            let operation = Operation::from_number(operation);
            assert!(
                matches!(operation, Some(Operation::Nop | Operation::Ioctl)),
                "{operation:?}"
            );
            assert_eq!(record.result, 0);
            rest = &rest[length..];
            records += 1;
        }
        assert!(records >= 100, "{records}");
        wait_for(&path, "the guest stands still", |now| {
            now.completed > stopped.completed + 100
        });
        assert_eq!(
            fs::read(&trace).unwrap().len(),
            bytes.len(),
            "recorded after the stop"
        );

        stop.end(Ending::Stopped { signal: None });
        let outcome = machine.join().unwrap();
        // What was counted outlives the machine; its session does not.
        let last = status(&path);
        assert_eq!((last.session, last.usage), (None, None));
        assert_eq!(last.completed, outcome.gpu.unwrap().completed);
        drop((server, socket));
        assert!(!path.exists());
    }
}
