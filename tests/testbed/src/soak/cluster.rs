//! What happens to a cluster, and to the network between its nodes.

use super::Soak;
use super::books::Crash;
use super::command::now;
use super::standstill::Window;
use crate::broker::{Cluster, ClusterNode};
use crate::eventually;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use std::time::{Duration, Instant};

/// So long after a fault the cluster must be whole again: a node that starts beside two dozen workers takes half a minute.
const WHOLE: Duration = Duration::from_secs(180);

/// While the network flaps, it is cut and whole for at most so long, in turn.
const FLAP_MS: u64 = 400;

/// So often the leader moves in one fault of that kind.
const MOVES: usize = 5;

/// What happens to the cluster. The node is the queue's leader in one half of the faults, any node in the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// A node loses its network to the others, not to its clients.
    Isolated,
    /// Nothing reaches a node from one of the others; what it sends does arrive.
    OneWay,
    /// A node loses its network to its clients, who get no answer, not even a reset.
    Unreachable,
    /// A node loses its network to the others for some tenths of a second, again and again.
    Flapping,
    Killed,
    Frozen,
    /// Maintenance mode, a restart, and back.
    Drained,
    /// Stopped and started, one node after the other.
    Rolling,
    /// The queue gets another leader.
    Moved,
}

impl Fault {
    /// Each with how many of them are among a hundred: those that take long are rarer.
    const ALL: [(Self, usize); 9] = [
        (Self::Isolated, 14),
        (Self::OneWay, 14),
        (Self::Unreachable, 14),
        (Self::Flapping, 11),
        (Self::Killed, 13),
        (Self::Frozen, 14),
        (Self::Drained, 5),
        (Self::Rolling, 3),
        (Self::Moved, 12),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Isolated => "node cut off from the others",
            Self::OneWay => "node hears nothing from one other",
            Self::Unreachable => "node cut off from its workers",
            Self::Flapping => "network of a node flapping",
            Self::Killed => "node killed",
            Self::Frozen => "node frozen",
            Self::Drained => "node in maintenance, restarted",
            Self::Rolling => "all nodes restarted in turn",
            Self::Moved => "leader moved, five times",
        }
    }

    /// Whether the queue's leader may lose sight of a node whose connections go on.
    fn separates(self) -> bool {
        matches!(
            self,
            Self::Isolated | Self::OneWay | Self::Flapping | Self::Frozen
        )
    }

    /// Every kind gets its turn, then as its share is, in an order that was drawn.
    fn draw(only: &[Self], count: usize, random: &mut fastrand::Rng) -> Vec<Self> {
        if !only.is_empty() {
            return only.iter().copied().cycle().take(count).collect();
        }
        let mut faults: Vec<_> = Self::ALL.iter().map(|(fault, _)| *fault).collect();
        let more = Self::ALL
            .iter()
            .flat_map(|(fault, share)| vec![*fault; share - 1]);
        let mut more: Vec<_> = more.collect();
        random.shuffle(&mut more);
        faults.extend(
            more.into_iter()
                .cycle()
                .take(count.saturating_sub(faults.len())),
        );
        random.shuffle(&mut faults);
        faults.truncate(count);
        faults
    }
}

