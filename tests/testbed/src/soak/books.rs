//! The books: what was published, what the commands wrote, how each worker ended.

mod print;
mod report;

pub use report::Report;

use super::standstill::Window;
use anyhow::{Context, Error, Result};
use clap::ValueEnum;
use std::collections::{BTreeMap, BTreeSet};

/// So long after an exit 0 a broker's crash may still bring the message back, or so long before one, in nanoseconds.
pub(super) const CRASH_WINDOW: u64 = 1_000_000_000;

/// The same for a classic queue, which writes acknowledgements down when it confirms a message or has nothing to do
/// (RabbitMQ 3.10's rabbit_queue_index); under load both may take some seconds.
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
    /// It has begun with its message.
    Start,
    /// It has succeeded.
    Done,
    /// Its message was damaged.
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
    /// By this signal; KILL came from the soak.
    Signalled(i32),
    /// It didn't, and was killed for it.
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
    /// How many messages it may take.
    pub(super) count: u64,
    /// The messages that it said it has acknowledged, and when.
    pub(super) acknowledged: Vec<(u64, u64)>,
    /// Whether all that it said was heard: nobody read its log for a while, so some of it may come late or never.
    pub(super) heard: bool,
    /// All that it said, for the report of a failure.
    pub(super) said: String,
}

/// What may undo an exit 0 right before it, as the acknowledgement is still on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crash {
    pub(super) name: &'static str,
    /// Just before it.
    pub(super) before: u64,
    /// Just after it.
    pub(super) after: u64,
}

/// Everything that was noted.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    /// The last message that was published; what the broker hasn't confirmed may be there or not.
    pub(super) published: u64,
    /// What the broker has confirmed.
    pub(super) confirmed: BTreeSet<u64>,
    pub(super) runs: Vec<Run>,
    pub(super) entries: Vec<Entry>,
    /// When a node was killed, frozen or cut off.
    pub(super) crashes: Vec<Crash>,
    /// How long before a crash an exit 0 may be undone by it.
    pub(super) crash_window: u64,
    /// The faults of a cluster, and when it was whole again.
    pub(super) windows: Vec<Window>,
    /// Faults by name.
    pub(super) faults: BTreeMap<&'static str, u32>,
    /// Those of them that were the broker's.
    pub(super) broker_faults: u32,
    /// Processes that were still there long after their worker had ended.
    pub(super) leftovers: Vec<String>,
    /// What is in the queue at the end.
    pub(super) left: u32,
    /// What was dead-lettered, which nothing here asks for.
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
    /// What happened to a message that came back, in seconds after the beginning of a cluster's fault.
    fn timeline(&self, [taken, done, claimed, back]: [u64; 4]) -> String {
        let Some(window) = self.windows.iter().rfind(|it| it.from <= back) else {
            return String::new();
        };
        let after = |at: u64| (at as f64 - window.from as f64) / 1e9;
        format!(
            " ({}, which took {:.3} s: taken at {:.3}, done at {:.3}, acknowledged at {:.3}, back at {:.3})",
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
