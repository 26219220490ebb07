//! The allocator of the musl build, which is the shipped one: 7 percent of one message's time, 10 of its processor, no memory.
//!
//! musl's own maps a page or two for a handful of small allocations, and gives them back as soon as they are free, dozens
//! of times before the first message is here. dlmalloc keeps what it has. But it writes zeroes into what lapin wants as two
//! empty buffers of 4 MiB, where the kernel would give pages only as they are used; so what is large stays with musl.

#![allow(unsafe_code)]

use dlmalloc::GlobalDlmalloc;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::copy_nonoverlapping,
};

/// From about this size on, in bytes, musl maps each allocation by itself.
const LARGE: usize = 128 * 1024;

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

impl Allocator {
    fn of(size: usize) -> &'static dyn GlobalAlloc {
        if size < LARGE { &GlobalDlmalloc } else { &System }
    }
}

// SAFETY: whose an allocation is follows from its size, which the caller has to know; each call goes on to the allocator
// that made it.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises, passed on; so are those below.
        unsafe { Self::of(layout.size()).alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        unsafe { Self::of(layout.size()).alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        unsafe { Self::of(layout.size()).dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() < LARGE) == (size < LARGE) {
            return unsafe { Self::of(size).realloc(start, layout, size) };
        }
        // SAFETY: the caller promises that the size can be aligned; the two places don't overlap, and each has room for
        // the smaller size.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                copy_nonoverlapping(start, moved, layout.size().min(size));
                self.dealloc(start, layout);
            }
            moved
        }
    }
}
