//! What the guest driver needs of this machine: memory that devices can reach, the clock, and the GPU's interrupt.
//!
//! Everything is mapped one to one, so a guest-physical address is a pointer.
#![allow(unsafe_code)]

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU8, Ordering};

use pvgpu_guest_driver::baremetal::Platform;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::clock;
use crate::interrupts::Interrupt;

/// This machine.
#[derive(Debug)]
pub struct Guest;

/// Global system interrupt of the GPU; [`NO_INTERRUPT`] before [`listen`].
static GPU_INTERRUPT: AtomicU8 = AtomicU8::new(NO_INTERRUPT);
const NO_INTERRUPT: u8 = u8::MAX;

/// Listens to the GPU's interrupt from now on. Returns whether the machine has such a line.
pub fn listen(gsi: u8) -> bool {
    let found = Interrupt::listen(gsi).is_some();
    if found {
        GPU_INTERRUPT.store(gsi, Ordering::Relaxed);
    }
    found
}

fn interrupt() -> Option<Interrupt> {
    Interrupt::of_gsi(GPU_INTERRUPT.load(Ordering::Relaxed))
}

fn layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE)
        .ok()
        .filter(|layout| layout.size() > 0)
}

/// Whole pages that the host reads and writes.
#[derive(Debug)]
pub struct Pages {
    memory: NonNull<u8>,
    count: usize,
}

impl Pages {
    /// As many as hold `length` bytes; nothing when there is no memory.
    pub fn new(length: usize) -> Option<Self> {
        let count = length.div_ceil(PAGE_SIZE);
        let (address, memory) = Guest::dma_alloc(count, BufferDirection::Both);
        (address != 0).then_some(Self { memory, count })
    }

    /// Their guest-physical address.
    pub fn address(&self) -> u64 {
        self.memory.as_ptr().expose_provenance() as u64
    }

    /// Their length in bytes.
    pub fn len(&self) -> usize {
        self.count * PAGE_SIZE
    }

    /// Gives them back, which the host must not use any more. Dropping them does not.
    pub fn free(self) {
        // SAFETY: from `dma_alloc` with as many pages, and gone with this.
        unsafe { Guest::dma_dealloc(self.address(), self.memory, self.count) };
    }
}

// SAFETY: memory of the heap is zeroed, aligned as asked, given to one owner, and mapped one to one; sharing it needs nothing.
unsafe impl Hal for Guest {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: `layout` gives no empty layout.
        let memory = layout(pages).and_then(|layout| NonNull::new(unsafe { alloc_zeroed(layout) }));
        match memory {
            Some(memory) => (memory.as_ptr().expose_provenance() as u64, memory),
            None => (0, NonNull::dangling()), // address 0: virtio-drivers' sign for "no memory"
        }
    }

    unsafe fn dma_dealloc(_address: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        let Some(layout) = layout(pages) else {
            return -1;
        };
        // SAFETY: the caller's promise: from `dma_alloc` with the same number of pages.
        unsafe { dealloc(memory.as_ptr(), layout) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _size: usize) -> NonNull<u8> {
        Self::dma_address(address)
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_address: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

// SAFETY: addresses are the same for devices and for the guest.
unsafe impl Platform for Guest {
    fn dma_address(address: PhysAddr) -> NonNull<u8> {
        NonNull::new(ptr::with_exposed_provenance_mut(address as usize))
            .unwrap_or(NonNull::dangling())
    }

    fn now_ns() -> u64 {
        clock::now_ns()
    }

    fn interrupts() -> u32 {
        interrupt().map_or(0, Interrupt::count)
    }

    fn sleep(seen: u32, at_most_ns: u64) {
        if let Some(interrupt) = interrupt() {
            interrupt.sleep(seen, at_most_ns);
        }
    }
}
