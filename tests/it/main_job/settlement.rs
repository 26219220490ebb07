//! Settlement: what goes over the wire, acknowledgements that can't be confirmed, and deliveries that are lost.

use crate::common::{
    Vhost, assert_gone, assert_in_one_place, assert_returned, behind, in_time, private_broker, queues, worker,
};
use std::{sync::Arc, thread, time::Duration};
use testbed::{
    Action, Broker,
    Direction::{self, ToBroker, ToClient},
    Method, PATIENCE, Program, Proxy, Queue, QueueKind, Running, eventually, frames,
};

#[test]
fn cancel_settlement_and_barrier_go_out_in_this_order() {
    for queue in queues("order") {
        for (script, settlement) in
            [("exit 0", Method::BASIC_ACK), ("exit 3", Method::BASIC_REJECT), ("kill -9 $$", Method::BASIC_REJECT)]
        {
            queue.publish_all(["one", "two"]);
            let proxy = Proxy::of(Broker::shared());
            behind(&proxy, &queue).shell(script).run();
            let begin = [
                Method::CONNECTION_START_OK,
                Method::CONNECTION_TUNE_OK,
                Method::CONNECTION_OPEN,
                Method::CHANNEL_OPEN,
                Method::BASIC_QOS,
                Method::BASIC_CONSUME,
            ];
            let end = [Method::BASIC_CANCEL, settlement, Method::BASIC_QOS, Method::CONNECTION_CLOSE];
            assert_eq!(proxy.sent(), [&begin[..], &end].concat(), "{script}");
            assert_eq!(proxy.count(ToClient, Method::BASIC_DELIVER), 1, "{script}");
            queue.purge();
        }
    }
}

#[test]
fn a_second_message_is_never_pushed_however_late_the_answers_are() {
    use std::time::Duration;
    for queue in queues("one-only") {
        queue.publish_all(["one", "two"]);
        let proxy = Proxy::of(Broker::shared());
        proxy.delay(ToClient, Duration::from_millis(50));
        proxy.delay(ToBroker, Duration::from_millis(50));
        behind(&proxy, &queue).args(["--", "true"]).run().assert_status(0);
        assert_eq!(proxy.count(ToClient, Method::BASIC_DELIVER), 1);
        let next = queue.wait_get();
        assert_eq!((next.text().as_str(), next.redelivered), ("two", false));
    }
}

/// Where the message is after a fault during its settlement.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    /// The broker never received the settlement.
    Back,
    /// The broker has processed it and answered the barrier, but the worker can't know.
    Settled,
    /// The broker may have processed it; a quorum queue often drops a settlement that comes just before its channel
    /// ends.
    Either,
}

struct Fault {
    what: &'static str,
    rules: Vec<(Direction, Method, Action)>,
    then: Then,
}

/// The faults that can happen to the settlement, which is `method`, and to the broker's answers.
fn faults(method: Method) -> Vec<Fault> {
    let up = |method, action| (ToBroker, method, action);
    let down = |method, action| (ToClient, method, action);
    let (cancel, cancel_ok) = (Method::BASIC_CANCEL, Method::BASIC_CANCEL_OK);
    let (qos, qos_ok) = (Method::BASIC_QOS, Method::BASIC_QOS_OK);
    let channel_error = || frames::channel_close(1, 406, "PRECONDITION_FAILED - unknown delivery tag 1");
    let forced = || frames::connection_close(320, "CONNECTION_FORCED - Closed via management plugin");
    let cancelled = || frames::basic_cancel(1, "qconsume");
    let unknown = Action::Replace(Arc::new(frames::unknown_ack));
    // After an error a broker ignores everything, so it doesn't answer the barrier.
    let unheard = || up(qos, Action::SwallowFrame);
    let fault = |what, rules: &[_], then| Fault { what, rules: rules.to_vec(), then };
    vec![
        fault("cut before it", &[up(method, Action::CutBefore)], Then::Back),
        fault("cut after it", &[up(method, Action::CutAfter)], Then::Either),
        fault("swallowed with all that follows", &[up(method, Action::Swallow)], Then::Back),
        fault("swallowed with all since the cancel", &[up(cancel, Action::Swallow)], Then::Back),
        fault("the barrier swallowed", &[up(qos, Action::SwallowFrame)], Then::Either),
        fault(
            "all answers swallowed",
            &[down(cancel_ok, Action::Swallow), down(qos_ok, Action::Swallow)],
            Then::Settled,
        ),
        fault("the barrier's answer swallowed", &[down(qos_ok, Action::SwallowFrame)], Then::Settled),
        fault("the barrier's answer cut off", &[down(qos_ok, Action::CutBefore)], Then::Settled),
        fault("all stands still before it", &[up(method, Action::Stall)], Then::Back),
        fault("all stands still after it", &[up(qos, Action::Stall)], Then::Either),
        fault(
            "a channel error instead of it",
            &[up(method, Action::InjectInstead(channel_error())), unheard()],
            Then::Back,
        ),
        fault("a channel error crosses it", &[up(method, Action::Inject(channel_error())), unheard()], Then::Either),
        fault(
            "a channel error instead of the barrier's answer",
            &[down(qos_ok, Action::InjectInstead(channel_error()))],
            Then::Settled,
        ),
        fault("the broker knows of no such delivery", &[up(method, unknown)], Then::Back),
        fault("the broker's own cancel crosses it", &[up(method, Action::Inject(cancelled()))], Then::Either),
        fault("the broker's own cancel crosses the cancel", &[up(cancel, Action::Inject(cancelled()))], Then::Either),
        fault(
            "the broker closes the connection instead",
            &[up(method, Action::InjectInstead(forced())), unheard()],
            Then::Back,
        ),
        fault(
            "the broker closes the connection meanwhile",
            &[up(method, Action::Inject(forced())), unheard()],
            Then::Either,
        ),
    ]
}

