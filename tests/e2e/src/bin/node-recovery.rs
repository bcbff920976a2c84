//! Sees its GPU go and come back, on the DRM node of a guest: `tests/e2e/src/recovery.rs` says how. The testbed runs it in L2 and
//! takes the GPU away.

use std::process::ExitCode;

use pvgpu_e2e::recovery;

const USAGE: &str = "usage: node-recovery --driver soft|virtio_gpu\n\
Draws on the DRM node of that driver, says `recovery: waiting`, and waits until the host loses the GPU; then until it is back, \
draws again, and once more after a line on its standard input. Fails if a call waits longer than it must, or succeeds.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--driver", driver @ ("soft" | "virtio_gpu")] => recovery::run(driver),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("node-recovery: {error}");
            ExitCode::FAILURE
        }
    }
}
