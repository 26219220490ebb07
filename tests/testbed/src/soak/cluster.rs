//! The faults of a cluster and of the network between its nodes.

use super::Soak;
use super::command::now;
use super::standstill::Window;
use crate::broker::{Cluster, Leader};
use crate::eventually;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use std::time::{Duration, Instant};

/// The cluster must be whole again within this time after a fault. A node that starts beside two dozen workers takes
/// half a minute.
const WHOLE: Duration = Duration::from_secs(600);

/// In milliseconds: a flapping network is cut, and then whole, for this long at most.
const FLAP_MS: u64 = 400;

/// How often the leader moves in one [`Fault::Moved`].
const MOVES: usize = 5;

/// A fault of the cluster. In half of the cases the node is the queue's leader, in the others any node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Fault {
    /// A node loses its network to the others, not to its clients.
    Isolated,
    /// A node receives nothing from one of the others, which still receives its packets.
    OneWay,
    /// A node loses its network to its clients; they get no answer, not even a reset.
    Unreachable,
    /// A node loses its network to the others repeatedly, for some tenths of a second.
    Flapping,
    Killed,
    Frozen,
    /// A node is put into maintenance mode and restarted.
    Drained,
    /// All nodes are stopped and started, one after the other.
    Rolling,
    /// The queue gets another leader.
    Moved,
}

impl Fault {
    /// Each fault with its share in percent (long ones are rarer) and its name.
    const ALL: [(Self, usize, &str); 9] = [
        (Self::Isolated, 14, "node cut off from the others"),
        (Self::OneWay, 14, "node receives nothing from one other"),
        (Self::Unreachable, 14, "node cut off from its workers"),
        (Self::Flapping, 11, "network of a node flapping"),
        (Self::Killed, 13, "node killed"),
        (Self::Frozen, 14, "node frozen"),
        (Self::Drained, 5, "node in maintenance, restarted"),
        (Self::Rolling, 3, "all nodes restarted in turn"),
        (Self::Moved, 12, "leader moved, five times"),
    ];

    fn name(self) -> &'static str {
        let row = Self::ALL.iter().find(|(fault, ..)| *fault == self);
        row.expect("every fault has a row").2
    }

    /// Whether an acknowledgement may be lost between a worker's node and the queue's leader: the leader loses contact
    /// with a node whose connections stay open, or the leader changes while the acknowledgement is in transit. The
    /// leader also changes with maintenance and when a node ends.
    fn separates(self) -> bool {
        self != Self::Unreachable
    }

    /// Draws faults: each kind once, further ones by their shares, in a random order.
    fn draw(only: &[Self], count: usize, random: &mut fastrand::Rng) -> Vec<Self> {
        if !only.is_empty() {
            return only.iter().copied().cycle().take(count).collect();
        }
        let mut faults = Self::ALL.map(|(fault, ..)| fault).to_vec();
        let more = Self::ALL.iter();
        let more = more.flat_map(|(fault, share, _)| vec![*fault; share - 1]);
        let mut more: Vec<_> = more.collect();
        random.shuffle(&mut more);
        let missing = count.saturating_sub(faults.len());
        faults.extend(more.into_iter().cycle().take(missing));
        random.shuffle(&mut faults);
        faults.truncate(count);
        faults
    }
}

impl Soak<'_> {
    /// Breaks the cluster `--faults` times, and waits after each fault until it is whole again.
    pub(super) fn break_cluster(&self, cluster: &Cluster, mut random: fastrand::Rng) -> Result<()> {
        self.look_at_leader(cluster, None)?;
        let count = self.options.faults as usize;
        let faults = Fault::draw(&self.options.only, count, &mut random);
        // In between, the affected workers notice the fault, which takes two and a half heartbeats.
        let between = 5500..8000;
        self.cause_all(&faults, Fault::name, between, random, |fault, random| {
            let leader = self.look_at_leader(cluster, None)?;
            let victim = if random.bool() { leader } else { random.usize(0..cluster.nodes.len()) };
            let begun = Instant::now();
            let from = now();
            self.break_node(fault, cluster, victim, random)
                .with_context(|| format!("{}: {}", fault.name(), cluster.nodes[victim].name))?;
            let broken = begun.elapsed();
            let led = leader == victim;
            self.look_at_leader(cluster, Some((fault, from)))?;
            Ok(format!(
                " ({}{}), for {:.1} s",
                cluster.nodes[victim].name,
                if led { ", the leader" } else { "" },
                broken.as_secs_f64()
            ))
        })
    }

    fn break_node(&self, fault: Fault, cluster: &Cluster, victim: usize, random: &mut fastrand::Rng) -> Result<()> {
        let node = &cluster.nodes[victim];
        let others: Vec<_> = cluster.nodes.iter().filter(|it| it.name != node.name).collect();
        let longest = self.options.cut_seconds * 1000;
        let length = Duration::from_millis(random.u64(longest / 5..=longest));
        match fault {
            Fault::Isolated => {
                self.crash(fault.name(), || node.cut_off_from(&others))?;
                self.pause(length);
                node.heal_cut()
            }
            Fault::OneWay => {
                let other = others[random.usize(0..others.len())];
                self.crash(fault.name(), || node.hear_nothing_from(&[other]))?;
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
                    self.crash(fault.name(), || node.cut_off_from(&others))?;
                    self.pause(Duration::from_millis(random.u64(0..FLAP_MS)));
                    node.heal()?;
                    self.pause(Duration::from_millis(random.u64(0..FLAP_MS)));
                }
                Ok(())
            }
            Fault::Killed => {
                self.crash(fault.name(), || node.kill())?;
                self.pause(length / 3);
                node.start_again()
            }
            Fault::Frozen => {
                self.crash(fault.name(), || node.freeze())?;
                self.pause(length);
                ensure!(!node.greets(), "the node isn't frozen");
                node.thaw()
            }
            Fault::Drained => {
                node.drain()?;
                node.restart()?;
                node.revive()
            }
            Fault::Rolling => {
                for node in &cluster.nodes {
                    node.restart()?;
                    self.await_whole(cluster)?;
                }
                Ok(())
            }
            Fault::Moved => cluster.move_leader(&self.queue, MOVES),
        }
    }

    /// Waits until the cluster is whole; returns the index of the leader's node. Records the fault that has just ended,
    /// given with its beginning; or, between two faults, a leader that has changed by itself.
    pub(super) fn look_at_leader(&self, cluster: &Cluster, fault: Option<(Fault, u64)>) -> Result<usize> {
        let leader = self.await_whole(cluster)?;
        let until = now();
        let last = self.led.lock().replace((leader.term, until));
        let changed = last.filter(|(term, _)| *term != leader.term);
        let window = match (fault, changed) {
            (Some((fault, from)), _) => {
                Some(Window { fault: fault.name(), from, until, separates: fault.separates() || changed.is_some() })
            }
            (None, Some((_, from))) => Some(Window { fault: "leader changed by itself", from, until, separates: true }),
            (None, None) => None,
        };
        self.note(|books| books.windows.extend(window));
        Ok(leader.node)
    }

    /// Waits until the cluster is whole; returns the queue's leader.
    fn await_whole(&self, cluster: &Cluster) -> Result<Leader> {
        let mut leader = None;
        eventually(WHOLE, || {
            leader = cluster.leader_if_whole(&self.queue);
            leader.is_some()
        });
        leader.with_context(|| format!("the cluster isn't whole after {WHOLE:?}\n{}", cluster.logs()))
    }
}
