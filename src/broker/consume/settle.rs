//! Carries out a settlement, step by step as [`Settling`] says.

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

/// Longest wait for the broker to confirm a settlement. A cluster notices a frozen leader after 45 to 75 seconds
/// (Erlang's net_ticktime of 60), and only then elects another one, which confirms.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Pause before the second barrier. If the acknowledgement timeout came first, the queue reports it within some tens of
/// milliseconds under load; see [`Settling::needs_second_barrier`].
const PAUSE: Duration = Duration::from_millis(100);

/// Settles a delivery, and waits until the broker has confirmed that. Returns the reason if it doesn't.
pub(super) async fn carry_out(
    subscription: &mut Subscription,
    held: &Held,
    settlement: Settlement,
    cancels: bool,
) -> (Settled, Option<DeliveryLost>) {
    let twice = Settling::needs_second_barrier(settlement, held.since.elapsed(), subscription.ack_timeout);
    let mut machine = Machine { settling: Settling::new(cancels, twice), why: None };
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    let mut barriers = 0;
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
            barriers += u8::from(step == Step::Barrier);
            let done = timeout_at(deadline, perform(subscription, held, settlement, step)).await;
            if matches!(step, Step::Barrier | Step::Pause) {
                // The broker sent this before its reply, so it counts first.
                machine.note_arrivals(subscription, held, step, deadline).await;
            }
            match done {
                Ok(Ok(event)) => machine.happened(event, None),
                Ok(Err(error)) => {
                    let why = if barriers == 2 {
                        subscription.second_barrier_failed(&error)
                    } else {
                        subscription.delivery_lost(&error)
                    };
                    machine.happened(Event::Closed, Some(why));
                }
                Err(_) => {
                    let why = format!("no reply from the broker within {}", HumanDuration(SETTLE_TIMEOUT));
                    machine.happened(Event::Elapsed, Some(DeliveryLost::because(why)));
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
        if subscription.connection.observed().cancelled {
            let why = DeliveryLost::ended(&subscription.connection.observed());
            self.happened(Event::Cancelled, Some(why));
        }
        if let Some(same) = another(subscription, held, step, deadline).await {
            self.happened(Event::Delivery { same }, Some(DeliveryLost::delivered_again()));
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
        Step::Pause => {
            sleep(PAUSE).await;
            return Ok(Event::Elapsed);
        }
        Step::Done(_) => {}
    }
    Ok(Event::Written)
}

/// `None` if the broker has delivered no other message; otherwise whether it is the one that is being settled. Also
/// `false` if no other message was expected: then it doesn't matter which one it is, see [`Settling`].
///
/// Without a cancel, the next message may come as soon as the broker has processed the acknowledgement. Only its
/// content tells it apart from the message that is being settled. It is read ahead, and put back.
async fn another(subscription: &mut Subscription, held: &Held, step: Step, deadline: Instant) -> Option<bool> {
    if !subscription.has_another() {
        return None;
    }
    let expected = subscription.consumer.is_some() && matches!(step, Step::Barrier | Step::Pause);
    if !expected || !subscription.connection.observed().redelivered {
        return Some(false);
    }
    // If it doesn't arrive, the connection is lost, and the next step reports that.
    let delivery = timeout_at(deadline, subscription.next_delivery()).await.ok()?.ok()?;
    let same = Fingerprint::of(&delivery) == held.fingerprint;
    subscription.put_back(delivery);
    Some(same)
}
