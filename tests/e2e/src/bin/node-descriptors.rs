//! Checks the file descriptors that a DRM node gives and takes, a line for each: `tests/e2e/src/descriptors.rs` has the
//! checks. The testbed runs it natively in L1 and on pvgpu's node in L2.

use std::process::ExitCode;

use pvgpu_e2e::descriptors::{self, Gpu};

const USAGE: &str = "usage: node-descriptors --driver soft|vgem|virtio_gpu [--guest]\n\
Checks dma-bufs, sync files, syncobjs, and poll and read of the DRM node of that driver, and prints a line for each \
check; with --guest also what happens to them when pvgpu's module is unloaded or its device lost, which is then gone.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let gpu = |driver: &str| Gpu {
        driver: driver.to_owned(),
    };
    let failures = match words[..] {
        ["--driver", driver] => descriptors::run(&gpu(driver), false),
        ["--driver", driver, "--guest"] => descriptors::run(&gpu(driver), true),
        // For the program itself.
        ["--driver", driver, "--child", what] => match descriptors::child(&gpu(driver), what) {
            Ok(()) => 0,
            Err(failure) => {
                println!("the other process: {failure}");
                1
            }
        },
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match failures {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
