//! The books: what was published, what the commands wrote, how each worker ended; and the judgement about it.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// So long after an exit 0 a broker's crash may still bring the message back, in nanoseconds.
pub(super) const CRASH_WINDOW: u64 = 1_000_000_000;

/// The same for a classic queue, which writes acknowledgements down when it confirms a message or has nothing to do
/// (RabbitMQ 3.10's rabbit_queue_index); under load both may take some seconds.
pub(super) const CRASH_WINDOW_CLASSIC: u64 = 10 * CRASH_WINDOW;

/// A line that a command has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    at: u64,
    run: u64,
    message: u64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Start,
    Done,
    Bad,
}

impl Entry {
    pub(super) const START: &str = "start";
    pub(super) const DONE: &str = "done";
    pub(super) const BAD: &str = "bad";

    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let mut word = || words.next().context("a line of the book is too short");
        Ok(Self {
            at: word()?.parse()?,
            run: word()?.parse()?,
            message: word()?.parse()?,
            what: match word()? {
                Self::START => What::Start,
                Self::DONE => What::Done,
                _ => What::Bad,
            },
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

/// Everything that was noted.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    /// What the broker has confirmed.
    pub(super) confirmed: Vec<u64>,
    /// What was published while the broker went away: it may be there or not.
    pub(super) unconfirmed: Vec<u64>,
    pub(super) runs: Vec<Run>,
    pub(super) entries: Vec<Entry>,
    /// When a broker was killed: from just before until just after.
    pub(super) kills: Vec<(u64, u64)>,
    /// How long before a kill an exit 0 may be undone by it.
    pub(super) crash_window: u64,
    /// Faults by name.
    pub(super) faults: BTreeMap<&'static str, u32>,
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

/// What the books come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    /// Messages published for certain.
    pub(super) published: usize,
    /// Of those that were published without a confirmation, the ones that arrived.
    pub(super) stowaways: usize,
    /// Messages that have left the queue.
    pub(super) gone: usize,
    /// Claims of success: exits 0, and what a worker with a count said it has acknowledged.
    pub(super) claims: usize,
    /// Commands that ran to success.
    pub(super) successes: usize,
    /// Messages by the number of their claims.
    pub(super) by_claims: BTreeMap<usize, usize>,
    /// Messages by the number of their successful commands.
    pub(super) by_successes: BTreeMap<usize, usize>,
    /// Workers by the way they ended.
    pub(super) by_end: BTreeMap<String, usize>,
    /// 75s.
    pub(super) unknown: usize,
    /// 75s after a successful command, whose acknowledgement had arrived after all.
    pub(super) unknown_but_gone: usize,
    /// Workers that were killed.
    pub(super) killed: usize,
    /// A delivery that reached a worker only after somebody else had done the message (75, of course).
    pub(super) late: usize,
    /// Exits 0 whose message came back because the broker crashed at that moment.
    pub(super) excused: Vec<String>,
    /// What must not be.
    pub(super) failures: Vec<String>,
}

/// What is known of one message.
#[derive(Default)]
struct Message<'a> {
    /// In the order of their start: the worker's run, when its command started, and when that succeeded.
    deliveries: Vec<(Option<&'a Run>, u64, Option<u64>)>,
    claims: Vec<(&'a Run, u64)>,
}

impl Findings {
    pub(super) fn of(books: &Books) -> Self {
        let mut findings = Self::default();
        let runs: BTreeMap<u64, &Run> = books.runs.iter().map(|run| (run.number, run)).collect();
        let mut messages: BTreeMap<u64, Message<'_>> = BTreeMap::new();
        for message in books.confirmed.iter().chain(&books.unconfirmed) {
            messages.entry(*message).or_default();
        }
        let mut entries = books.entries.clone();
        entries.sort_by_key(|entry| entry.at);
        let mut done: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for entry in &entries {
            let run = runs.get(&entry.run).copied();
            match entry.what {
                What::Bad => findings.fail(format!("run {} got a damaged message", entry.run)),
                What::Start => match messages.get_mut(&entry.message) {
                    Some(message) => message.deliveries.push((run, entry.at, None)),
                    None => {
                        findings.fail(format!("message {} was never published", entry.message));
                    }
                },
                What::Done => {
                    findings.successes += 1;
                    done.entry(entry.run).or_default().push(entry.message);
                    let same = |delivery: &&mut (Option<&Run>, u64, Option<u64>)| {
                        delivery.0.map(|run| run.number) == Some(entry.run)
                    };
                    let message = messages.get_mut(&entry.message);
                    if let Some(delivery) =
                        message.and_then(|message| message.deliveries.iter_mut().rev().find(same))
                    {
                        delivery.2 = Some(entry.at);
                    }
                }
            }
        }
        for run in &books.runs {
            findings.count(run);
            let done = done.get(&run.number).map_or(&[][..], Vec::as_slice);
            findings.claims(run, done, &mut messages);
        }
        for (number, message) in &messages {
            findings.judge(*number, message, books);
        }
        let arrived = |number: &&u64| {
            messages
                .get(number)
                .is_some_and(|m| !m.deliveries.is_empty())
        };
        findings.published = books.confirmed.len();
        findings.stowaways = books.unconfirmed.iter().filter(arrived).count();
        findings.gone =
            findings.published + findings.stowaways - (books.left + books.dead) as usize;
        if books.left > 0 {
            findings.fail(format!("{} messages are left in the queue", books.left));
        }
        if books.dead > 0 {
            findings.fail(format!("{} messages were dead-lettered", books.dead));
        }
        for leftover in &books.leftovers {
            findings.fail(format!("left behind: {leftover}"));
        }
        let most = findings.claims + findings.unknown + findings.killed;
        let least = findings.claims - findings.excused.len();
        if findings.gone < least || findings.gone > most {
            findings.fail(format!(
                "the books don't balance: {} messages gone, not from {least} to {most}",
                findings.gone
            ));
        }
        findings
    }

    fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    fn count(&mut self, run: &Run) {
        let name = match run.end {
            End::Exited(status) => format!("exit {status}"),
            End::Signalled(signal) => format!("signal {signal}"),
            End::Hung => "hung".to_owned(),
        };
        *self.by_end.entry(name).or_default() += 1;
        match run.end {
            End::Exited(75) => self.unknown += 1,
            End::Signalled(9) => self.killed += 1,
            End::Hung => self.fail(format!("run {} hung; it said\n{}", run.number, run.said)),
            // Its own troubles that no fault of the soak explains; 69 is explained by a broker that takes long to start.
            End::Exited(status @ (64 | 70 | 77 | 78 | 126 | 127)) => self.fail(format!(
                "run {} exited with {status}; it said\n{}",
                run.number, run.said
            )),
            // Its signal came before its first instruction, so there was no handler yet and nothing was taken.
            End::Signalled(1 | 2 | 3 | 15) if run.said.trim().is_empty() => self.killed += 1,
            End::Signalled(signal) => self.fail(format!(
                "run {} died of signal {signal}; it said\n{}",
                run.number, run.said
            )),
            End::Exited(_) => {}
        }
    }

    /// What a worker claims to have done must have been done by its command.
    fn claims<'a>(
        &mut self,
        run: &'a Run,
        done: &[u64],
        messages: &mut BTreeMap<u64, Message<'a>>,
    ) {
        let claimed = if run.count == 1 {
            match run.end {
                // Its exit 0 is the claim; what it said must be the same.
                End::Exited(0) => {
                    if done.len() != 1 || run.acknowledged.len() != 1 {
                        self.fail(format!(
                            "run {} exited with 0 and {} successful commands; it said\n{}",
                            run.number,
                            done.len(),
                            run.said
                        ));
                    }
                    done.iter().map(|message| (*message, run.at)).collect()
                }
                _ => Vec::new(),
            }
        } else {
            if run.end == End::Exited(0) && run.acknowledged.len() as u64 != run.count {
                self.fail(format!(
                    "run {} exited with 0 after {} of {} messages; it said\n{}",
                    run.number,
                    run.acknowledged.len(),
                    run.count,
                    run.said
                ));
            }
            run.acknowledged.clone()
        };
        for (message, at) in claimed {
            if !done.contains(&message) {
                self.fail(format!(
                    "run {} claims message {message}, but no command of its has done it; it said\n{}",
                    run.number, run.said
                ));
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
        *self.by_claims.entry(message.claims.len()).or_default() += 1;
        let done = |delivery: &&(Option<&Run>, u64, Option<u64>)| delivery.2.is_some();
        let successes = message.deliveries.iter().filter(done).count();
        *self.by_successes.entry(successes).or_default() += 1;
        let unclear = |run: Option<&Run>| {
            run.is_none_or(|run| matches!(run.end, End::Exited(75) | End::Signalled(9) | End::Hung))
        };
        if message.claims.is_empty() {
            let mut candidates = message.deliveries.iter().filter(done);
            if !candidates.any(|(run, ..)| unclear(*run)) && books.left == 0 {
                self.fail(format!(
                    "LOST: message {number} is gone, but no worker can have acknowledged it"
                ));
            }
            let mut unknown = message.deliveries.iter().filter(done);
            if unknown.any(|(run, ..)| run.is_some_and(|run| run.end == End::Exited(75))) {
                self.unknown_but_gone += 1;
            }
        }
        for (claimer, claimed) in &message.claims {
            let of_claimer = |delivery: &&(Option<&Run>, u64, Option<u64>)| {
                delivery.0.is_some_and(|run| run.number == claimer.number)
            };
            let own = message.deliveries.iter().rfind(of_claimer);
            let Some((_, _, Some(finished))) = own else {
                continue;
            };
            let later: Vec<_> = message
                .deliveries
                .iter()
                .filter(|(run, start, _)| {
                    start > finished && run.map(|run| run.number) != Some(claimer.number)
                })
                .collect();
            let Some(last) = later.last() else {
                continue;
            };
            // A delivery can linger on a connection that the broker has given up; who gets it so late ends with 75, and the
            // message isn't back in the queue.
            if later.iter().all(|(run, ..)| unclear(*run)) && last.2.is_none() {
                self.late += 1;
                continue;
            }
            let runs: Vec<String> = later
                .iter()
                .map(|(run, ..)| {
                    run.map_or("?".into(), |run| format!("{} ({:?})", run.number, run.end))
                })
                .collect();
            let text = format!(
                "message {number} came back after run {} had exited with 0, to run {}",
                claimer.number,
                runs.join(", ")
            );
            let crash = books.kills.iter().find(|(_, after)| after >= finished);
            let before = crash.map(|(before, _)| before.saturating_sub(*claimed));
            let text = match before {
                Some(before) => format!("{text}, {} ms before a crash", before / 1_000_000),
                None => text,
            };
            if let Some(before) = before
                && before <= books.crash_window
            {
                self.excused.push(text);
            } else {
                self.fail(format!(
                    "FALSE SUCCESS: {text}; the first said\n{}",
                    claimer.said
                ));
            }
        }
    }
}

/// What the soak prints.
#[derive(Clone, Debug)]
pub struct Report {
    pub(super) title: String,
    pub(super) faults: BTreeMap<&'static str, u32>,
    pub(super) findings: Findings,
}

impl Report {
    /// Whether nothing was found that must not be.
    pub fn passed(&self) -> bool {
        self.findings.failures.is_empty()
    }
}

impl Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.findings;
        let failed = |what: &str| {
            let failures = found.failures.iter();
            failures
                .filter(|text| text.starts_with(what))
                .count()
                .to_string()
        };
        let rows = [
            (
                "messages published",
                format!(
                    "{} (and {} without confirmation)",
                    found.published, found.stowaways
                ),
            ),
            ("messages gone", found.gone.to_string()),
            ("exits 0 (one a message)", found.claims.to_string()),
            ("75s", found.unknown.to_string()),
            (
                "  of these done and gone all the same",
                found.unknown_but_gone.to_string(),
            ),
            ("workers killed", found.killed.to_string()),
            ("workers by their end", list(&found.by_end)),
            ("faults", list(&self.faults)),
            ("commands run to success", found.successes.to_string()),
            ("messages by successful commands", list(&found.by_successes)),
            ("messages by exits 0", list(&found.by_claims)),
            (
                "deliveries that came late, on a dead connection",
                found.late.to_string(),
            ),
            (
                "exits 0 undone by a crash right after them",
                found.excused.len().to_string(),
            ),
            ("lost", failed("LOST")),
            ("false successes", failed("FALSE")),
        ];
        writeln!(formatter, "{}", self.title)?;
        for (name, value) in rows {
            writeln!(formatter, "  {name:<46} {value}")?;
        }
        for text in &found.excused {
            writeln!(formatter, "  excused: {text}")?;
        }
        for text in &found.failures {
            writeln!(formatter, "  FAILED: {text}")?;
        }
        let verdict = if self.passed() { "passed" } else { "FAILED" };
        writeln!(formatter, "  {verdict}")
    }
}

fn list<K: Display>(counts: &BTreeMap<K, impl Display>) -> String {
    let items: Vec<String> = counts
        .iter()
        .map(|(name, count)| format!("{name}: {count}"))
        .collect();
    items.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn run(number: u64, end: End, at: u64, acknowledged: &[(u64, u64)]) -> Run {
        Run {
            number,
            end,
            at,
            count: 1,
            acknowledged: acknowledged.to_vec(),
            said: String::new(),
        }
    }

    fn books(confirmed: &[u64], runs: Vec<Run>, text: &str) -> Books {
        let mut books = Books {
            confirmed: confirmed.to_vec(),
            runs,
            crash_window: CRASH_WINDOW,
            ..Books::default()
        };
        books.read(text).unwrap();
        books
    }

    #[test]
    fn one_success_a_message_balances() {
        let books = books(
            &[1],
            vec![
                run(1, End::Exited(3), 20, &[]),
                run(2, End::Exited(0), 40, &[(1, 40)]),
            ],
            "10 1 1 start 1\n30 2 1 start 2\n35 2 1 done 2\n",
        );
        let findings = Findings::of(&books);
        assert_eq!(findings.failures, Vec::<String>::new());
        assert_eq!((findings.gone, findings.claims), (1, 1));
    }

    #[test]
    fn a_message_that_nobody_has_done_is_lost() {
        let failed = books(
            &[1],
            vec![run(1, End::Exited(3), 20, &[])],
            "10 1 1 start 1\n",
        );
        assert!(Findings::of(&failed).failures[0].starts_with("LOST"));
        let never = books(&[1], vec![], "");
        assert!(Findings::of(&never).failures[0].starts_with("LOST"));
        let unknown = books(
            &[1],
            vec![run(1, End::Exited(75), 20, &[])],
            "10 1 1 start 1\n15 1 1 done 1\n",
        );
        assert_eq!(Findings::of(&unknown).failures, Vec::<String>::new());
        assert_eq!(Findings::of(&unknown).unknown_but_gone, 1);
    }

    #[test]
    fn an_exit_0_whose_message_came_back_is_false_unless_the_broker_crashed() {
        let mut twice = books(
            &[1],
            vec![
                run(1, End::Exited(0), 20, &[(1, 20)]),
                run(2, End::Exited(0), 40, &[(1, 40)]),
            ],
            "10 1 1 start 1\n15 1 1 done 1\n30 2 1 start 2\n35 2 1 done 2\n",
        );
        assert!(Findings::of(&twice).failures[0].starts_with("FALSE"));
        twice.kills.push((25, 27));
        assert_eq!(Findings::of(&twice).failures, Vec::<String>::new());
        assert_eq!(Findings::of(&twice).excused.len(), 1);
        twice.kills = vec![(20 + 2 * SECOND, 21 + 2 * SECOND)];
        assert!(Findings::of(&twice).failures[0].starts_with("FALSE"));
    }

    #[test]
    fn a_delivery_on_a_dead_connection_is_no_return() {
        let books = books(
            &[1],
            vec![
                run(1, End::Exited(0), 20, &[(1, 20)]),
                run(2, End::Exited(75), 40, &[]),
            ],
            "10 1 1 start 2\n15 1 1 done 2\n30 2 1 start 1\n",
        );
        let findings = Findings::of(&books);
        assert_eq!(findings.failures, Vec::<String>::new());
        assert_eq!(findings.late, 1);
    }

    #[test]
    fn an_exit_0_without_a_successful_command_is_false() {
        let books = books(
            &[1],
            vec![
                run(1, End::Exited(0), 20, &[]),
                run(2, End::Exited(0), 40, &[(1, 40)]),
            ],
            "10 1 1 start 1\n30 2 1 start 2\n35 2 1 done 2\n",
        );
        assert_eq!(Findings::of(&books).failures.len(), 1);
    }
}
