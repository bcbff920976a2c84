//! `demo GUEST PNG`: boots the test guest with the embedded GPU, tells what it does, and writes the picture that it drew
//! and read back. `cargo xtask demo` builds and starts it.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use pvgpu_e2e::{guest_vm, picture_file};
use pvgpu_host_proxy::device::Doorbell;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};

/// Like `println!`, but goes on when nobody reads it any more (`| head`): what the demo is about is the picture.
macro_rules! tell {
    ($($argument:tt)*) => {{ let _ = writeln!(io::stdout(), $($argument)*); }};
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [guest, png] = arguments.as_slice() else {
        eprintln!("usage: demo GUEST PNG");
        return ExitCode::from(2);
    };
    // Before the guest draws for nobody.
    if let Err(error) = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(png)
    {
        eprintln!(
            "demo: cannot write {png}: {error}; say with --output FILE where the picture may go"
        );
        return ExitCode::from(2);
    }
    match run(Path::new(guest), Path::new(png)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(guest: &Path, png: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let driver = Arc::new(SoftDriver::new(SoftConfig::default())?);
    let start = Instant::now();
    tell!("The guest opens the GPU, draws, waits, and reads its picture back:");
    let run = guest_vm::run(
        guest,
        "scenario=draw",
        driver,
        (Doorbell::Inline, guest_vm::APERTURE),
        |line| match line
            .strip_prefix("step ")
            .and_then(|step| step.rsplit_once(": "))
        {
            Some((step, time)) => tell!("  {step:52} {time:>16}"),
            None => tell!("  {line}"),
        },
    )?;
    let elapsed = start.elapsed();
    if run.outcome.exit_code != 0 {
        return Err(format!("the guest ended badly: {:?}", run.outcome.ending).into());
    }
    let picture = run
        .picture
        .ok_or("the guest ended without dumping a picture")?;
    picture_file::write_png(&picture, png)
        .map_err(|error| format!("cannot write {}: {error}", png.display()))?;
    let exits = &run.outcome.exits;
    tell!(
        "What that took, from power-on to exit in {:.0} ms:",
        elapsed.as_secs_f64() * 1e3
    );
    tell!(
        "  exits: {} doorbells, {} other register accesses, {} port accesses (console, boot)",
        run.outcome.doorbell_exits,
        (exits.mmio_reads + exits.mmio_writes).saturating_sub(run.outcome.doorbell_exits),
        exits.pio
    );
    if let Some(gpu) = &run.outcome.gpu {
        let operations: Vec<_> = gpu
            .operations
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(operation, count)| format!("{count} {}", operation.name()))
            .collect();
        tell!(
            "  requests: {} ({}), {} interrupts",
            gpu.completed,
            operations.join(", "),
            gpu.interrupts
        );
    }
    tell!("The picture is in {}", png.display());
    Ok(())
}
