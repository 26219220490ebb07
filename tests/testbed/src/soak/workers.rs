//! The workers: each slot runs one after the other; another thread sends signals to them.

use super::Soak;
use super::books::{End, Run};
use super::command::{BOOK, How, Plan, RUN, now};
use crate::{Program, Running, Signal, eventually};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// A worker that runs longer is stuck. It may take its `--connect-timeout` of 60 s, some seconds for waiting and for its
/// command, and 90 s for a settlement (with `--count 3`, three of them).
const HANG: Duration = Duration::from_secs(200);

/// The same in a cluster, where it waits longer, and may have to connect twice.
const HANG_CLUSTER: Duration = Duration::from_secs(300);

/// A worker's processes may still run for this long after it, as the machine is busy.
const LEFTOVER: Duration = Duration::from_secs(60);

/// The time after the deadline in which the workers must empty the queue.
const LAST_ORDERS: Duration = Duration::from_secs(180);

/// How long a worker waits for a message (`--wait`).
const WAIT: Duration = Duration::from_secs(2);

/// The same in a cluster, until the end is near. It is longer than any fault, as real workers have no `--wait`.
const WAIT_CLUSTER: Duration = Duration::from_secs(60);

/// The pause between two looks at a worker's log, which give its lines their times.
const LOOK: Duration = Duration::from_millis(10);

/// The workers that are running.
pub(super) type Register = BTreeMap<u64, Arc<Running>>;

impl Soak<'_> {
    /// Runs one worker after the other, until the queue is empty at the end.
    pub(super) fn slot(&self, mut random: fastrand::Rng) -> Result<()> {
        loop {
            // Read before the worker starts: if it then finds no message, the queue is empty for good.
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
        let longest = if ending { 20 } else { 2 * self.options.command_ms };
        let count = match random.u32(0..10) {
            0 if how == How::Succeed => 3,
            _ => 1,
        };
        // With one message only the exit status matters, so log lines may be lost.
        let noisy = count == 1 && !ending && random.u32(0..10) == 0;
        let plan = Plan { how, after: random.u64(0..=longest), noisy };
        let url = self.site.url(random);
        let wait = match self.options.cluster {
            Some(_) if !ending => WAIT_CLUSTER,
            _ => WAIT,
        };
        let finish = random.u32(0..10) == 0;
        let mut worker = Program::new(&self.options.qconsume)
            .args(["--heartbeat", "2", "--connect-timeout", "60s"])
            .args(["--wait", &format!("{}s", wait.as_secs())])
            .args(["--kill-after", "300ms"])
            .args(["--count", &count.to_string()])
            .args(["--on-lost", if finish { "finish" } else { "terminate" }]);
        if let Some(limit) = self.options.ack_timeout_ms {
            worker = worker.args(["--ack-timeout", &format!("{limit}ms")]);
        }
        if matches!(how, How::Hang | How::HangDeaf) {
            let limit = if random.bool() { "500ms" } else { "3s" };
            worker = worker.args(["--timeout", limit, "--grace", "300ms"]);
        }
        if noisy {
            // Nobody reads the log for a while, and the command fills the pipe.
            let pause = format!("exec \"$0\" \"$@\" 2> >(sleep {}; exec cat >&2)", random.u32(1..6));
            worker = worker.args(["--log-level", "debug"]).through(["bash", "-c", &pause]);
        }
        let worker = worker
            .arg("--")
            .arg(std::env::current_exe().context("this program's path is unknown")?)
            .args(plan.arguments())
            .url(&url)
            .queue(&self.queue)
            .env(BOOK, &self.book)
            .env(RUN, number.to_string());
        let mut run = Run {
            number,
            started: now(),
            end: End::Hung,
            at: 0,
            count,
            acknowledged: Vec::new(),
            heard: !noisy,
            said: String::new(),
        };
        let worker = Arc::new(worker.spawn());
        self.register.lock().insert(number, worker.clone());
        let terminates = random.bool();
        self.follow(&worker, &mut run, wait, terminates);
        self.register.lock().remove(&number);
        Ok(run)
    }

    /// Waits for the end of a worker and of its processes. With `terminates`, sends it SIGTERM when its command has
    /// reached its time limit.
    fn follow(&self, worker: &Running, run: &mut Run, wait: Duration, mut terminates: bool) {
        let started = Instant::now();
        let limit = match self.options.cluster {
            Some(_) => HANG_CLUSTER,
            None => HANG,
        };
        let (mut hung, mut told) = (false, false);
        loop {
            let ended = worker.has_ended();
            let said = worker.stderr();
            let new = said.lines().filter_map(acknowledged_in);
            let new: Vec<_> = new.skip(run.acknowledged.len()).collect();
            run.acknowledged.extend(new.into_iter().map(|message| (message, now())));
            if ended {
                break;
            }
            if !told && wait > WAIT && self.ending.load(Relaxed) {
                // No more messages will be published for which it could wait.
                worker.signal(Signal::SIGTERM);
                told = true;
            }
            if terminates && said.contains("--timeout reached") {
                worker.signal(Signal::SIGTERM);
                terminates = false;
                self.note(|books| *books.faults.entry("SIGTERM after --timeout").or_default() += 1);
            }
            if started.elapsed() > limit {
                hung = true;
                worker.signal(Signal::SIGKILL);
            }
            std::thread::sleep(LOOK);
        }
        run.at = now();
        let finished = worker.finish(LOOK);
        run.end = match (finished.code, finished.signal) {
            _ if hung => End::Hung,
            (Some(code), _) => End::Exited(code as u8),
            (None, signal) => End::Signalled(signal.unwrap_or_default()),
        };
        run.said = finished.stderr;
        if run.end == End::Signalled(Signal::SIGKILL as i32) {
            self.killed.fetch_add(1, Relaxed);
        }
        if !eventually(LEFTOVER, || worker.leftovers().is_empty()) {
            let text = format!("processes {:?} of run {}", worker.leftovers(), run.number);
            self.note(|books| books.leftovers.push(text));
        }
    }

    /// Sends signals to random workers, until `--kills` of them are killed.
    pub(super) fn assassin(&self, mut random: fastrand::Rng) {
        while self.killed.load(Relaxed) < self.options.kills && !self.out_of_time() {
            self.pause(self.options.kill_pause());
            let live: Vec<_> = self.register.lock().values().cloned().collect();
            let signal = match random.u32(0..10) {
                0..7 => Signal::SIGKILL,
                7..9 => Signal::SIGTERM,
                _ => Signal::SIGINT,
            };
            if let Some(victim) = random.choice(&live) {
                victim.signal(signal);
            }
        }
    }
}

/// The message's number, if this line of a worker's log says that it was acknowledged.
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
