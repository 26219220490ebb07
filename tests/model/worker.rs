//! A worker: qconsume itself. The code in src/ makes the decisions: `verdict::decide`, `verdict::RunState` and
//! `settlement::Settling`. This file only carries them out, as src/worker.rs and src/broker/consume/settle.rs do;
//! [`crate::replay`] compares the two.

use crate::{
    broker::{Delivery, Id, Link, Queue, Reply, Request},
    system::{Action, Bug, System},
};
use qconsume::{
    settlement::{Event, Settled, Settling, Step},
    verdict::{CommandResult, Ended, Next, RunState, Settlement, StopReason, Verdict, decide},
};

const SIGTERM: i32 = 15;
const SUCCESS: u8 = 0;
pub const OS_ERROR: u8 = 71;
/// No message came within `--wait`.
const EMPTY: u8 = 66;
const UNREADABLE: u8 = 70;
const UNCONFIRMED: u8 = 75;
pub const KILLED: u8 = 137;
pub const TERMINATED: u8 = 143;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ending {
    Success,
    /// It exited with this status.
    Failure(u8),
    /// It died of SIGTERM: a forwarded one, or that of the time limit.
    Stopped,
    /// It was never started, because that failed or the run was stopped; the exit status for that.
    NotStarted(u8),
}

/// The first reason to stop the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stop {
    Signal,
    TimeLimit,
}

/// A message that came while the worker waited for something else. A second one means that the first was requeued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arrived {
    first: Delivery,
    second: Option<Delivery>,
}

impl Arrived {
    fn add(arrived: &mut Option<Self>, delivery: Delivery) {
        match arrived {
            Some(arrived) => arrived.second = Some(delivery),
            None => *arrived = Some(Self { first: delivery, second: None }),
        }
    }
}

/// The run of a message's command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    pub delivery: Delivery,
    pub stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnderWay {
    run: Run,
    /// `None` if the command hasn't started (`--no-ack`).
    ending: Option<Ending>,
    settling: Settling,
    /// The current barrier is written.
    asked: bool,
    /// The next message, if the consumer isn't cancelled and one has come.
    next: Option<Arrived>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// No pod.
    Absent,
    Connecting,
    /// `asking`: with `--drain`, whether it waits for the answer if the queue is empty; and the message that came
    /// before that.
    Waiting {
        asking: bool,
        arrived: Option<Arrived>,
    },
    /// The wait is over and basic.cancel is written. If a message comes before the reply, its command is run.
    Cancelling(Option<Arrived>),
    /// A message is here, and its command hasn't started.
    Taken(Delivery),
    Running(Run),
    Settling(UnderWay),
    /// The end of a run whose consumer isn't cancelled: messages that have arrived are released.
    Releasing {
        arrived: Option<Arrived>,
        /// Outstanding replies to `basic.cancel`.
        replies: u8,
        status: u8,
    },
    Ended(End),
}

impl Phase {
    /// Whether this is the pause before the second barrier.
    pub fn pauses(&self) -> bool {
        matches!(self, Self::Settling(it) if it.settling.step() == Step::Pause)
    }
}

/// How a worker has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct End {
    pub status: u8,
    /// For the properties only: it has done everything that it was asked for, and really removed each message that it
    /// counted.
    pub fulfilled: bool,
    /// For the properties only: the last message that it has removed from the queue.
    pub removed: Option<Id>,
    /// For the properties only: it has dead-lettered a message.
    pub dead_lettered: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Worker {
    pub phase: Phase,
    pub link: Option<Link>,
    /// The pod was sent SIGTERM.
    pub told: bool,
    state: RunState,
    /// It has a consumer that it hasn't cancelled.
    subscribed: bool,
    dead_lettered: bool,
    /// A message arrived, but its connection was lost before it was taken; and none was taken since.
    cut_short: bool,
    /// For the properties only: it counted a message as done that it hasn't removed.
    mistaken: bool,
    /// For the properties only: it has started a command after SIGTERM.
    pub started_late: bool,
}

