//! `native`: runs a scenario on a DRM node of this machine, without pvgpu, and writes its picture. What the test guest
//! draws is compared with it; people use it to see what a driver does.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use pvgpu_e2e::drm_ioctl::{self, Kind, Node};
use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_e2e::picture_file;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_scenarios::{Picture, soft, vgem, virtio_gpu};

const USAGE: &str = "usage: native (--node PATH | --driver soft|vgem|virtio_gpu|embedded) [--scenario soft|vgem|virtio_gpu] \
[--output FILE.png|FILE.rgba]\n\
Runs the scenario (by default the driver's own) on a DRM node, or on an embedded GPU of its own, says how long each step took, and writes the picture.";

/// What the command line says.
#[derive(Default)]
struct Arguments {
    node: Option<PathBuf>,
    driver: Option<String>,
    scenario: Option<String>,
    output: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Some(arguments) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("native: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Arguments> {
    let mut arguments = Arguments::default();
    while let Some(word) = words.next() {
        let value = words.next()?;
        match word.as_str() {
            "--node" => arguments.node = Some(value.into()),
            "--driver" => arguments.driver = Some(value),
            "--scenario" => arguments.scenario = Some(value),
            "--output" => arguments.output = Some(value.into()),
            _ => return None,
        }
    }
    (arguments.node.is_some() != arguments.driver.is_some()).then_some(arguments)
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut report = |name: &'static str, nanoseconds: u64| {
        println!(
            "{name}: {}.{} us",
            nanoseconds / 1000,
            nanoseconds / 100 % 10
        );
    };
    let picture = if arguments.driver.as_deref() == Some("embedded") {
        let driver = SoftDriver::new(SoftConfig::default())?;
        soft::draw(&mut LoopbackFile::open(Arc::new(driver))?, &mut report)?
    } else {
        let mut node = open(arguments)?;
        let (driver, version) = node.version()?;
        let scenario = arguments.scenario.as_ref().unwrap_or(&driver);
        println!("{scenario} on {} ({driver} {version})", node.path.display());
        match scenario.as_str() {
            "soft" => soft::draw(&mut node, &mut report)?,
            "vgem" => vgem::draw(&mut node, &mut report)?,
            "virtio_gpu" => virtio_gpu::draw(&mut node, &mut report)?,
            other => return Err(format!("no scenario is called {other}: see native --help").into()),
        }
    };
    println!(
        "picture {}x{} {:016x}",
        picture.width,
        picture.height,
        picture.fingerprint()
    );
    if let Some(output) = &arguments.output {
        write(&picture, output)
            .map_err(|error| format!("cannot write {}: {error}", output.display()))?;
    }
    Ok(())
}

/// The node that was asked for; of a driver, the kind of node that its scenario needs.
fn open(arguments: &Arguments) -> std::io::Result<Node> {
    match (&arguments.node, &arguments.driver) {
        (Some(path), _) => Node::open(path),
        (None, driver) => {
            let driver = driver.as_deref().unwrap_or_default();
            let kind = if driver == "vgem" {
                Kind::Card
            } else {
                Kind::Render
            };
            drm_ioctl::find(driver, kind)
        }
    }
}

/// As PNG or as bare bytes, by the name of the file.
fn write(picture: &Picture, path: &Path) -> std::io::Result<()> {
    if path.extension().is_some_and(|extension| extension == "png") {
        picture_file::write_png(picture, path)
    } else {
        picture_file::write_rgba(picture, path)
    }
}
