//! Waits for the command's end, passes signals on, and asks it to stop when it has to: TERM, then KILL.

use crate::{
    report::{FIRST_MENTION, Patience, Span},
    signals::is_stop,
    verdict::{Ended, StopReason},
};
use nix::sys::signal::Signal;
use std::{future::Future, pin::pin, time::Duration};
use tokio::time::{Instant, sleep_until};
use tokio_stream::{Stream, StreamExt};

/// Whom a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The command and what it started, as far as that is still in its group.
    Group,
    /// The command alone.
    Leader,
}

/// A process to supervise.
pub trait Process {
    /// Waits for its end. Dropping the future loses nothing.
    fn ended(&mut self) -> impl Future<Output = Ended>;
    /// Sends a signal.
    fn signal(&self, target: Target, signal: Signal);
}

/// What becomes of the command when its delivery is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnLost {
    /// send SIGTERM, and SIGKILL after --kill-after
    #[default]
    Terminate,
    /// let it finish
    Finish,
}

/// How long the command may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// `--timeout`: from its start.
    pub timeout: Option<Duration>,
    /// `--kill-after`: from a TERM of qconsume's own to the KILL.
    pub kill_after: Duration,
    /// `--grace`: from a forwarded signal to the KILL; without it the platform's own KILL ends it.
    pub grace: Option<Duration>,
    /// `--on-lost`
    pub on_lost: OnLost,
}

/// How it went.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome<L> {
    /// How the command ended.
    pub ended: Ended,
    /// The first of a signal and the time limit, if there was one.
    pub stop: Option<StopReason>,
    /// Why the delivery was lost, if it was.
    pub lost: Option<L>,
}

/// Supervises `process` until it has ended.
///
/// Signals, the loss of the delivery and, through tokio's clock, the time are values from outside.
pub async fn supervise<L: std::fmt::Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut (impl Stream<Item = Signal> + Unpin),
    lost: impl Future<Output = L>,
) -> Outcome<L> {
    let mut lost_future = pin!(lost);
    let mut lost = None;
    let mut stop = None;
    let mut time_limit = limits.timeout.map(|timeout| Instant::now() + timeout);
    let mut kill_at: Option<Instant> = None;
    let mut told: Option<Patience> = None;

    loop {
        tokio::select! {
            // Lost beats everything. A signal goes before the command's end: who signals a whole group or
            // a whole service ends both at once, and that is no failure of the command.
            biased;
            why = &mut lost_future, if lost.is_none() => {
                match limits.on_lost {
                    OnLost::Terminate => {
                        tracing::warn!("delivery lost while the command runs: {why}; terminating the command");
                        terminate(process, Signal::SIGTERM);
                        told.get_or_insert_with(patience);
                        kill_at = sooner(kill_at, limits.kill_after);
                    }
                    OnLost::Finish => {
                        tracing::warn!("delivery lost while the command runs: {why}; letting the command finish");
                    }
                }
                lost = Some(why);
            }
            Some(signal) = signals.next() => {
                if is_stop(signal) {
                    tracing::debug!("passing {signal} on to the command's process group");
                    terminate(process, signal);
                    told.get_or_insert_with(patience);
                    if stop.is_none() {
                        stop = Some(StopReason::Signal(signal as i32));
                    }
                    if let Some(grace) = limits.grace {
                        kill_at = sooner(kill_at, grace);
                    }
                } else {
                    process.signal(Target::Leader, signal);
                }
            }
            ended = process.ended() => return Outcome { ended, stop, lost },
            () = at(kill_at) => {
                tracing::warn!("the command has not ended on its signal: killing it and its process group");
                process.signal(Target::Group, Signal::SIGKILL);
                kill_at = None;
                told = None;
            }
            () = at(time_limit) => {
                tracing::warn!("the command has reached its time limit: terminating it");
                terminate(process, Signal::SIGTERM);
                told.get_or_insert_with(patience);
                kill_at = sooner(kill_at, limits.kill_after);
                time_limit = None;
                stop.get_or_insert(StopReason::TimeLimit);
            }
            since = due(&mut told) => {
                let then = match (kill_at, time_limit) {
                    (Some(at), _) => format!("it is killed in {}", Span(at - Instant::now())),
                    (None, Some(at)) => format!("its time limit is in {}", Span(at - Instant::now())),
                    (None, None) => "without --grace it isn't killed".to_owned(),
                };
                tracing::info!("the command was told to stop {} ago and still runs; {then}", Span(since));
            }
        }
    }
}

/// A stopped process sees no signal before it goes on, so it is told to, as timeout(1) does.
fn terminate(process: &impl Process, signal: Signal) {
    process.signal(Target::Group, signal);
    process.signal(Target::Group, Signal::SIGCONT);
}

fn patience() -> Patience {
    Patience::new(FIRST_MENTION)
}

fn sooner(planned: Option<Instant>, after: Duration) -> Option<Instant> {
    let new = Instant::now() + after;
    Some(planned.map_or(new, |planned| planned.min(new)))
}

/// Waits until it is time to mention that the command hasn't stopped, if it was told to.
async fn due(told: &mut Option<Patience>) -> Duration {
    match told {
        Some(patience) => patience.due().await,
        None => std::future::pending().await,
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
