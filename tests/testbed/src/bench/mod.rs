//! `make bench`: compares qconsume with amqp-consume, which do the same work in turn, and measures what many qconsumes
//! cost.
//!
//! It fails only if a run doesn't do its work, and never because one is slow.

mod page;
mod plot;
mod process;
mod scale;
mod table;
mod waiting;

use crate::certificates::{authority, identity};
use crate::owner::{self, find_in_path, temp_folder};
use crate::{Broker, Direction, Port, Proxy, Queue, beside_this_program, eventually, reserve_port};
use anyhow::{Context, Result, ensure};
use page::Results;
use process::{Cost, Resident};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use table::Unit::{Memory, Time};
use table::{BESIDE, Table, median};

/// To a broker in the next region: half of a round trip of 20 ms.
const ONE_WAY: Duration = Duration::from_millis(10);

/// Between two runs, for the broker to clean up after the last connection.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the broker may take to notice the end of the last run, or the start of hundreds.
const NOTICED: Duration = Duration::from_secs(600);

/// The benchmark takes about an hour on two idle cores; with `--quick`, some minutes.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
const QUICK_LIMIT: Duration = Duration::from_secs(3600);

/// Measures qconsume beside amqp-consume
#[derive(clap::Parser, Clone, Debug)]
#[command(name = "bench")]
pub struct Options {
    /// The binary to measure
    #[arg(long, default_value_os_t = beside_this_program("qconsume"))]
    qconsume: PathBuf,
    /// Measure a few rounds of everything, to check that it works; don't change the page
    #[arg(long)]
    quick: bool,
    /// Measure only this part; don't change the page
    #[arg(long, value_parser = PARTS.map(|(name, _)| name))]
    only: Option<String>,
    /// Replace the results in this page, and the plot beside it
    #[arg(long)]
    page: Option<PathBuf>,
}

/// Measures something and adds its results.
type Part = fn(&Bench, &mut Results) -> Result<()>;

/// The parts, in the order of the page.
const PARTS: [(&str, Part); 9] = [
    ("small", Bench::one_message),
    ("far", Bench::far_away),
    ("tls", Bench::tls),
    ("large", Bench::large),
    ("series", Bench::series),
    ("crowd", Bench::crowd),
    ("scale", Bench::scale),
    ("waiting", Bench::waiting),
    ("reconnect", Bench::reconnect),
];

/// The same thing for both programs.
#[derive(Clone, Copy, Debug)]
struct Pair<T> {
    amqp_consume: T,
    qconsume: T,
}

/// Measures everything, prints the results, and writes them to the page if there is one.
pub fn run(options: &Options) -> Result<()> {
    let programs = Pair {
        amqp_consume: find_in_path("amqp-consume").context("amqp-consume is missing; install amqp-tools")?,
        qconsume: fs::canonicalize(&options.qconsume)
            .with_context(|| format!("no qconsume at {}", options.qconsume.display()))?,
    };
    // When this process exits, everything that it has started is killed.
    let limit = if options.quick { QUICK_LIMIT } else { LIMIT };
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("bench: not done after {limit:?}, so a run hangs");
        std::process::exit(1);
    });
    process::raise_file_limit()?;
    let bench = Bench::start(options.quick, programs)?;
    let mut results = Results { table: Table::new(&BESIDE), blocks: Vec::new(), plot: None };
    for (name, measure) in PARTS {
        if options.only.as_deref().is_none_or(|only| only == name) {
            measure(&bench, &mut results)?;
        }
    }
    let measured = bench.circumstances()?;
    println!("\n{}", results.text(&measured));
    match &options.page {
        Some(page) if !options.quick && options.only.is_none() => results.put_into(page, &measured),
        _ => Ok(()),
    }
}

/// The programs and the broker.
struct Bench {
    quick: bool,
    programs: Pair<PathBuf>,
    broker: Broker,
    tls: Port,
    ca: PathBuf,
}

