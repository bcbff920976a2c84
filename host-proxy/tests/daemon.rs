//! The program `pvgpu-proxyd`: options, sockets and exit codes. What it does for a guest is in `tests/vhost_user.rs` and, behind a VMM,
//! in the end-to-end tests.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pvgpu-proxyd");

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null());
    command.output().unwrap()
}

/// A daemon that is killed when the test ends.
struct Running(Child, BufReader<std::process::ChildStderr>);

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self(child, stderr)
    }

    fn listening(socket: &Path) -> Self {
        let mut command = Command::new(PROGRAM);
        let mut running = Self::start(command.arg("--socket").arg(socket));
        running.wait_for("waiting for a front end");
        running
    }

    fn wait_for(&mut self, words: &str) -> String {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert_ne!(
                self.1.read_line(&mut line).unwrap(),
                0,
                "never said {words}"
            );
        }
        line
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a device answers at the other end.
fn answers(stream: UnixStream) -> bool {
    let front_end = Frontend::from_stream(stream, 8);
    front_end
        .get_features()
        .is_ok_and(|features| features & 1 << 32 != 0)
}

#[test]
fn what_cannot_be_done_is_said_in_one_line_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no socket").unwrap();
    let file = file.to_str().unwrap();
    for (arguments, words) in [
        (&[][..], "give --socket PATH or --fd N"),
        (&["--socket"], "--socket"),
        (
            &["--socket", "/nowhere/socket"],
            "cannot make the socket /nowhere/socket",
        ),
        (
            &["--socket", file],
            "is no socket: remove it or choose another path (--socket PATH)",
        ),
        (&["--fd", "77"], "77 is no descriptor"),
        (&["--fd", "1"], "1 is no descriptor"),
        (&["--fd", "7", "--socket", "/tmp/s"], "cannot be used with"),
        (&["--gpu", "voodoo"], "write soft or drm:NODE"),
        (&["--gpu", "drm:/nowhere", "--socket", "SOCKET"], "/nowhere"),
        (&["--limit", "files=3"], "there is no limit 'files'"),
        (
            &["--aperture", "4097", "--socket", "SOCKET"],
            "multiple of 4K",
        ),
        (&["--aperture", "1Q"], "256M"),
        (&["--queues", "0"], "--queues"),
        (
            // The last of two counts.
            &[
                "--control",
                "/nowhere/c",
                "--control",
                file,
                "--socket",
                "SOCKET",
            ],
            "is no socket: remove it or choose another path (--control SOCKET)",
        ),
        (&["--log", "loud"], "write off, error, warn, info or debug"),
        (&["--sandbox", "maybe"], "--sandbox"),
    ] {
        let socket = folder.path().join("socket");
        let arguments: Vec<_> = arguments
            .iter()
            .map(|word| {
                if *word == "SOCKET" {
                    socket.to_str().unwrap()
                } else {
                    word
                }
            })
            .collect();
        let output = run(&arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(
            said.starts_with("pvgpu-proxyd: ") && said.contains(words),
            "{arguments:?}: {said}"
        );
        let _ = fs::remove_file(socket);
    }
}

#[test]
fn version_help_and_capabilities_are_printed_without_a_front_end() {
    let version = run(&["--version"]);
    assert!(version.status.success());
    assert!(version.stdout.starts_with(b"pvgpu-proxyd 0."));
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    for option in [
        "--socket",
        "--fd",
        "--gpu",
        "--limit",
        "--aperture",
        "--queues",
        "--control",
        "--log",
        "--sandbox",
        "--print-capabilities",
        "LISTEN_FDS",
        "Exit status",
    ] {
        assert!(help.contains(option), "{option} is missing in the help");
    }
    let capabilities = run(&["--print-capabilities"]);
    assert!(capabilities.status.success());
    let value: serde_json::Value = serde_json::from_slice(&capabilities.stdout).unwrap();
    assert_eq!(value["type"], "pvgpu");
    assert_eq!(value["virtio-device-id"], 63);
    assert!(
        value["features"]
            .as_array()
            .unwrap()
            .contains(&"shmem".into())
    );
}

#[test]
fn a_socket_is_for_its_user_alone_and_serves_one_front_end_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut daemon = Running::listening(&socket);
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for _ in 0..3 {
        assert!(answers(UnixStream::connect(&socket).unwrap()));
        daemon.wait_for("the front end is gone");
    }
    let second = run(&["--socket", socket.to_str().unwrap()]);
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another process serves"), "{said}");
    drop(daemon);
    // What is left of a daemon that was killed is in nobody's way.
    assert!(socket.exists());
    let _daemon = Running::listening(&socket);
    assert!(answers(UnixStream::connect(&socket).unwrap()));
}

#[test]
fn a_front_end_that_sends_nonsense_is_disconnected_and_the_next_one_served() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut daemon = Running::listening(&socket);
    let mut hostile = UnixStream::connect(&socket).unwrap();
    hostile.write_all(&[0xff; 64]).unwrap();
    let mut answer = Vec::new();
    let _ = hostile.read_to_end(&mut answer);
    assert!(answer.is_empty());
    daemon.wait_for("was disconnected");
    assert!(answers(UnixStream::connect(&socket).unwrap()));
}

/// A shell that puts this descriptor where the program looks for it, and becomes the program.
fn inheriting(descriptor: impl Into<OwnedFd>, command: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(descriptor.into());
    shell
}

#[test]
fn a_daemon_with_an_inherited_connection_ends_well_when_its_front_end_goes() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Running::start(&mut inheriting(
        theirs,
        &format!("exec {PROGRAM} --fd 3 3<&0 0</dev/null"),
    ));
    assert!(answers(ours));
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Running::start(&mut inheriting(
        theirs,
        &format!("exec {PROGRAM} --fd 3 3<&0 0</dev/null"),
    ));
    ours.write_all(&[0xff; 64]).unwrap();
    assert_eq!(daemon.0.wait().unwrap().code(), Some(1));
}

#[test]
fn a_daemon_that_systemd_starts_takes_the_socket_that_it_is_handed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let command =
        |count| format!("exec env LISTEN_FDS={count} LISTEN_PID=$$ {PROGRAM} 3<&0 0</dev/null");
    let mut daemon = Running::start(&mut inheriting(listener.try_clone().unwrap(), &command(1)));
    daemon.wait_for("waiting for a front end");
    assert!(answers(UnixStream::connect(&socket).unwrap()));
    let output = inheriting(listener, &command(2)).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("2 sockets"), "{said}");
}
