//! The settlement of one delivery as a machine without I/O: what has happened goes in, what to do next comes out.
//! broker/settle.rs carries it out, and tests/model runs it in every order of events.

use crate::verdict::Settlement;
use std::time::Duration;

/// The shortest run after which the broker is asked twice, see [`Settling::asks_twice`].
///
/// A shorter run can only meet a `consumer-timeout` policy of less than five seconds. RabbitMQ 4.3.6 honours those, down to one
/// second, but every task of an ordinary length would fail there. A second barrier costs a longer run a tenth of a second, so two
/// percent at most.
const ASK_TWICE_FROM: Duration = Duration::from_secs(5);

/// The share of an acknowledgement timeout that we have asked for ourselves within which no timeout can come first.
const SAFE_SHARE: f64 = 0.8;

/// What the broker, the network or the clock has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The method that [`Step::Cancel`] or [`Step::Settle`] asked for is written.
    Written,
    /// The broker has answered the barrier.
    Reply,
    /// The broker has delivered another message: the very one that is being settled, or a different one.
    Delivery {
        /// It is the one that is being settled.
        same: bool,
    },
    /// The broker has cancelled our consumer.
    Cancelled,
    /// The channel or the connection is lost.
    Closed,
    /// The pause is over; in any other step, the time in which the broker has to answer.
    Elapsed,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write `basic.cancel` without waiting for its reply.
    Cancel,
    /// Write the settlement: `basic.ack`, `basic.nack` or `basic.reject`.
    Settle,
    /// Write a synchronous method (`basic.qos`) on the same channel, and wait for its reply.
    Barrier,
    /// Wait for a tenth of a second.
    Pause,
    /// Nothing more.
    Done(Outcome),
}

/// How the settlement ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// The broker's channel has processed it while the delivery was ours.
    Confirmed,
    /// The broker has requeued the delivery before, and delivered another.
    Lost,
    /// Nobody knows whether the broker has processed it.
    Unconfirmed,
}

/// A settlement under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Settling {
    /// The consumer is cancelled first, so the broker has no reason to deliver again.
    cancels: bool,
    asks_twice: bool,
    at: At,
}

/// How far a settlement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum At {
    Cancelling,
    Settling,
    Asking,
    Pausing,
    AskingAgain,
    Done(Outcome),
}

impl Settling {
    /// Begins with a delivery that is still ours.
    ///
    /// `cancels`: the consumer is cancelled before the settlement, so that no message is delivered that nobody here would run.
    /// `asks_twice`: see [`Settling::asks_twice`].
    pub fn new(cancels: bool, asks_twice: bool) -> Self {
        let at = if cancels { At::Cancelling } else { At::Settling };
        Self { cancels, asks_twice, at }
    }

    /// Whether one answered barrier doesn't prove that the message has left the queue.
    ///
    /// From RabbitMQ 4.3 on the queue watches the acknowledgement timeout, not the channel. If it requeues the message while
    /// a settlement is on its way, the channel answers the barrier as if nothing had happened, and hears of the timeout some
    /// tens of milliseconds later. Then it cancels the consumer, or if we have done that, it ends the channel: a second
    /// barrier gets no answer (seen with 4.3.6). The version says nothing here, as proxies tell their own. A message that is
    /// requeued anyway needs no proof.
    pub fn asks_twice(settlement: Settlement, ran: Duration, ack_timeout: Option<Duration>) -> bool {
        let removes = matches!(settlement, Settlement::Ack | Settlement::DeadLetter);
        let safe = ack_timeout.map_or(ASK_TWICE_FROM, |timeout| timeout.mul_f64(SAFE_SHARE).min(ASK_TWICE_FROM));
        removes && ran >= safe
    }

    /// What to do now.
    pub fn step(self) -> Step {
        match self.at {
            At::Cancelling => Step::Cancel,
            At::Settling => Step::Settle,
            At::Asking | At::AskingAgain => Step::Barrier,
            At::Pausing => Step::Pause,
            At::Done(outcome) => Step::Done(outcome),
        }
    }

    /// Takes note of what has happened, in the order in which it did.
    pub fn happened(&mut self, event: Event) {
        self.at = match (self.at, event) {
            (At::Done(outcome), _) => At::Done(outcome),
            (at, Event::Delivery { same }) if self.means_requeued(at, same) => At::Done(Outcome::Lost),
            // It is the next message, which follows the acknowledgement of this one.
            (at, Event::Delivery { .. }) => at,
            // By a cancel RabbitMQ 4.3 tells of its acknowledgement timeout, and every version of a deleted queue: whether the
            // settlement came first is not known.
            (_, Event::Cancelled | Event::Closed) => At::Done(Outcome::Unconfirmed),
            (At::Cancelling, Event::Written) => At::Settling,
            (At::Settling, Event::Written) => At::Asking,
            (At::Asking, Event::Reply) if self.asks_twice => At::Pausing,
            (At::Asking | At::AskingAgain, Event::Reply) => At::Done(Outcome::Confirmed),
            (At::Pausing, Event::Elapsed) => At::AskingAgain,
            (_, Event::Elapsed) => At::Done(Outcome::Unconfirmed),
            (at, Event::Written | Event::Reply) => at,
        };
    }

    /// Whether another delivery means that the broker has requeued this one. With a prefetch of one, the broker delivers only
    /// what its queue has for a consumer that holds nothing: so does a quorum queue whose leader has lost sight of our node
    /// (seen with 4.0). It would drop our acknowledgement without a word.
    fn means_requeued(self, at: At, same: bool) -> bool {
        let settled = !matches!(at, At::Cancelling | At::Settling);
        self.cancels || !settled || same
    }
}

#[cfg(test)]
mod tests;
