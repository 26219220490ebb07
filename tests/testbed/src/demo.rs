//! `make demo`: a newcomer's first look. Fills a real queue, works it off two at a time, one run of qconsume a message.

use crate::{Broker, Queue, owner::find_in_path};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::Instant,
};

/// The tutorial's eight tasks.
const FRUITS: [&str; 8] = [
    "apple", "banana", "cherry", "date", "fig", "grape", "lemon", "melon",
];

/// The one whose worker fails the first time.
const UNLUCKY: &str = "cherry";

/// How many workers at a time: the Job's `parallelism`.
const AT_A_TIME: usize = 2;

/// How long a worker waits for a task before it takes the queue for empty.
const WAIT: &str = "2s";

/// What qconsume exits with then.
const EMPTY: i32 = 66;

/// Bounds the demo should something go wrong for good.
const RUNS_AT_MOST: usize = 30;

/// Where the programs and the worker are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Has `qconsume` and `qpublish`.
    pub programs: PathBuf,
    /// The worker: `examples/work-queue/worker.py`.
    pub worker: PathBuf,
}

/// One worker's run.
struct Run {
    task: Option<String>,
    status: i32,
}

/// Runs the demo and prints what happens.
///
/// # Errors
/// When there is no broker, no Python for the worker, or a task wasn't done.
pub fn run(paths: &Paths) -> Result<()> {
    if find_in_path("python3").is_none() {
        bail!("the demo's worker is a Python script, and there is no python3; install it");
    }
    let broker = Broker::find()?;
    let (major, minor, patch) = broker.version();
    println!("A RabbitMQ {major}.{minor}.{patch} is at your service.\n");
    let queue = queue(&broker);
    let url = broker.url();

    println!(
        "$ qpublish -q {} --declare {}",
        queue.name(),
        FRUITS.join(" ")
    );
    let published = Command::new(paths.programs.join("qpublish"))
        .args(["-q", queue.name(), "--declare"])
        .args(FRUITS)
        .env("BROKER_URL", &url)
        .env_remove("BROKER_URL_FILE")
        .status()
        .context("cannot run qpublish")?;
    if !published.success() {
        bail!("qpublish failed: {published}");
    }

    println!(
        "\n$ qconsume -- {}        # again and again, {AT_A_TIME} at a time, until the queue is empty",
        paths.worker.display()
    );
    let started = Instant::now();
    let runs = Mutex::new(Vec::new());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME)
            .map(|_| scope.spawn(|| work(paths, &url, queue.name(), &runs)))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| bail!("a worker's thread panicked"))
        })
    })?;
    summary(
        &runs.into_inner().unwrap_or_default(),
        queue.ready(),
        started.elapsed().as_secs_f64(),
    )
}

/// `job1`, as in the tutorial; on a broker that isn't ours alone a name that nobody else uses.
fn queue(broker: &Broker) -> Queue {
    let absent = if !broker.is_private() {
        broker.client().declare("qconsume-demo")
    } else {
        broker.client().declare("job1").exact_name("job1")
    };
    absent.absent()
}

/// Runs qconsume until the queue is empty.
fn work(paths: &Paths, url: &str, queue: &str, runs: &Mutex<Vec<Run>>) -> Result<()> {
    loop {
        let run = one(paths, url, queue, runs)?;
        let empty = run.status == EMPTY;
        let mut all = runs.lock().unwrap_or_else(|lock| lock.into_inner());
        if !empty {
            all.push(run);
        }
        if empty || all.len() >= RUNS_AT_MOST {
            return Ok(());
        }
    }
}

fn one(paths: &Paths, url: &str, queue: &str, runs: &Mutex<Vec<Run>>) -> Result<Run> {
    let mut child = Command::new(paths.programs.join("qconsume"))
        .args(["--wait", WAIT, "--log-level", "error", "--"])
        .arg(&paths.worker)
        .env("BROKER_URL", url)
        .env_remove("BROKER_URL_FILE")
        .env("QUEUE", queue)
        .env("FAIL_FIRST", UNLUCKY)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run qconsume")?;
    let mut task = None;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.context("cannot read what the worker prints")?;
            // One lock for the line, so that two workers' lines don't mix.
            let _line = runs.lock();
            println!("{line}");
            task = line.strip_prefix("Processing ").map(str::to_owned).or(task);
        }
    }
    let mut complaints = String::new();
    if let Some(mut errors) = child.stderr.take() {
        errors
            .read_to_string(&mut complaints)
            .context("cannot read what qconsume says")?;
    }
    let status = child.wait().context("cannot wait for qconsume")?;
    let status = status.code().unwrap_or(-1);
    if status != EMPTY {
        let _line = runs.lock();
        eprint!("{complaints}");
    }
    Ok(Run { task, status })
}

fn summary(runs: &[Run], left: u32, seconds: f64) -> Result<()> {
    let mut tasks: BTreeMap<&str, Vec<i32>> = FRUITS.map(|fruit| (fruit, Vec::new())).into();
    for run in runs {
        let task = run.task.as_deref().unwrap_or("(nothing printed)");
        tasks.entry(task).or_default().push(run.status);
    }
    println!("\nWhat happened, task by task (exit status of each qconsume):");
    for (task, statuses) in &tasks {
        let shown: Vec<String> = statuses.iter().map(ToString::to_string).collect();
        let note = match statuses.as_slice() {
            [] => "not done",
            [0] => "done",
            [.., 0] => "failed first, came back to the queue, done",
            _ => "failed",
        };
        println!("  {task:<8} {:<8} {note}", shown.join(", "));
    }
    let done = tasks
        .values()
        .filter(|runs| runs.last() == Some(&0))
        .count();
    println!(
        "\n{done} of {} tasks done by {} runs of qconsume in {seconds:.1} s; {left} messages left in the queue.",
        FRUITS.len(),
        runs.len()
    );
    let as_told = tasks.iter().all(|(task, statuses)| match *task {
        UNLUCKY => statuses.as_slice() == [1, 0],
        _ => statuses.as_slice() == [0],
    });
    if !as_told || left != 0 {
        bail!(
            "that isn't how it should have gone: each task once, {UNLUCKY} twice, and an empty queue"
        );
    }
    println!(
        "Each was acknowledged only after its worker had succeeded; {UNLUCKY} needed two attempts, and nothing was lost."
    );
    Ok(())
}

/// Where cargo has left the programs: beside this one.
///
/// # Errors
/// When this program doesn't know where it is.
pub fn paths() -> Result<Paths> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    Ok(Paths {
        programs: own.parent().unwrap_or(Path::new(".")).to_owned(),
        worker: PathBuf::from("examples/work-queue/worker.py"),
    })
}
