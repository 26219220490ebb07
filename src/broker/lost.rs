//! Why a delivery was lost, in words, and what to do about it.

use super::{
    errors::{Meaning, Refusal, described},
    observed::{Observed, Version},
};
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
    pub(super) fn new(error: &lapin::Error, observed: &Observed) -> Self {
        if let Some(problem) = &observed.unreadable {
            return Self {
                text: problem.clone(),
                unreadable: true,
            };
        }
        let text = match Refusal::of(error, observed) {
            Some(refusal) if refusal.meaning() == Meaning::AckTimeout => {
                format!(
                    "acknowledgement timeout: {refusal}; {}",
                    what_to_raise(observed.version)
                )
            }
            Some(refusal) if matches!(error.kind(), ErrorKind::ProtocolError(error) if error.get_id() < 500 && error.get_id() != 320) =>
            {
                format!("the broker closed the channel: {refusal}")
            }
            Some(refusal) => format!("the broker closed the connection: {refusal}"),
            None => described(error),
        };
        Self {
            text,
            unreadable: false,
        }
    }

    /// The broker has closed the channel because of the acknowledgement timeout, which lapin doesn't pass on.
    pub(super) fn timed_out(version: Option<Version>) -> Self {
        Self {
            text: format!("acknowledgement timeout: {}", what_to_raise(version)),
            unreadable: false,
        }
    }

    /// The consumer's messages have ended without an error: lapin drops a close whose code it doesn't know.
    pub(super) fn ended(observed: &Observed) -> Self {
        match observed.closed.clone() {
            Some((code, text)) if !observed.cancelled => {
                let refusal = Refusal { code, text };
                Self {
                    text: format!("the broker closed the channel or the connection: {refusal}"),
                    unreadable: false,
                }
            }
            _ => Self::cancelled(observed.version),
        }
    }

    /// The broker ended the consumer without saying why.
    pub(super) fn cancelled(version: Option<Version>) -> Self {
        let mut text =
            "the broker cancelled the consumer: the queue was deleted or has moved".to_owned();
        if version >= Some((4, 3)) {
            text += ", or its acknowledgement timeout has passed (";
            text += what_to_raise(version);
            text += ")";
        }
        Self {
            text,
            unreadable: false,
        }
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
