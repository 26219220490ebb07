//! A model of the protocol: workers, a queue, the network and a Job. Stateright visits every state, so the model's
//! steps happen in every possible order, with faults at every point. It needs no broker and takes a minute of CPU time.
//!
//! # What is modelled
//!
//! - **The worker** ([`worker`]) makes its decisions with the code in src/: `verdict::decide`, `verdict::RunState` and
//!   `settlement::Settling`. It takes one message in a run, or as many as `--count` or `--drain` says, perhaps with
//!   `--keep-going` or `--no-ack`. A command succeeds, fails, fails permanently (65), runs into `--timeout`, dies of
//!   the forwarded SIGTERM, or can't be started.
//! - **The broker** ([`broker`]): a classic queue, a quorum queue before 4.3, or one of 4.3; a prefetch of one,
//!   redelivery, delivery counts, and both kinds of acknowledgement timeout. In 4.3 the queue requeues first, and
//!   informs the channel later.
//! - **The network**: each connection has two directions, each of which keeps the order, and a cut drops everything in
//!   transit. The two sides notice a cut independently, so the broker may redeliver while the command still runs, or
//!   deliver to a worker that is gone. A lost frame is the same as a cut before it, as TCP loses nothing else.
//! - **The Job controller** ([`job`]): a completion for each message, or for each `--count` messages, and job.yaml's
//!   `podFailurePolicy`. It sees a pod's end some time later.
//! - **Faults**, as many as [`System`] allows: a cut, SIGKILL, an eviction (SIGTERM), an acknowledgement timeout, a
//!   crash of the broker, in which it may forget an ack, and a queue that requeues a worker's message because its
//!   leader has lost contact with the worker's node.
//! - **Time** is modelled only as order, with two assumptions: `--wait` ends only when nothing else can happen, and a
//!   queue of 4.3 informs its channel of a timeout before the pause that precedes the second barrier is over.
//!
//! # What no client can know
//!
//! A queue that has lost contact with a node silently drops acknowledgements from there (docs/cluster.md). A worker can
//! notice that only if it gets a delivery while it holds another message. So the model has this fault only if it shows:
//! in the same step the queue delivers to this worker again, either the same message, or another one while some other
//! worker gets the first. The model leaves out two cases:
//!
//! - nothing is delivered to this worker, because no message is ready or its consumer is cancelled;
//! - the worker wants more messages, so its consumer isn't cancelled, and it gets *another* message. If it has written
//!   its acknowledgement before, this looks like the next message. In that situation only the same message is delivered
//!   again.
//!
//! # What is not modelled
//!
//! `--on-lost finish`; back-off and `--connect-timeout` (a crashed broker is back at once, and subscribing is one
//! step); refusals; deleted queues; messages that can't be read, or arrive in pieces; single active consumers;
//! `delivery-limit`; signals other than TERM and KILL. Either all runs are short, or all are long enough for a second
//! barrier ([`System::long`]). The queue always delivers its first ready message.
//!
//! # What is checked
//!
//! [`properties`] has the list. [`every_run_ends`] shows that no run is a cycle, so "nobody waits for ever" means that
//! each run reaches the end of its Job. [`seeded_bugs_are_found`] puts one bug after the other into the worker and
//! checks that each breaks a property: a property that can't fail proves nothing.
//!
//! The code that carries out the decisions is a copy of src/worker.rs and src/broker/consume/settle.rs. [`replay`]
//! plays the model's runs against the real program and fails if the two differ.
//!
//! # Reading a counterexample
//!
//! If a property doesn't hold, the test prints the shortest run that breaks it, with a step in each line, and the last
//! state. Numbers are workers, from 0; `Left(0)` is the first of the connections whose workers have gone. For example,
//!
//! ```text
//!   1. Connect(0)                     worker 0 subscribes
//!   2. Deliver(0, Worker(0))          the broker sends it message 0
//!   3. Receive(0)                     which arrives
//!   4. Start(0)                       and the command starts
//!   5. Cut(0)                         the network fails
//!   6. CommandEnds(0, Success)        cancel, ack and barrier are written, but lost
//!   7. Notice(0)                      and the worker notices the cut
//! ```
//!
//! ends with the worker in the phase `Ended`, with status 75 and no removed message.
//! To see some, run `cargo test --test model seeded -- --nocapture`, or change a step of [`worker`].

mod broker;
mod job;
mod properties;
mod replay;
mod system;
mod worker;

use broker::Kind;
use properties::{ACCOUNTED, CONFIRMED, DONE_FIRST, EMPTY_QUEUE, NO_DEADLOCK, PROCESSED, STOPS, TOLD, UNBLAMED};
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};
use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};
use system::{Action, Bug, State, System};

