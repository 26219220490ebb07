//! What becomes of the message, and what qconsume exits with: pure, so that every case can be tested.

use crate::{
    exit::{Exit, status_of_signal},
    settlement::Outcome,
};
use std::{ops::RangeInclusive, str::FromStr};

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(u8),
    /// This signal killed it.
    Killed(i32),
}

impl Ended {
    /// The status that a shell would report.
    pub const fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => status_of_signal(signal),
        }
    }
}

/// What made qconsume ask the command to stop before it ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// qconsume was sent this signal: an eviction, which isn't the message's fault.
    Signal(i32),
    /// `--timeout` passed.
    TimeLimit,
}

impl StopReason {
    /// The signal, if it was one.
    pub fn signal(self) -> Option<i32> {
        match self {
            Self::Signal(signal) => Some(signal),
            Self::TimeLimit => None,
        }
    }
}

/// What the broker is told about the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// `basic.ack`: done.
    Ack,
    /// `basic.reject(requeue=true)`: the command failed; counts towards the queue's `delivery-limit`.
    Requeue,
    /// `basic.reject(requeue=false)`: dead-lettered, or dropped where the queue has no dead-letter exchange.
    DeadLetter,
    /// `basic.nack(requeue=true)`: the message's command was stopped from outside, or never ran; on quorum queues of
    /// RabbitMQ 4.3 and newer that doesn't count towards `delivery-limit`.
    Release,
}

/// A list of statuses such as `65,100-120`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub Vec<RangeInclusive<u8>>);

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<u8>() {
            Ok(0) => Err("0 is no failure".to_owned()),
            Ok(number) => Ok(number),
            Err(_) => Err(format!("{text:?} is no status from 1 to 255")),
        };
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() {
                return Err(format!("{part:?} is no range: its end comes before its start"));
            }
            Ok(range)
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self)
    }
}

/// The options that decide about failures.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settling")]
pub struct Policy {
    /// Dead-letter the message if the command exits with one of these
    ///
    /// Separate statuses and ranges with commas, as in 65,100-120. A queue without a dead-letter exchange drops the message.
    #[arg(long, value_name = "CODES", env = "QCONSUME_REJECT_ON")]
    pub reject_on: Option<Statuses>,

    /// Dead-letter the message at its Nth failure
    ///
    /// A quorum queue counts the failures. A classic queue doesn't, so only 1 has an effect there.
    #[arg(long, value_name = "N", env = "QCONSUME_MAX_ATTEMPTS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_attempts: Option<u64>,

    /// Exit with this status if the message was dead-lettered [default: the command's status]
    ///
    /// With 0, a Job counts such a message as a completion.
    #[arg(long, hide_short_help = true, value_name = "N", env = "QCONSUME_REJECT_EXIT_CODE")]
    pub reject_exit_code: Option<u8>,

    /// Exit with this status for every failure of the command
    ///
    /// A podFailurePolicy can then tell the command's failures from qconsume's own.
    #[arg(long, value_name = "N", env = "QCONSUME_FAILURE_EXIT_CODE", value_parser = clap::value_parser!(u8).range(1..))]
    pub failure_exit_code: Option<u8>,
}

/// Everything about one run of the command that the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct CommandResult {
    /// How the command ended.
    pub ended: Ended,
    /// What stopped it, if anything did: the first of a signal and the time limit.
    pub stop: Option<StopReason>,
    /// Whether this connection still owned the delivery when the command had ended.
    pub still_owned: bool,
    /// How many failures the broker has counted before this run; `None` where the queue doesn't count.
    pub failures_before: Option<u64>,
}

/// The decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to tell the broker; `None` when the delivery was lost.
    pub settlement: Option<Settlement>,
    /// The exit status when the broker has confirmed the settlement.
    pub exit_code: u8,
    /// The exit status when it has not.
    pub exit_code_if_unconfirmed: u8,
}

impl Verdict {
    /// The exit status for this message, once its settlement has ended like this.
    pub const fn status(self, outcome: Outcome) -> u8 {
        match outcome {
            Outcome::Confirmed => self.exit_code,
            Outcome::Unconfirmed => self.exit_code_if_unconfirmed,
            Outcome::Lost => Exit::Unconfirmed.status(),
        }
    }
}

