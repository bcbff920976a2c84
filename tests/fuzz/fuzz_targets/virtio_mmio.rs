//! The fuzzer's program for [`pvgpu_fuzz::virtio_mmio`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::virtio_mmio::run(bytes));
