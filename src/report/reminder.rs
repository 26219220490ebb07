//! Log lines about what takes long, at growing intervals.

use std::{fmt, future::Future, pin::pin, time::Duration};
use tokio::time::Instant;

/// A duration, rounded for people: `250ms`, `1s 300ms`, `1m 30s`.
#[derive(Clone, Copy, Debug)]
pub struct HumanDuration(pub Duration);

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = if self.0 >= Duration::from_secs(60) {
            Duration::from_secs(self.0.as_secs_f64().round() as u64)
        } else if self.0 >= Duration::from_secs(1) {
            Duration::from_millis((self.0.as_secs_f64() * 10.0).round() as u64 * 100)
        } else {
            Duration::from_millis(u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX))
        };
        humantime::format_duration(shown).fmt(f)
    }
}

/// `1 message`, `2 messages`.
pub fn counted(number: u64, one: &str, several: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { several })
}

/// The first interval between two reminders. Each one is twice as long as the one before.
const FIRST_REMINDER: Duration = Duration::from_secs(10);

/// When to say that something takes long: after some time, and again at growing intervals.
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

    /// Whether it is due. If it is, this sets the next time.
    pub fn is_due(&mut self) -> bool {
        let due = self.since.elapsed() >= self.next;
        if due {
            self.next = (self.since.elapsed() * 2).max(FIRST_REMINDER);
        }
        due
    }

    /// Returns the time since the start.
    pub async fn due(&mut self) -> Duration {
        tokio::time::sleep_until(self.since + self.next).await;
        self.is_due();
        self.since.elapsed()
    }
}

/// Waits for `work`, and logs "still {what}" at growing intervals if it takes long.
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

    #[test]
    fn durations_for_people_are_short() {
        let shown = |seconds| HumanDuration(Duration::from_secs_f64(seconds)).to_string();
        assert_eq!(shown(0.25), "250ms");
        assert_eq!(shown(59.951), "1m");
        assert_eq!(shown(90.04), "1m 30s");
        assert_eq!(shown(480.1), "8m");
        assert_eq!(shown(3599.6), "1h");
        assert_eq!(shown(1.26), "1s 300ms");
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
