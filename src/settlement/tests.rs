use super::*;
use Settled::{Confirmed, Lost, Unconfirmed};

/// Where these events lead, from the start.
fn after(cancels: bool, second_barrier: bool, events: &[Event]) -> Step {
    let mut settling = Settling::new(cancels);
    if second_barrier {
        settling.require_second_barrier();
    }
    for event in events {
        settling.happened(*event);
    }
    settling.step()
}

/// The events that lead to each step in turn, and the step.
fn way(cancels: bool, second_barrier: bool) -> Vec<(Vec<Event>, Step)> {
    use Event::{PauseOver, Reply, Written};
    let mut events = Vec::new();
    let mut way = vec![(events.clone(), after(cancels, second_barrier, &events))];
    let written = if cancels { 2 } else { 1 };
    let rest = if second_barrier { &[Reply, PauseOver, Reply][..] } else { &[Reply] };
    for event in [Written].repeat(written).into_iter().chain(rest.iter().copied()) {
        events.push(event);
        way.push((events.clone(), after(cancels, second_barrier, &events)));
    }
    way
}

fn steps(cancels: bool, second_barrier: bool) -> Vec<Step> {
    way(cancels, second_barrier).into_iter().map(|(_, step)| step).collect()
}

#[test]
fn cancel_settlement_and_barrier_in_this_order() {
    use Step::{Barrier, Cancel, Done, Pause, Settle};
    assert_eq!(steps(true, false), [Cancel, Settle, Barrier, Done(Confirmed)]);
    assert_eq!(steps(false, false), [Settle, Barrier, Done(Confirmed)]);
    assert_eq!(steps(true, true), [Cancel, Settle, Barrier, Pause, Barrier, Done(Confirmed)]);
    assert_eq!(steps(false, true), [Settle, Barrier, Pause, Barrier, Done(Confirmed)]);
}

/// Every step of every way, before its end, and what `event` makes of it.
fn everywhere(event: Event) -> impl Iterator<Item = (bool, Step, Step)> {
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    kinds.into_iter().flat_map(move |(cancels, second_barrier)| {
        let way = way(cancels, second_barrier).into_iter();
        let open = way.filter(|(_, step)| !matches!(step, Step::Done(_)));
        open.map(move |(events, step)| {
            (cancels, step, after(cancels, second_barrier, &[&events[..], &[event]].concat()))
        })
    })
}

#[test]
fn only_the_last_reply_confirms() {
    for event in [Event::Cancelled, Event::Closed, Event::Delivery { same: true }, Event::PauseOver, Event::TimedOut] {
        for (_, step, then) in everywhere(event) {
            assert_ne!(then, Step::Done(Confirmed), "{event:?} at {step:?}");
        }
    }
}

#[test]
fn a_loss_at_any_point_is_a_loss() {
    for event in [Event::Cancelled, Event::Closed] {
        for (_, step, then) in everywhere(event) {
            assert_eq!(then, Step::Done(Unconfirmed), "{event:?} at {step:?}");
        }
    }
    for (_, step, then) in everywhere(Event::Delivery { same: true }) {
        assert_eq!(then, Step::Done(Lost), "{step:?}");
    }
}

#[test]
fn another_message_may_come_once_this_one_is_settled_unless_the_consumer_is_cancelled() {
    for (cancels, step, then) in everywhere(Event::Delivery { same: false }) {
        let may_come = !cancels && step != Step::Settle;
        assert_eq!(then, if may_come { step } else { Step::Done(Lost) }, "{cancels} {step:?}");
    }
}

#[test]
fn without_an_answer_in_time_nothing_is_confirmed() {
    for (_, step, then) in everywhere(Event::TimedOut) {
        assert_eq!(then, Step::Done(Unconfirmed), "{step:?}");
    }
}

#[test]
fn what_happens_after_the_end_changes_nothing() {
    for (_, _, then) in everywhere(Event::Closed) {
        assert_eq!(then, Step::Done(Unconfirmed));
    }
    let mut settling = Settling::new(true);
    settling.happened(Event::Delivery { same: true });
    for event in [Event::Written, Event::Reply, Event::Cancelled, Event::Closed, Event::TimedOut] {
        settling.happened(event);
        assert_eq!(settling.step(), Step::Done(Lost));
    }
}

#[test]
fn long_runs_that_remove_their_message_are_asked_twice() {
    let asks = |settlement, ran, ack_timeout: Option<f64>| {
        let timeout = ack_timeout.map(Duration::from_secs_f64);
        Settling::needs_second_barrier(settlement, Duration::from_secs_f64(ran), timeout)
    };
    for settlement in [Settlement::Ack, Settlement::DeadLetter] {
        assert!(!asks(settlement, 4.9, None));
        assert!(asks(settlement, 5.0, None));
        assert!(asks(settlement, 0.8, Some(1.0)));
        assert!(!asks(settlement, 0.7, Some(1.0)));
        // The queue may have a shorter one than we have asked for.
        assert!(asks(settlement, 5.0, Some(3600.0)));
    }
    for settlement in [Settlement::Requeue, Settlement::Release] {
        assert!(!asks(settlement, 3600.0, None));
    }
}