impl Worker {
    pub fn new(system: &System) -> Self {
        Self {
            phase: Phase::Connecting,
            link: None,
            told: false,
            state: RunState { to_do: system.count.map(u64::from), keep_going: system.keep_going, stopped_by: None },
            subscribed: false,
            dead_lettered: false,
            cut_short: false,
            mistaken: false,
            started_late: false,
        }
    }

    pub fn absent(system: &System) -> Self {
        Self { phase: Phase::Absent, ..Self::new(system) }
    }

    /// Performs one of the worker's actions.
    pub fn step(&mut self, system: &System, queue: &mut Queue, action: &Action) {
        match *action {
            Action::Connect(_) => self.connect(system),
            Action::Start(_) => self.start(system),
            Action::TimeLimit(_) => self.time_limit(),
            Action::CommandEnds(_, ending) => self.command_ended(system, queue, ending),
            Action::Receive(_) => self.receive(system),
            Action::Notice(_) => self.lost(system, false),
            Action::LookAgain(_) => self.happened(system, Event::PauseOver, true),
            Action::Ask(_) => self.ask(),
            Action::WaitOver(_) => self.give_up(),
            Action::StopPod(_) | Action::Evict(_) => self.stop(system),
            Action::Kill(_) => self.kill(),
            ref action => unreachable!("{action:?} isn't an action of a worker"),
        }
    }

    fn link(&mut self) -> &mut Link {
        self.link.as_mut().expect("connected in this phase")
    }

    fn write(&mut self, request: Request) {
        self.link().write(request);
    }

    /// Connects and subscribes: one step, as a loss in between only leads to another attempt.
    fn connect(&mut self, system: &System) {
        self.link = Some(Link::subscribed());
        self.subscribed = true;
        self.wait(system);
    }

    /// `--drain` asks at once whether the queue is empty.
    fn wait(&mut self, system: &System) {
        if system.drains() {
            return self.ask();
        }
        self.phase = Phase::Waiting { asking: false, arrived: None };
    }

    fn ask(&mut self) {
        self.phase = Phase::Waiting { asking: true, arrived: None };
        self.write(Request::Declare);
    }

    /// `--wait` is over, or with `--drain` the queue is empty.
    fn give_up(&mut self) {
        let Phase::Waiting { arrived, .. } = self.phase else {
            unreachable!("only called while it waits");
        };
        self.phase = Phase::Cancelling(arrived);
        self.write(Request::Cancel { nowait: false });
    }

    /// Whether it may notice that its connection is lost: by heartbeats, or by the time limits of settling and
    /// releasing.
    pub fn may_notice(&self, system: &System) -> bool {
        let dead = self.link.as_ref().is_some_and(|it| it.cut || it.gone);
        let heeds = match self.phase {
            // The message is settled already.
            Phase::Running(_) => !system.no_ack,
            _ => true,
        };
        match system.bug {
            Some(Bug::NoHeartbeats) => false,
            Some(Bug::Reconnects) => dead && heeds || matches!(self.phase, Phase::Waiting { .. }),
            _ => dead && heeds,
        }
    }

    /// For the properties: the next message has come before the current one is settled.
    pub fn settles_with_next(&self) -> bool {
        matches!(self.phase, Phase::Settling(it) if it.next.is_some())
    }

    /// Whether [`Step::Pause`] may end: within it, the queue informs the channel of a timeout.
    pub fn may_look_again(&self) -> bool {
        let told = self.link.as_ref().is_some_and(|link| !link.expired);
        told && self.phase.pauses()
    }

    /// Whether it may get SIGTERM: the process runs, and hasn't had one.
    pub fn may_be_stopped(&self) -> bool {
        !self.told && !matches!(self.phase, Phase::Absent | Phase::Ended(_))
    }

