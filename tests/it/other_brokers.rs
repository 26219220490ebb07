//! What LavinMQ and amqproxy answer, played by a scripted peer: their texts, as seen on the wire, and what they mean.

use crate::common::{qconsume, qpublish};
use testbed::{
    Method, PATIENCE, Program, frames,
    peer::{self, Answer, Peer, Request},
};

fn worker(peer: &Peer) -> Program {
    qconsume().url(&peer.url()).queue("x")
}

/// qpublish with one message to the queue.
fn publisher(peer: &Peer) -> Program {
    qpublish().url(&peer.url()).args(["-q", "x", "-b", "apple"])
}

/// The usual answer to basic.consume, and a message.
fn with_a_message(request: &Request) -> Answer {
    let channel = request.channel;
    let bytes = [
        peer::usual(request),
        peer::deliver(channel, 1, b"x"),
        peer::content_header(channel, 5, &[0, 0]),
        frames::frame(3, channel, b"lemon"),
    ];
    Answer::Bytes(bytes.concat())
}

/// Closes the channel at this method, each time.
fn refuses(at: Method, code: u16, text: &'static str) -> Peer {
    Peer::new(move |request| match request.method {
        method if method == at => Answer::Bytes(frames::channel_close(request.channel, code, text)),
        _ => Answer::Usual,
    })
}

#[test]
fn lavinmqs_missing_queue_is_declared() {
    let peer = Peer::new(|request| match request.method {
        Method::QUEUE_DECLARE => {
            // Behind two reserved bytes and the name come the flags, the passive one first.
            let name = usize::from(request.arguments[2]);
            if request.arguments[3 + name] & 1 == 1 {
                let text = "NOT_FOUND - Queue 'x' doesn't exist";
                return Answer::Bytes(frames::channel_close(request.channel, 404, text));
            }
            Answer::Usual
        }
        Method::BASIC_CONSUME => with_a_message(request),
        _ => Answer::Usual,
    });
    let done = worker(&peer).args(["--declare", "cat"]).run();
    done.assert_status(0).assert_stderr("declared queue \"x\"");
    assert_eq!(done.stdout, b"lemon");
    assert_eq!(peer.count(Method::QUEUE_DECLARE), 2);
}

#[test]
fn lavinmqs_low_disk_space_may_pass() {
    const TEXT: &str = "PRECONDITION_FAILED - Server low on disk space";
    let options = ["--declare", "--connect-timeout", "10s"];
    let [peer, publishers] = [(); 2].map(|()| refuses(Method::QUEUE_DECLARE, 406, TEXT));
    let declares = worker(&peer).args(options).arg("cat").spawn();
    let publishes = publisher(&publishers).args(options).spawn();
    let done = declares.wait(PATIENCE);
    done.assert_status(69).assert_stderr("trying again").assert_stderr("Server low on disk space");
    assert!(peer.count(Method::QUEUE_DECLARE) > 1);
    let done = publishes.wait(PATIENCE);
    assert!(matches!(done.status(), 69 | 75), "{done:?}");
    done.assert_stderr("Server low on disk space");

    let peer = refuses(Method::BODY, 406, TEXT);
    let done = publisher(&peer).run();
    done.assert_status(75).assert_stderr("Server low on disk space");
}

#[test]
fn lavinmqs_streams_are_refused() {
    let peer = refuses(Method::BASIC_CONSUME, 406, "PRECONDITION_FAILED - x-priority not supported on stream queues");
    let done = worker(&peer).args(["--drain", "cat"]).run();
    done.assert_status(78).assert_stderr("queue \"x\" is a stream, which keeps its messages");
    assert_eq!(peer.count(Method::BASIC_CONSUME), 1);
}

