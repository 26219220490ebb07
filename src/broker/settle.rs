//! Tells the broker what became of a message, and makes sure that it has heard it.

use super::{
    consumer::{CONSUMER_TIMEOUT_SINCE, Consumer, Subscription},
    errors::DeliveryLost,
};
use crate::{report::mentioned, verdict::Settlement};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
};
use std::{fmt, time::Duration};
use tokio::time::{sleep, timeout};

/// Longest wait for the broker to confirm a settlement: longer than a leader election of a quorum queue or a broker
/// under a memory alarm takes, and short enough for a pod not to hang.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(90);

/// A command that was quicker than this can't have met an acknowledgement timeout that anybody sets.
const DOUBT_FROM: Duration = Duration::from_secs(1);

/// Where we have asked for the acknowledgement timeout ourselves, the part of it that is beyond doubt.
const BEYOND_DOUBT: f64 = 0.8;

/// How long the queue is given to say that the acknowledgement timeout came first: this part of the time that the
/// message was here, where we don't know the timeout, and never longer than this. A queue takes as long as its
/// disks do, some tens of milliseconds under load.
const DOUBT_PART: u32 = 20;
const DOUBT_LONGEST: Duration = Duration::from_secs(1);

/// Why it can't be known whether a settlement has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unconfirmed(String);

impl fmt::Display for Unconfirmed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Consumer {
    /// Settles the message that is held; with `last`, the consumer is cancelled first, so that no other is pushed
    /// that nobody here would run.
    ///
    /// # Errors
    /// When the broker hasn't confirmed within [`SETTLE_TIMEOUT`].
    pub async fn settle(&mut self, settlement: Settlement, last: bool) -> Result<(), Unconfirmed> {
        let settle = async {
            let subscription = self.subscription();
            let here = subscription.taken.elapsed();
            subscription.settle(settlement, last).await?;
            // Whatever else happens, a message that goes back is on its way back.
            if matches!(settlement, Settlement::Ack | Settlement::DeadLetter) {
                subscription.outlast_timeout(here).await?;
            }
            Ok(())
        };
        let stage = "waiting for the broker to show that it has heard what became of the message";
        let settled = timeout(SETTLE_TIMEOUT, mentioned(stage, settle)).await;
        settled.unwrap_or_else(|_| {
            Err(Unconfirmed(format!(
                "no reply from the broker within {}",
                crate::report::Span(SETTLE_TIMEOUT)
            )))
        })
    }
}

impl Subscription {
    async fn settle(&mut self, settlement: Settlement, last: bool) -> Result<(), Unconfirmed> {
        let tag = self.held.take().expect("a message is held");
        let channel = &self.channel;
        let consumer = if last { self.consumer.take() } else { None };
        let cancel = async {
            match &consumer {
                Some(consumer) => {
                    channel
                        .basic_cancel(consumer.tag(), BasicCancelOptions::default())
                        .await
                }
                None => Ok(()),
            }
        };
        // By the channel, not by lapin's acker: that one says Ok(false) when the message is lost, and hands its
        // frame over behind the barrier's.
        let settle = async {
            match settlement {
                Settlement::Ack => channel.basic_ack(tag, BasicAckOptions::default()).await,
                Settlement::Requeue => {
                    channel
                        .basic_reject(tag, BasicRejectOptions { requeue: true })
                        .await
                }
                Settlement::DeadLetter => {
                    channel
                        .basic_reject(tag, BasicRejectOptions { requeue: false })
                        .await
                }
                Settlement::Release => {
                    let back = BasicNackOptions {
                        requeue: true,
                        ..BasicNackOptions::default()
                    };
                    channel.basic_nack(tag, back).await
                }
            }
        };
        // The barrier: a channel's methods are worked off in order, and unlike channel.close and connection.close,
        // which are answered even in a race with a channel error, qos is answered only when all went well before.
        let barrier = channel.basic_qos(1, BasicQosOptions::default());
        let (cancelled, settled, passed) = tokio::join!(biased; cancel, settle, barrier);
        let version = self.link.version();
        cancelled
            .and(settled)
            .and(passed)
            .map_err(|error| Unconfirmed(DeliveryLost::new(&error, version).to_string()))?;
        self.still_ours()
    }

    /// RabbitMQ 4.3's acknowledgement timeout only cancels the consumer; what comes after is answered as if
    /// nothing had happened, though the message is back in the queue.
    fn still_ours(&self) -> Result<(), Unconfirmed> {
        if self.link.seen.cancelled() {
            return Err(Unconfirmed(
                DeliveryLost::cancelled(self.link.version()).to_string(),
            ));
        }
        Ok(())
    }

    /// Makes sure that the acknowledgement timeout hasn't struck just before the settlement.
    ///
    /// From RabbitMQ 4.3 on the queue, not the channel, watches the time. When it gives the message to somebody else
    /// while a settlement is on its way to it, the settlement comes to nothing, and the channel hears of that only
    /// after it has answered the barrier. It then cancels the consumer, or where we have done that already, ends
    /// the channel with 406 (seen with 4.3.6). So a second barrier goes out, when the queue has had its time.
    async fn outlast_timeout(&self, here: Duration) -> Result<(), Unconfirmed> {
        if self.link.version() < Some(CONSUMER_TIMEOUT_SINCE) {
            return Ok(());
        }
        let pause = match self.asked_timeout {
            Some(timeout) if here < timeout.mul_f64(BEYOND_DOUBT) => return Ok(()),
            Some(_) => DOUBT_LONGEST,
            None if here < DOUBT_FROM => return Ok(()),
            None => (here / DOUBT_PART).min(DOUBT_LONGEST),
        };
        sleep(pause).await;
        let barrier = self.channel.basic_qos(1, BasicQosOptions::default()).await;
        match barrier {
            // A connection that is lost now was good when the settlement was confirmed.
            Err(_) if self.link.connection.status().connected() => Err(Unconfirmed(
                DeliveryLost::timed_out(self.link.version()).to_string(),
            )),
            _ => self.still_ours(),
        }
    }
}
