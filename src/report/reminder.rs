//! Log lines about what takes long: the first after ten seconds, unless [`Reminder::new`] is given another time, each
//! next one after twice the time.

use super::HumanDuration;
use std::{fmt, future::Future, pin::pin, time::Duration};
use tokio::time::Instant;

const FIRST_REMINDER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Reminder {
    since: Instant,
    next: Duration,
}

impl Default for Reminder {
    fn default() -> Self {
        Self::new(FIRST_REMINDER)
    }
}

impl Reminder {
    pub fn new(first: Duration) -> Self {
        Self { since: Instant::now(), next: first }
    }

    /// Whether it is due. If so, it isn't due again before the next time.
    pub fn take_due(&mut self) -> bool {
        let due = self.since.elapsed() >= self.next;
        if due {
            self.advance();
        }
        due
    }

    fn advance(&mut self) {
        self.next = (self.since.elapsed() * 2).max(FIRST_REMINDER);
    }

    /// Waits until it is due. Returns the time since the start.
    pub async fn due(&mut self) -> Duration {
        tokio::time::sleep_until(self.since + self.next).await;
        self.advance();
        self.since.elapsed()
    }
}

pub async fn with_reminders<T>(what: impl fmt::Display, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut reminder = Reminder::default();
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            waited = reminder.due() => tracing::info!("still {what}, for {} now", HumanDuration(waited)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::Said;

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_said_with_what_is_waited_for() {
        let (said, _guard) = Said::listen();
        with_reminders("waiting for godot", tokio::time::sleep(Duration::from_secs(9))).await;
        assert!(said.lines().is_empty());
        with_reminders("waiting for godot", tokio::time::sleep(Duration::from_secs(90))).await;
        assert_eq!(
            said.lines(),
            ["10s", "20s", "40s", "1m 20s"].map(|time| format!("still waiting for godot, for {time} now"))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn reminders_come_at_growing_intervals() {
        let mut reminder = Reminder::new(Duration::from_secs(30));
        let mut at = Vec::new();
        for _ in 0..4 {
            at.push(reminder.due().await.as_secs());
        }
        assert_eq!(at, [30, 60, 120, 240]);
    }
}
