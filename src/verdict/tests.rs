//! Every row of the contract's table of events that is a decision.

use super::*;

const OK: Ended = Ended::Exited(0);
const TERM: StopReason = StopReason::Signal(15);

fn result(ended: Ended) -> CommandResult {
    CommandResult { ended, stop: None, still_owned: true, failures_before: Some(0) }
}

fn verdict(settlement: Option<Settlement>, status: u8, status_if_unconfirmed: u8) -> Verdict {
    Verdict { settlement, status, status_if_unconfirmed }
}

#[test]
fn without_options() {
    use Settlement::{Ack, Release, Requeue};
    let stopped = |ended, stop| CommandResult { stop: Some(stop), ..result(ended) };
    let lost = |result: CommandResult| CommandResult { still_owned: false, ..result };
    let rows = [
        // the command ends by itself
        (result(OK), verdict(Some(Ack), 0, 75)),
        (result(Ended::Exited(3)), verdict(Some(Requeue), 3, 3)),
        (result(Ended::Exited(255)), verdict(Some(Requeue), 255, 255)),
        (result(Ended::Killed(9)), verdict(Some(Requeue), 137, 137)),
        (result(Ended::Killed(64)), verdict(Some(Requeue), 192, 192)),
        // a signal to qconsume came first: an eviction
        (stopped(OK, TERM), verdict(Some(Ack), 0, 75)),
        (stopped(Ended::Exited(3), TERM), verdict(Some(Release), 3, 3)),
        (stopped(Ended::Killed(15), TERM), verdict(Some(Release), 143, 143)),
        (stopped(Ended::Killed(9), TERM), verdict(Some(Release), 137, 137)),
        // the time limit came first: a failure, however the command took it
        (stopped(OK, StopReason::TimeLimit), verdict(Some(Requeue), 124, 124)),
        (stopped(Ended::Exited(3), StopReason::TimeLimit), verdict(Some(Requeue), 124, 124)),
        (stopped(Ended::Killed(9), StopReason::TimeLimit), verdict(Some(Requeue), 124, 124)),
        // lost beats everything
        (lost(result(OK)), verdict(None, 75, 75)),
        (lost(result(Ended::Exited(3))), verdict(None, 75, 75)),
        (lost(result(Ended::Killed(9))), verdict(None, 75, 75)),
        (lost(stopped(OK, TERM)), verdict(None, 75, 75)),
        (lost(stopped(Ended::Killed(9), StopReason::TimeLimit)), verdict(None, 75, 75)),
    ];
    for (result, expected) in rows {
        assert_eq!(decide(result, &Policy::default()), expected, "{result:?}");
    }
}

#[test]
fn with_options() {
    use Settlement::{Ack, DeadLetter, Release, Requeue};
    let reject = || Policy { max_attempts: Some(1), ..Policy::default() };
    let reject_on = || Policy { reject_on: Some(Statuses(vec![65..=65, 100..=124])), ..Policy::default() };
    let at_most = |max| Policy { max_attempts: Some(max), ..Policy::default() };
    let failed = |before| CommandResult { failures_before: before, ..result(Ended::Exited(3)) };
    let exited = |status| result(Ended::Exited(status));
    let stopped = |ended, stop| CommandResult { stop: Some(stop), ..result(ended) };
    let rows = [
        (result(OK), reject(), verdict(Some(Ack), 0, 75)),
        (exited(3), reject(), verdict(Some(DeadLetter), 3, 3)),
        (stopped(Ended::Exited(3), StopReason::TimeLimit), reject(), verdict(Some(DeadLetter), 124, 124)),
        // an eviction is never the message's fault
        (stopped(Ended::Exited(3), TERM), reject(), verdict(Some(Release), 3, 3)),
        (exited(64), reject_on(), verdict(Some(Requeue), 64, 64)),
        (exited(65), reject_on(), verdict(Some(DeadLetter), 65, 65)),
        (exited(120), reject_on(), verdict(Some(DeadLetter), 120, 120)),
        (result(Ended::Killed(9)), reject_on(), verdict(Some(Requeue), 137, 137)),
        (stopped(OK, StopReason::TimeLimit), reject_on(), verdict(Some(DeadLetter), 124, 124)),
        // attempts, where the queue counts and where it doesn't
        (failed(Some(0)), at_most(1), verdict(Some(DeadLetter), 3, 3)),
        (failed(None), at_most(1), verdict(Some(DeadLetter), 3, 3)),
        (failed(Some(0)), at_most(3), verdict(Some(Requeue), 3, 3)),
        (failed(Some(1)), at_most(3), verdict(Some(Requeue), 3, 3)),
        (failed(Some(2)), at_most(3), verdict(Some(DeadLetter), 3, 3)),
        (failed(Some(u64::MAX)), at_most(3), verdict(Some(DeadLetter), 3, 3)),
        (failed(None), at_most(3), verdict(Some(Requeue), 3, 3)),
        // the mapped statuses
        (exited(77), Policy { failure_exit_code: Some(1), ..Policy::default() }, verdict(Some(Requeue), 1, 1)),
        (
            result(Ended::Killed(9)),
            Policy { failure_exit_code: Some(1), ..Policy::default() },
            verdict(Some(Requeue), 1, 1),
        ),
        (
            stopped(Ended::Killed(15), TERM),
            Policy { failure_exit_code: Some(1), ..Policy::default() },
            verdict(Some(Release), 1, 1),
        ),
        (
            stopped(Ended::Killed(15), StopReason::TimeLimit),
            Policy { failure_exit_code: Some(1), ..Policy::default() },
            verdict(Some(Requeue), 124, 124),
        ),
        (exited(3), Policy { reject_exit_code: Some(0), ..reject() }, verdict(Some(DeadLetter), 0, 3)),
        (
            exited(3),
            Policy { reject_exit_code: Some(42), failure_exit_code: Some(1), ..reject() },
            verdict(Some(DeadLetter), 42, 1),
        ),
        (
            result(OK),
            Policy { failure_exit_code: Some(1), reject_exit_code: Some(42), ..reject() },
            verdict(Some(Ack), 0, 75),
        ),
    ];
    for (result, policy, expected) in rows {
        assert_eq!(decide(result, &policy), expected, "{result:?} {policy:?}");
    }
}

