//! Exit 0 means that the message is acknowledged. A scripted broker tries to break that promise, as a real one can't be
//! made to do these things at the right moment.

use crate::common::qconsume;
use std::time::{Duration, Instant};
use testbed::{
    Method, PATIENCE, Program, eventually, frames,
    peer::{self, Answer, Peer, Request},
};

/// qconsume with the peer's queue; its first message is `lemon`.
fn work_on(peer: &Peer) -> Program {
    qconsume().url(&peer.url()).queue("q").args(["--connect-timeout", "10s"])
}

/// Answers basic.consume and delivers the first message.
fn first_message(request: &Request) -> Answer {
    Answer::Bytes([peer::usual(request), peer::message(request.channel, 1, false, b"lemon")].concat())
}

/// Answers basic.consume, delivers a part of the first message, and ends the connection.
fn half_a_message(request: &Request) -> Answer {
    let message = peer::message(request.channel, 1, false, b"lemon");
    Answer::Last([peer::usual(request), message[..message.len() - 3].to_vec()].concat())
}

/// A peer that delivers one message, and another one before its reply to the barrier, which is the second basic.qos.
fn delivers_before_the_reply(redelivered: bool, body: &'static [u8]) -> Peer {
    Peer::new(move |request| match (request.method, request.nth) {
        (Method::BASIC_CONSUME, _) => first_message(request),
        (Method::BASIC_QOS, 2) => {
            let another = peer::message(request.channel, 2, redelivered, body);
            Answer::Bytes([another, peer::usual(request)].concat())
        }
        _ => Answer::Usual,
    })
}

#[test]
fn a_redelivery_before_the_barriers_reply_is_75() {
    // With --count and --drain the consumer isn't cancelled, so only the same message means that it was requeued.
    for several in [&[][..], &["--count", "2"], &["--drain"]] {
        let peer = delivers_before_the_reply(true, b"lemon");
        let done = work_on(&peer).args(several).args(["--", "true"]).run();
        done.assert_status(75)
            .assert_stderr(
                "delivery lost before the broker got the settlement, another worker may have the message: the broker delivered another message",
            )
            .assert_stderr("outcome=\"lost\" status=75 source=\"qconsume\"");
        assert_eq!(peer.count(Method::BASIC_ACK), 1);
    }
}

#[test]
fn any_delivery_after_the_cancel_is_75() {
    let peer = delivers_before_the_reply(false, b"another");
    work_on(&peer).args(["--", "true"]).run().assert_status(75).assert_stderr("the broker delivered another message");
}

#[test]
fn a_failure_whose_message_is_delivered_again_is_75() {
    let peer = delivers_before_the_reply(true, b"lemon");
    work_on(&peer).shell("exit 3").run().assert_status(75).assert_stderr("the broker delivered another message");
}

#[test]
fn a_delivery_counts_before_the_brokers_cancel_that_follows_it() {
    let peer = Peer::new(|request| match (request.method, request.nth) {
        (Method::BASIC_CONSUME, _) => first_message(request),
        (Method::BASIC_QOS, 2) => {
            let again = peer::message(request.channel, 2, true, b"lemon");
            let cancelled = frames::basic_cancel(request.channel, "qconsume");
            Answer::Bytes([again, cancelled, peer::usual(request)].concat())
        }
        _ => Answer::Usual,
    });
    // A dead letter that isn't confirmed has the command's status; one that is lost has 75.
    let done = work_on(&peer).args(["--reject-on", "3"]).shell("exit 3").run();
    done.assert_status(75).assert_stderr("outcome=\"lost\"");
}

#[test]
fn a_cancelled_consumer_gets_no_next_message() {
    // The reply to the cancel never comes, but a message.
    let peer = Peer::new(|request| match (request.method, request.nth) {
        (Method::BASIC_CANCEL, _) => Answer::Bytes(peer::message(request.channel, 1, false, b"lemon")),
        (Method::BASIC_QOS, 2) => {
            let again = peer::message(request.channel, 2, true, b"lemon");
            Answer::Bytes([again, peer::usual(request)].concat())
        }
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--count", "2", "--wait", "100ms", "--", "true"]).run();
    done.assert_status(75).assert_stderr("the broker delivered another message");
    assert!(!done.stderr.contains("message acknowledged"), "{}", done.stderr);
}

#[test]
fn the_clock_of_lost_connections_starts_at_the_first_loss() {
    // Subscribing takes most of the time that there is.
    let peer = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME => {
            std::thread::sleep(Duration::from_secs(4));
            Answer::Last(peer::usual(request))
        }
        _ => Answer::Usual,
    });
    let done = qconsume().url(&peer.url()).queue("q").args(["--connect-timeout", "6s", "true"]).run();
    done.assert_status(69).assert_stderr("every new connection was lost for 6s (--connect-timeout)");
    assert_eq!(peer.count(Method::BASIC_CONSUME), 3, "{}", done.stderr);
}

