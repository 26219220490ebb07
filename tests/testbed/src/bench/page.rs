//! The table, and the page around it.

use super::{Bench, Pair};
use crate::exec;
use anyhow::Result;
use std::fs;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);

/// What is measured; says how it is written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    /// Seconds.
    Time,
    /// Bytes, of which only the first digits matter.
    Memory,
    /// Bytes, of which every one counts.
    Size,
}

impl Unit {
    fn write(self, value: f64) -> String {
        match self {
            Self::Time if value < 1.0 => format!("{:.1} ms", value * 1e3),
            Self::Time => format!("{value:.2} s"),
            Self::Memory if value < 10e6 => format!("{} KiB", thousands(value / 1024.0)),
            Self::Memory => format!("{:.1} MiB", value / 1024.0 / 1024.0),
            Self::Size => thousands(value),
        }
    }
}

/// A row of the table.
pub(super) struct Row {
    what: String,
    unit: Unit,
    amqp_consume: Option<f64>,
    qconsume: f64,
    ratio: Option<f64>,
    /// Of the rounds' ratios, the first and the third quartile.
    spread: Option<(f64, f64)>,
    goal: Option<Goal>,
}

enum Goal {
    /// At most so much of amqp-consume's.
    Ratio(f64),
    /// At most so much.
    Value(f64),
}

impl Row {
    /// Medians over the rounds, of their ratios too: each compares what ran within the same second.
    pub(super) fn new<T>(
        what: impl Into<String>,
        unit: Unit,
        rounds: &[Pair<T>],
        value: impl Fn(&T) -> f64,
    ) -> Self {
        let amqp_consume: Vec<_> = rounds
            .iter()
            .map(|pair| value(&pair.amqp_consume))
            .collect();
        let qconsume: Vec<_> = rounds.iter().map(|pair| value(&pair.qconsume)).collect();
        let ratios: Vec<_> = qconsume
            .iter()
            .zip(&amqp_consume)
            .map(|(ours, theirs)| ours / theirs)
            .collect();
        Self {
            what: what.into(),
            unit,
            amqp_consume: Some(median(&amqp_consume)),
            qconsume: median(&qconsume),
            ratio: Some(median(&ratios)),
            spread: Some((quantile(&ratios, 0.25), quantile(&ratios, 0.75))),
            goal: None,
        }
    }

    /// What needs no rounds.
    pub(super) fn single(what: &str, unit: Unit, amqp_consume: Option<f64>, qconsume: f64) -> Self {
        Self {
            what: what.to_owned(),
            unit,
            amqp_consume,
            qconsume,
            ratio: amqp_consume.map(|other| qconsume / other),
            spread: None,
            goal: None,
        }
    }

    /// The ratio is to be this at most.
    pub(super) fn goal(mut self, ratio: f64) -> Self {
        self.goal = Some(Goal::Ratio(ratio));
        self
    }

    /// qconsume's value is to be this at most.
    pub(super) fn limit(mut self, value: f64) -> Self {
        self.goal = Some(Goal::Value(value));
        self
    }

    fn cells(&self) -> [String; 7] {
        let (goal, met) = match self.goal {
            Some(Goal::Ratio(most)) => (
                format!("≤ {most:.2}"),
                self.ratio.map(|ratio| ratio <= most),
            ),
            Some(Goal::Value(most)) => (
                format!("≤ {}", self.unit.write(most)),
                Some(self.qconsume <= most),
            ),
            None => (String::new(), None),
        };
        let met = met.map_or("", |met| if met { "yes" } else { "no" });
        [
            self.what.clone(),
            self.amqp_consume
                .map(|value| self.unit.write(value))
                .unwrap_or_default(),
            self.unit.write(self.qconsume),
            self.ratio
                .map(|ratio| format!("{ratio:.3}"))
                .unwrap_or_default(),
            self.spread
                .map(|(low, high)| format!("{low:.2} to {high:.2}"))
                .unwrap_or_default(),
            goal,
            met.to_owned(),
        ]
    }
}

pub(super) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Between the two nearest values, if it falls between them.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = part * (sorted.len() - 1) as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let groups: Vec<_> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(String::from_utf8_lossy)
        .collect();
    groups.join(",")
}

