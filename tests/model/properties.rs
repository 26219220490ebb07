//! The properties that must hold in every state, and the states that must be reachable, so that the properties mean
//! something.

use crate::{
    broker::{Id, Message, Place},
    job::JobStatus,
    system::{Action, State, System},
    worker::{End, KILLED, Phase, TERMINATED, Worker},
};
use stateright::{Model, Property};

pub const CONFIRMED: &str = "if a worker exits 0, it has removed each message that it was asked for";
pub const DONE_FIRST: &str = "a message is acknowledged only after a command has succeeded with it";
pub const ACCOUNTED: &str = "a worker that has acknowledged a message exits 0 or 75, or is killed";
pub const UNBLAMED: &str = "we raise no delivery count of a message whose command never ran";
pub const PROCESSED: &str = "if the Job is Complete, every message is processed";
pub const EMPTY_QUEUE: &str = "if only the end of --wait can go on, the queue is empty";
pub const STOPS: &str = "no command starts after a stop signal";
pub const TOLD: &str = "if a worker exits 0, it has dead-lettered no message, unless that counts as done";
pub const NO_DEADLOCK: &str = "nobody waits for ever";

/// The workers whose end the Job controller hasn't seen yet.
fn ended(state: &State) -> impl Iterator<Item = End> {
    state.workers.iter().filter_map(|worker| match worker.phase {
        Phase::Ended(end) => Some(end),
        _ => None,
    })
}

fn any(state: &State, place: Place) -> bool {
    state.queue.0.iter().any(|message| message.place == place)
}

fn runs(state: &State, id: Id) -> usize {
    let phases = state.workers.iter().map(|worker| worker.phase);
    let runs = |phase: &Phase| matches!(phase, Phase::Running(run) if run.delivery.id == id);
    phases.filter(runs).count()
}

fn actions(system: &System, state: &State) -> Vec<Action> {
    let mut actions = Vec::new();
    system.actions(state, &mut actions);
    actions
}

fn confirmed(_: &System, state: &State) -> bool {
    ended(state).all(|end| end.status != 0 || end.fulfilled)
}

fn done_first(system: &System, state: &State) -> bool {
    let mut messages = state.queue.0.iter();
    system.no_ack || messages.all(|message| message.place != Place::Acknowledged || message.done)
}

/// Only for runs of one message: a run of several may have acknowledged some, whatever its status.
fn accounted(system: &System, state: &State) -> bool {
    let acknowledged = |id: Id| state.queue.0[usize::from(id)].place == Place::Acknowledged;
    let is_told = |end: End| matches!(end.status, 0 | 75 | KILLED) || !end.removed.is_some_and(acknowledged);
    system.count != Some(1) || system.no_ack || ended(state).all(is_told)
}

fn stops(_: &System, state: &State) -> bool {
    state.workers.iter().all(|worker| !worker.started_late)
}

fn told(system: &System, state: &State) -> bool {
    system.policy.reject_exit_code == Some(0) || ended(state).all(|end| end.status != 0 || !end.dead_lettered)
}

fn unblamed(_: &System, state: &State) -> bool {
    state.queue.0.iter().all(|message| !message.blamed)
}

/// With `--reject-exit-code 0` a dead letter counts as done. For each forgotten ack, one message may be processed twice
/// instead of another. Doesn't apply to `--drain` (a pod that finds the queue empty knows nothing about messages that
/// others hold) or `--no-ack` (a failure loses a message).
fn processed(system: &System, state: &State) -> bool {
    let dead_is_done = system.policy.reject_exit_code == Some(0);
    let processed = |message: &&Message| message.done || dead_is_done && message.place == Place::DeadLettered;
    let missing = state.queue.0.len() - state.queue.0.iter().filter(processed).count();
    let exempt = system.drains() || system.no_ack;
    exempt || state.job.status != JobStatus::Complete || missing <= state.forgotten.into()
}

fn empty_queue(system: &System, state: &State) -> bool {
    let waits = |worker: &Worker| matches!(worker.phase, Phase::Waiting { .. });
    let ends_the_wait = |action: &Action| matches!(action, Action::WaitOver(_));
    // `actions` is slow, so it comes last.
    !any(state, Place::Ready) || !state.workers.iter().any(waits) || !actions(system, state).iter().any(ends_the_wait)
}

fn no_deadlock(system: &System, state: &State) -> bool {
    let goes_on = |worker: &Worker| matches!(worker.phase, Phase::Connecting | Phase::Running(_) | Phase::Ended(_));
    state.workers.iter().any(goes_on) || state.is_over() || !actions(system, state).is_empty()
}

pub fn all() -> Vec<Property<System>> {
    vec![
        Property::always(CONFIRMED, confirmed),
        Property::always(DONE_FIRST, done_first),
        Property::always(ACCOUNTED, accounted),
        Property::always(UNBLAMED, unblamed),
        Property::always(PROCESSED, processed),
        Property::always(EMPTY_QUEUE, empty_queue),
        Property::always(STOPS, stops),
        Property::always(TOLD, told),
        Property::always(NO_DEADLOCK, no_deadlock),
        Property::<System>::sometimes("Complete after a fault", |system, state| {
            state.job.status == JobStatus::Complete && state.faults < system.faults
        }),
        Property::<System>::sometimes("Failed", |_, state| state.job.status == JobStatus::Failed),
        Property::<System>::sometimes("exit 75 although the message is removed", |_, state| {
            ended(state).any(|end| end.status == 75 && end.removed.is_some())
        }),
        Property::<System>::sometimes("a message is dead-lettered, if commands may fail", |system, state| {
            system.failures == 0 || system.no_ack || any(state, Place::DeadLettered)
        }),
        Property::<System>::sometimes("a run is stopped when some of its messages are done", |system, state| {
            system.count == Some(1) || ended(state).any(|end| end.status == TERMINATED && end.removed.is_some())
        }),
        Property::<System>::sometimes("the next message comes while one is settled", |system, state| {
            let comes = |worker: &Worker| worker.settles_with_next();
            system.count == Some(1) || system.no_ack || state.workers.iter().any(comes)
        }),
        Property::<System>::sometimes("a message comes after the queue was found empty", |system, state| {
            let comes = |worker: &Worker| matches!(worker.phase, Phase::Cancelling(Some(_)));
            !system.drains() || state.workers.iter().any(comes)
        }),
        Property::<System>::sometimes("two run the same message", |system, state| {
            system.workers == 1 || (0..system.messages).any(|id| runs(state, id) > 1)
        }),
        Property::<System>::sometimes("a message is run again because its ack was forgotten", |_, state| {
            let messages = state.queue.0.iter().zip(0..);
            let mut again = messages.filter(|(message, id)| message.done && runs(state, *id) > 0);
            state.forgotten > 0 && again.next().is_some()
        }),
    ]
}