#[test]
fn the_next_message_may_come_before_the_barriers_reply() {
    // It may be a redelivery, if another worker failed with it.
    for redelivered in [false, true] {
        let peer = delivers_before_the_reply(redelivered, b"melon");
        let done = work_on(&peer).args(["--count", "2", "--", "cat"]).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "lemonmelon");
        assert_eq!(peer.count(Method::BASIC_ACK), 2);
    }
}

/// RabbitMQ 4.3 may report an acknowledgement timeout tens of milliseconds after the barrier's reply. These are its
/// ways, and others that look alike.
fn after_the_reply(channel: u16) -> [(&'static str, Answer); 5] {
    [
        ("reset", Answer::Last(Vec::new())),
        ("connection.close", Answer::Bytes(frames::connection_close(320, "CONNECTION_FORCED - closed"))),
        ("channel.close", Answer::Bytes(frames::channel_close(channel, 406, "PRECONDITION_FAILED - timed out"))),
        ("another reason", Answer::Bytes(frames::channel_close(channel, 500, "UPSTREAM_ERROR"))),
        (
            "another delivery",
            Answer::Bytes(
                [peer::message(channel, 2, true, b"lemon"), frames::method_frame(channel, Method::BASIC_QOS_OK, &[])]
                    .concat(),
            ),
        ),
    ]
}

#[test]
fn no_reply_to_the_second_barrier_is_75_whatever_the_version() {
    for version in ["4.3.6", "3.1.3"] {
        for case in 0..5 {
            let peer = Peer::new(move |request| match (request.method, request.nth) {
                (Method::PROTOCOL_HEADER, _) => Answer::Bytes(peer::greeting(version)),
                (Method::BASIC_CONSUME, _) => first_message(request),
                (Method::BASIC_QOS, 3) => after_the_reply(request.channel)[case].1.clone(),
                _ => Answer::Usual,
            });
            let what = after_the_reply(1)[case].0;
            let done = work_on(&peer).args(["--ack-timeout", "200ms", "--", "sleep", "0.3"]).run();
            assert_eq!(done.status(), 75, "{version}, {what}: {}", done.stderr);
            assert_eq!(peer.count(Method::BASIC_QOS), 3, "{version}, {what}: {}", done.stderr);
            let is_timeout = done.stderr.contains("acknowledgement not confirmed")
                && done.stderr.contains("acknowledgement timeout: ");
            assert_eq!(is_timeout, what == "channel.close", "{version}, {what}: {}", done.stderr);
        }
    }
}

#[test]
fn a_run_of_five_seconds_is_confirmed_twice_and_a_shorter_one_once() {
    for (seconds, barriers) in [("5", 2), ("0.1", 1)] {
        let peer = Peer::new(|request| match request.method {
            Method::BASIC_CONSUME => first_message(request),
            _ => Answer::Usual,
        });
        work_on(&peer).args(["--", "sleep", seconds]).run().assert_status(0);
        assert_eq!(peer.count(Method::BASIC_QOS), 1 + barriers, "{seconds}");
    }
}

#[test]
fn a_message_that_two_connections_in_succession_have_begun_to_deliver_is_70() {
    let peer = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME => half_a_message(request),
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--", "touch", "/proc/never/run"]).run();
    done.assert_status(70).assert_stderr(
        "two connections were lost while a message from queue \"q\" arrived, and no message arrived in between; the last error: ",
    );
    assert_eq!(peer.count(Method::PROTOCOL_HEADER), 2, "{}", done.stderr);

    // If it happens only once, it is just a lost connection.
    let peer = Peer::new(move |request| match (request.method, request.connection) {
        (Method::BASIC_CONSUME, 1) => half_a_message(request),
        (Method::BASIC_CONSUME, _) => first_message(request),
        _ => Answer::Usual,
    });
    work_on(&peer).args(["--", "true"]).run().assert_status(0);
}

#[test]
fn a_creation_that_is_refused_is_tried_once_more_and_then_78() {
    let peer = Peer::new(|request| match request.method {
        Method::QUEUE_DECLARE => {
            // The arguments are a reserved number, the name, and the flags, of which `passive` is the first.
            let passive = request.arguments[3 + usize::from(request.arguments[2])] & 1 == 1;
            let (code, text) = match passive {
                true => (404, "NOT_FOUND - no queue 'q' in vhost '/'"),
                false => (406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q'"),
            };
            Answer::Bytes(frames::channel_close(request.channel, code, text))
        }
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["-d", "--", "true"]).run();
    done.assert_status(78).assert_stderr("inequivalent arg 'durable'");
    assert_eq!(peer.count(Method::PROTOCOL_HEADER), 3, "{}", done.stderr);
}

#[test]
fn a_subscription_that_is_never_answered_ends_with_a_goodbye() {
    let silent = || {
        Peer::new(|request| match request.method {
            Method::BASIC_CONSUME => Answer::Bytes(Vec::new()),
            _ => Answer::Usual,
        })
    };
    let peer = silent();
    let done = qconsume().url(&peer.url()).queue("q").args(["--connect-timeout", "1s", "true"]).run();
    done.assert_status(69).assert_stderr("no answer while subscribing to queue \"q\"");
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", done.stderr);

    let peer = silent();
    let running = work_on(&peer).args(["true"]).spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_CONSUME) == 1));
    running.signal(testbed::Signal::SIGTERM);
    let done = running.finish(PATIENCE);
    done.assert_status(143).assert_stderr("before a command was started; the release is not confirmed");
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", done.stderr);
}

