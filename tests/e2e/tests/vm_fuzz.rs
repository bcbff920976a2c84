//! A hostile guest on this machine's KVM: generated programs against the whole machine. The one test of this file counts
//! what its process has, so nothing else may run beside it.

mod guest_program;

use std::sync::Arc;
use std::time::Duration;

use guest_program::{guest, with_kvm};
use pvgpu_e2e::vm_fuzz::{Plan, play};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};

#[test]
fn generated_programs_leave_a_device_that_works_and_nothing_else_and_are_the_same_for_one_seed() {
    if !with_kvm() {
        return;
    }
    let [inline, worker] = [Doorbell::Inline, Doorbell::Worker].map(|doorbell| {
        let soft = SoftDriver::new(SoftConfig {
            watchdog: Duration::from_millis(200),
            ..SoftConfig::default()
        });
        let plan = Plan {
            seed: 1,
            first: 0,
            cases: 192,
            seconds: None,
            doorbell,
        };
        play(guest(), Arc::new(soft.unwrap()), plan, None).unwrap()
    });
    assert_eq!((inline.cases, worker.cases), (192, 192));
    assert_eq!(inline.fingerprint, worker.fingerprint, "other programs");
    // Programs that reach nothing prove nothing.
    assert!(inline.completed > 500, "{inline:?}");
    assert!(inline.completed - inline.rejected > 200, "{inline:?}");
    assert!(inline.malformed > 50, "{inline:?}");
}
