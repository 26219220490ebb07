//! All of it together: which steps there are in a state, and what each does.

use crate::{
    broker::{Id, Kind, Link, Message, Place, Queue},
    job::{Job, JobStatus},
    properties,
    worker::{KILLED, Outcome, Phase, Worker},
};
use qconsume::verdict::{Policy, Statuses};
use stateright::{Model, Property};

/// The exit status when nothing came within `--wait`.
const EMPTY: u8 = 66;

/// What is seeded to show that a property can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The ack goes out before the command runs.
    AckFirst,
    /// Exit 0 whatever happened, as amqp-consume.
    AlwaysZero,
    CancelAfterAck,
    /// The broker's cancel of the consumer isn't looked at.
    CancelIgnored,
    /// Told to stop while it waits, it only closes.
    CloseToRelease,
    NoBarrier,
    /// A connection that is gone isn't noticed.
    NoHeartbeats,
    NoRecheck,
    /// It connects anew whenever it waits.
    Reconnects,
    /// A message whose command can't be started is rejected.
    RejectNotRun,
    SignalEndsSettling,
    /// Exit 0 though the ack isn't confirmed.
    TrustUnconfirmed,
}

/// What is checked: a queue, as many completions as it has messages, and a bound on what goes wrong.
#[derive(Clone, Debug)]
pub struct System {
    pub kind: Kind,
    pub messages: u8,
    pub workers: usize,
    /// Cuts, kills, evictions, crashes and acknowledgement timeouts.
    pub faults: u8,
    /// Commands that don't succeed.
    pub failures: u8,
    pub policy: Policy,
    pub bug: Option<Bug>,
}

impl System {
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            messages: 3,
            workers: 2,
            faults: 1,
            failures: 1,
            // As in examples/work-queue/job.yaml, but for a limit on attempts that few failures reach.
            policy: Policy {
                reject_on: Some(Statuses(vec![65..=65])),
                max_attempts: Some(2),
                reject_exit_code: Some(65),
                failure_exit_code: Some(1),
            },
            bug: None,
        }
    }
}

