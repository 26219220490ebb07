//! PURE: which messages are confirmed, which one failed first, from which on to resume.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher},
};

/// What became of a message that isn't confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Failed {
    /// It fits no queue.
    Returned,
    /// The broker didn't want it.
    Refused,
    /// Nobody knows.
    Unanswered,
}

/// Counts messages, from 1, in the order in which they were sent and are answered.
///
/// A returned message comes back beside the answers, so which one it was has to be found by its body. That takes
/// the digests of those in flight and of those answered while it may have been under way.
#[derive(Debug, Default)]
pub(super) struct Tally {
    sent: u64,
    answered: u64,
    acked: u64,
    refused: Option<u64>,
    unanswered: Option<u64>,
    /// Digests of what came back.
    returned: Vec<u64>,
    /// Messages that may still turn out to be returned: in flight, or answered not long ago. The last ones sent, in order.
    doubtful: VecDeque<Doubtful>,
}

#[derive(Debug)]
struct Doubtful {
    digest: u64,
    /// Once so many messages are answered, it would be known if this one had been returned.
    until: Option<u64>,
}

impl Tally {
    /// The next message was sent.
    pub(super) fn sent(&mut self, body: &[u8]) {
        self.sent += 1;
        self.doubtful.push_back(Doubtful {
            digest: digest(body),
            until: None,
        });
    }

    /// The next message is acknowledged.
    pub(super) fn acked(&mut self) {
        self.acked += 1;
        self.answer();
    }

    /// The next message is refused.
    pub(super) fn refused(&mut self) {
        self.refused.get_or_insert(self.answered + 1);
        self.answer();
    }

    /// The next message won't be answered.
    pub(super) fn unanswered(&mut self) {
        self.unanswered.get_or_insert(self.answered + 1);
        self.answer();
    }

    /// A message with this body came back along with the answer that is noted next: it is the one answered there, or one
    /// that was in flight with that. It is among the acknowledged ones too.
    pub(super) fn returned(&mut self, body: &[u8]) {
        self.returned.push(digest(body));
    }

    fn answer(&mut self) {
        self.answered += 1;
        let oldest = self.sent - self.doubtful.len() as u64;
        if let Some(message) = self.doubtful.get_mut((self.answered - oldest - 1) as usize) {
            // What was in flight with it may have carried what came back of it.
            message.until = Some(self.sent);
        }
        // From the first return on all are needed; no more are sent then.
        if self.returned.is_empty() {
            while self
                .doubtful
                .front()
                .is_some_and(|message| message.until.is_some_and(|until| self.answered >= until))
            {
                self.doubtful.pop_front();
            }
        }
    }

    /// Messages sent.
    pub(super) fn total(&self) -> u64 {
        self.sent
    }

    /// Messages without an answer so far.
    pub(super) fn outstanding(&self) -> u64 {
        self.sent - self.answered
    }

    /// Messages that are in a queue.
    pub(super) fn confirmed(&self) -> u64 {
        self.acked.saturating_sub(self.returned.len() as u64)
    }

    /// Whether a message was returned or refused.
    pub(super) fn has_failed(&self) -> bool {
        self.refused.is_some() || !self.returned.is_empty()
    }

