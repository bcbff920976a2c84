//! The fuzzer's program for [`pvgpu_fuzz::operations`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::operations::run(bytes));
