//! A peer that violates AMQP, and messages that can't be read: the run ends with a documented status, and the message
//! stays in the queue.

use crate::common::{private_broker, qconsume, worker};
use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    sync::{Arc, Mutex},
    thread,
};
use testbed::{
    Finished, Method, PATIENCE, Queue, eventually,
    frames::{self, method_frame},
    peer::{self, Answer, Peer, Request},
};

const CASES: u64 = 1000;

/// Workers at a time; they mostly wait.
const LANES: usize = 16;

/// The variable with a seed: only this case is run.
const SEED: &str = "QCONSUME_TEST_SEED";

/// Limits a run's memory, in KiB: no size that a peer claims may be allocated. An allocation beyond the limit ends the
/// program with 71.
const MEMORY: &str = "ulimit -d 65536; exec \"$0\" \"$@\"";

/// The methods after which the peer may misbehave.
const MOMENTS: [Method; 10] = [
    Method::PROTOCOL_HEADER,
    Method::CONNECTION_START_OK,
    Method::CONNECTION_OPEN,
    Method::CHANNEL_OPEN,
    Method::BASIC_QOS,
    Method::BASIC_CONSUME,
    Method::BASIC_CONSUME,
    Method::BASIC_CANCEL,
    Method::BASIC_ACK,
    Method::CONNECTION_CLOSE,
];

#[test]
fn whatever_a_peer_sends_the_end_is_a_documented_one() {
    let seeds = match std::env::var(SEED) {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..CASES).collect::<Vec<u64>>(),
    };
    let failures = Mutex::new(Vec::new());
    let statuses = Mutex::new(std::collections::BTreeMap::<i32, usize>::new());
    let play = |limit: &str, enough: &(dyn Fn() -> bool + Sync)| {
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..LANES {
                scope.spawn(|| {
                    while !enough()
                        && let Some(seed) = seeds.get(next.fetch_add(1, Relaxed))
                    {
                        match case(*seed, limit) {
                            Ok(status) => *statuses.lock().unwrap().entry(status).or_default() += 1,
                            Err(why) => failures.lock().unwrap().push(format!("{SEED}={seed}: {why}")),
                        }
                    }
                });
            }
        });
    };
    play("500ms", &|| false);
    // The cases have to lead to each of the common ends; otherwise the peer never got far enough to misbehave. On a
    // busy machine the limit may be too short for that, so a longer one is tried.
    let all_met = || {
        let statuses = statuses.lock().unwrap();
        [0, 69, 70, 75].iter().all(|status| statuses.contains_key(status))
    };
    if seeds.len() > 1 && failures.lock().unwrap().is_empty() {
        play("5s", &all_met);
    }
    eprintln!("status and how often: {:?}", statuses.lock().unwrap());
    let failures = failures.lock().unwrap();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), seeds.len(), failures.join("\n"));
    assert!(seeds.len() == 1 || all_met(), "one of 0, 69, 70 and 75 was never met");
}

/// One run against a peer that violates AMQP once per connection; returns the status.
fn case(seed: u64, limit: &str) -> Result<i32, String> {
    let peer = Peer::new(move |request| hostile(seed, request));
    let running = qconsume()
        .through(["sh", "-c", MEMORY])
        .url(&peer.url())
        .queue("q")
        .args(["--connect-timeout", limit, "--wait", limit])
        .args(["--kill-after", "1s"])
        .shell("cat >/dev/null; echo ran")
        .spawn();
    if !eventually(PATIENCE * 2, || running.has_ended()) {
        return Err(format!("hung: {}", running.stderr()));
    }
    let done = running.finish(PATIENCE);
    judge(&done, &peer).map_err(|why| format!("{why}: {done:?}"))?;
    Ok(done.status())
}

