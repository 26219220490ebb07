//! A signal in each state of a run in which no command is running. A peer that doesn't answer holds the run in that
//! state.

use super::*;
use crate::common::in_time;
use nix::libc::O_NONBLOCK;
use std::{
    fs::OpenOptions,
    io::Write,
    net::UdpSocket,
    os::unix::fs::OpenOptionsExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use testbed::{
    Action, FullBacklog,
    frames::{basic_cancel, channel_close, method_frame},
    missing, owner,
    peer::{self, Answer, Peer, Request},
    reserve_port,
};

/// The stop signals, with the statuses that they lead to.
const STOPS: [(Signal, i32); 4] =
    [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129), (Signal::SIGQUIT, 131)];

/// With a command that would leave output if it ran.
fn never_runs(program: Program) -> Program {
    program.shell("echo ran")
}

/// Stops a worker that has no message, and checks that it ran nothing.
#[track_caller]
fn stop_idle(running: &Running, signal: Signal, status: i32) {
    assert_stopped(&stop(running, signal), status);
}

#[track_caller]
fn assert_stopped(finished: &Finished, status: i32) {
    finished.assert_status(status).assert_stderr("before a command was started");
    // qconsume exited by itself: as PID 1 it would ignore a signal's default action.
    assert_eq!(finished.code, Some(status));
    assert_eq!(finished.stdout_text(), "");
}

/// Whether the broker answered the (talkative) worker within the two seconds. With `--wait`, the status is 66 if
/// basic.cancel wasn't answered.
fn answered(finished: &Finished) -> bool {
    finished.status() != 66 && !finished.stderr.contains("no answer within 2s")
}

fn talkative(program: Program) -> Program {
    program.args(["--log-level", "debug"])
}

#[test]
fn a_signal_from_before_the_start_is_not_lost() {
    let (queue, proxy) = one_message("before-start", QueueKind::Classic);
    for (signal, status) in STOPS {
        let name = &signal.as_str()[3..];
        // The signal is pending before the program is executed; it can't come earlier.
        let finished = never_runs(behind(&proxy, &queue))
            .through(["env", &format!("--block-signal={name}"), "sh", "-c"])
            .through([&format!("kill -s {name} $$; exec \"$0\" \"$@\"")])
            .run();
        finished.assert_status(status);
        assert_eq!(finished.code, Some(status));
        assert_eq!(finished.stdout_text(), "");
    }
    assert_eq!(proxy.count(Direction::ToBroker, Method::BASIC_CONSUME), 0);
    assert_back(&queue);
}

#[test]
fn a_signal_before_the_runtime_starts_is_not_lost() {
    let (queue, proxy) = one_message("before-handlers", QueueKind::Classic);
    let file = owner::temp_folder("url").join("url");
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (signal, status) in STOPS {
        // qconsume reads its options before it starts the runtime that handles signals. This option comes late.
        let running = never_runs(qconsume().queue(queue.name())).env("BROKER_URL_FILE", &file).spawn();
        let mut url = None;
        let reads = || {
            let mut how = OpenOptions::new();
            url = how.write(true).custom_flags(O_NONBLOCK).open(&file).ok();
            url.is_some()
        };
        assert!(eventually(PATIENCE, reads), "qconsume doesn't read its options");
        running.signal(signal);
        url.unwrap().write_all(proxy.url().as_bytes()).unwrap();
        let finished = running.finish(PROMPT);
        finished.assert_status(status);
        // qconsume exited by itself: as PID 1 it would ignore a signal's default action.
        assert_eq!(finished.code, Some(status));
        assert_eq!(finished.stdout_text(), "");
    }
    assert_eq!(proxy.count(Direction::ToBroker, Method::BASIC_CONSUME), 0);
    assert_back(&queue);
}

