//! The bare-metal test guest in L2, by itself: that it works under SVM is what makes tests with a GPU mean something.

use std::time::Duration;

use super::mini_vmm::{Ended, start_guest};
use super::{Failure, Test};
use crate::ensure;

pub const TESTS: &[Test] = &[
    Test {
        name: "the_test_guest_runs_at_cpl_3_under_svm",
        run: hello,
    },
    Test {
        name: "the_test_guest_takes_interrupts_under_svm",
        run: || succeeds("interrupts"),
    },
    Test {
        name: "the_test_guest_has_memory_that_keeps_what_is_written",
        run: || succeeds("memory"),
    },
    Test {
        name: "a_test_guest_that_breaks_says_how_by_its_exit_code",
        run: faults,
    },
];

/// None of them takes a second.
const LIMIT: Duration = Duration::from_secs(30);

fn guest(scenario: &str) -> Result<Ended, Failure> {
    start_guest(scenario, "none", &[])?.wait(LIMIT)
}

fn succeeds(scenario: &str) -> Result<(), Failure> {
    guest(scenario)?.expect(0)
}

fn hello() -> Result<(), Failure> {
    let ended = guest("hello")?;
    ended.expect(0)?;
    ensure!(
        ended.output.contains("at CPL 3"),
        "the guest does not say that it is at CPL 3: {}",
        ended.tail()
    );
    Ok(())
}

/// `fault=KIND` and the exit code that belongs to it: 101 for a panic, 128 + N for processor exception N.
fn faults() -> Result<(), Failure> {
    for (kind, code) in [
        ("panic", 101),
        ("invalid", 128 + 6),
        ("privileged", 128 + 13),
        ("null", 128 + 14),
    ] {
        let ended = guest(&format!("fault fault={kind}"))?;
        ended
            .expect(code)
            .map_err(|failure| format!("fault={kind}: {failure}"))?;
    }
    Ok(())
}
