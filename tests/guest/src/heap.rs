//! The heap: RAM between the end of the image and 3 GiB, for `alloc` and for memory shared with devices.
//!
//! There is one processor, and an interrupt handler that never allocates, so no lock is needed.
#![allow(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;

use crate::boot_params::Ram;
use crate::ring0;

/// End of the RAM that is mapped (`ring0/tables.s`).
const MAPPED_RAM_END: u64 = 0xc000_0000;

struct SingleProcessorHeap(UnsafeCell<Heap>);

// SAFETY: the guest runs one processor, and the interrupt handler (traps.s) does not allocate, so no two calls overlap.
unsafe impl Sync for SingleProcessorHeap {}

#[global_allocator]
static HEAP: SingleProcessorHeap = SingleProcessorHeap(UnsafeCell::new(Heap::empty()));

// SAFETY: `Heap` returns blocks of the layout that was asked for, which do not overlap.
unsafe impl GlobalAlloc for SingleProcessorHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no other reference exists, see the `Sync` above.
        let heap = unsafe { &mut *self.0.get() };
        heap.allocate_first_fit(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: no other reference exists, see the `Sync` above.
        let heap = unsafe { &mut *self.0.get() };
        if let Some(block) = NonNull::new(block) {
            // SAFETY: the caller's promise: `block` came from `alloc` with this layout.
            unsafe { heap.deallocate(block, layout) };
        }
    }
}

/// Gives the heap the RAM behind the image. Returns its size in bytes; an error when there is none.
///
/// To be called once, before the first allocation; a second call changes nothing.
pub fn start(ram: impl Iterator<Item = Ram>) -> Result<usize, &'static str> {
    let image_end = ring0::end_of_image();
    let size = ram
        .filter(|ram| ram.start <= image_end)
        .map(|ram| {
            ram.start
                .saturating_add(ram.size)
                .min(MAPPED_RAM_END)
                .saturating_sub(image_end)
        })
        .max()
        .filter(|size| *size >= 1 << 20)
        .ok_or("less than 1 MiB of RAM behind the guest's image: give it more memory")?;
    let size = usize::try_from(size).map_err(|_| "more RAM than a pointer can reach")?;
    // SAFETY: no other reference exists, see the `Sync` above.
    let heap = unsafe { &mut *HEAP.0.get() };
    if heap.size() == 0 {
        // SAFETY: the boot loader's memory map says that this is RAM; nothing of the image, of the stack (below it) or of the
        // boot loader (below 1 MiB; the guest is started without initial RAM disk) is there, and it is used for ever.
        unsafe { heap.init(ptr::with_exposed_provenance_mut(image_end as usize), size) };
    }
    Ok(size)
}