/// In Markdown, and aligned, to be read on a terminal too.
pub(super) fn table(rows: &[Row]) -> String {
    let head = [
        "",
        "amqp-consume",
        "qconsume",
        "ratio",
        "quartiles",
        "goal",
        "met",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            lines
                .iter()
                .map(|cells| cells[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut table = String::new();
    for (index, cells) in lines.iter().enumerate() {
        for (cell, width) in cells.iter().zip(&widths) {
            table += &format!("| {cell:<width$} ");
        }
        table += "|\n";
        if index == 0 {
            for width in &widths {
                table += &format!("|-{:-<width$}-", "");
            }
            table += "|\n";
        }
    }
    table
}

/// The whole page.
pub(super) fn page(results: &str, bench: &Bench) -> Result<String> {
    let (major, minor, patch) = bench.broker.version();
    let said = |command: &mut Command| exec::run(command, LIMIT).map(|text| text.trim().to_owned());
    let date = said(Command::new("date").args(["-u", "+%F"]))?;
    let tools = said(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "amqp-tools"]))
        .unwrap_or_else(|_| "of an unknown version".to_owned());
    let qconsume = said(Command::new(&bench.programs.qconsume).arg("--version"))?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cpus = std::thread::available_parallelism()?;
    let rounds = &bench.rounds;
    Ok(format!(
        r#"<!-- Written by `make bench`; the words around the numbers are in tests/testbed/src/bench/page.rs. -->
# Beside amqp-consume

What qconsume costs compared with rabbitmq-c's amqp-consume, for the same message from the same queue to the same command.

{results}
Measured on {date}: {qconsume}, amqp-tools {tools}, RabbitMQ {major}.{minor}.{patch}, Linux {kernel} on {arch} with {cpus} processors.

## How to read it

Medians. The *ratio* is the median of each round's own, qconsume's to amqp-consume's: below 1 qconsume takes less. Half
of the rounds' ratios lie between the *quartiles*. A machine that does other things meanwhile makes the numbers larger, and the ratios
less so, as the two take turns, A B A B. The *goal* is what the ratio (for the binary, the bytes) should be at most.

- Both are given the same options, `--url URL -q QUEUE -c 1 cat`, and start the same way, with standard output and
  error to /dev/null. A run counts when it has ended with 0 and its message is gone for good. The queue is durable and
  classic, the messages persistent. Every round publishes what it needs and no more, so nobody sees another's message.
- **Time** is the wall clock's, from the start of the process to its end: {small} rounds of the small ones, {large} of 12 MiB, {huge} of
  128 MiB, {series} of 300 messages in one process, {crowds} of the {crowd} at once.
- **Processor** is user and system time, by getrusage(2), the command's included; *less `cat`'s* is without what `cat` takes by itself.
- **Memory** of one process is its own peak (`VmHWM` of proc(5), read as it exits), and what of it is no file's page
  (`RssAnon`) at its end; that of many is what they have together, shared pages counted once (the sum of `Pss`), while they
  wait for a message.
- *20 ms round trip* is by a proxy that lets everything arrive 10 ms later, each way, TCP's own handshake included.
- *TLS* is as the two agree with the broker, with a P-256 certificate, verified: `--cacert`.
- *Bytes added to an image* are those of the layer that `apt-get install -y --no-install-recommends amqp-tools` makes,
  and of the one file that `COPY --from=qconsume` brings.
- qconsume does more in the same time: it waits for the broker's word that the acknowledgement has arrived, and its
  connection has heartbeats. With `-c 300` amqp-consume takes everything that is in the queue at once, qconsume one message
  at a time; *both one at a time* has amqp-consume do the same, by `-p 1`.

## Where the rest goes

What keeps qconsume from the goals that it misses, and what of it could be had. The figures are of November 2026, with lapin
4.12, and come from callgrind, strace, smaps and getrusage(2).

- **One small message: time and processor.** Within their goals, the time by a little. The broker has half of the time, the
  command a quarter. Both of qconsume's threads stay on one CPU while a connection opens, as waking one on another CPU costs a
  virtual machine more than what it is woken for: without it the time is 7 % longer and the processor has 11 % more to do. The
  executable has a fixed address: otherwise there are 25 page faults more. What is left to gain is lapin's I/O thread, as with
  300 messages below: some 70 changes of thread, where amqp-consume has 13. Not to wait for `connection.close-ok` would save 4 % of
  the time; RabbitMQ then logs a warning for each connection, `client unexpectedly closed TCP connection`.
- **20 ms round trip.** Seven of them with TCP's own, where amqp-consume has nine: channel 1 is asked for behind
  `connection.open`, without waiting for its answer. With `basic.consume` behind it, too, it would be six, and the ratio 0.68. But
  then a message could be on its way to a connection that isn't open yet, and whoever is told to stop just then would have to
  wait for it, or leave it to be redelivered and counted.
- **Memory of one small message.** Nine tenths of it are pages of the executable, which the kernel maps 64 KiB at a time around
  each that is used, out of memory that all workers of a node share: a run executes 0.63 MB of 1.85 MB of code, and this is spread
  over 26 of the 29 pieces of 64 KiB. Without files' pages a worker has about 300 KiB: 112 of stack, as much as it takes to build
  a command line of more than fifty options, and 156 of heap and of lapin's thread. The 500 workers show what a node has to find for
  each. Another order of the functions, by use, would save up to 1 MB of mapped pages, and not a page of the node's memory.
- **Memory of 12 MiB.** The goal is 12.8 MiB, of which the body is 12, and the command isn't started before the body is complete.
  So 0.8 MiB would be left for everything else, which is less than either program has before it has connected. What lapin
  would take for reading, its ring of 32 frames (4 MiB), isn't used: the body is read past it, which lapin could do too.
- **300 messages in one process.** The next message is asked for when the last one is settled, as no message shall wait behind a
  running command while another worker is idle; this is a round trip through the queue for each. amqp-consume has all 300 on its side
  before the first command runs, and puts back what is left when it ends. With `-p 1` it waits in the same way, and over half of
  the difference is gone. What remains is lapin's I/O thread, through which everything passes that the queue and the main thread
  say to each other: 9 changes of thread for a message, where amqp-consume has 3. A lapin that polled its socket where
  the answers are waited for would save six of them.

## Again

With cargo, Docker (for the static binary and the images) and RabbitMQ as for the tests, as root on Debian or with amqp-tools installed:

```sh make
make bench
```

`BENCH_QCONSUME=path` measures a binary that is there already, and `BENCH=--quick` makes a few rounds only, to see that it
works, or `BENCH='--only small'` one part; both leave this page alone.
"#,
        kernel = kernel.trim(),
        arch = std::env::consts::ARCH,
        small = rounds.small,
        large = rounds.large,
        huge = rounds.huge,
        series = rounds.series,
        crowds = rounds.crowds,
        crowd = rounds.crowd,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quartiles_fall_between_values() {
        let values = [4.0, 1.0, 2.0, 3.0];
        assert_eq!(median(&values), 2.5);
        assert_eq!(quantile(&values, 0.25), 1.75);
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn values_are_written_with_their_units() {
        assert_eq!(Unit::Time.write(0.01234), "12.3 ms");
        assert_eq!(Unit::Time.write(1.5), "1.50 s");
        assert_eq!(Unit::Memory.write(1_638_400.0), "1,600 KiB");
        assert_eq!(Unit::Memory.write(13_107_200.0), "12.5 MiB");
        assert_eq!(Unit::Size.write(2_999_999.0), "2,999,999");
        assert_eq!(Unit::Size.write(999.0), "999");
    }

    #[test]
    fn a_row_has_the_medians_and_says_whether_its_goal_is_met() {
        let rounds = [(2.0, 1.0), (4.0, 3.0), (8.0, 9.0)].map(|(amqp_consume, qconsume)| Pair {
            amqp_consume,
            qconsume,
        });
        let row = |goal| {
            Row::new("a", Unit::Time, &rounds, |value| *value)
                .goal(goal)
                .cells()
        };
        let cells = [
            "a",
            "4.00 s",
            "3.00 s",
            "0.750",
            "0.62 to 0.94",
            "≤ 0.75",
            "yes",
        ];
        assert_eq!(row(0.75), cells);
        assert_eq!(row(0.74)[6], "no");
        let size = Row::single("b", Unit::Size, None, 3e6).limit(3e6).cells();
        assert_eq!(size, ["b", "", "3,000,000", "", "", "≤ 3,000,000", "yes"]);
    }
}