/// Decides. Lost beats everything; otherwise the first of a signal and the time limit decides.
pub fn decide(result: CommandResult, policy: &Policy) -> Verdict {
    use Settlement::{Ack, DeadLetter, Release, Requeue};
    let lost = Exit::Unconfirmed.status();
    let timed_out = result.stop == Some(StopReason::TimeLimit);
    // 124 is qconsume's own status, so `--failure-exit-code` doesn't hide it.
    let (raw, mapped) =
        if timed_out { (Exit::TimedOut.status(), None) } else { (result.ended.status(), policy.failure_exit_code) };
    // An unconfirmed message may be requeued: a failure like any other, and never a `--reject-exit-code`, which a
    // Job takes for the end of this message.
    let failed = mapped.unwrap_or(raw);
    let (settlement, exit_code, exit_code_if_unconfirmed) = if !result.still_owned {
        (None, lost, lost)
    } else if result.ended == Ended::Exited(0) && !timed_out {
        (Some(Ack), 0, lost)
    } else if matches!(result.stop, Some(StopReason::Signal(_))) {
        (Some(Release), failed, failed)
    } else if rejects(raw, result.failures_before, policy) {
        let exit_code = policy.reject_exit_code.unwrap_or(failed);
        (Some(DeadLetter), exit_code, failed)
    } else {
        (Some(Requeue), failed, failed)
    };
    Verdict { settlement, exit_code, exit_code_if_unconfirmed }
}

/// How far a run is, and what it may still do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Course {
    /// How many messages are still to be done, the one at hand included; `None` without a limit.
    pub to_do: Option<u64>,
    /// `--keep-going`.
    pub keep_going: bool,
    /// The first stop signal of the run, whenever it came.
    pub stopped_by: Option<i32>,
}

/// What comes after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next message.
    Message,
    /// The end of the run, with this message's status.
    End,
    /// The end of the run, as everything that `--count` asked for is done; only with `--keep-going`, which counts failures in.
    AllDone,
    /// The end of the run by this signal, before everything that the run was asked for is done: never with 0.
    Stopped(i32),
}

impl Course {
    /// What comes after a message whose settlement is confirmed. Before that, it says what would come: the consumer is
    /// cancelled before a settlement that is known to be the last one.
    pub fn next(self, verdict: Verdict, failures_before: Option<u64>) -> Next {
        let done = matches!(verdict.settlement, Some(Settlement::Ack | Settlement::DeadLetter));
        let all_done = self.to_do.is_some_and(|to_do| to_do <= u64::from(done));
        let goes_on = verdict.exit_code == 0 || self.keep_going && !repeats(verdict, failures_before);
        match self.stopped_by {
            _ if !goes_on => Next::End,
            Some(_) if all_done || verdict.exit_code != 0 => Next::End,
            Some(signal) => Next::Stopped(signal),
            None if all_done && self.keep_going => Next::AllDone,
            None if all_done => Next::End,
            None => Next::Message,
        }
    }
}

/// Whether the queue would deliver the same message again and again: a classic queue puts a requeued message back to the front, and
/// doesn't count its failures.
pub fn repeats(verdict: Verdict, failures_before: Option<u64>) -> bool {
    verdict.settlement == Some(Settlement::Requeue) && failures_before.is_none()
}

fn rejects(status: u8, failures_before: Option<u64>, policy: &Policy) -> bool {
    let is_listed = |Statuses(ranges): &Statuses| ranges.iter().any(|range| range.contains(&status));
    let is_last_attempt = |max| match failures_before {
        Some(before) => before.saturating_add(1) >= max,
        // The first failure is the last whatever the queue counts. Otherwise guessing from the redelivered flag would
        // dead-letter healthy messages after a restart of the broker.
        None => max <= 1,
    };
    policy.reject_on.as_ref().is_some_and(is_listed) || policy.max_attempts.is_some_and(is_last_attempt)
}

#[cfg(test)]
mod tests;