fn judge(done: &Finished, peer: &Peer) -> Result<(), &'static str> {
    if done.stderr.contains("defect") || done.stderr.contains("panicked") {
        return Err("a defect");
    }
    match done.status() {
        0 => {
            let acknowledged = || {
                let seen = peer.seen();
                let ack = seen.iter().position(|seen| seen.method == Method::BASIC_ACK);
                ack.is_some_and(|ack| {
                    let mut after = seen[ack..].iter();
                    after.any(|seen| seen.method == Method::BASIC_QOS)
                })
            };
            if done.stdout != b"ran\n" || !eventually(PATIENCE, acknowledged) {
                return Err("a false success");
            }
        }
        70 if !done.stderr.contains("can't be read") => return Err("70 without its reason"),
        66 | 69 | 70 | 75 | 77 | 78 => {}
        _ => return Err("an undocumented status"),
    }
    let ends = format!(" status={} source=", done.status());
    let last = done.stderr.lines().last().unwrap_or_default();
    if !last.contains(&ends) || done.stderr.matches(" source=").count() != 1 {
        return Err("not one last line");
    }
    Ok(())
}

/// The usual answers, except for one.
fn hostile(seed: u64, request: &Request) -> Answer {
    let mut random = fastrand::Rng::with_seed(seed * 1000 + request.connection as u64);
    let moment = MOMENTS[random.usize(..MOMENTS.len())];
    // The barrier after an acknowledgement is a basic.qos, too.
    let nth = if moment == Method::BASIC_QOS { random.u64(1..3) } else { 1 };
    if request.connection > 1 && seed.is_multiple_of(2) {
        return Answer::Last(Vec::new());
    }
    let mut bytes = peer::usual(request);
    if request.method == Method::BASIC_CONSUME {
        bytes.extend(peer::deliver(request.channel, 1, b"q"));
        bytes.extend(peer::content_header(request.channel, 5, &[0, 0]));
        bytes.extend(frames::frame(3, request.channel, b"lemon"));
    }
    if request.method != moment || request.nth != nth {
        return if request.method == Method::CONNECTION_CLOSE { Answer::Last(bytes) } else { Answer::Bytes(bytes) };
    }
    let broken = break_it(&mut random, request.channel, bytes);
    // During a settlement qconsume would wait for an answer for longer than this test can.
    let settling = nth == 2 || matches!(moment, Method::BASIC_CANCEL | Method::BASIC_ACK);
    if settling || random.bool() { Answer::Last(broken) } else { Answer::Bytes(broken) }
}

