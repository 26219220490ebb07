//! The life of the command: signals, time limits, and the process itself.

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

/// Longest time from a signal to the end: two for a broker that doesn't answer, and much for a busy machine.
const PROMPT: Duration = Duration::from_secs(10);

/// Says `running` and waits; ends on any signal by default.
const WAITS: &str = "echo running; exec sleep 1000";

/// A queue of this kind with one message in it, and a proxy in front of its broker.
fn one_message(name: &str, kind: QueueKind) -> (Queue, Proxy) {
    let broker = Broker::shared();
    let queue = broker.declare(name).kind(kind).create();
    queue.publish(MESSAGE);
    (queue, Proxy::of(broker))
}

/// A worker whose command has come so far as to say `running`.
fn running(program: Program) -> Running {
    let running = program.spawn();
    running.wait_for_stdout("running", PATIENCE);
    running
}

/// Sends a signal and waits for the end, which has to come promptly and leave no process behind.
#[track_caller]
fn stop(running: &Running, signal: Signal) -> Finished {
    let told = Instant::now();
    running.signal(signal);
    let finished = running.finish(PROMPT);
    eprintln!("{signal} to end: {:?}", told.elapsed());
    running.wait_no_leftovers(PROMPT);
    finished
}

/// Sends a signal and waits until the worker is asleep with it no longer pending, so that it has dealt with it, or has ended.
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

/// How the worker settled, as the proxy has seen it.
#[track_caller]
fn assert_settled(proxy: &Proxy, by: Method) {
    let mut settlements = proxy.sent();
    settlements.retain(|method| [Method::BASIC_ACK, Method::BASIC_NACK, Method::BASIC_REJECT].contains(method));
    assert_eq!(settlements, [by]);
}
