//! `make bench`: qconsume beside amqp-consume, the same work for both, in turn.
//!
//! It reports and judges nothing: what it fails on is a run that didn't do its work, never a slow one.

mod image;
mod page;
mod process;

use crate::broker::debian_package;
use crate::certificates::{authority, identity};
use crate::owner::{find_in_path, temp_folder};
use crate::{Broker, Direction, Port, Proxy, Queue, eventually, reserve_port};
use anyhow::{Context, Result, bail, ensure};
use page::{Row, Unit};
use process::{Cost, Resident};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: bench [OPTIONS]
  --qconsume PATH  the binary to measure [the one beside this program]
  --quick          a few rounds of everything but the largest, to see that it works; writes no page
  --only PART      one part of it: small, far, tls, large, huge, series, crowd or image; writes no page
  --page PATH      write the page with the results there";

/// On the way to a broker in the next region, half of the round trip of 20 ms.
const ONE_WAY: Duration = Duration::from_millis(10);

/// Between two runs, for the broker to put away the connection that has just ended.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the broker may take to notice the end of the last run, or the start of hundreds.
const NOTICED: Duration = Duration::from_secs(120);

/// What the benchmark shall do.
#[derive(Clone, Debug)]
pub struct Options {
    qconsume: PathBuf,
    quick: bool,
    only: Option<String>,
    page: Option<PathBuf>,
}

impl Options {
    /// Reads the command line.
    ///
    /// # Errors
    /// The usage.
    pub fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self {
            qconsume: std::env::current_exe()?.with_file_name("qconsume"),
            quick: false,
            only: None,
            page: None,
        };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().context(USAGE);
            match name.as_str() {
                "--qconsume" => options.qconsume = value()?.into(),
                "--page" => options.page = Some(value()?.into()),
                "--only" => options.only = Some(value()?.clone()),
                "--quick" => options.quick = true,
                _ => bail!("{USAGE}"),
            }
        }
        Ok(options)
    }
}

/// How often each thing is done.
struct Rounds {
    small: usize,
    memory: usize,
    large: usize,
    huge: usize,
    series: usize,
    crowds: usize,
    /// Workers at once.
    crowd: usize,
}

const FULL: Rounds = Rounds {
    small: 150,
    memory: 10,
    large: 30,
    huge: 7,
    series: 20,
    crowds: 5,
    crowd: 500,
};

const QUICK: Rounds = Rounds {
    small: 5,
    memory: 2,
    large: 2,
    huge: 0,
    series: 2,
    crowds: 1,
    crowd: 20,
};

/// Something of amqp-consume's, and the same of qconsume's.
#[derive(Clone, Copy, Debug)]
struct Pair<T> {
    amqp_consume: T,
    qconsume: T,
}

impl<T> Pair<T> {
    /// amqp-consume first: A B A B, round after round.
    fn each<U>(&self, mut make: impl FnMut(&T) -> Result<U>) -> Result<Pair<U>> {
        Ok(Pair {
            amqp_consume: make(&self.amqp_consume)?,
            qconsume: make(&self.qconsume)?,
        })
    }
}

