//! What LavinMQ, amqproxy, Qpid Broker-J and GarageMQ answer, played by a scripted peer: their texts, as seen on the wire, and
//! what they mean.

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
    const TEXT: &str = "PRECONDITION_FAILED - Server low on disk space, can not create queue";
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

/// qconsume and qpublish declare a queue, and the broker closes the channel.
#[track_caller]
fn declaring(code: u16, text: &'static str, status: i32, says: &str) {
    let peer = refuses(Method::QUEUE_DECLARE, code, text);
    for program in [worker(&peer).args(["--declare", "cat"]), publisher(&peer).arg("--declare")] {
        program.run().assert_status(status).assert_stderr(text).assert_stderr(says);
    }
}

#[test]
fn what_lavinmq_declares_under_no_condition_is_78() {
    declaring(
        403,
        "ACCESS_REFUSED - queue limit in vhost 'lim' (1) is reached",
        78,
        "raise the limit, or delete queues",
    );
    declaring(406, "PRECONDITION_FAILED - Queue name isn't valid", 78, "choose another name");
    let reserved = "ACCESS_REFUSED - Prefix [\"amq.\"] forbidden, please choose another name";
    declaring(403, reserved, 78, "names that begin with amq. are the broker's own");
}

#[test]
fn garagemqs_missing_queue_may_be_declared_yet() {
    let peer = refuses(Method::BASIC_CONSUME, 404, "queue 'x' not found");
    let done = worker(&peer).args(["--connect-timeout", "6s", "cat"]).run();
    done.assert_status(78).assert_stderr("there is no queue \"x\" to consume from").assert_stderr("trying again");
    assert!(peer.count(Method::BASIC_CONSUME) > 1);
}

/// Closes the connection at this method, each time.
fn closes(at: Method, code: u16, text: &'static str) -> Peer {
    Peer::new(move |request| match request.method {
        method if method == at => Answer::Bytes(frames::connection_close(code, text)),
        _ => Answer::Usual,
    })
}

#[test]
fn a_login_that_is_refused_is_told_as_such_by_any_broker_and_at_any_time() {
    const RABBITMQ: &str =
        "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.";
    for peer in [
        // Broker-J, GarageMQ; RabbitMQ behind amqproxy.
        closes(Method::CONNECTION_START_OK, 530, "Authentication failed"),
        closes(Method::CONNECTION_START_OK, 530, "login failure"),
        closes(Method::CHANNEL_OPEN, 403, RABBITMQ),
        closes(Method::BASIC_CONSUME, 403, RABBITMQ),
    ] {
        let done = worker(&peer).args(["--connect-timeout", "20s", "cat"]).run();
        done.assert_status(77)
            .assert_stderr("refused the login of user \"guest\"")
            .assert_stderr("check the user and the password");
        assert!(!done.stderr.contains("set_permissions"), "{}", done.stderr);
    }
    let peer = closes(Method::CHANNEL_OPEN, 403, RABBITMQ);
    publisher(&peer).run().assert_status(77).assert_stderr("check the user and the password");
}

#[test]
fn a_virtual_host_that_is_missing_is_78_and_one_at_its_limit_is_tried_again() {
    for peer in [
        // The specification's code, as GarageMQ uses it; Broker-J; RabbitMQ behind amqproxy.
        closes(Method::CONNECTION_OPEN, 402, "virtualHost 'here' does not exist"),
        closes(Method::CONNECTION_OPEN, 404, "Unknown virtual host: 'here'"),
        closes(Method::CHANNEL_OPEN, 403, "NOT_ALLOWED - vhost here not found"),
    ] {
        let url = format!("{}/here", peer.url());
        for program in [worker(&peer).url(&url).arg("cat"), publisher(&peer).url(&url)] {
            let done = program.run();
            done.assert_status(78).assert_stderr("no virtual host \"here\"").assert_stderr("correct its name");
        }
    }
    let refused = closes(Method::CHANNEL_OPEN, 403, "NOT_ALLOWED - access to vhost 'here' refused for user 'guest'");
    worker(&refused).arg("cat").run().assert_status(77).assert_stderr("may not use virtual host");
    let limited = "NOT_ALLOWED - access to vhost 'here' refused for user 'guest': connection limit (1) is reached";
    let done = worker(&closes(Method::CHANNEL_OPEN, 403, limited)).args(["--connect-timeout", "6s", "cat"]).run();
    done.assert_status(69).assert_stderr("trying again");
    // While RabbitMQ starts. amqproxy keeps the name of the code only in the text.
    let down = "INTERNAL_ERROR - access to vhost '/' refused for user 'guest': vhost '/' is down";
    let done = worker(&closes(Method::CHANNEL_OPEN, 403, down)).args(["--connect-timeout", "6s", "cat"]).run();
    done.assert_status(69).assert_stderr("trying again");
}

