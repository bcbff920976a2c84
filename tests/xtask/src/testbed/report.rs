//! What the tests in L1 say on the console, line by line, and what becomes of it. The lines are written by
//! `tests/e2e/src/testbed.rs`: `start NAME`, then `ok NAME MILLISECONDS` or `FAILED NAME REASON`; at the end
//! `N passed, N failed`. Everything else is for people.

use std::time::Duration;

use serde_json::{Value, json};

/// The result of one test.
struct Outcome {
    name: String,
    milliseconds: Option<u64>,
    failure: Option<String>,
    /// Why it failed before it passed.
    first_failure: Option<String>,
}

/// What one machine has said so far: the results, and the test that is running.
#[derive(Default)]
pub struct Console {
    outcomes: Vec<Outcome>,
    running: Option<String>,
    announced: Option<(usize, usize)>,
}

impl Console {
    /// Takes in one line. Says whether people should see it: L1's kernel talks to the log alone.
    pub fn line(&mut self, line: &str) -> bool {
        if is_kernel_message(line) {
            return false;
        }
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (name, detail) = rest.split_once(' ').unwrap_or((rest, ""));
        let mine = self.running.as_deref() == Some(name);
        match word {
            "start" if !name.is_empty() && detail.is_empty() => {
                self.running = Some(name.to_owned());
                return false;
            }
            "ok" if mine => self.end(name, detail.parse().ok(), None),
            "FAILED" if mine => self.end(name, None, Some(detail.to_owned())),
            _ => self.announced = announced(line).or(self.announced),
        }
        true
    }

    fn end(&mut self, name: &str, milliseconds: Option<u64>, failure: Option<String>) {
        self.outcomes.push(Outcome {
            name: name.to_owned(),
            milliseconds,
            failure,
            first_failure: None,
        });
        self.running = None;
    }

    /// For an error message: what L1 was doing.
    pub fn doing(&self) -> String {
        match (&self.running, self.outcomes.last()) {
            (Some(name), _) => format!("during the test {name}"),
            (None, Some(last)) => format!("after the test {}", last.name),
            (None, None) => "before the first test".to_owned(),
        }
    }

    /// The results, when L1 has ended with this exit code. It must say the same of them as its lines: a line lost on the way or
    /// a program that died does not look like success.
    pub fn ended(self, code: u8) -> Report {
        let (passed, failed) = counts(&self.outcomes);
        let said = self.announced.map_or_else(
            || "no final line".to_owned(),
            |(passed, failed)| format!("announced {passed} passed, {failed} failed"),
        );
        let sound = self.announced == Some((passed, failed)) && code == u8::from(failed > 0);
        Report {
            outcomes: self.outcomes,
            doubt: (!sound).then(|| format!("L1 ended with code {code} and {said}")),
        }
    }

    /// The results, when L1 was lost during a test, which has failed for this reason.
    pub fn lost(mut self, reason: &impl ToString) -> Option<Report> {
        let running = self.running.take()?;
        self.end(&running, None, Some(reason.to_string()));
        Some(Report {
            outcomes: self.outcomes,
            doubt: None,
        })
    }
}

/// How many tests passed, how many failed.
fn counts(outcomes: &[Outcome]) -> (usize, usize) {
    let failed = outcomes.iter().filter(|one| one.failure.is_some()).count();
    (outcomes.len() - failed, failed)
}

/// The results of machines that have ended.
#[derive(Default)]
pub struct Report {
    outcomes: Vec<Outcome>,
    /// Why they cannot be relied upon.
    doubt: Option<String>,
}

impl Report {
    /// Adds those of another machine.
    pub fn add(&mut self, other: Report) {
        self.outcomes.extend(other.outcomes);
        self.doubt = self.doubt.take().or(other.doubt);
    }

    /// The tests that failed.
    pub fn failed(&self) -> Vec<String> {
        let failed = self.outcomes.iter().filter(|one| one.failure.is_some());
        failed.map(|one| one.name.clone()).collect()
    }

    /// The test of that name has passed at its second attempt.
    pub fn passed_later(&mut self, name: &str) {
        for outcome in self.outcomes.iter_mut().filter(|one| one.name == name) {
            outcome.first_failure = outcome.failure.take();
        }
    }

    /// Those that passed at the second attempt alone.
    fn later(&self) -> impl Iterator<Item = (&str, &str)> {
        let outcomes = self.outcomes.iter();
        outcomes.filter_map(|one| Some((one.name.as_str(), one.first_failure.as_deref()?)))
    }

    /// Whether there were tests, and all passed beyond doubt.
    pub fn passed(&self) -> bool {
        let (passed, failed) = counts(&self.outcomes);
        passed > 0 && failed == 0 && self.doubt.is_none()
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        match (counts(&self.outcomes), &self.doubt) {
            ((0, 0), _) => "testbed: no test ran".to_owned(),
            ((passed, 0), None) => {
                let later = self.later();
                let later = later.map(|(name, why)| {
                    format!("\nat the second attempt: {name}; at the first {why}")
                });
                format!(
                    "testbed: all {passed} tests passed{}",
                    later.collect::<String>()
                )
            }
            ((passed, 0), Some(doubt)) => format!("testbed: {passed} tests passed, but {doubt}"),
            ((passed, failed), _) => format!("testbed: {failed} tests FAILED, {passed} passed"),
        }
    }

