//! The tests that run inside the testbed's L1: the list of all, and how one is run and reported. `l1-tests`
//! calls [`run`]; `cargo xtask testbed` reads the lines (`tests/xtask/src/testbed/report.rs`).
//!
//! To add a test, write a function and its row in its file's table, or a new file and its table's row in [`tests`].

use std::fs::File;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Instant;

mod boot;
mod constants;
mod descriptors;
mod drm;
mod guest;
mod kvm;
mod linux;
mod mesa;
mod mini_vmm;
pub mod over;
mod pictures;
mod proxy;
mod recovery;
mod requests;
mod sandbox;
mod semantics;
mod vgem;
mod vhost_user;
mod virtio_gpu;

pub use mesa::{ARCHIVE as MESA, unpack as unpack_mesa};
pub use mini_vmm::set_patience;

/// Why a test failed; becomes one line.
pub type Failure = Box<dyn std::error::Error>;

/// One test.
pub struct Test {
    /// A sentence with underscores: what does not hold if the test fails.
    pub name: &'static str,
    /// The test; a panic is a failure too.
    pub run: fn() -> Result<(), Failure>,
}

/// All tests, in the order in which they run: what is simplest first.
pub fn tests() -> Vec<&'static Test> {
    [
        kvm::TESTS,
        vgem::TESTS,
        virtio_gpu::TESTS,
        drm::TESTS,
        proxy::TESTS,
        sandbox::TESTS,
        constants::TESTS,
        guest::TESTS,
        requests::TESTS,
        pictures::TESTS,
        boot::TESTS,
        linux::TESTS,
        descriptors::TESTS,
        vhost_user::TESTS,
        semantics::TESTS,
        recovery::TESTS,
        mesa::TESTS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Fails the test with a formatted reason unless `condition` holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err(format!($($reason)+).into());
        }
    };
}

/// Which tests to run, and how far.
#[derive(Default)]
pub struct Selection {
    /// Those whose names contain this.
    pub filter: String,
    /// Beyond the first failure, too.
    pub keep_going: bool,
    /// A folder that several machines share: each test is run by the one that makes the file of its name there.
    pub claims: Option<PathBuf>,
}

impl Selection {
    /// Whether this machine is to run the test.
    fn takes(&self, test: &Test) -> io::Result<bool> {
        if !test.name.contains(&self.filter) {
            return Ok(false);
        }
        let Some(claims) = &self.claims else {
            return Ok(true);
        };
        match File::create_new(claims.join(test.name)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Runs the tests of the selection, writing to `output` a line when one starts and one when it ends, and at last the counts.
/// True when all passed, and there were some or others may have taken them.
pub fn run(tests: &[&Test], selection: &Selection, output: &mut impl Write) -> io::Result<bool> {
    let (mut passed, mut failed) = (0, 0);
    for test in tests {
        if !selection.takes(test)? {
            continue;
        }
        if let Some(reason) = over::left_out(test) {
            writeln!(output, "left out {}: {reason}", test.name)?;
            continue;
        }
        writeln!(output, "start {}", test.name)?;
        output.flush()?;
        let started = Instant::now();
        let failure = match catch_unwind(AssertUnwindSafe(test.run)) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(failure.to_string()),
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str);
                let said = said.or_else(|| panic.downcast_ref::<&str>().copied());
                Some(format!("panicked: {}", said.unwrap_or("see above")))
            }
        };
        match failure {
            None => {
                passed += 1;
                writeln!(output, "ok {} {}", test.name, started.elapsed().as_millis())?;
            }
            Some(failure) => {
                failed += 1;
                let reason = failure.lines().collect::<Vec<_>>().join("; ");
                writeln!(output, "FAILED {} {reason}", test.name)?;
                if !selection.keep_going {
                    break;
                }
            }
        }
    }
    writeln!(output, "{passed} passed, {failed} failed")?;
    output.flush()?;
    Ok((passed > 0 || selection.claims.is_some()) && failed == 0)
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    const MIXED: &[&Test] = &[
        &Test {
            name: "good",
            run: || Ok(()),
        },
        &Test {
            name: "bad",
            run: || Err("two\nlines".into()),
        },
        &Test {
            name: "panics",
            run: || panic!("oh"),
        },
    ];

    fn lines(filter: &str, keep_going: bool) -> (bool, Vec<String>) {
        let mut output = Vec::new();
        let selection = Selection {
            filter: filter.to_owned(),
            keep_going,
            claims: None,
        };
        let passed = run(MIXED, &selection, &mut output).unwrap();
        (
            passed,
            String::from_utf8(output)
                .unwrap()
                .lines()
                .map(str::to_owned)
                .collect(),
        )
    }

    #[test]
    fn every_result_is_one_line_and_the_counts_come_last() {
        let (passed, lines) = lines("", true);
        assert!(!passed);
        assert_eq!(lines[0], "start good");
        assert!(lines[1].starts_with("ok good "));
        assert_eq!(lines[3], "FAILED bad two; lines");
        assert_eq!(lines[5], "FAILED panics panicked: oh");
        assert_eq!(lines[6], "1 passed, 2 failed");
    }

    #[test]
    fn the_first_failure_ends_a_run_that_does_not_keep_going() {
        let (passed, lines) = lines("", false);
        assert!(!passed);
        assert_eq!(lines.last().unwrap(), "1 passed, 1 failed");
    }

    #[test]
    fn a_filter_that_matches_nothing_does_not_pass() {
        assert!(!lines("nothing", false).0);
        assert!(lines("good", false).0);
    }

    #[test]
    fn machines_that_share_a_folder_run_each_test_once() {
        let folder = tempfile::tempdir().unwrap();
        let selection = Selection {
            filter: "good".to_owned(),
            claims: Some(folder.path().to_owned()),
            ..Selection::default()
        };
        let run = || {
            let mut output = Vec::new();
            assert!(run(MIXED, &selection, &mut output).unwrap());
            String::from_utf8(output).unwrap()
        };
        assert!(run().ends_with("1 passed, 0 failed\n"));
        assert_eq!(run(), "0 passed, 0 failed\n");
    }

    #[test]
    fn test_names_are_unique_and_fit_into_a_filter() {
        let mut names: Vec<_> = tests().iter().map(|test| test.name).collect();
        assert!(names.iter().all(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        }));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
