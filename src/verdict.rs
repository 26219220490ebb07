//! Decides what becomes of the message, and the exit status: without I/O, so that every case can be tested.

use crate::{
    exit::{Exit, status_of_signal},
    settlement::Settled,
};
use std::{ops::RangeInclusive, str::FromStr};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(u8),
    /// By this signal.
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
    /// qconsume got this signal: an eviction, which isn't the message's fault.
    Signal(i32),
    /// `--timeout`
    TimeLimit,
}

impl StopReason {
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
    Ack,
    /// `basic.reject(requeue=true)`: the command failed; counts towards the queue's `delivery-limit`.
    Requeue,
    /// `basic.reject(requeue=false)`: dead-lettered, or dropped if the queue has no dead-letter exchange.
    DeadLetter,
    /// `basic.nack(requeue=true)`: the command was stopped from outside, or never ran. Quorum queues don't count this
    /// since RabbitMQ 4.3.
    Release,
}

/// A list of statuses such as `65,100-120`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(pub Vec<RangeInclusive<u8>>);

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<u8>() {
            Ok(0) => Err("0 is not a failure".to_owned()),
            Ok(number) => Ok(number),
            Err(_) => Err(format!("{text:?} is not a status from 1 to 255")),
        };
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() {
                return Err(format!("{part:?} is not a range: its end comes before its start"));
            }
            Ok(range)
        };
        text.split(',').map(range).collect::<Result<_, _>>().map(Self)
    }
}

/// The options about failures.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settling")]
pub struct Policy {
    /// Dead-letter the message if the command exits with one of these
    ///
    /// Separate statuses and ranges with commas, as in 65,100-120. A queue without a dead-letter exchange drops the
    /// message.
    #[arg(long, value_name = "CODES", env = "QCONSUME_REJECT_ON")]
    pub reject_on: Option<Statuses>,

    /// Dead-letter the message at its Nth failure
    ///
    /// A quorum queue counts the failures. A classic queue doesn't, so only 1 has an effect there.
    #[arg(long, value_name = "N", env = "QCONSUME_MAX_ATTEMPTS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_attempts: Option<u64>,

    /// Exit with this status if the message was dead-lettered [default: the status of the failure]
    ///
    /// With 0, a Job counts such a message as a completion.
    #[arg(long, hide_short_help = true, value_name = "N", env = "QCONSUME_REJECT_EXIT_CODE")]
    pub reject_exit_code: Option<u8>,

    /// Exit with this status for every failure of the command
    ///
    /// A podFailurePolicy can then tell the command's failures from qconsume's own. After --timeout the status is still
    /// 124.
    #[arg(long, value_name = "N", env = "QCONSUME_FAILURE_EXIT_CODE", value_parser = clap::value_parser!(u8).range(1..))]
    pub failure_exit_code: Option<u8>,
}

impl Policy {
    /// The status of a run with `--keep-going` that has dead-lettered a message.
    pub fn status_of_dead_letters(&self) -> u8 {
        self.reject_exit_code.unwrap_or(1)
    }
}

/// What the decision depends on, besides the options.
#[derive(Clone, Copy, Debug)]
pub struct CommandResult {
    pub ended: Ended,
    /// Whichever came first.
    pub stop: Option<StopReason>,
    /// Whether this connection still owned the delivery when the command had ended.
    pub still_owned: bool,
    /// See [`Message::failures`](crate::broker::Message::failures).
    pub failures_before: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `None` if the delivery was lost.
    pub settlement: Option<Settlement>,
    /// If the broker confirms the settlement.
    pub status: u8,
    pub status_if_unconfirmed: u8,
}

impl Verdict {
    pub const fn status_after(self, settled: Settled) -> u8 {
        match settled {
            Settled::Confirmed => self.status,
            Settled::Unconfirmed => self.status_if_unconfirmed,
            Settled::Lost => Exit::Unconfirmed.status(),
        }
    }
}

/// The order of the cases decides: a lost delivery comes first, then success, then the first reason to stop.
pub fn decide(result: CommandResult, policy: &Policy) -> Verdict {
    use Settlement::{Ack, DeadLetter, Release, Requeue};
    let unconfirmed = Exit::Unconfirmed.status();
    let timed_out = result.stop == Some(StopReason::TimeLimit);
    let unmapped = if timed_out { Exit::TimedOut.status() } else { result.ended.status() };
    // 124 is qconsume's own status, so `--failure-exit-code` doesn't replace it.
    let failed = policy.failure_exit_code.filter(|_| !timed_out).unwrap_or(unmapped);
    let (settlement, status, status_if_unconfirmed) = if !result.still_owned {
        (None, unconfirmed, unconfirmed)
    } else if result.ended == Ended::Exited(0) && !timed_out {
        (Some(Ack), 0, unconfirmed)
    } else if matches!(result.stop, Some(StopReason::Signal(_))) {
        (Some(Release), failed, failed)
    } else if rejects(unmapped, result.failures_before, policy) {
        // `--reject-exit-code` tells a Job that this message is done, which is so only if the broker has confirmed.
        (Some(DeadLetter), policy.reject_exit_code.unwrap_or(failed), failed)
    } else {
        (Some(Requeue), failed, failed)
    };
    Verdict { settlement, status, status_if_unconfirmed }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunState {
    /// How many messages are still to be done, including this one; `None` without a limit.
    pub to_do: Option<u64>,
    pub keep_going: bool,
    /// The first stop signal of the run, whenever it came.
    pub stopped_by: Option<i32>,
}

/// What comes after a message: another one, or the end of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Message,
    /// With this message's status.
    End,
    /// By `--count` with `--keep-going`. This message's status isn't the run's.
    AllDone,
    /// By this signal, before everything is done. The run's status is then 128+N, though this message's is 0.
    Stopped(i32),
}

impl RunState {
    /// What comes after a confirmed settlement. Also asked before it: if nothing comes, the consumer is cancelled
    /// first.
    pub fn next(self, verdict: Verdict, failures_before: Option<u64>) -> Next {
        let done = matches!(verdict.settlement, Some(Settlement::Ack | Settlement::DeadLetter));
        // `to_do` includes this message: it is the last one if it is done.
        let all_done = self.to_do.is_some_and(|to_do| to_do <= u64::from(done));
        let goes_on = verdict.status == 0 || self.keep_going && !repeats_forever(verdict, failures_before);
        if !goes_on {
            return Next::End;
        }
        match self.stopped_by {
            Some(_) if all_done || verdict.status != 0 => Next::End,
            Some(signal) => Next::Stopped(signal),
            None if all_done && self.keep_going => Next::AllDone,
            None if all_done => Next::End,
            None => Next::Message,
        }
    }
}

/// A classic queue puts a requeued message back to the front, and doesn't count its failures. That is known only from
/// the message's second delivery on.
pub fn repeats_forever(verdict: Verdict, failures_before: Option<u64>) -> bool {
    verdict.settlement == Some(Settlement::Requeue) && failures_before.is_none()
}

fn rejects(status: u8, failures_before: Option<u64>, policy: &Policy) -> bool {
    let is_listed = |Statuses(ranges): &Statuses| ranges.iter().any(|range| range.contains(&status));
    let is_last_failure = |max| match failures_before {
        Some(before) => before.saturating_add(1) >= max,
        // Don't guess a count from the redelivered flag: after a restart of the broker healthy messages have it, too.
        None => max <= 1,
    };
    policy.reject_on.as_ref().is_some_and(is_listed) || policy.max_attempts.is_some_and(is_last_failure)
}

#[cfg(test)]
mod tests;
