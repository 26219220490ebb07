//! Collects ended children, ours and orphans, without ever stealing the command's status.

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

/// How many are reaped before others get a turn, within about a millisecond: where they fork faster than they are reaped,
/// there is no end.
const SWEEP: usize = 100;

/// Reaps in the background for as long as the runtime is driven.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    state: Arc<Mutex<State>>,
    /// A child has ended.
    reaped: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    watched: Option<(Pid, oneshot::Sender<Ended>)>,
}

impl Reaper {
    /// Starts to listen for ended children, and makes every orphan of the command's a child of ours.
    ///
    /// # Errors
    /// When the handler for `SIGCHLD` can't be installed.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut ended = signal(SignalKind::child())?;
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::warn!(
                "what the command leaves behind won't be waited for: the system refuses PR_SET_CHILD_SUBREAPER: {}",
                error.desc()
            );
        }
        let background = reaper.clone();
        tokio::spawn(async move {
            while ended.recv().await.is_some() {
                while background.sweep() == Children::MoreEnded {
                    yield_now().await;
                }
            }
        });
        Ok(reaper)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the end of this child.
    ///
    /// To be called before anything is awaited after the spawn, or the child could be taken for an orphan.
    pub(super) fn watch(&self, child: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        self.state().watched = Some((child, sender));
        receiver
    }

    /// Waits until a child may have ended since the last call.
    pub(super) async fn reaped(&self) {
        self.reaped.notified().await;
    }

    /// Reaps whoever has ended, up to [`SWEEP`] of them; says who is left.
    ///
    /// Looks at each ended child without reaping it, so that the command can be told from orphans first.
    pub(super) fn sweep(&self) -> Children {
        for _ in 0..SWEEP {
            let (child, ended) = match peek() {
                Peek::Ended(child, ended) => (child, ended),
                Peek::Running => return Children::Running,
                Peek::NoChild => return Children::None,
            };
            // The status is known already, and nix can't name a real-time signal: an error is none.
            let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
            let mut state = self.state();
            if let Some((_, sender)) = state.watched.take_if(|(command, _)| *command == child) {
                let _ = sender.send(ended);
            }
            self.reaped.notify_one();
        }
        Children::MoreEnded
    }
}

/// The children that are left after a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Children {
    /// There is none.
    None,
    /// There are some, none of which has ended yet.
    Running,
    /// There may be some who have ended: there were too many for one sweep.
    MoreEnded,
}

enum Peek {
    Ended(Pid, Ended),
    Running,
    NoChild,
}

/// The next ended child, left as it is. libc's own call, as nix knows no real-time signals.
#[allow(unsafe_code)]
fn peek() -> Peek {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data, for which zeroes are valid, and it outlives the call; waitid(2) fills in the fields
    // that are read, or leaves the zeroes when no child has ended.
    let (result, code, pid, status) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let result = libc::waitid(libc::P_ALL, 0, &raw mut info, flags);
        (result, info.si_code, info.si_pid(), info.si_status())
    };
    match (result, pid, code) {
        (0, 0, _) => Peek::Running,
        (0, _, libc::CLD_EXITED) => Peek::Ended(Pid::from_raw(pid), Ended::Exited(status as u8)),
        (0, ..) => Peek::Ended(Pid::from_raw(pid), Ended::Killed(status)),
        // ECHILD; nothing else can be wrong with these arguments.
        _ => Peek::NoChild,
    }
}
