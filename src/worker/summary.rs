//! The texts of log lines and summaries.

use crate::{
    broker::{DeliveryLost, Message},
    report::{Outcome, RunSummary, Subject, counted},
    settlement::Settled,
    verdict::{CommandResult, Ended, Settlement, StopReason, Verdict},
};
use nix::sys::signal::Signal;
use std::time::Instant;

#[derive(Default)]
pub(super) struct Tally {
    pub(super) acknowledged: u64,
    pub(super) requeued: u64,
    pub(super) dead_lettered: u64,
}

impl Tally {
    pub(super) fn is_empty(&self) -> bool {
        self.done() + self.requeued == 0
    }

    pub(super) fn done(&self) -> u64 {
        self.acknowledged + self.dead_lettered
    }

    /// Dead-lettered messages come first, as they decide the status.
    pub(super) fn describe(&self, end: &str) -> String {
        let reason = match self.dead_lettered {
            0 => String::new(),
            number => format!("{} dead-lettered; ", counted(number, "message was", "messages were")),
        };
        format!("{reason}{end} ({} acknowledged, {} requeued)", self.acknowledged, self.requeued)
    }
}

pub(super) fn log_taken(message: &Message, queue: &str) -> Subject {
    let (id, attempt, size) = (&message.id, message.attempt, message.body.len());
    tracing::info!(queue, id, attempt, size, "message taken");
    Subject { id: id.clone(), attempt, size, since: Instant::now() }
}

/// The summary of a run that ends with this message. Its status is qconsume's own.
pub(super) fn summary(subject: &Subject, status: u8, outcome: Outcome, text: String) -> RunSummary {
    RunSummary { outcome: Some(outcome), subject: Some(subject.clone()), ..RunSummary::without_message(status, text) }
}

pub(super) fn reason(why: Option<DeliveryLost>) -> String {
    why.map_or(String::new(), |why| why.to_string())
}

pub(super) struct SettledMessage {
    settlement: Settlement,
    pub(super) settled: Settled,
    pub(super) outcome: Outcome,
    pub(super) text: String,
}

impl SettledMessage {
    pub(super) fn new(settlement: Settlement, settled: Settled, why: Option<DeliveryLost>) -> Self {
        let requeue_unconfirmed = "requeue not confirmed, but the broker requeues the message when the connection ends, unless its queue is deleted";
        let (outcome, confirmed, unconfirmed) = match settlement {
            Settlement::Ack => (
                Outcome::Acknowledged,
                "message acknowledged",
                "acknowledgement not confirmed, so the message may be delivered again",
            ),
            Settlement::DeadLetter => (
                Outcome::DeadLettered,
                "message dead-lettered, or dropped if the queue has no dead-letter exchange",
                "rejection not confirmed, so the message may be delivered again",
            ),
            Settlement::Requeue => (Outcome::Requeued, "message requeued", requeue_unconfirmed),
            Settlement::Release => (Outcome::Released, "message released", requeue_unconfirmed),
        };
        let why = reason(why);
        let (outcome, text) = match settled {
            Settled::Confirmed => (outcome, confirmed.to_owned()),
            Settled::Unconfirmed => (Outcome::Unconfirmed, format!("{unconfirmed}: {why}")),
            Settled::Lost => {
                let lost = "delivery lost before the broker got the settlement, another worker may have the message";
                (Outcome::Lost, format!("{lost}: {why}"))
            }
        };
        Self { settlement, settled, outcome, text }
    }

    /// For `--no-ack`.
    pub(super) fn before_the_command() -> Self {
        let text = "message was acknowledged before the command (--no-ack)".to_owned();
        Self { settlement: Settlement::Ack, settled: Settled::Confirmed, outcome: Outcome::Acknowledged, text }
    }

    /// For `--no-ack`, if the command never started.
    pub(super) fn lost_without_command() -> Self {
        let text = "the message is lost: it was acknowledged already (--no-ack)".to_owned();
        Self { text, ..Self::before_the_command() }
    }

    pub(super) fn summary(
        &self,
        subject: &Subject,
        verdict: Verdict,
        result: CommandResult,
        at_default_delivery_limit: bool,
    ) -> RunSummary {
        let mut text = format!("{}; {}", describe_end(result), self.text);
        if at_default_delivery_limit && self.outcome == Outcome::Requeued {
            text += "; if the queue's delivery-limit is 20 (the default), the queue drops or dead-letters it";
        }
        let mut summary = summary(subject, verdict.status_after(self.settled), self.outcome, text);
        let status_is_qconsumes = match self.settled {
            Settled::Confirmed => false,
            // 75, while the status after other settlements is that of the command's failure.
            Settled::Unconfirmed => self.settlement == Settlement::Ack,
            Settled::Lost => true,
        };
        if !status_is_qconsumes && result.stop != Some(StopReason::TimeLimit) {
            summary.source = "command";
        }
        summary
    }
}

pub(super) fn describe_end(result: CommandResult) -> String {
    let ended = match result.ended {
        Ended::Exited(0) => "command succeeded".to_owned(),
        Ended::Exited(status) => format!("command exited with status {status}"),
        Ended::Killed(signal) => format!("command was killed by {}", signal_name(signal)),
    };
    match result.stop {
        // qconsume sends SIGKILL only after a signal, after --timeout, or when the delivery is lost: not here.
        None if result.ended == Ended::Killed(Signal::SIGKILL as i32) && result.still_owned => {
            format!("{ended} (often: out of memory)")
        }
        None => ended,
        Some(StopReason::TimeLimit) => format!("{ended} after its time limit (--timeout)"),
        Some(StopReason::Signal(signal)) => {
            format!("{ended} after qconsume received {}", signal_name(signal))
        }
    }
}

pub(super) fn signal_name(signal: i32) -> String {
    Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string())
}