    /// Whether there are messages that nobody knows about.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.unanswered.is_some()
    }

    /// The first message that isn't confirmed, once all are answered.
    pub(super) fn first_failed(&self) -> Option<(u64, Failed)> {
        [
            self.first_returned().map(|at| (at, Failed::Returned)),
            self.refused.map(|at| (at, Failed::Refused)),
            self.unanswered.map(|at| (at, Failed::Unanswered)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The first message that has the body of one that came back: of several alike the first, so that rather too few
    /// than too many count as confirmed.
    fn first_returned(&self) -> Option<u64> {
        if self.returned.is_empty() {
            return None;
        }
        let oldest = self.sent - self.doubtful.len() as u64;
        let place = self
            .doubtful
            .iter()
            .position(|message| self.returned.contains(&message.digest));
        // Always found, unless the broker changes bodies; then all that may be meant are in doubt.
        Some(oldest + place.unwrap_or(0) as u64 + 1)
    }

    /// How many messages from the start are confirmed without a gap, once all are answered.
    pub(super) fn without_gap(&self) -> u64 {
        self.first_failed()
            .map_or(self.answered, |(first, _)| first - 1)
    }
}

fn digest(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(body);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(bodies: impl IntoIterator<Item = &'static str>) -> Tally {
        let mut tally = Tally::default();
        for body in bodies {
            tally.sent(body.as_bytes());
        }
        tally
    }

    #[test]
    fn all_acknowledged_is_all_confirmed() {
        let mut tally = sent(["a", "b", "c"]);
        assert_eq!(tally.outstanding(), 3);
        for _ in 0..3 {
            tally.acked();
        }
        assert_eq!((tally.confirmed(), tally.outstanding()), (3, 0));
        assert_eq!((tally.without_gap(), tally.first_failed()), (3, None));
        assert!(!tally.has_failed());
    }

    #[test]
    fn a_refusal_is_a_gap() {
        let mut tally = sent(["a", "b", "c", "d"]);
        tally.acked();
        tally.acked();
        tally.refused();
        tally.acked();
        assert_eq!(tally.confirmed(), 3);
        assert_eq!(tally.first_failed(), Some((3, Failed::Refused)));
        assert_eq!(tally.without_gap(), 2);
    }

    #[test]
    fn no_answer_is_a_gap_and_what_is_acknowledged_behind_it_counts() {
        let mut tally = sent(["a", "b", "c"]);
        tally.acked();
        tally.unanswered();
        tally.acked();
        assert_eq!(tally.confirmed(), 2);
        assert_eq!(tally.first_failed(), Some((2, Failed::Unanswered)));
        assert_eq!(tally.without_gap(), 1);
    }

    #[test]
    fn what_came_back_is_found_by_its_body_whichever_answer_brought_it() {
        let mut tally = sent(["a", "b", "c", "d"]);
        tally.acked();
        tally.acked();
        tally.acked();
        // of "b", handed over with the answer to "d"
        tally.returned(b"b");
        tally.acked();
        assert_eq!(tally.confirmed(), 3);
        assert_eq!(tally.first_failed(), Some((2, Failed::Returned)));
        assert_eq!(tally.without_gap(), 1);
    }

    #[test]
    fn of_several_alike_the_first_is_taken_for_the_one_that_came_back() {
        let mut tally = sent(["x", "x", "y", "x"]);
        tally.acked();
        tally.returned(b"x");
        tally.acked();
        tally.acked();
        tally.acked();
        assert_eq!(tally.first_failed(), Some((1, Failed::Returned)));
    }

    #[test]
    fn what_was_answered_before_it_was_sent_is_beyond_doubt() {
        let mut tally = sent(["x", "x"]);
        tally.acked();
        tally.acked();
        tally.sent(b"x");
        tally.returned(b"x");
        tally.acked();
        assert_eq!(tally.first_failed(), Some((3, Failed::Returned)));
        assert_eq!((tally.confirmed(), tally.without_gap()), (2, 2));
    }

    #[test]
    fn one_that_was_alone_in_flight_is_found_too() {
        let mut tally = sent(["a"]);
        tally.acked();
        tally.sent(b"b");
        tally.returned(b"b");
        tally.acked();
        assert_eq!(tally.first_failed(), Some((2, Failed::Returned)));
        assert_eq!((tally.confirmed(), tally.without_gap()), (1, 1));
    }

    #[test]
    fn no_more_is_kept_than_what_is_in_flight_and_as_much_again() {
        let mut tally = Tally::default();
        for n in 0_u32..100 {
            tally.sent(&n.to_be_bytes());
        }
        for n in 0_u32..10_000 {
            tally.sent(&n.to_be_bytes());
            tally.acked();
            assert!(tally.doubtful.len() <= 202, "{}", tally.doubtful.len());
        }
    }
}
