//! The fuzzer's program for [`pvgpu_fuzz::soft_commands`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::soft_commands::run(bytes));
