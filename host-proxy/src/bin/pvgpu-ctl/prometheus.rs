//! Prometheus' text format, version 0.0.4: all metrics of all proxies, each with its help and type.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use pvgpu_host_proxy::limit::Limit;
use pvgpu_host_proxy::statistics::{Latency, Recording, SessionState, Statistics, Usage};

/// A sample: its labels, but for the proxy's, and its value.
type Sample = (Vec<(&'static str, String)>, f64);

/// A gauge or a counter.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&Statistics) -> Vec<Sample>,
}

/// A sample without labels of its own.
fn one(value: f64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

fn labelled<T>(label: &'static str, counts: &[(T, u64)], name: fn(&T) -> String) -> Vec<Sample> {
    let sample = |(key, count): &(T, u64)| (vec![(label, name(key))], *count as f64);
    counts.iter().map(sample).collect()
}

/// What the session uses; nothing if there is none.
fn used(statistics: &Statistics, value: fn(&Usage) -> u64) -> Vec<Sample> {
    let usage = statistics.usage.as_ref();
    usage.map_or_else(Vec::new, |usage| one(value(usage) as f64))
}

/// The name that the histogram's samples begin with.
const DURATION: &str = "pvgpu_request_duration_seconds";
const DURATION_HELP: &str =
    "How long requests took: one in 16 of those that are answered at once, all that may wait.";

/// Whether a proxy answers: the only metric of those that do not.
const UP: &str = "pvgpu_up";
const UP_HELP: &str = "Whether the proxy answers on its control socket.";

#[rustfmt::skip]
static METRICS: &[Metric] = &[
    Metric { name: "pvgpu_driver_info", kind: "gauge", help: "The host driver.", samples: |statistics| {
        let [major, minor, patch] = statistics.driver.version;
        let version = format!("{major}.{minor}.{patch}");
        vec![(vec![("driver", statistics.driver.name.clone()), ("version", version)], 1.0)]
    } },
    Metric { name: "pvgpu_session_info", kind: "gauge", help: "The session: who the guest says it is, and how far it has come.", samples: |statistics| {
        let session = statistics.session.iter();
        session.map(|session| (vec![("state", state(session.state).to_owned()), ("guest", session.guest.clone())], 1.0)).collect()
    } },
    Metric { name: "pvgpu_session_start_time_seconds", kind: "gauge", help: "When the guest started the device, since the Unix epoch.", samples: |statistics| {
        statistics.session.as_ref().map_or_else(Vec::new, |session| one(session.since as f64))
    } },
    Metric { name: "pvgpu_files", kind: "gauge", help: "Open files.", samples: |statistics| used(statistics, |usage| usage.files as u64) },
    Metric { name: "pvgpu_objects", kind: "gauge", help: "Open files and other objects.", samples: |statistics| used(statistics, |usage| usage.objects as u64) },
    Metric { name: "pvgpu_handles", kind: "gauge", help: "GEM and syncobj handles.", samples: |statistics| used(statistics, |usage| usage.handles) },
    Metric { name: "pvgpu_memory_bytes", kind: "gauge", help: "GPU memory that handles and exported objects keep.", samples: |statistics| used(statistics, |usage| usage.memory) },
    Metric { name: "pvgpu_mapped_bytes", kind: "gauge", help: "Bytes mapped into the aperture.", samples: |statistics| used(statistics, |usage| usage.mapped) },
    Metric { name: "pvgpu_requests_in_flight", kind: "gauge", help: "Requests that may be waiting, watches among them.", samples: |statistics| used(statistics, |usage| usage.in_flight as u64) },
    Metric { name: "pvgpu_watches", kind: "gauge", help: "Watches.", samples: |statistics| used(statistics, |usage| usage.watches as u64) },
    Metric { name: "pvgpu_limit", kind: "gauge", help: "What a session may use at most.", samples: limits },
    Metric { name: "pvgpu_limits_reached_total", kind: "counter", help: "How often the guest has reached each limit.", samples: |statistics| labelled("limit", &statistics.limits_reached, |limit| limit.name().to_owned()) },
    Metric { name: "pvgpu_requests_total", kind: "counter", help: "Requests by operation.", samples: |statistics| labelled("operation", &statistics.operations, |operation| operation.name().to_owned()) },
    Metric { name: "pvgpu_requests_completed_total", kind: "counter", help: "Requests completed.", samples: |statistics| one(statistics.completed as f64) },
    Metric { name: "pvgpu_requests_rejected_total", kind: "counter", help: "Requests answered with an errno before any host driver was asked.", samples: |statistics| one(statistics.rejected as f64) },
    Metric { name: "pvgpu_errors_total", kind: "counter", help: "Requests answered with an errno, whoever it came from.", samples: |statistics| labelled("errno", &statistics.errors, ToString::to_string) },
    Metric { name: "pvgpu_malformed_chains_total", kind: "counter", help: "Descriptor chains that were no request, and buffers that could take no event.", samples: |statistics| one(statistics.malformed as f64) },
    Metric { name: "pvgpu_doorbells_total", kind: "counter", help: "How often the doorbell reached the device.", samples: |statistics| one(statistics.doorbells as f64) },
    Metric { name: "pvgpu_interrupts_total", kind: "counter", help: "How often the guest was interrupted.", samples: |statistics| one(statistics.interrupts as f64) },
    Metric { name: "pvgpu_events_total", kind: "counter", help: "Events that the guest has got.", samples: |statistics| one(statistics.events as f64) },
    Metric { name: "pvgpu_trace_recording", kind: "gauge", help: "Whether requests are recorded in a trace.", samples: |statistics| one(f64::from(u8::from(statistics.trace == Recording::On))) },
    Metric { name: "pvgpu_untraced_requests_total", kind: "counter", help: "Requests that traces lack, at their size limit or since they could not be written.", samples: |statistics| one(statistics.untraced as f64) },
];

fn state(state: SessionState) -> &'static str {
    match state {
        SessionState::Waiting => "waiting",
        SessionState::Open => "open",
        SessionState::Ending => "ending",
    }
}

fn limits(statistics: &Statistics) -> Vec<Sample> {
    let limits = &statistics.limits;
    let values = [
        (Limit::Message, limits.message.into()),
        (Limit::Objects, limits.objects.into()),
        (Limit::InFlight, limits.in_flight.into()),
        (Limit::Mapped, limits.mapped),
        (Limit::Memory, limits.memory),
        (Limit::Handles, limits.handles.into()),
    ];
    labelled("limit", &values, |limit| limit.name().to_owned())
}

/// A label's value between its quotes.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
}

