//! What must hold in every state, and what must be reachable for that to mean something.

use crate::{
    broker::{Id, Message, Place},
    job::JobStatus,
    system::{Action, State, System},
    worker::{KILLED, Phase},
};
use stateright::{Model, Property};

pub const CONFIRMED: &str = "exit 0: this worker has removed its message";
pub const DONE_FIRST: &str = "only what a command has done is acknowledged";
pub const ACCOUNTED: &str = "removed: by an exit 0, a dead letter, a 75 or a killed worker";
pub const UNBLAMED: &str = "no count is raised by us of a message that nobody ran";
pub const PROCESSED: &str = "the Job is Complete: every message is processed";
pub const EMPTY_QUEUE: &str = "only --wait ends the wait: the queue is empty";
pub const NO_DEADLOCK: &str = "nobody waits for ever";

/// Statuses and removed messages of the workers that have ended and that the Job controller hasn't seen yet.
fn ended(state: &State) -> impl Iterator<Item = (u8, Option<Id>)> {
    state.workers.iter().filter_map(|worker| match worker.phase {
        Phase::Ended(status, removed) => Some((status, removed)),
        _ => None,
    })
}

fn any(state: &State, place: Place) -> bool {
    state.queue.0.iter().any(|message| message.place == place)
}

fn runs(state: &State, id: Id) -> usize {
    let phases = state.workers.iter().map(|worker| worker.phase);
    let runs = |phase: &Phase| matches!(phase, Phase::Running(run) if run.id == id);
    phases.filter(runs).count()
}

fn actions(system: &System, state: &State) -> Vec<Action> {
    let mut actions = Vec::new();
    system.actions(state, &mut actions);
    actions
}

fn confirmed(_: &System, state: &State) -> bool {
    ended(state).all(|(status, removed)| status != 0 || removed.is_some())
}

fn done_first(_: &System, state: &State) -> bool {
    let mut messages = state.queue.0.iter();
    messages.all(|message| message.place != Place::Acknowledged || message.done)
}

fn accounted(_: &System, state: &State) -> bool {
    let acknowledged = |id: Id| state.queue.0[usize::from(id)].place == Place::Acknowledged;
    ended(state).all(|(status, removed)| matches!(status, 0 | 75 | KILLED) || !removed.is_some_and(acknowledged))
}

fn unblamed(_: &System, state: &State) -> bool {
    state.queue.0.iter().all(|message| !message.blamed)
}

/// With `--reject-exit-code 0` a dead letter counts as done. For each forgotten ack one message may be processed in the
/// place of another.
fn processed(system: &System, state: &State) -> bool {
    let dead_is_done = system.policy.reject_exit_code == Some(0);
    let processed = |message: &&Message| message.done || dead_is_done && message.place == Place::DeadLettered;
    let missing = state.queue.0.len() - state.queue.0.iter().filter(processed).count();
    state.job.status != JobStatus::Complete || missing <= state.forgotten.into()
}

fn empty_queue(system: &System, state: &State) -> bool {
    let waits_in_vain = |action: &Action| matches!(action, Action::WaitOver(_));
    !any(state, Place::Ready) || !actions(system, state).iter().any(waits_in_vain)
}

fn no_deadlock(system: &System, state: &State) -> bool {
    state.is_over() || !actions(system, state).is_empty()
}

pub fn all() -> Vec<Property<System>> {
    vec![
        Property::always(CONFIRMED, confirmed),
        Property::always(DONE_FIRST, done_first),
        Property::always(ACCOUNTED, accounted),
        Property::always(UNBLAMED, unblamed),
        Property::always(PROCESSED, processed),
        Property::always(EMPTY_QUEUE, empty_queue),
        Property::always(NO_DEADLOCK, no_deadlock),
        Property::<System>::sometimes("Complete after a fault", |system, state| {
            state.job.status == JobStatus::Complete && state.faults < system.faults
        }),
        Property::<System>::sometimes("Failed", |_, state| state.job.status == JobStatus::Failed),
        Property::<System>::sometimes("75 though the message is removed", |_, state| {
            ended(state).any(|(status, removed)| status == 75 && removed.is_some())
        }),
        Property::<System>::sometimes("dead-lettered, where commands may fail", |system, state| {
            system.failures == 0 || any(state, Place::DeadLettered)
        }),
        Property::<System>::sometimes("two run the same message", |system, state| {
            (0..system.messages).any(|id| runs(state, id) > 1)
        }),
        Property::<System>::sometimes("run again as its ack was forgotten", |_, state| {
            let messages = state.queue.0.iter().zip(0..);
            let mut again = messages.filter(|(message, id)| message.done && runs(state, *id) > 0);
            state.forgotten > 0 && again.next().is_some()
        }),
    ]
}
