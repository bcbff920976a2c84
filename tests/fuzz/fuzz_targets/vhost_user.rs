//! The fuzzer's program for [`pvgpu_fuzz::vhost_user`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pvgpu_fuzz::vhost_user::run(bytes));
