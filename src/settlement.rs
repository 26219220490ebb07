//! The settlement of one delivery as a state machine without I/O: events go in, the next step comes out.
//! broker/consume/settle.rs carries it out, and tests/model runs it in every order of events. `Settlement`, what the
//! broker is told, is in verdict.rs.

use crate::verdict::Settlement;
use std::time::Duration;

/// From which time on a held message needs a second barrier, see [`Settling::needs_second_barrier`]. Before that, only
/// a `consumer-timeout` policy below five seconds can requeue it: RabbitMQ 4.3.6 honours one, but most tasks would fail
/// there anyway.
const SECOND_BARRIER_FROM: Duration = Duration::from_secs(5);

/// With an `--ack-timeout` below 6.25 s, a second barrier is needed from this share of it on. The other 20 % is for the
/// delivery and the settlement to travel: if they take no longer, the timeout can't have come first.
const SAFE_SHARE: f64 = 0.8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The method of [`Step::Cancel`] or [`Step::Settle`] is written.
    Written,
    /// To the barrier.
    Reply,
    /// Another delivery; `same` if it is the message that is being settled.
    Delivery {
        same: bool,
    },
    /// The broker has cancelled our consumer.
    Cancelled,
    /// The channel or the connection is lost.
    Closed,
    PauseOver,
    TimedOut,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write `basic.cancel` without waiting for its reply.
    Cancel,
    Settle,
    /// Write `basic.qos`, a synchronous method, on the same channel, and wait for its reply.
    Barrier,
    /// Wait until the broker's channel must have heard of an acknowledgement timeout, if one came first.
    Pause,
    Done(Settled),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Settled {
    /// The broker's channel has processed it while the delivery was ours.
    Confirmed,
    /// The broker had already requeued the delivery.
    Lost,
    /// Nobody knows whether the broker has processed it.
    Unconfirmed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Settling {
    cancels: bool,
    second_barrier: bool,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Stage {
    Cancelling,
    Writing,
    FirstBarrier,
    Pausing,
    SecondBarrier,
    Done(Settled),
}

impl Settling {
    /// Begins to settle a delivery that is still ours, with one barrier. `cancels`: the consumer is cancelled first, or
    /// was cancelled before, so that no further message is delivered.
    pub fn new(cancels: bool) -> Self {
        let stage = if cancels { Stage::Cancelling } else { Stage::Writing };
        Self { cancels, second_barrier: false, stage }
    }

    /// Call this before [`Event::Reply`] of the first barrier.
    pub fn require_second_barrier(&mut self) {
        self.second_barrier = true;
    }

    /// Whether a second barrier is needed to prove that the message has left the queue. `held` is the time from its
    /// delivery to the reply to the first barrier.
    ///
    /// Since RabbitMQ 4.3 the queue, not the channel, watches the acknowledgement timeout. If the queue requeues the
    /// message while the settlement is on its way, the channel still answers the barrier, because the queue tells it
    /// about the timeout later: some tens of milliseconds, or seconds on a busy broker. Then the broker cancels the
    /// consumer or, if we have cancelled it, closes the channel, so that a second barrier gets no reply (seen with
    /// 4.3.6). We can't go by the broker's version, because a proxy reports its own. A requeue needs no proof.
    pub fn needs_second_barrier(settlement: Settlement, held: Duration, ack_timeout: Option<Duration>) -> bool {
        let removes = matches!(settlement, Settlement::Ack | Settlement::DeadLetter);
        let safe =
            ack_timeout.map_or(SECOND_BARRIER_FROM, |timeout| timeout.mul_f64(SAFE_SHARE).min(SECOND_BARRIER_FROM));
        removes && held >= safe
    }

    pub fn step(self) -> Step {
        match self.stage {
            Stage::Cancelling => Step::Cancel,
            Stage::Writing => Step::Settle,
            Stage::FirstBarrier | Stage::SecondBarrier => Step::Barrier,
            Stage::Pausing => Step::Pause,
            Stage::Done(settled) => Step::Done(settled),
        }
    }

    pub fn happened(&mut self, event: Event) {
        self.stage = match (self.stage, event) {
            (Stage::Done(settled), _) => Stage::Done(settled),
            (stage, Event::Delivery { same }) if self.means_requeued(stage, same) => Stage::Done(Settled::Lost),
            // The next message, after the acknowledgement of this one.
            (stage, Event::Delivery { .. }) => stage,
            // The broker cancels the consumer of a deleted queue, and RabbitMQ 4.3 also after an acknowledgement
            // timeout. Whether the settlement came first is unknown.
            (_, Event::Cancelled | Event::Closed) => Stage::Done(Settled::Unconfirmed),
            (Stage::Cancelling, Event::Written) => Stage::Writing,
            (Stage::Writing, Event::Written) => Stage::FirstBarrier,
            (Stage::FirstBarrier, Event::Reply) if self.second_barrier => Stage::Pausing,
            (Stage::FirstBarrier | Stage::SecondBarrier, Event::Reply) => Stage::Done(Settled::Confirmed),
            (Stage::Pausing, Event::PauseOver) => Stage::SecondBarrier,
            (_, Event::TimedOut) => Stage::Done(Settled::Unconfirmed),
            (stage, Event::Written | Event::Reply | Event::PauseOver) => stage,
        };
    }

    /// Whether another delivery means that the broker has requeued this one. With a prefetch of 1, a second one comes
    /// only if the queue thinks that we hold nothing: for example a quorum queue whose leader has lost our node (seen
    /// with 4.0). It would drop our acknowledgement silently.
    fn means_requeued(self, stage: Stage, same: bool) -> bool {
        let settled = !matches!(stage, Stage::Cancelling | Stage::Writing);
        self.cancels || !settled || same
    }
}

#[cfg(test)]
mod tests;
