//! One run of the program, as the model has it: what happens to it, in its order, and what it writes to the broker.

use crate::{
    broker::{Id, Kind, Reply, Request},
    system::{Action, State, System},
    worker::{Ending, Phase},
};
use stateright::Model;
use std::collections::HashMap;

/// What happens to the program, or what it does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    Connect,
    /// The command of the message that was taken starts, unless the run was stopped.
    Start,
    /// `--timeout` passes.
    TimeLimit,
    CommandEnds(Ending),
    /// The broker's next method arrives. A message may have been delivered so often before, as far as its headers tell.
    Receive(Reply, u8),
    /// The connection ends.
    Notice,
    /// The pause before the second barrier is over.
    LookAgain,
    /// `--drain`: the queue is asked again whether it is empty.
    Ask,
    /// `--wait` is over.
    WaitOver,
    /// SIGTERM.
    Stop,
    /// SIGKILL.
    Kill,
}

#[derive(Clone, Debug)]
pub struct Step {
    pub what: What,
    pub before: Phase,
    pub after: Phase,
    pub writes: Vec<Request>,
}

impl Step {
    /// Whether the program does it by itself: nobody tells it when.
    pub fn is_programs_own(&self) -> bool {
        match self.what {
            What::Start | What::LookAgain | What::Ask | What::WaitOver => true,
            What::CommandEnds(ending) => matches!(ending, Ending::NotStarted(_)),
            _ => false,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Run {
    pub system: System,
    pub steps: Vec<Step>,
    pub status: u8,
}

impl Run {
    /// The kinds of its steps: two runs with the same differ in nothing but messages and counts.
    pub fn signature(&self) -> Vec<String> {
        let kind = |step: &Step| match step.what {
            What::Receive(Reply::Deliver(_), before) => format!("Deliver {} {:?}", before > 0, phase(&step.before)),
            what => format!("{what:?} {:?}", phase(&step.before)),
        };
        self.steps.iter().map(kind).collect()
    }

    /// Whether a busy machine may be too slow for it, as a time that the program keeps passes too early: `--wait`, `--timeout`, the
    /// pause before the second barrier, and the two seconds in which a cancel has to be answered.
    pub fn is_timed(&self) -> bool {
        self.steps.iter().any(|step| match step.what {
            What::TimeLimit | What::WaitOver => true,
            What::LookAgain => false,
            _ if step.before.pauses() => !step.after.pauses(),
            _ => matches!(step.after, Phase::Cancelling(_) | Phase::Releasing { .. }),
        })
    }

    /// Whether the peer can make all of this happen. What is lost between a message and its command's start may have been lost before
    /// the message, as far as the program is concerned, and a signal may have come before it.
    fn is_playable(&self) -> bool {
        let taken = |step: &&Step| matches!(step.before, Phase::Taken(_));
        let mut taken = self.steps.iter().filter(taken).map(|step| step.what);
        let is_stopped = taken.clone().any(|what| what == What::Stop);
        !taken.any(|what| what == What::Notice || is_stopped && matches!(what, What::Receive(..)))
    }
}

/// A phase's name.
fn phase(phase: &Phase) -> String {
    let name = format!("{phase:?}");
    name.split([' ', '(']).next().unwrap_or_default().to_owned()
}

/// The worker that a step is of, and what it is for the program.
fn happens(action: &Action, state: &State) -> Option<(usize, What)> {
    Some(match *action {
        Action::Connect(w) => (w, What::Connect),
        Action::Start(w) => (w, What::Start),
        Action::TimeLimit(w) => (w, What::TimeLimit),
        Action::CommandEnds(w, ending) => (w, What::CommandEnds(ending)),
        Action::Receive(w) => {
            let link = state.workers[w].link.as_ref()?;
            (w, What::Receive(link.to_worker[0], 0))
        }
        Action::Notice(w) => (w, What::Notice),
        Action::LookAgain(w) => (w, What::LookAgain),
        Action::Ask(w) => (w, What::Ask),
        Action::WaitOver(w) => (w, What::WaitOver),
        Action::Evict(w) | Action::StopPod(w) => (w, What::Stop),
        Action::Kill(w) => (w, What::Kill),
        _ => return None,
    })
}

/// What the worker writes in this step. Whether the network carries it is nothing that it knows.
fn writes(system: &System, state: &State, action: &Action, w: usize) -> Vec<Request> {
    let (mut queue, mut worker) = (state.queue.clone(), state.workers[w].clone());
    if let Some(link) = &mut worker.link {
        (link.cut, link.gone) = (false, false);
        link.to_broker.clear();
    }
    worker.step(system, &mut queue, action);
    let link = worker.link.unwrap_or_default();
    link.to_broker
}

/// A way through the model, and the runs that it consists of.
pub struct Walk<'a> {
    system: &'a System,
    pub state: State,
    /// How often each message was delivered.
    delivered: HashMap<Id, u8>,
    /// What has happened to each worker that hasn't ended.
    open: Vec<Vec<Step>>,
    pub runs: Vec<Run>,
}

impl<'a> Walk<'a> {
    pub fn new(system: &'a System) -> Self {
        let state = system.init_states().remove(0);
        let open = vec![Vec::new(); state.workers.len()];
        Self { system, state, delivered: HashMap::new(), open, runs: Vec::new() }
    }

    /// The steps that there are.
    pub fn actions(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.system.actions(&self.state, &mut actions);
        actions
    }

    pub fn take(&mut self, action: Action) {
        let happens = happens(&action, &self.state);
        let before = happens.map(|(w, _)| (self.state.workers[w].phase, writes(self.system, &self.state, &action, w)));
        if let Action::Deliver(id, _) | Action::Again(id, _) = action {
            *self.delivered.entry(id).or_default() += 1;
        }
        self.state = self.system.next_state(&self.state, action).expect("there is a next state");
        if let (Some((w, what)), Some((before, writes))) = (happens, before) {
            let what = self.with_count(what);
            let after = self.state.workers[w].phase;
            self.open[w].push(Step { what, before, after, writes });
            if let Phase::Ended(end) = after {
                let steps = std::mem::take(&mut self.open[w]);
                let run = Run { system: self.system.clone(), steps, status: end.status };
                self.runs.extend(Some(run).filter(Run::is_playable));
            }
        }
    }

    /// A quorum queue of 4.3 says how often a message was acquired. Others say of a message that comes again that it failed.
    fn with_count(&self, what: What) -> What {
        let What::Receive(Reply::Deliver(delivery), _) = what else {
            return what;
        };
        let before = match self.system.kind {
            Kind::Classic => u8::from(delivery.failures.is_none()),
            Kind::Quorum => delivery.failures.unwrap_or_default(),
            Kind::Quorum43 => self.delivered[&delivery.id] - 1,
        };
        What::Receive(Reply::Deliver(delivery), before)
    }
}
