//! How far a run is: on a terminal one line that is rewritten each second, elsewhere a log line now and then.

use crate::{
    broker::Confirms,
    report::{HumanDuration, Reminder, counted, show_progress},
};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How often the terminal's line is rewritten.
const INTERVAL: Duration = Duration::from_secs(1);

/// How much there is to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Total {
    Messages(u64),
    Bytes(u64),
}

pub(super) struct Progress {
    on_terminal: bool,
    /// `None` if it is known only at the end.
    total: Option<Total>,
    started: Instant,
    /// When the next log line is due.
    reminder: Reminder,
    /// When the terminal's line was last written, and how many messages were confirmed then.
    last: (Instant, u64),
}

impl Progress {
    pub(super) fn new(on_terminal: bool, total: Option<Total>) -> Self {
        let now = Instant::now();
        Self { on_terminal, total, started: now, reminder: Reminder::default(), last: (now, 0) }
    }

    /// Waits until the next report is due.
    pub(super) async fn due(&mut self) {
        if self.on_terminal {
            sleep_until(self.last.0 + INTERVAL).await;
        } else {
            self.reminder.due().await;
        }
    }

    /// Reports how many messages are confirmed.
    pub(super) fn show(&mut self, confirms: &Confirms) {
        let confirmed = confirms.confirmed();
        if self.on_terminal {
            let rate = confirmed.saturating_sub(self.last.1) as f64 / self.last.0.elapsed().as_secs_f64();
            // One more byte for each line's newline.
            show_progress(&line(confirmed, rate as u64, confirms.bytes + confirms.answered, self.total));
            self.last = (Instant::now(), confirmed);
        } else {
            let (time, messages) = (HumanDuration(self.started.elapsed()), counted(confirmed, "message", "messages"));
            tracing::info!("still publishing, for {time} now: {messages} confirmed");
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
