//! The soak: thousands of messages; dozens of workers at a time, whose commands succeed, fail, die and hang; a broker
//! that is killed, stopped and frozen; a network that cuts connections, and delays and drops data. The books record
//! what happened.
//!
//! With `--cluster 3` it breaks three nodes and the network between them, and prints how long work stood still.
//!
//! It fails on: a lost message; an exit 0 whose message was delivered again, unless a node was killed, frozen or cut
//! off within a second (ten for classic queues: see `books`); a hang; a process that is left behind. The seed
//! determines everything that is random, except for the timing.

mod books;
mod cluster;
mod command;
mod faults;
mod publisher;
mod standstill;
mod workers;

pub use books::Report;
pub use command::Plan;

use crate::broker::Cluster;
use crate::{Broker, Client, Proxy, Queue, QueueKind, beside_this_program, eventually};
use anyhow::{Error, Result, bail, ensure};
use books::Books;
use clap::value_parser;
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

/// The broker notices within this time that the last workers were killed.
const GONE: Duration = Duration::from_secs(30);

/// Breaks brokers, network and workers at random, and checks what happened to every message
///
/// Starts a broker of its own: see QCONSUME_TEST_RABBITMQ.
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "soak")]
pub struct Options {
    /// Repeat the random choices of an earlier run
    #[arg(long, default_value_t = fastrand::u64(..1_000_000))]
    seed: u64,
    /// The queue's type
    #[arg(long, value_enum, default_value_t = QueueKind::Quorum)]
    queue: QueueKind,
    /// Break a cluster of this many nodes, each in a container, and the network between them; needs root and a quorum
    /// queue
    #[arg(long, value_parser = value_parser!(u8).range(3..=7))]
    cluster: Option<u8>,
    /// The least number of messages to publish
    #[arg(long, default_value_t = 2000)]
    messages: u64,
    /// The number of workers at a time
    #[arg(long, default_value_t = 24, value_parser = value_parser!(u64).range(1..))]
    workers: u64,
    /// The number of workers to kill
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// How often to stop, kill, restart or freeze the broker; in a cluster also to cut its network
    #[arg(long, default_value_t = 20)]
    faults: u32,
    /// Cause only these faults of a cluster, in turn
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<cluster::Fault>,
    /// The longest time for which a cluster's network is cut
    #[arg(long, default_value_t = 30, value_parser = value_parser!(u64).range(1..))]
    cut_seconds: u64,
    /// When to stop causing faults; the soak fails if there were too few
    #[arg(long, default_value_t = 360, value_parser = value_parser!(u64).range(1..))]
    seconds: u64,
    /// A command's average duration
    #[arg(long, default_value_t = 300)]
    command_ms: u64,
    /// With --faults 0: the acknowledgement timeout; every command ends within a few milliseconds of it
    #[arg(long)]
    ack_timeout_ms: Option<u64>,
    /// The binary under test
    #[arg(long, default_value_os_t = beside_this_program("qconsume"))]
    qconsume: PathBuf,
    /// What this program is to do instead of a soak.
    #[command(subcommand)]
    pub role: Option<Role>,
}

/// Other roles of the soak's program.
#[derive(clap::Subcommand, Clone, Copy, Debug)]
pub enum Role {
    /// The workers' command.
    #[command(hide = true)]
    Command(Plan),
}

impl Options {
    /// The pause between two signals, which spreads the kills over the time that the faults take.
    fn kill_pause(&self) -> Duration {
        // A fault's average duration, in seconds; seven of ten signals are kills.
        let fault = if self.cluster.is_some() { 18 } else { 6 };
        let time = Duration::from_secs(u64::from(self.faults.max(2)) * fault);
        time.mul_f64(0.7) / self.kills.max(1)
    }
}

/// The broker to break.
enum Site {
    /// A single node, and a proxy to it.
    Node {
        broker: Broker,
        proxy: Proxy,
    },
    Cluster(Cluster),
}

impl Site {
    fn start(options: &Options) -> Result<Self> {
        let Some(size) = options.cluster else {
            let broker = Broker::options().start()?;
            let proxy = Proxy::of(&broker);
            return Ok(Self::Node { broker, proxy });
        };
        // A classic queue is on one node, so it is unavailable while that node is down.
        let quorum = options.queue == QueueKind::Quorum;
        ensure!(quorum, "--cluster needs --queue quorum");
        Ok(Self::Cluster(Cluster::start(size)?))
    }

    fn nodes(&self) -> Vec<&Broker> {
        match self {
            Self::Node { broker, .. } => vec![broker],
            Self::Cluster(cluster) => cluster.nodes.iter().map(|node| &**node).collect(),
        }
    }

    /// A worker's `BROKER_URL`.
    fn url(&self, random: &mut fastrand::Rng) -> String {
        match self {
            Self::Node { proxy, .. } if random.bool() => proxy.url(),
            Self::Node { broker, .. } => broker.url(),
            Self::Cluster(_) => {
                let mut urls: Vec<_> = self.nodes().into_iter().map(Broker::url).collect();
                random.shuffle(&mut urls);
                urls.join(",")
            }
        }
    }
}

/// Shared by all threads.
struct Soak<'a> {
    options: &'a Options,
    site: Site,
    /// One for each node.
    clients: Vec<Client>,
    queue: String,
    book: PathBuf,
    books: Mutex<Books>,
    register: Mutex<workers::Register>,
    /// In a cluster: the term of the queue's leader when it was last looked up, and the time of that.
    led: Mutex<Option<(u64, u64)>>,
    next_run: AtomicU64,
    killed: AtomicU32,
    begun: Instant,
    deadline: Instant,
    /// No more faults and messages: the workers empty the queue.
    ending: AtomicBool,
}