impl Soak<'_> {
    /// Breaks the cluster as often as was asked for, one fault after the other, and waits after each until it is whole again.
    pub(super) fn break_cluster(&self, cluster: &Cluster, mut random: fastrand::Rng) -> Result<()> {
        let mut leader = self.await_whole(cluster)?;
        let count = self.options.faults as usize;
        for fault in Fault::draw(&self.options.only, count, &mut random) {
            // Work gets done in between, and whoever was hit notices, which takes two and a half heartbeats.
            self.pause(Duration::from_millis(random.u64(5500..8000)));
            if self.out_of_time() {
                return Ok(());
            }
            let victim = if random.bool() {
                leader
            } else {
                random.usize(0..cluster.nodes.len())
            };
            let begun = Instant::now();
            let from = now();
            self.break_node(fault, cluster, victim, &mut random)
                .with_context(|| format!("{}: {}", fault.name(), cluster.nodes[victim].name))?;
            let broken = begun.elapsed();
            let led = leader == victim;
            leader = self.await_whole(cluster)?;
            let window = Window {
                fault: fault.name(),
                from,
                until: now(),
                separates: fault.separates(),
            };
            let done = self.note(|books| {
                books.windows.push(window);
                *books.faults.entry(fault.name()).or_default() += 1;
                books.broker_faults += 1;
                (books.confirmed.len(), books.runs.len())
            });
            eprintln!(
                "soak: {} s: {} ({}{}), for {:.1} s, whole after {:.1} s; {} messages published, {} workers ended",
                self.begun.elapsed().as_secs(),
                fault.name(),
                cluster.nodes[victim].name,
                if led { ", the leader" } else { "" },
                broken.as_secs_f64(),
                begun.elapsed().as_secs_f64(),
                done.0,
                done.1
            );
        }
        Ok(())
    }

    fn break_node(
        &self,
        fault: Fault,
        cluster: &Cluster,
        victim: usize,
        random: &mut fastrand::Rng,
    ) -> Result<()> {
        let node = &cluster.nodes[victim];
        let others: Vec<_> = cluster
            .nodes
            .iter()
            .filter(|it| it.name != node.name)
            .collect();
        let longest = self.options.cut_seconds * 1000;
        let length = Duration::from_millis(random.u64(longest / 5..=longest));
        match fault {
            Fault::Isolated => {
                self.crash(fault, || node.cut_off_from(&others))?;
                self.pause(length);
                node.heal_cut()
            }
            Fault::OneWay => {
                let other = others[random.usize(0..others.len())];
                self.crash(fault, || node.hear_nothing_from(&[other]))?;
                self.pause(length);
                node.heal_cut()
            }
            Fault::Unreachable => {
                node.cut_off_from_clients()?;
                self.pause(length);
                node.heal_cut()
            }
            Fault::Flapping => {
                let end = Instant::now() + length;
                while Instant::now() < end && !self.out_of_time() {
                    self.crash(fault, || node.cut_off_from(&others))?;
                    self.pause(Duration::from_millis(random.u64(0..FLAP_MS)));
                    node.heal()?;
                    self.pause(Duration::from_millis(random.u64(0..FLAP_MS)));
                }
                Ok(())
            }
            Fault::Killed => {
                self.crash(fault, || node.kill())?;
                self.pause(length / 3);
                node.start_again()
            }
            Fault::Frozen => {
                self.crash(fault, || node.freeze())?;
                self.pause(length);
                ensure!(!node.greets(), "it isn't frozen");
                node.thaw()
            }
            Fault::Drained => {
                node.drain()?;
                restart(node)?;
                node.revive()
            }
            Fault::Rolling => {
                for node in &cluster.nodes {
                    restart(node)?;
                    self.await_whole(cluster)?;
                }
                Ok(())
            }
            Fault::Moved => cluster.move_leader(&self.queue, MOVES),
        }
    }

    /// Does what may undo an exit 0 right before it, and notes when.
    fn crash(&self, fault: Fault, what: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = now();
        what()?;
        let crash = Crash {
            name: fault.name(),
            before,
            after: now(),
        };
        self.note(|books| books.crashes.push(crash));
        Ok(())
    }

    /// The index of the leader's node, once the cluster is whole.
    fn await_whole(&self, cluster: &Cluster) -> Result<usize> {
        let mut leader = None;
        eventually(WHOLE, || {
            leader = cluster.leader_if_whole(&self.queue);
            leader.is_some()
        });
        leader.with_context(|| {
            format!(
                "the cluster is not whole after {WHOLE:?}\n{}",
                cluster.logs()
            )
        })
    }
}

fn restart(node: &ClusterNode) -> Result<()> {
    node.stop()?;
    node.start_again()
}