#[test]
fn a_queue_that_does_not_say_how_full_it_is_may_still_deliver() {
    // The peer doesn't answer the first queue.declare, and delivers a message instead of answering the second one.
    let peer = Peer::new(|request| match (request.method, request.nth) {
        (Method::QUEUE_DECLARE, 1) => Answer::Bytes(Vec::new()),
        (Method::QUEUE_DECLARE, 2) => Answer::Bytes(peer::message(request.channel, 1, false, b"lemon")),
        _ => Answer::Usual,
    });
    let running = work_on(&peer).args(["--drain", "--", "cat"]).spawn();
    running.wait_for_stdout("lemon", PATIENCE);
    running.signal(testbed::Signal::SIGTERM);
    running.finish(PATIENCE);
}

#[test]
fn a_channel_that_the_broker_does_not_close_holds_up_no_subscription_and_no_signal() {
    // The second consumer is on the same connection, after the first one's channel is closed.
    let silent = || {
        Peer::new(|request| match request.method {
            Method::BASIC_CONSUME => first_message(request),
            Method::CHANNEL_CLOSE => Answer::Bytes(Vec::new()),
            _ => Answer::Usual,
        })
    };
    let several = ["--count", "2", "--max-attempts", "2", "--keep-going"];
    let peer = silent();
    let begun = Instant::now();
    let done =
        qconsume().url(&peer.url()).queue("q").args(["--connect-timeout", "1s"]).args(several).shell("exit 3").run();
    done.assert_status(69).assert_stderr("no answer while subscribing to queue \"q\"");
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", done.stderr);

    let peer = silent();
    let running = qconsume().url(&peer.url()).queue("q").args(several).shell("exit 3").spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::CHANNEL_CLOSE) == 1));
    running.signal(testbed::Signal::SIGTERM);
    let done = running.finish(PATIENCE);
    done.assert_status(143);
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", done.stderr);
}

