//! Carries out a settlement, step by step as [`Settling`] says. tests/model/worker.rs does the same: change both.

use super::{
    consumer::Held,
    message::Fingerprint,
    subscription::{RELEASE, Subscription},
};
use crate::{
    broker::errors::DeliveryLost,
    report::{HumanDuration, with_reminders},
    settlement::{Event, Settled, Settling, Step},
    verdict::Settlement,
};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicRejectOptions};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Longest wait for the broker's reply to a barrier. A cluster notices a frozen leader after 45 to 75 seconds
/// (Erlang's net_ticktime of 60), and only then elects another one, which confirms.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long to wait between two barriers (see [`Settling::needs_second_barrier`]): two percent of the time that the
/// message was held, from a tenth of a second to a second. If the broker is so busy that its first reply took long, its
/// channel is told of an acknowledgement timeout just as late: then four times as long as the reply, up to 5 seconds.
fn pause(held: Duration, first_reply: Duration) -> Duration {
    let share = (held / 50).clamp(Duration::from_millis(100), Duration::from_secs(1));
    share.max((first_reply * 4).min(Duration::from_secs(5)))
}

/// Settles a delivery, and waits until the broker has confirmed that. Returns the reason if it doesn't.
pub(super) async fn carry_out(
    subscription: &mut Subscription,
    held: &Held,
    settlement: Settlement,
    cancels: bool,
) -> (Settled, Option<DeliveryLost>) {
    // A cancelled consumer gets no further message either.
    let cancels = cancels || subscription.consumer.is_none();
    let begin = Instant::now();
    let mut under_way = UnderWay {
        subscription,
        held,
        settlement,
        settling: Settling::new(cancels),
        why: None,
        begin,
        first_reply_took: None,
        deadline: begin + SETTLE_TIMEOUT,
    };
    let settled = with_reminders("waiting for the broker to confirm the settlement", under_way.finish()).await;
    (settled, under_way.why)
}

struct UnderWay<'a> {
    subscription: &'a mut Subscription,
    held: &'a Held,
    settlement: Settlement,
    settling: Settling,
    why: Option<DeliveryLost>,
    begin: Instant,
    /// How long the settlement and the first barrier took, with the time to read the next message if it came.
    first_reply_took: Option<Duration>,
    /// For the reply to the next barrier.
    deadline: Instant,
}

