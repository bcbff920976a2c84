//! Checks what a DRM node does beside its ioctls' own meaning, a line for each: `tests/e2e/src/semantics.rs` has the
//! checks. The testbed runs it natively in L1 and on pvgpu's node in L2 and compares the lines.

use std::process::ExitCode;

use pvgpu_e2e::semantics::{self, Failure, Gpu, files, guest};

const USAGE: &str = "usage: node-semantics --driver soft|vgem|virtio_gpu [--guest]\n\
Checks mappings, descriptors, signals and threads on the DRM node of that driver and prints a line for each check; with \
--guest, what only pvgpu's node in a guest has. Fails if one does not see what a real node shows.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["--driver", driver] => check(driver),
        ["--driver", driver, "--guest"] => {
            Gpu::find(driver).and_then(|gpu| semantics::run(&gpu, guest::CHECKS.iter()))
        }
        // For the program itself (`files::executed`).
        ["--driver", driver, "--after-exec", ref descriptors @ ..] => {
            after_exec(driver, descriptors)
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("node-semantics: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(driver: &str) -> Result<(), Failure> {
    let gpu = Gpu::find(driver)?;
    semantics::run(&gpu, semantics::checks())
}

fn after_exec(driver: &str, descriptors: &[&str]) -> Result<(), Failure> {
    let numbers: Result<Vec<i32>, _> = descriptors.iter().map(|word| word.parse()).collect();
    println!("{}", files::after_exec(&Gpu::find(driver)?, &numbers?));
    Ok(())
}
