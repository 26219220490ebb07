//! The allocator of both programs. If memory runs out, it logs that and exits with a documented status.
//!
//! In the shipped build, which is musl's, dlmalloc makes small allocations. That saves 7 percent of one message's time,
//! because musl maps and unmaps pages for them all the time. Large ones stay with musl: dlmalloc would fill lapin's two
//! buffers of 4 MiB with zeroes.

#![allow(unsafe_code)]

use crate::{
    exit::{Exit, NO_MEMORY},
    report,
};
#[cfg(target_env = "musl")]
use dlmalloc::GlobalDlmalloc as SmallAllocator;
use nix::libc;
#[cfg(not(target_env = "musl"))]
use std::alloc::System as SmallAllocator;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::copy_nonoverlapping,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

/// In bytes. From about this size on, musl maps each allocation separately.
const LARGE: usize = 128 * 1024;

/// Decides the status: [`Exit::OsError`] promises that no command was started.
static COMMAND_STARTED: AtomicBool = AtomicBool::new(false);

/// With `--keep-going`, the run's status after a message was dead-lettered. Until then 0.
static DEAD_LETTERED: AtomicU8 = AtomicU8::new(0);

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

pub fn note_command_started() {
    COMMAND_STARTED.store(true, Ordering::Relaxed);
}

pub fn note_dead_lettered(status: u8) {
    DEAD_LETTERED.store(status, Ordering::Relaxed);
}

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
    let (exit, advice) = match COMMAND_STARTED.load(Ordering::Relaxed) {
        false => (Exit::OsError, "another try may help"),
        true => (Exit::Unconfirmed, "the command is killed, and its message may be delivered again"),
    };
    let (earlier, status) = match DEAD_LETTERED.load(Ordering::Relaxed) {
        0 => ("", exit.status()),
        status => ("a message was dead-lettered; ", status),
    };
    report::log_without_memory(format_args!("{earlier}{NO_MEMORY}; {advice}"), status);
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
