//! Signals as values: held back from the first instruction on, then handed out one by one.

use nix::{
    libc,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
};
use std::{collections::VecDeque, future::pending, io};
use tokio::io::{Interest, unix::AsyncFd};

/// The signals that ask qconsume to stop.
const STOPPING: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];

/// The signals that are only forwarded to the command.
const FORWARDED: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

/// Whether this signal asks for the end, rather than being something to forward.
pub fn is_stop(signal: Signal) -> bool {
    STOPPING.contains(&signal)
}

fn handled() -> SigSet {
    STOPPING.into_iter().chain(FORWARDED).collect()
}

/// Holds the signals back until [`install`].
///
/// A process with the number 1 never sees a signal for which it has no handler yet; a blocked one
/// stays pending even there (`sig_ignored` in Linux's kernel/signal.c).
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn hold() -> io::Result<()> {
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&handled()), None).map_err(io::Error::from)
}

/// A signal that was sent to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Which one.
    pub signal: Signal,
    /// Whether the kernel sent it, as for a key pressed on a terminal: then all of the foreground group has it.
    pub from_terminal: bool,
}

/// The signals sent to this process.
#[derive(Debug)]
pub struct Signals {
    source: Source,
    /// Read before anybody asked for the next one.
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

    /// The first signal that asked for the end, whenever it came; what only now waits to be read counts, too.
    pub fn stopped_by(&mut self) -> Option<Signal> {
        while let Some(received) = self.read_ahead.pop_front().or_else(|| self.source.pending()) {
            self.note(received);
        }
        self.stopped_by
    }

    /// To be called when a command was started: a signal that waits to be read may have come before the command was there,
    /// so the command doesn't have it, even if a terminal sent it to our whole process group.
    pub fn command_started(&mut self) {
        while let Some(received) = self.source.pending() {
            self.read_ahead.push_back(Received { from_terminal: false, ..received });
        }
    }

    fn note(&mut self, received: Received) {
        if is_stop(received.signal) {
            self.stopped_by.get_or_insert(received.signal);
        }
    }

    /// Signals that a test sends.
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
                    tracing::error!("can't read signals, so none ends this run: {error}");
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

    /// One that needs no waiting.
    fn pending(&mut self) -> Option<Received> {
        match self {
            // Not through tokio, which asks the kernel only when nothing else is left to do.
            Self::Kernel(fd) => read(fd.get_ref()).ok(),
            #[cfg(test)]
            Self::Injected(receiver) => receiver.try_recv().ok(),
        }
    }
}

fn read(fd: &SignalFd) -> io::Result<Received> {
    let info = fd.read_signal()?.ok_or(io::ErrorKind::WouldBlock)?;
    let signal = Signal::try_from(info.ssi_signo.cast_signed())?;
    Ok(Received { signal, from_terminal: info.ssi_code == libc::SI_KERNEL })
}

/// Begins to hand out signals, with what [`hold`] has held back.
///
/// They stay blocked and are read from a signalfd(2), which tells, unlike a handler of tokio's, who sent them. What was
/// ignored when the process started stays ignored: nohup(1) asks for that with HUP, a shell without job control with
/// INT and QUIT for what it starts in the background.
///
/// # Errors
/// When the system has no descriptor left.
pub fn install() -> io::Result<Signals> {
    let ignored = ignored();
    let mut taken = SigSet::empty();
    for signal in &handled() {
        if ignored & 1 << (signal as u64 - 1) == 0 {
            taken.add(signal);
        }
    }
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    // Its successor `register` is unsafe, for types that may hand out another descriptor; a `SignalFd` owns its one.
    #[allow(deprecated)]
    let source = AsyncFd::new(SignalFd::with_flags(&taken, flags)?)?;
    // A file that would grow over its limit (ulimit -f) is an error of write(2) then, instead of the end.
    let mut blocked = taken;
    blocked.add(Signal::SIGXFSZ);
    // No others: a parent may have left more blocked, and without SIGCHLD the command would never end for us.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None)?;
    Ok(Source::Kernel(source).into())
}

/// The signals that are ignored, as bits; none where there is no /proc.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

/// The next signal that asks for the end. A signal that would only be forwarded is dropped, as there is no command.
pub async fn next_stop(signals: &mut Signals) -> Signal {
    loop {
        let Received { signal, .. } = signals.recv().await;
        if is_stop(signal) {
            return signal;
        }
    }
}

/// Runs `work`, and drops it at the first signal that asks for the end, so `work` must lose nothing when it is dropped.
///
/// # Errors
/// The signal.
pub async fn unless_stopped<T>(signals: &mut Signals, work: impl Future<Output = T>) -> Result<T, Signal> {
    tokio::select! {
        biased;
        signal = next_stop(signals) => Err(signal),
        done = work => Ok(done),
    }
}
