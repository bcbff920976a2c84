//! An allocator that counts what is allocated and not freed: a leak of some bytes, which `/proc` would show only after a
//! million sessions, shows here after one thousand.
//!
//! A program or test that wants to know makes [`Counting`] its `#[global_allocator]`.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

static BYTES: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

/// Bytes that are allocated now; zero in a program whose allocator is another one.
pub fn bytes() -> usize {
    BYTES.load(Ordering::Relaxed)
}

/// Keeps the C library from learning to keep ever larger freed blocks, in each of its arenas, which would look like a leak. To be
/// called first of all.
pub fn steady() {
    // SAFETY: it sets a number: from this size on, a block has pages of its own, which go with it.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
}

/// Gives freed memory that the C library keeps in its arenas back to the kernel, which would otherwise look like a leak.
pub fn trim() {
    // SAFETY: it changes only what is free.
    unsafe { libc::malloc_trim(0) };
}

// SAFETY: everything is done by `System`, with what the caller gave; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above; the block came from `System`.
        unsafe { System.dealloc(block, layout) };
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
    }
}
