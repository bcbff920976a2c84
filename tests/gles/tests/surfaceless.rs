//! `gles` on this machine's processor (`--node none`): needs Debian's libegl1, libegl-mesa0 and libgl1-mesa-dri, and fails
//! without them. On a real node, and in a guest, the testbed runs it.

use std::collections::BTreeSet;
use std::process::{Command, Output};

fn gles(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gles"))
        .args(arguments)
        .output()
        .unwrap()
}

/// What a run that must succeed prints.
fn printed(arguments: &[&str]) -> String {
    let output = gles(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "gles {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_frame_of_every_scene_is_the_same_again_and_unlike_all_others() {
    let arguments = ["--node", "none", "--frames", "3"];
    let first = printed(&arguments);
    assert_eq!(first, printed(&arguments));
    let mut lines = first.lines();
    assert!(lines.next().unwrap().starts_with("renderer "));
    let frames: Vec<Vec<&str>> = lines.map(|line| line.split(' ').collect()).collect();
    assert!(frames.iter().all(|words| words.len() == 3), "{first}");
    let scenes: BTreeSet<&str> = frames.iter().map(|words| words[0]).collect();
    assert_eq!(scenes.len(), 8, "{first}");
    let fingerprints: BTreeSet<&str> = frames.iter().map(|words| words[2]).collect();
    assert_eq!(fingerprints.len(), 8 * 3, "{first}");
}

#[test]
fn the_lines_and_the_json_say_the_same() {
    let arguments = ["--node", "none", "--scene", "mipmaps", "--frames", "2"];
    let lines = printed(&arguments);
    let json = printed(&[&arguments[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let scene = &json["scenes"][0];
    let frames = scene["frames"].as_array().unwrap().iter().enumerate();
    let (renderer, version) = (
        json["renderer"].as_str().unwrap(),
        json["version"].as_str().unwrap(),
    );
    let mut expected = format!("renderer {renderer}, {version}\n");
    for (number, fingerprint) in frames {
        let (name, word) = (
            scene["name"].as_str().unwrap(),
            fingerprint.as_str().unwrap(),
        );
        expected += &format!("{name} {number} {word}\n");
    }
    assert_eq!(lines, expected);
}

#[test]
fn the_picture_is_a_png_with_many_colours() {
    let file = std::env::temp_dir().join(format!("pvgpu-gles-{}.png", std::process::id()));
    let path = file.to_str().unwrap();
    printed(&[
        "--node",
        "none",
        "--scene",
        "knot",
        "--frames",
        "1",
        "--picture",
        path,
    ]);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let mut rgba = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgba).unwrap();
    assert_eq!((info.width, info.height), (512, 512));
    let colours: BTreeSet<&[u8]> = rgba.chunks_exact(4).collect();
    assert!(colours.len() > 1000, "{} colours", colours.len());
}

#[test]
fn bench_measures_a_scene_in_three_ways() {
    let json = printed(&[
        "bench",
        "--node",
        "none",
        "--scene",
        "triangles",
        "--seconds",
        "0.1",
        "--json",
    ]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for what in ["draw", "read", "processor"] {
        let rate = &json["measured"][0]["rates"][what];
        assert!(rate["frames"].as_u64().unwrap() > 0, "{what}: {json}");
        assert!(rate["seconds"].as_f64().unwrap() >= 0.02, "{what}: {json}");
    }
}

#[test]
fn frames_that_are_drawn_again_for_a_time_are_compared() {
    printed(&[
        "--node",
        "none",
        "--scene",
        "triangles",
        "--frames",
        "2",
        "--seconds",
        "0.2",
    ]);
}

#[test]
fn a_scene_that_is_not_there_and_a_node_that_is_not_there_are_said_in_one_line() {
    for (arguments, reason) in [
        (&["--scene", "x"][..], "there is no scene `x`"),
        (&["--node", "/no/node"][..], "cannot open /no/node"),
        (
            &["--node", "none", "--scene", "sharing"][..],
            "needs a DRM node",
        ),
    ] {
        let output = gles(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
}
