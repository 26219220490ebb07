//! Signals as values: blocked from the start, then read one by one. What a stop signal does is decided in three places:
//! without a command in worker.rs (`stopped`, `settle_if_stopped_or_lost`) and publish.rs; while one runs in
//! command/supervise.rs; for its message and the run in verdict.rs (`decide`, `RunState::next`).

use nix::{
    libc,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{getpid, getsid},
};
use std::{collections::VecDeque, future::pending, io};
use tokio::io::{Interest, unix::AsyncFd};

const STOPPING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The signals that are only forwarded to the command.
const FORWARDED: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

pub fn is_stop(signal: Signal) -> bool {
    STOPPING.contains(&signal)
}

fn handled() -> SigSet {
    STOPPING.into_iter().chain(FORWARDED).collect()
}

/// Blocks the signals until [`install`]: the kernel drops a signal to PID 1 that has no handler, unless it is blocked
/// (`sig_ignored` in Linux's kernel/signal.c).
pub fn hold() -> io::Result<()> {
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked(handled())), None).map_err(io::Error::from)
}

/// With SIGXFSZ, so that write(2) fails beyond a file's size limit (ulimit -f), instead of that signal killing us.
fn blocked(mut signals: SigSet) -> SigSet {
    signals.add(Signal::SIGXFSZ);
    signals
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub signal: Signal,
    /// Whether a terminal sent it to our whole process group, as it does for a key or a new size of its window.
    pub to_our_group: bool,
}

#[derive(Debug)]
pub struct Signals {
    source: Source,
    /// Signals that [`Signals::command_started`] has read and [`Signals::recv`] has not returned yet.
    read_ahead: VecDeque<Received>,
    stopped_by: Option<Signal>,
}

#[derive(Debug)]
enum Source {
    Kernel(AsyncFd<SignalFd>),
    #[cfg(test)]
    Injected(tokio::sync::mpsc::UnboundedReceiver<Received>),
}

impl Signals {
    /// The next signal. Dropping the future loses none.
    pub async fn recv(&mut self) -> Received {
        let received = match self.read_ahead.pop_front() {
            Some(received) => received,
            None => self.source.next().await,
        };
        self.note(received);
        received
    }

    /// Reads all signals that have come, for nobody to forward. Returns the first stop signal since the start.
    pub fn read_stop(&mut self) -> Option<Signal> {
        while let Some(received) = self.read_ahead.pop_front().or_else(|| self.source.try_next()) {
            self.note(received);
        }
        self.stopped_by
    }

    /// Call this right after starting a command. It hasn't got the signals that came before, not even those to our whole
    /// group.
    pub fn command_started(&mut self) {
        while let Some(received) = self.source.try_next() {
            self.read_ahead.push_back(Received { to_our_group: false, ..received });
        }
    }

    fn note(&mut self, received: Received) {
        if is_stop(received.signal) {
            self.stopped_by.get_or_insert(received.signal);
        }
    }

    #[cfg(test)]
    pub fn injected(receiver: tokio::sync::mpsc::UnboundedReceiver<Received>) -> Self {
        Self::from(Source::Injected(receiver))
    }
}

impl From<Source> for Signals {
    fn from(source: Source) -> Self {
        Self { source, read_ahead: VecDeque::new(), stopped_by: None }
    }
}

impl Source {
    async fn next(&mut self) -> Received {
        match self {
            Self::Kernel(fd) => match fd.async_io(Interest::READABLE, read).await {
                Ok(received) => received,
                Err(error) => {
                    tracing::error!("can't read signals, so no signal can stop this run: {error}");
                    pending().await
                }
            },
            #[cfg(test)]
            Self::Injected(receiver) => match receiver.recv().await {
                Some(received) => received,
                None => pending().await,
            },
        }
    }

    fn try_next(&mut self) -> Option<Received> {
        match self {
            // Read directly: tokio asks the kernel only when no task is ready.
            Self::Kernel(fd) => read(fd.get_ref()).ok(),
            #[cfg(test)]
            Self::Injected(receiver) => receiver.try_recv().ok(),
        }
    }
}

fn read(fd: &SignalFd) -> io::Result<Received> {
    let info = fd.read_signal()?.ok_or(io::ErrorKind::WouldBlock)?;
    let signal = Signal::try_from(info.ssi_signo.cast_signed())?;
    let from_kernel = info.ssi_code == libc::SI_KERNEL;
    Ok(Received { signal, to_our_group: from_kernel && !(signal == Signal::SIGHUP && leads_session()) })
}

/// Whether we lead our session. If so, a SIGHUP of the kernel is for us alone: a terminal that hangs up tells only the
/// session's leader. Its foreground
/// group gets SIGHUP at the leader's exit (seen with Linux 6.18).
fn leads_session() -> bool {
    getsid(None) == Ok(getpid())
}

/// Starts to read signals, from a signalfd(2): unlike tokio's handlers it shows who sent them. Signals that were
/// ignored stay ignored: nohup(1) ignores HUP, and a shell without job control INT and QUIT for background jobs. Fails
/// if the system has no descriptor left.
pub fn install() -> io::Result<Signals> {
    let ignored = ignored();
    let is_ignored = |signal: Signal| ignored & 1 << (signal as u64 - 1) != 0;
    let mut taken = SigSet::empty();
    for signal in &handled() {
        if !is_ignored(signal) {
            taken.add(signal);
        }
    }
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    // Its successor `register` is unsafe, because of types whose descriptor may change. A `SignalFd`'s doesn't.
    #[allow(deprecated)]
    let source = AsyncFd::new(SignalFd::with_flags(&taken, flags)?)?;
    // Unblocks all others: if a parent has blocked SIGCHLD, we would never notice the command's end.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked(taken)), None)?;
    Ok(Source::Kernel(source).into())
}

/// The ignored signals, as bits; none if /proc is missing.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

/// The next stop signal. Others are dropped, as there is no command to forward them to.
async fn next_stop(signals: &mut Signals) -> Signal {
    loop {
        let Received { signal, .. } = signals.recv().await;
        if is_stop(signal) {
            return signal;
        }
    }
}

/// Fails with the first stop signal, at which `work` is dropped: that must lose nothing.
pub async fn unless_stopped<T>(signals: &mut Signals, work: impl Future<Output = T>) -> Result<T, Signal> {
    tokio::select! {
        biased;
        signal = next_stop(signals) => Err(signal),
        done = work => Ok(done),
    }
}
