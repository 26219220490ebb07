//! The wait for a message, with `--wait`, `--drain` and new connections.

use crate::{
    broker::{Consumer, DeliveryLost, Message},
    cli::QconsumeOptions,
    clock::sleep_until_or_never,
    exit::{Exit, Failure},
    report::{HumanDuration, Reminder, counted},
};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Pauses before an empty-looking queue is checked again, or before another connection, double from `FIRST_PAUSE` to
/// `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection that was lost within this time was lost at once.
const AT_ONCE: Duration = Duration::from_secs(1);

/// After this long a wait for a message is logged for the first time.
const FIRST_REMINDER: Duration = Duration::from_secs(30);

/// `None` if --wait has passed or, with --drain, the queue is empty. Dropping the future loses no message.
pub(super) async fn take(consumer: &mut Consumer, options: &QconsumeOptions) -> Result<Option<Message>, Failure> {
    // `--drain` without `--wait` checks at once whether the queue is empty.
    let limit = options.wait.or(options.drain.then_some(Duration::ZERO));
    // Without the time spent connecting.
    let mut waited = Duration::ZERO;
    let (mut pause, mut failing_since) = (FIRST_PAUSE, None);
    let mut waiting_reminder = None;
    loop {
        if !consumer.is_ready() {
            consumer.subscribe().await?;
            tracing::debug!("waiting for a message in queue {:?}", consumer.queue());
        }
        let subscribed_at = Instant::now();
        let left = limit.map(|limit| limit.saturating_sub(waited));
        // From the first subscription on, so that a later one doesn't begin again.
        let reminder = waiting_reminder.get_or_insert_with(|| Reminder::new(FIRST_REMINDER));
        match wait(consumer, left, options.drain, reminder).await {
            Ok(taken) => return Ok(taken),
            Err(lost) => {
                if let Some(failure) = lost.end_of_run(consumer.queue()) {
                    return Err(failure);
                }
                consumer.check_queue_survives(&lost.to_string())?;
                // If every new connection is lost at once, slow down, and give up after --connect-timeout.
                if subscribed_at.elapsed() > AT_ONCE {
                    (pause, failing_since) = (FIRST_PAUSE, None);
                } else if failing_since.get_or_insert_with(Instant::now).elapsed() > options.broker.connect_timeout {
                    let given_up_after = HumanDuration(options.broker.connect_timeout);
                    return Err(Failure::new(
                        Exit::Unavailable,
                        format!(
                            "every new connection was lost for {given_up_after} (--connect-timeout); the last error: {lost}"
                        ),
                    ));
                }
                tracing::warn!("while waiting for a message: {lost}; connecting again");
            }
        }
        waited += subscribed_at.elapsed();
        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits on one connection, until `limit` has passed and, with `drain`, the queue is empty.
async fn wait(
    consumer: &mut Consumer,
    limit: Option<Duration>,
    drain: bool,
    waiting_reminder: &mut Reminder,
) -> Result<Option<Message>, DeliveryLost> {
    let mut check_at = limit.map(|limit| Instant::now() + limit);
    let mut pause = FIRST_PAUSE;
    let mut not_empty_reminder = Reminder::default();
    loop {
        tokio::select! {
            biased;
            message = consumer.next() => return message.map(Some),
            () = sleep_until_or_never(check_at) => {}
            waited = waiting_reminder.due() => {
                tracing::info!("still waiting for a message in queue {:?}, for {} now", consumer.queue(), HumanDuration(waited));
                continue;
            }
        }
        if !drain {
            return consumer.cancel().await;
        }
        match consumer.depth().await? {
            Some(0) => return consumer.cancel().await,
            Some(ready) if not_empty_reminder.take_due() => tracing::info!(
                "queue {:?} has {}, but the broker delivers none here: another consumer is the active one (single active consumer), or the queue is moving to another node; look at the queue's consumers on the management page",
                consumer.queue(),
                counted(ready.into(), "ready message", "ready messages")
            ),
            None if not_empty_reminder.take_due() => tracing::info!(
                "the broker can't say whether queue {:?} is empty: its leader doesn't answer",
                consumer.queue()
            ),
            _ => {}
        }
        check_at = Some(Instant::now() + pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