impl Bench {
    fn start(quick: bool, programs: Pair<PathBuf>) -> Result<Self> {
        let authority = authority("the benchmark's CA");
        let server = identity(&authority, &["localhost"], |_| {});
        let tls = reserve_port()?;
        let broker = Broker::options()
            .config(&format!("listeners.ssl.1 = 127.0.0.1:{}", tls.number()))
            .config(
                "ssl_options.cacertfile = $folder/ca.pem\n\
                 ssl_options.certfile = $folder/server.pem\n\
                 ssl_options.keyfile = $folder/server.key\n",
            )
            .file("ca.pem", &authority.as_ref().pem())
            .file("server.pem", &server.cert)
            .file("server.key", &server.key)
            .start()?;
        let ca = temp_folder("bench").join("ca.pem");
        fs::write(&ca, authority.as_ref().pem())?;
        Ok(Self { quick, programs, broker, tls, ca })
    }

    fn rounds(&self, full: usize) -> usize {
        if self.quick { 3 } else { full }
    }

    /// One small message for each process, on a nearby broker.
    fn near(&self) -> Work {
        Work {
            url: self.broker.url(),
            cacert: None,
            messages: 1,
            drain: false,
            prefetch: None,
            body: b"a small message".to_vec(),
        }
    }

    fn one_message(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        let rounds = self.rounds(150);
        let costs = self.costs("one message", &self.near(), rounds)?;
        let memory = self.memory("one message", &self.near())?;
        // The kernel adds a command's time to its parent's, so the command is also measured alone.
        let command = (0..rounds).map(|_| Ok(process::cost(owner::command("cat"))?.cpu)).collect::<Result<Vec<_>>>()?;
        let command = median(&command);
        table.beside("one small message: time", Time, &costs, |it| it.wall);
        table.beside("… processor", Time, &costs, |it| it.cpu);
        let less = "… processor, less `cat`'s";
        table.beside(less, Time, &costs, |it| it.cpu - command);
        table.beside("… memory", Memory, &memory, |it| it.peak);
        let own = "… memory, less files' pages";
        table.beside(own, Memory, &memory, |it| it.own);
        Ok(())
    }

    fn far_away(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        let proxy = Proxy::of(&self.broker);
        proxy.delay(Direction::ToBroker, ONE_WAY);
        proxy.delay(Direction::ToClient, ONE_WAY);
        let work = Work { url: proxy.url(), ..self.near() };
        let costs = self.costs("one message, 20 ms away", &work, self.rounds(150))?;
        table.beside("one, 20 ms round trip: time", Time, &costs, |it| it.wall);
        Ok(())
    }

    fn tls(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        let work = Work {
            url: format!("amqps://guest:guest@localhost:{}", self.tls.number()),
            cacert: Some(self.ca.clone()),
            ..self.near()
        };
        let costs = self.costs("one message over TLS", &work, self.rounds(150))?;
        let memory = self.memory("one message over TLS", &work)?;
        table.beside("one over TLS: time", Time, &costs, |it| it.wall);
        table.beside("… processor", Time, &costs, |it| it.cpu);
        table.beside("… memory", Memory, &memory, |it| it.peak);
        Ok(())
    }

    fn large(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        let work = Work { body: (0..12 << 20).map(|index| (index % 251) as u8).collect(), ..self.near() };
        let costs = self.costs("one of 12 MiB", &work, self.rounds(30))?;
        let memory = self.memory("one of 12 MiB", &work)?;
        table.beside("one of 12 MiB: time", Time, &costs, |it| it.wall);
        table.beside("… memory", Memory, &memory, |it| it.peak);
        Ok(())
    }

    fn series(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        for (what, prefetch) in
            [("300 in one process (`-c 300`): time", None), ("… both one at a time (`-p 1`): time", Some(1))]
        {
            let work = Work { messages: 300, prefetch, ..self.near() };
            let costs = self.costs(what, &work, self.rounds(20))?;
            table.beside(what, Time, &costs, |it| it.wall);
            table.beside("… processor", Time, &costs, |it| it.cpu);
        }
        Ok(())
    }

