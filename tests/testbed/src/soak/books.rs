//! The books: what was published, what the commands wrote, how each worker ended; and the judgement about it.

mod print;

use super::standstill::{Table, Window};
use anyhow::{Context, Error, Result};
use clap::ValueEnum;
use std::collections::{BTreeMap, BTreeSet};

/// So long after an exit 0 a broker's crash may still bring the message back, or so long before one, in nanoseconds.
pub(super) const CRASH_WINDOW: u64 = 1_000_000_000;

/// The same for a classic queue, which writes acknowledgements down when it confirms a message or has nothing to do
/// (RabbitMQ 3.10's rabbit_queue_index); under load both may take some seconds.
pub(super) const CRASH_WINDOW_CLASSIC: u64 = 10 * CRASH_WINDOW;

/// For each fault that parts the nodes, so many messages at most may come back after a success.
const PARTED_MAX: usize = 2;

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

/// What the books come to, as the soak prints it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first line.
    pub(super) title: String,
    /// Faults by name.
    faults: BTreeMap<&'static str, u32>,
    /// Messages published for certain.
    published: usize,
    /// Of those that were published without a confirmation, the ones that arrived.
    stowaways: usize,
    /// Messages that have left the queue.
    gone: usize,
    /// Claims of success: exits 0, and what a worker with a count said it has acknowledged.
    claims: usize,
    /// Workers by the way they ended.
    by_end: BTreeMap<String, usize>,
    /// 75s.
    unknown: usize,
    /// Messages done by a worker that ended with 75, whose acknowledgement had arrived after all.
    unknown_but_gone: usize,
    /// Workers that were killed.
    pub(super) killed: usize,
    /// A delivery that reached a worker only after somebody else had done the message (75, of course).
    late: usize,
    /// Workers that were delivered another message while they had one, so the first one was requeued: 75.
    second: usize,
    /// Exits 0 whose message came back because the broker crashed at that moment.
    excused: Vec<String>,
    /// Exits 0 whose message came back because the queue's leader had lost sight of the worker's node while it had the
    /// message. A quorum queue requeues it then, and drops the acknowledgement that comes later without a word (RabbitMQ
    /// 4.0 and 4.3): no client can know.
    parted: Vec<String>,
    /// What must not be.
    pub(super) failures: Vec<String>,
    /// How long work stood still, by the fault of a cluster.
    standstills: Table,
}

/// A command that was started for a message.
struct Delivery<'a> {
    run: Option<&'a Run>,
    started: u64,
    /// When it succeeded.
    done: Option<u64>,
}

impl Delivery<'_> {
    fn is_of(&self, number: u64) -> bool {
        self.run.is_some_and(|run| run.number == number)
    }

    /// Whether nobody knows what the broker has heard of it.
    fn is_unclear(&self) -> bool {
        self.run
            .is_none_or(|run| matches!(run.end, End::Exited(75) | End::Signalled(9) | End::Hung))
    }
}

/// What is known of one message.
#[derive(Default)]
struct Message<'a> {
    /// In the order of their start.
    deliveries: Vec<Delivery<'a>>,
    /// Who claims to have done it, and since when.
    claims: Vec<(&'a Run, u64)>,
}

