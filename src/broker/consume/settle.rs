//! Carries out a settlement, step by step as [`Settling`] says.

use super::{
    consumer::Held,
    message::Fingerprint,
    subscription::{RELEASE, Subscription},
};
use crate::{
    broker::errors::DeliveryLost,
    report::{HumanDuration, with_reminders},
    settlement::{Event, Outcome, Settling, Step},
    verdict::Settlement,
};
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicRejectOptions};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Longest wait for the broker to confirm a settlement: nodes of a cluster notice a frozen leader after 45 to 75 seconds
/// (Erlang's net_ticktime of 60), and only then elect another one, which confirms.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long the queue is given to say that its timeout came first: some tens of milliseconds under load.
const PAUSE: Duration = Duration::from_millis(100);

/// Settles a delivery, and makes sure that the broker has processed that; says why if that isn't so.
pub(super) async fn carry_out(
    subscription: &mut Subscription,
    held: &Held,
    settlement: Settlement,
    cancels: bool,
) -> (Outcome, Option<DeliveryLost>) {
    let asks_twice = Settling::asks_twice(settlement, held.since.elapsed(), subscription.ack_timeout);
    let mut machine = Machine { settling: Settling::new(cancels, asks_twice), why: None };
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    let mut barriers = 0;
    let steps = async {
        loop {
            let step = machine.settling.step();
            if let Step::Done(outcome) = step {
                return outcome;
            }
            machine.look(subscription, held, step, deadline).await;
            if machine.settling.step() != step {
                continue;
            }
            barriers += u8::from(step == Step::Barrier);
            let done = timeout_at(deadline, perform(subscription, held, settlement, step)).await;
            if matches!(step, Step::Barrier | Step::Pause) {
                // What the broker has sent before its reply.
                machine.look(subscription, held, step, deadline).await;
            }
            match done {
                Ok(Ok(event)) => machine.happened(event, None),
                Ok(Err(error)) => {
                    let why = match barriers {
                        2 => subscription.unconfirmed_again(&error),
                        _ => subscription.delivery_lost(&error),
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
    let outcome = with_reminders("waiting for the broker to confirm the settlement", steps).await;
    (outcome, machine.why)
}

/// The machine, and what its end is due to.
struct Machine {
    settling: Settling,
    why: Option<DeliveryLost>,
}

impl Machine {
    /// Takes note of what the broker has sent until now.
    async fn look(&mut self, subscription: &mut Subscription, held: &Held, step: Step, deadline: Instant) {
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

/// Does what the step says, and tells what that is for the machine when it is done.
async fn perform(
    subscription: &mut Subscription,
    held: &Held,
    settlement: Settlement,
    step: Step,
) -> lapin::Result<Event> {
    let channel = &subscription.channel;
    match step {
        Step::Cancel => {
            // It is cancelled already if the message came when --wait had passed.
            if let Some(consumer) = subscription.consumer.take() {
                channel.basic_cancel(consumer.tag(), BasicCancelOptions { nowait: true }).await?;
            }
        }
        // By the channel, not by lapin's acker, which says Ok(false) when the message is lost.
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

/// Whether the broker has delivered another message, and if so, whether it is the one that is being settled.
///
/// Without a cancel, the next message may come as soon as the broker has processed the acknowledgement, and only its content tells
/// it from the same one. It is looked at, and stays the next one.
async fn another(subscription: &mut Subscription, held: &Held, step: Step, deadline: Instant) -> Option<bool> {
    if !subscription.has_another() {
        return None;
    }
    let expected = subscription.consumer.is_some() && matches!(step, Step::Barrier | Step::Pause);
    if !expected || !subscription.connection.observed().redelivered {
        return Some(false);
    }
    // If it doesn't arrive, the loss that keeps it away shows at the next step, or when it is waited for.
    let delivery = timeout_at(deadline, subscription.step()).await.ok()?.ok()?;
    let same = Fingerprint::of(&delivery) == held.fingerprint;
    subscription.put_back(delivery);
    Some(same)
}
