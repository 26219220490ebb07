//! How far a run is: on a terminal one line that is written again each second, elsewhere a log line now and then.

use crate::{
    broker::Tally,
    report::{HumanDuration, Reminder, counted, show_progress},
};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How often the terminal's line is written again.
const INTERVAL: Duration = Duration::from_secs(1);

/// How much there is to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Total {
    Messages(u64),
    Bytes(u64),
}

pub(super) struct Progress {
    on_terminal: bool,
    /// `None` if it isn't known before the end.
    total: Option<Total>,
    reminder: Reminder,
    /// When the terminal's line was last written, and how many messages were confirmed then.
    last: (Instant, u64),
}

impl Progress {
    pub(super) fn new(on_terminal: bool, total: Option<Total>) -> Self {
        Self { on_terminal, total, reminder: Reminder::default(), last: (Instant::now(), 0) }
    }

    /// Waits until it is time to say it.
    pub(super) async fn due(&mut self) -> Duration {
        if !self.on_terminal {
            return self.reminder.due().await;
        }
        sleep_until(self.last.0 + INTERVAL).await;
        self.last.0.elapsed()
    }

    /// Says how many messages are confirmed after this time: since the start in the log, since the last line on a terminal.
    pub(super) fn say(&mut self, after: Duration, tally: &Tally) {
        let confirmed = tally.confirmed();
        if self.on_terminal {
            let rate = confirmed.saturating_sub(self.last.1) as f64 / after.as_secs_f64();
            // Each line of the input has a separator, too.
            show_progress(&line(confirmed, rate as u64, tally.bytes + tally.answered, self.total));
            self.last = (Instant::now(), confirmed);
        } else {
            let (after, confirmed) = (HumanDuration(after), counted(confirmed, "message", "messages"));
            tracing::info!("still publishing, for {after} now: {confirmed} confirmed");
        }
    }
}

fn line(messages: u64, rate: u64, bytes: u64, total: Option<Total>) -> String {
    let counted = |number| counted(number, "message", "messages");
    match total {
        Some(Total::Messages(all)) => format!("{messages} of {} confirmed, {rate}/s", counted(all)),
        Some(Total::Bytes(all)) => {
            let (done, all) = (bytes.min(all) / 1024, all.div_ceil(1024));
            format!("{} confirmed, {rate}/s, {done} of {all} KiB", counted(messages))
        }
        None => format!("{} confirmed, {rate}/s", counted(messages)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_many_of_how_many_or_how_much() {
        for (messages, bytes, total, expected) in [
            (1, 9, None, "1 message confirmed, 7/s"),
            (2, 9, Some(Total::Messages(3)), "2 of 3 messages confirmed, 7/s"),
            (0, 0, Some(Total::Messages(1)), "0 of 1 message confirmed, 7/s"),
            (2, 9, Some(Total::Bytes(13)), "2 messages confirmed, 7/s, 0 of 1 KiB"),
            (2, 3000, Some(Total::Bytes(4097)), "2 messages confirmed, 7/s, 2 of 5 KiB"),
            // The last line may lack its newline.
            (2, 2049, Some(Total::Bytes(2048)), "2 messages confirmed, 7/s, 2 of 2 KiB"),
        ] {
            assert_eq!(line(messages, 7, bytes, total), expected);
        }
    }
}