    /// SIGTERM.
    fn stop(&mut self, system: &System) {
        self.told = true;
        let is_heard = match (self.phase, system.bug) {
            (Phase::Running(run), Some(Bug::SignalAfterTimeLimit)) => run.stop.is_none(),
            (Phase::Taken(_), Some(Bug::SignalBeforeStart)) => false,
            (Phase::Settling(it), Some(Bug::SignalBeforeStart)) => it.ending.is_some(),
            _ => true,
        };
        if is_heard {
            self.state.stopped_by = Some(SIGTERM);
        }
        match (&mut self.phase, system.bug) {
            (Phase::Connecting, _) => self.end(system, TERMINATED, false),
            (Phase::Waiting { .. } | Phase::Cancelling(_), Some(Bug::CloseToRelease)) => {
                self.end(system, TERMINATED, true)
            }
            (&mut Phase::Waiting { arrived, .. }, _) => self.release(arrived, 1, TERMINATED),
            // It sends a second basic.cancel.
            (&mut Phase::Cancelling(arrived), _) => self.release(arrived, 2, TERMINATED),
            (Phase::Running(run), _) => _ = run.stop.get_or_insert(Stop::Signal),
            (Phase::Settling(_), Some(Bug::SignalEndsSettling)) => self.end(system, TERMINATED, true),
            _ => {}
        }
    }

    /// Cancels the consumer; after the reply, messages that have arrived are released.
    fn release(&mut self, arrived: Option<Arrived>, replies: u8, status: u8) {
        self.subscribed = false;
        self.phase = Phase::Releasing { arrived, replies, status };
        self.write(Request::Cancel { nowait: false });
    }

    /// After the consumer's cancellation: releases the messages that have arrived.
    fn release_arrived(&mut self, arrived: Option<Arrived>) {
        let arrived = arrived.map(|arrived| [Some(arrived.first), arrived.second]);
        for delivery in arrived.into_iter().flatten().flatten() {
            self.write(Request::Nack(delivery.tag));
        }
        self.write(Request::Qos);
    }

    fn end(&mut self, system: &System, status: u8, politely: bool) {
        let rejected = system.policy.reject_exit_code.unwrap_or(1);
        let forgets = system.bug == Some(Bug::ForgetsDeadLetters);
        let overridden = system.keep_going && self.dead_lettered && rejected != 0 && !forgets;
        self.exit(if overridden { rejected } else { status }, politely);
    }

    fn kill(&mut self) {
        self.exit(KILLED, false);
    }

    fn exit(&mut self, status: u8, politely: bool) {
        self.say_goodbye(politely);
        let link = self.link.as_ref();
        let all_done = match self.state.to_do {
            Some(to_do) => to_do == 0,
            // With --drain: the queue was empty, and then the consumer was cancelled.
            None => matches!(self.phase, Phase::Cancelling(_)) && !self.told,
        };
        self.phase = Phase::Ended(End {
            status,
            fulfilled: all_done && !self.mistaken,
            removed: link.and_then(|link| link.removed),
            dead_lettered: self.dead_lettered || link.is_some_and(|link| link.dead_lettered),
        });
    }

    fn say_goodbye(&mut self, politely: bool) {
        if let Some(link) = self.link.as_mut().filter(|_| politely) {
            link.write(Request::Close);
        }
    }

    /// Takes the connection, if the worker doesn't use it any more.
    pub fn left(&mut self) -> Option<Link> {
        let done = matches!(self.phase, Phase::Ended(_) | Phase::Connecting);
        self.link.take_if(|_| done)
    }

    /// The connection is lost, or, `politely`, only the channel, so that the connection can be closed.
    fn lost(&mut self, system: &System, politely: bool) {
        match self.phase {
            Phase::Waiting { arrived, .. } | Phase::Cancelling(arrived) => {
                // A message that is cut short twice in succession would never arrive.
                if self.cut_short && arrived.is_some() {
                    return self.end(system, UNREADABLE, politely);
                }
                self.cut_short |= arrived.is_some();
                self.say_goodbye(politely);
                self.phase = Phase::Connecting;
            }
            // The command is stopped.
            Phase::Running(run) => {
                let verdict = verdict(system, run, Ending::Stopped, false);
                self.end(system, verdict.status, politely);
            }
            Phase::Settling(_) => self.happened(system, Event::Closed, politely),
            Phase::Releasing { status, .. } => self.end(system, status, politely),
            Phase::Taken(_) => {
                let status = if self.state.stopped_by.is_some() { TERMINATED } else { UNCONFIRMED };
                self.end(system, status, politely);
            }
            phase => unreachable!("a loss in {phase:?}"),
        }
    }

