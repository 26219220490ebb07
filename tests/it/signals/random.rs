//! A hundred signals at random moments of a run.

use super::*;
use std::{collections::BTreeMap, sync::Mutex, thread};
use testbed::block_on;

const RUNS: usize = 100;

/// Workers at a time.
const LANES: usize = 4;

/// The variable with the seed of the random moments.
const SEED: &str = "QCONSUME_TEST_SEED";

/// The workers' commands, in turns. After the signal the first dies of it, the second succeeds, and the third fails.
const COMMANDS: [&str; 3] = [
    "cat >/dev/null; exec sleep 0.1",
    "trap 'exit 0' TERM; cat >/dev/null; sleep 0.1 & wait; exit 0",
    "cat >/dev/null; sleep 0.05 & sleep 0.05; exit 3",
];

#[test]
fn a_signal_at_any_moment_leaves_the_message_either_done_or_in_the_queue() {
    let seed = std::env::var(SEED).map_or(20_161_121, |seed| seed.parse().unwrap());
    let broker = Broker::shared();
    let table = Mutex::new(BTreeMap::<(i32, &str), usize>::new());
    thread::scope(|scope| {
        for lane in 0..LANES {
            let table = &table;
            scope.spawn(move || {
                let kind = QueueKind::ALL[lane % 2];
                let queue = broker.declare("random").kind(kind).create();
                let mut random = fastrand::Rng::with_seed(seed + lane as u64);
                // How long a run takes without a signal, while the other lanes are running.
                let calm = (0..2).map(|_| calm(&queue)).max().unwrap();
                eprintln!("lane {lane}: a run takes {calm:?}");
                for run in (lane..RUNS).step_by(LANES) {
                    // Every eighth signal may come long after a normal run's end, in case the machine is slow just
                    // then.
                    let reach = if run % 8 == 0 { 4.0 } else { 1.1 };
                    let moment = calm.mul_f64(random.f64() * reach);
                    let entry = run_once(&queue, run, moment);
                    *table.lock().unwrap().entry(entry).or_default() += 1;
                }
                // No message of a successful run was requeued.
                queue.wait_consumers(0);
                queue.wait_ready(0);
                assert!(queue.get().is_none());
            });
        }
    });
    let table = table.into_inner().unwrap();
    eprintln!("seed {seed}");
    for ((status, message), runs) in &table {
        eprintln!("status {status:3}, message {message}: {runs}");
    }
    // The moments prove something only if both ends occurred.
    for met in [0, 143] {
        assert!(table.keys().any(|(status, _)| *status == met), "no run ended with {met}");
    }
}

/// How long a run takes without a signal.
fn calm(queue: &Queue) -> Duration {
    queue.publish("the message");
    let finished = worker(queue).shell(COMMANDS[0]).run();
    finished.assert_status(0);
    finished.wall
}

/// One run with a signal at this moment; returns its status, and where the message is.
fn run_once(queue: &Queue, run: usize, moment: Duration) -> (i32, &'static str) {
    let body = format!("message {run}");
    queue.publish(&body);
    let running = worker(queue).shell(COMMANDS[run % COMMANDS.len()]).spawn();
    block_on(async { tokio::time::sleep(moment).await });
    let finished = stop(&running, Signal::SIGTERM);
    match finished.status() {
        0 => {
            assert!(queue.get().is_none(), "run {run}: exit 0, but the message is still in the queue");
            (0, "gone")
        }
        status @ (3 | 143) => {
            assert_eq!(queue.wait_get().text(), body, "run {run}");
            (status, "back")
        }
        _ => panic!("run {run}, after {moment:?}: {finished:?}"),
    }
}
