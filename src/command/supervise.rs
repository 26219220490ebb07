//! Waits for the command's end, forwards signals, and stops the command if need be: SIGTERM, then SIGKILL.

use crate::{
    clock::{duration, duration_above_zero, or_never, sleep_until_or_never},
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

/// How soon to look for survivors after a SIGKILL: a process may have forked just before.
const KILL_AGAIN: Duration = Duration::from_millis(5);

/// How long to wait for killed processes: a device or a network file system may hold them up.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Group,
    Leader,
    /// Everything that the command has started, in any group and session.
    Descendants,
    /// What the command has started, except those processes that are in our own process group now.
    DescendantsElsewhere,
}

pub trait Process {
    /// Dropping the future loses nothing.
    fn ended(&mut self) -> impl Future<Output = Ended>;
    /// Whether it is in our own process group now, and so gets what is sent to that group. It may leave the group at any
    /// time, as timeout(1) does.
    fn shares_group(&self) -> bool;
    fn signal(&self, target: Target, signal: Signal);
    /// Counts the processes that it has left behind. It may miss some that fork and exit faster than it counts.
    fn count_descendants(&self) -> usize;
    /// Kills what it has left behind. `false` if there is nothing, or nothing that we may kill.
    fn kill_descendants(&self) -> bool;
    /// Waits, after its own end, until everything that it has started has ended.
    fn descendants_ended(&mut self) -> impl Future<Output = ()>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnLost {
    /// send SIGTERM, and SIGKILL after --kill-after
    #[default]
    Terminate,
    /// let it finish
    Finish,
}

/// The time limits of the command.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Running")]
pub struct Limits {
    /// Stop the command after this time
    ///
    /// Send SIGTERM, then SIGKILL after --kill-after. This counts as a failure, and the exit status is 124.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_TIMEOUT", value_parser = duration_above_zero)]
    pub timeout: Option<Duration>,

    /// Send SIGKILL this long after qconsume's own SIGTERM
    ///
    /// qconsume sends SIGTERM after --timeout and when the delivery is lost. Processes left behind by a successful command also have this time before SIGKILL. For forwarded signals, see --grace.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_KILL_AFTER", default_value = "10s", value_parser = duration)]
    pub kill_after: Duration,

    /// Send SIGKILL this long after a forwarded signal
    ///
    /// Without this option, qconsume sends no SIGKILL. Kubernetes does after terminationGracePeriodSeconds.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_GRACE", value_parser = duration)]
    pub grace: Option<Duration>,

