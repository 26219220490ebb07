//! The soak: thousands of messages, dozens of workers at a time with commands that succeed, fail, die and hang, a broker that is
//! killed, stopped and frozen, a network that cuts, delays and swallows, and the books about it all.
//!
//! It fails on: a message lost; an exit 0 whose message came back, unless its broker was killed within a second after (ten for
//! classic queues: see `books`); a hang; a process left behind. What is drawn at random follows from the seed; the timing, of course, doesn't.

mod books;
mod command;
mod faults;
mod workers;

pub use books::Report;
pub use command::Plan;

use crate::{Broker, Client, Proxy, QueueKind, beside_this_program, block_on};
use anyhow::Result;
use books::Books;
use clap::value_parser;
use lapin::BasicProperties;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many messages are published in one flight, when fewer than [`HUNGRY`] are ready.
const BATCH: u64 = 50;
const HUNGRY: u32 = 200;

/// How long a broker may take to confirm them; it may be frozen.
const CONFIRMED: Duration = Duration::from_secs(10);

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
    /// Publish at least so many
    #[arg(long, default_value_t = 2000)]
    messages: u64,
    /// So many at a time
    #[arg(long, default_value_t = 24, value_parser = value_parser!(u64).range(1..))]
    workers: u64,
    /// Kill so many workers
    #[arg(long, default_value_t = 200)]
    kills: u32,
    /// Stop, kill, restart or freeze the broker so often
    #[arg(long, default_value_t = 20)]
    faults: u32,
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
        // A fault takes six seconds on average; seven in ten signals are kills.
        let time = Duration::from_secs(u64::from(self.faults.max(2)) * 6);
        time.mul_f64(0.7) / self.kills.max(1)
    }
}

/// Everything that the threads share.
struct Soak<'a> {
    options: &'a Options,
    broker: Broker,
    proxy: Proxy,
    client: Client,
    queue: String,
    book: PathBuf,
    books: Mutex<Books>,
    register: Mutex<workers::Register>,
    next_run: AtomicU64,
    killed: AtomicU32,
    deadline: Instant,
    /// No more faults and messages; what is in the queue gets done.
    ending: AtomicBool,
}

impl Soak<'_> {
    fn note<T>(&self, change: impl FnOnce(&mut Books) -> T) -> T {
        change(&mut self.books.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn out_of_time(&self) -> bool {
        Instant::now() > self.deadline
    }

    fn pause(&self, length: Duration) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        std::thread::sleep(length.min(left));
    }

    /// Keeps the queue filled, and publishes at least as much as was asked for.
    fn publish(&self, mut random: fastrand::Rng, faults_over: &AtomicBool) {
        loop {
            let enough = self.note(|books| books.confirmed.len()) as u64 >= self.options.messages;
            if (enough && faults_over.load(Relaxed)) || self.out_of_time() {
                return;
            }
            let ready = self.client.counts(&self.queue);
            if matches!(ready, Ok(Some((ready, _))) if ready < HUNGRY) {
                let batch = self.publish_batch(&mut random);
                let _ = block_on(async { tokio::time::timeout(CONFIRMED, batch).await });
            } else {
                self.pause(Duration::from_millis(200));
            }
        }
    }

    /// Publishes messages in one flight, and notes those that the broker confirms.
    async fn publish_batch(&self, random: &mut fastrand::Rng) -> Result<()> {
        let channel = self.client.open_channel().await?;
        channel.confirm_select(Default::default()).await?;
        let first = self.note(|books| books.published) + 1;
        let mut pending = Vec::new();
        for message in first..first + BATCH {
            // Most are small, some need several frames.
            let filler = match random.u32(0..20) {
                0 => random.usize(100_000..300_000),
                _ => random.usize(0..2000),
            };
            let body = command::body(message, filler);
            let properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_message_id(message.to_string().into());
            let (options, queue) = (Default::default(), self.queue.as_str().into());
            self.note(|books| books.published = message);
            let confirm = channel.basic_publish("".into(), queue, options, &body, properties);
            pending.push((message, confirm.await?));
        }
        for (message, confirm) in pending {
            if confirm.await?.is_ack() {
                self.note(|books| books.confirmed.insert(message));
            }
        }
        Ok(channel.close(200, "".into()).await?)
    }
}

/// Runs it; what it finds is in the report.
pub fn run(options: &Options) -> Result<Report> {
    let started = Instant::now();
    let broker = Broker::options().start()?;
    let proxy = Proxy::of(&broker);
    let client = broker.client().clone();
    let dead = client.declare("soak-dead").kind(options.queue).create();
    let mut queue = client
        .declare("soak")
        .kind(options.queue)
        .dead_letter_to(&dead);
    if options.queue == QueueKind::Quorum {
        // From 4.0 on there is a limit of 20 unless one is set.
        queue = queue.arg("x-delivery-limit", 10_000);
    }
    let queue = queue.create();
    let book = crate::owner::temp_folder("soak").join("book");
    std::fs::write(&book, "")?;
    let soak = Soak {
        options,
        proxy,
        client,
        queue: queue.name().to_owned(),
        book,
        books: Mutex::default(),
        register: Mutex::default(),
        next_run: AtomicU64::new(1),
        killed: AtomicU32::new(0),
        deadline: Instant::now() + Duration::from_secs(options.seconds),
        ending: AtomicBool::new(false),
        broker,
    };
    let mut seeds = fastrand::Rng::with_seed(options.seed);
    let faults_over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let slots: Vec<_> = (0..options.workers)
            .map(|_| {
                let random = seeds.fork();
                scope.spawn(|| soak.slot(random))
            })
            .collect();
        let (one, two, three, four) = (seeds.fork(), seeds.fork(), seeds.fork(), seeds.fork());
        let broker = scope.spawn(|| soak.break_broker(one));
        let assassin = scope.spawn(|| soak.assassin(two));
        let publisher = scope.spawn(|| soak.publish(three, &faults_over));
        let network = scope.spawn(|| soak.break_network(four));
        // Whatever happens, the others must come to their end.
        let broken = broker.join();
        let _ = assassin.join();
        faults_over.store(true, Relaxed);
        let _ = publisher.join();
        soak.ending.store(true, Relaxed);
        let _ = network.join();
        let ended: Vec<_> = slots.into_iter().map(|slot| slot.join()).collect();
        for result in std::iter::once(broken).chain(ended) {
            result.map_err(|_| anyhow::anyhow!("a thread of the soak has panicked"))??;
        }
        Ok(())
    })?;
    let mut books = soak
        .books
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    books.read(&std::fs::read_to_string(&soak.book)?)?;
    books.crash_window = match options.queue {
        QueueKind::Quorum => books::CRASH_WINDOW,
        QueueKind::Classic => books::CRASH_WINDOW_CLASSIC,
    };
    books.left = queue.ready();
    books.dead = dead.ready();
    let (major, minor, patch) = soak.broker.version();
    let mut report = Report::of(&books);
    report.title = format!(
        "RabbitMQ {major}.{minor}.{patch}, {} queue, {} workers, seed {}: {} s",
        options.queue.as_str(),
        options.workers,
        options.seed,
        started.elapsed().as_secs()
    );
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
