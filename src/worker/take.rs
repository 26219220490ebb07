//! Waits for a message, over as many connections as it takes.

use crate::{
    broker::{Consumer, DeliveryLost, Message},
    cli::QconsumeOptions,
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

/// Waits for a message, over as many connections as it takes. Dropping the future loses none.
///
/// `None` when --wait has passed or, with --drain, the queue is empty.
pub(super) async fn take(consumer: &mut Consumer, options: &QconsumeOptions) -> Result<Option<Message>, Failure> {
    // `--drain` without `--wait` asks at once how full the queue is.
    let at_once = options.drain.then_some(Duration::ZERO);
    let limit = options.wait.or(at_once);
    let mut waited = Duration::ZERO;
    let (mut pause, mut failing_since) = (LOOK_AGAIN, Instant::now());
    loop {
        if !consumer.is_subscribed() {
            consumer.subscribe().await?;
            tracing::debug!("waiting for a message in queue {:?}", consumer.queue());
        }
        // Only time in which a message could have come counts.
        let subscribed = Instant::now();
        let left = limit.map(|limit| limit.saturating_sub(waited));
        match wait(consumer, left, options.drain).await {
            Ok(taken) => return Ok(taken),
            Err(lost) if lost.unreadable => return Err(lost.unreadable_in(consumer.queue())),
            Err(lost) => {
                consumer.check_queue_survives(&lost.to_string())?;
                // Lost as soon as it is there, again and again: no storm, and not for ever.
                if subscribed.elapsed() > LOOK_AGAIN_LONGEST {
                    (pause, failing_since) = (LOOK_AGAIN, Instant::now());
                } else if failing_since.elapsed() > options.broker.connect_timeout {
                    let limit = HumanDuration(options.broker.connect_timeout);
                    return Err(Failure::new(
                        Exit::Unavailable,
                        format!(
                            "every new connection was lost for {limit} (--connect-timeout), the last one so: {lost}"
                        ),
                    ));
                }
                tracing::warn!("while waiting for a message: {lost}; connecting again");
            }
        }
        waited += subscribed.elapsed();
        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
    }
}

/// Waits on one connection: for a message, until `limit` has passed, or with `drain` until the queue is empty then.
async fn wait(consumer: &mut Consumer, limit: Option<Duration>, drain: bool) -> Result<Option<Message>, DeliveryLost> {
    let mut look = limit.map(|limit| Instant::now() + limit);
    let mut pause = LOOK_AGAIN;
    let mut mention = Reminder::new(MENTION_WAIT);
    let mut held_up = Reminder::default();
    loop {
        tokio::select! {
            biased;
            message = consumer.next() => return message.map(Some),
            () = sleep_until_or_never(look) => {}
            waited = mention.due() => {
                tracing::info!("still waiting for a message in queue {:?}, for {} now", consumer.queue(), HumanDuration(waited));
                continue;
            }
        }
        if !drain {
            return consumer.cancel().await;
        }
        match consumer.depth().await? {
            Some(0) => return consumer.cancel().await,
            Some(ready) if held_up.is_due() => tracing::info!(
                "queue {:?} has {ready} ready messages, but the broker delivers none of them here: another consumer is the active one (single active consumer), or the queue is moving to another node",
                consumer.queue()
            ),
            None if held_up.is_due() => tracing::info!(
                "the broker can't say whether queue {:?} is empty: its leader doesn't answer",
                consumer.queue()
            ),
            _ => {}
        }
        look = Some(Instant::now() + pause);
        pause = (pause * 2).min(LOOK_AGAIN_LONGEST);
    }
}
