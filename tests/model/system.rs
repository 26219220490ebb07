//! The whole system: which steps are possible in a state, and what each step does.

use crate::{
    broker::{Id, Kind, Link, Message, Place, Queue},
    job::{Job, JobStatus},
    properties,
    worker::{Ending, OS_ERROR, Phase, Stop, Worker},
};
use qconsume::verdict::{Policy, Statuses};
use stateright::{Model, Property};
use std::time::Duration;

/// Bugs that can be seeded to show that properties can fail. The first four were real bugs of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A delivery that comes during a settlement is ignored.
    RedeliveryUnseen,
    /// A loss of the connection between the two barriers counts as confirmation.
    LossAfterReply,
    /// A stop signal that comes after the time limit doesn't end the run.
    SignalAfterTimeLimit,
    /// A stop signal that comes before the command's start is ignored.
    SignalBeforeStart,

    /// The ack goes out before the command runs.
    AckFirst,
    /// Exit 0 whatever happened, as with amqp-consume.
    AlwaysZero,
    AsksOnce,
    CancelAfterAck,
    /// The broker's `basic.cancel` is ignored.
    CancelIgnored,
    /// If it is stopped while a message may come, it only closes the connection.
    CloseToRelease,
    /// A message that comes before the reply to the cancel is ignored.
    DropsLateMessage,
    /// `--keep-going` ends with the status of its last message.
    ForgetsDeadLetters,
    NoBarrier,
    /// The worker doesn't notice a lost connection.
    NoHeartbeats,
    /// While it waits, it may reconnect at any time.
    Reconnects,
    /// A message whose command can't be started is rejected.
    RejectNotRun,
    SignalEndsSettling,
    /// Exit 0 although the ack isn't confirmed.
    TrustUnconfirmed,
}

/// A system to check: a queue, a Job for all of its messages, and limits on faults and failures.
#[derive(Clone, Debug)]
pub struct System {
    pub kind: Kind,
    pub messages: u8,
    pub workers: usize,
    /// The most faults: cuts, kills, evictions, crashes, redeliveries and acknowledgement timeouts.
    pub faults: u8,
    /// The most commands that don't succeed.
    pub failures: u8,
    /// `--count`; `None` is `--drain`.
    pub count: Option<u8>,
    pub keep_going: bool,
    pub no_ack: bool,
    /// Commands run so long that the acknowledgement timeout may pass.
    pub long: bool,
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
            count: Some(1),
            keep_going: false,
            no_ack: false,
            long: kind == Kind::Quorum43,
            // As in examples/work-queue/job.yaml, except for a limit on attempts that few failures reach.
            policy: Policy {
                reject_on: Some(Statuses(vec![65..=65])),
                max_attempts: Some(2),
                reject_exit_code: Some(65),
                failure_exit_code: Some(1),
            },
            bug: None,
        }
    }

    /// With `--no-ack`, which leaves nothing to dead-letter.
    pub fn no_ack(self) -> Self {
        let policy = Policy { failure_exit_code: Some(1), ..Policy::default() };
        Self { no_ack: true, long: false, policy, ..self }
    }

    pub fn drains(&self) -> bool {
        self.count.is_none()
    }

    /// How long each command has run.
    pub fn ran(&self) -> Duration {
        Duration::from_secs(if self.long { 5 } else { 0 })
    }

    /// One completion for each `--count` messages, or one with `--drain`.
    fn completions(&self) -> u8 {
        self.count.map_or(1, |count| self.messages / count)
    }
}

/// A connection: a worker's, or one whose worker has left, which the broker may not know.
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
    /// The taken message's command starts.
    Start(usize),
    /// `--timeout` passes.
    TimeLimit(usize),
    CommandEnds(usize, Ending),
    /// The worker gets the broker's next method.
    Receive(usize),
    /// The worker notices that its connection is lost.
    Notice(usize),
    /// The pause before the second barrier is over.
    LookAgain(usize),
    /// `--drain`: the worker asks again whether the queue is empty.
    Ask(usize),
    /// `--wait` is over; it takes longer than anything else.
    WaitOver(usize),

    /// The broker processes the next method of this connection.
    Process(At),
    Deliver(Id, At),
    /// The broker notices that a connection is gone.
    End(At),
    /// The queue informs the channel of the acknowledgement timeout.
    Announce(usize),

    /// Fault: the network drops everything in transit in both directions, and everything that follows.
    Cut(usize),
    /// Fault: the worker gets SIGKILL, or its node dies.
    Kill(usize),
    /// Fault: SIGTERM to the pod, with the condition DisruptionTarget.
    Evict(usize),
    /// Fault: the acknowledgement timeout passes.
    Expire(usize),
    /// Fault: the queue's leader has lost contact with the worker's node. It requeues the message that the worker
    /// holds, and delivers this one to it: the same, or another one while some other worker gets the first.
    Again(Id, usize),
    /// Fault: the broker crashes and starts again; it may have forgotten an ack.
    Crash(Option<Id>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub queue: Queue,
    pub workers: Vec<Worker>,
    /// Connections whose workers have left; sorted, so that states don't differ in their order.
    pub left: Vec<Link>,
    pub job: Job,
    /// How many more faults and failures there may be.
    pub faults: u8,
    pub failures: u8,
    /// For the properties only: acks that the broker has forgotten in crashes.
    pub forgotten: u8,
}