    /// Many workers that wait, and then get one message each.
    fn crowd(&self, results: &mut Results) -> Result<()> {
        let table = &mut results.table;
        let size = if self.quick { 20 } else { 500 };
        let work = self.near();
        let queue = self.broker.queue("bench");
        let label = format!("{size} at once");
        let crowds = self.in_turn(&label, self.rounds(5), |program| {
            let crowd = process::crowd(size, || work.command(program, queue.name()))?;
            let waiting = eventually(NOTICED, || queue.consumers() as usize == size);
            ensure!(waiting, "only {} of {size} workers are waiting", queue.consumers());
            let pids: Vec<_> = crowd.iter().map(Child::id).collect();
            let memory = process::memory(&pids)?;
            let started = Instant::now();
            queue.publish_all(vec![&work.body; size]);
            crowd.into_iter().try_for_each(process::succeeded)?;
            let time = started.elapsed().as_secs_f64();
            settled(&queue)?;
            Ok((memory, time))
        })?;
        let what = format!("{size} that wait: memory of all");
        table.beside(&what, Memory, &crowds, |(memory, _)| *memory);
        let what = "… until all have done a message";
        table.beside(what, Time, &crowds, |(_, time)| *time);
        Ok(())
    }

    /// The cost of runs that do the work. The first round only fills caches, and isn't counted.
    fn costs(&self, label: &str, work: &Work, rounds: usize) -> Result<Vec<Pair<Cost>>> {
        let mut costs = self.measure(label, work, rounds + 1, process::cost)?;
        costs.remove(0);
        Ok(costs)
    }

    /// The memory of runs that do the work.
    fn memory(&self, label: &str, work: &Work) -> Result<Vec<Pair<Resident>>> {
        let label = format!("{label}, memory");
        self.measure(&label, work, self.rounds(10), process::resident)
    }

    fn measure<T>(
        &self,
        label: &str,
        work: &Work,
        rounds: usize,
        run: fn(Command) -> Result<T>,
    ) -> Result<Vec<Pair<T>>> {
        let queue = self.broker.queue("bench");
        self.in_turn(label, rounds, |program| {
            queue.publish_all(vec![&work.body; work.messages]);
            let measured = run(work.command(program, queue.name()))?;
            settled(&queue)?;
            Ok(measured)
        })
    }

    /// Runs the two programs in turn, round after round, amqp-consume first.
    fn in_turn<T>(&self, label: &str, rounds: usize, mut make: impl FnMut(&Path) -> Result<T>) -> Result<Vec<Pair<T>>> {
        eprintln!("bench: {label}, {rounds} rounds");
        let mut make = |program: &Path| make(program).with_context(|| format!("{label}: {}", program.display()));
        (0..rounds)
            .map(|_| {
                Ok(Pair { amqp_consume: make(&self.programs.amqp_consume)?, qconsume: make(&self.programs.qconsume)? })
            })
            .collect()
    }
}

/// A run's work, the same for both programs, as qconsume understands amqp-consume's options.
struct Work {
    url: String,
    cacert: Option<PathBuf>,
    messages: usize,
    /// `--drain` instead of a number of messages; amqp-consume has no such option.
    drain: bool,
    /// amqp-consume's prefetch count; qconsume's is always 1.
    prefetch: Option<u32>,
    body: Vec<u8>,
}

impl Work {
    fn command(&self, program: &Path, queue: &str) -> Command {
        let mut command = owner::command(program);
        command.args(["--url", &self.url, "-q", queue]);
        if self.drain {
            command.arg("--drain");
        } else {
            command.args(["-c", &self.messages.to_string()]);
        }
        if let Some(limit) = self.prefetch {
            command.args(["-p", &limit.to_string()]);
        }
        if let Some(file) = &self.cacert {
            command.arg("--cacert").arg(file);
        }
        command.arg("cat");
        command
    }
}

/// Checks that a run's messages are acknowledged, and waits until its consumer is gone.
fn settled(queue: &Queue) -> Result<()> {
    // When a consumer ends, the broker requeues its unacknowledged messages.
    let left = eventually(NOTICED, || queue.consumers() == 0);
    ensure!(left, "the run has ended, but the queue still has a consumer");
    ensure!(queue.ready() == 0, "the run has left its message in the queue");
    std::thread::sleep(PAUSE);
    Ok(())
}