    /// Takes a message; it is lost if a second one has come.
    fn take(&mut self, system: &System, arrived: Arrived) {
        self.phase = Phase::Taken(arrived.first);
        self.cut_short = false;
        if arrived.second.is_some() {
            self.lost(system, true);
        }
    }

    /// Starts the command, unless a signal came before. With `--no-ack`, it settles the message first.
    fn start(&mut self, system: &System) {
        let Phase::Taken(delivery) = self.phase else {
            unreachable!("only called when a message was taken");
        };
        let run = Run { delivery, stop: None };
        match self.state.stopped_by {
            Some(_) => self.settle(system, run, Some(Ending::NotStarted(TERMINATED)), Settlement::Release, true),
            None if system.no_ack => self.settle(system, run, None, Settlement::Ack, true),
            None => self.run(system, run),
        }
    }

    fn run(&mut self, system: &System, run: Run) {
        self.started_late |= self.told;
        self.phase = Phase::Running(run);
        self.link().ran = Some(run.delivery.id);
        if system.bug == Some(Bug::AckFirst) {
            self.write(Request::Ack(run.delivery.tag));
        }
    }

    fn time_limit(&mut self) {
        if let Phase::Running(run) = &mut self.phase {
            run.stop.get_or_insert(Stop::TimeLimit);
        }
    }

    /// The command has ended, so the settlement begins.
    fn command_ended(&mut self, system: &System, queue: &mut Queue, ending: Ending) {
        let run = match self.phase {
            Phase::Running(run) => run,
            Phase::Taken(delivery) => Run { delivery, stop: None },
            phase => unreachable!("a command ended in {phase:?}"),
        };
        if ending == Ending::Success {
            queue.message(run.delivery.id).done = true;
        }
        let verdict = verdict(system, run, ending, true);
        if system.no_ack {
            return self.settled(system, run, Some(ending), None);
        }
        let settlement = verdict.settlement.expect("the delivery is still ours");
        let is_last = self.next(verdict, run) != Next::Message;
        let not_started = matches!(ending, Ending::NotStarted(_));
        let cancels = settlement == Settlement::Requeue || is_last || not_started;
        self.settle(system, run, Some(ending), settlement, cancels);
    }

    fn next(&self, verdict: Verdict, run: Run) -> Next {
        self.state.next(verdict, run.delivery.failures.map(u64::from))
    }

    fn settle(&mut self, system: &System, run: Run, ending: Option<Ending>, settlement: Settlement, cancels: bool) {
        // An already cancelled consumer gets no further message either.
        let cancels = cancels || !self.subscribed;
        let mut settling = Settling::new(cancels);
        if Settling::needs_second_barrier(settlement, system.ran(), None) && system.bug != Some(Bug::AsksOnce) {
            settling.require_second_barrier();
        }
        self.phase = Phase::Settling(UnderWay { run, ending, settling, asked: false, next: None });
        self.carry_out(system, true);
    }

