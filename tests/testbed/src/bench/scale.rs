//! Messages a second and what they cost, by the number of workers: a process for each message beside `--drain`.

use super::page::Results;
use super::table::Unit::Time;
use super::table::{Table, thousands};
use super::{Bench, Work, median, plot, process, settled};
use anyhow::Result;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

/// What so many workers do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    /// Messages a second.
    pub(super) rate: f64,
    /// The broker's processor time a message, in seconds.
    pub(super) broker: f64,
    /// The workers' processor time a message, with their commands', in seconds.
    pub(super) worker: f64,
}

/// Both modes, with the same number of workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) workers: usize,
    pub(super) one_message: Figures,
    pub(super) drain: Figures,
}

impl Bench {
    pub(super) fn scale(&self, results: &mut Results) -> Result<()> {
        let sizes: &[usize] = if self.quick {
            &[1, 8]
        } else {
            &[1, 8, 64, 256, 1024]
        };
        let points = sizes.iter().map(|workers| self.point(*workers));
        let points = points.collect::<Result<Vec<_>>>()?;
        let text = format!("{}\n{}", table(&points), advice(&points));
        results.blocks.push(("scale", text));
        results.plot = Some(plot::draw(&points));
        Ok(())
    }

    /// Medians over the rounds, in which the two modes are measured in turn.
    fn point(&self, workers: usize) -> Result<Point> {
        let rounds = self.rounds(3);
        eprintln!("bench: {workers} workers, {rounds} rounds");
        let (mut one_message, mut drain) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            one_message.push(self.figures(workers, false)?);
            drain.push(self.figures(workers, true)?);
        }
        Ok(Point {
            workers,
            one_message: medians(&one_message),
            drain: medians(&drain),
        })
    }

    /// One round: the queue is filled, then the workers start, and it lasts until the last one has ended.
    fn figures(&self, workers: usize, drain: bool) -> Result<Figures> {
        let work = Work {
            drain,
            ..self.near()
        };
        let queue = self.broker.queue("bench");
        // Some seconds each. Drainers share what it takes to start them, so each gets several messages.
        let (few, full, each) = if drain {
            (200, 2000, 16)
        } else {
            (100, 1000, 2)
        };
        let messages = if self.quick { few } else { full }.max(each * workers);
        let runs = if drain { workers } else { messages };
        queue.publish_all(vec![&work.body; messages]);
        let before = (process::broker_cpu(&self.broker)?, process::children_cpu()?);
        let started = Instant::now();
        at_a_time(workers, runs, || {
            let command = work.command(&self.programs.qconsume, queue.name());
            process::succeeded(process::spawn(command)?)
        })?;
        let wall = started.elapsed().as_secs_f64();
        settled(&queue)?;
        let messages = messages as f64;
        Ok(Figures {
            rate: messages / wall,
            broker: (process::broker_cpu(&self.broker)? - before.0) / messages,
            worker: (process::children_cpu()? - before.1) / messages,
        })
    }
}

/// Does all the runs, so many at a time.
fn at_a_time(workers: usize, runs: usize, run: impl Fn() -> Result<()> + Sync) -> Result<()> {
    let begun = AtomicUsize::new(0);
    thread::scope(|scope| {
        let worker = || {
            while begun.fetch_add(1, Relaxed) < runs {
                run()?;
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
    Figures {
        rate: of(|it| it.rate),
        broker: of(|it| it.broker),
        worker: of(|it| it.worker),
    }
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

/// Seconds, as milliseconds.
fn hundredths(seconds: f64) -> String {
    format!("{:.2} ms", seconds * 1e3)
}

/// When to use which, with the figures of one worker and of the most.
fn advice(points: &[Point]) -> String {
    let [first, .., last] = points else {
        return String::new();
    };
    let wall = |figures: Figures| Time.write(1.0 / figures.rate);
    let more = Time.write(1.0 / first.one_message.rate - 1.0 / first.drain.rate);
    let most = |figures: Figures| thousands((0.1 / figures.broker).round() * 10.0);
    format!(
        "**Use one pod for each message when a task takes about ten seconds or more, and `--drain` when it takes less:** \
         a pod takes one to two seconds to start ([Kubernetes](kubernetes.md)), which is 10 to 20 % of such a task; the {more} \
         that a process of its own adds to a message are little beside that (one worker takes {} for a message, and {} with \
         `--drain`). **Use `--drain` also when all workers together do more than about {} messages a second:** with {} \
         workers, one message a process costs the broker {} of processor time, so that is what one of its processors can do; \
         with `--drain` a message costs {}, and the same processor does about {} a second.\n",
        wall(first.one_message),
        wall(first.drain),
        most(last.one_message),
        thousands(last.workers as f64),
        hundredths(last.one_message.broker),
        hundredths(last.drain.broker),
        most(last.drain),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_has_the_figures_of_the_run() {
        let figures = |rate, broker| Figures {
            rate,
            broker,
            worker: 0.004,
        };
        let point = |workers, rate, broker| Point {
            workers,
            one_message: figures(rate, broker),
            drain: figures(rate * 5.0, broker / 10.0),
        };
        let text = advice(&[point(1, 100.0, 0.003), point(1024, 200.0, 0.0025)]);
        for expected in [
            "the 8.0 ms that",
            "takes 10.0 ms for a message, and 2.0 ms with",
            "more than about 400 messages a second",
            "with 1,024 workers, one",
            "the broker 2.50 ms of",
            "message costs 0.25 ms, and",
            "about 4,000 a second",
        ] {
            assert!(text.contains(expected), "{expected} isn't in {text}");
        }
    }

    #[test]
    fn all_runs_are_done_and_a_failure_is_told() {
        let begun = AtomicUsize::new(0);
        at_a_time(3, 10, || {
            begun.fetch_add(1, Relaxed);
            Ok(())
        })
        .unwrap();
        assert_eq!(begun.into_inner(), 10);
        assert!(at_a_time(3, 10, || anyhow::bail!("it fails")).is_err());
    }
}
