//! The crate that rustc links into everything: empty, since the kernel has memcpy and its like.
#![allow(internal_features)]
#![feature(compiler_builtins)]
#![compiler_builtins]
#![no_builtins]
#![no_std]
