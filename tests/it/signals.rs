//! The command as a process: signals, time limits, and processes that it leaves behind.

mod eviction;
mod limits;
mod process;
mod random;
mod states;
mod strangers;
mod terminal;

use crate::common::{MESSAGE, assert_back, assert_gone, behind, qconsume, worker};
use std::time::{Duration, Instant};
use testbed::{
    Broker, Direction, Finished, Method, PATIENCE, Program, Proxy, Queue, QueueKind, Running, Signal, emulator_lacks,
    eventually,
};

/// Longest time from a signal to the end: two seconds each for the release and for the goodbye if the broker doesn't
/// answer, the rest for a busy machine.
const PROMPT: Duration = Duration::from_secs(10);

/// Prints `running` and waits; any signal ends it.
const WAITS: &str = "echo running; exec sleep 1000";

/// A queue of this kind with one message, and a proxy to its broker.
fn one_message(name: &str, kind: QueueKind) -> (Queue, Proxy) {
    let broker = Broker::shared();
    let queue = broker.declare(name).kind(kind).create();
    queue.publish(MESSAGE);
    (queue, Proxy::of(broker))
}

/// Starts the worker, and waits until its command has printed `running`.
fn running(program: Program) -> Running {
    let running = program.spawn();
    running.wait_for_stdout("running", PATIENCE);
    running
}

/// Sends a signal; checks that the run ends promptly and leaves no process behind.
#[track_caller]
fn stop(running: &Running, signal: Signal) -> Finished {
    let told = Instant::now();
    running.signal(signal);
    let finished = running.finish(PROMPT);
    eprintln!("{signal} to end: {:?}", told.elapsed());
    running.wait_no_leftovers(PROMPT);
    finished
}

/// Sends a signal, and waits until the worker has handled it (it sleeps and the signal isn't pending) or has ended.
#[track_caller]
fn signal_and_wait(running: &Running, signal: Signal) {
    running.signal(signal);
    let dealt_with = || {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", running.pid())) else {
            return true;
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        let pending = u64::from_str_radix(&field("ShdPnd:"), 16).unwrap();
        pending >> (signal as i32 - 1) & 1 == 0 && field("State:").starts_with('S')
    };
    assert!(eventually(PATIENCE, dealt_with), "{signal} is still pending");
}

/// Checks that the worker sent exactly this settlement through the proxy.
#[track_caller]
fn assert_settled(proxy: &Proxy, by: Method) {
    let mut settlements = proxy.sent();
    settlements.retain(|method| [Method::BASIC_ACK, Method::BASIC_NACK, Method::BASIC_REJECT].contains(method));
    assert_eq!(settlements, [by]);
}
