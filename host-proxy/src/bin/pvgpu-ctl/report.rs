//! A proxy for people, in a block or a line of a table, and for programs, as JSON.

use std::fmt::{Display, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use pvgpu_host_proxy::control::AskError;
use pvgpu_host_proxy::statistics::{Latency, Recording, SessionState, Statistics, Usage};
use serde::Serialize;

use crate::units;

/// What came between two looks.
#[derive(Serialize)]
pub(crate) struct Interval {
    seconds: f64,
    requests_per_second: f64,
    errors_per_second: f64,
    limits_reached: u64,
    at_once: Latency,
    waited: Latency,
}

impl Interval {
    pub(crate) fn between(time: Duration, before: &Statistics, now: &Statistics) -> Self {
        // A proxy that was started anew has counted less.
        let came = |count: fn(&Statistics) -> u64| count(now).saturating_sub(count(before));
        let seconds = time.as_secs_f64().max(1e-9);
        Self {
            seconds,
            requests_per_second: came(|statistics| statistics.completed) as f64 / seconds,
            errors_per_second: came(|statistics| sum(&statistics.errors)) as f64 / seconds,
            limits_reached: came(|statistics| sum(&statistics.limits_reached)),
            at_once: now.at_once.since(&before.at_once),
            waited: now.waited.since(&before.waited),
        }
    }
}

fn sum<T>(counts: &[(T, u64)]) -> u64 {
    counts
        .iter()
        .fold(0, |sum, (_, count)| sum.saturating_add(*count))
}

/// What one proxy has answered.
#[derive(Serialize)]
struct Answer<'a> {
    socket: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<&'a Interval>,
    #[serde(flatten)]
    statistics: &'a Statistics,
}

/// One line with a JSON object.
pub(crate) fn json(socket: &Path, statistics: &Statistics, interval: Option<&Interval>) -> String {
    let answer = Answer {
        socket: socket.display().to_string(),
        interval,
        statistics,
    };
    // Numbers, texts and lists of them: nothing that JSON could not have.
    serde_json::to_string(&answer).map_or_else(|error| error.to_string(), |json| json + "\n")
}

fn state(statistics: &Statistics) -> &'static str {
    match statistics.session.as_ref().map(|session| session.state) {
        None => "none",
        Some(SessionState::Waiting) => "waiting",
        Some(SessionState::Open) => "open",
        Some(SessionState::Ending) => "ending",
    }
}

/// Those that are not zero, in a line.
fn counts<T: Display>(counts: impl Iterator<Item = (T, u64)>) -> String {
    let there = counts.filter(|(_, count)| *count > 0);
    let texts: Vec<_> = there
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    match texts.is_empty() {
        true => "none".to_owned(),
        false => texts.join(", "),
    }
}

fn percentiles(latency: &Latency) -> String {
    let [p50, p90, p99, p999] =
        [0.5, 0.9, 0.99, 0.999].map(|share| units::duration(latency.percentile(share)));
    let count = latency.count();
    format!("p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p999} ({count} timed)")
}

/// Everything of a proxy, a line for each subject.
pub(crate) fn text(socket: &Path, statistics: &Statistics) -> String {
    let mut text = format!("{}\n", socket.display());
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<11} {value}");
    };
    let [major, minor, patch] = statistics.driver.version;
    line(
        "driver",
        format!("{} {major}.{minor}.{patch}", statistics.driver.name),
    );
    let session = statistics.session.as_ref().map(|session| {
        let since = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(session.since));
        let age = since.and_then(|since| SystemTime::now().duration_since(since).ok());
        format!(
            " for {} s: {:?}",
            age.unwrap_or_default().as_secs(),
            session.guest
        )
    });
    line(
        "session",
        format!("{}{}", state(statistics), session.unwrap_or_default()),
    );
    if let Some(usage) = &statistics.usage {
        let limits = &statistics.limits;
        let of = |used: u64, limit: u64| format!("{} of {}", units::size(used), units::size(limit));
        line(
            "files",
            format!(
                "{}, with other objects {} of {}",
                usage.files, usage.objects, limits.objects
            ),
        );
        line("GPU memory", of(usage.memory, limits.memory));
        line("mapped", of(usage.mapped, limits.mapped));
        line(
            "handles",
            format!("{} of {}", usage.handles, limits.handles),
        );
        line(
            "in flight",
            format!(
                "{} of {}, watches {}",
                usage.in_flight, limits.in_flight, usage.watches
            ),
        );
    }
    line(
        "requests",
        format!(
            "{} completed, {} rejected, {} malformed",
            statistics.completed, statistics.rejected, statistics.malformed
        ),
    );
    let operations = statistics.operations.iter();
    line(
        "operations",
        counts(operations.map(|(operation, count)| (operation.name(), *count))),
    );
    line("at once", percentiles(&statistics.at_once));
    line("waited", percentiles(&statistics.waited));
    line("errors", counts(statistics.errors.iter().copied()));
    let limits = statistics.limits_reached.iter();
    line(
        "limits hit",
        counts(limits.map(|(limit, count)| (limit.name(), *count))),
    );
    let doorbells = (
        statistics.doorbells,
        statistics.interrupts,
        statistics.events,
    );
    line(
        "doorbells",
        format!(
            "{}, interrupts {}, events {}",
            doorbells.0, doorbells.1, doorbells.2
        ),
    );
    let trace = match statistics.trace {
        Recording::Off => "off",
        Recording::On => "on",
        Recording::Ended => "ended at its size limit, or could not be written",
    };
    line(
        "trace",
        format!("{trace}, {} requests missing", statistics.untraced),
    );
    text
}

/// What the columns of [`row`] are.
pub(crate) fn heading() -> String {
    format!(
        "{:<24} {:>8} {:>6} {:>8} {:>8} {:>7} {:>9} {:>8} {:>8} {:>8} {:>7} {:>6}\n",
        "PROXY",
        "SESSION",
        "FILES",
        "MEMORY",
        "MAPPED",
        "FLIGHT",
        "REQ/S",
        "P50",
        "P99",
        "WAITP99",
        "ERR/S",
        "LIMITS"
    )
}

/// One proxy in a line.
pub(crate) fn row(socket: &Path, statistics: &Statistics, interval: &Interval) -> String {
    let usage = statistics.usage.as_ref();
    let used = |value: fn(&Usage) -> u64| usage.map_or(0, value);
    let percentile = |latency: &Latency, share| units::duration(latency.percentile(share));
    format!(
        "{:<24} {:>8} {:>6} {:>8} {:>8} {:>7} {:>9.0} {:>8} {:>8} {:>8} {:>7.0} {:>6}\n",
        socket.display().to_string(),
        state(statistics),
        used(|usage| usage.files as u64),
        units::size(used(|usage| usage.memory)),
        units::size(used(|usage| usage.mapped)),
        used(|usage| usage.in_flight as u64),
        interval.requests_per_second,
        percentile(&interval.at_once, 0.5),
        percentile(&interval.at_once, 0.99),
        percentile(&interval.waited, 0.99),
        interval.errors_per_second,
        interval.limits_reached,
    )
}

/// The line of a proxy that has not answered.
pub(crate) fn row_without_answer(socket: &Path, error: &AskError) -> String {
    format!("{:<24} {error}\n", socket.display().to_string())
}
