//! Waits for the command's end, passes signals on, and asks it to stop when it has to: TERM, then KILL.

use crate::{
    clock::{duration, duration_above_zero, sleep_until_or_never},
    report::{HumanDuration, Reminder, counted},
    signals::{Received, Signals, is_stop},
    verdict::{Ended, StopReason},
};
use nix::sys::signal::Signal;
use std::{
    future::Future,
    pin::{Pin, pin},
    time::Duration,
};
use tokio::time::{Instant, sleep_until, timeout};

/// How soon what is killed is looked at again: a process may have forked in between.
const KILL_AGAIN: Duration = Duration::from_millis(5);

/// How long a killed process is waited for, which a device or a network file system may hold up.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Whom a signal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The command and what it started, as far as that is still in its group.
    Group,
    /// The command alone.
    Leader,
    /// Everything that the command has started, whatever group or session it is in.
    Left,
}

/// A process to supervise.
pub trait Process {
    /// Waits for its end. Dropping the future loses nothing.
    fn ended(&mut self) -> impl Future<Output = Ended>;
    /// Whether it is in our own process group, so that it has seen what a terminal has sent to us.
    fn shares_group(&self) -> bool;
    /// Sends a signal.
    fn signal(&self, target: Target, signal: Signal);
    /// How many processes it has left behind. Where they fork and exit faster than they are counted, it may be none.
    fn left(&self) -> usize;
    /// Kills what it has left behind; `false` when there was nobody, or nobody that may be killed.
    fn kill_left(&self) -> bool;
    /// Waits, once it has ended, until nothing is left that it has started.
    fn none_left(&mut self) -> impl Future<Output = ()>;
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
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Running")]
pub struct Limits {
    /// Stop the command after this time
    ///
    /// Send SIGTERM, and SIGKILL after --kill-after. The message is treated as after a failure, and the exit status is 124.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_TIMEOUT", value_parser = duration_above_zero)]
    pub timeout: Option<Duration>,

    /// Send SIGKILL this long after qconsume's own SIGTERM
    ///
    /// qconsume sends SIGTERM after --timeout, and when the delivery is lost. Processes that a successful command has left behind may run this long, too. For forwarded signals see --grace.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_KILL_AFTER", default_value = "10s", value_parser = duration)]
    pub kill_after: Duration,

    /// Send SIGKILL this long after a forwarded signal
    ///
    /// Without this option qconsume sends no SIGKILL; Kubernetes does, after terminationGracePeriodSeconds.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_GRACE", value_parser = duration)]
    pub grace: Option<Duration>,

    /// Stop the command, or let it finish, when its delivery is lost
    ///
    /// Another consumer may already have the message. The exit status is 75 in both cases.
    #[arg(long, hide_short_help = true, value_name = "WHAT", env = "QCONSUME_ON_LOST", value_enum, default_value_t)]
    pub on_lost: OnLost,
}

/// How supervision ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Supervised<L> {
    /// How the command ended.
    pub ended: Ended,
    /// The first of a signal and the time limit, if there was one.
    pub stop: Option<StopReason>,
    /// Why the delivery was lost, if it was.
    pub lost: Option<L>,
}

