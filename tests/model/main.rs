//! The protocol as a model, of which stateright visits every state: workers, a queue, the network and a Job, in every order
//! in which their steps can happen, and with faults at every point. It needs no broker and takes a minute of CPU time.
//!
//! # What is modelled
//!
//! - **The worker** ([`worker`]): one message a run. The decision is the real `verdict::decide`; the settlement has the steps
//!   of src/broker/settle.rs. A command succeeds, fails, fails for good (65), runs into `--timeout`, dies of the forwarded
//!   SIGTERM, or can't be started.
//! - **The broker** ([`broker`]): a classic queue, a quorum queue before 4.3, one of 4.3; prefetch of one, redelivery, delivery
//!   counts, and both kinds of acknowledgement timeout. In 4.3 the queue requeues first, and the channel hears of it later.
//! - **The network**: two wires a connection, each in order, and a cut that loses all that is on them. Both sides
//!   notice in their own time, so the broker may redeliver while the command still runs, and deliver to a worker that has gone.
//!   A frame that is lost is a cut in front of it: TCP has no other loss.
//! - **The Job controller** ([`job`]): as many completions as messages, and job.yaml's `podFailurePolicy`. It sees a pod's end
//!   some time later.
//! - **Faults**, as many as [`System`] allows: cut, SIGKILL, SIGTERM by eviction, acknowledgement timeout, and a crash of the
//!   broker that forgets an ack or none.
//! - **Time** only as order. Two assumptions: `--wait` is over only when nothing else can happen, and a queue of 4.3 has told its
//!   channel of a timeout when `RECHECK_PAUSE` has passed.
//!
//! # What is not
//!
//! `--count`, `--drain`, `--keep-going`, `--no-ack`, `--on-lost finish`; back-off and `--connect-timeout` (a broker that crashes is
//! back at once); refusals; deleted queues; single active consumers; `delivery-limit`; a cluster's leaders; signals but TERM and
//! KILL. A worker of a 4.3 queue always checks twice, as if each run had been long. A ready message in front is delivered first.
//!
//! # What is checked
//!
//! [`properties`] has the list. [`every_run_ends`] shows that no run goes round in a circle, so "nobody waits for ever" means that
//! each run comes to the end of its Job. [`seeded_bugs_are_found`] breaks the worker in one place after the other, and each property
//! by that: one that can't fail would say nothing.
//!
//! # Reading a counterexample
//!
//! A property that doesn't hold is reported with the shortest run that breaks it, a step a line, and the state behind the last. A number
//! is a worker's place, from 0; `Left(0)` is the first of the connections whose workers have gone. So
//!
//! ```text
//!   1. Connect(0)                     worker 0 registers its consumer
//!   2. Deliver(0, Worker(0))          the broker sends it message 0
//!   3. Receive(0)                     which arrives, and the command starts
//!   4. Cut(0)                         the network fails
//!   5. CommandEnds(0, Success)        cancel, ack and barrier are written, into nothing
//!   6. Notice(0)                      and the worker finds out
//! ```
//!
//! ends with the worker's `Ended(75, None)`: the exit status, and that it has removed no message.
//! To see one, run `cargo test --test model seeded -- --nocapture`, or change a step of `plan` in [`worker`].

mod broker;
mod job;
mod properties;
mod system;
mod worker;

use broker::Kind;
use properties::{ACCOUNTED, CONFIRMED, DONE_FIRST, EMPTY_QUEUE, NO_DEADLOCK, PROCESSED, UNBLAMED};
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
    check("quorum before 4.3", System::new(Kind::Quorum));
}

#[test]
fn quorum_queue_of_4_3() {
    check("quorum 4.3", System::new(Kind::Quorum43));
}

#[test]
fn dead_letters_that_count_as_done() {
    let mut system = System::new(Kind::Quorum43);
    system.policy.reject_exit_code = Some(0);
    check("quorum 4.3, --reject-exit-code 0", system);
}

#[test]
fn two_faults() {
    for kind in [Kind::Classic, Kind::Quorum43] {
        let system = System { faults: 2, failures: 0, ..System::new(kind) };
        check(&format!("{kind:?}, two faults"), system);
    }
}

#[test]
fn three_workers() {
    let system = System { workers: 3, failures: 0, ..System::new(Kind::Quorum43) };
    check("quorum 4.3, three workers", system);
}

/// No run goes on for ever, so [`NO_DEADLOCK`] says that every run comes to its end.
#[test]
fn every_run_ends() {
    for kind in [Kind::Classic, Kind::Quorum, Kind::Quorum43] {
        let states = without_circle(&small(kind, None)).expect("no circle");
        println!("{kind:?}: no circle in {states} states");
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
    System { messages: 2, bug, ..System::new(kind) }
}

/// Each property fails when it should.
#[test]
fn seeded_bugs_are_found() {
    use Kind::{Classic, Quorum, Quorum43};
    let seeded = [
        (Bug::AckFirst, Classic, DONE_FIRST),
        (Bug::AlwaysZero, Quorum, PROCESSED),
        (Bug::CancelAfterAck, Quorum43, UNBLAMED),
        (Bug::CancelIgnored, Quorum43, CONFIRMED),
        (Bug::CloseToRelease, Quorum43, UNBLAMED),
        (Bug::NoBarrier, Quorum, CONFIRMED),
        (Bug::NoHeartbeats, Quorum, NO_DEADLOCK),
        (Bug::NoHeartbeats, Classic, EMPTY_QUEUE),
        (Bug::NoRecheck, Quorum43, CONFIRMED),
        (Bug::RejectNotRun, Quorum43, UNBLAMED),
        (Bug::SignalEndsSettling, Classic, ACCOUNTED),
        (Bug::TrustUnconfirmed, Classic, CONFIRMED),
        (Bug::TrustUnconfirmed, Quorum43, PROCESSED),
    ];
    for (bug, kind, property) in seeded {
        let Some(path) = shortest(&small(kind, Some(bug)), property) else {
            panic!("{bug:?} on {kind:?} doesn't break \"{property}\"");
        };
        let steps = path.into_actions();
        println!("{bug:?}, {kind:?}: \"{property}\" broken in {} steps: {steps:?}", steps.len());
    }
    for property in small(Classic, None).properties() {
        let bites = seeded.iter().any(|(_, _, broken)| *broken == property.name);
        let always = property.expectation == Expectation::Always;
        assert!(bites || !always, "no bug breaks \"{}\"", property.name);
    }
}
