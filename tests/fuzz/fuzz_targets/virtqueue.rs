//! The fuzzer's program for [`pvgpu_fuzz::virtqueue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::virtqueue::run(bytes));
