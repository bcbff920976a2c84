//! The fuzzer's program for [`pvgpu_fuzz::control`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::control::run(bytes));
