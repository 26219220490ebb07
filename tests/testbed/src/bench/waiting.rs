//! Many workers that wait: their memory, the broker's, and how long they take to reconnect to a broker that was killed.

use super::page::Results;
use super::table::Unit::{Memory, Time};
use super::table::{Table, quantile, thousands};
use super::{Bench, NOTICED, Work, median, process, settled};
use crate::{Broker, Queue, eventually};
use anyhow::{Result, ensure};
use std::net::TcpStream;
use std::process::Child;
use std::thread;
use std::time::Instant;

/// The number of workers for which the memory is extrapolated.
const EXTRAPOLATED: f64 = 5000.0;

/// How long a worker tries to reach the broker: as in the examples for Kubernetes.
const CONNECT_TIMEOUT: (&str, &str) = ("QCONSUME_CONNECT_TIMEOUT", "30m");

impl Bench {
    pub(super) fn waiting(&self, results: &mut Results) -> Result<()> {
        // A new broker: one that has served many workers keeps some of the memory.
        let broker = Broker::options().start()?;
        let processes = process::of_broker(&broker)?;
        let queue = broker.queue("bench");
        let work = Work { url: broker.url(), ..self.near() };
        let (mut crowd, mut points) = (Vec::new(), Vec::new());
        for quarter in [0, 1, 2, 4] {
            let size = self.crowd_size() / 4 * quarter;
            self.grow(&mut crowd, size, &work, &queue)?;
            let pids: Vec<_> = crowd.iter().map(Child::id).collect();
            points.push(Waiting {
                workers: size as f64,
                memory: process::memory(&pids)?,
                broker: process::memory(&processes)?,
            });
        }
        finish(crowd, &work, &queue)?;
        results.blocks.push(("waiting", memory_text(&points)));
        Ok(())
    }

    pub(super) fn reconnect(&self, results: &mut Results) -> Result<()> {
        let size = self.crowd_size();
        let rounds = if self.quick { 1 } else { 3 };
        let work = self.near();
        let queue = self.broker.queue("bench");
        let mut crowd = Vec::new();
        self.grow(&mut crowd, size, &work, &queue)?;
        eprintln!("bench: {size} lose their broker, {rounds} rounds");
        let mut outages = Vec::new();
        for _ in 0..rounds {
            let counted = self.outage(&queue, size)?;
            eprintln!("bench: all back after {:.1} s", back(&counted, size));
            outages.push(counted);
            for child in &mut crowd {
                let end = child.try_wait()?;
                ensure!(end.is_none(), "a worker gave up: {end:?}");
            }
        }
        finish(crowd, &work, &queue)?;
        results.blocks.push(("reconnect", outages_text(size, &outages)));
        Ok(())
    }

    fn crowd_size(&self) -> usize {
        if self.quick { 20 } else { 1000 }
    }

    /// Starts more workers, until `size` are waiting.
    fn grow(&self, crowd: &mut Vec<Child>, size: usize, work: &Work, queue: &Queue) -> Result<()> {
        eprintln!("bench: {size} that wait");
        crowd.extend(process::crowd(size - crowd.len(), || {
            let mut command = work.command(&self.programs.qconsume, queue.name());
            command.env(CONNECT_TIMEOUT.0, CONNECT_TIMEOUT.1);
            command
        })?);
        let waiting = eventually(NOTICED, || queue.consumers() as usize == size);
        ensure!(waiting, "only {} of {size} workers are waiting", queue.consumers());
        Ok(())
    }

    /// Kills the broker, starts it again, and counts its consumers until all are back.
    fn outage(&self, queue: &Queue, size: usize) -> Result<Counted> {
        self.broker.kill()?;
        thread::scope(|scope| {
            let start = scope.spawn(|| self.broker.start_again());
            let open = eventually(NOTICED, || TcpStream::connect(self.broker.addr()).is_ok());
            ensure!(open, "the broker's port is not open again");
            let opened = Instant::now();
            let mut counted = Vec::new();
            let back = eventually(NOTICED, || {
                // The port is open a moment before the broker answers.
                if let Ok(Some((_, consumers))) = self.broker.client().counts(queue.name()) {
                    counted.push((opened.elapsed().as_secs_f64(), consumers as usize));
                }
                counted.last().is_some_and(|(_, count)| *count == size)
            });
            start.join().expect("starting the broker doesn't panic")?;
            ensure!(back, "not all of {size} workers reconnected: {:?}", counted.last());
            Ok(counted)
        })
    }
}

/// Gives each worker a message, and waits until all have succeeded.
fn finish(crowd: Vec<Child>, work: &Work, queue: &Queue) -> Result<()> {
    queue.publish_all(vec![&work.body; crowd.len()]);
    crowd.into_iter().try_for_each(process::succeeded)?;
    settled(queue)
}

/// The memory with this number of workers, in bytes.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    workers: f64,
    memory: f64,
    broker: f64,
}

