//! Time limits, lost deliveries, and signals that are only forwarded.

use super::*;

/// Runs the script into its time limit; tries longer limits if the command didn't get to print `running`.
#[track_caller]
fn over_limit((name, kind): (&str, QueueKind), options: &[&str], script: &str) -> (Queue, Proxy, Running, Duration) {
    for limit in [300, 2_000, 10_000].map(Duration::from_millis) {
        let (queue, proxy) = one_message(name, kind);
        let worker = behind(&proxy, &queue).args(["--timeout", &format!("{limit:?}")]);
        let running = worker.args(options).shell(script).spawn();
        if running.finish(PATIENCE).stdout.starts_with(b"running\n") {
            return (queue, proxy, running, limit);
        }
    }
    panic!("the command was ended before it printed anything");
}

#[test]
fn a_command_over_its_time_limit_is_terminated_and_counts_as_a_failure() {
    for kind in QueueKind::ALL {
        for script in [
            "echo running; exec sleep 1000",
            // It succeeds, but only after the limit.
            "trap 'exit 0' TERM; echo running; sleep 1000 & wait",
            // A stopped process sees no signal until it is continued.
            "echo running; kill -STOP $$; exec sleep 1000",
        ] {
            let (queue, proxy, running, limit) = over_limit(("limit", kind), &[], script);
            let finished = running.finish(PROMPT);
            finished.assert_status(124).assert_stderr("--timeout");
            assert!(finished.wall >= limit);
            running.wait_no_leftovers(PROMPT);
            assert_settled(&proxy, Method::BASIC_REJECT);
            assert_back(&queue);
        }
    }
}

#[test]
fn a_command_that_ignores_the_time_limit_is_killed_with_its_group() {
    let (queue, proxy, running, limit) = over_limit(
        ("limit-deaf", QueueKind::Classic),
        &["--kill-after", "300ms"],
        "trap '' TERM; echo running; sleep 1000 & sleep 1000",
    );
    let finished = running.finish(PROMPT);
    finished.assert_status(124).assert_stderr("SIGKILL");
    assert!(finished.wall >= limit + Duration::from_millis(300));
    running.wait_no_leftovers(PROMPT);
    assert_settled(&proxy, Method::BASIC_REJECT);
    assert_back(&queue);
}

#[test]
fn a_time_limit_dead_letters_if_its_status_is_in_reject_on() {
    let broker = Broker::shared();
    let dead = broker.queue("limit-dead");
    let queue = broker.declare("limit-reject").dead_letter_to(&dead).create();
    queue.publish("the message");
    worker(&queue).args(["--timeout", "200ms", "--reject-on", "124"]).shell("exec sleep 1000").run().assert_status(124);
    assert_back(&dead);
    assert_gone(&queue);
}

#[test]
fn the_first_of_a_signal_and_the_time_limit_decides() {
    // The signal comes first: an eviction, although the time limit ends the command.
    let (queue, proxy) = one_message("signal-first", QueueKind::Classic);
    let script = "trap 'echo got TERM' TERM; kill -TERM $PPID; while :; do sleep 0.05; done";
    let running = behind(&proxy, &queue).args(["--timeout", "5s", "--kill-after", "0s"]).shell(script).spawn();
    let finished = running.finish(PATIENCE);
    finished.assert_status(137);
    assert!(finished.stdout.starts_with(b"got TERM\n"));
    running.wait_no_leftovers(PROMPT);
    assert_settled(&proxy, Method::BASIC_NACK);
    assert_back(&queue);

    // The limit comes first: a failure, although a signal follows.
    let (queue, proxy) = one_message("limit-first", QueueKind::Classic);
    let running = behind(&proxy, &queue)
        .args(["--timeout", "5s", "--kill-after", "600s"])
        .shell("n=0; trap 'n=$((n+1)); echo got $n' TERM; while [ $n -lt 2 ]; do sleep 0.05; done; exit 5")
        .spawn();
    running.wait_for_stdout("got 1", PATIENCE);
    stop(&running, Signal::SIGTERM).assert_status(124);
    assert_settled(&proxy, Method::BASIC_REJECT);
    assert_back(&queue);
}