/// Checks every property in every state; states that differ only in the order of the workers count as one.
fn check(name: &str, system: System) {
    let start = Instant::now();
    let checker = system.clone().checker().threads(2).symmetry_fn(sorted);
    let checker = checker.spawn_dfs().join();
    println!(
        "{name}: {} states, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.max_depth(),
        start.elapsed().as_secs_f64()
    );
    for property in system.properties() {
        let found = checker.discovery(property.name).is_some();
        match property.expectation {
            Expectation::Sometimes => assert!(found, "not reachable: {}", property.name),
            _ if found => panic!("{}", story(&system, property.name)),
            _ => {}
        }
    }
}

fn sorted(state: &State) -> State {
    let mut state = state.clone();
    state.workers.sort();
    state
}

/// The shortest path that breaks a property, if there is one. The checker's first one isn't always the shortest, so ask
/// for shorter ones until there is none.
fn shortest(system: &System, property: &'static str) -> Option<Path<State, Action>> {
    let (mut best, mut depth) = (None, usize::MAX);
    loop {
        let found = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let checker = system.clone().checker().finish_when(found);
        let checker = checker.target_max_depth(depth).spawn_bfs().join();
        let Some(path) = checker.discovery(property) else {
            return best;
        };
        // The depth counts states, and the checker ignores the last one, so this asks for one step less.
        depth = path.clone().into_actions().len() + 1;
        best = Some(path);
    }
}

/// A counterexample as text: its steps, and the state that they lead to.
fn story(system: &System, property: &'static str) -> String {
    let path = shortest(system, property).expect("the checker has found a counterexample");
    let last = path.last_state().clone();
    let steps = path.into_actions().into_iter().zip(1..);
    let steps: String = steps.map(|(it, n)| format!("{n:3}. {it:?}\n")).collect();
    format!("doesn't hold: {property}\n{steps}{last:#?}")
}

#[test]
fn classic_queue() {
    check("classic", System::new(Kind::Classic));
}

#[test]
fn quorum_queue() {
    check("quorum before 4.3", System { messages: 2, ..System::new(Kind::Quorum) });
    check("quorum before 4.3, long runs", System { messages: 2, long: true, ..System::new(Kind::Quorum) });
}

#[test]
fn quorum_queue_of_4_3() {
    check("quorum 4.3", System::new(Kind::Quorum43));
}

#[test]
fn dead_letters_that_count_as_done() {
    let mut system = System { messages: 2, ..System::new(Kind::Quorum43) };
    system.policy.reject_exit_code = Some(0);
    check("quorum 4.3, --reject-exit-code 0", system);
}

#[test]
fn two_faults() {
    for kind in [Kind::Classic, Kind::Quorum, Kind::Quorum43] {
        let system = System { messages: 2, faults: 2, failures: 0, ..System::new(kind) };
        check(&format!("{kind:?}, two faults"), system);
    }
}

#[test]
fn three_workers() {
    let system = System { workers: 3, failures: 0, ..System::new(Kind::Quorum) };
    check("quorum before 4.3, three workers", system);
}

#[test]
fn several_messages_a_run() {
    let of_four = System { count: Some(2), messages: 4, failures: 0, ..System::new(Kind::Quorum) };
    check("quorum before 4.3, --count 2", of_four);
    for keep_going in [false, true] {
        let failing = System { count: Some(2), messages: 2, keep_going, ..System::new(Kind::Quorum43) };
        check(&format!("quorum 4.3, --count 2, failures, --keep-going {keep_going}"), failing);
    }
}

#[test]
fn drained_queue() {
    let drain = |kind| System { count: None, messages: 2, ..System::new(kind) };
    check("quorum 4.3, --drain", drain(Kind::Quorum43));
    check("quorum before 4.3, --drain --keep-going", System { keep_going: true, ..drain(Kind::Quorum) });
    check("classic, --drain --keep-going", System { keep_going: true, workers: 1, ..drain(Kind::Classic) });
}

#[test]
fn acknowledged_beforehand() {
    check("quorum before 4.3, --no-ack", System::new(Kind::Quorum).no_ack());
    let several = System { count: Some(2), messages: 2, ..System::new(Kind::Quorum) };
    check("quorum before 4.3, --no-ack --count 2", several.no_ack());
}

/// No run is endless, so [`NO_DEADLOCK`] means that every run reaches its end.
#[test]
fn every_run_ends() {
    let two_workers =
        [Kind::Classic, Kind::Quorum43].map(|kind| System { workers: 2, failures: 0, ..small(kind, None) });
    let several = System { count: Some(2), keep_going: true, failures: 2, ..small(Kind::Quorum43, None) };
    let drain = System { count: None, keep_going: true, failures: 2, ..small(Kind::Quorum, None) };
    for system in two_workers.into_iter().chain([several, drain]) {
        let states = without_cycle(&system).expect("no cycle");
        println!("{:?}, --count {:?}: no cycle in {states} states", system.kind, system.count);
    }
    let cycle = without_cycle(&small(Kind::Classic, Some(Bug::Reconnects)));
    assert!(cycle.is_err());
}

