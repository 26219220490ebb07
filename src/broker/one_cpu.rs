//! Keeps our thread and lapin's on one CPU while a connection is opened and they take turns.
//!
//! lapin's thread has the socket, ours waits for it and for what lapin makes of the bytes, so each of the broker's answers
//! takes several changes of thread, with nothing done at the same time. Left alone the kernel spreads the two over two
//! CPUs and wakes each with an interrupt, which costs a virtual machine more than the work itself.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::{Pid, gettid},
};
use std::sync::{Arc, OnceLock};

/// lapin's thread, once it runs.
#[derive(Clone, Debug, Default)]
pub(super) struct IoThread(Arc<OnceLock<Pid>>);

impl IoThread {
    /// Called by it.
    pub(super) fn is_this(&self) {
        let _ = self.0.set(gettid());
    }
}

/// Both threads stay on one CPU until this is dropped, which has to be before a command starts: it would inherit that.
#[derive(Debug)]
pub(super) struct OneCpu {
    ours: Pid,
    io: IoThread,
    /// The CPUs to go back to.
    before: CpuSet,
}

impl OneCpu {
    /// On the CPU that the caller is on; lapin's thread begins where the one is that starts it. `None` where the kernel
    /// doesn't allow it: it is a matter of speed only.
    pub(super) fn begin(io: IoThread) -> Option<Self> {
        let mut here = CpuSet::new();
        here.set(sched_getcpu().ok()?).ok()?;
        let ours = gettid();
        let before = unrestricted_or(ours, sched_getaffinity(ours).ok()?);
        let begun = Self { ours, io, before };
        sched_setaffinity(ours, &here).ok()?;
        Some(begun)
    }
}

/// All CPUs that there could be, if a thread may run on all of its cpuset's anyway, and otherwise those that it was
/// restricted to. Linux takes what is set for what the user wants (`sched_setaffinity(2)`, cpuset(7)), now and when the cpuset
/// grows: with the CPUs of now the command would be kept on them, however long the wait for a message was.
fn unrestricted_or(thread: Pid, now: CpuSet) -> CpuSet {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::count() {
        let _ = all.set(cpu);
    }
    let widened =
        sched_setaffinity(thread, &all).and_then(|()| sched_getaffinity(thread)) == Ok(now);
    if widened { all } else { now }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        for &thread in [Some(&self.ours), self.io.0.get()].into_iter().flatten() {
            let _ = sched_setaffinity(thread, &self.before);
        }
    }
}
