//! How long work stands still, for each fault.
//!
//! There are two figures for each fault, both measured from its beginning. *Nothing moved*: how long no worker got a
//! message, and none was acknowledged. *One worker*: the longest time in which a worker had no command running, but
//! waited for a message or for the confirmation of a settlement. All the time there were messages in the queue.

use super::books::{Books, Entry, Run, What};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// A fault and its time, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) fault: &'static str,
    pub(super) from: u64,
    /// When the cluster was whole again.
    pub(super) until: u64,
    /// Whether an acknowledgement may be lost between a worker's node and the queue's leader.
    pub(super) separates: bool,
}

/// A time in which nothing moved, or in which a worker stood still.
struct Phase<'a> {
    from: u64,
    until: u64,
    run: Option<&'a Run>,
}

/// The figures of one kind of fault, in nanoseconds, one for each fault.
#[derive(Clone, Debug, Default)]
struct Row {
    nothing_moved: Vec<u64>,
    one_worker: Vec<u64>,
    /// How long until the cluster was whole again.
    faults: Vec<u64>,
    /// The warning of the worker that stood still the longest.
    said: String,
}

/// The rows, by fault.
#[derive(Clone, Debug, Default)]
pub(super) struct Table(BTreeMap<&'static str, Row>);

impl Table {
    pub(super) fn of(books: &Books) -> Self {
        let mut table = Self::default();
        if books.windows.is_empty() {
            return table;
        }
        let gaps = gaps(books);
        let mut entries: BTreeMap<u64, Vec<Entry>> = BTreeMap::new();
        for entry in &books.entries {
            entries.entry(entry.run).or_default().push(*entry);
        }
        let own = |run: &Run| entries.remove(&run.number).unwrap_or_default();
        let with_own = books.runs.iter().zip(books.runs.iter().map(own));
        let pauses: Vec<_> = with_own.flat_map(|(run, own)| pauses(run, &own)).collect();
        for (index, window) in books.windows.iter().enumerate() {
            // From the next fault on, standing still is counted for that one.
            let next = books.windows.get(index + 1);
            let end = next.map_or(u64::MAX, |next| next.from);
            let row = table.0.entry(window.fault).or_default();
            let known = row.one_worker.iter().max().copied().unwrap_or_default();
            let (nothing, _) = longest(&gaps, window, end);
            let (one, who) = longest(&pauses, window, end);
            row.faults.push(window.until - window.from);
            row.nothing_moved.push(nothing);
            row.one_worker.push(one);
            if let Some(run) = who
                && one > known
            {
                let mut lines = run.said.lines();
                let warning = lines.find(|line| line.contains("warning: "));
                let warning = warning.unwrap_or("no warning");
                row.said = format!("run {}, {:?}: {warning}", run.number, run.end);
            }
        }
        table
    }
}

/// The longest phase in the window, counted from the fault's beginning, and its worker.
fn longest<'a>(phases: &[Phase<'a>], window: &Window, end: u64) -> (u64, Option<&'a Run>) {
    phases
        .iter()
        .filter(|phase| phase.from < window.until && phase.until > window.from)
        .map(|phase| (phase.until.min(end) - phase.from.max(window.from), phase.run))
        .max_by_key(|(length, _)| *length)
        .unwrap_or_default()
}

/// The times between two successive events, in which a message is taken or acknowledged.
fn gaps(books: &Books) -> Vec<Phase<'static>> {
    let starts = books.entries.iter().filter(|it| it.what == What::Start);
    let acknowledged = books.runs.iter().flat_map(|run| &run.acknowledged);
    let mut moved: Vec<u64> = starts.map(|it| it.at).collect();
    moved.extend(acknowledged.map(|(_, at)| at));
    moved.sort_unstable();
    let pairs = moved.windows(2);
    let gap = |pair: &[u64]| Phase { from: pair[0], until: pair[1], run: None };
    pairs.map(gap).collect()
}

