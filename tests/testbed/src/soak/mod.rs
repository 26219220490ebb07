//! The soak: thousands of messages, dozens of workers at a time with commands that succeed, fail, die and hang, a broker that is
//! killed, stopped and frozen, a network that cuts, delays and swallows, and the books about it all.
//!
//! With `--cluster 3` it is three nodes that are broken, and the network between them, and a table says how long work stood still.
//!
//! It fails on: a message lost; an exit 0 whose message came back, unless a node was killed, frozen or cut off within a second
//! after (ten for classic queues: see `books`); a hang; a process left behind. What is drawn at random follows from the seed; the
//! timing, of course, doesn't.

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

/// How long the connections of the last workers may take to go, when those have been killed.
const GONE: Duration = Duration::from_secs(30);

/// Breaks everything at random, and keeps books about every message
///
/// The broker is a node of the soak's own: see QCONSUME_TEST_RABBITMQ.
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "soak")]
pub struct Options {
    /// Draw the same again
    #[arg(long, default_value_t = fastrand::u64(..1_000_000))]
    seed: u64,
    /// The queue's type
    #[arg(long, value_enum, default_value_t = QueueKind::Quorum)]
    queue: QueueKind,
    /// Break a cluster of so many nodes, each in a container, and the network between them; needs root and a quorum queue
    #[arg(long, value_parser = value_parser!(u8).range(3..=7))]
    cluster: Option<u8>,
    /// Publish at least so many
    #[arg(long, default_value_t = 2000)]
    messages: u64,
    /// So many at a time
    #[arg(long, default_value_t = 24, value_parser = value_parser!(u64).range(1..))]
    workers: u64,
    /// Kill so many workers
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Stop, kill, restart or freeze the broker so often; in a cluster also cut its network
    #[arg(long, default_value_t = 20)]
    faults: u32,
    /// Break a cluster in these ways only, in turn
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<cluster::Fault>,
    /// How long a cut through a cluster's network lasts at most
    #[arg(long, default_value_t = 30, value_parser = value_parser!(u64).range(1..))]
    cut_seconds: u64,
    /// No new faults after so long; that is a failure if there were too few
    #[arg(long, default_value_t = 360, value_parser = value_parser!(u64).range(1..))]
    seconds: u64,
    /// How long a command takes on average
    #[arg(long, default_value_t = 300)]
    command_ms: u64,
    /// With --faults 0: let every command end within a few milliseconds of that acknowledgement timeout
    #[arg(long)]
    ack_timeout_ms: Option<u64>,
    /// The binary under test
    #[arg(long, default_value_os_t = beside_this_program("qconsume"))]
    qconsume: PathBuf,
    /// What this program is to do instead.
    #[command(subcommand)]
    pub role: Option<Role>,
}

/// What the soak's program also is.
#[derive(clap::Subcommand, Clone, Copy, Debug)]
pub enum Role {
    /// What the workers run.
    #[command(hide = true)]
    Command(Plan),
}

impl Options {
    /// Kills are spread over the time that the faults take.
    fn kill_pause(&self) -> Duration {
        // So long a fault takes on average; seven in ten signals are kills.
        let fault = if self.cluster.is_some() { 18 } else { 6 };
        let time = Duration::from_secs(u64::from(self.faults.max(2)) * fault);
        time.mul_f64(0.7) / self.kills.max(1)
    }
}

/// What is broken.
enum Site {
    /// A single node, and a proxy in front of it.
    Node { broker: Broker, proxy: Proxy },
    /// A cluster on a network of its own.
    Cluster(Cluster),
}

impl Site {
    fn start(options: &Options) -> Result<Self> {
        let Some(size) = options.cluster else {
            let broker = Broker::options().start()?;
            let proxy = Proxy::of(&broker);
            return Ok(Self::Node { broker, proxy });
        };
        // A classic queue is on one node, so it is lost for as long as that node is.
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

    /// What a worker gets as its `BROKER_URL`.
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

/// Everything that the threads share.
struct Soak<'a> {
    options: &'a Options,
    site: Site,
    /// One for each node.
    clients: Vec<Client>,
    queue: String,
    book: PathBuf,
    books: Mutex<Books>,
    register: Mutex<workers::Register>,
    /// The term of the queue's leader in a cluster, and when it was looked at.
    led: Mutex<Option<(u64, u64)>>,
    next_run: AtomicU64,
    killed: AtomicU32,
    begun: Instant,
    deadline: Instant,
    /// No more faults and messages; what is in the queue gets done.
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

    /// Runs everything at the same time, until the queue is empty in the end.
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
            // Whatever happens, the others must come to their end.
            let mut ends = vec![end(broker), end(assassin)];
            faults_over.store(true, Relaxed);
            ends.push(end(publisher));
            self.ending.store(true, Relaxed);
            ends.push(end(network));
            ends.extend(slots.into_iter().map(end));
            ends.into_iter().collect()
        })
    }

    /// How many messages are in a queue. One that a consumer holds isn't ready, so no consumer must be left.
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
                bail!("what is in queue {} is not known after {GONE:?}: (ready, consumers) is {counts:?}", queue.name())
            }
        }
    }
}

/// Waits for the end of one of the soak's threads, which must neither fail nor panic.
fn end(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    let panicked = |_| bail!("a thread of the soak has panicked");
    thread.join().unwrap_or_else(panicked)
}

/// Runs it; what it finds is in the report.
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
        // From 4.0 on there is a limit of 20 unless one is set.
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
        let text = format!("{seconds} seconds were too few for all that was asked for");
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
