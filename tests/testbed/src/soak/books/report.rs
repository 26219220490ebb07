//! Checks the books.

use super::super::standstill::{Table, Window};
use super::{Books, Crash, End, Run, What};
use std::collections::BTreeMap;

/// The most messages that may be delivered again after a success, for each fault that separates nodes.
const PARTED_MAX: usize = 2;

/// The result of a soak.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first line.
    pub(in super::super) title: String,
    /// The number of faults, by name.
    pub(super) faults: BTreeMap<&'static str, u32>,
    /// Messages that the broker has confirmed.
    pub(super) published: usize,
    /// Unconfirmed messages that arrived nevertheless.
    pub(super) stowaways: usize,
    /// Messages that have left the queue.
    pub(super) gone: usize,
    /// Successes: exits 0, and messages that a worker with `--count` has logged as acknowledged.
    pub(super) claims: usize,
    /// Workers, by how they ended.
    pub(super) by_end: BTreeMap<String, usize>,
    /// Exits 75.
    pub(super) unknown: usize,
    /// Messages done by a worker that exited with 75, but whose acknowledgement did arrive.
    pub(super) unknown_but_gone: usize,
    pub(in super::super) killed: usize,
    /// Deliveries that reached a worker only after another one had done the message.
    pub(super) late: usize,
    /// Workers that got a second delivery, so that the first one was lost: 75.
    pub(super) second: usize,
    /// Successes whose message was delivered again because the broker crashed at that moment.
    pub(super) excused: Vec<String>,
    /// Successes whose message was delivered again because the queue's leader had lost contact with the worker's node.
    /// A quorum queue then requeues the message and silently drops a later acknowledgement (RabbitMQ 4.0 and 4.3): no
    /// client can know.
    pub(super) parted: Vec<String>,
    /// Everything that must not happen.
    pub(in super::super) failures: Vec<String>,
    /// How long work stood still, for each fault of a cluster.
    pub(super) standstills: Table,
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

    /// Whether it isn't known if the broker has got its acknowledgement.
    fn is_unclear(&self) -> bool {
        self.run.is_none_or(|run| matches!(run.end, End::Exited(75) | End::Signalled(9) | End::Hung))
    }
}

/// What is known about one message.
#[derive(Default)]
struct Message<'a> {
    /// In the order of their start.
    deliveries: Vec<Delivery<'a>>,
    /// The runs that claim success for it, and when.
    claims: Vec<(&'a Run, u64)>,
}

impl Report {
    /// Whether there are no failures.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    pub(in super::super) fn of(books: &Books) -> Self {
        let mut report = Self { faults: books.faults.clone(), ..Self::default() };
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
        self.fail(format!("run {} {what}; its log:\n{}", run.number, run.said));
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
            // The signal came before the first instruction, so there was no handler yet and no message was taken.
            End::Signalled(1 | 2 | 3 | 15) if run.said.trim().is_empty() => self.killed += 1,
            // No fault of the soak explains these statuses. 69 is fine, if a broker takes long to start.
            End::Exited(70) if run.said.contains("two connections were lost while a message") => {}
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

    /// Checks that a worker's command has done the messages for which the worker claims success.
    fn claims<'a>(&mut self, run: &'a Run, done: &[u64], messages: &mut BTreeMap<u64, Message<'a>>) {
        let acknowledged = run.acknowledged.len();
        let claimed = if run.count > 1 {
            if run.end == End::Exited(0) && acknowledged as u64 != run.count {
                let what = format!("exited with 0 after {acknowledged} of {} messages", run.count);
                self.fail_run(run, &what);
            }
            run.acknowledged.clone()
        } else if run.end == End::Exited(0) {
            // The exit 0 is the claim; the log must agree.
            if done.len() != 1 || (acknowledged != 1 && run.heard) {
                let what = format!("exited with 0 after {} successful commands", done.len());
                self.fail_run(run, &what);
            }
            done.iter().map(|message| (*message, run.at)).collect()
        } else {
            Vec::new()
        };
        for (message, at) in claimed {
            if !done.contains(&message) {
                let what = format!("claims success for message {message}, but its command hasn't done it");
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
                self.fail(format!("LOST: message {number} is gone, but no worker can have acknowledged it"));
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
            // A delivery after it was done; or an earlier one, if that worker has acknowledged the message later than
            // this one.
            let claimed_again = |it: &Delivery<'_>| {
                let mut later = message.claims.iter().filter(|(_, at)| at > claimed);
                later.any(|(run, _)| it.is_of(run.number))
            };
            let came_back =
                |it: &&Delivery<'_>| !it.is_of(claimer.number) && (it.started > finished || claimed_again(it));
            let later: Vec<_> = message.deliveries.iter().filter(came_back).collect();
            if later.is_empty() {
                continue;
            }
            // The delivery was late, on a connection that the broker had given up. If the message had been requeued, a
            // worker would have done it in the end.
            if later.iter().all(|it| it.done.is_none()) && books.left == 0 {
                self.late += 1;
                continue;
            }
            let whom: Vec<_> = later.iter().map(|it| it.run.map(|run| (run.number, run.end))).collect();
            let text = format!(
                "message {number} was delivered again after run {} had exited with 0, to run {whom:?}{}",
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
                self.fail(format!("FALSE SUCCESS: {text}, at {claimed}; the first run's log:\n{}", claimer.said));
            }
        }
    }

    /// Checks that as many messages have left the queue as were acknowledged.
    fn balance(&mut self, books: &Books, messages: &BTreeMap<u64, Message<'_>>) {
        let arrived = messages
            .iter()
            .filter(|(number, message)| !books.confirmed.contains(number) && !message.deliveries.is_empty());
        self.published = books.confirmed.len();
        self.stowaways = arrived.count();
        let came = self.published + self.stowaways;
        let there = (books.left + books.dead) as usize;
        // The remaining ones may include unconfirmed messages that were never delivered.
        self.gone = came.saturating_sub(there);
        if there > came {
            self.fail(format!("{there} messages are still there, of {came}"));
        }
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
            let text = "too many messages were delivered again after a success, for the faults that separate nodes";
            self.fail(format!("{text}: {} in {parting} faults", self.parted.len()));
        }
        if self.gone < least || self.gone > most {
            self.fail(format!("the books don't balance: {} messages gone instead of {least} to {most}", self.gone));
        }
    }
}
