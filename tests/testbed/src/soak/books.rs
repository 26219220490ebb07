//! The books, the soak's record: what was published, what the commands wrote, and how each worker ended.

mod print;
mod report;

pub use report::Report;

use super::standstill::Window;
use anyhow::{Context, Error, Result};
use clap::ValueEnum;
use std::collections::{BTreeMap, BTreeSet};

/// In nanoseconds: if a broker crashes less than this before or after an exit 0, the message may be requeued.
pub(super) const CRASH_WINDOW: u64 = 1_000_000_000;

/// The same for a classic queue. It writes acknowledgements to the disk when it confirms a message or is idle (RabbitMQ
/// 3.10's rabbit_queue_index); under load, that may take some seconds.
pub(super) const CRASH_WINDOW_CLASSIC: u64 = 10 * CRASH_WINDOW;

/// A line that a command has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) run: u64,
    message: u64,
    pub(super) what: What,
}

/// What a command has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum What {
    /// It has started with its message.
    Start,
    /// It has succeeded.
    Done,
    /// It got a damaged message.
    Bad,
}

impl Entry {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let mut word = || words.next().context("a line of the book is too short");
        Ok(Self {
            at: word()?.parse()?,
            run: word()?.parse()?,
            message: word()?.parse()?,
            what: What::from_str(word()?, true).map_err(Error::msg)?,
        })
    }
}

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With this status.
    Exited(u8),
    /// By this signal; SIGKILL came from the soak.
    Signalled(i32),
    /// It didn't end in time, and was killed.
    Hung,
}

/// One run of a worker.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) number: u64,
    /// When it was started.
    pub(super) started: u64,
    pub(super) end: End,
    /// When it ended.
    pub(super) at: u64,
    /// How many messages it may take (`--count`).
    pub(super) count: u64,
    /// The messages that its log says were acknowledged, and when.
    pub(super) acknowledged: Vec<(u64, u64)>,
    /// Whether its whole log was read in time. If nobody read it for a while, lines may come late or never.
    pub(super) heard: bool,
    /// Its log, for the report of a failure.
    pub(super) said: String,
}

/// A fault that may undo an exit 0 right before it, as it may lose the acknowledgement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crash {
    pub(super) name: &'static str,
    /// The time just before it.
    pub(super) before: u64,
    /// The time just after it.
    pub(super) after: u64,
}

/// Everything that was recorded.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    /// The last message that was published; unconfirmed ones may have arrived or not.
    pub(super) published: u64,
    /// The messages that the broker has confirmed.
    pub(super) confirmed: BTreeSet<u64>,
    pub(super) runs: Vec<Run>,
    pub(super) entries: Vec<Entry>,
    /// When a node was killed, frozen or cut off.
    pub(super) crashes: Vec<Crash>,
    /// [`CRASH_WINDOW`] or [`CRASH_WINDOW_CLASSIC`].
    pub(super) crash_window: u64,
    /// The faults of a cluster, and when it was whole again.
    pub(super) windows: Vec<Window>,
    /// The number of faults, by name.
    pub(super) faults: BTreeMap<&'static str, u32>,
    /// The number of faults of the broker.
    pub(super) broker_faults: u32,
    /// Processes that still ran long after their worker had ended.
    pub(super) leftovers: Vec<String>,
    /// The messages in the queue at the end.
    pub(super) left: u32,
    /// The messages that were dead-lettered; there should be none.
    pub(super) dead: u32,
}

impl Books {
    pub(super) fn read(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            self.entries.push(Entry::parse(line)?);
        }
        Ok(())
    }
}

impl Books {
    /// The history of a requeued message, in seconds since the beginning of a cluster's fault.
    fn timeline(&self, [taken, done, claimed, back]: [u64; 4]) -> String {
        let Some(window) = self.windows.iter().rfind(|it| it.from <= back) else {
            return String::new();
        };
        let after = |at: u64| (at as f64 - window.from as f64) / 1e9;
        format!(
            " ({}, which took {:.3} s: taken at {:.3}, done at {:.3}, acknowledged at {:.3}, redelivered at {:.3})",
            window.fault,
            after(window.until),
            after(taken),
            after(done),
            after(claimed),
            after(back)
        )
    }
}

#[cfg(test)]
mod tests;
