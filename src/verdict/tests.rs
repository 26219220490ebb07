//! Every row of the contract's table of events that is a decision.

use super::*;

const OK: Ended = Ended::Exited(0);
const TERM: Stop = Stop::Signal(15);

fn facts(ended: Ended) -> Facts {
    Facts {
        ended,
        stop: None,
        ours: true,
        failures_before: Some(0),
    }
}

fn verdict(settlement: Option<Settlement>, confirmed: u8, unconfirmed: u8) -> Verdict {
    Verdict {
        settlement,
        confirmed,
        unconfirmed,
    }
}

#[test]
fn without_options() {
    use Settlement::{Ack, GiveBack, Requeue};
    let stopped = |ended, stop| Facts {
        stop: Some(stop),
        ..facts(ended)
    };
    let lost = |facts: Facts| Facts {
        ours: false,
        ..facts
    };
    let rows = [
        // the command ends by itself
        (facts(OK), verdict(Some(Ack), 0, 75)),
        (facts(Ended::Exited(3)), verdict(Some(Requeue), 3, 3)),
        (facts(Ended::Exited(255)), verdict(Some(Requeue), 255, 255)),
        (facts(Ended::Killed(9)), verdict(Some(Requeue), 137, 137)),
        (facts(Ended::Killed(64)), verdict(Some(Requeue), 192, 192)),
        // a signal to qconsume came first: an eviction
        (stopped(OK, TERM), verdict(Some(Ack), 0, 75)),
        (
            stopped(Ended::Exited(3), TERM),
            verdict(Some(GiveBack), 3, 3),
        ),
        (
            stopped(Ended::Killed(15), TERM),
            verdict(Some(GiveBack), 143, 143),
        ),
        (
            stopped(Ended::Killed(9), TERM),
            verdict(Some(GiveBack), 137, 137),
        ),
        // the time limit came first: a failure, however the command took it
        (
            stopped(OK, Stop::TimeLimit),
            verdict(Some(Requeue), 124, 124),
        ),
        (
            stopped(Ended::Exited(3), Stop::TimeLimit),
            verdict(Some(Requeue), 124, 124),
        ),
        (
            stopped(Ended::Killed(9), Stop::TimeLimit),
            verdict(Some(Requeue), 124, 124),
        ),
        // lost beats everything
        (lost(facts(OK)), verdict(None, 75, 75)),
        (lost(facts(Ended::Exited(3))), verdict(None, 75, 75)),
        (lost(facts(Ended::Killed(9))), verdict(None, 75, 75)),
        (lost(stopped(OK, TERM)), verdict(None, 75, 75)),
        (
            lost(stopped(Ended::Killed(9), Stop::TimeLimit)),
            verdict(None, 75, 75),
        ),
    ];
    for (facts, expected) in rows {
        assert_eq!(decide(facts, &Policy::default()), expected, "{facts:?}");
    }
}