/// Measures everything, prints the table, and writes the page if there is to be one.
///
/// # Errors
/// When something is missing, or a run didn't do its work.
pub fn run(options: &Options) -> Result<()> {
    let rounds = if options.quick { QUICK } else { FULL };
    debian_package("amqp-tools", || find_in_path("amqp-consume").is_some())?;
    let programs = Pair {
        amqp_consume: find_in_path("amqp-consume").context("amqp-tools has no amqp-consume")?,
        qconsume: fs::canonicalize(&options.qconsume)
            .with_context(|| format!("no qconsume at {}", options.qconsume.display()))?,
    };
    process::end_if_hung();
    let bench = Bench::start(rounds, programs)?;
    let mut note = String::new();
    let mut rows = Vec::new();
    let mut known = false;
    let mut part = |name: &str, measure: &mut dyn FnMut() -> Result<Vec<Row>>| {
        if options.only.as_deref().is_none_or(|only| only == name) {
            known = true;
            rows.extend(measure()?);
        }
        anyhow::Ok(())
    };
    part("small", &mut || bench.one_message())?;
    part("far", &mut || bench.far_away())?;
    part("tls", &mut || bench.tls())?;
    part("large", &mut || bench.large(12, bench.rounds.large))?;
    part("huge", &mut || bench.large(128, bench.rounds.huge))?;
    part("series", &mut || bench.series())?;
    part("crowd", &mut || bench.crowd())?;
    part("image", &mut || {
        let (rows, about) = image::bytes(&bench.programs.qconsume)?;
        note = format!("\n{about}\n");
        Ok(rows)
    })?;
    ensure!(known, "{USAGE}");
    let results = format!("{}{note}", page::table(&rows));
    println!("\n{results}");
    if let Some(path) = options
        .page
        .as_ref()
        .filter(|_| !options.quick && options.only.is_none())
    {
        fs::write(path, page::page(&results, &bench)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The stage.
struct Bench {
    rounds: Rounds,
    programs: Pair<PathBuf>,
    broker: Broker,
    tls: Port,
    ca: PathBuf,
}

impl Bench {
    fn start(rounds: Rounds, programs: Pair<PathBuf>) -> Result<Self> {
        let authority = authority("the benchmark's CA");
        let server = identity(&authority, &["localhost"], |_| {});
        let tls = reserve_port()?;
        let broker = Broker::options()
            .config(
                "listeners.ssl.1 = 127.0.0.1:{tls_port}\n\
                 ssl_options.cacertfile = $folder/ca.pem\n\
                 ssl_options.certfile = $folder/server.pem\n\
                 ssl_options.keyfile = $folder/server.key\n\
                 # As in 3.10, for later versions too.\n\
                 max_message_size = 134217728\n",
            )
            .port("tls_port", tls.number())
            .file("ca.pem", &authority.as_ref().pem())
            .file("server.pem", &server.cert)
            .file("server.key", &server.key)
            .start()?;
        let ca = temp_folder("bench").join("ca.pem");
        fs::write(&ca, authority.as_ref().pem())?;
        Ok(Self {
            rounds,
            programs,
            broker,
            tls,
            ca,
        })
    }

    /// One small message for each process, near.
    fn near(&self) -> Work {
        Work {
            url: self.broker.url(),
            cacert: None,
            messages: 1,
            prefetch: None,
            body: b"a small message".to_vec(),
        }
    }

    fn one_message(&self) -> Result<Vec<Row>> {
        let costs = self.costs("one message", &self.near(), self.rounds.small)?;
        let peaks = self.resident("one message", &self.near(), self.rounds.memory)?;
        // The kernel doesn't tell the two apart afterwards; by itself the command costs the same.
        let command = (0..self.rounds.small)
            .map(|_| Ok(process::cost(Command::new("cat"))?.cpu))
            .collect::<Result<Vec<_>>>()?;
        let command = page::median(&command);
        let less_command = |cost: &Cost| cost.cpu - command;
        Ok(vec![
            Row::new("one small message: time", Unit::Time, &costs, |cost| {
                cost.wall
            })
            .goal(0.85),
            Row::new("… processor", Unit::Time, &costs, |cost| cost.cpu).goal(0.80),
            Row::new(
                "… processor, less `cat`'s",
                Unit::Time,
                &costs,
                less_command,
            ),
            Row::new("… memory", Unit::Memory, &peaks, |it| it.peak).goal(0.45),
            Row::new(
                "… memory, without files' pages",
                Unit::Memory,
                &peaks,
                |it| it.private,
            ),
        ])
    }

    fn far_away(&self) -> Result<Vec<Row>> {
        let proxy = Proxy::of(&self.broker);
        proxy.delay(Direction::ToBroker, ONE_WAY);
        proxy.delay(Direction::ToClient, ONE_WAY);
        let work = Work {
            url: proxy.url(),
            ..self.near()
        };
        let costs = self.costs("one message, 20 ms away", &work, self.rounds.small)?;
        Ok(vec![
            Row::new("one, 20 ms round trip: time", Unit::Time, &costs, |cost| {
                cost.wall
            })
            .goal(0.80),
        ])
    }

    fn tls(&self) -> Result<Vec<Row>> {
        let work = Work {
            url: format!("amqps://guest:guest@localhost:{}", self.tls.number()),
            cacert: Some(self.ca.clone()),
            ..self.near()
        };
        let costs = self.costs("one message over TLS", &work, self.rounds.small)?;
        let peaks = self.resident("one message over TLS", &work, self.rounds.memory)?;
        Ok(vec![
            Row::new("one over TLS: time", Unit::Time, &costs, |cost| cost.wall).goal(0.70),
            Row::new("… processor", Unit::Time, &costs, |cost| cost.cpu),
            Row::new("… memory", Unit::Memory, &peaks, |it| it.peak),
        ])
    }

    fn large(&self, mib: usize, rounds: usize) -> Result<Vec<Row>> {
        if rounds == 0 {
            return Ok(Vec::new());
        }
        let work = Work {
            body: (0..mib << 20).map(|index| (index % 251) as u8).collect(),
            ..self.near()
        };
        let label = format!("one of {mib} MiB");
        let costs = self.costs(&label, &work, rounds)?;
        let peaks = self.resident(&label, &work, rounds.min(self.rounds.memory))?;
        let time = Row::new(format!("{label}: time"), Unit::Time, &costs, |cost| {
            cost.wall
        });
        let memory = Row::new("… memory", Unit::Memory, &peaks, |it| it.peak);
        Ok(match mib {
            12 => vec![time.goal(0.80), memory.goal(0.80)],
            _ => vec![time, memory],
        })
    }

    fn series(&self) -> Result<Vec<Row>> {
        let work = Work {
            messages: 300,
            ..self.near()
        };
        let costs = self.costs("300 in one process", &work, self.rounds.series)?;
        let one_at_a_time = Work {
            prefetch: Some(1),
            ..work
        };
        let same = self.costs(
            "300 in one process, one at a time",
            &one_at_a_time,
            self.rounds.series,
        )?;
        Ok(vec![
            Row::new(
                "300 in one process (`-c 300`): time",
                Unit::Time,
                &costs,
                |cost| cost.wall,
            )
            .goal(0.95),
            Row::new("… processor", Unit::Time, &costs, |cost| cost.cpu),
            Row::new(
                "… both one at a time (`-p 1`): time",
                Unit::Time,
                &same,
                |cost| cost.wall,
            ),
            Row::new("… processor", Unit::Time, &same, |cost| cost.cpu),
        ])
    }

    /// Many workers that wait, and then get a message each.
    fn crowd(&self) -> Result<Vec<Row>> {
        let size = self.rounds.crowd;
        let work = self.near();
        let queue = self.broker.queue("bench");
        let label = format!("{size} at once");
        let crowds = self.in_turn(&label, self.rounds.crowds, |program| {
            let crowd = process::Crowd::start(size, || work.command(program, queue.name()))?;
            let waiting = eventually(NOTICED, || queue.consumers() as usize == size);
            ensure!(
                waiting,
                "{} of {size} workers came to wait",
                queue.consumers()
            );
            let memory = crowd.memory()?;
            let started = Instant::now();
            queue.publish_all(vec![&work.body; size]);
            crowd.wait()?;
            let time = started.elapsed().as_secs_f64();
            settled(&queue)?;
            Ok((memory, time))
        })?;
        Ok(vec![
            Row::new(
                format!("{size} that wait: memory of all"),
                Unit::Memory,
                &crowds,
                |(memory, _)| *memory,
            ),
            Row::new(
                "… until all have done a message",
                Unit::Time,
                &crowds,
                |(_, time)| *time,
            ),
        ])
    }

    /// What runs cost that do the work, one program after the other; the first round is for the caches.
    fn costs(&self, label: &str, work: &Work, rounds: usize) -> Result<Vec<Pair<Cost>>> {
        let queue = self.broker.queue("bench");
        let mut costs = self.in_turn(label, rounds + 1, |program| {
            queue.publish_all(vec![&work.body; work.messages]);
            let cost = process::cost(work.command(program, queue.name()))?;
            settled(&queue)?;
            Ok(cost)
        })?;
        costs.remove(0);
        Ok(costs)
    }

    /// What runs that do the work have resident.
    fn resident(&self, label: &str, work: &Work, rounds: usize) -> Result<Vec<Pair<Resident>>> {
        let queue = self.broker.queue("bench");
        self.in_turn(&format!("{label}, memory"), rounds, |program| {
            queue.publish_all(vec![&work.body; work.messages]);
            let resident = process::resident(work.command(program, queue.name()))?;
            settled(&queue)?;
            Ok(resident)
        })
    }

    fn in_turn<T>(
        &self,
        label: &str,
        rounds: usize,
        mut make: impl FnMut(&Path) -> Result<T>,
    ) -> Result<Vec<Pair<T>>> {
        eprintln!("bench: {label}, {rounds} rounds");
        (0..rounds)
            .map(|_| {
                self.programs.each(|program| {
                    make(program).with_context(|| format!("{label}: {}", program.display()))
                })
            })
            .collect()
    }
}

/// The same for both: amqp-consume's options mean to qconsume what they mean to it.
struct Work {
    url: String,
    cacert: Option<PathBuf>,
    messages: usize,
    /// How many messages the broker hands out ahead; qconsume never has more than one.
    prefetch: Option<u32>,
    body: Vec<u8>,
}

impl Work {
    fn command(&self, program: &Path, queue: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["--url", &self.url, "-q", queue]);
        command.args(["-c", &self.messages.to_string()]);
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

/// Checks that a run's messages are gone for good, and waits until the broker has put away its connection.
fn settled(queue: &Queue) -> Result<()> {
    // With its consumer's end the broker puts back what it had not acknowledged.
    let left = eventually(NOTICED, || queue.consumers() == 0);
    ensure!(left, "it has ended, and still has a consumer");
    ensure!(queue.ready() == 0, "it has left its message in the queue");
    std::thread::sleep(PAUSE);
    Ok(())
}
