//! The embedded GPU behind guest driver and host proxy, in one process: the demo's picture without a VM.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pvgpu_e2e::loopback_file::LoopbackFile;
use pvgpu_e2e::picture_file;
use pvgpu_host_proxy::soft::{SoftConfig, SoftDriver};
use pvgpu_scenarios::{selftest, soft};

fn open(config: SoftConfig) -> LoopbackFile {
    LoopbackFile::open(Arc::new(SoftDriver::new(config).unwrap())).unwrap()
}

#[test]
fn the_embedded_gpu_draws_the_demos_picture_and_again_the_same() {
    let first = soft::draw(&mut open(SoftConfig::default()), &mut |_, _| {}).unwrap();
    let second = soft::draw(&mut open(SoftConfig::default()), &mut |_, _| {}).unwrap();
    assert!(first == second, "two GPUs drew different pictures");
}

/// As [`open`], in a guest that maps with pages of its own.
fn open_without_aperture(config: SoftConfig) -> LoopbackFile {
    let driver = Arc::new(SoftDriver::new(config).unwrap());
    LoopbackFile::open_without_aperture(driver).unwrap()
}

#[test]
fn a_guest_without_an_aperture_draws_the_same_picture() {
    let with = soft::draw(&mut open(SoftConfig::default()), &mut |_, _| {}).unwrap();
    let mut file = open_without_aperture(SoftConfig::default());
    let without = soft::draw(&mut file, &mut |_, _| {}).unwrap();
    assert!(with == without, "the pictures differ");
}

#[test]
fn the_picture_in_the_readme_is_the_demos() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/demo.png");
    let shown = picture_file::read_png(&path).unwrap();
    let drawn = soft::draw(&mut open(SoftConfig::default()), &mut |_, _| {}).unwrap();
    assert!(
        shown == drawn,
        "docs/demo.png is old: `cargo xtask demo --output docs/demo.png` writes it"
    );
}

#[test]
fn a_file_on_the_embedded_gpu_refuses_what_it_must_and_survives_a_fault_and_a_hang() {
    let config = SoftConfig {
        watchdog: Duration::from_millis(50),
        ..SoftConfig::default()
    };
    selftest::run(&mut open(config), &mut |_, _| {}).unwrap();
    selftest::run(&mut open_without_aperture(config), &mut |_, _| {}).unwrap();
}