/// Breaks a broker's answer in a random way.
fn break_it(random: &mut fastrand::Rng, channel: u16, mut bytes: Vec<u8>) -> Vec<u8> {
    let at = random.usize(..=bytes.len());
    match random.u8(..16) {
        0 => {
            for _ in 0..random.usize(1..8) {
                if let Some(byte) = random.choice(&mut bytes) {
                    *byte ^= 1 << random.u8(..8);
                }
            }
            bytes
        }
        1 => bytes[..at].to_vec(),
        2 => {
            let junk = junk(random, 64);
            bytes.splice(at..at, junk);
            bytes
        }
        3 => set(bytes, 3, &random.u32(..).to_be_bytes()),
        4 => {
            let kind = random.u8(..);
            set(bytes, 0, &[kind])
        }
        5 => {
            let class = *random.choice(&[10, 20, 40, 50, 60, 85, 90]).unwrap_or(&1);
            let method = Method(class, random.u16(..130));
            let arguments = junk(random, 200);
            [method_frame(channel, method, &arguments), bytes].concat()
        }
        6 => {
            let body = frames::frame(3, channel, &junk(random, 100));
            [body, bytes].concat()
        }
        7 => {
            let tag = random.u64(..);
            let size = *random.choice(&[u64::MAX, 1 << 63, 1 << 40, 3, 0]).unwrap_or(&0);
            let deliver = peer::deliver(channel, tag, b"q");
            let header = peer::content_header(channel, size, &[0, 0]);
            let body = frames::frame(3, channel, b"more than three");
            [bytes, deliver, header, body].concat()
        }
        8 => {
            let key = peer::deliver(channel, 2, b"\xff\xfe\x80");
            let header = peer::content_header(channel, 0, &[0, 0]);
            [bytes, key, header].concat()
        }
        9 => {
            let kind = if random.bool() { b'F' } else { b'A' };
            let deliver = peer::deliver(channel, 1, b"q");
            let headers = peer::nested_headers(random.usize(90..2000), kind);
            let header = peer::content_header(channel, 1, &headers);
            [deliver, header, bytes].concat()
        }
        10 => {
            let text = frames::short(&junk(random, 255));
            let code = random.u16(..).to_be_bytes();
            let arguments = [&code[..], &text, &[0; 4]].concat();
            let (channel, method) =
                if random.bool() { (0, Method::CONNECTION_CLOSE) } else { (channel, Method::CHANNEL_CLOSE) };
            method_frame(channel, method, &arguments)
        }
        11 => [bytes.clone(), bytes].concat(),
        12 => {
            let channel = random.u16(..).to_be_bytes();
            set(bytes, 1, &channel)
        }
        13 => {
            let end = bytes.len().saturating_sub(1);
            set(bytes, end, &[0])
        }
        14 => {
            let headers = &peer::nested_headers(1000, b'F')[2..];
            let mechanisms = [&frames::long(b"PLAIN")[..], &frames::long(b"en_US")].concat();
            let arguments = [&[0, 9][..], headers, &mechanisms].concat();
            method_frame(0, Method::CONNECTION_START, &arguments)
        }
        _ => {
            // Not basic.qos-ok: after the barrier's basic.qos, a forged one can't be told from a real one.
            let early = [
                frames::basic_cancel(channel, "qconsume"),
                peer::tune(1),
                method_frame(channel, Method::BASIC_CANCEL_OK, &frames::short(b"other")),
                method_frame(channel, Method::BASIC_ACK, &[255; 9]),
                peer::returned(channel),
            ];
            let early = random.choice(early).unwrap_or_default();
            [early, bytes].concat()
        }
    }
}

fn junk(random: &mut fastrand::Rng, most: usize) -> Vec<u8> {
    let size = random.usize(..=most);
    (0..size).map(|_| random.u8(..)).collect()
}

/// Overwrites the bytes at that place, if there are enough.
fn set(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    if let Some(place) = bytes.get_mut(at..at + new.len()) {
        place.copy_from_slice(new);
    }
    bytes
}

fn run(queue: &Queue, script: &str) -> Finished {
    let worker = worker(queue);
    worker.shell(script).run()
}

#[test]
fn headers_nested_a_thousand_deep_end_the_run_and_stay_in_the_queue() {
    let broker = private_broker();
    for kind in [b'F', b'A'] {
        let queue = broker.queue("nested");
        let name = queue.name().as_bytes();
        peer::publish_raw(&broker, "", name, &peer::nested_headers(1000, kind));
        let done = run(&queue, "echo ran");
        done.assert_status(70);
        assert!(done.stdout.is_empty());
        let last = done.stderr.lines().last().unwrap_or_default();
        for part in [queue.name(), "nested more than 100 deep", "rabbitmqadmin get messages --queue", "status=70"] {
            assert!(last.contains(part), "{part:?} is missing: {last}");
        }
        queue.wait_ready(1);
        queue.purge();

        peer::publish_raw(&broker, "", name, &peer::nested_headers(100, kind));
        let done = run(&queue, "printf %s \"$MESSAGE_HEADERS\"");
        done.assert_status(0);
        let inner = if kind == b'F' { "{\"n\":{\"n\":{" } else { "{\"n\":[[[" };
        let headers = done.stdout_text();
        assert!(headers.starts_with(inner), "{headers:?}\n{}", done.stderr);
    }
}

