//! Collects ended children, ours and, as PID 1, everybody's, without ever stealing the command's status.

use crate::verdict::Ended;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

type Watched = Arc<Mutex<Option<(Pid, oneshot::Sender<Ended>)>>>;

/// Reaps in the background for as long as the runtime is driven.
#[derive(Debug)]
pub struct Reaper {
    watched: Watched,
}

impl Reaper {
    /// Starts to listen for ended children.
    ///
    /// # Errors
    /// When the handler for `SIGCHLD` can't be installed.
    pub fn start() -> io::Result<Self> {
        let watched = Watched::default();
        let mut ended = signal(SignalKind::child())?;
        let shared = Arc::clone(&watched);
        tokio::spawn(async move {
            while ended.recv().await.is_some() {
                sweep(&shared);
            }
        });
        Ok(Self { watched })
    }

    /// Asks for the end of this child.
    ///
    /// To be called before anything is awaited after the spawn, or the child could be taken for a stranger.
    pub fn watch(&self, child: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = Some((child, sender));
        receiver
    }
}

/// Looks at each ended child without reaping it, so that the command can be told from strangers first.
fn sweep(watched: &Watched) {
    while let Some((child, ended)) = peek() {
        let mut slot = watched.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.take_if(|(command, _)| *command == child) {
            Some((_, sender)) => {
                // Before the leader is reaped its group's number can't be another's.
                let _ = killpg(child, Signal::SIGKILL);
                reap(child);
                let _ = sender.send(ended);
            }
            None => reap(child),
        }
    }
}

/// The next ended child, left as it is. libc's own call, as nix knows no real-time signals.
#[allow(unsafe_code)]
fn peek() -> Option<(Pid, Ended)> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data, for which zeroes are valid; waitid(2) leaves them there when no child has ended.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a siginfo_t that outlives the call.
    if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) } != 0 {
        return None;
    }
    // SAFETY: waitid(2) fills in these fields, or leaves the zeroes.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return None;
    }
    let ended = if info.si_code == libc::CLD_EXITED {
        Ended::Exited(status as u8)
    } else {
        Ended::Killed(status)
    };
    Some((Pid::from_raw(pid), ended))
}

#[allow(unsafe_code)]
fn reap(child: Pid) {
    // SAFETY: no status is asked for, so there is no memory to write to.
    unsafe { libc::waitpid(child.as_raw(), std::ptr::null_mut(), libc::WNOHANG) };
}
