//! A scripted peer plays the model's runs against the real binary. The program must write the same to the broker and
//! exit with the same status, so that program and model can't drift apart.

mod play;
mod run;

use crate::{
    broker::Kind,
    seeded_bugs, shortest,
    system::{Action, Bug, System},
};
use play::play;
use run::{Run, Walk};
use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

/// The variable with the seed: `QCONSUME_TEST_SEED=1234` draws the same runs again, and `1234/5` plays only number 5 of
/// them.
const SEED: &str = "QCONSUME_TEST_SEED";

/// Runs to play of each system, at most.
const RUNS: usize = 30;

/// Random walks through each system from which the runs are drawn.
const WALKS: usize = 300;

/// Runs at a time; they mostly wait.
const LANES: usize = 8;

/// The systems from which runs are drawn.
fn systems() -> Vec<System> {
    use Kind::{Classic, Quorum, Quorum43};
    let several = |kind| System { count: Some(2), messages: 4, ..System::new(kind) };
    let drain = |kind| System { count: None, ..System::new(kind) };
    let keep_going = |system| System { keep_going: true, failures: 2, ..system };
    let mut dead_is_done = keep_going(drain(Quorum));
    dead_is_done.policy.reject_exit_code = Some(0);
    vec![
        System::new(Classic),
        System::new(Quorum),
        System { long: true, ..System::new(Quorum) },
        System::new(Quorum43),
        System { faults: 2, ..System::new(Quorum43) },
        several(Classic),
        several(Quorum43),
        keep_going(several(Quorum)),
        drain(Quorum),
        drain(Quorum43),
        keep_going(drain(Classic)),
        keep_going(drain(Quorum43)),
        dead_is_done,
        System::new(Quorum).no_ack(),
        several(Quorum).no_ack(),
    ]
}

/// Up to [`RUNS`] random runs of a system, no two of which have the same signature.
fn drawn(system: &System, random: &mut fastrand::Rng) -> Vec<Run> {
    let mut kinds = BTreeMap::new();
    for _ in 0..WALKS {
        let mut walk = Walk::new(system);
        while let Some(action) = next(&walk, random) {
            walk.take(action);
        }
        kinds.extend(walk.runs.into_iter().map(|run| (run.signature(), run)));
    }
    let mut runs: Vec<_> = kinds.into_values().collect();
    random.shuffle(&mut runs);
    runs.truncate(RUNS);
    runs
}

/// A random step. Faults and failures are rare, so that they come at any point and not all at the beginning.
fn next(walk: &Walk, random: &mut fastrand::Rng) -> Option<Action> {
    let actions = walk.actions();
    let is_rare = |action: &Action| action.is_fault() || action.is_failure();
    let (rare, usual): (Vec<_>, Vec<_>) = actions.into_iter().partition(is_rare);
    let wanted = if random.u8(..12) == 0 { [rare, usual] } else { [usual, rare] };
    wanted.into_iter().find(|actions| !actions.is_empty()).and_then(|actions| random.choice(actions))
}

/// Runs of the correct model in which a seeded bug would show: the bug's counterexample, without the steps that aren't
/// possible, and then random steps.
fn counterexample(system: &System, property: &'static str, random: &mut fastrand::Rng) -> Vec<Run> {
    let path = shortest(system, property).expect("seeded_bugs_are_found checks it");
    let system = System { bug: None, ..system.clone() };
    let mut walk = Walk::new(&system);
    for action in path.into_actions() {
        if walk.actions().contains(&action) {
            walk.take(action);
        }
    }
    let mut left = system.workers;
    while let Some(action) = next(&walk, random).filter(|_| left > 0) {
        if matches!(action, Action::Observe(_)) {
            left -= 1;
        }
        walk.take(action);
    }
    walk.runs
}

#[test]
fn the_program_does_what_the_model_does() {
    let named = std::env::var(SEED).unwrap_or_else(|_| fastrand::u32(..).to_string());
    let (seed, only) = match named.split_once('/') {
        Some((seed, only)) => (seed, Some(only.parse::<usize>().expect("a number"))),
        None => (named.as_str(), None),
    };
    println!("{SEED}={seed}");
    let mut random = fastrand::Rng::with_seed(seed.parse().expect("a number"));
    let mut runs: Vec<(Option<Bug>, Run)> = Vec::new();
    for (system, property) in seeded_bugs() {
        let shown = counterexample(&system, property, &mut random);
        runs.extend(shown.into_iter().map(|run| (system.bug, run)));
    }
    for system in systems() {
        runs.extend(drawn(&system, &mut random).into_iter().map(|run| (None, run)));
    }
    let next = AtomicUsize::new(0);
    let (played, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..LANES {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Relaxed);
                    let Some((bug, run)) = runs.get(n) else {
                        return;
                    };
                    if only.is_some_and(|only| only != n) {
                        continue;
                    }
                    if let Err(difference) = play(run, n as u64) {
                        let drawn = bug.map_or("drawn".to_owned(), |bug| format!("{bug:?}"));
                        failures.lock().unwrap().push(format!("{SEED}={seed}/{n} ({drawn}): {difference}"));
                    }
                    played.fetch_add(1, Relaxed);
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{} runs of the model played against the program, {} differ", played.into_inner(), failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
