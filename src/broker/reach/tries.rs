//! The tries within one `--connect-timeout`, and the pauses between them.

use crate::{
    broker::errors::ConnectError,
    exit::Failure,
    report::{HumanDuration, Reminder},
};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Pauses double, and vary at random by up to a half, so that a thousand pods don't reconnect at once.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

pub(in crate::broker) struct Tries {
    pub(in crate::broker) deadline: Instant,
    limit: Duration,
    pause: Duration,
    previous: Option<Failure>,
    reminder: Reminder,
}

impl Tries {
    pub(in crate::broker) fn new(limit: Duration) -> Self {
        Self {
            deadline: Instant::now() + limit,
            limit,
            pause: FIRST_PAUSE,
            previous: None,
            reminder: Reminder::new(Duration::ZERO),
        }
    }

    /// Pauses before the next try. Fails if the error is permanent, or the time is up.
    pub(in crate::broker) async fn pause_after(&mut self, error: ConnectError) -> Result<(), Failure> {
        let failure = error.failure;
        if !error.transient {
            return Err(failure);
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Report the previous failure: this one was cut short by the deadline.
            let failure = self.previous.take().unwrap_or(failure);
            return Err(self.time_is_up(failure));
        }
        if self.reminder.take_due() {
            tracing::warn!("{failure}; trying again for up to {}", HumanDuration(left));
        } else {
            tracing::debug!("{failure}; trying again");
        }
        let pause = self.pause.mul_f64(1.0 - fastrand::f64() / 2.0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        sleep(pause.min(left)).await;
        if pause >= left {
            return Err(self.time_is_up(failure));
        }
        self.previous = Some(failure);
        Ok(())
    }

    fn time_is_up(&self, failure: Failure) -> Failure {
        let message = format!("gave up after {} (--connect-timeout): {}", HumanDuration(self.limit), failure.message);
        Failure { message, ..failure }
    }
}
