//! The allocator of both programs. If memory runs out, it logs that and exits with a documented status.
//!
//! In the musl build, which is the shipped one, dlmalloc makes small allocations: it saves 7 percent of one message's
//! time, because musl maps and unmaps pages for them all the time. Large ones stay with musl: dlmalloc would fill
//! lapin's two buffers of 4 MiB with zeroes.

#![allow(unsafe_code)]

use crate::{
    exit::{Exit, NO_MEMORY},
    report,
};
#[cfg(target_env = "musl")]
use dlmalloc::GlobalDlmalloc as Small;
use nix::libc;
#[cfg(not(target_env = "musl"))]
use std::alloc::System as Small;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::copy_nonoverlapping,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

/// About the size, in bytes, from which musl maps each allocation separately.
const LARGE: usize = 128 * 1024;

/// Whether a command has been started: [`Exit::OsError`] promises that none was.
static COMMAND_STARTED: AtomicBool = AtomicBool::new(false);

/// The status that a dead-lettered message gives the run with `--keep-going`, or 0.
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
    fn of(size: usize) -> &'static dyn GlobalAlloc {
        if size < LARGE { &Small } else { &System }
    }
}

fn or_end(start: *mut u8) -> *mut u8 {
    if start.is_null() {
        end();
    }
    start
}

/// Must not allocate.
#[cold]
fn end() -> ! {
    let (exit, then) = match COMMAND_STARTED.load(Ordering::Relaxed) {
        false => (Exit::OsError, "another try may help"),
        true => (Exit::Unconfirmed, "the command is killed, and its message may be delivered again"),
    };
    let (earlier, status) = match DEAD_LETTERED.load(Ordering::Relaxed) {
        0 => ("", exit.status()),
        status => ("a message was dead-lettered; ", status),
    };
    report::log_without_memory(format_args!("{earlier}{NO_MEMORY}; {then}"), status);
    // SAFETY: a system call without memory. exit(3) would run destructors, which may allocate.
    unsafe { libc::_exit(status.into()) }
}

// SAFETY: every call goes to the allocator that made the allocation. Its size, which callers must know, decides which
// one.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: here and below, the caller has promised what the allocator requires.
        or_end(unsafe { Self::of(layout.size()).alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        or_end(unsafe { Self::of(layout.size()).alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        unsafe { Self::of(layout.size()).dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if (layout.size() < LARGE) == (size < LARGE) {
            return or_end(unsafe { Self::of(size).realloc(start, layout, size) });
        }
        // SAFETY: the caller has promised that the size can be aligned. The two places don't overlap, and each has room
        // for the smaller size.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            copy_nonoverlapping(start, moved, layout.size().min(size));
            self.dealloc(start, layout);
            moved
        }
    }
}