    /// Performs the steps up to the next one that waits. A cut can lose the methods written here after any of them, so
    /// a cut or a kill between two of them is the same as one after the last.
    fn carry_out(&mut self, system: &System, politely: bool) {
        let mut cancels_late = false;
        while let Phase::Settling(mut it) = self.phase {
            let tag = it.run.delivery.tag;
            match it.settling.step() {
                Step::Cancel if system.bug == Some(Bug::CancelAfterAck) => cancels_late = self.subscribed,
                Step::Cancel => {
                    if std::mem::take(&mut self.subscribed) {
                        self.write(Request::Cancel { nowait: true });
                    }
                }
                Step::Settle => {
                    let verdict = it.ending.map(|ending| verdict(system, it.run, ending, true));
                    match verdict.map_or(Some(Settlement::Ack), |verdict| verdict.settlement) {
                        _ if system.bug == Some(Bug::AckFirst) => {}
                        None => unreachable!("a lost message isn't settled"),
                        Some(Settlement::Ack) => self.write(Request::Ack(tag)),
                        Some(Settlement::Requeue) => self.write(Request::Reject { tag, requeue: true }),
                        Some(Settlement::DeadLetter) => self.write(Request::Reject { tag, requeue: false }),
                        Some(Settlement::Release) => self.write(Request::Nack(tag)),
                    }
                    if cancels_late {
                        self.subscribed = false;
                        self.write(Request::Cancel { nowait: true });
                    }
                }
                Step::Barrier if system.bug == Some(Bug::NoBarrier) => {
                    return self.settled(system, it.run, it.ending, it.next);
                }
                Step::Barrier => {
                    if !it.asked {
                        self.write(Request::Qos);
                        it.asked = true;
                        self.phase = Phase::Settling(it);
                    }
                    return;
                }
                Step::Pause => return,
                Step::Done(Settled::Confirmed) => {
                    return self.settled(system, it.run, it.ending, it.next);
                }
                Step::Done(outcome) => {
                    let status = match it.ending {
                        None => UNCONFIRMED,
                        // No command ran, so it doesn't matter whether the release is confirmed.
                        Some(Ending::NotStarted(status)) => status,
                        Some(ending) => verdict(system, it.run, ending, true).status_after(outcome),
                    };
                    return self.end(system, status, politely);
                }
            }
            it.settling.happened(Event::Written);
            self.phase = Phase::Settling(it);
        }
    }

    /// An event during a settlement.
    fn happened(&mut self, system: &System, event: Event, politely: bool) {
        let Phase::Settling(it) = &mut self.phase else {
            unreachable!("only called while it settles");
        };
        if event == Event::Closed && system.bug == Some(Bug::LossAfterReply) && after_first_reply(it.settling) {
            let it = *it;
            return self.settled(system, it.run, it.ending, it.next);
        }
        it.asked &= event != Event::Reply;
        it.settling.happened(event);
        self.carry_out(system, politely);
    }

    /// The settlement is confirmed.
    fn settled(&mut self, system: &System, run: Run, ending: Option<Ending>, next_one: Option<Arrived>) {
        let Some(ending) = ending else {
            return match self.state.stopped_by {
                Some(_) => self.end(system, TERMINATED, true),
                None => self.run(system, run),
            };
        };
        let verdict = verdict(system, run, ending, true);
        let status = verdict.status_after(Settled::Confirmed);
        if matches!(ending, Ending::NotStarted(_)) {
            return self.end(system, status, true);
        }
        let next = self.next(verdict, run);
        let done = system.no_ack && ending == Ending::Success
            || !system.no_ack && matches!(verdict.settlement, Some(Settlement::Ack | Settlement::DeadLetter));
        if done {
            self.mistaken |= self.link().removed != Some(run.delivery.id);
            self.dead_lettered |= verdict.settlement == Some(Settlement::DeadLetter);
            self.state.to_do = self.state.to_do.map(|to_do| to_do - 1);
        }
        let status = match next {
            Next::Message => return self.go_on(system, next_one),
            Next::End => status,
            Next::AllDone => SUCCESS,
            Next::Stopped(signal) => 128 + signal as u8,
        };
        if self.subscribed && system.bug != Some(Bug::CloseToRelease) {
            return self.release(next_one, 1, status);
        }
        self.end(system, status, true);
    }

    /// Goes on with the next message, on the same channel unless its consumer is cancelled.
    fn go_on(&mut self, system: &System, next_one: Option<Arrived>) {
        if let Some(next_one) = next_one {
            return self.take(system, next_one);
        }
        if !self.subscribed {
            self.subscribed = true;
            self.link().subscribe();
        }
        self.wait(system);
    }

