//! Causes faults one after the other. Defines the faults of a single node, and of the network between it and the workers.

use super::Soak;
use super::books::Crash;
use super::command::now;
use crate::{Broker, Direction, Proxy};
use anyhow::Result;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// A fault of the broker.
#[derive(Clone, Copy)]
enum Fault {
    Kill,
    Stop,
    Restart,
    Freeze,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "broker killed",
            Self::Stop => "broker stopped for a while",
            Self::Restart => "broker restarted",
            Self::Freeze => "broker frozen",
        }
    }
}

impl Soak<'_> {
    /// Causes these faults of the broker or the cluster one after the other, with random pauses of `between`
    /// milliseconds, in which work gets done. `cause` returns when the fault is over, with a remark for the log.
    pub(super) fn cause_all<F: Copy>(
        &self,
        faults: &[F],
        name: fn(F) -> &'static str,
        between: Range<u64>,
        mut random: fastrand::Rng,
        mut cause: impl FnMut(F, &mut fastrand::Rng) -> Result<String>,
    ) -> Result<()> {
        for fault in faults {
            self.pause(Duration::from_millis(random.u64(between.clone())));
            if self.out_of_time() {
                return Ok(());
            }
            let begun = Instant::now();
            let more = cause(*fault, &mut random)?;
            let (published, ended) = self.note(|books| {
                *books.faults.entry(name(*fault)).or_default() += 1;
                books.broker_faults += 1;
                (books.confirmed.len(), books.runs.len())
            });
            eprintln!(
                "soak: {} s: {}{more}, over after {:.1} s; {published} messages published, {ended} workers ended",
                self.begun.elapsed().as_secs(),
                name(*fault),
                begun.elapsed().as_secs_f64(),
            );
        }
        Ok(())
    }

    /// Causes a fault that may undo an exit 0 right before it, and records when.
    pub(super) fn crash(&self, name: &'static str, what: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = now();
        what()?;
        let crash = Crash { name, before, after: now() };
        self.note(|books| books.crashes.push(crash));
        Ok(())
    }

    /// Breaks the broker `--faults` times.
    pub(super) fn break_broker(&self, broker: &Broker, mut random: fastrand::Rng) -> Result<()> {
        use Fault::{Freeze, Kill, Restart, Stop};
        // Each kind, in a random order. Freezing is the most frequent, as starting a node takes long.
        let kinds = [Freeze, Kill, Stop, Restart, Freeze, Freeze, Kill, Freeze, Freeze, Freeze];
        let faults = kinds.into_iter().cycle();
        let mut faults: Vec<_> = faults.take(self.options.faults as usize).collect();
        random.shuffle(&mut faults);
        self.cause_all(&faults, Fault::name, 500..3000, random, |fault, random| {
            let length = Duration::from_millis(random.u64(200..7000));
            match fault {
                Kill => {
                    self.crash(fault.name(), || broker.kill())?;
                    self.start(broker)?;
                }
                Stop => {
                    broker.stop()?;
                    self.pause(length / 2);
                    self.start(broker)?;
                }
                Restart => {
                    broker.stop()?;
                    self.start(broker)?;
                }
                Freeze => {
                    broker.freeze()?;
                    self.pause(length);
                    broker.thaw()?;
                }
            }
            Ok(String::new())
        })
    }

    /// Starts a node, if necessary twice: after a kill, its start sometimes hangs (seen with 3.10.8).
    fn start(&self, broker: &Broker) -> Result<()> {
        if broker.start_again().is_ok() {
            return Ok(());
        }
        self.note(|books| *books.faults.entry("start repeated").or_default() += 1);
        broker.kill()?;
        broker.start_again()
    }

    /// Breaks the network while the broker is being broken.
    pub(super) fn break_network(&self, proxy: &Proxy, mut random: fastrand::Rng) {
        if self.options.faults == 0 {
            // With slow answers, a command's end and the acknowledgement timeout can interleave in more ways.
            proxy.delay(Direction::ToClient, Duration::from_millis(5));
            return;
        }
        while !self.ending.load(Relaxed) && !self.out_of_time() {
            self.pause(Duration::from_millis(random.u64(500..3000)));
            let length = Duration::from_millis(random.u64(200..6000));
            let direction = if random.bool() { Direction::ToBroker } else { Direction::ToClient };
            let name = match random.u32(0..5) {
                0 | 1 => {
                    proxy.cut();
                    "connections cut"
                }
                2 => {
                    proxy.delay(direction, length / 10);
                    self.pause(length);
                    "bytes delayed"
                }
                3 => {
                    proxy.swallow(direction);
                    self.pause(length);
                    // After lost bytes the rest can't be parsed, so end the connection: TCP loses connections, not
                    // bytes.
                    proxy.cut();
                    "bytes swallowed"
                }
                _ => {
                    proxy.stall();
                    self.pause(length);
                    "network stalled"
                }
            };
            proxy.pass();
            self.note(|books| *books.faults.entry(name).or_default() += 1);
        }
        proxy.pass();
    }
}