/// A broker notices within this time that a connection was cut.
const NOTICED_BY_THEN: Duration = Duration::from_secs(2);

/// A settlement ends within this time.
const SETTLED_BY_THEN: Duration = Duration::from_secs(120);

/// Starts a command, prepares the fault, and lets the command end.
fn meets(fault: Fault, script: &str, queue: &Queue, status: i32) {
    let Fault { what, rules, then } = fault;
    queue.publish("orange");
    let proxy = Proxy::of(Broker::shared());
    let go = testbed::owner::temp_folder("go");
    let running = behind(&proxy, queue)
        .current_dir(&go)
        .shell(&format!("echo started; until [ -e go ]; do sleep 0.02; done; {script}"))
        .spawn();
    running.wait_for_stdout("started", PATIENCE);
    for (direction, method, action) in rules {
        proxy.once(direction, method, action);
    }
    std::fs::write(go.join("go"), "").unwrap();
    let done = running.wait(SETTLED_BY_THEN);
    assert_eq!(done.status(), status, "{what}:\n{}", done.stderr);
    let says = if status == 75 { "acknowledgement not confirmed" } else { "requeue not confirmed" };
    assert!(done.stderr.contains(says), "{what}:\n{}", done.stderr);
    // If the connection is still open, the broker notices its end now.
    proxy.cut();
    match then {
        Then::Settled if status == 75 => {
            // If the broker still held the message for the connection, it would requeue it when it notices the end.
            let back = || queue.ready() > 0;
            assert!(!eventually(NOTICED_BY_THEN, back), "{what}: the message was requeued");
            assert_gone(queue);
        }
        // It is acknowledged, or requeued once.
        Then::Either if status == 75 => assert_in_one_place(queue, "orange"),
        // A failure's message is requeued in any case.
        Then::Back | Then::Settled | Then::Either => assert_returned(queue, "orange"),
    }
}

/// Runs all faults at the same time, as most take the 90 seconds that a settlement may take.
fn all_faults(method: Method, script: &str, status: i32) {
    for kind in QueueKind::ALL {
        // One kind after the other: declaring many quorum queues at the same time is too much for a small node.
        let declare = |_: &Fault| Broker::shared().declare("unconfirmed").kind(kind).create();
        let faults = faults(method);
        let queues: Vec<Queue> = faults.iter().map(declare).collect();
        thread::scope(|scope| {
            for (fault, queue) in faults.into_iter().zip(&queues) {
                // A failure is reported under the thread's name.
                let name = format!("{}, {} queue", fault.what, kind.as_str());
                let thread = thread::Builder::new().name(name);
                let run = move || meets(fault, script, queue, status);
                thread.spawn_scoped(scope, run).unwrap();
            }
        });
    }
}

#[test]
fn a_success_whose_acknowledgement_cannot_be_confirmed_is_75_and_never_0() {
    all_faults(Method::BASIC_ACK, "exit 0", 75);
}

#[test]
fn a_failure_whose_return_cannot_be_confirmed_keeps_its_status() {
    all_faults(Method::BASIC_REJECT, "exit 3", 3);
}

#[test]
fn a_rejection_that_cannot_be_confirmed_is_no_success_though_a_confirmed_one_would_be() {
    for queue in queues("unrejected") {
        queue.publish("orange");
        let proxy = Proxy::of(Broker::shared());
        proxy.once(ToBroker, Method::BASIC_REJECT, Action::CutBefore);
        behind(&proxy, &queue)
            .args(["--max-attempts", "1", "--reject-exit-code", "0"])
            .shell("exit 3")
            .run()
            .assert_status(3)
            .assert_stderr("rejection not confirmed, so the message may be delivered again");
        assert_returned(&queue, "orange");
    }
}

/// Prints when it starts, and when it gets SIGTERM; then it succeeds, which must not count.
const LONG: &str = "trap 'echo terminated; exit 0' TERM; echo started; while :; do sleep 0.05; done";

