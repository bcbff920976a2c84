//! The fuzzer's program for [`pvgpu_fuzz::trace`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::trace::run(bytes));