    /// Handles the broker's next method.
    fn receive(&mut self, system: &System) {
        let reply = self.link().to_worker.remove(0);
        match (&mut self.phase, reply) {
            (Phase::Waiting { asking: false, .. }, Reply::Deliver(delivery)) => {
                self.take(system, Arrived { first: delivery, second: None });
            }
            (
                Phase::Waiting { arrived, .. } | Phase::Cancelling(arrived) | Phase::Releasing { arrived, .. },
                Reply::Deliver(delivery),
            ) => Arrived::add(arrived, delivery),
            (Phase::Waiting { .. }, Reply::DeclareOk { empty: true }) => self.give_up(),
            (Phase::Waiting { asking, arrived }, Reply::DeclareOk { empty: false }) => {
                *asking = false;
                if let Some(arrived) = arrived.take() {
                    self.take(system, arrived);
                }
            }
            (&mut Phase::Cancelling(arrived), Reply::CancelOk) => {
                self.subscribed = false;
                match arrived {
                    Some(arrived) if system.bug != Some(Bug::DropsLateMessage) => self.take(system, arrived),
                    _ if !system.drains() => self.end(system, EMPTY, true),
                    // After a cut-short message: the broker may still hold it for the old connection.
                    _ => self.end(system, if self.cut_short { UNCONFIRMED } else { SUCCESS }, true),
                }
            }
            (Phase::Releasing { arrived, replies, .. }, Reply::CancelOk) => {
                *replies -= 1;
                if *replies == 0 {
                    let arrived = arrived.take();
                    self.release_arrived(arrived);
                }
            }
            (&mut Phase::Releasing { status, .. }, Reply::QosOk) => self.end(system, status, true),
            (Phase::Releasing { .. }, Reply::DeclareOk { .. }) => {}
            // The message is settled, and the consumer cancelled.
            (Phase::Running(_), _) if system.no_ack => {}
            // A second delivery means that the first was lost.
            (Phase::Taken(_) | Phase::Running(_), Reply::Deliver(_)) => self.lost(system, true),
            (Phase::Settling(it), Reply::Deliver(delivery)) => {
                let same = delivery.id == it.run.delivery.id;
                if self.subscribed {
                    Arrived::add(&mut it.next, delivery);
                }
                if system.bug != Some(Bug::RedeliveryUnseen) {
                    self.happened(system, Event::Delivery { same }, true);
                }
            }
            (Phase::Settling(_), Reply::ConsumerCancelled) if system.bug == Some(Bug::CancelIgnored) => {}
            (Phase::Settling(_), Reply::ConsumerCancelled) => self.happened(system, Event::Cancelled, true),
            (Phase::Settling(_), Reply::QosOk) => self.happened(system, Event::Reply, true),
            (_, Reply::ConsumerCancelled | Reply::ChannelClosed) => self.lost(system, true),
            (phase, reply) => unreachable!("{reply:?} in {phase:?}"),
        }
    }
}

/// Whether the first of two barriers is answered.
fn after_first_reply(settling: Settling) -> bool {
    let mut then = settling;
    then.happened(Event::Reply);
    settling.step() == Step::Pause || then.step() == Step::Done(Settled::Confirmed)
}

/// The decision of src/verdict.rs. If the command wasn't started, there is none to make.
fn verdict(system: &System, run: Run, ending: Ending, still_owned: bool) -> Verdict {
    let stop = run.stop.map(|stop| match stop {
        Stop::Signal => StopReason::Signal(SIGTERM),
        Stop::TimeLimit => StopReason::TimeLimit,
    });
    let ended = match ending {
        Ending::Success => Ended::Exited(0),
        Ending::Failure(status) => Ended::Exited(status),
        Ending::Stopped => Ended::Killed(SIGTERM),
        Ending::NotStarted(status) => {
            return Verdict {
                settlement: Some(match system.bug {
                    Some(Bug::RejectNotRun) => Settlement::Requeue,
                    _ => Settlement::Release,
                }),
                status,
                status_if_unconfirmed: status,
            };
        }
    };
    let failures_before = run.delivery.failures.map(u64::from);
    let mut verdict = decide(CommandResult { ended, stop, still_owned, failures_before }, &system.policy);
    match system.bug {
        Some(Bug::TrustUnconfirmed) => verdict.status_if_unconfirmed = verdict.status,
        Some(Bug::AlwaysZero) => verdict.status = 0,
        _ => {}
    }
    verdict
}