#[test]
fn grace_kills_a_command_that_ignores_the_signal() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("grace", kind);
        let running = running(
            behind(&proxy, &queue)
                .args(["--grace", "300ms"])
                .shell("trap '' TERM; echo running; sleep 1000 & sleep 1000"),
        );
        let told = Instant::now();
        stop(&running, Signal::SIGTERM).assert_status(137).assert_stderr("message released");
        assert!(told.elapsed() >= Duration::from_millis(300));
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}

#[test]
fn a_lost_delivery_terminates_the_command() {
    for kind in QueueKind::ALL {
        for script in [
            "trap 'echo terminated; exit 0' TERM; echo running; sleep 1000 & wait",
            "trap 'echo terminated' TERM; echo running; while :; do sleep 0.05; done",
        ] {
            let (queue, proxy) = one_message("lost", kind);
            let running = running(behind(&proxy, &queue).args(["--kill-after", "5s"]).shell(script));
            proxy.cut();
            let finished = running.finish(PATIENCE);
            finished.assert_status(75).assert_stderr("delivery lost");
            assert_eq!(finished.stdout_text(), "running\nterminated\n");
            running.wait_no_leftovers(PROMPT);
            assert_back(&queue);
        }
    }
}

#[test]
fn with_on_lost_finish_a_lost_delivery_lets_the_command_finish() {
    let (queue, proxy) = one_message("lost-finish", QueueKind::Quorum);
    let finish = testbed::owner::temp_folder("lost-finish").join("finish");
    let running = running(
        behind(&proxy, &queue)
            .args(["--on-lost", "finish"])
            .env("FINISH", &finish)
            .shell("echo running; while [ ! -e $FINISH ]; do sleep 0.02; done; echo finished"),
    );
    proxy.cut();
    running.wait_for_stderr("letting the command finish", PATIENCE);
    std::fs::write(&finish, "").unwrap();
    let finished = running.finish(PROMPT);
    finished.assert_status(75);
    assert_eq!(finished.stdout_text(), "running\nfinished\n");
    assert_back(&queue);
}

#[test]
fn a_signal_still_reaches_a_command_whose_delivery_is_lost() {
    let (queue, proxy) = one_message("lost-signal", QueueKind::Classic);
    let running = running(behind(&proxy, &queue).args(["--on-lost", "finish"]).shell(WAITS));
    proxy.cut();
    running.wait_for_stderr("letting the command finish", PATIENCE);
    stop(&running, Signal::SIGTERM).assert_status(75);
    assert_back(&queue);
}

#[test]
fn user_signals_go_to_the_command_alone_and_end_nothing() {
    for (signal, name) in [(Signal::SIGUSR1, "USR1"), (Signal::SIGUSR2, "USR2"), (Signal::SIGWINCH, "WINCH")] {
        let (queue, proxy) = one_message("user-signal", QueueKind::Classic);
        // If the child got the signal, too, it would have time to say so.
        let script = format!(
            "trap 'got=1; echo got it' {name}
            sh -c 'trap \"echo child got it\" {name}; echo running; while :; do sleep 0.02; done' & child=$!
            while [ ! $got ]; do sleep 0.02; done; sleep 0.2; kill -0 $child && echo child is there"
        );
        let worker = behind(&proxy, &queue).args(["--kill-after", "100ms"]);
        let running = running(worker.shell(&script));
        running.signal(signal);
        let finished = running.finish(PROMPT);
        finished.assert_status(0);
        assert_eq!(finished.stdout_text(), "running\ngot it\nchild is there\n");
        assert_settled(&proxy, Method::BASIC_ACK);
        assert_gone(&queue);
    }
}

#[test]
fn user_signals_end_nothing_while_there_is_no_command() {
    let broker = Broker::shared();
    let queue = broker.queue("user-signal-idle");
    let running = worker(&queue).shell("exit 4").spawn();
    queue.wait_consumers(1);
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH] {
        // A signal that is still pending when the command starts would be forwarded to it.
        signal_and_wait(&running, signal);
    }
    queue.publish("the message");
    running.wait(PATIENCE).assert_status(4);
    assert_back(&queue);
}
