//! The memory that fuzz cases share with the device: tables, rings, requests and room for responses, a page or more each.
//!
//! The device writes where it is told to, so a case must never name memory of the guest's own program: every address that it
//! gives away comes from [`Arena::address`] or [`Arena::table`], and is in the arena or behind all RAM. Responses never go
//! over tables, which would make addresses of them.
#![allow(unsafe_code)]

use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal};

use super::random::Random;
use crate::dma::Guest;

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Descriptor tables of three queues and one for indirect descriptors.
pub const TABLES: u64 = 0;
/// What the driver makes available: three queues.
pub const AVAILABLE: u64 = 4 * PAGE;
/// What the device has used: three queues.
pub const USED: u64 = 7 * PAGE;
/// Requests.
pub const REQUESTS: u64 = 10 * PAGE;
/// Responses.
pub const RESPONSES: u64 = 18 * PAGE;
/// All of it.
pub const SIZE: u64 = 26 * PAGE;
/// Behind all RAM that this guest is given, below the devices.
const NO_RAM: u64 = 0x8000_0000;

/// The memory.
#[derive(Debug)]
pub struct Arena {
    physical: u64,
    start: NonNull<u8>,
}

impl Arena {
    /// A zeroed arena, for ever; nothing when there is no memory for it.
    pub fn new() -> Option<Self> {
        let (physical, start) = Guest::dma_alloc((SIZE / PAGE) as usize, BufferDirection::Both);
        (physical != 0).then_some(Self { physical, start })
    }

    /// Guest-physical address of the byte at `offset`.
    pub fn at(&self, offset: u64) -> u64 {
        self.physical + offset
    }

    /// Writes bytes at `offset`, which wrap around at the end.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        for (index, byte) in (0..).zip(bytes) {
            let place = ((offset + index) % SIZE) as usize;
            // SAFETY: within the arena, which nothing in Rust has a reference to; the device may read and write it at any
            // time, so each byte is written by itself.
            unsafe { self.start.add(place).write_volatile(*byte) };
        }
    }

    /// The 16 bits at `offset`, an even number within the arena, as they are now.
    pub fn half(&self, offset: u64) -> u16 {
        assert!(offset.is_multiple_of(2) && offset < SIZE);
        // SAFETY: within the arena, as for `write`.
        unsafe {
            self.start
                .add(offset as usize)
                .cast::<u16>()
                .read_volatile()
        }
    }

    /// Everything zero.
    pub fn clear(&self) {
        // SAFETY: as for `write`; the device has been reset and does not use it.
        unsafe { self.start.write_bytes(0, SIZE as usize) };
    }

    /// An address for the device to read or write, whatever it is a descriptor of.
    pub fn address(&self, random: &mut Random) -> u64 {
        let inside = random.next() % (SIZE - AVAILABLE) + AVAILABLE;
        match random.below(16) {
            0 => NO_RAM + random.next() % 0x1000_0000,
            1 => u64::MAX - random.next() % 64,
            2 => random.next() | 1 << 40,
            // The aperture, which is no memory that a queue may use.
            3 => 0x10_0000_0000 + random.next() % 0x20_0000,
            4..8 => self.at(inside),
            _ => self.at(inside & !0xff),
        }
    }

    /// An address for a descriptor table.
    pub fn table(&self, random: &mut Random) -> u64 {
        match random.below(16) {
            0 => NO_RAM + random.next() % 0x1000_0000,
            1 => u64::MAX - random.next() % 64,
            2 => random.next() | 1 << 40,
            _ => self.at(TABLES + random.next() % (4 * PAGE) / 16 * 16),
        }
    }
}