#[test]
fn a_refusal_between_two_broken_deliveries_changes_nothing() {
    // Like a broker that the message crashes each time, and whose queues aren't up yet when it accepts connections
    // again.
    let peer = Peer::new(|request| match (request.method, request.connection % 2) {
        (Method::BASIC_CONSUME, 1) => half_a_message(request),
        (Method::BASIC_CONSUME, _) => {
            let down = "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor";
            Answer::Bytes(frames::channel_close(request.channel, 404, down))
        }
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--", "true"]).run();
    done.assert_status(70).assert_stderr("two connections were lost while a message");
    assert_eq!(peer.count(Method::PROTOCOL_HEADER), 3, "{}", done.stderr);
}

/// queue.declare-ok: no ready messages, and one consumer.
fn empty(request: &Request) -> Answer {
    let name = &request.arguments[2..3 + usize::from(request.arguments[2])];
    let counts = [0, 0, 0, 0, 0, 0, 0, 1];
    Answer::Bytes(frames::method_frame(request.channel, Method::QUEUE_DECLARE_OK, &[name, &counts].concat()))
}

#[test]
fn a_queue_that_looks_empty_when_a_delivery_was_lost_is_not_drained() {
    // The broker may not have noticed the first connection's end, and still hold the message for it.
    let peer = Peer::new(|request| match (request.method, request.connection) {
        (Method::BASIC_CONSUME, 1) => half_a_message(request),
        (Method::QUEUE_DECLARE, _) => empty(request),
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--drain", "--", "true"]).run();
    done.assert_status(75);
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", done.stderr);
}

#[test]
fn a_message_that_comes_instead_of_the_reply_to_the_cancel_is_run() {
    for until in [&["--drain"][..], &["--wait", "100ms"]] {
        let peer = Peer::new(|request| match (request.method, request.nth) {
            (Method::QUEUE_DECLARE, _) => empty(request),
            (Method::BASIC_CANCEL, 1) => Answer::Bytes(peer::message(request.channel, 1, false, b"lemon")),
            _ => Answer::Usual,
        });
        // With --drain, the next consumer finds the queue empty.
        let done = work_on(&peer).args(until).args(["--", "cat"]).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "lemon");
        assert_eq!(peer.count(Method::BASIC_ACK), 1);
    }
}

#[test]
fn a_message_whose_body_takes_longer_than_the_cancel_is_run() {
    // The reply to the cancel comes after the body.
    let parts = |channel| {
        let message = peer::message(channel, 1, false, b"lemon");
        let body = frames::frame(3, channel, b"lemon");
        (message[..message.len() - body.len()].to_vec(), body)
    };
    let peer = Peer::new(move |request| match (request.method, request.nth) {
        (Method::CONNECTION_START_OK, _) => Answer::Bytes(peer::tune(2)),
        (Method::BASIC_CONSUME, _) => Answer::Bytes([peer::usual(request), parts(request.channel).0].concat()),
        (Method::BASIC_CANCEL, 1) => Answer::Bytes(Vec::new()),
        (Method::HEARTBEAT, 5) => {
            let reply = frames::method_frame(1, Method::BASIC_CANCEL_OK, b"\x08qconsume");
            Answer::Bytes([parts(1).1, reply].concat())
        }
        (Method::HEARTBEAT, _) => Answer::Bytes(frames::frame(8, 0, &[])),
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--wait", "100ms", "--", "cat"]).run();
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "lemon");
}

#[test]
fn the_time_in_which_the_body_arrives_counts_towards_the_second_barrier() {
    let whole = |channel| peer::message(channel, 1, false, b"lemon");
    let peer = Peer::new(move |request| match (request.method, request.nth) {
        (Method::CONNECTION_START_OK, _) => Answer::Bytes(peer::tune(2)),
        (Method::BASIC_CONSUME, _) => {
            let message = whole(request.channel);
            Answer::Bytes([peer::usual(request), message[..message.len() - 3].to_vec()].concat())
        }
        (Method::HEARTBEAT, 2) => {
            let message = whole(1);
            Answer::Bytes(message[message.len() - 3..].to_vec())
        }
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--ack-timeout", "1s", "--", "true"]).run();
    done.assert_status(0);
    assert_eq!(peer.count(Method::BASIC_QOS), 3, "{}", done.stderr);
}

#[test]
fn a_loss_is_noticed_when_the_message_came_after_the_end_of_the_wait() {
    let peer = Peer::new(|request| match (request.method, request.nth) {
        (Method::CONNECTION_START_OK, _) => Answer::Bytes(peer::tune(2)),
        (Method::BASIC_CANCEL, 1) => {
            let message = peer::message(request.channel, 1, false, b"lemon");
            Answer::Bytes([message, peer::usual(request)].concat())
        }
        (Method::HEARTBEAT, 2) => Answer::Bytes(frames::channel_close(
            1,
            406,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out",
        )),
        _ => Answer::Usual,
    });
    let begun = Instant::now();
    let done = work_on(&peer).args(["--wait", "100ms", "--", "sleep", "100"]).run();
    done.assert_status(75).assert_stderr("delivery lost while the command ran");
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

#[test]
fn what_arrives_on_a_connection_that_is_lost_before_the_cancel_is_confirmed_was_not_taken() {
    let peer = Peer::new(|request| match (request.method, request.connection, request.nth) {
        (Method::QUEUE_DECLARE, 1, _) => {
            let message = peer::message(request.channel, 1, false, b"lemon");
            Answer::Bytes([message, peer::declared(request, 0, 1)].concat())
        }
        (Method::BASIC_CANCEL, 1, _) => Answer::Bytes(frames::connection_close(320, "CONNECTION_FORCED - shutdown")),
        (Method::BASIC_CONSUME, 2, 1) => first_message(request),
        (Method::QUEUE_DECLARE, ..) => Answer::Bytes(peer::declared(request, 0, 1)),
        _ => Answer::Usual,
    });
    let done = work_on(&peer).args(["--drain", "--", "cat"]).run();
    done.assert_status(0).assert_stderr("connecting again");
    assert_eq!(done.stdout_text(), "lemon");
}
