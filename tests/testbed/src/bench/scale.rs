//! Messages a second and their cost, by the number of workers: a process for each message compared with `--drain`.

use super::page::Results;
use super::table::Unit::Time;
use super::table::{Table, thousands};
use super::{Bench, Work, median, plot, process, settled};
use anyhow::Result;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

/// For each mode and number of workers.
const ROUNDS: usize = 3;

/// Messages for each drainer, on average. It is the same in all rows, so that a message's share of a start is the same.
const DRAINED: usize = 16;

/// With fewer workers than this the broker is often idle, and a message costs it more.
const BUSY: usize = 8;

/// The results for one mode and number of workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    /// Messages a second.
    pub(super) rate: f64,
    /// The broker's processor time for a message, in seconds.
    pub(super) broker: f64,
    /// The workers' and their commands' processor time for a message, in seconds.
    pub(super) worker: f64,
}

/// The results of both modes with the same number of workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) workers: usize,
    pub(super) one_message: Figures,
    pub(super) drain: Figures,
}

impl Bench {
    pub(super) fn scale(&self, results: &mut Results) -> Result<()> {
        let sizes: &[usize] = if self.quick { &[1, 8] } else { &[1, 8, 64, 256, 1024] };
        let points = sizes.iter().map(|workers| self.point(*workers));
        let points = points.collect::<Result<Vec<_>>>()?;
        let text = format!("{}\n{}\n{}", table(&points), self.method(), advice(&points));
        results.blocks.push(("scale", text));
        results.plot = Some(plot::draw(&points));
        Ok(())
    }

    /// Medians over the rounds, in which the two modes are measured in turn.
    fn point(&self, workers: usize) -> Result<Point> {
        eprintln!("bench: {workers} workers, {ROUNDS} rounds");
        let (mut one_message, mut drain) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            one_message.push(self.figures(workers, false)?);
            drain.push(self.figures(workers, true)?);
        }
        Ok(Point { workers, one_message: medians(&one_message), drain: medians(&drain) })
    }

    /// The fewest messages in a round.
    fn enough(&self) -> usize {
        if self.quick { 100 } else { 500 }
    }

    /// The page's paragraph about the number of messages.
    fn method(&self) -> String {
        let enough = self.enough();
        format!(
            "For one message a process, a round has {enough} messages, or two for each worker if that is more. For `--drain`, \
             it has {DRAINED} for each worker, so that in every row {DRAINED} messages share a start. If a round has less \
             than {enough}, the same number of workers starts again with another such queue, until it has {enough} or \
             more.\n"
        )
    }

    /// One round: fills queues, then lets workers empty one after the other; it lasts until the last worker has ended.
    fn figures(&self, workers: usize, drain: bool) -> Result<Figures> {
        let work = Work { drain, ..self.near() };
        let enough = self.enough();
        let (queues, messages, runs) = if drain {
            let messages = DRAINED * workers;
            (enough.div_ceil(messages), messages, workers)
        } else {
            let messages = enough.max(2 * workers);
            (1, messages, messages)
        };
        let queues: Vec<_> = (0..queues).map(|_| self.broker.queue("bench")).collect();
        for queue in &queues {
            queue.publish_all(vec![&work.body; messages]);
        }
        let before = (process::broker_cpu(&self.broker)?, process::children_cpu()?);
        let started = Instant::now();
        for queue in &queues {
            at_a_time(workers, runs, || {
                let command = work.command(&self.programs.qconsume, queue.name());
                process::succeeded(process::spawn(command)?)
            })?;
        }
        let wall = started.elapsed().as_secs_f64();
        // Checking one queue costs the broker little; checking the others would distort the figures of few workers.
        queues.last().map_or(Ok(()), settled)?;
        let after = (process::broker_cpu(&self.broker)?, process::children_cpu()?);
        queues.iter().try_for_each(settled)?;
        let messages = (messages * queues.len()) as f64;
        Ok(Figures {
            rate: messages / wall,
            broker: (after.0 - before.0) / messages,
            worker: (after.1 - before.1) / messages,
        })
    }
}

