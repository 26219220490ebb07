//! Waits for a message, over as many connections as it takes.

use super::Worker;
use crate::{
    broker::{DeliveryLost, Message, unreadable},
    clock::sleep_until_or_never,
    exit::{Exit, Failure},
    report::{HumanDuration, Reminder},
};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How soon an empty-looking queue is looked at again; it grows to the longest, for a queue that somebody else works on.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const LOOK_AGAIN_LONGEST: Duration = Duration::from_secs(1);

/// How soon a wait is mentioned.
const MENTION_WAIT: Duration = Duration::from_secs(30);

impl Worker {
    /// Waits for a message, over as many connections as it needs.
    ///
    /// `None` is: there was none for as long as the options want to wait.
    pub(super) async fn take(&mut self) -> Result<Option<Message>, Failure> {
        // `--drain` without `--wait` asks at once how full the queue is.
        let at_once = self.options.drain.then_some(Duration::ZERO);
        let limit = self.options.wait.or(at_once);
        let mut waited = Duration::ZERO;
        let (mut pause, mut failing_since) = (LOOK_AGAIN, Instant::now());
        loop {
            if !self.consumer.is_registered() {
                self.consumer.register().await?;
                tracing::debug!("waiting for a message in queue {:?}", self.consumer.queue());
            }
            // Only time in which a message could have come counts.
            let registered = Instant::now();
            let left = limit.map(|limit| limit.saturating_sub(waited));
            match self.wait(left).await {
                Ok(taken) => return Ok(taken),
                Err(lost) if lost.unreadable => {
                    return Err(unreadable(self.consumer.queue(), &lost.to_string()));
                }
                Err(lost) => {
                    self.consumer.check_queue_survives(&lost.to_string())?;
                    // Lost as soon as it is registered, again and again: no storm, and not for ever.
                    if registered.elapsed() > LOOK_AGAIN_LONGEST {
                        (pause, failing_since) = (LOOK_AGAIN, Instant::now());
                    } else if failing_since.elapsed() > self.options.broker.connect_timeout {
                        let limit = HumanDuration(self.options.broker.connect_timeout);
                        return Err(Failure::new(
                            Exit::Unavailable,
                            format!("gave up after {limit} (--connect-timeout) of losing each new connection: {lost}"),
                        ));
                    }
                    tracing::warn!("while waiting for a message: {lost}; connecting again");
                }
            }
            waited += registered.elapsed();
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
        }
    }

    /// Waits on one connection: for a message, until `limit` has passed, or with `--drain` until the queue is empty then.
    async fn wait(&mut self, limit: Option<Duration>) -> Result<Option<Message>, DeliveryLost> {
        let mut look = limit.map(|limit| Instant::now() + limit);
        let mut pause = LOOK_AGAIN;
        let mut mention = Reminder::new(MENTION_WAIT);
        let mut held_up = Reminder::default();
        loop {
            tokio::select! {
                biased;
                message = self.consumer.next() => return message.map(Some),
                () = sleep_until_or_never(look) => {}
                waited = mention.due() => {
                    tracing::info!("still waiting for a message in queue {:?}, for {} now", self.consumer.queue(), HumanDuration(waited));
                    continue;
                }
            }
            if !self.options.drain {
                return self.consumer.cancel().await;
            }
            match self.consumer.depth().await? {
                Some(0) => return self.consumer.cancel().await,
                Some(ready) if held_up.is_due() => tracing::info!(
                    "queue {:?} has {ready} ready messages, but the broker delivers none of them here: another consumer is the active one (single active consumer), or the queue is moving to another node",
                    self.consumer.queue()
                ),
                None if held_up.is_due() => tracing::info!(
                    "the broker can't say whether queue {:?} is empty: its leader doesn't answer",
                    self.consumer.queue()
                ),
                _ => {}
            }
            look = Some(Instant::now() + pause);
            pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
        }
    }
}