/// The times in which a worker had no command running. Leaves out the time after a failure, whose moment isn't known.
fn pauses<'a>(run: &'a Run, entries: &[Entry]) -> Vec<Phase<'a>> {
    let own = entries.iter().map(|it| (it.at, it.what != What::Start));
    let mut events: Vec<(u64, bool)> = own.collect();
    events.extend(run.acknowledged.iter().map(|(_, at)| (*at, true)));
    events.push((run.at, false));
    events.sort_unstable();
    let mut phases = Vec::new();
    let mut since = Some(run.started);
    for (at, stands_still_after) in events {
        if let Some(from) = since {
            phases.push(Phase { from, until: at, run: Some(run) });
        }
        since = stands_still_after.then_some(at);
    }
    phases
}

impl Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        writeln!(
            formatter,
            "  {:<44} {:>5} {:>14} {:>14} {:>14}   warning of the slowest worker",
            "seconds: median / longest", "times", "fault", "nothing moved", "one worker"
        )?;
        for (fault, row) in &self.0 {
            writeln!(
                formatter,
                "  {fault:<44} {:>5} {:>14} {:>14} {:>14}   {}",
                row.faults.len(),
                both(&row.faults),
                both(&row.nothing_moved),
                both(&row.one_worker),
                row.said
            )?;
        }
        Ok(())
    }
}

/// Median and longest, in seconds.
fn both(nanoseconds: &[u64]) -> String {
    let mut sorted = nanoseconds.to_vec();
    sorted.sort_unstable();
    let seconds = |at: usize| sorted.get(at).map_or(0.0, |it| *it as f64 / 1e9);
    format!("{:.1} / {:.1}", seconds(sorted.len() / 2), seconds(sorted.len() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::books::End;

    const SECOND: u64 = 1_000_000_000;

    fn run(number: u64, started: u64, at: u64, acknowledged: &[(u64, u64)]) -> Run {
        let second = |(message, at): &(u64, u64)| (*message, at * SECOND);
        Run {
            number,
            started: started * SECOND,
            end: End::Exited(0),
            at: at * SECOND,
            count: 1,
            acknowledged: acknowledged.iter().map(second).collect(),
            heard: true,
            said: format!("qconsume: warning: of {number}\nlast of {number}\n"),
        }
    }

    #[test]
    fn a_command_that_runs_is_no_standstill_and_what_was_before_the_fault_is_not_counted() {
        let mut books = Books {
            windows: vec![Window { fault: "cut", from: 10 * SECOND, until: 20 * SECOND, separates: false }],
            // Run 1 waits from 4 to 16. Run 2's command runs from 6 to 19, then it waits for the confirmation until 22.
            runs: vec![run(1, 4, 17, &[(1, 17)]), run(2, 5, 22, &[(2, 22)]), run(3, 30, 60, &[])],
            ..Books::default()
        };
        let entry = |at: u64, rest: &str| format!("{} {rest}\n", at * SECOND);
        let text = [entry(16, "1 1 start"), entry(17, "1 1 done"), entry(6, "2 2 start"), entry(19, "2 2 done")];
        books.read(&text.concat()).unwrap();
        let table = Table::of(&books);
        let row = &table.0["cut"];
        assert_eq!(row.one_worker, [6 * SECOND]);
        assert_eq!(row.nothing_moved, [6 * SECOND]);
        assert_eq!(row.faults, [10 * SECOND]);
        assert_eq!(row.said, "run 1, Exited(0): qconsume: warning: of 1");
    }

    #[test]
    fn what_stands_still_when_the_next_fault_begins_is_that_fault_s() {
        let window =
            |from: u64, fault| Window { fault, from: from * SECOND, until: (from + 1) * SECOND, separates: false };
        let books = Books {
            windows: vec![window(10, "first"), window(20, "second")],
            runs: vec![run(1, 10, 25, &[])],
            ..Books::default()
        };
        let table = Table::of(&books);
        assert_eq!(table.0["first"].one_worker, [10 * SECOND]);
        assert_eq!(table.0["second"].one_worker, [5 * SECOND]);
    }
}
