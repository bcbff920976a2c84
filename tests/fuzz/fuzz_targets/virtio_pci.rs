//! The fuzzer's program for [`pvgpu_fuzz::virtio_pci`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::virtio_pci::run(bytes));
