//! What happens to a single node, and to the network between it and the workers.

use super::Soak;
use super::books::Crash;
use super::command::now;
use crate::{Broker, Direction, Proxy};
use anyhow::Result;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// What happens to the broker.
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
    /// Breaks the broker as often as was asked for, one fault after the other.
    pub(super) fn break_broker(&self, broker: &Broker, mut random: fastrand::Rng) -> Result<()> {
        use Fault::{Freeze, Kill, Restart, Stop};
        // Every kind gets its turn, in an order that was drawn. Starting a node takes long, freezing it doesn't.
        let mut faults = Vec::new();
        while faults.len() < self.options.faults as usize {
            faults.extend([Freeze, Kill, Freeze, Freeze, Stop]);
            faults.extend([Kill, Freeze, Restart, Freeze, Freeze]);
        }
        faults.truncate(self.options.faults as usize);
        random.shuffle(&mut faults);
        for fault in faults {
            // Work gets done in between.
            self.pause(Duration::from_millis(random.u64(500..3000)));
            if self.out_of_time() {
                return Ok(());
            }
            let length = Duration::from_millis(random.u64(200..7000));
            let begun = Instant::now();
            match fault {
                Kill => {
                    let before = now();
                    broker.kill()?;
                    let after = now();
                    let crash = Crash {
                        name: fault.name(),
                        before,
                        after,
                    };
                    self.note(|books| books.crashes.push(crash));
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
            let done = self.note(|books| {
                *books.faults.entry(fault.name()).or_default() += 1;
                books.broker_faults += 1;
                (books.confirmed.len(), books.runs.len())
            });
            eprintln!(
                "soak: {}, for {:.1} s; {} messages published, {} workers ended",
                fault.name(),
                begun.elapsed().as_secs_f64(),
                done.0,
                done.1
            );
        }
        Ok(())
    }

    /// A node that was killed sometimes hangs when it starts again, and another start helps (seen with 3.10.8).
    fn start(&self, broker: &Broker) -> Result<()> {
        if broker.start_again().is_ok() {
            return Ok(());
        }
        self.note(|books| *books.faults.entry("start repeated").or_default() += 1);
        broker.kill()?;
        broker.start_again()
    }

    /// Cuts, delays and swallows for as long as the broker is being broken.
    pub(super) fn break_network(&self, proxy: &Proxy, mut random: fastrand::Rng) {
        if self.options.faults == 0 {
            // The end of a command can meet the acknowledgement timeout in more ways when answers take their time.
            proxy.delay(Direction::ToClient, Duration::from_millis(5));
            return;
        }
        while !self.ending.load(Relaxed) && !self.out_of_time() {
            self.pause(Duration::from_millis(random.u64(500..3000)));
            let length = Duration::from_millis(random.u64(200..6000));
            let direction = if random.bool() {
                Direction::ToBroker
            } else {
                Direction::ToClient
            };
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
                    // What was lost on the way makes the rest unintelligible; a network loses connections, not bytes.
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
