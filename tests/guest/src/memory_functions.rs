//! The functions that the compiler calls for copying, filling and comparing memory, which elsewhere the C library provides
//! (`memory_functions.s`). Called by name from compiled code; `scenario=memory` checks them against plain loops.
#![allow(unsafe_code)]

use core::arch::global_asm;

global_asm!(include_str!("memory_functions.s"), options(raw));
