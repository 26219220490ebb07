//! What log lines and the summary say of a message, and of all of them.

use crate::{
    broker::{DeliveryLost, Message},
    cli::QconsumeOptions,
    report::{Outcome, RunSummary, Source, Subject},
    verdict::{CommandResult, Ended, Settlement, StopReason, Verdict},
};
use nix::sys::signal::Signal;
use std::fmt;
use tokio::time::Instant;

/// What became of the messages of a run, in numbers.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) acknowledged: u64,
    pub(super) requeued: u64,
    pub(super) dead_lettered: u64,
}

impl Tally {
    pub(super) fn done(&self) -> u64 {
        self.acknowledged + self.dead_lettered
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} acknowledged, {} failed and requeued, {} dead-lettered",
            self.acknowledged, self.requeued, self.dead_lettered
        )
    }
}

/// The message at hand, for log lines and the summary.
pub(super) struct Task {
    subject: Subject,
    pub(super) failures: Option<u64>,
    since: Instant,
}

impl Task {
    pub(super) fn new(message: &Message) -> Self {
        Self {
            subject: Subject {
                id: message.id.clone(),
                attempt: message.attempt,
                size: Some(message.body.len()),
                ..Subject::default()
            },
            failures: message.failures,
            since: Instant::now(),
        }
    }

    pub(super) fn log_taken(&self, queue: &str) {
        let Subject {
            id, attempt, size, ..
        } = &self.subject;
        tracing::info!(queue, id, attempt, size, "message taken");
    }

    /// How the run ends with it, with how long it has been here until now, to the millisecond.
    pub(super) fn summary(
        &self,
        source: Source,
        status: u8,
        outcome: Outcome,
        text: String,
    ) -> RunSummary {
        let seconds = (self.since.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        RunSummary {
            source,
            status,
            text,
            subject: Subject {
                seconds: Some(seconds),
                outcome: Some(outcome),
                ..self.subject.clone()
            },
        }
    }

    /// The same for a settlement that is confirmed, or isn't.
    pub(super) fn settled(
        &self,
        source: Source,
        how: &str,
        verdict: &Verdict,
        settlement: Settlement,
        unconfirmed: Option<DeliveryLost>,
    ) -> RunSummary {
        let (source, status) = match (&unconfirmed, settlement) {
            (None, _) => (source, verdict.exit_code),
            (Some(_), Settlement::Ack) => (Source::Qconsume, verdict.exit_code_if_unconfirmed),
            (Some(_), _) => (source, verdict.exit_code_if_unconfirmed),
        };
        let (outcome, became) = describe_settlement(settlement, unconfirmed);
        self.summary(source, status, outcome, format!("{how}; {became}"))
    }

    /// A classic queue doesn't count, so `--max-attempts` can't end anything there, and `--keep-going` can't go on.
    pub(super) fn warn_if_uncounted(&self, options: &QconsumeOptions, settlement: Settlement) {
        if settlement != Settlement::Requeue || self.failures.is_some() {
            return;
        }
        if let Some(max) = options.policy.max_attempts {
            tracing::warn!(
                "--max-attempts {max} has no effect: this queue doesn't count deliveries; use a quorum queue"
            );
        }
        if options.keep_going {
            tracing::warn!(
                "--keep-going ends here: this queue doesn't count deliveries, so it would deliver the failed message again and again; use a quorum queue"
            );
        }
    }
}

/// What became of the message, for machines and for people.
pub(super) fn describe_settlement(
    settlement: Settlement,
    unconfirmed: Option<DeliveryLost>,
) -> (Outcome, String) {
    if let Some(why) = unconfirmed {
        let text = match settlement {
            Settlement::Ack => format!(
                "acknowledgement not confirmed, so the message may be delivered again: {why}"
            ),
            Settlement::DeadLetter => {
                format!("rejection not confirmed, so the message may be delivered again: {why}")
            }
            Settlement::Requeue | Settlement::Release => {
                format!("message is requeued, though the broker has not confirmed it: {why}")
            }
        };
        return (Outcome::Unconfirmed, text);
    }
    let (outcome, text) = match settlement {
        Settlement::Ack => (Outcome::Acknowledged, "message acknowledged"),
        Settlement::Requeue => (Outcome::Requeued, "message requeued"),
        Settlement::Release => (Outcome::Released, "message released"),
        Settlement::DeadLetter => (
            Outcome::DeadLettered,
            "message dead-lettered, or dropped where the queue has no dead-letter exchange",
        ),
    };
    (outcome, text.to_owned())
}

/// How the command ended.
pub(super) fn describe_end(result: CommandResult) -> String {
    let ended = match result.ended {
        Ended::Exited(0) => "command succeeded".to_owned(),
        Ended::Exited(status) => format!("command exited with status {status}"),
        Ended::Killed(signal) => format!("command was killed by {}", signal_name(signal)),
    };
    match result.stop {
        None => ended,
        Some(StopReason::TimeLimit) => format!("{ended} after its time limit (--timeout)"),
        Some(StopReason::Signal(signal)) => {
            format!("{ended} after {} was forwarded to it", signal_name(signal))
        }
    }
}

fn signal_name(signal: i32) -> String {
    Signal::try_from(signal)
        .map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string())
}
