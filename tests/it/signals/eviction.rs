//! Stop signals while the command runs.

use super::*;
use testbed::{docker_works, eventually, image_present, missing};

/// An image whose queues count failures, but not evictions.
const COUNTING: &str = "rabbitmq:4.3-management";

#[test]
fn a_command_that_ends_on_the_signal_is_evicted_and_its_message_released() {
    for kind in QueueKind::ALL {
        for (signal, status) in
            [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129), (Signal::SIGQUIT, 131)]
        {
            let (queue, proxy) = one_message("evicted", kind);
            // SIGQUIT would leave a core file.
            let running = running(behind(&proxy, &queue).shell(&format!("ulimit -c 0; {WAITS}")));
            stop(&running, signal)
                .assert_status(status)
                .assert_stderr(&format!("command was killed by {signal}"))
                .assert_stderr("message released");
            assert_settled(&proxy, Method::BASIC_NACK);
            assert_back(&queue);
        }
    }
}

#[test]
fn a_command_that_exits_with_a_status_on_the_signal_is_evicted_with_that_status() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("evicted-status", kind);
        let script = "trap 'exit 7' TERM; echo running; sleep 1000 & wait";
        let running = running(behind(&proxy, &queue).shell(script));
        stop(&running, Signal::SIGTERM).assert_status(7);
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}

#[test]
fn a_command_that_succeeds_after_the_signal_is_acked() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("evicted-success", kind);
        let script = "trap 'exit 0' TERM; echo running; sleep 1000 & wait";
        // A forked child that hasn't executed sleep yet can miss the signal to the group; then it is left behind.
        let worker = behind(&proxy, &queue).args(["--kill-after", "1s"]);
        let running = running(worker.shell(script));
        stop(&running, Signal::SIGTERM).assert_status(0);
        assert_settled(&proxy, Method::BASIC_ACK);
        assert_gone(&queue);
    }
}

#[test]
fn an_eviction_is_released_whatever_the_options_say_about_failures() {
    let (queue, proxy) = one_message("evicted-options", QueueKind::Quorum);
    let running = running(
        behind(&proxy, &queue)
            .args(["--reject-on", "143", "--max-attempts", "1", "--reject-exit-code", "0"])
            .shell(WAITS),
    );
    stop(&running, Signal::SIGTERM).assert_status(143);
    assert_settled(&proxy, Method::BASIC_NACK);
    assert_back(&queue);
}

#[test]
fn every_signal_is_passed_on_and_without_grace_only_the_platform_kills() {
    let (queue, proxy) = one_message("deaf", QueueKind::Classic);
    let script = "trap 'echo got TERM' TERM; trap 'echo got INT' INT; echo running
        while :; do sleep 0.05; done";
    // --kill-after doesn't apply to a signal from outside.
    let running = running(behind(&proxy, &queue).args(["--kill-after", "0s"]).shell(script));
    for (signal, text) in [(Signal::SIGTERM, "got TERM"), (Signal::SIGINT, "got INT")] {
        running.signal(signal);
        running.wait_for_stdout(text, PATIENCE);
    }
    assert!(!running.has_ended());
    // The platform's SIGKILL.
    stop(&running, Signal::SIGKILL).assert_status(137);
    assert_back(&queue);
}

#[test]
fn a_second_message_is_not_taken_after_the_signal() {
    for (script, status) in [
        // The message is done, but the run isn't, so it isn't a success.
        ("trap 'exit 0' TERM; echo running; sleep 1000 & wait", 143),
        ("trap 'exit 9' TERM; echo running; sleep 1000 & wait", 9),
    ] {
        let (queue, proxy) = one_message("evicted-count", QueueKind::Classic);
        queue.publish("another message");
        let running = running(behind(&proxy, &queue).args(["--count", "0", "--kill-after", "1s"]).shell(script));
        stop(&running, Signal::SIGTERM).assert_status(status);
        assert_eq!(proxy.count(Direction::ToClient, Method::BASIC_DELIVER), 1);
        queue.wait_ready(if status == 9 { 2 } else { 1 });
    }
}

#[test]
fn a_failure_raises_the_delivery_count_and_an_eviction_does_not() {
    let own;
    let broker = if Broker::shared().version() >= (4, 3, 0) {
        Broker::shared()
    } else {
        // In CI the image may be pulled.
        let fetch = std::env::var("CI").as_deref() == Ok("true") && docker_works();
        if !fetch && !image_present(COUNTING) {
            return missing(COUNTING);
        }
        own = Broker::options().image(COUNTING).start();
        own.as_ref().unwrap_or_else(|error| panic!("{error:#}"))
    };
    let queue = broker.declare("counted").quorum().create();
    queue.publish("the message");
    let worker = || worker(&queue);
    let peek = || {
        let mut got = None;
        eventually(PATIENCE, || {
            got = queue.peek();
            got.is_some()
        });
        got.expect("the message was requeued")
    };

    for _ in 0..2 {
        stop(&running(worker().shell(WAITS)), Signal::SIGTERM).assert_status(143);
    }
    let got = peek();
    assert_eq!(got.delivery_count(), None, "the eviction was counted");
    assert_eq!(got.acquired_count(), Some(2));

    worker().shell("exit 3").run().assert_status(3);
    let got = peek();
    assert_eq!(got.delivery_count(), Some(1), "the failure wasn't counted");
}
