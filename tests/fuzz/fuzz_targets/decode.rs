//! The fuzzer's program for [`pvgpu_fuzz::decode`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::decode::run(bytes));
