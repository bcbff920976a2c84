//! `pvgpu-ctl` as an operator meets it, beside a device in this process.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use pvgpu_host_proxy::control::{Server, Socket, serve};
use pvgpu_host_proxy::device::{Device, DeviceConfig};
use pvgpu_host_proxy::sandbox::Sandbox;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use serde_json::Value;

/// Some devices that no guest has started, each behind a socket, in a folder that goes with them.
struct Proxies {
    folder: PathBuf,
    served: Vec<(Server, Socket, Device)>,
}

impl Proxies {
    fn new(test: &str, names: &[&str]) -> Self {
        let name = format!("pvgpu-ctl-{test}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        let serve = |name| {
            let driver = Arc::new(SoftDriver::new(SoftConfig::default()).unwrap());
            let device = Device::new(driver, None, DeviceConfig::default()).unwrap();
            let socket = Socket::bind(&folder.join(name)).unwrap();
            let listener = socket.listener().unwrap();
            let server = serve(listener, device.monitor(), Sandbox::default()).unwrap();
            (server, socket, device)
        };
        Self {
            served: names.iter().map(serve).collect(),
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn ctl(&self, sockets: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pvgpu-ctl"));
        for name in sockets {
            command.arg("--socket").arg(self.path(name));
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }
}

impl Drop for Proxies {
    fn drop(&mut self) {
        self.served.clear();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// It ends with that status; with a failure, in one line with all of `parts`.
fn ends(output: &Output, status: i32, parts: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert_eq!(said.lines().count(), usize::from(status != 0), "{said}");
    for part in parts {
        assert!(said.contains(part), "'{part}' is missing in: {said}");
    }
}

fn manual() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    fs::read_to_string(path).unwrap()
}

/// The fenced text of the manual that contains these words.
fn example<'a>(manual: &'a str, words: &str) -> &'a str {
    let mut fenced = manual.split("```").skip(1).step_by(2);
    fenced.find(|text| text.contains(words)).unwrap()
}

#[test]
fn a_status_has_the_lines_and_the_fields_that_the_manual_describes() {
    let proxies = Proxies::new("status", &["one"]);
    let output = proxies.ctl(&["one"], &["status"]).output().unwrap();
    ends(&output, 0, &[]);
    let manual = manual();
    let names = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("  "));
        lines
            .filter_map(|line| Some(line.get(..11)?.trim().to_owned()))
            .collect()
    };
    let described = names(example(&manual, "limits hit"));
    let shown = names(text(&output.stdout));
    assert!(shown.is_subset(&described), "{shown:?}\n{described:?}");
    let of_a_session = ["files", "GPU memory", "mapped", "handles", "in flight"];
    let missing: Vec<_> = described.difference(&shown).map(String::as_str).collect();
    assert_eq!(
        missing.iter().collect::<BTreeSet<_>>(),
        of_a_session.iter().collect()
    );

