//! Replays the inputs that the repository keeps for the fuzz targets, without a fuzzer: the seeds and all that once was a finding.
//!
//! Each target is one test. A panic anywhere ends the process, even where the proxy would catch it: as under the fuzzer.

use pvgpu_fuzz::TARGETS;
use pvgpu_fuzz::answering::DRIVERS;
use pvgpu_protocol::control::{TraceRecord, encode_trace};
use pvgpu_protocol::family::of_driver;
use pvgpu_protocol::layout::align;
use pvgpu_protocol::schema::{Count, Kind};
use pvgpu_protocol::wire::{IoctlRequest, Operation, RequestHeader};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use zerocopy::IntoBytes;

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

/// For each ioctl of each driver, requests that are nearly valid: null pointers, or an element in every array.
fn ioctls() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (choice, driver) in (0..).zip(DRIVERS) {
        for ioctl in of_driver(driver).iter().flat_map(|family| family.ioctls) {
            for elements in [0, 1] {
                let mut argument = vec![0; ioctl.argument.size.into()];
                let mut arrays = Vec::new();
                for field in ioctl.argument.fields {
                    let value = match field.rules.last().unwrap().kind {
                        Kind::Pointer(pointer) => {
                            let size: usize = pointer.element.size().into();
                            let count = match pointer.count {
                                Count::Fixed(count) => u64::from(count),
                                Count::Field(_) => 1,
                            };
                            if elements == 1 && pointer.direction.is_in() {
                                let element = [&[1][..], &vec![0; size - 1]].concat();
                                arrays.push(element.repeat(count.try_into().unwrap()));
                            }
                            elements
                        }
                        Kind::Handle { .. } | Kind::ClosedHandle { .. } => 1,
                        Kind::Value => elements,
                        _ => 0,
                    };
                    field.write(&mut argument, value);
                }
                let body = IoctlRequest {
                    command: ioctl.command.into(),
                    reserved: 0.into(),
                };
                let header = RequestHeader::new(Operation::Ioctl, 1, 9);
                let mut input = [&[choice, 0, 16], header.as_bytes(), body.as_bytes()].concat();
                let start = input.len();
                input.extend(argument);
                for array in arrays {
                    input.resize(start + align(input.len() - start), 0);
                    input.extend(array);
                }
                seeds.push((format!("{driver}-{}-{elements}", ioctl.name), input));
            }
        }
    }
    seeds
}

/// The requests of the examples in `docs/protocol.md`, which are of `virtio_gpu`.
fn examples() -> Vec<(String, Vec<u8>)> {
    let page = include_str!("../../../docs/protocol.md");
    let mut seeds = Vec::new();
    for example in page.split("<!-- example: ").skip(1) {
        let name = example.split(' ').next().unwrap();
        let lines = example.split("response, ").next().unwrap().lines();
        let bytes = lines
            .skip_while(|line| !line.starts_with("request"))
            .skip(1);
        let request = bytes.flat_map(|line| {
            let words = line.split_whitespace().skip(1);
            words.map_while(|word| match word.len() {
                2 => u8::from_str_radix(word, 16).ok(),
                _ => None,
            })
        });
        let input: Vec<u8> = [2, 0, 16].into_iter().chain(request).collect();
        seeds.push((format!("example-{name}"), input));
    }
    seeds
}

/// Writes the first seeds: real requests, from which the fuzzer goes on. `docs/fuzzing.md` says when.
#[test]
fn requests_of_all_kinds_are_seeds() {
    let seeds = [ioctls(), examples()].concat();
    assert!(seeds.len() > 100, "{} requests", seeds.len());
    assert!(seeds.iter().all(|(_, input)| input.len() >= 19));
    if std::env::var_os("PVGPU_WRITE_SEEDS").is_none() {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, input) in &seeds {
        std::fs::write(root.join("decode").join(name), input).unwrap();
    }
    let mut trace = Vec::new();
    for ((_, input), time_ns) in seeds.iter().zip(0..) {
        let record = TraceRecord {
            time_ns,
            duration_ns: 1000,
            queue: 0,
            result: 0,
            request: &input[3..],
        };
        let mut buffer = vec![0; input.len() + 64];
        let length = encode_trace(&record, &mut buffer).unwrap();
        trace.extend(&buffer[..length]);
    }
    trace.truncate(4096);
    std::fs::write(root.join("trace/requests"), trace).unwrap();
}

#[test]
fn no_input_that_is_kept_is_a_finding() {
    std::panic::set_hook(Box::new(|panic| {
        let current = CURRENT.lock().unwrap().take();
        // What a test prints is lost when the process ends: this is not.
        let message = format!("{panic}\nwhile replaying {current:?}: see docs/fuzzing.md\n");
        let _ = std::io::stderr().write_all(message.as_bytes());
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
