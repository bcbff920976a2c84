//! The exposition is read back by a parser that takes nothing but the format.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

/// A sample as a scraper sees it.
#[derive(Debug, PartialEq)]
struct Parsed {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

fn is_name(text: &str) -> bool {
    let first = text.chars().next();
    first.is_some_and(|first| first.is_ascii_lowercase())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Labels up to the closing brace, and what comes after it.
fn parse_labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(name), "{name}");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().expect("a closing quote") {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next() {
                    Some((_, 'n')) => '\n',
                    Some((_, c @ ('\\' | '"'))) => c,
                    other => panic!("no escape: {other:?}"),
                }),
                (_, c) => value.push(c),
            }
        };
        assert_eq!(labels.insert(name.to_owned(), value), None, "{name} twice");
        text = &rest[end + 1..];
        match text.split_at(1) {
            (",", rest) => text = rest,
            ("}", rest) => return (labels, rest),
            other => panic!("after a label: {other:?}"),
        }
    }
}

/// All samples by metric, and the type of each metric; panics on whatever is not of the format.
fn parse(text: &str) -> (BTreeMap<String, Vec<Parsed>>, BTreeMap<String, String>) {
    assert!(text.ends_with('\n'));
    let mut samples: BTreeMap<String, Vec<Parsed>> = BTreeMap::new();
    let mut types = BTreeMap::new();
    let mut metric = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(is_name(name) && !words.contains('\\'), "{line}");
            let kind = lines.next().unwrap().strip_prefix("# TYPE ").unwrap();
            let (same, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, same);
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{kind}");
            assert_eq!(
                types.insert(name.to_owned(), kind.to_owned()),
                None,
                "{name} comes twice"
            );
            metric = name.to_owned();
            continue;
        }
        let (name, rest) = line.split_once('{').unwrap();
        let suffix = name
            .strip_prefix(metric.as_str())
            .expect("a sample of the metric above");
        let suffixes: &[&str] = match types[&metric].as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        assert!(suffixes.contains(&suffix) && is_name(name), "{line}");
        assert_eq!(
            types[&metric] == "counter",
            name.ends_with("_total"),
            "{name}"
        );
        let (labels, value) = parse_labels(rest);
        let value: f64 = value.strip_prefix(' ').unwrap().parse().unwrap();
        let sample = Parsed {
            name: name.to_owned(),
            labels,
            value,
        };
        let metric = samples.entry(metric.clone()).or_default();
        assert!(
            metric
                .iter()
                .all(|other| (&other.name, &other.labels) != (&sample.name, &sample.labels)),
            "{line} twice"
        );
        metric.push(sample);
    }
    (samples, types)
}

/// What a proxy has said once, with a guest of an awkward name.
fn statistics() -> Statistics {
    let mut statistics = of_guest("a \"guest\"\\n");
    statistics.completed = 7;
    statistics.limits_reached = vec![(Limit::Memory, 3)];
    statistics.operations = vec![(pvgpu_protocol::wire::Operation::Ioctl, 7)];
    statistics
}

