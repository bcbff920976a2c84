//! What a second processor does: it changes words of shared memory to something else for a moment and back, for ever.
//! `scenario=doublefetch` says which. It must never allocate, and nothing else runs there.
#![allow(unsafe_code)]

use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Most words.
const MAX: usize = 32;

/// A word of 32 bits, aligned.
struct Word {
    address: AtomicU64,
    good: AtomicU64,
    bad: AtomicU64,
}

static WORDS: [Word; MAX] = [const {
    Word {
        address: AtomicU64::new(0),
        good: AtomicU64::new(0),
        bad: AtomicU64::new(0),
    }
}; MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Changes so far.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// From now on the word at guest-physical `address`, which is memory for devices and of no Rust object, is `bad` now and
/// then, and `good` otherwise. False when there are too many.
pub fn flip(address: u64, good: u32, bad: u32) -> bool {
    let number = COUNT.load(Ordering::Relaxed);
    let Some(word) = WORDS.get(number) else {
        return false;
    };
    word.address.store(address, Ordering::Relaxed);
    word.good.store(good.into(), Ordering::Relaxed);
    word.bad.store(bad.into(), Ordering::Relaxed);
    COUNT.store(number + 1, Ordering::Release);
    true
}

/// Changes so far: whether there is a second processor.
pub fn changes() -> u64 {
    CHANGES.load(Ordering::Relaxed)
}

/// The second processor's work.
pub fn flip_for_ever() -> ! {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    loop {
        // Marsaglia's xorshift.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let count = COUNT.load(Ordering::Acquire);
        let Some(word) = WORDS.get((random >> 32) as usize % count.max(1)) else {
            continue;
        };
        if count == 0 {
            spin_loop();
            continue;
        }
        let address = word.address.load(Ordering::Relaxed) as usize;
        let place = ptr::with_exposed_provenance_mut::<u32>(address);
        for value in [&word.bad, &word.good] {
            // SAFETY: `flip`'s callers name memory that is mapped and of no Rust object.
            unsafe { place.write_volatile(value.load(Ordering::Relaxed) as u32) };
            (0..random % 64).for_each(|_| spin_loop());
        }
        CHANGES.fetch_add(1, Ordering::Relaxed);
    }
}
