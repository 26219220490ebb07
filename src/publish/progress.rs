//! The line that a terminal shows while a run takes longer than a second: how many messages are confirmed, of how many.

use crate::report::{counted, show_progress};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// How often the line is written again.
const INTERVAL: Duration = Duration::from_secs(1);

/// How much there is to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Total {
    Messages(u64),
    Bytes(u64),
}

pub(super) struct Progress {
    /// `None` if it isn't known before the end.
    total: Option<Total>,
    /// When the line was last written, and how many messages were confirmed then.
    last: (Instant, u64),
}

impl Progress {
    pub(super) fn new(total: Option<Total>) -> Self {
        Self { total, last: (Instant::now(), 0) }
    }

    pub(super) async fn due(&self) {
        sleep_until(self.last.0 + INTERVAL).await;
    }

    /// Shows how many messages, and how many bytes of the input, are confirmed.
    pub(super) fn show(&mut self, messages: u64, bytes: u64) {
        let (since, before) = self.last;
        let rate = messages.saturating_sub(before) as f64 / since.elapsed().as_secs_f64();
        show_progress(&line(messages, bytes, rate as u64, self.total));
        self.last = (Instant::now(), messages);
    }
}

fn line(messages: u64, bytes: u64, rate: u64, total: Option<Total>) -> String {
    let confirmed = match total {
        Some(Total::Messages(total)) => format!("{messages} of {} confirmed", counted(total, "message", "messages")),
        _ => format!("{} confirmed", counted(messages, "message", "messages")),
    };
    match total {
        Some(Total::Bytes(total)) => format!("{confirmed}, {rate}/s, {}", of_bytes(bytes.min(total), total)),
        _ => format!("{confirmed}, {rate}/s"),
    }
}

fn of_bytes(done: u64, total: u64) -> String {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, size)| total >= *size) {
        Some((name, size)) => {
            format!("{:.1} of {:.1} {name}", done as f64 / size as f64, total as f64 / size as f64)
        }
        None => format!("{done} of {total} bytes"),
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
            (2, 9, Some(Total::Bytes(13)), "2 messages confirmed, 7/s, 9 of 13 bytes"),
            // The last line needs no newline.
            (2, 14, Some(Total::Bytes(13)), "2 messages confirmed, 7/s, 13 of 13 bytes"),
            (2, 1024, Some(Total::Bytes(2048)), "2 messages confirmed, 7/s, 1.0 of 2.0 KiB"),
            (2, 5 << 19, Some(Total::Bytes(5 << 20)), "2 messages confirmed, 7/s, 2.5 of 5.0 MiB"),
            (2, 1 << 30, Some(Total::Bytes(5 << 30)), "2 messages confirmed, 7/s, 1.0 of 5.0 GiB"),
        ] {
            assert_eq!(line(messages, bytes, 7, total), expected);
        }
    }
}