impl Report {
    /// Whether nothing was found that must not be.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    pub(super) fn of(books: &Books) -> Self {
        let mut report = Self {
            faults: books.faults.clone(),
            ..Self::default()
        };
        let runs: BTreeMap<u64, &Run> = books.runs.iter().map(|run| (run.number, run)).collect();
        let all = (1..=books.published).map(|number| (number, Message::default()));
        let mut messages: BTreeMap<u64, Message<'_>> = all.collect();
        let mut entries = books.entries.clone();
        entries.sort_by_key(|entry| entry.at);
        let mut done: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for entry in &entries {
            match (entry.what, messages.get_mut(&entry.message)) {
                (What::Bad, _) => report.fail(format!("run {} got a damaged message", entry.run)),
                (_, None) => report.fail(format!("message {} was never published", entry.message)),
                (What::Start, Some(message)) => message.deliveries.push(Delivery {
                    run: runs.get(&entry.run).copied(),
                    started: entry.at,
                    done: None,
                }),
                (What::Done, Some(message)) => {
                    done.entry(entry.run).or_default().push(entry.message);
                    let mut deliveries = message.deliveries.iter_mut();
                    if let Some(delivery) = deliveries.rfind(|it| it.is_of(entry.run)) {
                        delivery.done = Some(entry.at);
                    }
                }
            }
        }
        for run in &books.runs {
            report.count(run);
            let done = done.get(&run.number).map_or(&[][..], Vec::as_slice);
            report.claims(run, done, &mut messages);
        }
        for (number, message) in &messages {
            report.judge(*number, message, books);
        }
        report.balance(books, &messages);
        report.standstills = Table::of(books);
        report
    }

    fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    fn fail_run(&mut self, run: &Run, what: &str) {
        self.fail(format!("run {} {what}; it said\n{}", run.number, run.said));
    }

    fn count(&mut self, run: &Run) {
        let name = match run.end {
            End::Exited(status) => format!("exit {status}"),
            End::Signalled(signal) => format!("signal {signal}"),
            End::Hung => "hung".to_owned(),
        };
        match run.end {
            End::Exited(75) => self.unknown += 1,
            End::Signalled(9) => self.killed += 1,
            // Its signal came before its first instruction, so there was no handler yet and nothing was taken.
            End::Signalled(1 | 2 | 3 | 15) if run.said.trim().is_empty() => self.killed += 1,
            // Its own troubles that no fault of the soak explains; 69 is explained by a broker that takes long to start.
            End::Exited(64 | 70 | 77 | 78 | 126 | 127) | End::Signalled(_) | End::Hung => {
                self.fail_run(run, &format!("ended with {name}"));
            }
            End::Exited(_) => {}
        }
        if run.said.contains("delivered another message") {
            self.second += 1;
        }
        *self.by_end.entry(name).or_default() += 1;
    }

    /// What a worker claims to have done must have been done by its command.
    fn claims<'a>(
        &mut self,
        run: &'a Run,
        done: &[u64],
        messages: &mut BTreeMap<u64, Message<'a>>,
    ) {
        let acknowledged = run.acknowledged.len();
        let claimed = if run.count > 1 {
            if run.end == End::Exited(0) && acknowledged as u64 != run.count {
                let what = format!("exited with 0 after {acknowledged} of {}", run.count);
                self.fail_run(run, &what);
            }
            run.acknowledged.clone()
        } else if run.end == End::Exited(0) {
            // Its exit 0 is the claim; what it said must be the same.
            if done.len() != 1 || acknowledged != 1 {
                let what = format!("exited with 0 and {} successful commands", done.len());
                self.fail_run(run, &what);
            }
            done.iter().map(|message| (*message, run.at)).collect()
        } else {
            Vec::new()
        };
        for (message, at) in claimed {
            if !done.contains(&message) {
                let what = format!("claims message {message}, but no command of its has done it");
                self.fail_run(run, &what);
            }
            self.claims += 1;
            if let Some(message) = messages.get_mut(&message) {
                message.claims.push((run, at));
            }
        }
    }

    fn judge(&mut self, number: u64, message: &Message<'_>, books: &Books) {
        if message.deliveries.is_empty() {
            if books.confirmed.contains(&number) && books.left == 0 {
                self.fail(format!("LOST: message {number} was never delivered"));
            }
            return;
        }
        if message.claims.is_empty() {
            let done = message.deliveries.iter().filter(|it| it.done.is_some());
            if !done.clone().any(Delivery::is_unclear) && books.left == 0 {
                self.fail(format!(
                    "LOST: message {number} is gone, but no worker can have acknowledged it"
                ));
            }
            let unknown = |run: &Run| run.end == End::Exited(75);
            if done.filter_map(|it| it.run).any(unknown) {
                self.unknown_but_gone += 1;
            }
        }
        for (claimer, claimed) in &message.claims {
            let mut deliveries = message.deliveries.iter();
            let own = deliveries.rfind(|it| it.is_of(claimer.number));
            let Some((taken, finished)) = own.and_then(|own| Some((own.started, own.done?))) else {
                continue;
            };
            // After it was done; or before, and somebody else has acknowledged it after that, so it was no longer this worker's.
            let claimed_again = |it: &Delivery<'_>| {
                let mut later = message.claims.iter().filter(|(_, at)| at > claimed);
                later.any(|(run, _)| it.is_of(run.number))
            };
            let came_back = |it: &&Delivery<'_>| {
                !it.is_of(claimer.number) && (it.started > finished || claimed_again(it))
            };
            let later: Vec<_> = message.deliveries.iter().filter(came_back).collect();
            if later.is_empty() {
                continue;
            }
            // A delivery can linger on a connection that the broker has given up; the message isn't back in the queue, or
            // somebody would have done it in the end.
            if later.iter().all(|it| it.done.is_none()) && books.left == 0 {
                self.late += 1;
                continue;
            }
            let whom: Vec<_> = later
                .iter()
                .map(|it| it.run.map(|run| (run.number, run.end)))
                .collect();
            let text = format!(
                "message {number} came back after run {} had exited with 0, to run {whom:?}{}",
                claimer.number,
                books.timeline([taken, finished, *claimed, later[0].started])
            );
            let undoes = |crash: &&Crash| {
                crash.after >= finished
                    && *claimed <= crash.after + books.crash_window
                    && crash.before <= claimed + books.crash_window
            };
            let parted = |window: &Window| {
                let until = window.until + books.crash_window;
                window.separates && window.from <= *claimed && taken <= until
            };
            if let Some(crash) = books.crashes.iter().find(undoes) {
                self.excused.push(format!("{text}: {}", crash.name));
            } else if books.windows.iter().any(parted) {
                self.parted.push(text);
            } else {
                self.fail(format!(
                    "FALSE SUCCESS: {text}, at {claimed}; the first said\n{}",
                    claimer.said
                ));
            }
        }
    }

    /// As many messages have left the queue as somebody has acknowledged.
    fn balance(&mut self, books: &Books, messages: &BTreeMap<u64, Message<'_>>) {
        let arrived = messages.iter().filter(|(number, message)| {
            !books.confirmed.contains(number) && !message.deliveries.is_empty()
        });
        self.published = books.confirmed.len();
        self.stowaways = arrived.count();
        self.gone = self.published + self.stowaways - (books.left + books.dead) as usize;
        if books.left > 0 {
            self.fail(format!("{} messages are left in the queue", books.left));
        }
        if books.dead > 0 {
            self.fail(format!("{} messages were dead-lettered", books.dead));
        }
        for leftover in &books.leftovers {
            self.fail(format!("left behind: {leftover}"));
        }
        let most = self.claims + self.unknown + self.killed;
        let least = self.claims - self.excused.len() - self.parted.len();
        let parting = books.windows.iter().filter(|it| it.separates).count();
        if self.parted.len() > PARTED_MAX * parting {
            let text = "more messages than that came back after a success, in so many faults that part the nodes";
            self.fail(format!("{} of {parting}: {text}", self.parted.len()));
        }
        if self.gone < least || self.gone > most {
            self.fail(format!(
                "the books don't balance: {} messages gone, not from {least} to {most}",
                self.gone
            ));
        }
    }
}

#[cfg(test)]
mod tests;
