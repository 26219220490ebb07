//! A run of the program in the model: what happens, in order, and what the program writes to the broker.

use crate::{
    broker::{Id, Kind, Reply, Request},
    system::{Action, State, System},
    worker::{Ending, Phase},
};
use stateright::Model;
use std::collections::HashMap;

/// Something that happens to the program, or that it does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    Connect,
    /// The taken message's command starts, unless the run was stopped.
    Start,
    /// `--timeout` passes.
    TimeLimit,
    CommandEnds(Ending),
    /// The broker's next method arrives; for a delivery, the number of earlier deliveries that its headers show.
    Receive(Reply, u8),
    /// The connection ends.
    Notice,
    /// The pause before the second barrier is over.
    LookAgain,
    /// `--drain`: the program asks again whether the queue is empty.
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
    /// Whether the program does it by itself, at a time that the peer can't choose.
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
    /// The kinds of its steps. Runs with the same signature differ only in messages and counts.
    pub fn signature(&self) -> Vec<String> {
        let kind = |step: &Step| match step.what {
            What::Receive(Reply::Deliver(_), before) => format!("Deliver {} {:?}", before > 0, phase(&step.before)),
            what => format!("{what:?} {:?}", phase(&step.before)),
        };
        self.steps.iter().map(kind).collect()
    }

    /// Whether one of the program's own times may pass too early on a busy machine: `--wait`, `--timeout`, the pause
    /// before the second barrier, or the two seconds in which a cancel has to be answered.
    pub fn is_timed(&self) -> bool {
        self.steps.iter().any(|step| match step.what {
            What::TimeLimit | What::WaitOver => true,
            What::LookAgain => false,
            _ if step.before.pauses() => !step.after.pauses(),
            _ => matches!(step.after, Phase::Cancelling(_) | Phase::Releasing { .. }),
        })
    }

    /// Whether the peer can make all of this happen. It can't place a loss between a message and its command's start,
    /// as the program may see the loss before the message; nor there a signal together with a method. Nor can it
    /// deliver a message on a new connection before the program cancels there, if `--wait` was over on the last one:
    /// nothing is left of that time.
    fn is_playable(&self) -> bool {
        let mut is_over = false;
        for steps in self.steps.windows(2) {
            match steps[0].what {
                What::WaitOver => is_over = true,
                What::Start => is_over = false,
                What::Connect if is_over && steps[1].what != What::WaitOver => return false,
                _ => {}
            }
        }
        let taken = |step: &&Step| matches!(step.before, Phase::Taken(_));
        let mut taken = self.steps.iter().filter(taken).map(|step| step.what);
        let is_stopped = taken.clone().any(|what| what == What::Stop);
        !taken.any(|what| what == What::Notice || is_stopped && matches!(what, What::Receive(..)))
    }
}

/// The phase's name, without its fields.
fn phase(phase: &Phase) -> String {
    let name = format!("{phase:?}");
    name.split([' ', '(']).next().unwrap_or_default().to_owned()
}

/// The worker that an action concerns, and what it means for the program.
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

/// What the worker writes in this step, whether or not the network carries it.
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

/// A path through the model, and the runs in it.
pub struct Walk<'a> {
    system: &'a System,
    pub state: State,
    /// How often each message was delivered.
    delivered: HashMap<Id, u8>,
    /// The steps so far of each worker that hasn't ended.
    open: Vec<Vec<Step>>,
    pub runs: Vec<Run>,
}

impl<'a> Walk<'a> {
    pub fn new(system: &'a System) -> Self {
        let state = system.init_states().remove(0);
        let open = vec![Vec::new(); state.workers.len()];
        Self { system, state, delivered: HashMap::new(), open, runs: Vec::new() }
    }

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

    /// Adds the number of earlier deliveries: a quorum queue of 4.3 tells how often a message was acquired, others only
    /// its failures.
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
