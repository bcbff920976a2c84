//! The program `demo` as its user meets it, where the picture has no place to go.

use std::process::Command;

#[test]
fn a_picture_that_cannot_be_written_is_refused_before_the_guest_starts() {
    let output = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args(["/nonexistent/guest", "/nonexistent/folder/demo.png"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in [
        "/nonexistent/folder/demo.png",
        "No such file",
        "--output FILE",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(output.stdout.is_empty());
}
