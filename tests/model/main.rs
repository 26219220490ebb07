//! The protocol as a model, of which stateright visits every state: workers, a queue, the network and a Job, in every order
//! in which their steps can happen, and with faults at every point. It needs no broker and takes a minute of CPU time.
//!
//! # What is modelled
//!
//! - **The worker** ([`worker`]) is src's own code where it decides anything: `verdict::decide`, `verdict::Course` and
//!   `settlement::Settling`. It takes one message a run, or `--count` or `--drain` says how many, with `--keep-going` or `--no-ack`.
//!   A command succeeds, fails, fails for good (65), runs into `--timeout`, dies of the forwarded SIGTERM, or can't be started.
//! - **The broker** ([`broker`]): a classic queue, a quorum queue before 4.3, one of 4.3; prefetch of one, redelivery, delivery
//!   counts, and both kinds of acknowledgement timeout. In 4.3 the queue requeues first, and the channel hears of it later.
//! - **The network**: two wires a connection, each in order, and a cut that loses all that is on them. Both sides
//!   notice in their own time, so the broker may redeliver while the command still runs, and deliver to a worker that has gone.
//!   A frame that is lost is a cut in front of it: TCP has no other loss.
//! - **The Job controller** ([`job`]): as many completions as messages, or as `--count` makes of them, and job.yaml's
//!   `podFailurePolicy`. It sees a pod's end some time later.
//! - **Faults**, as many as [`System`] allows: cut, SIGKILL, SIGTERM by eviction, acknowledgement timeout, a crash of the broker that
//!   forgets an ack or none, and a queue that requeues what a worker holds, as its leader has lost sight of the worker's node.
//! - **Time** only as order. Two assumptions: `--wait` is over only when nothing else can happen, and a queue of 4.3 has told its
//!   channel of a timeout when the pause before the second barrier has passed.
//!
//! # What no client can know
//!
//! A queue that has lost sight of a node drops an acknowledgement from there without a word (docs/cluster.md). The worker can know of
//! that only by a delivery while it holds another one. So the fault is restricted to what shows: in the same step the queue delivers to
//! this worker again, the same message or, while another worker gets that one, another message. It isn't there
//!
//! - if nothing is delivered to this worker, as there is nothing, or as its consumer is cancelled by then;
//! - if the worker wants more messages, so that its consumer isn't cancelled, and gets *another* message: when its acknowledgement is
//!   written before it sees that one, it looks like the next message. Then only the same message is delivered again.
//!
//! # What is not modelled
//!
//! `--on-lost finish`; back-off and `--connect-timeout` (a broker that crashes is back at once, and subscribing is one step); refusals;
//! deleted queues; messages that can't be read, or arrive in pieces; single active consumers;
//! `delivery-limit`; signals but TERM and KILL. Runs are all as short as a task of milliseconds or all so long that the broker is asked
//! twice ([`System::long`]). A ready message in front is delivered first.
//!
//! # What is checked
//!
//! [`properties`] has the list. [`every_run_ends`] shows that no run goes round in a circle, so "nobody waits for ever" means that
//! each run comes to the end of its Job. [`seeded_bugs_are_found`] breaks the worker in one place after the other, and each property
//! by that: one that can't fail would say nothing.
//!
//! What carries the decisions out is still a copy of src/worker.rs and src/broker/consume/settle.rs. [`replay`] asks the program itself, and
//! fails if the two differ.
//!
//! # Reading a counterexample
//!
//! A property that doesn't hold is reported with the shortest run that breaks it, a step a line, and the state after the last. A number
//! is a worker's place, from 0; `Left(0)` is the first of the connections whose workers have gone. So
//!
//! ```text
//!   1. Connect(0)                     worker 0 subscribes
//!   2. Deliver(0, Worker(0))          the broker sends it message 0
//!   3. Receive(0)                     which arrives
//!   4. Start(0)                       and the command starts
//!   5. Cut(0)                         the network fails
//!   6. CommandEnds(0, Success)        cancel, ack and barrier are written, into nothing
//!   7. Notice(0)                      and the worker finds out
//! ```
//!
//! ends with the worker's `Ended`: status 75, and no message that it has removed.
//! To see one, run `cargo test --test model seeded -- --nocapture`, or change a step of [`worker`].

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

/// Checks every property in every state; workers that have changed places make no other state.
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
            Expectation::Sometimes => assert!(found, "never: {}", property.name),
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

/// The shortest way to break a property, if there is one. The checker ends with one that is nearly that, so it is asked
/// for a shorter one until there is none.
fn shortest(system: &System, property: &'static str) -> Option<Path<State, Action>> {
    let (mut best, mut depth) = (None, usize::MAX);
    loop {
        let found = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let checker = system.clone().checker().finish_when(found);
        let checker = checker.target_max_depth(depth).spawn_bfs().join();
        let Some(path) = checker.discovery(property) else {
            return best;
        };
        // The depth counts states, and its last one isn't looked at: one step less than this path has.
        depth = path.clone().into_actions().len() + 1;
        best = Some(path);
    }
}

/// A counterexample: the steps in their order, and the state that they lead to.
fn story(system: &System, property: &'static str) -> String {
    let path = shortest(system, property).expect("it was found before");
    let last = path.last_state().clone();
    let steps = path.into_actions().into_iter().zip(1..);
    let steps: String = steps.map(|(it, n)| format!("{n:3}. {it:?}\n")).collect();
    format!("not so: {property}\n{steps}{last:#?}")
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

/// No run goes on for ever, so [`NO_DEADLOCK`] says that every run comes to its end.
#[test]
fn every_run_ends() {
    let two_workers =
        [Kind::Classic, Kind::Quorum43].map(|kind| System { workers: 2, failures: 0, ..small(kind, None) });
    let several = System { count: Some(2), keep_going: true, failures: 2, ..small(Kind::Quorum43, None) };
    let drain = System { count: None, keep_going: true, failures: 2, ..small(Kind::Quorum, None) };
    for system in two_workers.into_iter().chain([several, drain]) {
        let states = without_circle(&system).expect("no circle");
        println!("{:?}, --count {:?}: no circle in {states} states", system.kind, system.count);
    }
    let circle = without_circle(&small(Kind::Classic, Some(Bug::Reconnects)));
    assert!(circle.is_err());
}

/// Depth first: a state that is met again before everything behind it was visited is on a circle.
fn without_circle(system: &System) -> Result<usize, Box<State>> {
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

/// Enough for every seeded bug.
fn small(kind: Kind, bug: Option<Bug>) -> System {
    System { messages: 2, workers: 1, bug, ..System::new(kind) }
}

/// Each seeded bug, in a system that it breaks, and the property that says so.
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

/// Each property fails when it should.
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
            "{:?}, {kind:?}: \"{property}\" broken in {} steps: {steps:?}",
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
