//! qconsume itself: `Worker::one` (src/worker.rs) with one message a run, and the settlement of src/broker/settle.rs.

use crate::{
    broker::{Id, Kind, Link, Queue, Reply, Request},
    system::{Bug, System},
};
use qconsume::verdict::{CommandResult, Ended, Settlement, StopReason, Verdict, decide};

const SIGTERM: i32 = 15;
const OS_ERROR: u8 = 71;
pub const KILLED: u8 = 137;
const TERMINATED: u8 = 143;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    Success,
    /// It exited with this status.
    Failure(u8),
    /// `--timeout` passed.
    TimeLimit,
    /// It died of the signal that was forwarded to it.
    Stopped,
    /// It never ran: no process to be had.
    NotStarted,
}

/// The message at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    pub id: Id,
    /// As the delivery said.
    failures: Option<u8>,
    /// SIGTERM was forwarded to the command.
    pub stopped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Settling {
    run: Run,
    outcome: Outcome,
    /// The next one of [`plan`].
    step: u8,
    /// What src/broker/observed.rs remembers: the broker has cancelled the consumer.
    cancelled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// No pod.
    Absent,
    Connecting,
    Waiting,
    Running(Run),
    Settling(Settling),
    /// Told to stop while no command ran: `Consumer::release`, with the message that came all the same.
    Releasing(Option<Id>),
    /// With the exit status, and the message that this worker has removed from the queue.
    Ended(u8, Option<Id>),
}

/// The steps of a settlement, as `Registration::settle` in src/broker/settle.rs has them: change both together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// `basic_cancel`, without waiting for its reply.
    Cancel,
    /// `basic_ack`, `basic_reject` or `basic_nack`.
    Settle,
    /// `barrier`: `basic.qos` is written.
    AskBarrier,
    /// `barrier`: its reply is awaited. Then `check_still_owned`.
    Confirm,
    /// `recheck_after_consumer_timeout`: time for the queue to tell the channel. Every run here may have met the timeout.
    Pause,
}

fn plan(system: &System, settlement: Settlement) -> Vec<Step> {
    use Step::{AskBarrier, Cancel, Confirm, Pause, Settle};
    let mut plan = vec![Cancel, Settle, AskBarrier, Confirm];
    let removes = matches!(settlement, Settlement::Ack | Settlement::DeadLetter);
    if removes && system.kind == Kind::Quorum43 && system.bug != Some(Bug::NoRecheck) {
        plan.extend([Pause, AskBarrier, Confirm]);
    }
    match system.bug {
        Some(Bug::CancelAfterAck) => plan.swap(0, 1),
        Some(Bug::NoBarrier) => plan.truncate(2),
        Some(Bug::AckFirst) => plan.retain(|step| *step != Settle),
        _ => {}
    }
    plan
}

