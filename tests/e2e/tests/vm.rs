//! The whole way on this machine's KVM: a guest in a VM, its driver, the virtqueue, the proxy, the embedded GPU; with the proxy in
//! the VMM and in a daemon.
//!
//! Without /dev/kvm these tests fail, unless `PVGPU_WITHOUT_KVM=1` says that this is known: the testbed then still runs
//! the same guest.

mod guest_program;

use std::sync::Arc;

use guest_program::{guest, proxyd, with_kvm};
use pvgpu_e2e::daemon::Daemon;
use pvgpu_e2e::double_fetch;
use pvgpu_e2e::guest_vm::{self, APERTURE, Lines, Run};
use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_e2e::vanishing::{self, Loss};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::limit::Limit;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_mini_vmm::{Gpu, Vm};
use pvgpu_scenarios::soft;

fn driver() -> Arc<SoftDriver> {
    Arc::new(SoftDriver::new(SoftConfig::default()).unwrap())
}

/// Where the device is, and the size of its aperture or whether there is one.
#[derive(Clone, Copy, Debug)]
enum Place {
    Here(Doorbell, u64),
    Daemon { aperture: bool },
}

const INLINE: Place = Place::Here(Doorbell::Inline, APERTURE);
const WORKER: Place = Place::Here(Doorbell::Worker, APERTURE);
const DAEMON: Place = Place::Daemon { aperture: true };
const PLACES: [Place; 6] = [
    INLINE,
    WORKER,
    Place::Here(Doorbell::Inline, 0),
    Place::Here(Doorbell::Worker, 0),
    DAEMON,
    Place::Daemon { aperture: false },
];

/// Boots the guest with these words on its command line; `None` where there is no KVM and that is known.
fn boot(command_line: &str, place: Place) -> Option<Run> {
    if !with_kvm() {
        return None;
    }
    let run = match place {
        Place::Here(doorbell, aperture) => {
            let device = (doorbell, aperture);
            guest_vm::run(guest(), command_line, driver(), device, |_| ())
        }
        Place::Daemon { aperture } => {
            let daemon = Daemon::start(proxyd(), &[]).unwrap();
            let socket = daemon.socket();
            let gpu = Gpu::VhostUser { socket, aperture };
            guest_vm::run_with(guest(), command_line, gpu, |_| ())
        }
    };
    Some(run.unwrap())
}

/// Runs a scenario that must end well; `None` as for [`boot`].
fn run(scenario: &str, place: Place) -> Option<Run> {
    let run = boot(&format!("scenario={scenario}"), place)?;
    assert_eq!(
        run.outcome.exit_code,
        0,
        "{place:?}: {:?}\n{}",
        run.outcome.ending,
        run.lines.join("\n")
    );
    Some(run)
}

#[test]
fn the_guest_draws_the_same_picture_as_a_program_beside_the_gpu() {
    let mut file = LoopbackFile::open(driver()).unwrap();
    let native = soft::draw(&mut file, &mut |_, _| {}).unwrap();
    for place in PLACES {
        let Some(run) = run("draw", place) else {
            return;
        };
        let picture = run.picture.expect("a picture");
        assert!(picture == native, "the pictures differ: {place:?}");
    }
}

#[test]
fn a_guest_gets_the_errnos_that_the_specification_names() {
    for place in PLACES {
        run("selftest", place);
    }
}

/// The guest itself looks at the device after each 64 cases.
#[test]
fn a_hostile_guest_gets_its_vmm_not_disconnected_from_a_daemon() {
    for aperture in [true, false] {
        run("fuzz seed=7 cases=128", Place::Daemon { aperture });
    }
}

#[test]
fn a_guest_that_ends_leaves_no_descriptor_and_no_mapping_in_the_proxys_process() {
    if run("draw", WORKER).is_none() {
        return;
    }
    let count = || {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (
            descriptors,
            maps.lines().filter(|line| line.contains("memfd")).count(),
        )
    };
    // Other tests of this file run VMs at the same time, so what is counted settles only when they are done.
    let settles = (0..600).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (descriptors, mappings) = count();
        descriptors < 32 && mappings == 0
    });
    assert!(
        settles,
        "left behind: {:?} descriptors and mappings",
        count()
    );
}

