//! Signals as values: blocked from the start, then read one by one.
//!
//! What a stop signal does is decided in three places:
//! - no command runs: src/worker.rs (`stopped`, `end_if_stopped_or_lost`); in qpublish src/publish.rs
//! - the command runs: src/command/supervise.rs
//! - the command has ended: src/verdict.rs. `decide` is for its message, `RunState::next` for the run: src/worker.rs
//!   asks the latter before and after the settlement (`settle`), and acts on the answer (`go_on`).

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

const STOP_SIGNALS: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The command gets these, too, but they stop nothing.
const OTHER_SIGNALS: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

pub fn is_stop(signal: Signal) -> bool {
    STOP_SIGNALS.contains(&signal)
}

fn handled() -> impl Iterator<Item = Signal> {
    STOP_SIGNALS.into_iter().chain(OTHER_SIGNALS)
}

/// Keeps signals pending until [`install`]. Without this, a signal kills us, or is lost if we are PID 1
/// (kernel/signal.c: sig_ignored).
pub fn block() {
    let blocked = block_as(SigmaskHow::SIG_BLOCK, handled().collect());
    debug_assert!(blocked.is_ok(), "sigprocmask(2) fails only for invalid arguments");
}

/// Also blocks SIGXFSZ: otherwise a write beyond a file's size limit (ulimit -f) would kill us instead of failing.
fn block_as(how: SigmaskHow, mut signals: SigSet) -> io::Result<()> {
    signals.add(Signal::SIGXFSZ);
    Ok(sigprocmask(how, Some(&signals), None)?)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    pub signal: Signal,
    /// A terminal sent it to our whole process group, as for Ctrl-C or when the size of its window changes.
    pub to_our_group: bool,
}

#[derive(Debug)]
pub struct Signals {
    source: Source,
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

    /// The first stop signal since qconsume started, if one has come; doesn't wait. Call it only while no command runs:
    /// it drops all pending signals, so none is forwarded.
    pub fn stopped_by(&mut self) -> Option<Signal> {
        self.drop_pending();
        self.stopped_by
    }

    /// [`Signals::recv`] then returns only signals that come later. Call this only while no command runs.
    pub fn drop_pending(&mut self) {
        while let Some(received) = self.read_ahead.pop_front().or_else(|| self.source.try_next()) {
            self.note(received);
        }
    }

    /// Call this right after the command's start: signals that came earlier are to be forwarded, even those to our
    /// whole group. The command gets such a signal twice if it came during the start.
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

    async fn next_stop(&mut self) -> Signal {
        loop {
            let Received { signal, .. } = self.recv().await;
            if is_stop(signal) {
                return signal;
            }
        }
    }

    #[cfg(test)]
    pub fn injected(receiver: tokio::sync::mpsc::UnboundedReceiver<Received>) -> Self {
        Self::from(Source::Injected(receiver))
    }
}

/// A stop signal drops `work`: that must lose nothing. Other signals are dropped, so call this only while no command
/// runs.
pub async fn unless_stopped<T>(signals: &mut Signals, work: impl Future<Output = T>) -> Result<T, Signal> {
    tokio::select! {
        biased;
        signal = signals.next_stop() => Err(signal),
        done = work => Ok(done),
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
    let from_terminal = info.ssi_code == libc::SI_KERNEL;
    // A terminal that hangs up tells only the session's leader. Its foreground group gets SIGHUP when the leader exits
    // (seen with Linux 6.18).
    let to_us_alone = signal == Signal::SIGHUP && getsid(None) == Ok(getpid());
    Ok(Received { signal, to_our_group: from_terminal && !to_us_alone })
}

/// Reads signals from a signalfd(2): unlike tokio's handlers it shows who sent them. Fails if no descriptor is left.
pub fn install() -> io::Result<Signals> {
    let signals = not_ignored();
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    // Its successor `register` is unsafe, because of types whose descriptor may change. A `SignalFd`'s doesn't.
    #[allow(deprecated)]
    let source = AsyncFd::new(SignalFd::with_flags(&signals, flags)?)?;
    // Unblocks all others: if a parent has blocked SIGCHLD, we would never notice the command's end.
    block_as(SigmaskHow::SIG_SETMASK, signals)?;
    Ok(Source::Kernel(source).into())
}

/// What was ignored at our start stays ignored: nohup(1) ignores HUP, and a shell without job control INT and QUIT for
/// background jobs. Without /proc, nothing counts as ignored.
fn not_ignored() -> SigSet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default();
    handled().filter(|signal| ignored & 1 << (*signal as u64 - 1) == 0).collect()
}