impl Soak<'_> {
    fn note<T>(&self, change: impl FnOnce(&mut Books) -> T) -> T {
        change(&mut self.books.lock())
    }

    fn out_of_time(&self) -> bool {
        Instant::now() > self.deadline
    }

    fn pause(&self, length: Duration) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        std::thread::sleep(length.min(left));
    }

    /// Runs everything at the same time, until the queue is empty at the end.
    fn all(&self) -> Result<()> {
        let mut seeds = fastrand::Rng::with_seed(self.options.seed);
        let faults_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let slots: Vec<_> = (0..self.options.workers)
                .map(|_| {
                    let random = seeds.fork();
                    scope.spawn(|| self.slot(random))
                })
                .collect();
            let (one, two, three, four) = (seeds.fork(), seeds.fork(), seeds.fork(), seeds.fork());
            let broker = scope.spawn(|| match &self.site {
                Site::Node { broker, .. } => self.break_broker(broker, one),
                Site::Cluster(cluster) => self.break_cluster(cluster, one),
            });
            let assassin = scope.spawn(|| {
                self.assassin(two);
                Ok(())
            });
            let publisher = scope.spawn(|| {
                self.publish(three, &faults_over);
                Ok(())
            });
            let network = scope.spawn(|| {
                if let Site::Node { proxy, .. } = &self.site {
                    self.break_network(proxy, four);
                }
                Ok(())
            });
            // Also after an error, the other threads must end.
            let mut ends = vec![end(broker), end(assassin)];
            faults_over.store(true, Relaxed);
            ends.push(end(publisher));
            self.ending.store(true, Relaxed);
            ends.push(end(network));
            ends.extend(slots.into_iter().map(end));
            ends.into_iter().collect()
        })
    }

    /// The number of messages in a queue, once it has no consumers: messages that one holds aren't counted.
    fn left_in(&self, queue: &Queue) -> Result<u32> {
        let mut counts = None;
        eventually(GONE, || {
            let mut clients = self.clients.iter();
            counts = clients.find_map(|client| client.counts(queue.name()).ok().flatten());
            matches!(counts, Some((_, 0)))
        });
        match counts {
            Some((ready, 0)) => Ok(ready),
            counts => {
                bail!("queue {} still has consumers after {GONE:?}: (ready, consumers) is {counts:?}", queue.name())
            }
        }
    }
}

/// Waits for the end of one of the soak's threads, which must neither fail nor panic.
fn end(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    let panicked = |_| bail!("a thread of the soak has panicked");
    thread.join().unwrap_or_else(panicked)
}

/// Runs a soak.
pub fn run(options: &Options) -> Result<Report> {
    let started = Instant::now();
    let site = Site::start(options)?;
    let (major, minor, patch) = site.nodes()[0].version();
    let clients = site.nodes().into_iter();
    let clients: Vec<_> = clients.map(|node| node.client().clone()).collect();
    let client = clients[0].clone();
    let dead = client.declare("soak-dead").kind(options.queue).create();
    let mut queue = client.declare("soak").kind(options.queue).dead_letter_to(&dead);
    if options.queue == QueueKind::Quorum {
        // From 4.0 on the default limit is 20.
        queue = queue.arg("x-delivery-limit", 10_000);
    }
    if let Some(size) = options.cluster {
        queue = queue.arg("x-quorum-initial-group-size", i32::from(size));
    }
    let queue = queue.create();
    if let Site::Cluster(cluster) = &site {
        cluster.write_down()?;
    }
    let book = crate::owner::temp_folder("soak").join("book");
    std::fs::write(&book, "")?;
    let soak = Soak {
        options,
        site,
        clients,
        queue: queue.name().to_owned(),
        book,
        books: Mutex::default(),
        register: Mutex::default(),
        led: Mutex::default(),
        next_run: AtomicU64::new(1),
        killed: AtomicU32::new(0),
        begun: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(options.seconds),
        ending: AtomicBool::new(false),
    };
    let mut failures = Vec::new();
    let mut fail = |error: Error| failures.push(format!("{error:#}"));
    soak.all().unwrap_or_else(&mut fail);
    if let Site::Cluster(cluster) = &soak.site {
        let looked = soak.look_at_leader(cluster, None).map(drop);
        looked.unwrap_or_else(&mut fail);
    }
    let mut left_in = |queue| soak.left_in(queue).map_err(&mut fail).unwrap_or_default();
    let (left, dead) = (left_in(&queue), left_in(&dead));
    let mut books = soak.books.into_inner();
    books.read(&std::fs::read_to_string(&soak.book)?)?;
    books.crash_window = match options.queue {
        QueueKind::Quorum => books::CRASH_WINDOW,
        QueueKind::Classic => books::CRASH_WINDOW_CLASSIC,
    };
    books.left = left;
    books.dead = dead;
    let nodes = options.cluster.unwrap_or(1);
    let mut report = Report::of(&books);
    report.title = format!(
        "RabbitMQ {major}.{minor}.{patch}, nodes: {nodes}, {} queue, {} workers, seed {}: {} s",
        options.queue.as_str(),
        options.workers,
        options.seed,
        started.elapsed().as_secs()
    );
    report.failures.append(&mut failures);
    if (books.confirmed.len() as u64) < options.messages
        || books.broker_faults < options.faults
        || report.killed < options.kills as usize
    {
        let seconds = options.seconds;
        let text = format!("{seconds} s (--seconds) were too short for all messages, faults and kills");
        report.failures.push(text);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_panics_or_fails_is_told() {
        std::thread::scope(|scope| {
            assert!(end(scope.spawn(|| Ok(()))).is_ok());
            assert!(end(scope.spawn(|| bail!("it fails"))).is_err());
            assert!(end(scope.spawn(|| panic!("it panics"))).is_err());
        });
    }
}