#[test]
fn a_message_whose_routing_key_is_no_text_ends_the_run_and_stays_in_the_queue() {
    let broker = private_broker();
    let queue = broker.queue("routing-key");
    let channel = broker.client().channel().unwrap();
    let (exchange, name) = ("amq.fanout", queue.name());
    testbed::block_on(channel.queue_bind(
        name.into(),
        exchange.into(),
        "".into(),
        Default::default(),
        Default::default(),
    ))
    .unwrap();
    peer::publish_raw(&broker, exchange, b"\xff\xfe\x80", &[0, 0]);
    let done = run(&queue, "echo ran");
    done.assert_status(70).assert_stderr("is not UTF-8");
    assert!(done.stdout.is_empty());
    queue.wait_ready(1);
    queue.purge();
}

#[test]
fn an_unreadable_basic_return_is_a_lost_connection() {
    let bad_return =
        Arc::new([peer::returned(1), peer::content_header(1, 0, &peer::nested_headers(1000, b'F'))].concat());
    let peer = Peer::new(move |request| match request.method {
        Method::BASIC_CONSUME => Answer::Bytes(bad_return.to_vec()),
        _ => Answer::Usual,
    });
    let done = qconsume().url(&peer.url()).queue("q").args(["--connect-timeout", "10s", "cat"]).run();
    done.assert_status(69).assert_stderr("trying again");
    assert!(peer.count(Method::PROTOCOL_HEADER) > 1);
}

/// If a quorum queue's leader loses contact with the consumer's node, it requeues the message and may then deliver
/// again, although the prefetch is one. It drops an acknowledgement of the first delivery silently.
#[test]
fn a_second_delivery_is_no_success() {
    for command in [&["sleep", "60"][..], &["true"]] {
        let peer = Peer::new(|request| {
            let message = |tag| {
                let deliver = peer::deliver(request.channel, tag, b"x");
                [deliver, peer::content_header(request.channel, 0, &[0, 0])].concat()
            };
            match request.method {
                Method::BASIC_CONSUME => Answer::Bytes([peer::usual(request), message(1), message(2)].concat()),
                _ => Answer::Usual,
            }
        });
        let worker = qconsume().url(&peer.url()).queue("x").args(command);
        worker.run().assert_status(75).assert_stderr("the broker delivered another message").assert_stderr("outcome=");
        if command != ["true"] {
            assert_eq!(peer.count(Method::BASIC_ACK), 0);
        }
    }
}

/// RabbitMQ 4.3 may requeue the delivery and still answer the barrier, so qconsume sends a second one. If RabbitMQ cut
/// the refusal's text within a character, lapin ends the connection, which must not count as lost after the
/// confirmation.
#[test]
fn a_refusal_that_cannot_be_read_is_no_confirmation() {
    let asked = AtomicUsize::new(0);
    let peer = Peer::new(move |request| match request.method {
        Method::PROTOCOL_HEADER => Answer::Bytes(peer::greeting("4.3.6")),
        Method::BASIC_CONSUME => {
            let message = [
                peer::usual(request),
                peer::deliver(request.channel, 1, b"x"),
                peer::content_header(request.channel, 0, &[0, 0]),
            ];
            Answer::Bytes(message.concat())
        }
        // After the one for the prefetch and the first barrier.
        Method::BASIC_QOS if asked.fetch_add(1, Relaxed) == 2 => {
            let text = frames::short(b"PRECONDITION_FAILED - \xc3...");
            let arguments = [&406_u16.to_be_bytes()[..], &text, &[0; 4]].concat();
            let close = method_frame(request.channel, Method::CHANNEL_CLOSE, &arguments);
            Answer::Bytes(close)
        }
        _ => Answer::Usual,
    });
    let worker = qconsume().url(&peer.url()).queue("x");
    worker
        .args(["--ack-timeout", "1s", "--", "sleep", "1"])
        .run()
        .assert_status(75)
        .assert_stderr("acknowledgement not confirmed");
    assert_eq!(peer.count(Method::BASIC_QOS), 3);
}