/// The number of states, or a state that is on a cycle: depth first, one that is reached again before its successors
/// are visited.
fn without_cycle(system: &System) -> Result<usize, Box<State>> {
    let mut all_visited: HashMap<State, bool> = HashMap::new();
    let first = system.init_states();
    let mut stack: Vec<_> = first.into_iter().map(|state| (state, false)).collect();
    while let Some((state, visited)) = stack.pop() {
        if visited {
            all_visited.insert(state, true);
            continue;
        }
        match all_visited.get(&state) {
            Some(true) => {}
            Some(false) => return Err(Box::new(state)),
            None => {
                all_visited.insert(state.clone(), false);
                let next = system.next_states(&state);
                stack.push((state, true));
                stack.extend(next.into_iter().map(|state| (state, false)));
            }
        }
    }
    Ok(all_visited.len())
}

/// A small system, in which every seeded bug shows.
fn small(kind: Kind, bug: Option<Bug>) -> System {
    System { messages: 2, workers: 1, bug, ..System::new(kind) }
}

/// Each seeded bug in a system, and the property that it breaks.
fn seeded_bugs() -> Vec<(System, &'static str)> {
    use Kind::{Classic, Quorum, Quorum43};
    let one = |bug, kind| small(kind, Some(bug));
    let several = |bug, kind| System { count: Some(2), ..one(bug, kind) };
    let drain = |bug, kind| System { count: None, ..one(bug, kind) };
    let two_faults = |bug, kind| System { faults: 2, failures: 0, ..one(bug, kind) };
    let no_ack = |bug, kind| one(bug, kind).no_ack();
    let mut dead_is_done = drain(Bug::SignalAfterTimeLimit, Quorum);
    dead_is_done.policy.reject_exit_code = Some(0);
    dead_is_done.policy.max_attempts = Some(1);
    vec![
        (one(Bug::RedeliveryUnseen, Quorum), CONFIRMED),
        (several(Bug::RedeliveryUnseen, Quorum), CONFIRMED),
        (drain(Bug::RedeliveryUnseen, Quorum), CONFIRMED),
        (two_faults(Bug::LossAfterReply, Quorum43), CONFIRMED),
        (one(Bug::AsksOnce, Quorum43), CONFIRMED),
        (dead_is_done.clone(), STOPS),
        (dead_is_done, CONFIRMED),
        (one(Bug::SignalBeforeStart, Classic), STOPS),
        (no_ack(Bug::SignalBeforeStart, Quorum), STOPS),
        (one(Bug::AckFirst, Classic), DONE_FIRST),
        (one(Bug::AlwaysZero, Quorum), PROCESSED),
        (one(Bug::CancelAfterAck, Quorum43), UNBLAMED),
        (one(Bug::CancelIgnored, Quorum43), CONFIRMED),
        (one(Bug::CloseToRelease, Quorum43), UNBLAMED),
        (drain(Bug::DropsLateMessage, Quorum43), UNBLAMED),
        (System { keep_going: true, ..drain(Bug::ForgetsDeadLetters, Quorum) }, TOLD),
        (one(Bug::NoBarrier, Quorum), CONFIRMED),
        (one(Bug::NoHeartbeats, Quorum), NO_DEADLOCK),
        (one(Bug::NoHeartbeats, Classic), EMPTY_QUEUE),
        (one(Bug::RejectNotRun, Quorum43), UNBLAMED),
        (one(Bug::SignalEndsSettling, Classic), ACCOUNTED),
        (one(Bug::TrustUnconfirmed, Classic), CONFIRMED),
        (one(Bug::TrustUnconfirmed, Quorum43), PROCESSED),
    ]
}

/// Each seeded bug breaks its property, and each property is broken by a bug.
#[test]
fn seeded_bugs_are_found() {
    let seeded = seeded_bugs();
    for (system, property) in &seeded {
        let (bug, kind) = (system.bug, system.kind);
        let Some(path) = shortest(system, property) else {
            panic!("{bug:?} on {kind:?} doesn't break \"{property}\"");
        };
        let steps = path.into_actions();
        println!(
            "{:?}, {kind:?}: breaks \"{property}\" in {} steps: {steps:?}",
            bug.expect("one is seeded"),
            steps.len()
        );
    }
    for property in small(Kind::Classic, None).properties() {
        let bites = seeded.iter().any(|(_, broken)| *broken == property.name);
        let always = property.expectation == Expectation::Always;
        assert!(bites || !always, "no bug breaks \"{}\"", property.name);
    }
}