#[test]
fn what_closes_a_connection_while_the_command_runs_is_not_taken_for_a_refused_login() {
    for text in ["NOT_ALLOWED - a reason of its own", "vhost 'here' was deleted", "login failure"] {
        let peer = Peer::new(move |request| match (request.method, with_a_message(request)) {
            (Method::BASIC_CONSUME, Answer::Bytes(delivery)) => {
                Answer::Bytes([delivery, frames::connection_close(530, text)].concat())
            }
            _ => Answer::Usual,
        });
        let done = worker(&peer).shell("sleep 1000").run();
        done.assert_status(75).assert_stderr(&format!("the broker closed the connection: {text}"));
    }
}

/// Greets as amqproxy does.
fn as_amqproxy(request: &Request) -> Option<Answer> {
    (request.method == Method::PROTOCOL_HEADER)
        .then(|| Answer::Bytes(peer::greeting_with(&[("product", "AMQProxy"), ("version", "3.1.3")])))
}

/// Whether a basic.consume asks for an acknowledgement timeout.
fn asks_for_a_timeout(request: &Request) -> bool {
    request.arguments.windows(18).any(|bytes| bytes == b"x-consumer-timeout")
}

#[test]
fn behind_amqproxy_the_ack_timeout_is_asked_for_and_left_out_if_that_is_refused() {
    let peer = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME if asks_for_a_timeout(request) => {
            let text = "PRECONDITION_FAILED - invalid arg 'x-consumer-timeout' for queue 'x' in vhost '/'";
            Answer::Bytes(frames::channel_close(request.channel, 406, text))
        }
        Method::BASIC_CONSUME => with_a_message(request),
        _ => as_amqproxy(request).unwrap_or(Answer::Usual),
    });
    let done = worker(&peer).args(["--ack-timeout", "2h", "cat"]).run();
    done.assert_status(0);
    assert_eq!(done.stdout, b"lemon");
    assert_eq!(peer.count(Method::BASIC_CONSUME), 2);
}

#[test]
fn behind_amqproxy_a_cancelled_consumer_may_have_been_too_slow() {
    let peer = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME => {
            assert!(asks_for_a_timeout(request));
            let Answer::Bytes(bytes) = with_a_message(request) else {
                unreachable!("it has bytes");
            };
            Answer::Bytes([bytes, frames::basic_cancel(request.channel, "qconsume")].concat())
        }
        _ => as_amqproxy(request).unwrap_or(Answer::Usual),
    });
    let done = worker(&peer).args(["--ack-timeout", "2h"]).shell("sleep 30").run();
    done.assert_status(75)
        .assert_stderr("the queue was deleted or has moved, or its acknowledgement timeout has passed")
        .assert_stderr("raise --ack-timeout");
}

/// The queue.delete methods that a run with an exclusive queue sends, to a broker that greets like this and says that the queue
/// has this many messages when it is declared.
fn deletes(greeting: &'static [(&str, &str)], ready: u32, options: &[&str]) -> Vec<Request> {
    let peer = Peer::new(move |request| match request.method {
        Method::PROTOCOL_HEADER => Answer::Bytes(peer::greeting_with(greeting)),
        Method::QUEUE_DECLARE => Answer::Bytes(peer::declared(request, ready, 0)),
        Method::BASIC_CONSUME => with_a_message(request),
        _ => Answer::Usual,
    });
    let done = worker(&peer).args(options).arg("cat").run();
    done.assert_status(0);
    assert_eq!(done.stdout, b"lemon");
    let seen = peer.seen();
    let at = |method| seen.iter().position(|request| request.method == method);
    if let Some(deleted) = at(Method::QUEUE_DELETE) {
        assert!(at(Method::BASIC_ACK).unwrap() < deleted && deleted < at(Method::CONNECTION_CLOSE).unwrap());
    }
    seen.into_iter().filter(|request| request.method == Method::QUEUE_DELETE).collect()
}

#[test]
fn behind_amqproxy_an_exclusive_queue_is_deleted_at_the_end_and_no_other() {
    const AMQPROXY: &[(&str, &str)] = &[("product", "AMQProxy"), ("version", "3.1.3")];
    const RABBITMQ: &[(&str, &str)] = &[("product", "RabbitMQ"), ("version", "4.3.6")];
    let deleted = deletes(AMQPROXY, 0, &["-x"]);
    assert_eq!(deleted.len(), 1);
    // Two reserved bytes, the name, and the flags if-unused and if-empty.
    assert_eq!(deleted[0].arguments, *b"\0\0\x01x\x03");
    // RabbitMQ deletes it with the connection, the queue of a user stays, and one with messages isn't new.
    assert!(deletes(RABBITMQ, 0, &["-x"]).is_empty());
    assert!(deletes(AMQPROXY, 0, &["--declare"]).is_empty());
    assert!(deletes(AMQPROXY, 0, &[]).is_empty());
    assert!(deletes(AMQPROXY, 1, &["-x"]).is_empty());
}