#[test]
fn a_signal_ends_a_name_look_up() {
    // A resolv.conf with a name server that never answers.
    let Some(server) = (owner::is_root() && owner::find_in_path("unshare").is_some())
        .then(|| UdpSocket::bind("127.213.53.53:53"))
        .and_then(Result::ok)
    else {
        return missing("root, unshare and port 53 of a loopback address");
    };
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let file = owner::temp_folder("names").join("resolv.conf");
    std::fs::write(&file, "nameserver 127.213.53.53\n").unwrap();
    let mount = "mount --bind \"$RESOLV_CONF\" /etc/resolv.conf && exec \"$0\" \"$@\"";
    for (signal, status) in STOPS {
        let running = never_runs(qconsume().url("amqp://broker.test").queue("any"))
            .env("RESOLV_CONF", &file)
            .through(["unshare", "--mount", "sh", "-c", mount])
            .spawn();
        let mut query = [0; 512];
        if server.recv(&mut query).is_err() {
            let stderr = running.stderr();
            if stderr.contains("unshare:") || stderr.contains("mount:") {
                return missing("the right to mount");
            }
            panic!("no name was looked up; standard error:\n{stderr}");
        }
        stop_idle(&running, signal, status);
        // Drop its other queries, so that the next round waits for its own.
        server.set_nonblocking(true).unwrap();
        while server.recv(&mut query).is_ok() {}
        server.set_nonblocking(false).unwrap();
    }
}

#[test]
fn a_signal_ends_a_dial() {
    let hole = FullBacklog::start();
    for (signal, status) in STOPS {
        let running = never_runs(qconsume().url(&hole.url()).queue("any")).spawn();
        let dials = || dials(running.pid(), hole.addr().port());
        assert!(eventually(PATIENCE, dials), "qconsume doesn't dial");
        stop_idle(&running, signal, status);
    }
}

/// Whether this process has an unanswered connection attempt to this port of 127.0.0.1 (SYN_SENT).
fn dials(pid: i32, port: u16) -> bool {
    let waiting: Vec<String> = std::fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let syn_sent = fields[2] == format!("0100007F:{port:04X}") && fields[3] == "02";
            syn_sent.then(|| format!("socket:[{}]", fields[9]))
        })
        .collect();
    let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    open.flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| waiting.iter().any(|socket| target.as_os_str() == &**socket))
}

#[test]
fn a_signal_ends_a_tls_handshake() {
    for (signal, status) in STOPS {
        let silent = Proxy::silent();
        let url = format!("amqps://guest:guest@{}", silent.addr());
        let running = never_runs(qconsume().url(&url).queue("any")).spawn();
        silent.wait_accepted(1);
        stop_idle(&running, signal, status);
    }
}

#[test]
fn a_signal_ends_an_amqp_handshake() {
    for (signal, status) in STOPS {
        let silent = Proxy::silent();
        let running = never_runs(qconsume().url(&silent.url()).queue("any")).spawn();
        silent.wait_accepted(1);
        stop_idle(&running, signal, status);
    }
    // Each later step of the handshake.
    for step in [Method::CONNECTION_START_OK, Method::CONNECTION_TUNE_OK, Method::CONNECTION_OPEN, Method::CHANNEL_OPEN]
    {
        let (queue, proxy) = one_message("handshake", QueueKind::Classic);
        proxy.once(Direction::ToBroker, step, Action::Stall);
        let running = never_runs(behind(&proxy, &queue)).spawn();
        proxy.wait_for(Direction::ToBroker, step);
        stop_idle(&running, Signal::SIGTERM, 143);
        assert_back(&queue);
    }
}

#[test]
fn a_signal_ends_a_pause_between_attempts() {
    let port = reserve_port().unwrap();
    let url = format!("amqp://127.0.0.1:{}", port.number());
    for (signal, status) in STOPS {
        let running = never_runs(qconsume().url(&url).queue("any")).spawn();
        running.wait_for_stderr("trying again", PATIENCE);
        stop_idle(&running, signal, status);
    }
    // qconsume waits for a missing queue on an open connection.
    let broker = Broker::shared();
    let absent = broker.declare("absent").absent();
    let proxy = Proxy::of(broker);
    let running = never_runs(behind(&proxy, &absent)).spawn();
    running.wait_for_stderr("trying again", PATIENCE);
    stop_idle(&running, Signal::SIGTERM, 143);
    proxy.wait_open(0);
}

