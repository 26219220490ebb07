//! Signals as values: held back from the first instruction on, then handed out one by one.

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::signal::unix::{self, SignalKind};
use tokio_stream::Stream;

/// The signals that ask qconsume to stop.
const STOPPING: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// The signals that are only passed on to the command.
const PASSED_ON: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

/// Whether this signal asks for the end, rather than being something to pass on.
#[must_use]
pub fn is_stop(signal: Signal) -> bool {
    STOPPING.contains(&signal)
}

fn handled() -> SigSet {
    STOPPING.into_iter().chain(PASSED_ON).collect()
}

/// Holds the signals back until [`Signals::install`].
///
/// A process with the number 1 never sees a signal for which it has no handler yet; a blocked one
/// stays pending even there (`sig_ignored` in Linux's kernel/signal.c).
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn hold() -> io::Result<()> {
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&handled()), None).map_err(io::Error::from)
}

/// The signals sent to this process, as a stream that never ends.
#[derive(Debug)]
pub struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// Installs the handlers and lets through what [`hold`] has held back.
    ///
    /// `SIGHUP` stays ignored where it was when the process started: that is what nohup(1) asks for.
    ///
    /// # Errors
    /// When a handler can't be installed.
    pub fn install() -> io::Result<Self> {
        let mut streams = Vec::with_capacity(STOPPING.len() + PASSED_ON.len());
        for signal in STOPPING.into_iter().chain(PASSED_ON) {
            if signal == Signal::SIGHUP && is_ignored(signal) {
                continue;
            }
            let kind = SignalKind::from_raw(signal as i32);
            streams.push((signal, unix::signal(kind)?));
        }
        // All of them: a parent may have left more blocked, and without SIGCHLD the command would never end for us.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        Ok(Self(streams))
    }
}

impl Stream for Signals {
    type Item = Signal;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Signal>> {
        for (signal, stream) in &mut self.0 {
            if stream.poll_recv(cx).is_ready() {
                return Poll::Ready(Some(*signal));
            }
        }
        Poll::Pending
    }
}

#[allow(unsafe_code)]
fn is_ignored(signal: Signal) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only reads the disposition, into memory that is large enough for it.
    unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The next signal that asks for the end; what would only be passed on is dropped, as there is no command.
pub async fn next_stop(signals: &mut (impl Stream<Item = Signal> + Unpin)) -> Signal {
    use tokio_stream::StreamExt;
    loop {
        match signals.next().await {
            Some(signal) if is_stop(signal) => return signal,
            Some(_) => {}
            None => std::future::pending::<()>().await,
        }
    }
}