#[test]
fn what_lapin_does_not_expect_is_not_told_as_the_brokers_word() {
    // GarageMQ answers a cancel that wants no answer.
    let peer = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME => with_a_message(request),
        Method::BASIC_CANCEL => {
            let ok = frames::method_frame(request.channel, Method::BASIC_CANCEL_OK, b"\x08qconsume");
            Answer::Bytes(ok)
        }
        _ => Answer::Usual,
    });
    let done = worker(&peer).arg("cat").run();
    assert!(!done.stderr.contains("the broker closed"), "{}", done.stderr);
    done.assert_status(75).assert_stderr("the broker sent what AMQP doesn't allow");
}

#[test]
fn a_frame_size_that_cannot_be_agreed_on_is_78() {
    // As RabbitMQ does it: it hangs up when it has seen connection.tune-ok.
    let hangs_up = |version: &'static str, frame_max: u32| {
        Peer::new(move |request| match request.method {
            Method::PROTOCOL_HEADER => Answer::Bytes(peer::greeting(version)),
            Method::CONNECTION_START_OK => {
                let arguments = [&[7, 255][..], &frame_max.to_be_bytes(), &[0, 60]].concat();
                Answer::Bytes(frames::method_frame(0, Method::CONNECTION_TUNE, &arguments))
            }
            Method::CONNECTION_TUNE_OK => Answer::Last(Vec::new()),
            _ => Answer::Usual,
        })
    };
    let low = hangs_up("3.10.8", 4096);
    let program = worker(&low).args(["--connect-timeout", "20s", "cat"]);
    program.run().assert_status(78).assert_stderr("its frame_max is 4096 bytes").assert_stderr("raise frame_max");
    let usual = hangs_up("4.3.6", 131_072);
    let program =
        worker(&usual).url(&format!("{}?frame_max=4096", usual.url())).args(["--connect-timeout", "20s", "cat"]);
    program.run().assert_status(78).assert_stderr("the URL asks for 4096");
    let program = worker(&usual).args(["--connect-timeout", "6s", "cat"]);
    program.run().assert_status(69).assert_stderr("without saying why");
}

#[test]
fn what_a_load_balancer_does_is_named() {
    // It sends a header of its own (PROXY protocol) before ours, which the broker answers with its version.
    let proxied = Peer::new(|request| match request.method {
        Method::PROTOCOL_HEADER => Answer::Last(b"AMQP\0\0\x09\x01".to_vec()),
        _ => Answer::Usual,
    });
    worker(&proxied).arg("cat").run().assert_status(78).assert_stderr("send-proxy");
    let without_backend = Peer::new(|_| Answer::Last(Vec::new()));
    let done = worker(&without_backend).args(["--connect-timeout", "6s", "cat"]).run();
    done.assert_status(69).assert_stderr("a load balancer has no backend");
    let idle = Peer::new(|request| match request.method {
        Method::BASIC_CONSUME => {
            let Answer::Bytes(bytes) = with_a_message(request) else {
                unreachable!("it has bytes");
            };
            Answer::Last(bytes)
        }
        _ => Answer::Usual,
    });
    let done = worker(&idle).shell("sleep 30").run();
    done.assert_status(75).assert_stderr("idle timeout of a load balancer").assert_stderr("--heartbeat");
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
fn what_lavinmq_returns_and_nacks_is_refused_and_what_it_acks_was_returned() {
    for (method, status, says) in [(Method::BASIC_NACK, 75, "was refused"), (Method::BASIC_ACK, 78, "was returned")] {
        let peer = Peer::new(move |request| match request.method {
            Method::BODY => {
                let settled = peer::settle(request, method);
                Answer::Bytes([peer::returned(request.channel), settled].concat())
            }
            _ => Answer::Usual,
        });
        let done = publisher(&peer).run();
        done.assert_status(status).assert_stderr(says);
        let other = if status == 75 { "was returned" } else { "was refused" };
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
        .assert_stderr("error: line 2 was refused: the queue is full")
        .assert_stderr("; a message was returned, too: line 1 or a later one; ")
        .assert_stderr("confirmed: 0 of 2 messages sent, 0 from the start without a gap; to resume, begin with line 1");
}