#[test]
fn an_unknown_reply_code_keeps_its_text() {
    for code in [500, 0] {
        let refusing = refuses(Method::BASIC_CONSUME, code, "UPSTREAM_ERROR: it is gone");
        let program = worker(&refusing).args(["--connect-timeout", "10s", "cat"]);
        let refused = program.spawn();

        // As the connection's end while the command runs, too.
        let peer = Peer::new(move |request| match request.method {
            Method::BASIC_CONSUME => {
                let Answer::Bytes(mut bytes) = with_a_message(request) else {
                    unreachable!("it has bytes");
                };
                bytes.extend(frames::connection_close(code, "Upstream is gone"));
                Answer::Bytes(bytes)
            }
            _ => Answer::Usual,
        });
        let done = worker(&peer).shell("sleep 30").run();
        done.assert_status(75).assert_stderr("Upstream is gone");

        let done = refused.wait(PATIENCE);
        done.assert_status(69).assert_stderr("UPSTREAM_ERROR: it is gone");
    }
}

#[test]
fn amqproxys_heartbeat_of_zero_is_none() {
    let peer = Peer::new(|request| match request.method {
        Method::CONNECTION_START_OK => Answer::Bytes(peer::tune(0)),
        Method::BASIC_CONSUME => with_a_message(request),
        _ => Answer::Usual,
    });
    // The peer is silent while the command runs: an interval of a second would have passed long before its end.
    let url = format!("{}?heartbeat=1", peer.url());
    let done = worker(&peer).url(&url).shell("sleep 4; exec cat").run();
    done.assert_status(0);
    assert_eq!(done.stdout, b"lemon");
    assert_eq!(peer.count(Method::HEARTBEAT), 0);
    let seen = peer.seen();
    let mut tunes = seen.iter().filter(|seen| seen.method == Method::CONNECTION_TUNE_OK);
    assert_eq!(tunes.next_back().unwrap().arguments[6..], [0, 0]);
}

#[test]
fn amqproxys_refusal_at_channel_open_is_77_with_its_text() {
    const TEXT: &str = "ACCESS_REFUSED - vhost 'x' not found or access refused";
    let peers = [
        refuses(Method::CHANNEL_OPEN, 403, TEXT),
        Peer::new(|request| match request.method {
            Method::CHANNEL_OPEN => Answer::Bytes(frames::connection_close(403, TEXT)),
            _ => Answer::Usual,
        }),
    ];
    for peer in peers {
        let program = worker(&peer).args(["--connect-timeout", "20s", "cat"]);
        program.run().assert_status(77).assert_stderr(TEXT);
        assert_eq!(peer.count(Method::CHANNEL_OPEN), 1);
    }
}

#[test]
fn what_lavinmq_returns_and_nacks_is_refused_and_what_it_acks_came_back() {
    for (method, status, says) in [(Method::BASIC_NACK, 75, "was refused"), (Method::BASIC_ACK, 78, "came back")] {
        let peer = Peer::new(move |request| match request.method {
            Method::BODY => {
                let settled = peer::settle(request, method);
                Answer::Bytes([peer::returned(request.channel), settled].concat())
            }
            _ => Answer::Usual,
        });
        let done = publisher(&peer).run();
        done.assert_status(status).assert_stderr(says);
        let other = if status == 75 { "came back" } else { "was refused" };
        assert!(!done.stderr.contains(other), "{}", done.stderr);
    }
}

#[test]
fn a_message_that_comes_back_before_another_is_refused_is_not_taken_for_a_confirmed_one() {
    // It returns the first line, refuses the second, and then confirms that it has dealt with the first.
    let peer = Peer::new(|request| match (request.method, request.nth) {
        (Method::BODY, 1) => Answer::Bytes(Vec::new()),
        (Method::BODY, _) => {
            let first = Request { nth: 1, ..request.clone() };
            let (refused, confirmed) =
                (peer::settle(request, Method::BASIC_NACK), peer::settle(&first, Method::BASIC_ACK));
            Answer::Bytes([peer::returned(request.channel), refused, confirmed].concat())
        }
        _ => Answer::Usual,
    });
    let lines = qpublish().url(&peer.url()).args(["-q", "x", "--lines"]).stdin("apple\nbanana\n");
    lines
        .run()
        .assert_status(75)
        .assert_stderr("error: line 1 or a later one, up to line 2, was refused")
        .assert_stderr("confirmed: 0 of 2 messages sent, 0 from the start without a gap; to resume, begin with line 1");
}