/// Supervises `process` until it has ended, and what it has started, too.
///
/// Signals, the loss of the delivery and, through tokio's clock, the time are values from outside.
pub async fn supervise<L: std::fmt::Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    lost: impl Future<Output = L>,
) -> Supervised<L> {
    let mut lost_future = pin!(lost);
    let mut lost = None;
    let mut stop = None;
    let mut time_limit = limits.timeout.map(|timeout| Instant::now() + timeout);
    // When it is killed, and the option that says so.
    let mut kill_at: Option<(Instant, &'static str)> = None;
    let mut told: Option<Reminder> = None;

    let ended = loop {
        tokio::select! {
            // Lost beats everything.
            biased;
            why = &mut lost_future, if lost.is_none() => {
                let then = match limits.on_lost {
                    OnLost::Terminate => "terminating the command",
                    OnLost::Finish => "letting the command finish",
                };
                tracing::warn!("delivery lost while the command runs: {why}; {then}");
                if limits.on_lost == OnLost::Terminate {
                    terminate(process, Target::Group, Signal::SIGTERM);
                    told.get_or_insert_default();
                    kill_at = sooner(kill_at, limits.kill_after, "--kill-after");
                }
                lost = Some(why);
            }
            Received { signal, from_terminal } = signals.recv() => {
                // It went to the terminal's whole foreground group.
                let has_it = from_terminal && process.shares_group();
                if is_stop(signal) {
                    if !has_it {
                        tracing::debug!("forwarding {signal} to the command's process group");
                        terminate(process, Target::Group, signal);
                    }
                    told.get_or_insert_default();
                    stop.get_or_insert(StopReason::Signal(signal as i32));
                    if let Some(grace) = limits.grace {
                        kill_at = sooner(kill_at, grace, "--grace");
                    }
                } else if !has_it {
                    process.signal(Target::Leader, signal);
                }
            }
            ended = process.ended() => break ended,
            () = sleep_until_or_never(kill_at.map(|(at, _)| at)) => {
                let option = kill_at.map_or("", |(_, option)| option);
                tracing::warn!("the command did not exit within {option}: sending SIGKILL to its process group");
                process.signal(Target::Group, Signal::SIGKILL);
                kill_at = None;
                told = None;
            }
            () = sleep_until_or_never(time_limit) => {
                tracing::warn!("--timeout reached: sending SIGTERM to the command");
                terminate(process, Target::Group, Signal::SIGTERM);
                told.get_or_insert_default();
                kill_at = sooner(kill_at, limits.kill_after, "--kill-after");
                time_limit = None;
                stop.get_or_insert(StopReason::TimeLimit);
            }
            since = due(&mut told) => {
                let then = match (kill_at, time_limit) {
                    (Some((at, _)), _) => format!("it is killed in {}", HumanDuration(at - Instant::now())),
                    (None, Some(at)) => format!("its time limit is in {}", HumanDuration(at - Instant::now())),
                    (None, None) => "without --grace it isn't killed".to_owned(),
                };
                tracing::info!("the command was told to stop {} ago and still runs; {then}", HumanDuration(since));
            }
        }
    };
    if ended != Ended::Exited(0) {
        // A signal to the whole group or service can end the command before we see our own copy: that is an eviction.
        stop = stop.or(signals.stopped_by().map(|signal| StopReason::Signal(signal as i32)));
    }
    let mut outcome = Supervised { ended, stop, lost };
    let failed = ended != Ended::Exited(0) || outcome.stop == Some(StopReason::TimeLimit);
    if !failed && !stops_on_loss(&outcome, limits) {
        // The command has kept its time limit, but what it has left gets no more time than that.
        let time_limit = time_limit.map(|at| (at, "--timeout"));
        let end = (Instant::now() + limits.kill_after, "--kill-after");
        let bounds = [kill_at, time_limit].into_iter().flatten();
        let end = bounds.fold(end, Ord::min);
        let_finish(process, limits, signals, lost_future, end, &mut outcome).await;
    }
    kill_left(process).await;
    outcome
}

fn stops_on_loss<L>(outcome: &Supervised<L>, limits: &Limits) -> bool {
    outcome.lost.is_some() && limits.on_lost == OnLost::Terminate
}

/// Lets what a successful command has left behind finish, until `end` at most, which an option has set.
///
/// The command's success stands: neither the time nor a signal changes it any more, only the loss of the delivery.
async fn let_finish<L: std::fmt::Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    mut lost: Pin<&mut impl Future<Output = L>>,
    mut end: (Instant, &'static str),
    outcome: &mut Supervised<L>,
) {
    let started = Instant::now();
    loop {
        tokio::select! {
            biased;
            why = &mut lost, if outcome.lost.is_none() => {
                tracing::warn!("delivery lost while processes of the command still ran: {why}");
                outcome.lost = Some(why);
                if stops_on_loss(outcome, limits) {
                    return;
                }
            }
            () = process.none_left() => return,
            Received { signal, from_terminal } = signals.recv() => {
                if !is_stop(signal) {
                    continue;
                }
                if !(from_terminal && process.shares_group()) {
                    tracing::debug!("forwarding {signal} to what the command has left behind");
                    terminate(process, Target::Left, signal);
                }
                outcome.stop.get_or_insert(StopReason::Signal(signal as i32));
                if let Some(grace) = limits.grace {
                    end = end.min((Instant::now() + grace, "--grace"));
                }
            }
            () = sleep_until(end.0) => {
                tracing::warn!(
                    "{} left by the command still there {} after it succeeded ({}): sending SIGKILL",
                    counted(process.left() as u64, "process", "processes"),
                    HumanDuration(started.elapsed()),
                    end.1
                );
                return;
            }
        }
    }
}

/// Kills whatever is left, again and again, so that one that forks meanwhile doesn't escape.
async fn kill_left(process: &mut impl Process) {
    let deadline = Instant::now() + KILL_PATIENCE;
    // Asks for an end first: mostly nothing is left, and nothing is waited for.
    let mut wait = Duration::ZERO;
    while timeout(wait, process.none_left()).await.is_err() {
        wait = KILL_AGAIN;
        if !process.kill_left() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!("{} of the command's processes are still there after a SIGKILL", process.left());
            return;
        }
    }
}

/// A stopped process sees no signal before it goes on, so it is told to, as timeout(1) does.
fn terminate(process: &impl Process, target: Target, signal: Signal) {
    process.signal(target, signal);
    process.signal(target, Signal::SIGCONT);
}

fn sooner(
    planned: Option<(Instant, &'static str)>,
    after: Duration,
    option: &'static str,
) -> Option<(Instant, &'static str)> {
    let new = (Instant::now() + after, option);
    Some(planned.map_or(new, |planned| planned.min(new)))
}

/// Waits until it is time to mention that the command hasn't stopped, if it was told to.
async fn due(told: &mut Option<Reminder>) -> Duration {
    match told {
        Some(reminder) => reminder.due().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
