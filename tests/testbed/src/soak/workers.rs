//! The workers: each slot runs one after the other, and others kill and watch them.

use super::Soak;
use super::books::{End, Run};
use super::command::{BOOK, How, Plan, RUN, now};
use crate::owner;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A worker that lives longer hangs: the longest that it may take is its `--connect-timeout` of 60 s, some seconds of waiting and
/// of its command, and 90 s to settle the message, three times should it be one that takes three.
const HANG: Duration = Duration::from_secs(200);

/// What a worker has started may live so long after it, while the kernel and a loaded machine catch up.
const LEFTOVER: Duration = Duration::from_secs(5);

/// What is in the queue when the time is up must be done by then.
const LAST_ORDERS: Duration = Duration::from_secs(180);

/// How long a worker waits for a message before it says that there is none.
const WAIT: &str = "2s";

/// A worker that is running.
pub(super) struct Live {
    since: Instant,
    hung: bool,
    child: Child,
}

/// The workers that are running, and when those that have ended did.
#[derive(Default)]
pub(super) struct Register {
    live: BTreeMap<u64, Arc<Mutex<Live>>>,
    ended: BTreeMap<u64, Instant>,
}

impl Soak<'_> {
    /// Runs one worker after the other, until the queue is empty in the end.
    pub(super) fn slot(&self, mut random: fastrand::Rng) -> Result<()> {
        loop {
            // Looked at before the worker starts: one that finds nothing after that has seen the last of it.
            let ending = self.ending.load(Relaxed);
            let run = self.worker(&mut random, ending)?;
            let nothing = run.end == End::Exited(66);
            self.note(|books| books.runs.push(run));
            if (ending && nothing) || Instant::now() > self.deadline + LAST_ORDERS {
                return Ok(());
            }
        }
    }

    fn worker(&self, random: &mut fastrand::Rng, ending: bool) -> Result<Run> {
        let number = self.next_run.fetch_add(1, Relaxed);
        let how = match random.u32(0..100) {
            _ if ending || self.options.ack_timeout_ms.is_some() => How::Succeed,
            0..70 => How::Succeed,
            70..85 => How::Fail,
            85..91 => How::Die,
            91..96 => How::Hang,
            _ => How::HangDeaf,
        };
        let longest = if ending {
            20
        } else {
            2 * self.options.command_ms
        };
        let plan = Plan {
            how,
            after: random.u64(0..=longest),
        };
        let count = match random.u32(0..10) {
            0 if how == How::Succeed => 3,
            _ => 1,
        };
        let url = if random.bool() {
            self.proxy.url()
        } else {
            self.broker.url()
        };
        let finish = random.u32(0..10) == 0;
        let mut command = owner::command(&self.options.qconsume);
        command
            .args(["--heartbeat", "2", "--connect-timeout", "60s"])
            .args(["--wait", WAIT, "--kill-after", "300ms"])
            .args(["--count", &count.to_string()])
            .args(["--on-lost", if finish { "finish" } else { "terminate" }]);
        if let Some(limit) = self.options.ack_timeout_ms {
            command.args(["--ack-timeout", &format!("{limit}ms")]);
        }
        if matches!(how, How::Hang | How::HangDeaf) {
            let limit = if random.bool() { "500ms" } else { "3s" };
            command.args(["--timeout", limit, "--grace", "300ms"]);
        }
        command
            .arg("--")
            .arg(std::env::current_exe().context("where is this program?")?)
            .args(plan.arguments())
            .env("BROKER_URL", url)
            .env("QUEUE", &self.queue)
            .env(BOOK, &self.book)
            .env(RUN, number.to_string())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", self.options.qconsume.display()))?;
        let stderr = child.stderr.take();
        let live = Arc::new(Mutex::new(Live {
            since: Instant::now(),
            hung: false,
            child,
        }));
        self.register().live.insert(number, live.clone());

        let (mut said, mut acknowledged) = (String::new(), Vec::new());
        // Until the worker has ended, and with it its command, which has the same standard error.
        for line in BufReader::new(stderr.context("no pipe")?).lines() {
            let line = line.unwrap_or_default();
            if let Some(message) = acknowledged_in(&line) {
                acknowledged.push((message, now()));
            }
            said += &line;
            said.push('\n');
        }
        let end = {
            let mut live = lock(&live);
            let status = live.child.wait()?;
            match (status.code(), live.hung) {
                (_, true) => End::Hung,
                (Some(code), _) => End::Exited(code as u8),
                (None, _) => End::Signalled(status.signal().unwrap_or_default()),
            }
        };
        if end == End::Signalled(Signal::SIGKILL as i32) {
            self.killed.fetch_add(1, Relaxed);
        }
        let at = now();
        let mut register = self.register();
        register.live.remove(&number);
        register.ended.insert(number, Instant::now());
        Ok(Run {
            number,
            end,
            at,
            count,
            acknowledged,
            said,
        })
    }

    /// Sends signals to workers at random, until so many were killed.
    pub(super) fn assassin(&self, mut random: fastrand::Rng) {
        while self.killed.load(Relaxed) < self.options.kills && !self.out_of_time() {
            std::thread::sleep(self.options.kill_pause());
            let live: Vec<_> = self.register().live.values().cloned().collect();
            let Some(victim) = random.choice(&live) else {
                continue;
            };
            let signal = match random.u32(0..10) {
                0..7 => Signal::SIGKILL,
                7..9 => Signal::SIGTERM,
                _ => Signal::SIGINT,
            };
            let mut victim = lock(victim);
            // Not reaped yet, so the pid can't be another's.
            if let Ok(None) = victim.child.try_wait() {
                let _ = kill(pid(&victim.child), signal);
            }
        }
    }

    /// Looks for workers that hang, and for processes that have outlived their worker.
    pub(super) fn watch(&self) {
        let mut reported = Vec::new();
        while !self.over.load(Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
            let live: Vec<_> = self.register().live.values().cloned().collect();
            for live in live {
                let mut live = lock(&live);
                if live.since.elapsed() > HANG && !live.hung {
                    live.hung = true;
                    let _ = kill(pid(&live.child), Signal::SIGKILL);
                }
            }
            for (process, run) in self.processes() {
                let ended = self.register().ended.get(&run).copied();
                let outlived = ended.is_some_and(|ended| ended.elapsed() > LEFTOVER);
                if outlived && !reported.contains(&process) {
                    reported.push(process);
                    let text = format!("process {process} of run {run}, which has ended");
                    self.note(|books| books.leftovers.push(text));
                }
            }
        }
    }

    /// The processes that are a worker or were started by one, and whose.
    fn processes(&self) -> Vec<(i32, u64)> {
        let found = owner::processes_with(BOOK, &self.book.to_string_lossy());
        let run = |pid: &i32| -> Option<u64> {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let mut variables = environment.split(|byte| *byte == 0);
            let prefix = format!("{RUN}=");
            variables.find_map(|variable| {
                std::str::from_utf8(variable.strip_prefix(prefix.as_bytes())?)
                    .ok()?
                    .parse()
                    .ok()
            })
        };
        found
            .into_iter()
            .filter_map(|pid| Some((pid, run(&pid)?)))
            .collect()
    }

    fn register(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock(live: &Mutex<Live>) -> MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// The number of the message that this line of a worker's log says was acknowledged.
fn acknowledged_in(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("message acknowledged")?;
    let (_, id) = rest.split_once("id=\"")?;
    id.split_once('"')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::acknowledged_in;

    #[test]
    fn the_number_of_an_acknowledged_message_is_found() {
        let line = r#"qconsume: command succeeded; message acknowledged id="17" attempt=1 size=3 seconds=0.1 status=0"#;
        assert_eq!(acknowledged_in(line), Some(17));
        assert_eq!(acknowledged_in(r#"qconsume: message taken id="17""#), None);
    }
}