#[test]
fn all_of_it_is_in_prometheus_text_format_and_in_the_manual() {
    let sockets = ["/run/one", "/run/t\"wo", "/run/gone"].map(PathBuf::from);
    let answered = [
        (sockets[0].as_path(), statistics()),
        (sockets[1].as_path(), Statistics::default()),
    ];
    let (samples, types) = parse(&exposition(&sockets, &answered));
    let value = |metric: &str, proxy: &str, label: Option<(&str, &str)>| {
        let found = samples[metric].iter().find(|sample| {
            sample.labels["proxy"] == proxy
                && label.is_none_or(|(name, value)| {
                    sample.labels.get(name).is_some_and(|is| is == value)
                })
        });
        found.map(|sample| sample.value)
    };
    assert_eq!(value("pvgpu_up", "/run/one", None), Some(1.0));
    assert_eq!(value("pvgpu_up", "/run/gone", None), Some(0.0));
    assert_eq!(
        value("pvgpu_requests_completed_total", "/run/one", None),
        Some(7.0)
    );
    assert_eq!(
        value("pvgpu_requests_completed_total", "/run/t\"wo", None),
        Some(0.0)
    );
    assert_eq!(
        value("pvgpu_requests_completed_total", "/run/gone", None),
        None
    );
    let guest = Some(("guest", "a \"guest\"\\n"));
    assert_eq!(value("pvgpu_session_info", "/run/one", guest), Some(1.0));
    assert_eq!(
        value(
            "pvgpu_limits_reached_total",
            "/run/one",
            Some(("limit", "memory"))
        ),
        Some(3.0)
    );
    assert_eq!(
        value(
            "pvgpu_requests_total",
            "/run/one",
            Some(("operation", "ioctl"))
        ),
        Some(7.0)
    );

    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    let (_, chapter) = manual.split_once("\n## Prometheus\n").unwrap();
    let (chapter, _) = chapter.split_once("\n## ").unwrap();
    let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `"));
    let names = rows.filter_map(|row| row.split('`').next());
    let named: BTreeSet<_> = names.map(str::to_owned).collect();
    assert_eq!(
        types.keys().cloned().collect::<BTreeSet<_>>(),
        named,
        "printed, then described in docs/operations.md"
    );
}

/// What a session says whose guest has said hello and then had some requests.
fn of_guest(name: &str) -> Statistics {
    use pvgpu_host_proxy::session::{RESPONSE_HEADER, Session};
    use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
    use pvgpu_protocol::control::{Hello, encode};
    use pvgpu_protocol::wire::{Operation, RequestHeader};
    use zerocopy::IntoBytes;
    let driver = SoftDriver::new(SoftConfig::default()).unwrap();
    let session = Session::new(std::sync::Arc::new(driver), None, Default::default());
    let mut hello = RequestHeader::new(Operation::Hello, 0, 0)
        .as_bytes()
        .to_vec();
    let mut record = [0; 64];
    let length = encode(&Hello::new(name), &mut record).unwrap();
    hello.extend(&record[..length]);
    let nop = RequestHeader::new(Operation::Nop, 0, 1).as_bytes().to_vec();
    for request in std::iter::once(hello).chain(std::iter::repeat_n(nop, 100)) {
        let response = session.perform(&request, RESPONSE_HEADER + 4096, || unreachable!());
        assert_eq!(response.unwrap().result(), 0);
    }
    session.statistics()
}

#[test]
fn a_histogram_has_rising_buckets_that_end_with_its_count() {
    let statistics = of_guest("timed");
    assert!(statistics.at_once.count() > 0);
    let socket = [PathBuf::from("/run/one")];
    let (samples, types) = parse(&exposition(&socket, &[(&socket[0], statistics)]));
    assert_eq!(types[DURATION], "histogram");
    for path in ["at_once", "waited"] {
        let of_path: Vec<_> = samples[DURATION]
            .iter()
            .filter(|sample| sample.labels["path"] == path)
            .collect();
        let buckets: Vec<_> = of_path
            .iter()
            .filter(|sample| sample.name.ends_with("_bucket"))
            .collect();
        let bounds: Vec<f64> = buckets
            .iter()
            .map(|bucket| bucket.labels["le"].parse().unwrap())
            .collect();
        assert!(
            bounds.windows(2).all(|pair| pair[0] < pair[1]),
            "{bounds:?}"
        );
        assert_eq!(bounds.last(), Some(&f64::INFINITY));
        assert!(
            buckets
                .windows(2)
                .all(|pair| pair[0].value <= pair[1].value)
        );
        let count = of_path
            .iter()
            .find(|sample| sample.name.ends_with("_count"))
            .unwrap();
        assert_eq!(buckets.last().unwrap().value, count.value);
    }
}
