//! Replays the inputs that the repository keeps for the fuzz targets, without a fuzzer: the seeds and all that once was a finding.
//!
//! Each target is one test. A panic anywhere ends the process, even where the proxy would catch it: as under the fuzzer.

use pvgpu_fuzz::TARGETS;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The input that is being replayed, for the message.
static CURRENT: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The inputs of a target in `corpus` or `regressions`, sorted.
fn inputs(what: &str, target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(what)
        .join(target);
    let Ok(entries) = folder.read_dir() else {
        return Vec::new();
    };
    let mut inputs: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    inputs
}

#[test]
fn no_input_that_is_kept_is_a_finding() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let current = CURRENT.lock().unwrap().take();
        eprintln!("while replaying {current:?}: see docs/fuzzing.md");
        std::process::abort();
    }));
    for (target, run) in TARGETS {
        let seeds = inputs("corpus", target);
        assert!(!seeds.is_empty(), "{target} has no seeds");
        for input in seeds.into_iter().chain(inputs("regressions", target)) {
            let bytes = std::fs::read(&input).unwrap();
            *CURRENT.lock().unwrap() = Some(input);
            run(&bytes);
        }
    }
}

#[test]
fn every_corpus_is_small_and_belongs_to_a_target_with_a_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut targets: Vec<_> = TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    targets.sort();
    for (folder, exact) in [
        ("fuzz_targets", true),
        ("corpus", true),
        ("regressions", false),
    ] {
        let Ok(entries) = root.join(folder).read_dir() else {
            assert!(!exact, "{folder} is missing");
            continue;
        };
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().path())
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort();
        match exact {
            true => assert_eq!(names, targets, "{folder}"),
            false => assert!(names.iter().all(|name| targets.contains(name)), "{folder}"),
        }
    }
    for target in targets {
        let bytes: u64 = inputs("corpus", &target)
            .iter()
            .map(|input| input.metadata().unwrap().len())
            .sum();
        assert!(bytes < 100 << 10, "{target}: {bytes} bytes of seeds");
    }
}