fn memory_text(points: &[Waiting]) -> String {
    let mut table = Table::new(&["workers that wait", "memory of all", "the broker's memory"]);
    for point in points {
        table.row(vec![thousands(point.workers), Memory.write(point.memory), Memory.write(point.broker)]);
    }
    let line = |value: fn(&Waiting) -> f64| {
        Line::through(&points.iter().map(|it| (it.workers, value(it))).collect::<Vec<_>>())
    };
    let (memory, broker) = (line(|it| it.memory), line(|it| it.broker));
    table.row(vec![
        format!("{} (extrapolated)", thousands(EXTRAPOLATED)),
        Memory.write(memory.at(EXTRAPOLATED)),
        Memory.write(broker.at(EXTRAPOLATED)),
    ]);
    format!(
        "{}\nEach further worker takes {} itself, and {} at the broker. These are the slopes of the straight lines through what was \
         measured (least squares), and the last row is on these lines. No measured value is further off its line than {:.1} % \
         and {:.1} % of the highest one.\n",
        table.text(),
        Memory.write(memory.slope),
        Memory.write(broker.slope),
        memory.off * 100.0,
        broker.off * 100.0,
    )
}

/// The straight line with the least squares.
struct Line {
    start: f64,
    slope: f64,
    /// The largest distance of a point from it, as a part of the highest value.
    off: f64,
}

impl Line {
    fn through(points: &[(f64, f64)]) -> Self {
        let count = points.len() as f64;
        let mean = |value: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(value).sum::<f64>() / count;
        let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
        let slope = mean(&|point| (point.0 - x) * (point.1 - y)) / mean(&|point| (point.0 - x).powi(2));
        let mut line = Self { start: y - slope * x, slope, off: 0.0 };
        let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);
        let off = points.iter().map(|point| (line.at(point.0) - point.1).abs());
        line.off = off.fold(0.0, f64::max) / highest;
        line
    }

    fn at(&self, x: f64) -> f64 {
        self.start + self.slope * x
    }
}

/// How many workers had a consumer again, and when, in seconds since the broker's port was open again.
type Counted = Vec<(f64, usize)>;

/// When this many workers were back.
fn back(counted: &Counted, wanted: usize) -> f64 {
    let reached = counted.iter().find(|(_, count)| *count >= wanted);
    reached.expect("all of them reconnected").0
}

/// The most workers that reconnected within one second.
fn peak(counted: &Counted) -> usize {
    let within_a_second = |(end, count): &(f64, usize)| {
        let before = counted.iter().rfind(|(start, _)| *start <= end - 1.0);
        // May be fewer than before, if a connection was lost again.
        count.saturating_sub(before.map_or(0, |(_, count)| *count))
    };
    counted.iter().map(within_a_second).max().unwrap_or_default()
}

fn outages_text(size: usize, outages: &[Counted]) -> String {
    let mut table = Table::new(&["since the broker's port was open again", "median", "lowest to highest"]);
    let shares = [
        ("the first worker is back".to_owned(), 1),
        ("half of them".to_owned(), size.div_ceil(2)),
        ("99 %".to_owned(), (size * 99).div_ceil(100)),
        (format!("all {}", thousands(size as f64)), size),
    ];
    for (what, wanted) in shares {
        let times: Vec<_> = outages.iter().map(|counted| back(counted, wanted)).collect();
        table.row(vec![
            what,
            Time.write(median(&times)),
            format!("{} to {}", Time.write(quantile(&times, 0.0)), Time.write(quantile(&times, 1.0))),
        ]);
    }
    let peak = outages.iter().map(peak).max().unwrap_or_default();
    format!(
        "{}\nAt most {} of them came back within one second. None of them has given up.\n",
        table.text(),
        thousands(peak as f64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_on_and_says_how_far_the_points_are_off_it() {
        let exact = Line::through(&[(0.0, 10.0), (250.0, 60.0), (1000.0, 210.0)]);
        assert!((exact.at(5000.0) - 1010.0).abs() < 1e-6 && exact.off < 1e-9);
        let line = Line::through(&[(0.0, 0.0), (1.0, 4.0), (2.0, 2.0)]);
        assert!((line.slope - 1.0).abs() < 1e-9, "{}", line.slope);
        assert!((line.off - 0.5).abs() < 1e-9, "{}", line.off);
    }

    #[test]
    fn an_outage_is_over_when_all_are_back() {
        let counted = vec![(0.1, 0), (0.5, 10), (1.2, 60), (1.6, 90), (3.0, 100)];
        assert_eq!([1, 50, 99].map(|wanted| back(&counted, wanted)), [0.5, 1.2, 3.0]);
        assert_eq!(peak(&counted), 80);
        assert_eq!(peak(&vec![(0.1, 5), (1.5, 3)]), 5);
    }
}
