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
    let mut machine = Machine { settling: Settling::new(cancels), why: None };
    let begin = Instant::now();
    let mut deadline = begin + SETTLE_TIMEOUT;
    // How long the settlement and the first barrier took, once that is answered.
    let mut first_reply = None;
    let steps = async {
        loop {
            let step = machine.settling.step();
            if let Step::Done(settled) = step {
                return settled;
            }
            // What the broker sent until now may change the step.
            machine.note_arrivals(subscription, held, step, deadline).await;
            if machine.settling.step() != step {
                continue;
            }
            let done = match step {
                Step::Pause => {
                    let pause = pause(held.since.elapsed(), first_reply.unwrap_or_default());
                    timeout_at(deadline, sleep(pause)).await.map(|()| Ok(Event::PauseOver))
                }
                _ => timeout_at(deadline, perform(subscription, held, settlement, step)).await,
            };
            if matches!(step, Step::Barrier | Step::Pause) {
                // What has arrived by now was sent before the reply, or during the pause: it counts first.
                machine.note_arrivals(subscription, held, step, deadline).await;
            }
            match done {
                Ok(Ok(event)) => {
                    if event == Event::Reply && first_reply.is_none() {
                        first_reply = Some(begin.elapsed());
                        deadline = Instant::now() + SETTLE_TIMEOUT;
                        // Only now, as the reply may have taken long.
                        if Settling::needs_second_barrier(settlement, held.since.elapsed(), subscription.ack_timeout) {
                            machine.settling.require_second_barrier();
                        }
                    }
                    machine.happened(event, None);
                }
                Ok(Err(error)) => {
                    let why = if first_reply.is_some() {
                        subscription.second_barrier_failed(&error)
                    } else {
                        subscription.delivery_lost(&error)
                    };
                    machine.happened(Event::Closed, Some(why));
                }
                Err(_) => {
                    let why = format!("no reply from the broker within {}", HumanDuration(SETTLE_TIMEOUT));
                    machine.happened(Event::TimedOut, Some(DeliveryLost::because(why)));
                }
            }
        }
    };
    let settled = with_reminders("waiting for the broker to confirm the settlement", steps).await;
    (settled, machine.why)
}

/// The state machine, and the reason if it doesn't end with a confirmation.
struct Machine {
    settling: Settling,
    why: Option<DeliveryLost>,
}

impl Machine {
    /// Tells the machine what the broker has sent until now.
    async fn note_arrivals(&mut self, subscription: &mut Subscription, held: &Held, step: Step, deadline: Instant) {
        if let Some(same) = another(subscription, held, step, deadline).await {
            self.happened(Event::Delivery { same }, Some(DeliveryLost::delivered_again()));
        }
        // After a delivery, as none comes to a cancelled consumer.
        if subscription.connection.observed().consumer.cancelled {
            let why = DeliveryLost::ended(&subscription.connection.observed());
            self.happened(Event::Cancelled, Some(why));
        }
    }

    fn happened(&mut self, event: Event, why: Option<DeliveryLost>) {
        self.settling.happened(event);
        if matches!(self.settling.step(), Step::Done(_)) && self.why.is_none() {
            self.why = why;
        }
    }
}

/// Performs a step, and returns the event that follows for the machine.
async fn perform(
    subscription: &mut Subscription,
    held: &Held,
    settlement: Settlement,
    step: Step,
) -> lapin::Result<Event> {
    let channel = &subscription.channel;
    match step {
        Step::Cancel => {
            // If --wait had passed when the message came, the consumer is cancelled already.
            if let Some(consumer) = subscription.consumer.take() {
                channel.basic_cancel(consumer.tag(), BasicCancelOptions { nowait: true }).await?;
            }
        }
        // Not by lapin's acker: it returns Ok(false) if the message is lost.
        Step::Settle => match settlement {
            Settlement::Ack => channel.basic_ack(held.tag, BasicAckOptions::default()).await?,
            Settlement::Requeue => channel.basic_reject(held.tag, BasicRejectOptions { requeue: true }).await?,
            Settlement::DeadLetter => channel.basic_reject(held.tag, BasicRejectOptions { requeue: false }).await?,
            Settlement::Release => channel.basic_nack(held.tag, RELEASE).await?,
        },
        Step::Barrier => {
            subscription.barrier().await?;
            return Ok(Event::Reply);
        }
        Step::Pause | Step::Done(_) => {}
    }
    Ok(Event::Written)
}

/// Whether the broker has delivered the message that is being settled again, if it has delivered any. It is `false`,
/// too, if no delivery was due: then any one means that the broker has requeued the message, see [`Settling`].
///
/// Without a cancel, the next message may come as soon as the broker has processed the acknowledgement. Only its
/// content tells it apart from the message that is being settled. It is read ahead, and put back.
async fn another(subscription: &mut Subscription, held: &Held, step: Step, deadline: Instant) -> Option<bool> {
    if !subscription.has_another() {
        return None;
    }
    let is_due = subscription.consumer.is_some() && matches!(step, Step::Barrier | Step::Pause);
    if !is_due || !subscription.connection.observed().consumer.redelivered {
        return Some(false);
    }
    // If it doesn't arrive, the connection is lost, and the next step reports that.
    let delivery = timeout_at(deadline, subscription.next_delivery()).await.ok()?.ok()?;
    let same = Fingerprint::of(&delivery) == held.fingerprint;
    subscription.put_back(delivery);
    Some(same)
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
