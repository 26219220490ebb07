//! Keeps our thread and lapin's on one CPU while a connection is opened and they take turns.
//!
//! lapin's thread has the socket, ours waits for it and for what lapin makes of the bytes, so each of the broker's answers
//! takes several changes of thread, with nothing done at the same time. Left alone the kernel spreads the two over two
//! CPUs and wakes each with an interrupt, which costs a virtual machine more than the work itself.

use nix::{
    errno::Errno,
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
    before: CpuSet,
}

impl OneCpu {
    /// On the CPU that the caller is on; lapin's thread begins where the one is that starts it. `None` where the kernel
    /// doesn't allow it: it is a matter of speed only.
    pub(super) fn begin(io: IoThread) -> Option<Self> {
        let pin = || {
            let ours = gettid();
            let before = sched_getaffinity(ours)?;
            let mut here = CpuSet::new();
            here.set(sched_getcpu()?)?;
            sched_setaffinity(ours, &here)?;
            Ok::<_, Errno>((ours, before))
        };
        let (ours, before) = pin().ok()?;
        Some(Self { ours, io, before })
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        for &thread in [Some(&self.ours), self.io.0.get()].into_iter().flatten() {
            let _ = sched_setaffinity(thread, &self.before);
        }
    }
}
