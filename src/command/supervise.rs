//! Waits for the command's end, forwards signals, and stops the command if need be: SIGTERM, then SIGKILL.
//!
//! When the command has ended, the processes that it left behind are killed. Only after a success they may finish,
//! until the first of --kill-after, --timeout and --grace has passed.

use crate::{
    clock::{duration, duration_above_zero, or_never, sleep_until_or_never},
    report::{HumanDuration, Reminder, counted},
    signals::{Received, Signals, is_stop},
    verdict::{Ended, StopReason},
};
use nix::sys::signal::Signal;
use std::{
    fmt::Display,
    future::Future,
    pin::{Pin, pin},
    time::Duration,
};
use tokio::time::{Instant, sleep_until, timeout};

/// The pause between two SIGKILLs: a process may have forked just before the first.
const KILL_AGAIN: Duration = Duration::from_millis(5);

/// How long to wait for killed processes: a device or a network file system may hold them up.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Command,
    CommandGroup,
    LeftBehind,
    /// The same without those that are in our own process group now.
    LeftBehindElsewhere,
}

pub trait Process {
    /// Dropping the future loses nothing.
    fn ended(&mut self) -> impl Future<Output = Ended>;
    /// Whether the command is in our own process group now. It may leave it at any time, as timeout(1) does.
    fn shares_group(&self) -> bool;
    fn signal(&self, target: Target, signal: Signal);
    /// May miss processes that fork and exit faster than it counts.
    fn count_left_behind(&self) -> usize;
    /// `false` if there is nothing to kill, or nothing that we may kill.
    fn kill_left_behind(&self) -> bool;
    fn left_behind_ended(&mut self) -> impl Future<Output = ()>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnLost {
    /// send SIGTERM, and SIGKILL after --kill-after
    #[default]
    Terminate,
    /// let it finish
    Finish,
}

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
    /// qconsume sends SIGTERM after --timeout and when the delivery is lost. Processes left behind by a successful command have this time, too, unless --timeout or --grace ends before. For forwarded signals, see --grace.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_KILL_AFTER", default_value = "10s", value_parser = duration)]
    pub kill_after: Duration,

    /// Send SIGKILL this long after a forwarded signal
    ///
    /// Without this option, qconsume sends no SIGKILL after a forwarded signal. Kubernetes does after
    /// terminationGracePeriodSeconds.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_GRACE", value_parser = duration)]
    pub grace: Option<Duration>,

    /// Stop the command, or let it finish, when its delivery is lost
    ///
    /// Another consumer may already have the message. The exit status is 75 in both cases.
    #[arg(long, hide_short_help = true, value_name = "WHAT", env = "QCONSUME_ON_LOST", value_enum, default_value_t)]
    pub on_lost: OnLost,
}

/// When to send SIGKILL, and the option that says so.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Deadline {
    at: Instant,
    option: &'static str,
}

impl Deadline {
    fn after(time: Duration, option: &'static str) -> Self {
        Self { at: Instant::now() + time, option }
    }

    async fn passed(self) -> &'static str {
        sleep_until(self.at).await;
        self.option
    }
}

/// Waits for the command, then for the processes that it left behind (see the top of this file).
///
/// Returns how the command ended, whether a signal or the time limit was the first to stop it, and why the delivery was
/// lost, which is the result of `lost_future`.
pub async fn supervise<L: Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    lost_future: impl Future<Output = L>,
) -> (Ended, Option<StopReason>, Option<L>) {
    let mut lost_future = pin!(lost_future);
    let mut lost = None;
    let mut supervisor = Supervisor::new(process, limits);
    let ended = loop {
        tokio::select! {
            // If several are ready, the first one counts. The loss of the delivery beats everything. The end comes
            // before the signals, as a signal after the end is for the processes left behind.
            biased;
            why = &mut lost_future, if lost.is_none() => {
                supervisor.lost(&why);
                lost = Some(why);
            }
            ended = supervisor.process.ended() => break ended,
            received = signals.recv() => supervisor.received(received),
            option = or_never(supervisor.kill_at.map(Deadline::passed)) => supervisor.kill(option),
            () = sleep_until_or_never(supervisor.time_limit) => supervisor.time_limit_reached(),
            since = or_never(supervisor.stop_reminder.as_mut().map(Reminder::due)) => supervisor.remind(since),
        }
    };
    let Supervisor { mut stop, kill_at, time_limit, .. } = supervisor;
    if ended != Ended::Exited(0) {
        // A signal to the whole group can end the command before we see our own copy: that is an eviction, too.
        stop = stop.or(signals.stopped_by().map(|signal| StopReason::Signal(signal as i32)));
    }
    let succeeded = ended == Ended::Exited(0) && stop != Some(StopReason::TimeLimit);
    if succeeded && (lost.is_none() || limits.on_lost == OnLost::Finish) {
        let time_limit = time_limit.map(|at| Deadline { at, option: "--timeout" });
        let kill_after = Deadline::after(limits.kill_after, "--kill-after");
        let deadline = [kill_at, time_limit].into_iter().flatten().fold(kill_after, Ord::min);
        let_finish(process, limits, signals, lost_future, deadline, &mut lost).await;
    }
    kill_all_left_behind(process).await;
    (ended, stop, lost)
}

struct Supervisor<'a, P> {
    process: &'a mut P,
    limits: &'a Limits,
    stop: Option<StopReason>,
    time_limit: Option<Instant>,
    kill_at: Option<Deadline>,
    is_killed: bool,
    stop_reminder: Option<Reminder>,
}

impl<'a, P: Process> Supervisor<'a, P> {
    fn new(process: &'a mut P, limits: &'a Limits) -> Self {
        let time_limit = limits.timeout.map(|timeout| Instant::now() + timeout);
        Self { process, limits, stop: None, time_limit, kill_at: None, is_killed: false, stop_reminder: None }
    }

