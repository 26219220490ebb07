//! The one line that a terminal shows while messages are published.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// How often the line is written anew.
const INTERVAL: Duration = Duration::from_millis(250);

/// Cells of the bar.
const WIDTH: usize = 24;

/// Takes the line away, for another or for good.
const CLEAR: &str = "\r\x1b[K";

/// The line; nothing where standard error is no terminal.
pub(super) struct Progress {
    tick: Option<Interval>,
    since: Instant,
    shown: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        let shows = io::stderr().is_terminal() && tracing::enabled!(tracing::Level::INFO);
        let since = Instant::now();
        let tick = shows.then(|| {
            let mut tick = interval_at(since + INTERVAL, INTERVAL);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            tick
        });
        Self {
            tick,
            since,
            shown: false,
        }
    }

    /// When it is time to write the line anew.
    pub(super) async fn due(&mut self) {
        match &mut self.tick {
            Some(tick) => {
                tick.tick().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Writes it: how many are confirmed, and which share of everything that is, where that is known.
    pub(super) fn show(&mut self, confirmed: u64, share: Option<f64>) {
        let seconds = self.since.elapsed().as_secs_f64();
        let line = line(confirmed, share, seconds);
        let _ = io::stderr().write_all(format!("{CLEAR}{line}").as_bytes());
        self.shown = true;
    }

    /// Makes room for a log line.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = io::stderr().write_all(CLEAR.as_bytes());
        }
    }
}

fn line(confirmed: u64, share: Option<f64>, seconds: f64) -> String {
    let rate = (confirmed as f64 / seconds) as u64;
    let counts = format!("{confirmed} confirmed, {rate}/s");
    match share {
        Some(share) => {
            let share = share.clamp(0.0, 1.0);
            let full = (share * WIDTH as f64) as usize;
            let bar = format!("{}{}", "=".repeat(full), " ".repeat(WIDTH - full));
            format!("[{bar}] {:3.0} %  {counts}", (share * 100.0).floor())
        }
        None => counts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_much_and_how_fast() {
        assert_eq!(line(500, None, 2.0), "500 confirmed, 250/s");
        assert_eq!(
            line(500, Some(0.5), 2.0),
            "[============            ]  50 %  500 confirmed, 250/s"
        );
        assert_eq!(
            line(1, Some(2.0), 1.0),
            "[========================] 100 %  1 confirmed, 1/s"
        );
    }
}
