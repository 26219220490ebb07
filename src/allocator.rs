//! The allocator of both programs. If memory runs out, it logs that and exits with a documented status.
//!
//! In the shipped build, which is musl's, dlmalloc makes small allocations. That saves 7 percent of one message's time,
//! because musl maps and unmaps pages for them all the time. Large ones stay with musl: dlmalloc would fill lapin's two
//! buffers of 4 MiB with zeroes.

#![allow(unsafe_code)]

use crate::{abort, exit::NO_MEMORY, report};
#[cfg(target_env = "musl")]
use dlmalloc::GlobalDlmalloc as SmallAllocator;
use nix::libc;
#[cfg(not(target_env = "musl"))]
use std::alloc::System as SmallAllocator;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::copy_nonoverlapping,
};

/// In bytes. From about this size on, musl maps each allocation separately.
const LARGE: usize = 128 * 1024;

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

impl Allocator {
    fn for_size(size: usize) -> &'static dyn GlobalAlloc {
        if size < LARGE { &SmallAllocator } else { &System }
    }
}

fn checked(start: *mut u8) -> *mut u8 {
    if start.is_null() {
        out_of_memory();
    }
    start
}

/// Must not allocate.
#[cold]
fn out_of_memory() -> ! {
    let abort::End { status, source, before, after } = abort::out_of_memory();
    report::log_without_memory(format_args!("{before}{NO_MEMORY}{after}"), status, source);
    // SAFETY: only a system call. exit(3) would run destructors, which may allocate.
    unsafe { libc::_exit(status.into()) }
}

// SAFETY: an allocation's size, which every caller must know, tells which allocator has made it.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: here and below, the caller promises what the allocator requires.
        checked(unsafe { Self::for_size(layout.size()).alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        checked(unsafe { Self::for_size(layout.size()).alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        unsafe { Self::for_size(layout.size()).dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() < LARGE) == (size < LARGE) {
            return checked(unsafe { Self::for_size(size).realloc(start, layout, size) });
        }
        // SAFETY: the caller promises that the size can be aligned. Both allocations have room for the smaller size.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            copy_nonoverlapping(start, moved, layout.size().min(size));
            self.dealloc(start, layout);
            moved
        }
    }
}