impl Action {
    pub fn is_fault(&self) -> bool {
        use Action::{Again, Crash, Cut, Evict, Expire, Kill};
        matches!(self, Cut(_) | Kill(_) | Evict(_) | Expire(_) | Again(..) | Crash(_))
    }

    /// Whether a command doesn't succeed, although no signal has stopped it.
    pub fn is_failure(&self) -> bool {
        use Ending::{Failure, NotStarted};
        matches!(self, Self::TimeLimit(_) | Self::CommandEnds(_, Failure(_) | NotStarted(_)))
    }
}

impl State {
    /// Moves the connections of workers that have ended to `left`, and removes those that don't matter any more.
    fn tidy(&mut self) {
        let left = self.workers.iter_mut().filter_map(Worker::left);
        self.left.extend(left);
        self.left.iter_mut().for_each(Link::leave);
        self.left.retain(Link::matters);
        self.left.sort();
    }

    /// Bytes that the broker wrote before the crash may still arrive.
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
        if worker.link.as_ref().is_some_and(|link| !link.to_worker.is_empty()) {
            actions.push(Action::Receive(w));
        }
        if worker.may_notice(self) {
            actions.push(Action::Notice(w));
        }
        if worker.may_look_again() {
            actions.push(Action::LookAgain(w));
        }
        match worker.phase {
            Phase::Ended(_) => actions.push(Action::Observe(w)),
            Phase::Connecting => actions.push(Action::Connect(w)),
            // While a message is ready, asking would change nothing, as it would only ask again.
            Phase::Waiting { asking: false, .. } if self.drains() && state.queue.first_ready().is_none() => {
                actions.push(Action::Ask(w));
            }
            Phase::Taken(_) => {
                actions.push(Action::Start(w));
                if state.failures > 0 && !worker.told && !self.no_ack {
                    actions.push(Action::CommandEnds(w, Ending::NotStarted(OS_ERROR)));
                }
            }
            Phase::Running(run) => {
                let mut ends = |ending| actions.push(Action::CommandEnds(w, ending));
                match run.stop {
                    None if state.failures > 0 => {
                        ends(Ending::Failure(1));
                        ends(Ending::Failure(65));
                        ends(Ending::Success);
                        actions.push(Action::TimeLimit(w));
                    }
                    None => ends(Ending::Success),
                    Some(Stop::Signal) => {
                        ends(Ending::Success);
                        ends(Ending::Stopped);
                    }
                    Some(Stop::TimeLimit) => ends(Ending::Stopped),
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
            // A killed worker's connection may end at any time, and lose what is in transit.
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
        let ready = state.queue.first_ready();
        for (w, worker) in state.workers.iter().enumerate() {
            if worker.may_be_stopped() {
                actions.push(Action::Evict(w));
            }
            if let Some(link) = &worker.link {
                actions.push(Action::Kill(w));
                if !link.cut && !link.gone {
                    actions.push(Action::Cut(w));
                }
                let Some(held) = link.unacked.filter(|_| !link.cut) else {
                    continue;
                };
                // The timeout is long, so the command has started.
                if self.long && link.ran == Some(held) {
                    actions.push(Action::Expire(w));
                }
                let releases = matches!(worker.phase, Phase::Releasing { .. });
                if self.kind != Kind::Classic && link.consumer && !releases {
                    actions.push(Action::Again(held, w));
                    if let Some(id) = ready.filter(|_| self.count == Some(1)) {
                        actions.push(Action::Again(id, w));
                    }
                }
            }
        }
    }

    fn step(&self, state: &mut State, action: Action) {
        let kind = self.kind;
        let workers = &mut state.workers;
        match action {
            Action::CreatePod(w) => workers[w] = Worker::new(self),
            Action::Observe(w) => {
                if let Phase::Ended(end) = workers[w].phase {
                    state.job.observe(end.status, workers[w].told);
                }
                workers[w] = Worker::absent(self);
            }
            Action::StopPod(w)
            | Action::Evict(w)
            | Action::Connect(w)
            | Action::Start(w)
            | Action::TimeLimit(w)
            | Action::CommandEnds(w, _)
            | Action::Receive(w)
            | Action::Notice(w)
            | Action::LookAgain(w)
            | Action::Ask(w)
            | Action::WaitOver(w)
            | Action::Kill(w) => workers[w].step(self, &mut state.queue, &action),
            Action::Process(at) => state.at(at, |queue, link| queue.process(kind, link)),
            Action::Deliver(id, at) => state.at(at, |queue, link| queue.deliver(kind, link, id)),
            Action::End(at) => state.at(at, |queue, link| queue.end(kind, link, true)),
            Action::Announce(w) => state.at(At::Worker(w), Queue::announce),
            Action::Expire(w) => state.at(At::Worker(w), |queue, link| queue.expire(kind, link)),
            Action::Again(id, w) => state.at(At::Worker(w), |queue, link| queue.deliver_again(kind, link, id)),
            Action::Cut(w) => state.at(At::Worker(w), |_, link| link.cut()),
            Action::Crash(forgotten) => state.crash(kind, forgotten),
        }
        state.faults -= u8::from(action.is_fault());
        state.failures -= u8::from(action.is_failure());
        state.tidy();
    }
}

impl Model for System {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            queue: Queue(vec![Message::NEW; self.messages.into()]),
            workers: vec![Worker::new(self); self.workers],
            left: Vec::new(),
            job: Job::new(self.completions()),
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
            let waiting = |w: &usize| matches!(state.workers[*w].phase, Phase::Waiting { .. });
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