impl UnderWay<'_> {
    async fn finish(&mut self) -> Settled {
        loop {
            let step = self.settling.step();
            if let Step::Done(settled) = step {
                return settled;
            }
            // What the broker sent until now may change the step.
            self.note_arrivals(step).await;
            if self.settling.step() != step {
                continue;
            }
            let performed = timeout_at(self.deadline, self.perform(step)).await;
            if matches!(step, Step::Barrier | Step::Pause) {
                // What has arrived by now was sent before the reply, or during the pause: it counts first. If it ends
                // the settling, the result below is ignored (`Settling::happened`).
                self.note_arrivals(step).await;
            }
            match performed {
                Ok(Ok(Event::Reply)) => self.note_reply(),
                Ok(Ok(event)) => self.happened(event, None),
                Ok(Err(error)) => self.happened(Event::Closed, Some(self.why_closed(&error))),
                Err(_) => {
                    let why = format!("no reply from the broker within {}", HumanDuration(SETTLE_TIMEOUT));
                    self.happened(Event::TimedOut, Some(DeliveryLost::because(why)));
                }
            }
        }
    }

    async fn note_arrivals(&mut self, step: Step) {
        if let Some(same) = self.other_delivery(step).await {
            self.happened(Event::Delivery { same }, Some(DeliveryLost::delivered_again()));
        }
        // Looked at second: what was delivered came before the cancel.
        if self.subscription.connection.observed().consumer.cancelled {
            let why = DeliveryLost::ended(&self.subscription.connection.observed());
            self.happened(Event::Cancelled, Some(why));
        }
    }

    /// Whether the broker has delivered another message, and if so, whether it is the one that is being settled.
    async fn other_delivery(&mut self, step: Step) -> Option<bool> {
        if !self.subscription.has_unread_delivery() {
            return None;
        }
        // Without a cancel, the next message is due once the settlement is written.
        let is_due = self.subscription.consumer.is_some() && matches!(step, Step::Barrier | Step::Pause);
        if !is_due {
            // No need to look: whatever it is, Settling concludes that the broker has requeued this one.
            return Some(false);
        }
        if !self.subscription.connection.observed().consumer.redelivered {
            // A first delivery can't be the message that we hold.
            return Some(false);
        }
        // Only its content tells it apart from this one, so it is read ahead and put back. If it doesn't arrive,
        // the next step finds out why: a loss, a cancel, or the deadline.
        let delivery = timeout_at(self.deadline, self.subscription.next_delivery()).await.ok()?.ok()?;
        let same = Fingerprint::of(&delivery) == self.held.fingerprint;
        self.subscription.put_back(delivery);
        Some(same)
    }

    async fn perform(&mut self, step: Step) -> lapin::Result<Event> {
        let (channel, tag) = (&self.subscription.channel, self.held.tag);
        match step {
            Step::Cancel => {
                // If --wait had passed when the message came, the consumer is cancelled already.
                if let Some(consumer) = self.subscription.consumer.take() {
                    channel.basic_cancel(consumer.tag(), BasicCancelOptions { nowait: true }).await?;
                }
            }
            // Not by lapin's acker: it returns Ok(false) if the message is lost.
            Step::Settle => match self.settlement {
                Settlement::Ack => channel.basic_ack(tag, BasicAckOptions::default()).await?,
                Settlement::Requeue => channel.basic_reject(tag, BasicRejectOptions { requeue: true }).await?,
                Settlement::DeadLetter => channel.basic_reject(tag, BasicRejectOptions { requeue: false }).await?,
                Settlement::Release => channel.basic_nack(tag, RELEASE).await?,
            },
            Step::Barrier => {
                self.subscription.barrier().await?;
                return Ok(Event::Reply);
            }
            Step::Pause => {
                sleep(pause(self.held.since.elapsed(), self.first_reply_took.unwrap_or_default())).await;
                return Ok(Event::PauseOver);
            }
            Step::Done(_) => {}
        }
        Ok(Event::Written)
    }

    fn note_reply(&mut self) {
        if self.first_reply_took.is_none() {
            self.first_reply_took = Some(self.begin.elapsed());
            self.deadline = Instant::now() + SETTLE_TIMEOUT;
            // Only now, as the reply may have taken long.
            let held = self.held.since.elapsed();
            if Settling::needs_second_barrier(self.settlement, held, self.subscription.ack_timeout) {
                self.settling.require_second_barrier();
            }
        }
        self.happened(Event::Reply, None);
    }

    fn why_closed(&self, error: &lapin::Error) -> DeliveryLost {
        if self.first_reply_took.is_some() {
            self.subscription.second_barrier_failed(error)
        } else {
            self.subscription.delivery_lost(error)
        }
    }

    fn happened(&mut self, event: Event, why: Option<DeliveryLost>) {
        self.settling.happened(event);
        if matches!(self.settling.step(), Step::Done(_)) && self.why.is_none() {
            self.why = why;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_two_percent_of_the_time_and_longer_on_a_busy_broker() {
        for (held, first_reply, expected) in [
            (5000, 1, 100),
            (5000, 25, 100),
            (5000, 30, 120),
            (20_000, 1, 400),
            (20_000, 200, 800),
            (3_600_000, 1, 1000),
            (3_600_000, 300, 1200),
            (3_600_000, 30_000, 5000),
        ] {
            let [held, first_reply, expected] = [held, first_reply, expected].map(Duration::from_millis);
            assert_eq!(pause(held, first_reply), expected, "{held:?} {first_reply:?}");
        }
    }
}