#[test]
fn the_guests_own_runtime_runs_at_cpl_3_takes_interrupts_and_keeps_its_memory() {
    let Some(hello) = run("hello", INLINE) else {
        return;
    };
    assert!(hello.lines[0].ends_with("at CPL 3"), "{}", hello.lines[0]);
    run("interrupts", INLINE);
    run("memory", INLINE);
}

/// `fault=KIND`, the exit code that belongs to it (101 for a panic, 128 + N for processor exception N), and what the
/// guest says of it.
#[test]
fn a_guest_that_breaks_says_how_on_the_console_and_by_its_exit_code() {
    for (kind, code, words) in [
        ("panic", 101, "fault=panic asked for it"),
        ("invalid", 128 + 6, "exception 6 (invalid opcode)"),
        ("privileged", 128 + 13, "exception 13 (general protection)"),
        ("null", 128 + 14, "cr2 0x8,"),
        ("stack", 128 + 14, "exception 14 (page fault)"),
    ] {
        let Some(run) = boot(&format!("scenario=fault fault={kind}"), INLINE) else {
            return;
        };
        let said = run.lines.join("\n");
        assert_eq!(run.outcome.exit_code, code, "fault={kind}\n{said}");
        assert!(said.contains(words), "fault={kind}\n{said}");
    }
}

#[test]
fn a_polling_guest_is_never_interrupted_and_a_sleeping_one_is() {
    for place in [WORKER, DAEMON] {
        let Some(run) = run("device", place) else {
            return;
        };
        let interrupts = |wait: &str| {
            let line = run.lines.iter().position(|line| line.contains(wait));
            let words = line.and_then(|line| run.lines.get(line + 1)).unwrap();
            words.trim().strip_suffix(" interrupts").unwrap().parse()
        };
        assert_eq!(interrupts("one no-op, Polling"), Ok(0), "{place:?}");
        assert_ne!(interrupts("one no-op, Interrupts"), Ok(0u32), "{place:?}");
    }
}

#[test]
fn a_guest_that_sleeps_for_responses_draws_the_same_picture_as_one_that_polls() {
    let Some(polled) = run("draw", WORKER) else {
        return;
    };
    assert!(polled.picture.is_some());
    for place in [WORKER, DAEMON] {
        let slept = run("draw wait=interrupts", place).unwrap();
        assert!(
            slept.picture == polled.picture,
            "the pictures differ: {place:?}"
        );
    }
}

#[test]
fn a_guest_whose_mapped_memory_goes_away_reads_zeros_and_another_guest_notices_nothing() {
    if with_kvm() {
        vanishing::beside_another_guest(guest(), Loss::CutOff).unwrap();
    }
}

#[test]
fn a_guest_whose_mapped_memory_gives_efault_goes_on_with_zeros_at_once() {
    if with_kvm() {
        vanishing::beside_another_guest(guest(), Loss::NoAccess).unwrap();
    }
}

#[test]
fn a_second_vcpu_that_changes_requests_while_they_are_read_changes_nothing_behind_the_check() {
    if with_kvm() {
        for doorbell in [Doorbell::Inline, Doorbell::Worker] {
            double_fetch::race(guest(), doorbell, 1500).unwrap();
        }
    }
}

#[test]
fn a_guest_that_reaches_a_limit_gets_its_errno_and_the_operator_sees_it_and_what_the_trace_lacks() {
    if !with_kvm() {
        return;
    }
    let lines = Lines::new(|_| ());
    let gpu = guest_vm::in_process(driver(), Doorbell::Worker);
    let mut config = guest_vm::config(guest(), "scenario=draw", gpu, lines.clone());
    let trace = tempfile::tempfile().unwrap();
    let Some(Gpu::InProcess { device, .. }) = &mut config.gpu else {
        panic!("{config:?}");
    };
    device.limits.memory = 4096;
    device.trace = Some(trace.try_clone().unwrap());
    device.trace_limit = 100;
    let outcome = Vm::new(config).unwrap().run().unwrap();
    assert_eq!(outcome.exit_code, 1);
    let gpu = outcome.gpu.unwrap();
    assert_eq!(gpu.reached(Limit::Memory), 1);
    assert!(gpu.untraced > 0 && gpu.untraced < gpu.completed, "{gpu:?}");
    assert!(trace.metadata().unwrap().len() <= 100);
}