    let output = proxies
        .ctl(&["one"], &["status", "--json"])
        .output()
        .unwrap();
    ends(&output, 0, &[]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = manual
        .lines()
        .skip_while(|line| !line.starts_with("| `socket`"));
    let rows = rows.take_while(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| row.split(" | ").next());
    let fields: BTreeSet<_> = cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    let mut given: BTreeSet<_> = status
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    given.insert("interval");
    assert_eq!(
        given, fields,
        "printed, then described in docs/operations.md"
    );
    assert_eq!(status["socket"].as_str(), proxies.path("one").to_str());
    assert_eq!(status["driver"]["name"], "soft");
    assert_eq!(status["session"], Value::Null);
    assert!(
        status["operations"]
            .as_array()
            .unwrap()
            .contains(&serde_json::json!(["ioctl", 0]))
    );
    assert_eq!(status["at_once"]["p999_ns"], 0);
}

#[test]
fn several_proxies_are_shown_and_one_that_is_missing_is_an_error_beside_the_others() {
    let proxies = Proxies::new("several", &["one", "two"]);
    let all = ["one", "gone", "two"];
    let output = proxies.ctl(&all, &["status", "--json"]).output().unwrap();
    ends(&output, 2, &["there is no", "gone", "--control SOCKET"]);
    let sockets = text(&output.stdout).lines().map(|line| {
        let status: Value = serde_json::from_str(line).unwrap();
        PathBuf::from(status["socket"].as_str().unwrap())
    });
    assert_eq!(
        sockets.collect::<Vec<_>>(),
        [proxies.path("one"), proxies.path("two")]
    );
    let output = proxies.ctl(&all, &["prometheus"]).output().unwrap();
    ends(&output, 2, &["gone"]);
    for (name, up) in [("one", 1), ("two", 1), ("gone", 0)] {
        let line = format!(
            "pvgpu_up{{proxy=\"{}\"}} {up}\n",
            proxies.path(name).display()
        );
        assert!(text(&output.stdout).contains(&line), "{line}");
    }
}

#[test]
fn a_watch_shows_a_line_per_proxy_and_interval_and_ends_with_the_last_proxy() {
    let mut proxies = Proxies::new("watch", &["one", "two"]);
    let watch = ["watch", "--interval", "0.05", "--count", "2"];
    let output = proxies.ctl(&["one", "two"], &watch).output().unwrap();
    ends(&output, 0, &[]);
    let lines: Vec<_> = text(&output.stdout).lines().collect();
    let columns = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let manual = manual();
    let heading = example(&manual, "WAITP99").lines().nth(1).unwrap();
    assert_eq!(columns(lines[0]), columns(heading));
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert!(
        lines[1..]
            .iter()
            .all(|line| columns(line).len() == columns(heading).len()),
        "{lines:?}"
    );

    let watch = [&watch[..], &["--json"]].concat();
    let output = proxies.ctl(&["one"], &watch).output().unwrap();
    ends(&output, 0, &[]);
    for line in text(&output.stdout).lines() {
        let look: Value = serde_json::from_str(line).unwrap();
        assert!(look["interval"]["seconds"].as_f64().unwrap() >= 0.05);
        assert_eq!(look["interval"]["requests_per_second"], 0.0);
    }

    let mut endless = proxies.ctl(&["one"], &["watch", "--interval", "0.05"]);
    let mut endless = endless
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(endless.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().is_ok());
    drop(proxies.served.remove(0));
    while lines.next().is_some_and(|line| line.is_ok()) {}
    let output = endless.wait_with_output().unwrap();
    ends(&output, 2, &["there is no", "one"]);
}

#[test]
fn what_nobody_reads_any_more_is_no_error_and_what_cannot_be_written_is_one() {
    let proxies = Proxies::new("output", &["one"]);
    for arguments in [
        &["status"][..],
        &["prometheus"],
        &["watch", "--interval", "0.05"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        ends(
            &proxies
                .ctl(&["one"], arguments)
                .stdout(writer)
                .output()
                .unwrap(),
            0,
            &[],
        );
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = proxies
            .ctl(&["one"], arguments)
            .stdout(full)
            .output()
            .unwrap();
        ends(&output, 2, &["standard output", "No space left"]);
    }
}

#[test]
fn a_trace_is_a_new_file_for_its_user_and_a_refused_one_leaves_none() {
    let proxies = Proxies::new("trace", &["one"]);
    let (first, second) = (proxies.path("first"), proxies.path("second"));
    let trace = |arguments: &[&str]| {
        let arguments = [&["trace"], arguments].concat();
        proxies.ctl(&["one"], &arguments).output().unwrap()
    };
    ends(&trace(&["stop"]), 1, &["no trace is being recorded"]);
    ends(
        &trace(&["start", first.to_str().unwrap(), "--limit", "1M"]),
        0,
        &[],
    );
    assert_eq!(
        first.metadata().unwrap().permissions().mode() & 0o777,
        0o600
    );
    ends(
        &trace(&["start", second.to_str().unwrap()]),
        1,
        &["stop it first"],
    );
    assert!(!second.exists());
    ends(&trace(&["stop"]), 0, &[]);
    fs::write(&second, "mine").unwrap();
    ends(
        &trace(&["start", second.to_str().unwrap()]),
        2,
        &["second", "exists", "a new FILE"],
    );
    let mut kept = String::new();
    File::open(&second)
        .unwrap()
        .read_to_string(&mut kept)
        .unwrap();
    assert_eq!(kept, "mine");
    let both = proxies
        .ctl(&["one", "two"], &["trace", "stop"])
        .output()
        .unwrap();
    ends(&both, 2, &["one --socket"]);
}

#[test]
fn errors_of_usage_are_one_line_with_a_remedy() {
    let proxies = Proxies::new("usage", &[]);
    let refused = |arguments: &[&str], parts: &[&str]| {
        ends(&proxies.ctl(&[], arguments).output().unwrap(), 2, parts);
    };
    refused(&["status"], &["--socket SOCKET"]);
    refused(&[], &["status, watch, prometheus or trace", "--help"]);
    refused(&["frob"], &["frob", "--help"]);
    refused(&["watch", "--interval", "0"], &["0.01 to 86400"]);
    refused(&["trace", "start", "x", "--limit", "many"], &["256M"]);
    fs::write(proxies.path("file"), "").unwrap();
    let output = proxies.ctl(&["file"], &["status"]).output().unwrap();
    ends(&output, 2, &["file"]);

    let help = proxies.ctl(&[], &["--help"]).output().unwrap();
    ends(&help, 0, &[]);
    assert!(text(&help.stdout).contains("Exit status: 0"));
    let version = proxies.ctl(&[], &["--version"]).output().unwrap();
    assert_eq!(
        text(&version.stdout).trim(),
        concat!("pvgpu-ctl ", env!("CARGO_PKG_VERSION"))
    );
}