    /// The same for programs: `{kernel, seconds, passed, tests: [{name, passed, milliseconds, failure, first_failure}]}`.
    pub fn json(&self, kernel: &str, duration: Duration) -> Value {
        let tests: Vec<Value> = self
            .outcomes
            .iter()
            .map(|outcome| {
                json!({
                    "name": outcome.name,
                    "passed": outcome.failure.is_none(),
                    "milliseconds": outcome.milliseconds,
                    "failure": outcome.failure,
                    "first_failure": outcome.first_failure,
                })
            })
            .collect();
        json!({ "kernel": kernel, "seconds": duration.as_secs_f64(), "passed": self.passed(), "tests": tests })
    }
}

/// Whether a line starts as the kernel's do: `[    8.653269] `.
pub fn is_kernel_message(line: &str) -> bool {
    line.strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
        .is_some_and(|(time, _)| time.trim_start().parse::<f64>().is_ok())
}

/// Reads `N passed, N failed`.
fn announced(line: &str) -> Option<(usize, usize)> {
    let (passed, failed) = line.split_once(" passed, ")?;
    Some((
        passed.parse().ok()?,
        failed.strip_suffix(" failed")?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str], code: u8) -> Report {
        let mut console = Console::default();
        for line in lines {
            console.line(line);
        }
        console.ended(code)
    }

    #[test]
    fn a_run_passes_only_when_every_test_the_last_line_and_the_exit_code_say_so() {
        let all = ["start a", "ok a 12", "1 passed, 0 failed"];
        assert!(report(&all, 0).passed());
        assert!(!report(&all, 1).passed());
        assert!(!report(&all[..2], 0).passed());
        assert!(!report(&["0 passed, 0 failed"], 0).passed());
        assert!(!report(&["start a", "ok a 12", "2 passed, 0 failed"], 0).passed());
        assert!(!report(&["start a", "FAILED a why", "0 passed, 1 failed"], 0).passed());
    }

    #[test]
    fn a_test_that_passes_at_the_second_attempt_is_named_with_its_first_failure() {
        let mut report = report(
            &[
                "start a",
                "ok a 1",
                "start b",
                "FAILED b why",
                "1 passed, 1 failed",
            ],
            1,
        );
        assert!(!report.passed());
        assert_eq!(report.failed(), ["b"]);
        report.passed_later("b");
        assert!(report.passed());
        let summary = report.summary();
        assert!(summary.contains("all 2 tests passed"), "{summary}");
        assert!(
            summary.contains("second attempt: b; at the first why"),
            "{summary}"
        );
    }

    #[test]
    fn the_running_test_is_named_until_it_ends() {
        let mut console = Console::default();
        assert_eq!(console.doing(), "before the first test");
        assert!(!console.line("start a"));
        assert_eq!(console.doing(), "during the test a");
        assert!(console.line("FAILED a it broke"));
        assert_eq!(console.doing(), "after the test a");
        let report = console.ended(1).json("k", Duration::ZERO);
        assert_eq!(report["tests"][0]["failure"], "it broke");
    }

    #[test]
    fn a_machine_that_is_lost_loses_the_running_test_alone() {
        let mut console = Console::default();
        assert!(Console::default().lost(&"before all tests").is_none());
        for line in ["start a", "ok a 1", "start b"] {
            console.line(line);
        }
        let mut all = report(&["start c", "ok c 2", "1 passed, 0 failed"], 0);
        all.add(console.lost(&"it stands still").unwrap());
        assert_eq!(all.failed(), ["b"]);
        all.passed_later("b");
        assert!(all.passed());
        assert!(all.summary().contains("all 3 tests passed"));
    }

    #[test]
    fn one_machine_in_doubt_is_enough() {
        let mut all = report(&["start a", "ok a 2", "1 passed, 0 failed"], 0);
        all.add(report(&["0 passed, 0 failed"], 0));
        assert!(all.passed());
        all.add(report(&["start b", "ok b 2"], 0));
        assert!(!all.passed());
        assert!(all.summary().contains("no final line"));
    }

    #[test]
    fn messages_of_the_kernel_are_told_from_those_of_programs() {
        assert!(is_kernel_message("[    8.653269] kvm [92]: vcpu0"));
        assert!(!is_kernel_message("[a] list"));
        assert!(!is_kernel_message("ok a 12"));
    }

    #[test]
    fn a_line_that_only_looks_like_a_result_is_not_one() {
        assert!(!report(&["ok a 12", "1 passed, 0 failed"], 0).passed());
    }
}
