//! Sessions that end in every state leave nothing behind in the proxy's process: no descriptor, mapping, thread or memory.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pvgpu_e2e::footprint::Footprint;
use pvgpu_e2e::live_heap;
use pvgpu_e2e::session_states::{self as states, ENDS, End, STATES};
use pvgpu_host_proxy::driver::HostDriver;
use pvgpu_host_proxy::soft::SoftDriver;

#[global_allocator]
static COUNTED: live_heap::Counting = live_heap::Counting;

/// How many sessions, half of them in each test, unless `PVGPU_LEAK_SESSIONS` says another number.
const SESSIONS: usize = 10_000;
/// Bytes of heap that are no leak: tables that have grown.
const HEAP: usize = 32 << 10;
/// What a process has is measured one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Opens and ends sessions in all states by these ends, and compares what there is before and after.
fn leaves_nothing_behind(ends: &[End]) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    live_heap::steady();
    let sessions = std::env::var("PVGPU_LEAK_SESSIONS").ok();
    let sessions = sessions.map_or(SESSIONS, |number| number.parse().unwrap());
    let driver: Arc<dyn HostDriver> = Arc::new(SoftDriver::new(states::GPU).unwrap());
    let all = ends
        .iter()
        .flat_map(|end| STATES.iter().map(move |state| (*state, *end)));
    // Once, so that everything is there that comes once.
    for (state, end) in all.clone().chain(all.clone()) {
        states::open_and_end(&driver, state, end).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let free = states::free_memory(&driver).unwrap();
    let (base, heap) = (Footprint::at_rest().unwrap(), live_heap::bytes());
    let start = Instant::now();
    for (state, end) in all.cycle().take(sessions / 2) {
        states::open_and_end(&driver, state, end).unwrap();
    }
    let took = start.elapsed();
    let after = Footprint::settle(&base, Duration::from_secs(20));
    let grown = live_heap::bytes().saturating_sub(heap);
    println!(
        "{} sessions in {took:.1?}: before {base}; after {after:?}; heap {heap} + {grown} bytes",
        sessions / 2
    );
    assert!(after.is_ok(), "{}", after.unwrap_err());
    assert!(grown <= HEAP, "{grown} bytes of heap are left behind");
    assert_eq!(
        states::free_memory(&driver),
        Ok(free),
        "GPU memory is left behind"
    );
}

#[test]
fn sessions_that_end_in_every_state_leave_nothing_behind() {
    leaves_nothing_behind(&ENDS[..2]);
}

#[test]
fn devices_that_are_reset_activated_again_or_dropped_in_every_state_leave_nothing_behind() {
    leaves_nothing_behind(&ENDS[2..]);
}