#[test]
fn with_options() {
    use Settlement::{Ack, DeadLetter, GiveBack, Requeue};
    let reject = || Policy {
        on_failure: OnFailure::Reject,
        ..Policy::default()
    };
    let reject_on = || Policy {
        reject_on: Statuses(vec![65..=65, 100..=124]),
        ..Policy::default()
    };
    let at_most = |max| Policy {
        max_attempts: Some(max),
        ..Policy::default()
    };
    let failed = |before| Facts {
        failures_before: before,
        ..facts(Ended::Exited(3))
    };
    let exited = |status| facts(Ended::Exited(status));
    let stopped = |ended, stop| Facts {
        stop: Some(stop),
        ..facts(ended)
    };
    let rows = [
        (facts(OK), reject(), verdict(Some(Ack), 0, 75)),
        (exited(3), reject(), verdict(Some(DeadLetter), 3, 3)),
        (
            stopped(Ended::Exited(3), Stop::TimeLimit),
            reject(),
            verdict(Some(DeadLetter), 124, 124),
        ),
        // an eviction is never the message's fault
        (
            stopped(Ended::Exited(3), TERM),
            reject(),
            verdict(Some(GiveBack), 3, 3),
        ),
        (exited(64), reject_on(), verdict(Some(Requeue), 64, 64)),
        (exited(65), reject_on(), verdict(Some(DeadLetter), 65, 65)),
        (
            exited(120),
            reject_on(),
            verdict(Some(DeadLetter), 120, 120),
        ),
        (
            facts(Ended::Killed(9)),
            reject_on(),
            verdict(Some(Requeue), 137, 137),
        ),
        (
            stopped(OK, Stop::TimeLimit),
            reject_on(),
            verdict(Some(DeadLetter), 124, 124),
        ),
        // attempts, where the queue counts and where it doesn't
        (failed(Some(0)), at_most(1), verdict(Some(DeadLetter), 3, 3)),
        (failed(None), at_most(1), verdict(Some(DeadLetter), 3, 3)),
        (failed(Some(0)), at_most(3), verdict(Some(Requeue), 3, 3)),
        (failed(Some(1)), at_most(3), verdict(Some(Requeue), 3, 3)),
        (failed(Some(2)), at_most(3), verdict(Some(DeadLetter), 3, 3)),
        (
            failed(Some(u64::MAX)),
            at_most(3),
            verdict(Some(DeadLetter), 3, 3),
        ),
        (failed(None), at_most(3), verdict(Some(Requeue), 3, 3)),
        // the mapped statuses
        (
            exited(77),
            Policy {
                failure_exit_code: Some(1),
                ..Policy::default()
            },
            verdict(Some(Requeue), 1, 1),
        ),
        (
            facts(Ended::Killed(9)),
            Policy {
                failure_exit_code: Some(1),
                ..Policy::default()
            },
            verdict(Some(Requeue), 1, 1),
        ),
        (
            stopped(Ended::Killed(15), TERM),
            Policy {
                failure_exit_code: Some(1),
                ..Policy::default()
            },
            verdict(Some(GiveBack), 1, 1),
        ),
        (
            stopped(Ended::Killed(15), Stop::TimeLimit),
            Policy {
                failure_exit_code: Some(1),
                ..Policy::default()
            },
            verdict(Some(Requeue), 124, 124),
        ),
        (
            exited(3),
            Policy {
                reject_exit_code: Some(0),
                ..reject()
            },
            verdict(Some(DeadLetter), 0, 3),
        ),
        (
            exited(3),
            Policy {
                reject_exit_code: Some(42),
                failure_exit_code: Some(1),
                ..reject()
            },
            verdict(Some(DeadLetter), 42, 1),
        ),
        (
            facts(OK),
            Policy {
                failure_exit_code: Some(1),
                reject_exit_code: Some(42),
                ..reject()
            },
            verdict(Some(Ack), 0, 75),
        ),
    ];
    for (facts, policy, expected) in rows {
        assert_eq!(decide(facts, &policy), expected, "{facts:?} {policy:?}");
    }
}

/// The two promises that no combination of options may break.
#[test]
fn no_false_success() {
    let statuses = [0, 1, 75, 124, 255];
    let ends = statuses
        .map(Ended::Exited)
        .into_iter()
        .chain([Ended::Killed(9), Ended::Killed(15)]);
    for ended in ends {
        for stop in [None, Some(TERM), Some(Stop::TimeLimit)] {
            for ours in [true, false] {
                for failures_before in [None, Some(0), Some(7)] {
                    for reject_exit_code in [None, Some(0), Some(9)] {
                        for on_failure in [OnFailure::Requeue, OnFailure::Reject] {
                            let facts = Facts {
                                ended,
                                stop,
                                ours,
                                failures_before,
                            };
                            let policy = Policy {
                                on_failure,
                                reject_exit_code,
                                ..Policy::default()
                            };
                            let verdict = decide(facts, &policy);
                            assert_ne!(verdict.unconfirmed, 0, "{facts:?}");
                            let gone = matches!(
                                verdict.settlement,
                                Some(Settlement::Ack | Settlement::DeadLetter)
                            );
                            assert!(verdict.confirmed != 0 || gone, "{facts:?}");
                            assert_eq!(
                                verdict.settlement == Some(Settlement::Ack),
                                ours && ended == Ended::Exited(0) && stop != Some(Stop::TimeLimit),
                                "{facts:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
