//! Settles a message with the broker, and makes sure that the broker has processed that.

use super::{
    consumer::{Consumer, Held, State},
    lost::DeliveryLost,
    registration::{CONSUMER_TIMEOUT_SINCE, RELEASE, Registration},
};
use crate::{
    report::{HumanDuration, with_reminders},
    verdict::Settlement,
};
use lapin::{
    options::{BasicAckOptions, BasicCancelOptions, BasicRejectOptions},
    types::DeliveryTag,
};
use std::{future::ready, mem, time::Duration};
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt;

/// Longest wait for the broker to confirm a settlement: nodes of a cluster notice a frozen leader after 45 to 75 seconds
/// (Erlang's net_ticktime of 60), and only then elect another one, which confirms.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// A shorter run can't have met RabbitMQ's own acknowledgement timeout, which is 30 minutes and at least a minute.
const RECHECK_FROM: Duration = Duration::from_secs(60);

/// Where we have asked for the acknowledgement timeout ourselves: the share of it that is safe.
const SAFE_SHARE: f64 = 0.8;

/// How long the queue is given to say that its timeout came first: some tens of milliseconds under load.
const RECHECK_PAUSE: Duration = Duration::from_millis(100);

impl Consumer {
    /// Settles the message that is held; with `cancel`, the consumer is cancelled first, so that no message is delivered
    /// that nobody here would run.
    ///
    /// # Errors
    /// When the broker hasn't confirmed within 90 seconds that it has processed the settlement.
    pub async fn settle(&mut self, settlement: Settlement, cancel: bool) -> Result<(), DeliveryLost> {
        let State::Holding(mut registration, held) = mem::replace(&mut self.state, State::Idle(None)) else {
            unreachable!("only called while a message is held")
        };
        let settle = registration.settle(held, settlement, cancel);
        let stage = "waiting for the broker to confirm the settlement";
        let settled = timeout(SETTLE_TIMEOUT, with_reminders(stage, settle)).await.unwrap_or_else(|_| {
            let limit = HumanDuration(SETTLE_TIMEOUT);
            Err(DeliveryLost::because(format!("no reply from the broker within {limit}")))
        });
        self.state = if settled.is_err() || registration.consumer.is_none() {
            State::Idle(Some(registration.end()))
        } else {
            State::Ready(registration)
        };
        settled
    }
}

impl Registration {
    /// tests/model/worker.rs has the same steps in its `plan`, and checks them over every interleaving: change both
    /// together.
    async fn settle(&mut self, held: Held, settlement: Settlement, cancel: bool) -> Result<(), DeliveryLost> {
        let ran = held.since.elapsed();
        let sent = self.send(held.tag, settlement, cancel).await;
        let cancelled = sent.map_err(|error| self.delivery_lost(&error))?;
        self.check_still_owned()?;
        if let Some(consumer) = cancelled
            && has_another(consumer).await
        {
            return Err(DeliveryLost::delivered_again());
        }
        if matches!(settlement, Settlement::Ack | Settlement::DeadLetter) {
            self.recheck_after_consumer_timeout(ran).await?;
        }
        Ok(())
    }

    /// Cancels with `cancel`, settles, and waits for the broker to have processed both; returns the consumer that is
    /// cancelled.
    async fn send(
        &mut self,
        tag: DeliveryTag,
        settlement: Settlement,
        cancel: bool,
    ) -> lapin::Result<Option<lapin::Consumer>> {
        let channel = &self.channel;
        let cancelled = self.consumer.take_if(|_| cancel);
        if let Some(consumer) = &cancelled {
            // Without waiting for its reply: it only has to be in front of the settlement.
            let cancel = BasicCancelOptions { nowait: true };
            channel.basic_cancel(consumer.tag(), cancel).await?;
        }
        // By the channel, not by lapin's acker, which says Ok(false) when the message is lost. It returns when the
        // method is written: only then is the barrier asked for.
        let requeue = settlement == Settlement::Requeue;
        match settlement {
            Settlement::Ack => channel.basic_ack(tag, BasicAckOptions::default()).await?,
            Settlement::Requeue | Settlement::DeadLetter => {
                let reject = BasicRejectOptions { requeue };
                channel.basic_reject(tag, reject).await?;
            }
            Settlement::Release => channel.basic_nack(tag, RELEASE).await?,
        }
        self.barrier().await?;
        Ok(cancelled)
    }

    /// RabbitMQ 4.3's acknowledgement timeout only cancels the consumer; what comes after is answered as if nothing had
    /// happened, though the message is requeued.
    fn check_still_owned(&self) -> Result<(), DeliveryLost> {
        let observed = self.connection.observed();
        if observed.cancelled {
            return Err(DeliveryLost::ended(&observed));
        }
        Ok(())
    }

    /// RabbitMQ 4.3 may requeue the delivery and still answer our qos: wait, and send a second one.
    ///
    /// From that version on the queue, not the channel, watches the time. When it requeues the message while a settlement
    /// is on its way, the channel hears of that only after it has answered the barrier. It then cancels the consumer, or
    /// where we have done that already, ends the channel with 406 (seen with 4.3.6).
    async fn recheck_after_consumer_timeout(&self, ran: Duration) -> Result<(), DeliveryLost> {
        let safe = match self.ack_timeout {
            Some(timeout) => timeout.mul_f64(SAFE_SHARE),
            None => RECHECK_FROM,
        };
        if self.connection.version() < Some(CONSUMER_TIMEOUT_SINCE) || ran < safe {
            return Ok(());
        }
        sleep(RECHECK_PAUSE).await;
        match self.barrier().await {
            // A connection that is lost now was good when the settlement was confirmed; but for one that lapin has ended
            // itself, as it can't read why the channel was closed.
            Err(_) if self.connection.is_connected() || self.connection.observed().closed_unreadably => {
                Err(DeliveryLost::timed_out(self.connection.version()))
            }
            _ => self.check_still_owned(),
        }
    }
}

/// Whether a message has come to a consumer before it was cancelled: whatever the broker sent in front of the barrier's
/// reply is here by now.
async fn has_another(mut consumer: lapin::Consumer) -> bool {
    tokio::select! {
        biased;
        next = consumer.next() => matches!(next, Some(Ok(_))),
        () = ready(()) => false,
    }
}