/// One connection: a worker's own, or one whose worker has left and the broker may not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Worker(usize),
    Left(usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The Job controller creates a pod.
    CreatePod(usize),
    /// The Job controller sees that a pod has ended.
    Observe(usize),
    /// The Job has failed, and its pods are sent SIGTERM.
    StopPod(usize),

    Connect(usize),
    CommandEnds(usize, Outcome),
    /// The worker gets the broker's next method.
    Receive(usize),
    /// The worker finds out that its connection is gone.
    Notice(usize),
    /// The pause before the second barrier is over.
    LookAgain(usize),
    /// `--wait` is over: it is longer than anything else takes.
    WaitOver(usize),

    /// The broker processes the next method of this connection.
    Process(At),
    Deliver(Id, At),
    /// The broker finds out that a connection is gone.
    End(At),
    /// The channel hears of the queue's acknowledgement timeout.
    Announce(usize),

    /// Fault: the network drops what is on its way in both directions, and all that follows.
    Cut(usize),
    /// Fault: SIGKILL to the worker, or the node's end.
    Kill(usize),
    /// Fault: SIGTERM to the pod, with the condition DisruptionTarget.
    Evict(usize),
    /// Fault: the acknowledgement timeout passes.
    Expire(usize),
    /// Fault: the broker crashes and starts again; it may have forgotten an ack.
    Crash(Option<Id>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub queue: Queue,
    pub workers: Vec<Worker>,
    /// Connections whose worker has left, in order, so that equal states are equal.
    pub left: Vec<Link>,
    pub job: Job,
    /// How many more there may be.
    pub faults: u8,
    pub failures: u8,
    /// For the properties only: acks that the broker has forgotten in crashes.
    pub forgotten: u8,
}

impl Action {
    fn is_fault(&self) -> bool {
        use Action::{Crash, Cut, Evict, Expire, Kill};
        matches!(self, Cut(_) | Kill(_) | Evict(_) | Expire(_) | Crash(_))
    }
}

impl State {
    /// Workers that have ended leave their connections, and what changes nothing any more is forgotten.
    fn tidy(&mut self) {
        let left = self.workers.iter_mut().filter_map(Worker::left);
        self.left.extend(left);
        for link in &mut self.left {
            link.to_worker.clear();
        }
        self.left.retain(Link::matters);
        self.left.sort();
    }

    /// What the broker has written before may still arrive.
    fn crash(&mut self, kind: Kind, forgotten: Option<Id>) {
        if let Some(id) = forgotten {
            self.queue.message(id).place = Place::Ready;
            self.forgotten += 1;
        }
        let links = self.workers.iter_mut().filter_map(|it| it.link.as_mut());
        for link in links.chain(&mut self.left) {
            self.queue.end(kind, link, true);
        }
    }

    /// Runs `step` on the queue and one connection.
    fn at(&mut self, at: At, step: impl FnOnce(&mut Queue, &mut Link)) {
        match at {
            At::Worker(w) => step(&mut self.queue, self.workers[w].link.as_mut().expect("a link")),
            At::Left(i) => step(&mut self.queue, &mut self.left[i]),
        }
    }

    fn links(&self) -> impl Iterator<Item = (At, &Link)> {
        let workers = self.workers.iter().enumerate();
        workers
            .filter_map(|(w, worker)| Some((At::Worker(w), worker.link.as_ref()?)))
            .chain(self.left.iter().enumerate().map(|(i, it)| (At::Left(i), it)))
    }

    /// Whether the Job is over and all of its pods are gone.
    pub fn is_over(&self) -> bool {
        let gone = |worker: &Worker| worker.phase == Phase::Absent;
        self.job.status != JobStatus::Active && self.workers.iter().all(gone)
    }
}

impl System {
    fn worker_actions(&self, state: &State, w: usize, actions: &mut Vec<Action>) {
        let worker = &state.workers[w];
        let link = worker.link.as_ref();
        if link.is_some_and(|link| !link.to_worker.is_empty()) {
            actions.push(Action::Receive(w));
        }
        if worker.may_notice(self) {
            actions.push(Action::Notice(w));
        }
        if worker.may_look_again(self) {
            actions.push(Action::LookAgain(w));
        }
        match worker.phase {
            Phase::Ended(..) => actions.push(Action::Observe(w)),
            Phase::Connecting => actions.push(Action::Connect(w)),
            Phase::Running(run) => {
                let mut ends = |outcome| actions.push(Action::CommandEnds(w, outcome));
                ends(Outcome::Success);
                if run.stopped {
                    ends(Outcome::Stopped);
                } else if state.failures > 0 {
                    ends(Outcome::Failure(1));
                    ends(Outcome::Failure(65));
                    ends(Outcome::TimeLimit);
                    ends(Outcome::NotStarted);
                }
            }
            _ => {}
        }
        if state.job.status == JobStatus::Failed && worker.may_be_stopped() {
            actions.push(Action::StopPod(w));
        }
    }

    fn job_actions(&self, state: &State, actions: &mut Vec<Action>) {
        let absent = |worker: &&Worker| worker.phase == Phase::Absent;
        let active = self.workers - state.workers.iter().filter(absent).count();
        if let Some(w) = state.workers.iter().position(|it| absent(&it))
            && state.job.wants_pod(active)
        {
            actions.push(Action::CreatePod(w));
        }
    }

    fn broker_actions(&self, state: &State, actions: &mut Vec<Action>) {
        let ready = state.queue.first_ready();
        for (at, link) in state.links() {
            if !link.to_broker.is_empty() {
                actions.push(Action::Process(at));
            }
            if let Some(id) = ready
                && link.wants_message()
            {
                actions.push(Action::Deliver(id, at));
            }
            // A killed worker's connection may end at any time, with what is still on its way.
            let killed = matches!(at, At::Left(_)) && !link.said_goodbye();
            if !link.gone && (link.cut || killed) {
                actions.push(Action::End(at));
            }
            if let At::Worker(w) = at
                && link.expired
            {
                actions.push(Action::Announce(w));
            }
        }
    }

    fn fault_actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.faults == 0 || !state.job.is_active() {
            return;
        }
        actions.push(Action::Crash(None));
        for (id, message) in state.queue.0.iter().enumerate() {
            if message.place == Place::Acknowledged {
                actions.push(Action::Crash(Some(id as Id)));
            }
        }
        for (w, worker) in state.workers.iter().enumerate() {
            if let Some(link) = &worker.link {
                actions.push(Action::Kill(w));
                if !link.cut && !link.gone {
                    actions.push(Action::Cut(w));
                }
                // It takes half an hour, so the command was started.
                if link.unacked.is_some() && link.unacked == link.ran && !link.cut {
                    actions.push(Action::Expire(w));
                }
            }
            if worker.may_be_stopped() {
                actions.push(Action::Evict(w));
            }
        }
    }

    fn step(&self, state: &mut State, action: Action) {
        let kind = self.kind;
        let workers = &mut state.workers;
        match action {
            Action::CreatePod(w) => workers[w] = Worker::new(Phase::Connecting),
            Action::Observe(w) => {
                if let Phase::Ended(status, _) = workers[w].phase {
                    state.job.observe(status, workers[w].told);
                }
                workers[w] = Worker::new(Phase::Absent);
            }
            Action::StopPod(w) | Action::Evict(w) => workers[w].stop(self),
            Action::Connect(w) => workers[w].connect(),
            Action::CommandEnds(w, outcome) => {
                if !matches!(outcome, Outcome::Success | Outcome::Stopped) {
                    state.failures -= 1;
                }
                workers[w].command_ended(self, &mut state.queue, outcome);
            }
            Action::Receive(w) => workers[w].receive(self),
            Action::Notice(w) => workers[w].lost(self, false),
            Action::LookAgain(w) => workers[w].waited(self),
            Action::WaitOver(w) => workers[w].end(EMPTY, true),
            Action::Kill(w) => workers[w].end(KILLED, false),
            Action::Process(at) => state.at(at, |queue, link| queue.process(kind, link)),
            Action::Deliver(id, at) => state.at(at, |queue, link| queue.deliver(kind, link, id)),
            Action::End(at) => state.at(at, |queue, link| queue.end(kind, link, true)),
            Action::Announce(w) => state.at(At::Worker(w), Queue::announce),
            Action::Expire(w) => state.at(At::Worker(w), |queue, link| queue.expire(kind, link)),
            Action::Cut(w) => state.at(At::Worker(w), |_, link| link.cut()),
            Action::Crash(forgotten) => state.crash(kind, forgotten),
        }
        if action.is_fault() {
            state.faults -= 1;
        }
        state.tidy();
    }
}

impl Model for System {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            queue: Queue(vec![Message::NEW; self.messages.into()]),
            workers: vec![Worker::new(Phase::Connecting); self.workers],
            left: Vec::new(),
            job: Job::new(self.messages),
            faults: self.faults,
            failures: self.failures,
            forgotten: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for w in 0..self.workers {
            self.worker_actions(state, w, actions);
        }
        self.job_actions(state, actions);
        self.broker_actions(state, actions);
        if actions.is_empty() {
            let waiting = |w: &usize| state.workers[*w].phase == Phase::Waiting;
            actions.extend((0..self.workers).filter(waiting).map(Action::WaitOver));
        }
        self.fault_actions(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        self.step(&mut state, action);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
