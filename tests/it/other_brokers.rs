//! What LavinMQ and amqproxy answer where RabbitMQ answers something else; the texts are as they were seen on the wire.

use crate::common::qconsume;
use testbed::{Answer, Call, Method, PATIENCE, Peer, Program, frames, peer};

fn worker(peer: &Peer) -> Program {
    qconsume()
        .url(&peer.url())
        .queue("x")
        .args(["--connect-timeout", "1s"])
}

/// Whether a queue.declare asks only; otherwise it declares.
fn is_passive(declare: &Call) -> bool {
    let name = declare.arguments.get(2).copied().unwrap_or_default() as usize;
    let flags = declare.arguments.get(3 + name);
    flags.is_some_and(|flags| flags & 1 == 1)
}

fn refuses_to_consume(code: u16, text: &'static str) -> Peer {
    Peer::start(move |call| match call.method {
        Method::BASIC_CONSUME => Answer::Bytes(frames::channel_close(call.channel, code, text)),
        _ => Answer::Usual,
    })
}

#[test]
fn declare_declares_where_lavinmq_says_that_there_is_no_queue() {
    let declared = std::sync::atomic::AtomicBool::new(false);
    let missing = |call: &Call| {
        Answer::Bytes(frames::channel_close(
            call.channel,
            404,
            "Queue 'x' doesn't exist",
        ))
    };
    let peer = Peer::start(move |call| {
        use std::sync::atomic::Ordering::SeqCst;
        match call.method {
            Method::QUEUE_DECLARE if is_passive(call) && !declared.load(SeqCst) => missing(call),
            Method::QUEUE_DECLARE => {
                declared.store(true, SeqCst);
                Answer::Usual
            }
            Method::BASIC_CONSUME if !declared.load(SeqCst) => missing(call),
            _ => Answer::Usual,
        }
    });
    let done = worker(&peer)
        .args(["--wait", "500ms", "--declare", "cat"])
        .run();
    done.assert_status(66);
    let calls = peer.calls();
    let declares = |call: &&Call| call.method == Method::QUEUE_DECLARE && !is_passive(call);
    assert!(calls.iter().any(|call| declares(&call)), "{}", done.stderr);
}

#[test]
fn a_queue_that_lavinmq_does_not_have_is_78() {
    let peer = refuses_to_consume(404, "Queue 'x' doesn't exist");
    worker(&peer).arg("cat").run().assert_status(78);
}

#[test]
fn a_disk_that_is_nearly_full_is_named_as_lavinmq_does() {
    let text = "PRECONDITION_FAILED - Server low on disk space";
    let done = worker(&refuses_to_consume(406, text)).arg("cat").run();
    done.assert_stderr("low on disk space");
    assert_ne!(done.status(), 0);
}

#[test]
fn a_close_with_an_unknown_code_keeps_its_text() {
    for code in [500, 0, 999] {
        let peer = Peer::start(move |call| match call.method {
            Method::BASIC_CONSUME => Answer::Last(frames::connection_close(code, "UPSTREAM_ERROR")),
            _ => Answer::Usual,
        });
        let done = worker(&peer).arg("cat").run();
        done.assert_stderr("UPSTREAM_ERROR");
        assert_ne!(done.status(), 0, "code {code}");
    }
}

#[test]
fn a_virtual_host_that_is_refused_with_the_channel_keeps_its_text() {
    let text = "ACCESS_REFUSED - vhost not found";
    let peer = Peer::start(move |call| match call.method {
        Method::CHANNEL_OPEN => Answer::Last(frames::connection_close(403, text)),
        _ => Answer::Usual,
    });
    worker(&peer)
        .arg("cat")
        .run()
        .assert_status(77)
        .assert_stderr("vhost not found");
}

#[test]
fn where_amqproxy_wants_no_heartbeats_none_is_sent() {
    let peer = Peer::start(|call| match call.method {
        Method::CONNECTION_START_OK => Answer::Bytes(peer::tune(0)),
        _ => Answer::Usual,
    });
    let done = worker(&peer)
        .args(["--wait", "3s", "--heartbeat", "1", "cat"])
        .spawn()
        .wait(PATIENCE);
    done.assert_status(66);
    let calls = peer.calls();
    let tune_ok = calls
        .iter()
        .find(|call| call.method == Method::CONNECTION_TUNE_OK);
    assert_eq!(tune_ok.expect("a handshake").arguments[6..], [0, 0]);
    // With one a second, the client would have sent some and missed the peer's.
    assert_eq!(peer.count(Method::HEARTBEAT), 0);
    assert_eq!(peer.count(Method::CONNECTION_START_OK), 1);
}
