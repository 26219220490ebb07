//! Signals as values: held back from the first instruction on, then handed out one by one.

use nix::{
    libc,
    sys::{
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
};
use std::io;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
};

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

/// The signals sent to this process; there is always another one to come.
pub type Signals = mpsc::UnboundedReceiver<Received>;

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
    let (sender, signals) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let next = |source: &SignalFd| source.read_signal()?.ok_or(io::ErrorKind::WouldBlock.into());
        loop {
            let info = match source.async_io(Interest::READABLE, next).await {
                Ok(info) => info,
                Err(error) => {
                    tracing::error!("can't read signals, so none ends this run: {error}");
                    return;
                }
            };
            if let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) {
                let _ = sender.send(Received { signal, from_terminal: info.ssi_code == libc::SI_KERNEL });
            }
        }
    });
    Ok(signals)
}

/// The signals that are ignored, as bits; none where there is no /proc.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}

/// The next signal that asks for the end; what would only be forwarded is dropped, as there is no command.
pub async fn next_stop(signals: &mut Signals) -> Signal {
    loop {
        match signals.recv().await {
            Some(Received { signal, .. }) if is_stop(signal) => return signal,
            Some(_) => {}
            None => std::future::pending().await,
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