/// The two promises that no combination of options may break.
#[test]
fn no_false_success() {
    let statuses = [0, 1, 75, 124, 255];
    let ends = statuses.map(Ended::Exited).into_iter().chain([Ended::Killed(9), Ended::Killed(15)]);
    for ended in ends {
        for stop in [None, Some(TERM), Some(StopReason::TimeLimit)] {
            for still_owned in [true, false] {
                for failures_before in [None, Some(0), Some(7)] {
                    for reject_exit_code in [None, Some(0), Some(9)] {
                        for max_attempts in [None, Some(1)] {
                            let result = CommandResult { ended, stop, still_owned, failures_before };
                            let policy = Policy { max_attempts, reject_exit_code, ..Policy::default() };
                            let verdict = decide(result, &policy);
                            assert_ne!(verdict.status_if_unconfirmed, 0, "{result:?}");
                            let gone = matches!(verdict.settlement, Some(Settlement::Ack | Settlement::DeadLetter));
                            assert!(verdict.status != 0 || gone, "{result:?}");
                            assert_eq!(
                                verdict.settlement == Some(Settlement::Ack),
                                still_owned && ended == Ended::Exited(0) && stop != Some(StopReason::TimeLimit),
                                "{result:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_comes_after_a_message() {
    use Next::{AllDone, End, Message, Stopped};
    use Settlement::{Ack, DeadLetter, Release, Requeue};
    let state = |to_do| RunState { to_do, keep_going: false, stopped_by: None };
    let keep_going = |to_do| RunState { keep_going: true, ..state(to_do) };
    let stopped = |state| RunState { stopped_by: Some(15), ..state };
    let (success, failure) = ((Ack, 0), (Requeue, 3));
    let (dead, dead_is_done) = ((DeadLetter, 3), (DeadLetter, 0));
    let rows = [
        // one message
        (state(Some(1)), success, End),
        (state(Some(1)), failure, End),
        (state(Some(1)), dead, End),
        // several, or all
        (state(Some(2)), success, Message),
        (state(Some(2)), dead_is_done, Message),
        (state(Some(2)), dead, End),
        (state(None), success, Message),
        (state(None), failure, End),
        // --keep-going
        (keep_going(Some(1)), success, AllDone),
        (keep_going(Some(1)), dead, AllDone),
        (keep_going(Some(1)), failure, Message),
        (keep_going(Some(2)), dead, Message),
        (keep_going(None), failure, Message),
        // a stop signal, whenever it came, ends the run, and with 0 only if everything is done
        (stopped(state(Some(1))), success, End),
        (stopped(state(Some(1))), dead_is_done, End),
        (stopped(state(Some(2))), success, Stopped(15)),
        (stopped(state(Some(2))), dead_is_done, Stopped(15)),
        (stopped(state(None)), dead_is_done, Stopped(15)),
        (stopped(state(None)), (Release, 143), End),
        (stopped(keep_going(Some(1))), success, End),
        (stopped(keep_going(Some(2))), success, Stopped(15)),
        (stopped(keep_going(None)), failure, End),
        (stopped(keep_going(None)), dead, End),
    ];
    for (state, (settlement, status), expected) in rows {
        let verdict = verdict(Some(settlement), status, 75);
        assert_eq!(state.next(verdict, Some(0)), expected, "{state:?} {verdict:?}");
        // Whatever the options, a stopped run that goes on to 0 has done everything.
        if state.stopped_by.is_some() && expected == End && status == 0 {
            assert_eq!(state.to_do, Some(1));
        }
    }
    let uncounted = verdict(Some(Requeue), 3, 3);
    assert_eq!(keep_going(None).next(uncounted, None), End);
    assert_eq!(keep_going(None).next(verdict(Some(DeadLetter), 3, 3), None), Message);
}

#[test]
fn what_was_lost_while_it_was_settled_is_75() {
    let verdict = verdict(Some(Settlement::Requeue), 3, 4);
    assert_eq!(
        [Settled::Confirmed, Settled::Unconfirmed, Settled::Lost].map(|it| verdict.status_after(it)),
        [3, 4, 75]
    );
}
