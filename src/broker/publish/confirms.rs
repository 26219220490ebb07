//! What was published, what of it the broker has confirmed, and which message it has returned or nacked.

use lapin::Confirmation;
use std::collections::VecDeque;

/// The messages that were sent, and the broker's answers, in the order of publishing.
#[derive(Debug, Default)]
pub struct Confirms {
    /// The messages without an answer. Those sent last may still wait in lapin.
    in_flight: VecDeque<InFlight>,
    /// How many answers were received: `basic.ack` and `basic.nack`, one for each message.
    answered: u64,
    /// The bodies of the answered messages and a separator after each, in bytes.
    pub bytes: u64,
    /// How many `basic.return` and `basic.nack` were received. LavinMQ sends both for the same message.
    failures: u64,
    /// The first message that was returned or nacked, or the range that it is in.
    pub not_queued: Option<NotQueued>,
}

#[derive(Debug)]
struct InFlight {
    /// The body's size in bytes.
    size: u64,
    /// How many messages were answered when it was sent.
    answered_before: u64,
}

/// A message that was returned or nacked, by numbers that count from 1: one of the range `first` to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotQueued {
    pub first: u64,
    pub last: u64,
    /// If true, `last` was nacked; if `first` is less, a message from `first` on was returned, too. If false, one of
    /// the range was returned.
    pub nacked: bool,
}

impl Confirms {
    /// Counts a message that is sent, with a body of this size in bytes.
    pub(super) fn sent_one(&mut self, size: u64) {
        self.in_flight.push_back(InFlight { size, answered_before: self.answered });
    }

    /// Counts the answer to the first message in flight.
    pub(super) fn count(&mut self, confirmation: Confirmation) {
        let sent = self.sent();
        let InFlight { size, answered_before } = self.in_flight.pop_front().expect("what is answered was sent");
        self.answered += 1;
        self.bytes += size + 1;
        let (nacked, returned) = (confirmation.is_nack(), confirmation.take_message().is_some());
        self.failures += u64::from(nacked) + u64::from(returned);
        // lapin 4.12 adds a return to whichever answer it handles next, in no order if one frame answers several. So
        // the message that was returned is this one, or was in flight together with it. A nack is about this message
        // itself, so the range ends here.
        let first = if returned { answered_before + 1 } else { self.answered };
        let last = if nacked { self.answered } else { sent };
        if (nacked || returned) && self.not_queued.is_none_or(|earlier| first < earlier.first) {
            self.not_queued = Some(NotQueued { first, last, nacked });
        }
    }

    /// The number of the first message in flight, from 1, whose body has this size in bytes.
    pub(super) fn first_of_size(&self, size: u64) -> Option<u64> {
        let place = self.in_flight.iter().position(|message| message.size == size)?;
        Some(self.answered + place as u64 + 1)
    }

    /// How many messages are sent or being sent.
    pub fn sent(&self) -> u64 {
        self.answered + self.in_flight.len() as u64
    }

    pub fn any_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// How many messages are confirmed without a gap, from the first one.
    pub fn without_gap(&self) -> u64 {
        self.not_queued.map_or(self.answered, |message| message.first - 1)
    }

    /// How many messages were neither returned nor nacked. With LavinMQ, which does both, this may be too low.
    pub fn confirmed(&self) -> u64 {
        self.answered.saturating_sub(self.failures).max(self.without_gap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Confirmation::{Ack, Nack};
    use lapin::message::{BasicReturnMessage, Delivery};

    #[test]
    fn a_returned_or_nacked_message_is_never_placed_too_late() {
        let returned = || {
            let delivery = Delivery::mock(0, "".into(), "".into(), false, Vec::new());
            Some(BasicReturnMessage { delivery, reply_code: 312, reply_text: "NO_ROUTE".into() })
        };
        let (acked, nacked) = (|| (Ack(None), 0), || (Nack(None), 0));
        let back = |answered_before| (Ack(returned()), answered_before);
        let both = |answered_before| (Nack(returned()), answered_before);
        let one_of = |first, last, nacked| Some(NotQueued { first, last, nacked });
        for (sent, answers, confirmed, expected) in [
            (3, vec![acked(), acked(), acked()], 3, None),
            (3, vec![acked()], 1, None),
            (4, vec![acked(), acked(), nacked(), acked()], 3, one_of(3, 3, true)),
            // The return came with the ack of the third, and may be that of the second.
            (4, vec![acked(), acked(), back(1), acked()], 3, one_of(2, 4, false)),
            (3, vec![acked(), acked(), back(2)], 2, one_of(3, 3, false)),
            (4, vec![back(0), acked(), back(0), back(0)], 1, one_of(1, 4, false)),
            // A nack that brings the return of an earlier message.
            (3, vec![acked(), acked(), both(1)], 1, one_of(2, 3, true)),
            // LavinMQ returns and nacks a message that a full queue rejects.
            (3, vec![acked(), both(1), both(2)], 1, one_of(2, 2, true)),
            (3, vec![nacked(), back(0), acked()], 1, one_of(1, 1, true)),
        ] {
            let (count, shown) = (answers.len(), format!("{answers:?}"));
            let mut confirms = Confirms::default();
            let befores = answers.iter().map(|(_, answered_before)| *answered_before);
            confirms.in_flight.extend(befores.map(|answered_before| InFlight { size: 1, answered_before }));
            confirms.in_flight.extend((count..sent).map(|_| InFlight { size: 1, answered_before: 0 }));
            for (confirmation, _) in answers {
                confirms.count(confirmation);
            }
            assert_eq!((confirms.confirmed(), confirms.not_queued), (confirmed, expected), "{shown}");
            assert_eq!(confirms.without_gap(), expected.map_or(count as u64, |message| message.first - 1));
        }
    }
}
