//! What glibc's `malloc` would open files for, in any thread, at any time: settled before the first thread is filtered.
//!
//! [`super`] calls it once per process. With another C library it changes nothing.

#![allow(unsafe_code)]

use std::thread;

/// Settles both questions that glibc asks once in the life of a process.
pub(super) fn settle() -> std::io::Result<()> {
    // How many heaps it may make: by default eight for each processor, which it counts in `/sys`.
    let processors = thread::available_parallelism().map_or(1, |count| count.get());
    let heaps = i32::try_from(processors.saturating_mul(8)).unwrap_or(i32::MAX);
    // SAFETY: changes a number of the allocator, under its lock; zero, that it did not, is as good.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, heaps) };
    // Whether it may give memory of a heap back, which a file of `/proc` says: it looks the first time that it would, on a
    // heap that is not the main thread's.
    let trim = thread::Builder::new().name("pvgpu-heap".into());
    // It does nothing that could panic.
    let _ = trim.spawn(grow_and_trim)?.join();
    Ok(())
}

/// Enough small pieces to grow a heap, all of them given back.
fn grow_and_trim() {
    const PIECE: usize = 64 << 10;
    let pieces: Vec<Vec<u8>> = (0..32).map(|_| vec![1; PIECE]).collect();
    drop(std::hint::black_box(pieces));
}
