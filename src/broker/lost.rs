//! Why a delivery was lost, in words, and what to do about it.

use super::errors::{Meaning, described, unreadable};
use super::reach::{
    connection::OpenConnection,
    observed::{Observed, Version},
};
use crate::exit::Failure;
use lapin::ErrorKind;
use std::fmt;

/// Why a delivery, or the consumer that waits for one, was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryLost {
    text: String,
    /// The next message can't be read, so that it would come again over every new connection.
    pub unreadable: bool,
}

impl DeliveryLost {
    pub(super) fn because(text: impl Into<String>) -> Self {
        Self { text: text.into(), unreadable: false }
    }

    /// The next message can't be read: a new connection would get it again, and every delivery counts.
    fn unreadable(problem: impl Into<String>) -> Self {
        Self { text: problem.into(), unreadable: true }
    }

    /// The connection was lost before a message was whole, and so was an earlier one.
    pub(super) fn cut_short_again(self) -> Self {
        Self::unreadable(format!("two connections were lost while it arrived, the last one so: {}", self.text))
    }

    pub(super) fn new(error: &lapin::Error, connection: &OpenConnection) -> Self {
        let observed = connection.observed();
        if let Some(problem) = &observed.unreadable {
            return Self::unreadable(problem);
        }
        let Some(refusal) = observed.refusal(error) else {
            return Self::because(described(error));
        };
        if let Some(problem) = connection.login.credentials().problem(&refusal) {
            return Self::because(problem);
        }
        if refusal.meaning() == Meaning::AckTimeout {
            let advice = what_to_raise(observed.version);
            return Self::because(format!("acknowledgement timeout: {refusal}; {advice}"));
        }
        let what = match error.kind() {
            ErrorKind::ProtocolError(error) if error.get_id() < 500 && error.get_id() != 320 => "channel",
            ErrorKind::ParsingError(_) => "channel or the connection",
            _ => "connection",
        };
        Self::because(format!("the broker closed the {what}: {refusal}"))
    }

    /// See `Settling::means_requeued`. The second message is requeued with the connection.
    pub(super) fn delivered_again() -> Self {
        Self::because(
            "the broker delivered another message, so it has requeued this one: its nodes have lost each other, or the queue's leader has changed",
        )
    }

    /// The broker has closed the channel because of the acknowledgement timeout, which lapin doesn't pass on.
    pub(super) fn timed_out(version: Option<Version>) -> Self {
        let advice = what_to_raise(version);
        Self::because(format!("acknowledgement timeout: {advice}"))
    }

    /// The consumer's messages have ended without an error: it was cancelled, or lapin has dropped a close whose code it
    /// doesn't know.
    pub(super) fn ended(observed: &Observed) -> Self {
        match &observed.closed {
            _ if observed.unreadable.is_some() => Self::unreadable(observed.unreadable.clone().unwrap_or_default()),
            Some(refusal) if !observed.cancelled => {
                Self::because(format!("the broker closed the channel or the connection: {refusal}"))
            }
            _ if observed.version >= Some((4, 3)) => Self::because(format!(
                "the broker cancelled the consumer: the queue was deleted or has moved, or its acknowledgement timeout has passed ({})",
                what_to_raise(observed.version)
            )),
            _ => Self::because("the broker cancelled the consumer: the queue was deleted or has moved"),
        }
    }

    /// The end of the run, as the next message of this queue can't be read.
    pub fn unreadable_in(&self, queue: &str) -> Failure {
        unreadable(queue, &self.text)
    }
}

impl fmt::Display for DeliveryLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The setting behind the acknowledgement timeout, which has moved with the versions.
fn what_to_raise(version: Option<Version>) -> &'static str {
    match version {
        Some(version) if version >= (4, 3) => {
            "raise --ack-timeout, the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"
        }
        Some(version) if version >= (3, 12) => {
            "raise the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"
        }
        _ => "raise consumer_timeout in the broker's rabbitmq.conf",
    }
}