/// Does all the runs, as many at a time as there are workers; after an error it starts no more.
fn at_a_time(workers: usize, runs: usize, run: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let begun = AtomicUsize::new(0);
    thread::scope(|scope| {
        let worker = || {
            while begun.fetch_add(1, Relaxed) < runs {
                run().inspect_err(|_| begun.store(runs, Relaxed))?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let mut ends = workers.into_iter().map(thread::ScopedJoinHandle::join);
        ends.try_for_each(|end| end.expect("a worker doesn't panic"))
    })
}

fn medians(rounds: &[Figures]) -> Figures {
    let of = |value: fn(&Figures) -> f64| median(&rounds.iter().map(value).collect::<Vec<_>>());
    Figures { rate: of(|it| it.rate), broker: of(|it| it.broker), worker: of(|it| it.worker) }
}

fn table(points: &[Point]) -> String {
    let mut table = Table::new(&[
        "workers",
        "one message a process: messages/s",
        "… broker's processor",
        "… worker's processor",
        "`--drain`: messages/s",
        "… broker's processor",
        "… worker's processor",
    ]);
    for point in points {
        let mut cells = vec![thousands(point.workers as f64)];
        for figures in [point.one_message, point.drain] {
            cells.push(thousands(figures.rate));
            cells.extend([figures.broker, figures.worker].map(hundredths));
        }
        table.row(cells);
    }
    table.text()
}

/// Seconds, written as milliseconds.
fn hundredths(seconds: f64) -> String {
    format!("{:.2} ms", seconds * 1e3)
}

/// The page's advice which mode to use, by the figures of one worker and the broker's highest figures.
fn advice(points: &[Point]) -> String {
    let [first, ..] = points else {
        return String::new();
    };
    let wall = |figures: Figures| Time.write(1.0 / figures.rate);
    let more = Time.write(1.0 / first.one_message.rate - 1.0 / first.drain.rate);
    let busy = points.iter().filter(|point| point.workers >= BUSY);
    let dearest = |of: fn(&Point) -> f64| busy.clone().map(of).fold(0.0, f64::max);
    let one_message = dearest(|it| it.one_message.broker);
    let drain = dearest(|it| it.drain.broker);
    let rate = thousands((0.1 / one_message).round() * 10.0);
    format!(
        "- **Use one pod for each message when a task takes about ten seconds or more, and `--drain` when it takes less.** \
         A pod takes one to two seconds to start ([Kubernetes](kubernetes.md)). That is 10 to 20 % of ten seconds. \
         A process of its own adds only {more} to a message: one worker takes {} for a message, and {} with `--drain`.\n\
         - **Use `--drain` also when all workers together do more than about {rate} messages a second.** This is by the \
         broker's processor time alone. With {BUSY} workers or more, one message a process costs the broker up to {} a message, \
         so {rate} a second would keep one processor busy. The table's rates are of a broker that shares its machine with the \
         workers. With `--drain`, a message costs the broker up to {}.\n",
        wall(first.one_message),
        wall(first.drain),
        hundredths(one_message),
        hundredths(drain),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::ensure;
    use std::time::Duration;

    #[test]
    fn the_advice_has_the_figures_of_the_run() {
        let figures = |rate, broker| Figures { rate, broker, worker: 0.004 };
        let point = |workers, rate, broker| Point {
            workers,
            one_message: figures(rate, broker),
            drain: figures(rate * 5.0, broker / 10.0),
        };
        let text = advice(&[point(1, 100.0, 0.003), point(8, 150.0, 0.0025), point(1024, 200.0, 0.002)]);
        for expected in [
            "only 8.0 ms to",
            "takes 10.0 ms for a message, and 2.0 ms with",
            "more than about 400 messages a second",
            "up to 2.50 ms a message, so 400 a second",
            "costs the broker up to 0.25 ms.",
        ] {
            assert!(text.contains(expected), "{expected} isn't in {text}");
        }
    }

    #[test]
    fn all_runs_are_done() {
        let begun = AtomicUsize::new(0);
        at_a_time(3, 10, || {
            begun.fetch_add(1, Relaxed);
            Ok(())
        })
        .unwrap();
        assert_eq!(begun.into_inner(), 10);
    }

    #[test]
    fn a_failure_is_told_and_ends_the_other_workers() {
        let (begun, started) = (AtomicUsize::new(0), Instant::now());
        let error = at_a_time(3, 1 << 40, || {
            ensure!(begun.fetch_add(1, Relaxed) > 0, "it fails");
            ensure!(started.elapsed() < Duration::from_secs(60), "it goes on");
            Ok(())
        });
        assert!(error.is_err());
        assert!(started.elapsed() < Duration::from_secs(60), "it went on");
    }
}
