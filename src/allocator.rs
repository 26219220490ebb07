//! musl's memory, and dlmalloc's way of handing it out.
//!
//! musl's own malloc asks the kernel for a page, or for the 128 KiB of a frame, and gives it back, a hundred times in a
//! run with one small message and for each frame of a large one. dlmalloc keeps what it has. What is really large, a
//! message's body or lapin's rings of 4 MiB, stays musl's: that comes from the kernel full of zeroes, which dlmalloc
//! would write once more, and moves without being copied.

use dlmalloc::GlobalDlmalloc;
use std::alloc::{GlobalAlloc, Layout, System};

/// From this size on, in bytes, memory is musl's; frames are smaller.
const LARGE: usize = 1 << 20;

pub(crate) struct Allocator;

// SAFETY: each block is freed by the allocator that it came from, as its size tells which that was.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are handed on.
        unsafe {
            if layout.size() < LARGE {
                GlobalDlmalloc.alloc(layout)
            } else {
                System.alloc(layout)
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are handed on.
        unsafe {
            if layout.size() < LARGE {
                GlobalDlmalloc.alloc_zeroed(layout)
            } else {
                System.alloc_zeroed(layout)
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are handed on, to the allocator that the size names.
        unsafe {
            if layout.size() < LARGE {
                GlobalDlmalloc.dealloc(block, layout);
            } else {
                System.dealloc(block, layout);
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are handed on; between the two, a block is copied as far as both reach.
        unsafe {
            match (layout.size() < LARGE, size < LARGE) {
                (true, true) => GlobalDlmalloc.realloc(block, layout, size),
                (false, false) => System.realloc(block, layout, size),
                _ => {
                    let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                    if !new.is_null() {
                        new.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    new
                }
            }
        }
    }
}