/// The real decision; `Worker::not_started` has none to make.
fn verdict(system: &System, run: Run, outcome: Outcome, still_owned: bool) -> Verdict {
    let signal = run.stopped.then_some(StopReason::Signal(SIGTERM));
    let (ended, stop) = match outcome {
        Outcome::Success => (Ended::Exited(0), signal),
        Outcome::Failure(status) => (Ended::Exited(status), signal),
        Outcome::TimeLimit => (Ended::Killed(SIGTERM), Some(StopReason::TimeLimit)),
        Outcome::Stopped => (Ended::Killed(SIGTERM), signal),
        Outcome::NotStarted => {
            return Verdict {
                settlement: Some(match system.bug {
                    Some(Bug::RejectNotRun) => Settlement::Requeue,
                    _ => Settlement::Release,
                }),
                exit_code: OS_ERROR,
                exit_code_if_unconfirmed: OS_ERROR,
            };
        }
    };
    let result = CommandResult { ended, stop, still_owned, failures_before: run.failures.map(u64::from) };
    let mut verdict = decide(result, &system.policy);
    match system.bug {
        Some(Bug::TrustUnconfirmed) => verdict.exit_code_if_unconfirmed = verdict.exit_code,
        Some(Bug::AlwaysZero) => verdict.exit_code = 0,
        _ => {}
    }
    verdict
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Worker {
    pub phase: Phase,
    pub link: Option<Link>,
    /// The pod was sent SIGTERM.
    pub told: bool,
}

impl Worker {
    pub fn new(phase: Phase) -> Self {
        Self { phase, link: None, told: false }
    }

    fn link(&mut self) -> &mut Link {
        self.link.as_mut().expect("connected in this phase")
    }

    /// Connects and registers a consumer. A loss on the way there costs nothing but another try, so it is one step.
    pub fn connect(&mut self) {
        self.link = Some(Link::registered());
        self.phase = Phase::Waiting;
    }

    /// Whether its connection has ended without a word: heartbeats tell, and the time limits of settling and releasing.
    pub fn may_notice(&self, system: &System) -> bool {
        let dead = self.link.as_ref().is_some_and(|it| it.cut || it.gone);
        match system.bug {
            Some(Bug::NoHeartbeats) => false,
            Some(Bug::Reconnects) => dead || self.phase == Phase::Waiting,
            _ => dead,
        }
    }

    /// Whether [`Step::Pause`] is over: the queue tells the channel within `RECHECK_PAUSE`.
    pub fn may_look_again(&self, system: &System) -> bool {
        let told = self.link.as_ref().is_some_and(|link| !link.expired);
        told && self.next_step(system) == Some(Step::Pause)
    }

    /// Whether SIGTERM would still find the process, and for the first time.
    pub fn may_be_stopped(&self) -> bool {
        !self.told && !matches!(self.phase, Phase::Absent | Phase::Ended(..))
    }

    /// SIGTERM.
    pub fn stop(&mut self, system: &System) {
        self.told = true;
        match (&mut self.phase, system.bug) {
            (Phase::Connecting, _) => self.end(TERMINATED, false),
            (Phase::Waiting, Some(Bug::CloseToRelease)) => self.end(TERMINATED, true),
            (Phase::Waiting, _) => {
                self.phase = Phase::Releasing(None);
                self.link().write(Request::Cancel { nowait: false });
            }
            (Phase::Running(run), _) => run.stopped = true,
            (Phase::Settling(_), Some(Bug::SignalEndsSettling)) => self.end(TERMINATED, true),
            _ => {}
        }
    }

    /// The process ends.
    pub fn end(&mut self, status: u8, politely: bool) {
        self.say_goodbye(politely);
        let removed = self.link.as_ref().and_then(|link| link.removed);
        self.phase = Phase::Ended(status, removed);
    }

    fn say_goodbye(&mut self, politely: bool) {
        if let Some(link) = self.link.as_mut().filter(|_| politely) {
            link.write(Request::Close);
        }
    }

    /// The connection that this worker has done with, if it has.
    pub fn left(&mut self) -> Option<Link> {
        let done = matches!(self.phase, Phase::Ended(..) | Phase::Connecting);
        self.link.take_if(|_| done)
    }

    /// The connection turns out to be lost, or only the channel, which leaves a connection that can be closed.
    pub fn lost(&mut self, system: &System, politely: bool) {
        let status = match self.phase {
            Phase::Waiting => {
                self.say_goodbye(politely);
                self.phase = Phase::Connecting;
                return;
            }
            // The command is stopped.
            Phase::Running(run) => verdict(system, run, Outcome::Stopped, false).exit_code,
            Phase::Settling(it) => verdict(system, it.run, it.outcome, true).exit_code_if_unconfirmed,
            _ => TERMINATED,
        };
        self.end(status, politely);
    }

    /// The command ends, and the settlement begins.
    pub fn command_ended(&mut self, system: &System, queue: &mut Queue, outcome: Outcome) {
        let Phase::Running(run) = self.phase else {
            unreachable!("only called while it runs");
        };
        match outcome {
            Outcome::Success => queue.message(run.id).done = true,
            Outcome::NotStarted => self.link().ran = None,
            _ => {}
        }
        self.phase = Phase::Settling(Settling { run, outcome, step: 0, cancelled: false });
        self.go_on(system);
    }

    fn next_step(&self, system: &System) -> Option<Step> {
        let Phase::Settling(it) = self.phase else {
            return None;
        };
        let settlement = verdict(system, it.run, it.outcome, true).settlement?;
        plan(system, settlement).get(usize::from(it.step)).copied()
    }

    /// Does the steps up to the next one that waits. What is written in one go may still be lost behind any of its methods,
    /// so a cut or a kill between two of them is the same as one behind the last.
    fn go_on(&mut self, system: &System) {
        while let Phase::Settling(it) = self.phase {
            let (decided, id) = (verdict(system, it.run, it.outcome, true), it.run.id);
            let request = match self.next_step(system) {
                None => return self.end(decided.exit_code, true),
                Some(Step::Confirm | Step::Pause) => return,
                Some(Step::Cancel) => Request::Cancel { nowait: true },
                Some(Step::AskBarrier) => Request::Qos,
                Some(Step::Settle) => match decided.settlement.expect("there is a plan") {
                    Settlement::Ack => Request::Ack(id),
                    Settlement::Requeue => Request::Reject { id, requeue: true },
                    Settlement::DeadLetter => Request::Reject { id, requeue: false },
                    Settlement::Release => Request::Nack(id),
                },
            };
            self.link().write(request);
            self.step_done();
        }
    }

    fn step_done(&mut self) {
        if let Phase::Settling(it) = &mut self.phase {
            it.step += 1;
        }
    }

    /// The step that waited is over.
    pub fn waited(&mut self, system: &System) {
        self.step_done();
        self.go_on(system);
    }

    /// The broker's next method is here.
    pub fn receive(&mut self, system: &System) {
        let reply = self.link().to_worker.remove(0);
        match (&mut self.phase, reply) {
            (Phase::Waiting, Reply::Deliver { id, failures }) => {
                self.phase = Phase::Running(Run { id, failures, stopped: false });
                self.link().ran = Some(id);
                if system.bug == Some(Bug::AckFirst) {
                    self.link().write(Request::Ack(id));
                }
            }
            (Phase::Releasing(late), Reply::Deliver { id, .. }) => *late = Some(id),
            (Phase::Releasing(late), Reply::CancelOk) => {
                if let Some(id) = late.take() {
                    self.link().write(Request::Nack(id));
                }
                self.link().write(Request::Qos);
            }
            (Phase::Releasing(_), Reply::QosOk) => self.end(TERMINATED, true),
            (Phase::Settling(it), Reply::ConsumerCancelled) => {
                it.cancelled = system.bug != Some(Bug::CancelIgnored);
            }
            (Phase::Settling(it), Reply::QosOk) if !it.cancelled => self.waited(system),
            (Phase::Settling(_), Reply::QosOk) => self.lost(system, true),
            (_, Reply::ConsumerCancelled | Reply::ChannelClosed) => self.lost(system, true),
            // A second message, which only a seeded bug makes the broker deliver: the first one is taken for lost.
            (Phase::Running(_) | Phase::Settling(_), Reply::Deliver { .. }) => {
                self.lost(system, true);
            }
            // It goes back with the connection.
            (_, Reply::Deliver { .. }) => {}
            (phase, reply) => unreachable!("{reply:?} in {phase:?}"),
        }
    }
}