    fn lost(&mut self, why: &impl Display) {
        let then = match self.limits.on_lost {
            OnLost::Terminate => "terminating the command",
            OnLost::Finish => "letting the command finish",
        };
        tracing::warn!("delivery lost while the command runs: {why}; {then}");
        if self.limits.on_lost == OnLost::Terminate {
            self.terminate();
        }
    }

    fn received(&mut self, Received { signal, to_our_group }: Received) {
        let has_it_already = to_our_group && self.process.shares_group();
        if !is_stop(signal) {
            if !has_it_already {
                self.process.signal(Target::Command, signal);
            }
            return;
        }
        if !has_it_already {
            tracing::debug!("forwarding {signal} to the command's process group");
            signal_to_stop(self.process, Target::CommandGroup, signal);
        }
        self.stop_reminder.get_or_insert_default();
        self.stop.get_or_insert(StopReason::Signal(signal as i32));
        if let Some(grace) = self.limits.grace {
            self.plan_kill(grace, "--grace");
        }
    }

    fn time_limit_reached(&mut self) {
        tracing::warn!("--timeout reached: sending SIGTERM to the command");
        self.time_limit = None;
        self.stop.get_or_insert(StopReason::TimeLimit);
        self.terminate();
    }

    fn terminate(&mut self) {
        signal_to_stop(self.process, Target::CommandGroup, Signal::SIGTERM);
        self.stop_reminder.get_or_insert_default();
        self.plan_kill(self.limits.kill_after, "--kill-after");
    }

    fn plan_kill(&mut self, time: Duration, option: &'static str) {
        let new = Deadline::after(time, option);
        self.kill_at = Some(self.kill_at.map_or(new, |planned| planned.min(new)));
    }

    fn kill(&mut self, option: &str) {
        tracing::warn!("the command did not exit within {option}: sending SIGKILL to its process group");
        self.process.signal(Target::CommandGroup, Signal::SIGKILL);
        self.kill_at = None;
        self.is_killed = true;
        self.stop_reminder = Some(Reminder::default());
    }

    fn remind(&self, since: Duration) {
        let since = HumanDuration(since);
        if self.is_killed {
            tracing::warn!(
                "the command still runs {since} after SIGKILL; a device or a network file system may hold it up"
            );
            return;
        }
        let left = |at: Instant| HumanDuration(at - Instant::now());
        let then = match (self.kill_at, self.time_limit) {
            (Some(deadline), _) => format!("it is killed in {}", left(deadline.at)),
            (None, Some(at)) => format!("its time limit ends in {}", left(at)),
            (None, None) => "without --grace it isn't killed".to_owned(),
        };
        tracing::info!("the command was told to stop {since} ago and still runs; {then}");
    }
}

/// Waits for the processes that a successful command left behind, until the deadline. A stop signal is only forwarded
/// to them: it comes too late to change the result. A lost delivery changes it, and is put into `lost`.
async fn let_finish<L: Display>(
    process: &mut impl Process,
    limits: &Limits,
    signals: &mut Signals,
    mut lost_future: Pin<&mut impl Future<Output = L>>,
    mut deadline: Deadline,
    lost: &mut Option<L>,
) {
    let started = Instant::now();
    loop {
        tokio::select! {
            biased;
            why = &mut lost_future, if lost.is_none() => {
                let then = match limits.on_lost {
                    OnLost::Terminate => "killing them",
                    OnLost::Finish => "letting them finish",
                };
                tracing::warn!("delivery lost while processes left by the command still run: {why}; {then}");
                *lost = Some(why);
                if limits.on_lost == OnLost::Terminate {
                    return;
                }
            }
            () = process.left_behind_ended() => return,
            Received { signal, to_our_group } = signals.recv() => {
                if !is_stop(signal) {
                    continue;
                }
                if to_our_group {
                    tracing::debug!("forwarding {signal} to what the command left behind in other process groups");
                    signal_to_stop(process, Target::LeftBehindElsewhere, signal);
                } else {
                    tracing::debug!("forwarding {signal} to the processes that the command left behind");
                    signal_to_stop(process, Target::LeftBehind, signal);
                }
                if let Some(grace) = limits.grace {
                    deadline = deadline.min(Deadline::after(grace, "--grace"));
                }
            }
            option = deadline.passed() => {
                tracing::warn!(
                    "{} still running {} after it succeeded ({option}): sending SIGKILL",
                    counted(
                        process.count_left_behind() as u64,
                        "process left by the command is",
                        "processes left by the command are"
                    ),
                    HumanDuration(started.elapsed())
                );
                return;
            }
        }
    }
}

async fn kill_all_left_behind(process: &mut impl Process) {
    let deadline = Instant::now() + KILL_PATIENCE;
    // Usually everything has ended already, so the first look doesn't wait.
    let mut wait = Duration::ZERO;
    while timeout(wait, process.left_behind_ended()).await.is_err() {
        wait = KILL_AGAIN;
        if !process.kill_left_behind() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!(
                "{} not ended {} after SIGKILL (a device or a network file system may hold them up): going on without them",
                counted(
                    process.count_left_behind() as u64,
                    "process of the command has",
                    "processes of the command have"
                ),
                HumanDuration(KILL_PATIENCE)
            );
            return;
        }
    }
}

/// Also sends SIGCONT, as timeout(1) does: a process that SIGSTOP has stopped handles a signal only after that.
fn signal_to_stop(process: &impl Process, target: Target, signal: Signal) {
    process.signal(target, signal);
    process.signal(target, Signal::SIGCONT);
}

#[cfg(test)]
mod tests;
