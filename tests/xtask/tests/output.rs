//! The tasks' output as a shell meets it: to a full disk, and to a reader that has gone.

use std::fs::File;
use std::process::{Command, Output, Stdio};

fn list(stdout: impl Into<Stdio>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["test", "--list"])
        .stdout(stdout)
        .output()
        .unwrap()
}

#[test]
fn a_full_disk_is_one_line_and_exit_code_2() {
    let output = list(File::options().write(true).open("/dev/full").unwrap());
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("No space left"), "{text}");
}

#[test]
fn a_reader_that_has_gone_ends_the_task_in_silence() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = list(writer);
    assert_eq!(output.status.code(), Some(141));
    assert!(output.stderr.is_empty());
}
