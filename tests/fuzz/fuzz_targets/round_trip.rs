//! The fuzzer's program for [`pvgpu_fuzz::round_trip`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::round_trip::run(bytes));
