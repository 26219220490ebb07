//! Reaps children that have ended, orphans included, and passes on the command's status.

use crate::verdict::Ended;
use nix::{
    libc,
    sys::{
        prctl,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, oneshot},
    task::yield_now,
};

/// This many children are reaped before other tasks get a turn: about a millisecond.
const SWEEP_MAX: usize = 100;

type Watched = (Pid, oneshot::Sender<Ended>);

#[derive(Clone, Debug, Default)]
pub struct Reaper {
    watched: Arc<Mutex<Option<Watched>>>,
    reaped: Arc<Notify>,
}

impl Reaper {
    /// Makes us the parent of every process that the command orphans. Fails if the handler for SIGCHLD can't be
    /// installed.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut sigchld = signal(SignalKind::child())?;
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::warn!(
                "processes that the command leaves behind are neither waited for nor killed, unless qconsume is PID 1: the system refuses PR_SET_CHILD_SUBREAPER ({}): allow prctl in the seccomp profile",
                error.desc()
            );
        }
        let background = reaper.clone();
        tokio::spawn(async move {
            while sigchld.recv().await.is_some() {
                while background.sweep() == Children::LimitReached {
                    yield_now().await;
                }
            }
        });
        Ok(reaper)
    }

    fn watched(&self) -> MutexGuard<'_, Option<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Call this right after the child's start, without an await in between: once the child is reaped, its status is
    /// lost.
    pub(super) fn watch(&self, child: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        *self.watched() = Some((child, sender));
        receiver
    }

    /// Waits until a child has been reaped. Returns at once if one has been since the last call.
    pub(super) async fn reaped(&self) {
        self.reaped.notified().await;
    }

    pub(super) fn sweep(&self) -> Children {
        for _ in 0..SWEEP_MAX {
            let (child, ended) = match peek_ended() {
                Peek::Ended(child, ended) => (child, ended),
                Peek::Running => return Children::Running,
                Peek::NoChild => return Children::None,
            };
            // The result doesn't matter: the status is known. nix 0.31 fails if a real-time signal has killed the child.
            let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
            if let Some((_, sender)) = self.watched().take_if(|(command, _)| *command == child) {
                let _ = sender.send(ended);
            }
            self.reaped.notify_one();
        }
        Children::LimitReached
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Children {
    None,
    Running,
    LimitReached,
}

enum Peek {
    Ended(Pid, Ended),
    Running,
    NoChild,
}

/// The next child that has ended; doesn't reap it. nix 0.31's waitid fails if a real-time signal has killed the child.
#[allow(unsafe_code)]
fn peek_ended() -> Peek {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t may be zero, and outlives the call. waitid(2) sets the fields, or leaves them zero.
    let (result, code, pid, status) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let result = libc::waitid(libc::P_ALL, 0, &raw mut info, flags);
        (result, info.si_code, info.si_pid(), info.si_status())
    };
    match (result, pid, code) {
        (0, 0, _) => Peek::Running,
        (0, _, libc::CLD_EXITED) => Peek::Ended(Pid::from_raw(pid), Ended::Exited(status as u8)),
        (0, ..) => Peek::Ended(Pid::from_raw(pid), Ended::Killed(status)),
        // ECHILD: no other error is possible with these arguments.
        _ => Peek::NoChild,
    }
}