#[test]
fn a_signal_ends_a_subscription_that_is_not_answered() {
    for kind in QueueKind::ALL {
        let (queue, proxy) = one_message("consume-stalled", kind);
        proxy.once(Direction::ToBroker, Method::BASIC_CONSUME, Action::Stall);
        let running = never_runs(behind(&proxy, &queue)).spawn();
        proxy.wait_for(Direction::ToBroker, Method::BASIC_CONSUME);
        stop_idle(&running, Signal::SIGTERM, 143);
        drop(proxy);
        assert_back(&queue);
    }
}

#[test]
fn a_message_that_arrives_while_the_subscription_is_given_up_is_released() {
    for kind in QueueKind::ALL {
        let (finished, queue, proxy) = in_time(|| {
            let (queue, proxy) = one_message("consume-late", kind);
            // The broker has sent basic.consume-ok and the message, but neither has arrived yet.
            proxy.once(Direction::ToClient, Method::BASIC_CONSUME_OK, Action::Hold);
            let running = never_runs(talkative(behind(&proxy, &queue))).spawn();
            proxy.wait_for(Direction::ToClient, Method::BASIC_CONSUME_OK);
            queue.wait_ready(0);
            running.signal(Signal::SIGTERM);
            proxy.release();
            let finished = stop(&running, Signal::SIGTERM);
            answered(&finished).then_some((finished, queue, proxy))
        });
        assert_stopped(&finished, 143);
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_message() {
    for kind in QueueKind::ALL {
        let broker = Broker::shared();
        let queue = broker.declare("waiting").kind(kind).create();
        for (signal, status) in STOPS {
            let (finished, proxy) = in_time(|| {
                queue.wait_consumers(0);
                let proxy = Proxy::of(broker);
                let running = never_runs(talkative(behind(&proxy, &queue))).spawn();
                queue.wait_consumers(1);
                let finished = stop(&running, signal);
                answered(&finished).then_some((finished, proxy))
            });
            assert_stopped(&finished, status);
            // It ended with a goodbye.
            assert_eq!(proxy.count(Direction::ToBroker, Method::BASIC_CANCEL), 1);
            assert_eq!(proxy.count(Direction::ToClient, Method::CONNECTION_CLOSE_OK), 1);
            queue.wait_consumers(0);
        }
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_message_from_a_broker_that_answers_nothing() {
    let broker = Broker::shared();
    let queue = broker.queue("waiting-stalled");
    let proxy = Proxy::of(broker);
    let running = never_runs(behind(&proxy, &queue)).spawn();
    queue.wait_consumers(1);
    proxy.stall();
    stop_idle(&running, Signal::SIGTERM, 143);

    // And while it reconnects to a broker that accepts the connection and stays silent.
    proxy.pass();
    let running = never_runs(behind(&proxy, &queue)).spawn();
    queue.wait_consumers(1);
    let before = proxy.accepted();
    proxy.stall();
    proxy.cut();
    proxy.wait_accepted(before + 1);
    stop_idle(&running, Signal::SIGTERM, 143);
}

#[test]
fn a_release_that_fails_ends_with_a_goodbye() {
    let refuses = |request: &Request| match request.method {
        Method::BASIC_CANCEL => {
            let text = "NOT_FOUND - no queue 'q' in vhost '/'";
            Answer::Bytes(channel_close(request.channel, 404, text))
        }
        _ => Answer::Usual,
    };
    // Behind a proxy, an exclusive queue is deleted before the goodbye.
    let freezes = || {
        let is_frozen = AtomicBool::new(false);
        move |request: &Request| {
            is_frozen.fetch_or(request.method == Method::BASIC_CANCEL, Relaxed);
            match request.method {
                _ if is_frozen.load(Relaxed) => Answer::Bytes(Vec::new()),
                Method::PROTOCOL_HEADER => Answer::Bytes(peer::greeting_with(&[("product", "a proxy")])),
                _ => Answer::Usual,
            }
        }
    };
    for (peer, options) in
        [(Peer::new(refuses), &[][..]), (Peer::new(freezes()), &[]), (Peer::new(freezes()), &["--exclusive"])]
    {
        let running = never_runs(talkative(qconsume().url(&peer.url()).queue("q").args(options))).spawn();
        running.wait_for_stderr("waiting for a message", PATIENCE);
        let finished = stop(&running, Signal::SIGTERM);
        assert_stopped(&finished, 143);
        finished.assert_stderr("the release is not confirmed");
        assert_eq!(peer.count(Method::BASIC_CANCEL), 1, "{}", finished.stderr);
        assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", finished.stderr);
    }
}

#[test]
fn a_run_that_is_stopped_between_two_messages_does_not_say_that_it_ran_none() {
    let (peer, answer) = late_confirmation();
    answer.store(true, Relaxed);
    let running = qconsume().url(&peer.url()).queue("q").args(["--count", "2", "--", "true"]).spawn();
    running.wait_for_stderr("message acknowledged", PATIENCE);
    let finished = stop(&running, Signal::SIGTERM);
    finished.assert_status(143).assert_stderr("stopped by SIGTERM before the next command was started");
}

#[test]
fn a_partly_received_message_is_released_when_a_signal_comes() {
    for kind in QueueKind::ALL {
        for completes in [true, false] {
            let broker = Broker::shared();
            let body = vec![b'x'; 300_000];
            let (finished, queue, proxy) = in_time(|| {
                let queue = broker.declare("half-way").kind(kind).create();
                let proxy = Proxy::of(broker);
                // The first of three frames passes, the second is held.
                proxy.once(Direction::ToClient, Method::BODY, Action::Pass);
                proxy.once(Direction::ToClient, Method::BODY, Action::Hold);
                queue.publish(&body);
                let running = never_runs(talkative(behind(&proxy, &queue))).spawn();
                proxy.wait_for_nth(Direction::ToClient, Method::BODY, 2);
                running.signal(Signal::SIGTERM);
                proxy.wait_for(Direction::ToBroker, Method::BASIC_CANCEL);
                if completes {
                    proxy.release();
                }
                let finished = stop(&running, Signal::SIGTERM);
                (!completes || answered(&finished)).then_some((finished, queue, proxy))
            });
            assert_stopped(&finished, 143);
            if completes {
                assert_settled(&proxy, Method::BASIC_NACK);
            }
            drop(proxy);
            assert_eq!(queue.wait_get().data, body);
            assert!(queue.get().is_none());
        }
    }
}

#[test]
fn a_message_that_comes_while_the_wait_is_given_up_is_released() {
    for kind in QueueKind::ALL {
        let (finished, queue, proxy) = in_time(|| {
            let broker = Broker::shared();
            let queue = broker.declare("last-moment").kind(kind).create();
            let proxy = Proxy::of(broker);
            // basic.cancel of `--wait` is sent, but held, when first the message and then the signal come.
            proxy.once(Direction::ToBroker, Method::BASIC_CANCEL, Action::Hold);
            let worker = talkative(behind(&proxy, &queue)).args(["--wait", "200ms"]);
            let running = never_runs(worker).spawn();
            proxy.wait_for(Direction::ToBroker, Method::BASIC_CANCEL);
            queue.publish(MESSAGE);
            let came = || proxy.count(Direction::ToClient, Method::BODY) > 0;
            eventually(PATIENCE, || came() || running.has_ended());
            signal_and_wait(&running, Signal::SIGTERM);
            proxy.release();
            let finished = stop(&running, Signal::SIGTERM);
            answered(&finished).then_some((finished, queue, proxy))
        });
        assert_stopped(&finished, 143);
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}

#[test]
fn a_signal_while_settling_changes_nothing() {
    for kind in QueueKind::ALL {
        for (script, status, by) in [("exit 0", 0, Method::BASIC_ACK), ("exit 3", 3, Method::BASIC_REJECT)] {
            let (queue, proxy) = one_message("settling", kind);
            proxy.once(Direction::ToBroker, Method::BASIC_CANCEL, Action::Hold);
            let running = behind(&proxy, &queue).shell(script).spawn();
            proxy.wait_for(Direction::ToBroker, Method::BASIC_CANCEL);
            for (signal, _) in STOPS {
                running.signal(signal);
            }
            proxy.release();
            running.finish(PROMPT).assert_status(status);
            assert_settled(&proxy, by);
            if status == 0 {
                assert_gone(&queue);
            } else {
                assert_back(&queue);
            }
        }
    }
}

#[test]
fn a_signal_while_an_ack_is_not_answered_leads_to_no_false_success() {
    let (queue, proxy) = one_message("settling-stalled", QueueKind::Classic);
    proxy.once(Direction::ToBroker, Method::BASIC_CANCEL, Action::Stall);
    let running = behind(&proxy, &queue).shell("exit 0").spawn();
    proxy.wait_for(Direction::ToBroker, Method::BASIC_CANCEL);
    running.signal(Signal::SIGTERM);
    proxy.cut();
    running.finish(PROMPT).assert_status(75).assert_stderr("not confirmed");
    drop(proxy);
    assert_back(&queue);
}

#[test]
fn a_signal_cuts_the_goodbye_short() {
    for (script, status) in [("exit 0", 0), ("exit 3", 3)] {
        let (queue, proxy) = one_message("goodbye", QueueKind::Classic);
        proxy.once(Direction::ToBroker, Method::CONNECTION_CLOSE, Action::Stall);
        let running = behind(&proxy, &queue).shell(script).spawn();
        proxy.wait_for(Direction::ToBroker, Method::CONNECTION_CLOSE);
        stop(&running, Signal::SIGTERM).assert_status(status);
        drop(proxy);
        if status == 0 {
            assert_gone(&queue);
        } else {
            assert_back(&queue);
        }
    }
}

/// The time limit decides the message's settlement, but the signal after it still ends the run.
#[test]
fn a_signal_after_the_time_limit_ends_the_run() {
    let queue = Broker::shared().declare("after-the-limit").quorum().create();
    queue.publish_all(["one", "two", "three"]);
    let running = worker(&queue)
        .args(["--drain", "--max-attempts", "1", "--reject-exit-code", "0", "--timeout", "500ms", "--kill-after", "4s"])
        .shell("trap '' TERM; echo started; while :; do sleep 0.05; done")
        .spawn();
    running.wait_for_stderr("--timeout reached", PATIENCE);
    signal_and_wait(&running, Signal::SIGTERM);
    let finished = running.finish(PATIENCE);
    finished.assert_status(143).assert_stderr("stopped by SIGTERM before everything was done");
    assert_eq!(finished.stdout_text(), "started\n", "another command was started after the signal");
    queue.wait_ready(2);
}

/// A peer that delivers a message, and confirms its acknowledgement once the flag is set.
pub(super) fn late_confirmation() -> (Peer, Arc<AtomicBool>) {
    let answer = Arc::new(AtomicBool::new(false));
    let may_answer = Arc::clone(&answer);
    let peer = Peer::new(move |request| match (request.method, request.nth) {
        (Method::BASIC_CONSUME, _) => {
            let message = peer::message(request.channel, 1, false, MESSAGE.as_bytes());
            Answer::Bytes([peer::usual(request), message].concat())
        }
        // The first is for the prefetch.
        (Method::BASIC_QOS, 2) => {
            eventually(PATIENCE, || may_answer.load(Relaxed));
            Answer::Usual
        }
        _ => Answer::Usual,
    });
    (peer, answer)
}

#[test]
fn a_signal_between_the_message_and_the_command_starts_none() {
    for (signal, status) in STOPS {
        let (peer, answer) = late_confirmation();
        // With --no-ack the message is acknowledged before the command starts.
        let running = never_runs(qconsume().url(&peer.url()).queue("q").args(["--no-ack"])).spawn();
        assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
        running.signal(signal);
        answer.store(true, Relaxed);
        let finished = running.finish(PATIENCE);
        finished
            .assert_status(status)
            .assert_stderr(&format!("stopped by {signal} before the command was started"))
            .assert_stderr("the message is lost: it was acknowledged already (--no-ack)");
        assert_eq!(finished.stdout_text(), "");
    }
}

/// A peer that delivers a message; the test itself confirms the acknowledgement, on channel 1 of connection 1.
fn open_confirmation() -> Peer {
    Peer::new(move |request| match (request.method, request.nth) {
        (Method::BASIC_CONSUME, _) => {
            let message = peer::message(request.channel, 1, false, MESSAGE.as_bytes());
            Answer::Bytes([peer::usual(request), message].concat())
        }
        // The first is for the prefetch.
        (Method::BASIC_QOS, 2) => Answer::Bytes(Vec::new()),
        _ => Answer::Usual,
    })
}

#[test]
fn a_message_that_comes_while_a_stopped_run_settles_is_released() {
    let peer = open_confirmation();
    let running = qconsume().url(&peer.url()).queue("q").args(["--count", "2", "--", "true"]).spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
    running.signal(Signal::SIGTERM);
    let reply = method_frame(1, Method::BASIC_QOS_OK, &[]);
    peer.send(1, &[peer::message(1, 2, false, b"the next"), reply].concat());
    running.finish(PATIENCE).assert_status(143).assert_stderr("stopped by SIGTERM before everything was done");
    // If qconsume only closed the connection, the delivery would count as a failure.
    assert_eq!(peer.count(Method::BASIC_NACK), 1, "{}", running.stderr());
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", running.stderr());
}

#[test]
fn a_stopped_run_says_that_the_release_of_the_next_message_is_not_confirmed() {
    let peer = Peer::new(move |request| match (request.method, request.nth) {
        (Method::BASIC_CONSUME, _) => {
            let message = peer::message(request.channel, 1, false, MESSAGE.as_bytes());
            Answer::Bytes([peer::usual(request), message].concat())
        }
        // The first is for the prefetch, the second is the confirmation, which the test sends.
        (Method::BASIC_QOS, 2) | (Method::BASIC_CANCEL, _) => Answer::Bytes(Vec::new()),
        _ => Answer::Usual,
    });
    let running = qconsume().url(&peer.url()).queue("q").args(["--count", "2", "--", "true"]).spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
    running.signal(Signal::SIGTERM);
    let reply = method_frame(1, Method::BASIC_QOS_OK, &[]);
    peer.send(1, &[peer::message(1, 2, false, b"the next"), reply].concat());
    let says = "stopped by SIGTERM before everything was done; the release is not confirmed";
    running.finish(PATIENCE).assert_status(143).assert_stderr(says);
}

#[test]
fn a_delivery_that_is_lost_before_the_command_starts_is_reported_as_lost() {
    let peer = open_confirmation();
    let running = never_runs(qconsume().url(&peer.url()).queue("q").args(["--no-ack", "--log-format=json"])).spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
    let reply = method_frame(1, Method::BASIC_QOS_OK, &[]);
    // After a cancel, a second delivery means that the broker has requeued the first one.
    peer.send(1, &[peer::message(1, 2, true, MESSAGE.as_bytes()), reply].concat());
    let finished = running.finish(PATIENCE);
    finished.assert_status(75).assert_stderr("command not started").assert_stderr(r#""outcome":"lost""#);
}

#[test]
fn a_signal_from_before_the_goodbye_does_not_cut_it_short() {
    let peer = open_confirmation();
    let running = never_runs(qconsume().url(&peer.url()).queue("q").args(["--no-ack"])).spawn();
    assert!(eventually(PATIENCE, || peer.count(Method::BASIC_QOS) == 2));
    running.signal(Signal::SIGTERM);
    let reply = method_frame(1, Method::BASIC_QOS_OK, &[]);
    peer.send(1, &[basic_cancel(1, "qconsume"), reply].concat());
    running.finish(PATIENCE).assert_status(75).assert_stderr("acknowledgement not confirmed");
    assert_eq!(peer.count(Method::CONNECTION_CLOSE), 1, "{}", running.stderr());
}
