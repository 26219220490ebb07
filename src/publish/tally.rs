//! Pure: how many messages are confirmed, how many of them from the start without a gap, and why no more.

use crate::broker::Answer;

/// Why the first message that isn't confirmed isn't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gap {
    /// No queue takes it: it came back. It may be one of several, all of which were in flight.
    Unroutable {
        /// How many messages behind the last confirmed one it may be.
        among: u64,
    },
    /// The broker refused it.
    Refused,
    /// There is no answer to it.
    Unanswered,
}

/// Counts messages, from 1, in the order in which they were sent and are answered.
#[derive(Debug, Default)]
pub(super) struct Tally {
    sent: u64,
    answered: u64,
    refused: u64,
    first_refused: Option<u64>,
    returned: u64,
    /// The first returned message is one of those after the first number, up to the second.
    first_returned: Option<(u64, u64)>,
}

impl Tally {
    /// The next message is sent.
    pub(super) fn sent(&mut self) {
        self.sent += 1;
    }

    /// The next message is answered.
    pub(super) fn note(&mut self, answer: Answer) {
        self.answered += 1;
        match answer {
            Answer::Acked => {}
            Answer::AckedWithReturn { behind } => {
                self.returned += 1;
                self.first_returned.get_or_insert((behind, self.sent));
            }
            Answer::Nacked { returned } => {
                self.returned += u64::from(returned);
                self.refused += 1;
                self.first_refused.get_or_insert(self.answered);
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

    /// Whether a message was returned or refused.
    pub(super) fn has_failed(&self) -> bool {
        self.refused + self.returned > 0
    }

    /// Messages that no queue takes. LavinMQ returns those that it refuses, too: what came back beyond those.
    fn unroutable(&self) -> u64 {
        self.returned.saturating_sub(self.refused)
    }

    /// Messages that are in a queue.
    pub(super) fn confirmed(&self) -> u64 {
        self.answered - self.refused - self.unroutable()
    }

    /// How many messages from the start are confirmed without a gap, never too many; and why the next one isn't.
    pub(super) fn without_gap(&self) -> (u64, Option<Gap>) {
        let unanswered = (self.sent > self.answered).then_some((self.answered, Gap::Unanswered));
        let refused = self.first_refused.map(|first| (first - 1, Gap::Refused));
        let returned = self.first_returned.filter(|_| self.unroutable() > 0);
        let returned = returned.map(|(behind, last)| {
            let among = last - behind;
            (behind, Gap::Unroutable { among })
        });
        let first = [returned, refused, unanswered].into_iter().flatten();
        first.min_by_key(|(before, _)| *before).map_or((self.answered, None), |(before, gap)| (before, Some(gap)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Answer::{Acked, AckedWithReturn, Nacked};

    fn tally(sent: u64, answers: &[Answer]) -> Tally {
        let mut tally = Tally::default();
        (0..sent).for_each(|_| tally.sent());
        answers.iter().for_each(|answer| tally.note(*answer));
        tally
    }

    #[test]
    fn a_gap_is_never_placed_too_late() {
        let back = |behind| AckedWithReturn { behind };
        let refused = Nacked { returned: false };
        let both = Nacked { returned: true };
        let unroutable = |among| Some(Gap::Unroutable { among });
        for (sent, answers, confirmed, without_gap) in [
            (3, &[Acked; 3][..], 3, (3, None)),
            (3, &[Acked], 1, (1, Some(Gap::Unanswered))),
            (4, &[Acked, Acked, refused, Acked], 3, (2, Some(Gap::Refused))),
            // The second may be the one that came back, though the third brought it.
            (4, &[Acked, Acked, back(1), Acked], 3, (1, unroutable(3))),
            (3, &[Acked, Acked, back(2)], 2, (2, unroutable(1))),
            // LavinMQ returns and refuses one that a full queue doesn't take; which answer brings the return is open.
            (3, &[Acked, both, both], 1, (1, Some(Gap::Refused))),
            (3, &[back(0), refused, both], 1, (1, Some(Gap::Refused))),
            (4, &[back(0), refused, back(0), back(0)], 1, (0, unroutable(4))),
        ] {
            let tally = tally(sent, answers);
            assert_eq!(tally.confirmed(), confirmed, "{answers:?}");
            assert_eq!(tally.without_gap(), without_gap, "{answers:?}");
        }
    }
}