fn long_command(program: Program) -> Running {
    let running = program.shell(LONG).spawn();
    running.wait_for_stdout("started", PATIENCE);
    running
}

/// Checks the end of a run whose delivery was lost while [`LONG`] ran.
#[track_caller]
fn assert_lost(running: Running, why: &str) {
    let done = running.finish(PATIENCE);
    done.assert_status(75).assert_stderr("delivery lost while the command runs").assert_stderr(why);
    assert_eq!(done.stdout_text(), "started\nterminated\n");
    running.wait_no_leftovers(PATIENCE);
}

#[test]
fn a_connection_cut_while_the_command_runs_ends_it_with_75() {
    for queue in queues("cut") {
        queue.publish("papaya");
        let proxy = Proxy::of(Broker::shared());
        let running = long_command(behind(&proxy, &queue));
        proxy.cut();
        assert_lost(running, "the broker closed the connection");
        assert_returned(&queue, "papaya");
        assert_eq!(proxy.accepted(), 1, "qconsume connected again for a lost message");
    }
}

#[test]
fn a_broker_that_falls_silent_while_the_command_runs_ends_it_with_75() {
    for queue in queues("silence") {
        queue.publish("peach");
        let proxy = Proxy::of(Broker::shared());
        let running = long_command(behind(&proxy, &queue).args(["--heartbeat", "4"]));
        proxy.swallow(ToClient);
        assert_lost(running, "silent for two heartbeat intervals");
        proxy.cut();
        assert_returned(&queue, "peach");
    }
}

#[test]
fn a_channel_or_connection_closed_while_the_command_runs_ends_it_with_75() {
    let channel =
        frames::channel_close(1, 406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out");
    let connection = frames::connection_close(320, "CONNECTION_FORCED - broker forced connection closure");
    for (frame, why) in [
        (channel, "acknowledgement timeout"),
        (connection, "closed the connection: CONNECTION_FORCED"),
        (frames::basic_cancel(1, "qconsume"), "cancelled the consumer"),
    ] {
        let queue = Broker::shared().queue("closed");
        queue.publish("pear");
        let proxy = Proxy::of(Broker::shared());
        // Injected with the next heartbeat. On a busy machine, 4 s are enough to not lose the broker before that.
        let running = long_command(behind(&proxy, &queue).args(["--heartbeat", "4"]));
        proxy.once(ToClient, Method::HEARTBEAT, Action::Inject(frame));
        assert_lost(running, why);
        proxy.cut();
        assert_returned(&queue, "pear");
    }
}

#[test]
fn a_delivery_lost_after_its_consumer_was_cancelled_ends_the_command_with_75() {
    let channel =
        frames::channel_close(1, 406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out");
    let connection = frames::connection_close(320, "CONNECTION_FORCED - broker forced connection closure");
    for (loss, why) in [
        (Action::Inject(channel), "acknowledgement timeout"),
        (Action::Inject(connection), "CONNECTION_FORCED"),
        (Action::CutAfter, "connection"),
        (Action::Swallow, "silent for two heartbeat intervals"),
    ] {
        let (running, queue, proxy) = in_time(|| {
            let queue = Broker::shared().queue("cancelled-first");
            let proxy = Proxy::of(Broker::shared());
            // The message comes after `--wait` has cancelled the consumer, so no basic.cancel can report a loss.
            queue.publish("raisin");
            proxy.once(ToClient, Method::BASIC_DELIVER, Action::Hold);
            let running = behind(&proxy, &queue).args(["--heartbeat", "4", "--wait", "200ms"]).shell(LONG).spawn();
            proxy.wait_for(ToBroker, Method::BASIC_CANCEL);
            proxy.release();
            let started = || running.stdout().starts_with(b"started");
            eventually(PATIENCE, || started() || running.has_ended());
            started().then_some((running, queue, proxy))
        });
        proxy.once(ToClient, Method::HEARTBEAT, loss);
        assert_lost(running, why);
        proxy.cut();
        assert_returned(&queue, "raisin");
    }
}

#[test]
fn a_queue_deleted_while_the_command_runs_ends_it_with_75() {
    for queue in queues("deleted") {
        queue.publish("plum");
        let running = long_command(worker(&queue));
        queue.delete();
        assert_lost(running, "cancelled the consumer");
    }
}

#[test]
fn a_connection_closed_by_an_operator_while_the_command_runs_ends_it_with_75() {
    let broker = private_broker();
    // A separate virtual host, so that no other test's connection is closed.
    let vhost = Vhost::new(&broker, "operator").of("guest");
    let url = broker.url_for("guest", "guest", vhost.name);
    let client = testbed::Client::new(&url);
    let queue = client.queue("operator");
    queue.publish("quince");
    client.disconnect();
    let running = long_command(worker(&queue));
    broker.ctl(&["close_all_connections", "-p", vhost.name, "maintenance"]).unwrap();
    assert_lost(running, "maintenance");
    assert_returned(&queue, "quince");
}
