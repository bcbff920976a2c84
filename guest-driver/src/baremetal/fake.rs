//! A machine for unit tests: its devices see the test's own memory, its clock stands still.
#![allow(unsafe_code)]

use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed, dealloc};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use super::queue::Platform;

/// A machine whose devices see the test's own memory.
#[derive(Debug)]
pub struct Fake;

fn layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap()
}

// SAFETY: memory of the allocator, zeroed, aligned, and not shared with anybody but the fake device.
unsafe impl Hal for Fake {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout(pages)) }).unwrap();
        (start.as_ptr().expose_provenance() as u64, start)
    }

    unsafe fn dma_dealloc(_: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: from `dma_alloc` with the same number of pages.
        unsafe { dealloc(start.as_ptr(), layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("only for PCI")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

// SAFETY: addresses are the same on both sides.
unsafe impl Platform for Fake {
    fn dma_address(address: PhysAddr) -> NonNull<u8> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
    }

    fn now_ns() -> u64 {
        0
    }

    fn interrupts() -> u32 {
        0
    }

    fn sleep(_: u32, _: u64) {}
}