/// The text under construction. Writing to a string cannot fail.
struct Exposition(String);

impl Exposition {
    fn heading(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, proxy: &Path, labels: &[(&'static str, String)], value: f64) {
        let _ = write!(
            self.0,
            "{name}{{proxy=\"{}\"",
            escaped(&proxy.display().to_string())
        );
        for (label, text) in labels {
            let _ = write!(self.0, ",{label}=\"{}\"", escaped(text));
        }
        let _ = writeln!(self.0, "}} {value}");
    }

    fn histogram(&mut self, proxy: &Path, path: &'static str, latency: &Latency) {
        let count = latency.count() as f64;
        let labels = |le: Option<String>| {
            let path = ("path", path.to_owned());
            std::iter::once(path)
                .chain(le.map(|le| ("le", le)))
                .collect::<Vec<_>>()
        };
        let name = format!("{DURATION}_bucket");
        for (bound, so_far) in latency.cumulative() {
            let le = bound.as_secs_f64().to_string();
            self.sample(&name, proxy, &labels(Some(le)), so_far as f64);
        }
        self.sample(&name, proxy, &labels(Some("+Inf".into())), count);
        let sum = latency.sum().as_secs_f64();
        self.sample(&format!("{DURATION}_sum"), proxy, &labels(None), sum);
        self.sample(&format!("{DURATION}_count"), proxy, &labels(None), count);
    }
}

/// All metrics of the proxies that have answered, and which have not.
pub(crate) fn exposition(asked: &[PathBuf], answered: &[(&Path, Statistics)]) -> String {
    let mut text = Exposition(String::new());
    text.heading(UP, "gauge", UP_HELP);
    for socket in asked {
        let up = answered.iter().any(|(other, _)| other == socket);
        text.sample(UP, socket, &[], f64::from(u8::from(up)));
    }
    for metric in METRICS {
        text.heading(metric.name, metric.kind, metric.help);
        for (socket, statistics) in answered {
            for (labels, value) in (metric.samples)(statistics) {
                text.sample(metric.name, socket, &labels, value);
            }
        }
    }
    text.heading(DURATION, "histogram", DURATION_HELP);
    for (socket, statistics) in answered {
        text.histogram(socket, "at_once", &statistics.at_once);
        text.histogram(socket, "waited", &statistics.waited);
    }
    text.0
}

#[cfg(test)]
mod tests;