    /// Stop the command, or let it finish, when its delivery is lost
    ///
    /// Another consumer may already have the message. The exit status is 75 in both cases.
    #[arg(long, hide_short_help = true, value_name = "WHAT", env = "QCONSUME_ON_LOST", value_enum, default_value_t)]
    pub on_lost: OnLost,
}

/// Waits until `process` and everything that it has started have ended. `lost_future` ends when the delivery is lost.
/// Returns how it ended, the first reason to stop it that came before its end, and why the delivery was lost.
pub async fn supervise<L: std::fmt::Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    lost_future: impl Future<Output = L>,
) -> (Ended, Option<StopReason>, Option<L>) {
    let mut lost_future = pin!(lost_future);
    let mut lost = None;
    let mut stop = None;
    let mut time_limit = limits.timeout.map(|timeout| Instant::now() + timeout);
    // When to send SIGKILL, and the option that says so.
    let mut kill_at: Option<(Instant, &'static str)> = None;
    let mut stop_reminder: Option<Reminder> = None;
    let mut is_killed = false;

    let ended = loop {
        tokio::select! {
            // The loss of the delivery beats everything, so it is checked first.
            biased;
            why = &mut lost_future, if lost.is_none() => {
                let then = match limits.on_lost {
                    OnLost::Terminate => "terminating the command",
                    OnLost::Finish => "letting the command finish",
                };
                tracing::warn!("delivery lost while the command runs: {why}; {then}");
                if limits.on_lost == OnLost::Terminate {
                    terminate(process, Target::Group, Signal::SIGTERM);
                    stop_reminder.get_or_insert_default();
                    kill_at = sooner(kill_at, limits.kill_after, "--kill-after");
                }
                lost = Some(why);
            }
            // Before the signals: one that comes after the command's end is for what it has left behind.
            ended = process.ended() => break ended,
            Received { signal, to_our_group } = signals.recv() => {
                let already_received = to_our_group && process.shares_group();
                if is_stop(signal) {
                    if !already_received {
                        tracing::debug!("forwarding {signal} to the command's process group");
                        terminate(process, Target::Group, signal);
                    }
                    stop_reminder.get_or_insert_default();
                    stop.get_or_insert(StopReason::Signal(signal as i32));
                    if let Some(grace) = limits.grace {
                        kill_at = sooner(kill_at, grace, "--grace");
                    }
                } else if !already_received {
                    process.signal(Target::Leader, signal);
                }
            }
            () = sleep_until_or_never(kill_at.map(|(at, _)| at)) => {
                let option = kill_at.map_or("", |(_, option)| option);
                tracing::warn!("the command did not exit within {option}: sending SIGKILL to its process group");
                process.signal(Target::Group, Signal::SIGKILL);
                kill_at = None;
                is_killed = true;
                stop_reminder = Some(Reminder::default());
            }
            () = sleep_until_or_never(time_limit) => {
                tracing::warn!("--timeout reached: sending SIGTERM to the command");
                terminate(process, Target::Group, Signal::SIGTERM);
                stop_reminder.get_or_insert_default();
                kill_at = sooner(kill_at, limits.kill_after, "--kill-after");
                time_limit = None;
                stop.get_or_insert(StopReason::TimeLimit);
            }
            since = or_never(stop_reminder.as_mut().map(Reminder::due)) => {
                if is_killed {
                    tracing::warn!(
                        "the command still runs {} after SIGKILL; a device or a network file system may hold it up",
                        HumanDuration(since)
                    );
                    continue;
                }
                let then = match (kill_at, time_limit) {
                    (Some((at, _)), _) => format!("it is killed in {}", HumanDuration(at - Instant::now())),
                    (None, Some(at)) => format!("its time limit ends in {}", HumanDuration(at - Instant::now())),
                    (None, None) => "without --grace it isn't killed".to_owned(),
                };
                tracing::info!("the command was told to stop {} ago and still runs; {then}", HumanDuration(since));
            }
        }
    };
    if ended != Ended::Exited(0) {
        // A signal to the whole group can end the command before we see our own copy: that is an eviction, too.
        stop = stop.or(signals.stopped_by().map(|signal| StopReason::Signal(signal as i32)));
    }
    let succeeded = ended == Ended::Exited(0) && stop != Some(StopReason::TimeLimit);
    if succeeded && (lost.is_none() || limits.on_lost == OnLost::Finish) {
        // Processes it left behind share the command's time limit.
        let time_limit = time_limit.map(|at| (at, "--timeout"));
        let kill_after = (Instant::now() + limits.kill_after, "--kill-after");
        let deadline = [kill_at, time_limit].into_iter().flatten().fold(kill_after, Ord::min);
        let_finish(process, limits, signals, lost_future, deadline, &mut lost).await;
    }
    kill_all_descendants(process).await;
    (ended, stop, lost)
}

/// Waits for what a successful command left behind, until the deadline. Only a lost delivery changes the success: it is
/// set in `lost`. A stop signal came too late for the command, and is forwarded to what it left behind.
async fn let_finish<L: std::fmt::Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    mut lost_future: Pin<&mut impl Future<Output = L>>,
    mut deadline: (Instant, &'static str),
    lost: &mut Option<L>,
) {
    let started = Instant::now();
    loop {
        tokio::select! {
            biased;
            why = &mut lost_future, if lost.is_none() => {
                tracing::warn!("delivery lost while processes of the command still ran: {why}");
                *lost = Some(why);
                if limits.on_lost == OnLost::Terminate {
                    return;
                }
            }
            () = process.descendants_ended() => return,
            Received { signal, to_our_group } = signals.recv() => {
                if !is_stop(signal) {
                    continue;
                }
                if to_our_group {
                    tracing::debug!("forwarding {signal} to what the command left behind in other process groups");
                    terminate(process, Target::DescendantsElsewhere, signal);
                } else {
                    tracing::debug!("forwarding {signal} to the processes that the command left behind");
                    terminate(process, Target::Descendants, signal);
                }
                if let Some(grace) = limits.grace {
                    deadline = deadline.min((Instant::now() + grace, "--grace"));
                }
            }
            () = sleep_until(deadline.0) => {
                tracing::warn!(
                    "{} still running {} after it succeeded ({}): sending SIGKILL",
                    counted(
                        process.count_descendants() as u64,
                        "process left by the command is",
                        "processes left by the command are"
                    ),
                    HumanDuration(started.elapsed()),
                    deadline.1
                );
                return;
            }
        }
    }
}

/// Kills again and again, as a process may have forked just before.
async fn kill_all_descendants(process: &mut impl Process) {
    let deadline = Instant::now() + KILL_PATIENCE;
    // Usually everything has ended already, so nothing needs to wait.
    let mut wait = Duration::ZERO;
    while timeout(wait, process.descendants_ended()).await.is_err() {
        wait = KILL_AGAIN;
        if !process.kill_descendants() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!(
                "{} of the command's processes are still there after a SIGKILL",
                process.count_descendants()
            );
            return;
        }
    }
}

/// With SIGCONT, as timeout(1) does: a process that SIGSTOP has stopped handles the signal only after that.
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

#[cfg(test)]
mod tests;
