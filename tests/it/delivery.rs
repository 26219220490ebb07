//! Deliveries: connections and consumers that are lost, settlement, retries, --count, --drain, and --wait.

use crate::common::{behind, in_time, qconsume, until_there, worker};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use testbed::owner::temp_folder;
use testbed::{
    Action, BasicProperties, Broker, Direction, Method, PATIENCE, Proxy, Queue, QueueKind, Running, Signal, eventually,
    frames,
    peer::{self, Answer, Peer},
    types::{AMQPValue, FieldTable, LongString},
};

#[test]
fn a_message_that_no_client_can_read_ends_the_run_instead_of_a_storm_of_connections() {
    let broker = Broker::shared();
    let queue = broker.queue("unreadable");
    // A message id that isn't UTF-8: the broker accepts it, lapin doesn't.
    let publisher = Proxy::of(broker);
    let spoil = |frame: &[u8]| {
        let text = b"readable";
        let at = frame.windows(text.len()).position(|bytes| bytes == text);
        let mut frame = frame.to_vec();
        frame[at.expect("the message id")] = 0xff;
        frame
    };
    let spoil = Action::Replace(Arc::new(spoil));
    publisher.once(Direction::ToBroker, Method::HEADER, spoil);
    let properties = BasicProperties::default().with_message_id("readable".into());
    testbed::Client::new(&publisher.url()).publish(queue.name(), ["body"], properties).unwrap();

    let proxy = Proxy::of(broker);
    let run = behind(&proxy, &queue).args(["true"]).run();
    run.assert_status(70)
        .assert_stderr(queue.name())
        .assert_stderr("can't be read: its properties are not valid AMQP")
        .assert_stderr("remove it");
    assert_eq!(proxy.accepted(), 1, "{}", run.stderr);
    queue.wait_ready(1);
}

#[test]
fn a_message_that_never_arrives_whole_is_70_at_the_second_try() {
    let broker = Broker::shared();
    let queue = broker.declare("endless").quorum().create();
    queue.publish("body");
    let proxy = Proxy::of(broker);
    let spoil = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        *frame.last_mut().expect("an end octet") = 0;
        frame
    };
    proxy.on(Direction::ToClient, Method::BODY, Action::Replace(Arc::new(spoil)));
    let run = behind(&proxy, &queue).args(["touch", "/proc/never/run"]).run();
    run.assert_status(70)
        .assert_stderr("connecting again")
        .assert_stderr("two connections were lost while a message")
        .assert_stderr(queue.name());
    // Each attempt counts towards the queue's delivery-limit, at which the broker drops the message.
    assert_eq!(proxy.accepted(), 2, "{}", run.stderr);
    queue.wait_ready(1);
}

/// Properties with a header of this many bytes.
fn with_headers(bytes: usize) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("h".into(), AMQPValue::LongString(LongString::from("x".repeat(bytes))));
    BasicProperties::default().with_headers(headers)
}

#[test]
fn headers_larger_than_a_frame_are_70_at_the_first_try() {
    let broker = Broker::shared();
    let run = |queue: &Queue, query: &str, script: &str| {
        let proxy = Proxy::of(broker);
        let url = format!("{}/?{query}", proxy.url());
        let run = worker(queue).url(&url).shell(script).run();
        assert_eq!(proxy.accepted(), 1, "{}", run.stderr);
        run
    };
    let assert_refused = |queue: &Queue, query: &str, limit: &str| {
        let run = run(queue, query, "echo ran");
        run.assert_status(70)
            .assert_stderr(queue.name())
            .assert_stderr(limit)
            .assert_stderr("raise frame_max in the URL and in rabbitmq.conf")
            .assert_stderr("remove it");
        assert!(run.stdout.is_empty());
        queue.wait_ready(1);
    };
    // A frame_max in the URL.
    let queue = broker.declare("large-headers").quorum().create();
    queue.publish_with(with_headers(10_000), "body");
    assert_refused(&queue, "frame_max=8192", "this connection takes 8192");
    run(&queue, "frame_max=16384", "exit 0").assert_status(0);

    // The broker's frame_max: these headers fit at first, but not with the counts that one requeue adds.
    let queue = broker.declare("growing-headers").quorum().create();
    let rest = 7 + 1 + 12 + 2 + 4 + 2 + 5;
    queue.publish_with(with_headers(131_072 - rest - 1), "body");
    run(&queue, "", "exit 3").assert_status(3);
    queue.wait_ready(1);
    assert_refused(&queue, "", "this connection takes 131072");
}

/// Two and a half heartbeats of two seconds, plus time for a busy machine; less than with the default heartbeat.
const NOTICED: Duration = Duration::from_secs(20);

fn a_file() -> PathBuf {
    temp_folder("delivery").join("file")
}

fn wait_started(run: &Running) {
    run.wait_for_stdout("started", PATIENCE);
}

#[test]
fn what_ends_the_consumer_while_it_waits_leads_to_a_new_one() {
    let broker = Broker::shared();
    let endings = [
        Action::CutAfter,
        Action::Inject(frames::channel_close(1, 406, "PRECONDITION_FAILED - test")),
        Action::Inject(frames::connection_close(320, "CONNECTION_FORCED - test")),
        Action::Inject(frames::basic_cancel(1, "qconsume")),
    ];
    for ending in endings {
        let queue = broker.queue("waiting");
        let proxy = Proxy::of(broker);
        proxy.once(Direction::ToClient, Method::BASIC_CONSUME_OK, ending);
        let run = behind(&proxy, &queue).args(["cat"]).spawn();
        run.wait_for_stderr("connecting again", PATIENCE);
        proxy.wait_for_nth(Direction::ToClient, Method::BASIC_CONSUME_OK, 2);
        queue.publish("late");
        let run = run.wait(PATIENCE);
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "late");
    }
}

#[test]
fn a_queue_deleted_while_waiting_is_waited_for_and_78_in_the_end() {
    let broker = Broker::shared();
    let queue = broker.queue("deleted");
    let spawn = |limit| {
        let run = worker(&queue).args(["--connect-timeout", limit, "--log-level", "debug", "cat"]).spawn();
        // If the queue is deleted just before this, RabbitMQ 4.3 may never send the basic.cancel.
        run.wait_for_stderr("waiting for a message in queue", PATIENCE);
        queue.delete();
        run.wait_for_stderr("there is no queue", PATIENCE);
        run
    };
    let run = spawn("60s");
    assert!(!run.has_ended(), "the missing queue is logged at once, not only when the run ends");
    let again = broker.declare("").exact_name(queue.name()).create();
    again.publish("again");
    let run = run.wait(PATIENCE);
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "again");
    // The refusals in between don't make the next consumer look lost.
    assert_eq!(run.stderr.matches("connecting again").count(), 1);

    spawn("10s").wait(PATIENCE).assert_status(78);
}

#[test]
fn a_broker_that_stays_away_is_69_after_the_connect_timeout() {
    let broker = Broker::shared();
    let queue = broker.queue("away");
    let proxy = Proxy::of(broker);
    let run = behind(&proxy, &queue).args(["--connect-timeout", "8s", "cat"]).spawn();
    queue.wait_consumers(1);
    proxy.refuse();
    proxy.cut();
    let run = run.wait(PATIENCE);
    run.assert_status(69).assert_stderr("gave up after 8s (--connect-timeout)");
}

#[test]
fn an_address_that_accepts_and_stays_silent_is_tried_again() {
    let broker = Broker::shared();
    let queue = broker.queue("silent");
    queue.publish("body");
    let proxy = Proxy::of(broker);
    proxy.once(Direction::ToBroker, Method::PROTOCOL_HEADER, Action::Stall);
    let file = a_file();
    let run = behind(&proxy, &queue).args(["--connect-timeout", "12s"]).shell(&until_there(&file)).spawn();
    wait_started(&run);
    assert_eq!(proxy.accepted(), 2);
    // The abandoned attempt's connection is closed.
    proxy.wait_open(1);
    std::fs::write(&file, "").unwrap();
    let run = run.wait(PATIENCE);
    run.assert_status(0).assert_stderr("no answer while");
}

#[test]
fn a_large_body_over_a_slow_line_is_no_silence() {
    let broker = Broker::shared();
    let queue = broker.queue("slow-line");
    let body = vec![b'x'; 1024 * 1024];
    queue.publish(&body);
    let proxy = Proxy::of(broker);
    proxy.on(Direction::ToClient, Method::BODY, Action::Hold);
    let run = behind(&proxy, &queue).args(["--heartbeat", "4", "cat"]).spawn();
    // Frames of 128 KiB: together they take longer than a broker may be silent (8 to 10 s), but each comes in time.
    for frame in 1..=9 {
        proxy.wait_for_nth(Direction::ToClient, Method::BODY, frame);
        // This simulates the slow line; the test doesn't wait for anything here.
        std::thread::sleep(Duration::from_millis(1200));
        proxy.release();
    }
    let run = run.wait(PATIENCE);
    run.assert_status(0);
    assert!(run.stdout == body);
    assert!(!run.stderr.contains("connecting again"), "{}", run.stderr);
}

#[test]
fn the_warning_of_the_ack_timeout_counts_from_the_delivery() {
    let broker = Broker::shared();
    let queue = broker.queue("slow-delivery");
    queue.publish("body");
    let proxy = Proxy::of(broker);
    proxy.on(Direction::ToClient, Method::BODY, Action::Hold);
    let run = behind(&proxy, &queue).args(["--ack-timeout", "2s"]).shell("sleep 1").spawn();
    proxy.wait_for(Direction::ToClient, Method::BODY);
    // This simulates the slow line. The command then ends before 80 % of the timeout have passed since its start.
    std::thread::sleep(Duration::from_secs(2));
    proxy.release();
    run.wait(PATIENCE).assert_status(0).assert_stderr("the message has been held for at least 80 % of --ack-timeout");
}

#[test]
fn a_frozen_broker_is_noticed_waiting_running_and_settling() {
    let broker = Broker::start();
    let queue = broker.queue("frozen");
    let spawn = |script: &str| worker(&queue).args(["--heartbeat", "2", "--kill-after", "5s"]).shell(script).spawn();
    let silent = "the broker has been silent";

    let run = spawn("cat");
    queue.wait_consumers(1);
    broker.freeze().unwrap();
    run.wait_for_stderr(silent, NOTICED);
    broker.thaw().unwrap();
    queue.publish("after the frost");
    run.wait(PATIENCE).assert_status(0);

    queue.publish("running");
    let run = spawn("trap 'echo stopped; exit 0' TERM; echo started; sleep 60 & wait");
    wait_started(&run);
    broker.freeze().unwrap();
    run.wait_for_stderr(silent, NOTICED);
    let run = run.wait(PATIENCE);
    broker.thaw().unwrap();
    run.assert_status(75);
    assert!(run.stdout_text().contains("stopped"));

    let file = a_file();
    queue.wait_ready(1);
    let run = spawn(&until_there(&file));
    wait_started(&run);
    broker.freeze().unwrap();
    std::fs::write(&file, "").unwrap();
    run.wait_for_stderr(silent, NOTICED);
    let run = run.wait(PATIENCE);
    broker.thaw().unwrap();
    run.assert_status(75);
}

#[test]
fn a_broker_that_restarts_is_waited_for_and_the_next_run_gets_the_interrupted_message() {
    let broker = Broker::start();
    for kind in QueueKind::ALL {
        let queue = broker.declare("restart").kind(kind).create();
        let run = worker(&queue).args(["--connect-timeout", "5m", "cat"]).spawn();
        queue.wait_consumers(1);
        match kind {
            QueueKind::Classic => broker.restart().unwrap(),
            QueueKind::Quorum => {
                broker.kill().unwrap();
                broker.start_again().unwrap();
            }
        }
        queue.publish("waited for");
        run.wait(PATIENCE).assert_status(0);

        queue.publish("interrupted");
        let file = a_file();
        let run = worker(&queue).args(["--on-lost", "finish"]).shell(&until_there(&file)).spawn();
        wait_started(&run);
        broker.kill().unwrap();
        run.wait_for_stderr("letting the command finish", PATIENCE);
        std::fs::write(&file, "").unwrap();
        run.wait(PATIENCE).assert_status(75);
        broker.start_again().unwrap();
        let run = worker(&queue).args(["cat"]).run();
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "interrupted");
    }
}

#[test]
fn the_acknowledgement_timeout_stops_the_command_and_is_75_and_names_the_setting() {
    let broker = Broker::with_config("consumer_timeout = 2000");
    // How often channels check the timeout, up to 4.2; not every version has this as a setting of rabbitmq.conf.
    let tick = "application:set_env(rabbit, channel_tick_interval, 1000).";
    broker.ctl(&["eval", tick]).unwrap();
    let setting = match broker.version() {
        version if version >= (4, 3, 0) => "raise --ack-timeout, the queue's x-consumer-timeout",
        version if version >= (3, 12, 0) => "raise the queue's x-consumer-timeout",
        _ => "raise consumer_timeout in the broker's rabbitmq.conf",
    };
    for kind in QueueKind::ALL {
        // From 4.3 on, classic queues have no such timeout.
        if kind == QueueKind::Classic && broker.version() >= (4, 3, 0) {
            continue;
        }
        let queue = broker.declare("ack-timeout").kind(kind).create();
        queue.publish("slow");
        let run = worker(&queue).shell("trap 'echo stopped; exit 0' TERM; echo started; sleep 60 & wait").run();
        run.assert_status(75).assert_stderr(setting);
        assert!(run.stdout_text().contains("stopped"));
        queue.wait_ready(1);

        let file = a_file();
        let run = worker(&queue).args(["--on-lost", "finish"]).shell(&until_there(&file)).spawn();
        run.wait_for_stderr("letting the command finish", PATIENCE);
        std::fs::write(&file, "").unwrap();
        let run = run.wait(PATIENCE);
        run.assert_status(75).assert_stderr(setting);
        queue.wait_ready(1);
    }
}

#[test]
fn ack_timeout_warns_and_is_asked_of_a_broker_that_has_it() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let asked = broker.version() >= (4, 3, 0) && kind == QueueKind::Quorum;
        let refused = broker.version() >= (4, 3, 0) && kind == QueueKind::Classic;
        let queue = broker.declare("asked").kind(kind).create();
        queue.publish("slow");
        let proxy = Proxy::of(broker);
        let file = a_file();
        let run = behind(&proxy, &queue).args(["--ack-timeout", "2s"]).shell(&until_there(&file)).spawn();
        run.wait_for_stderr(
            "the message has been held for at least 80 % of --ack-timeout (2s): a queue that obeys it",
            PATIENCE,
        );
        if !asked {
            std::fs::write(&file, "").unwrap();
        }
        let run = run.wait(PATIENCE);
        run.assert_status(if asked { 75 } else { 0 });
        if asked {
            run.assert_stderr("raise --ack-timeout, the queue's x-consumer-timeout");
        }
        // If the broker refuses the timeout, qconsume subscribes again without it.
        let consumed = proxy.count(Direction::ToBroker, Method::BASIC_CONSUME);
        assert_eq!(consumed, if refused { 2 } else { 1 });
    }
}

#[test]
fn an_acknowledgement_timeout_that_comes_to_light_after_the_barrier_is_75() {
    let broker = Broker::shared();
    if broker.version() < (4, 3, 0) {
        // Up to 4.2 the channel itself enforces the timeout, so its answer to the barrier can be trusted.
        return testbed::version_lacks("queues that watch the acknowledgement timeout");
    }
    // A real broker does this too rarely. It closes the channel if our consumer is cancelled already, and cancels the
    // consumer otherwise.
    let reason = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out";
    let barrier = Method::BASIC_QOS_OK;
    let late = [
        ("1", frames::channel_close(1, 406, reason)),
        ("2", [frames::basic_cancel(1, "qconsume"), frames::method_frame(1, barrier, &[])].concat()),
    ];
    for (count, late) in late {
        let queue = broker.declare("late").quorum().create();
        queue.publish("body");
        let proxy = Proxy::of(broker);
        let file = a_file();
        let run = behind(&proxy, &queue)
            .args(["--count", count, "--ack-timeout", "20s"])
            // From five seconds on, a second barrier is needed.
            .shell(&format!("echo started; sleep 5; {}", until_there(&file)))
            .spawn();
        wait_started(&run);
        // The broker itself hasn't closed the channel, so channel.close-ok would make it close the connection.
        let answer = Method::CHANNEL_CLOSE_OK;
        proxy.on(Direction::ToBroker, answer, Action::SwallowFrame);
        // The answer to the second barrier is replaced: the one to basic.cancel may come after the first barrier's, and
        // wouldn't come on a closed channel.
        proxy.once(Direction::ToClient, barrier, Action::Pass);
        proxy.once(Direction::ToClient, barrier, Action::InjectInstead(late));
        std::fs::write(&file, "").unwrap();
        let run = run.wait(PATIENCE);
        run.assert_status(75).assert_stderr("raise --ack-timeout");
    }
}

#[test]
fn a_slow_broker_gets_a_longer_pause_before_the_second_barrier() {
    let queue = Broker::shared().queue("slow");
    queue.publish("body");
    let proxy = Proxy::of(Broker::shared());
    let run = behind(&proxy, &queue).shell("echo started; sleep 5").spawn();
    wait_started(&run);
    let reply = Duration::from_millis(300);
    proxy.delay(Direction::ToClient, reply);
    run.wait(PATIENCE).assert_status(0);
    let seen = proxy.seen();
    let barriers: Vec<_> = seen.iter().filter(|seen| seen.method == Method::BASIC_QOS).map(|seen| seen.at).collect();
    // The first one sets the prefetch count.
    let [_, first, second] = barriers[..] else { panic!("{seen:?}") };
    let between = second - first;
    assert!(
        between >= reply * 5,
        "{between:?} from the first barrier to the second: its reply, then four times as long"
    );
}

#[test]
fn an_acknowledgement_timeout_that_waits_for_the_brokers_disk_is_75() {
    if Broker::shared().version() < (4, 3, 0) {
        return testbed::version_lacks("queues that watch the acknowledgement timeout");
    }
    let broker = Broker::start();
    let queue = broker.declare("disk").quorum().arg("x-consumer-timeout", AMQPValue::LongLongInt(8000)).create();
    queue.publish("body");
    let proxy = Proxy::of(&broker);
    proxy.on(Direction::ToBroker, Method::BASIC_ACK, Action::Hold);
    let run = behind(&proxy, &queue).shell("sleep 1").spawn();
    proxy.wait_for(Direction::ToBroker, Method::BASIC_ACK);
    // Quorum queues write to disk through one process. Without it, they note the timeout, and do nothing about it yet.
    broker
        .ctl(&["eval", "spawn(fun() -> erlang:suspend_process(whereis(ra_log_wal)), timer:sleep(12000) end)."])
        .unwrap();
    // So the acknowledgement reaches the broker after the timeout, and up to three seconds before the end of the stall.
    // The command has run for a second only, but the message is held for longer. Nothing tells when the queue has noted
    // the timeout, so the test can't wait for that.
    std::thread::sleep(Duration::from_secs(9));
    proxy.release();
    run.wait(PATIENCE).assert_status(75).assert_stderr("raise --ack-timeout");
    queue.wait_ready(1);
}

/// Sets the queue's acknowledgement timeout, in seconds, for the next test (default 10). RabbitMQ recommends at least
/// 60, but the race is the same.
const CONSUMER_TIMEOUT: &str = "QCONSUME_TEST_CONSUMER_TIMEOUT";

#[test]
fn a_hundred_workers_that_end_around_the_acknowledgement_timeout_claim_no_false_success() {
    let broker = Broker::shared();
    if broker.version() < (4, 3, 0) {
        return testbed::version_lacks("queues that watch the acknowledgement timeout");
    }
    let seconds = std::env::var(CONSUMER_TIMEOUT).map_or(10.0, |seconds| seconds.parse::<f64>().unwrap());
    // amqproxy sends its own version instead of the broker's.
    let proxy = Proxy::of(broker);
    let other_version = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        let version = b"version";
        let at = frame.windows(version.len()).position(|bytes| bytes == version).expect("a version");
        // After the name come the value's type and length (5 bytes), then a version such as 4.3.6.
        frame[at + version.len() + 5..][..5].copy_from_slice(b"3.1.3");
        frame
    };
    proxy.on(Direction::ToClient, Method::CONNECTION_START, Action::Replace(Arc::new(other_version)));
    for url in [broker.url(), proxy.url()] {
        let timeout = (seconds * 1000.0) as i64;
        let queue =
            broker.declare("around").quorum().arg("x-consumer-timeout", AMQPValue::LongLongInt(timeout)).create();
        let bodies: Vec<String> = (0..100).map(|n| format!("message {n}")).collect();
        queue.publish_all(&bodies);
        queue.wait_ready(100);
        let start = |n: u32| {
            // On an idle machine half of the workers end right at the timeout; on a busy one, those of the other half
            // do, which end up to three seconds before it.
            let before = if n.is_multiple_of(2) { 0.06 - f64::from(n) * 0.0008 } else { 3.0 - f64::from(n) * 0.03 };
            let ends = seconds - before;
            worker(&queue).url(&url).shell(&format!("cat; sleep {ends:.4}")).spawn()
        };
        let workers: Vec<_> = (0..100).map(start).collect();
        let done: Vec<_> = workers.into_iter().map(|run| run.wait(PATIENCE * 4)).collect();
        queue.wait_consumers(0);
        let mut back = Vec::new();
        while let Some(got) = queue.get() {
            back.push(got.text());
        }
        let successes: Vec<_> = done.iter().filter(|run| run.status() == 0).map(|run| run.stdout_text()).collect();
        let false_ones: Vec<_> = successes.iter().filter(|body| back.contains(body)).collect();
        println!("{url}: {} exits of 0, {} messages back, {} false", successes.len(), back.len(), false_ones.len());
        assert!(false_ones.is_empty(), "{false_ones:?}");
        // An unconfirmed message may have been acknowledged, but a message that isn't may not be gone.
        let undone = done.iter().filter(|run| run.status() != 0).count();
        assert!(back.len() <= undone, "{} back, {undone} undone", back.len());
    }
}

#[test]
fn a_failure_goes_back_or_is_dead_lettered_as_the_options_say() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let dead = broker.queue("dead");
        let queue = broker.declare("failures").kind(kind).dead_letter_to(&dead).create();
        queue.publish("body");
        let fail = |status: i32, options: &[&str]| {
            let run = worker(&queue).args(options).shell(&format!("exit {status}"));
            run.run().status()
        };
        assert_eq!(fail(3, &[]), 3);
        queue.wait_ready(1);
        assert_eq!(fail(3, &["--failure-exit-code", "9"]), 9);
        queue.wait_ready(1);
        assert_eq!(fail(66, &["--reject-on", "65,100-120"]), 66);
        queue.wait_ready(1);
        let rejected: [(i32, &[&str], i32); 3] = [
            (65, &["--reject-on", "65,100-120"], 65),
            (110, &["--reject-on", "65,100-120", "--reject-exit-code", "0"], 0),
            // With one attempt, a queue that doesn't count will do.
            (3, &["--max-attempts", "1"], 3),
        ];
        for (status, options, expected) in rejected {
            assert_eq!(fail(status, options), expected, "{options:?}");
            assert_eq!(dead.wait_get().text(), "body", "{options:?}");
            assert_eq!(queue.ready(), 0, "{options:?}");
            queue.publish("body");
        }
    }
}

#[test]
fn the_last_of_max_attempts_is_dead_lettered_and_evictions_do_not_count_from_4_3_on() {
    let broker = Broker::shared();
    let dead = broker.queue("dead");
    let queue = broker.declare("attempts").quorum().dead_letter_to(&dead).create();
    let attempt = || worker(&queue).args(["--max-attempts", "2"]);

    queue.publish("fails twice");
    attempt().shell("exit 3").run().assert_status(3);
    queue.wait_ready(1);
    attempt().shell("exit 3").run().assert_status(3);
    assert_eq!(dead.wait_get().text(), "fails twice");

    queue.publish("evicted, then fails");
    let run = attempt().shell("echo started; exec sleep 60").spawn();
    wait_started(&run);
    run.signal(Signal::SIGTERM);
    run.wait(PATIENCE).assert_status(143);
    queue.wait_ready(1);
    attempt().shell("exit 3").run().assert_status(3);
    if broker.version() >= (4, 3, 0) {
        queue.wait_ready(1);
        attempt().shell("exit 3").run().assert_status(3);
    }
    assert_eq!(dead.wait_get().text(), "evicted, then fails");
}

#[test]
fn failures_on_another_queue_are_no_attempts_on_this_one() {
    let broker = Broker::shared();
    let dead = broker.queue("dead");
    let queue = broker.declare("moved").quorum().dead_letter_to(&dead).create();
    // A shovel that moves a dead-lettered message back copies these headers.
    let mut headers = FieldTable::default();
    for count in ["x-acquired-count", "x-delivery-count"] {
        headers.insert(count.into(), AMQPValue::LongLongInt(7));
    }
    queue.publish_with(BasicProperties::default().with_headers(headers), "body");
    let attempt = || worker(&queue).args(["--max-attempts", "2"]);
    if broker.version() >= (4, 3, 0) {
        // An eviction isn't counted, so the message still has the copied count.
        let run = attempt().shell("echo started; exec sleep 60").spawn();
        wait_started(&run);
        run.signal(Signal::SIGTERM);
        run.wait(PATIENCE).assert_status(143);
        queue.wait_ready(1);
    }
    attempt().shell("exit 3").run().assert_status(3);
    queue.wait_ready(1);
    attempt().shell("exit 3").run().assert_status(3);
    assert_eq!(dead.wait_get().text(), "body");
}

#[test]
fn a_classic_queue_does_not_count_so_more_than_one_attempt_never_rejects() {
    let broker = Broker::shared();
    let dead = broker.queue("dead");
    let queue = broker.declare("uncounted").dead_letter_to(&dead).create();
    queue.publish("body");
    for attempt in 1..=3 {
        let run = worker(&queue).args(["--max-attempts", "2"]).shell("exit 3").run();
        run.assert_status(3);
        if attempt > 1 {
            run.assert_stderr("--max-attempts 2 has no effect");
        }
        queue.wait_ready(1);
    }
    assert_eq!(dead.ready(), 0);
}

#[test]
fn count_takes_so_many_and_leaves_the_others_untouched() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let queue = broker.declare("count").kind(kind).create();
        queue.publish_all((1..=5).map(|n| format!("{n} ")));
        let run = worker(&queue).args(["-c", "3", "cat"]).run();
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "1 2 3 ");
        queue.wait_ready(2);
        assert!(!queue.get().unwrap().redelivered);
        assert!(!queue.get().unwrap().redelivered);
    }
}

#[test]
fn a_failed_command_ends_count_and_drain_with_its_status() {
    let broker = Broker::shared();
    let endless: [&[&str]; 3] = [&["-c", "0"], &["--drain"], &["-c", "9"]];
    for options in endless {
        let queue = broker.queue("ends");
        queue.publish_all(["good", "bad", "untouched"]);
        let run = worker(&queue).args(options).shell("read body; [ $body != bad ] || exit 7").run();
        run.assert_status(7);
        queue.wait_ready(2);
        let mut left = [queue.get().unwrap(), queue.get().unwrap()];
        left.sort_by_key(|got| got.text());
        let [bad, untouched] = left;
        assert_eq!((bad.text().as_str(), bad.redelivered), ("bad", true));
        assert!(!untouched.redelivered, "{options:?}");
    }
}

#[test]
fn a_dead_lettered_message_that_counts_as_done_ends_neither_count_nor_drain() {
    let broker = Broker::shared();
    let options: [&[&str]; 2] = [&["-c", "3"], &["--drain"]];
    for options in options {
        let dead = broker.queue("dead");
        let queue = broker.declare("goes-on").quorum().dead_letter_to(&dead).create();
        queue.publish_all(["good ", "bad ", "last "]);
        queue.wait_ready(3);
        let run = worker(&queue)
            .args(options)
            .args(["--reject-on", "65", "--reject-exit-code", "0"])
            .shell("read body; echo $body; [ $body != bad ] || exit 65")
            .run();
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "good\nbad\nlast\n", "{options:?}");
        assert_eq!(dead.wait_get().text(), "bad ");
        assert_eq!(queue.ready(), 0);
    }
}

#[test]
fn drain_works_until_the_queue_is_empty() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let queue = broker.declare("drain").kind(kind).create();
        let drain = || worker(&queue).args(["--drain", "cat"]);
        let run = drain().run();
        run.assert_status(0).assert_stderr("is empty");
        queue.publish_all((0..4).map(|n| n.to_string()));
        queue.wait_ready(4);
        let run = drain().run();
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "0123");
        assert_eq!(queue.ready(), 0);
    }
}

#[test]
fn several_drain_one_queue_and_each_message_is_done_once() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let queue = broker.declare("together").kind(kind).create();
        queue.publish_all((0..40).map(|n| format!("{n:02} ")));
        queue.wait_ready(40);
        let drain = || worker(&queue).args(["--drain", "cat"]).spawn();
        let runs = [drain(), drain(), drain()];
        let mut done = String::new();
        for run in runs {
            let run = run.wait(PATIENCE);
            run.assert_status(0);
            done += &run.stdout_text();
        }
        let mut done: Vec<_> = done.split_whitespace().collect();
        done.sort_unstable();
        let all: Vec<_> = (0..40).map(|n| format!("{n:02}")).collect();
        assert_eq!(done, all);
    }
}

#[test]
fn ready_messages_that_are_another_consumers_turn_are_no_empty_queue() {
    let broker = Broker::shared();
    let queue = broker.declare("single").quorum().arg("x-single-active-consumer", true).create();
    let active = queue.consume(false);
    queue.publish_all((0..4).map(|n| n.to_string()));
    queue.wait_ready(3);
    let proxy = Proxy::of(broker);
    let run = behind(&proxy, &queue).args(["--drain", "cat"]).spawn();
    // qconsume has checked the queue several times, and saw three ready messages each time.
    proxy.wait_for_nth(Direction::ToClient, Method::QUEUE_DECLARE_OK, 4);
    assert!(!run.has_ended());
    active.close().unwrap();
    let run = run.wait(PATIENCE);
    run.assert_status(0);
    assert_eq!(run.stdout_text().len(), 4);
    assert_eq!(queue.ready(), 0);
}

#[test]
fn a_count_without_any_consumer_does_not_mean_an_empty_queue() {
    let broker = Broker::shared();
    let queue = broker.queue("unknown");
    let proxy = Proxy::of(broker);
    // If a quorum queue doesn't answer in time, the broker reports no messages and no consumers.
    let nothing = |frame: &[u8]| {
        let mut frame = frame.to_vec();
        let end = frame.len() - 1;
        frame[end - 8..end].fill(0);
        frame
    };
    let nothing = Action::Replace(Arc::new(nothing));
    proxy.once(Direction::ToClient, Method::QUEUE_DECLARE_OK, nothing);
    let run = behind(&proxy, &queue).args(["--drain", "cat"]).run();
    run.assert_status(0);
    let looks = proxy.count(Direction::ToClient, Method::QUEUE_DECLARE_OK);
    assert_eq!(looks, 2, "the first answer was taken for an empty queue");
}

#[test]
fn only_time_in_which_a_message_could_have_come_counts_towards_the_wait() {
    let broker = Broker::shared();
    let queue = broker.queue("patience");
    let proxy = Proxy::of(broker);
    // The broker's first heartbeat comes three to six seconds after the handshake.
    let cut = Action::CutAfter;
    proxy.once(Direction::ToClient, Method::HEARTBEAT, cut);
    let running = behind(&proxy, &queue)
        .args(["--wait", "12s", "--heartbeat", "6"])
        .args(["--log-level", "debug", "cat"])
        .spawn();
    proxy.wait_for(Direction::ToClient, Method::HEARTBEAT);
    proxy.refuse();
    // Eight attempts and the pauses between them take at least four and a half seconds.
    let attempts = || running.stderr().matches("; trying again").count();
    assert!(eventually(PATIENCE, || attempts() >= 8));
    proxy.pass();
    running.wait(PATIENCE).assert_status(66);

    let at = |connection, direction, method| {
        let mut seen = proxy.seen().into_iter();
        let found = seen.find(|seen| (seen.connection, seen.direction, seen.method) == (connection, direction, method));
        found.expect("the proxy saw it").at
    };
    let last = proxy.accepted();
    let registered = |connection| at(connection, Direction::ToClient, Method::BASIC_CONSUME_OK);
    let first = at(1, Direction::ToClient, Method::HEARTBEAT) - registered(1);
    let second = at(last, Direction::ToBroker, Method::BASIC_CANCEL) - registered(last);
    let (first, second) = (first.as_secs_f64(), second.as_secs_f64());
    // If the pause between the connections counted, the sum would be 7.5 s at most; if the first part didn't count, the
    // second alone would be 12 s. The worker notices each end a little later than the proxy.
    assert!(first + second >= 9.0, "{first} and {second}");
    assert!(second < 12.0, "{first} and {second}");
}

#[test]
fn a_message_that_comes_between_the_look_and_the_cancel_is_run() {
    let broker = Broker::shared();
    // The message comes after the reason to cancel: the answer that the queue is empty, or the end of the wait.
    let cases: [(&[&str], _); 2] =
        [(&["--drain"], Method::QUEUE_DECLARE_OK), (&["--wait", "200ms"], Method::BASIC_DELIVER)];
    for (options, held) in cases {
        let (run, queue) = in_time(|| {
            let queue = broker.queue("between");
            let proxy = Proxy::of(broker);
            proxy.once(Direction::ToClient, held, Action::Hold);
            let run = behind(&proxy, &queue).args(options).arg("cat").spawn();
            if held == Method::QUEUE_DECLARE_OK {
                proxy.wait_for(Direction::ToClient, held);
                queue.publish("just in time");
            } else {
                queue.publish("just in time");
                proxy.wait_for(Direction::ToBroker, Method::BASIC_CANCEL);
            }
            proxy.release();
            let run = run.wait(PATIENCE);
            // 66: the broker didn't answer the cancel in time.
            (run.status() != 66).then_some((run, queue))
        });
        run.assert_status(0);
        assert_eq!(run.stdout_text(), "just in time");
        assert_eq!(queue.ready(), 0);
    }
}

#[test]
fn wait_lengthens_drain() {
    let broker = Broker::shared();
    let queue = broker.queue("patient");
    let run = worker(&queue).args(["--drain", "--wait", "8s", "cat"]).spawn();
    queue.wait_consumers(1);
    queue.publish("late");
    let run = run.wait(PATIENCE);
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "late");
    assert!(run.wall >= Duration::from_secs(8), "{:?}", run.wall);
}

#[test]
fn a_signal_in_the_middle_of_a_count_is_no_completion_though_the_message_is_done() {
    let broker = Broker::shared();
    let cases = [("trap 'exit 0' TERM; echo started; sleep 60 & wait", 4), ("echo started; exec sleep 60", 5)];
    for (script, left) in cases {
        let queue = broker.queue("middle");
        queue.publish_all(["1", "2", "3", "4", "5"]);
        let run = worker(&queue).args(["--count", "5"]).shell(script).spawn();
        wait_started(&run);
        run.signal(Signal::SIGTERM);
        run.wait(PATIENCE).assert_status(143);
        queue.wait_ready(left);
        let got: Vec<_> = (0..left).map(|_| queue.get().unwrap().redelivered).collect();
        let returned = got.iter().filter(|redelivered| **redelivered).count();
        assert_eq!(returned, left as usize - 4, "a message that was never run is marked as redelivered");
    }
}

#[test]
fn no_message_is_prefetched_while_a_command_runs() {
    let broker = Broker::shared();
    for kind in QueueKind::ALL {
        let queue = broker.declare("behind").kind(kind).create();
        queue.publish_all(["a", "b", "c"]);
        queue.wait_ready(3);
        let file = a_file();
        let run = worker(&queue).args(["-c", "0"]).shell(&until_there(&file)).spawn();
        wait_started(&run);
        queue.wait_ready(2);
        let other = worker(&queue).args(["-c", "2", "cat"]).run();
        other.assert_status(0);
        assert_eq!(other.stdout_text(), "bc");
        std::fs::write(&file, "").unwrap();
        run.wait_for_stderr("message acknowledged", PATIENCE);
        run.signal(Signal::SIGTERM);
        run.wait(PATIENCE).assert_status(143);
        assert_eq!(queue.ready(), 0);
    }
}

#[test]
fn many_workers_use_up_no_attempts_of_messages_that_they_do_not_run() {
    const MESSAGES: usize = 200;
    const WORKERS: usize = 24;
    let broker = Broker::shared();
    let scripts = [
        "echo $MESSAGE_REDELIVERED",
        // Every tenth message fails once.
        "read n; case $n$MESSAGE_ATTEMPT in *01) echo failed; exit 1;; esac; echo done",
    ];
    for script in scripts {
        let dead = broker.queue("dead");
        let queue = broker.declare("many").quorum().arg("x-delivery-limit", 2).dead_letter_to(&dead).create();
        queue.publish_all((0..MESSAGES).map(|n| n.to_string()));
        queue.wait_ready(MESSAGES as u32);
        let lines: Vec<String> = std::thread::scope(|scope| {
            let slots: Vec<_> = (0..WORKERS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut lines = Vec::new();
                        loop {
                            let run = worker(&queue).args(["--wait", "1s"]).shell(script).spawn().wait(3 * PATIENCE);
                            match run.status() {
                                0 | 1 => lines.push(run.stdout_text().trim().to_owned()),
                                66 => return lines,
                                _ => panic!("{}", run.stderr),
                            }
                        }
                    })
                })
                .collect();
            let join = |slot: std::thread::ScopedJoinHandle<'_, Vec<String>>| slot.join().unwrap();
            slots.into_iter().flat_map(join).collect()
        });
        let count = |text: &str| lines.iter().filter(|line| *line == text).count();
        if script.contains("REDELIVERED") {
            assert_eq!(count("false"), MESSAGES);
            assert_eq!(lines.len(), MESSAGES, "some were delivered twice");
        } else {
            assert_eq!(count("done"), MESSAGES);
            assert_eq!(count("failed"), MESSAGES / 10);
        }
        assert_eq!((queue.ready(), dead.ready()), (0, 0));
    }
}

/// Always fails if the body is "bad", and fails once if it begins with "late".
const SOME_FAIL: &str = r#"read -r body; case $body in bad) exit 3;; late*) [ "$MESSAGE_ATTEMPT" -gt 1 ];; esac"#;

#[test]
fn with_keep_going_a_failure_does_not_end_the_run() {
    let broker = Broker::shared();
    let dead = broker.queue("dead");
    let queue = || broker.declare("going").quorum().dead_letter_to(&dead).create();
    let run = |queue: &Queue, options: &[&str]| {
        let options = [&["--keep-going", "--max-attempts", "3"], options].concat();
        worker(queue).args(options).shell(SOME_FAIL).run()
    };
    let four_late = ["late 1", "a", "late 2", "b", "late 3", "c", "late 4", "d"];

    let late = queue();
    late.publish_all(four_late);
    run(&late, &["--drain"]).assert_status(0).assert_stderr("is empty (8 acknowledged, 4 requeued)");
    assert_eq!((late.ready(), dead.ready()), (0, 0));

    for (options, status) in [
        (&["--drain"][..], 1),
        (&["--drain", "--reject-exit-code", "65"], 65),
        (&["--drain", "--reject-exit-code", "0"], 0),
        (&["--count", "3"], 1),
    ] {
        let bad = queue();
        bad.publish_all(["a", "bad", "b"]);
        run(&bad, options)
            .assert_status(status)
            .assert_stderr(": 1 message was dead-lettered; ")
            .assert_stderr(" (2 acknowledged, 2 requeued)");
        assert_eq!(bad.ready(), 0, "{options:?}");
        assert_eq!(dead.wait_get().text(), "bad", "{options:?}");
    }

    // --count counts the messages that were processed, not the failures in between.
    let counted = queue();
    counted.publish_all(four_late);
    run(&counted, &["--count", "8"]).assert_status(0).assert_stderr("(8 acknowledged, 4 requeued)");
}

#[test]
fn with_keep_going_a_dead_letter_is_not_forgotten_when_a_signal_ends_the_run() {
    let broker = Broker::shared();
    let dead = broker.queue("dead");
    let queue = broker.declare("going").quorum().dead_letter_to(&dead).create();
    queue.publish("bad");
    let running = worker(&queue)
        .args(["--keep-going", "--max-attempts", "1", "-c", "0"])
        .args(["--reject-exit-code", "65"])
        .shell(SOME_FAIL)
        .spawn();
    assert_eq!(dead.wait_get().text(), "bad");
    running.wait_for_stderr("dead-lettered", PATIENCE);
    running.signal(Signal::SIGTERM);
    running.wait(PATIENCE).assert_status(65).assert_stderr("1 message was dead-lettered; stopped by SIGTERM");
}

#[test]
fn with_keep_going_a_queue_that_does_not_count_ends_the_run_at_a_second_failure() {
    let broker = Broker::shared();
    let queue = broker.queue("uncounted");
    queue.publish("bad");
    worker(&queue)
        .args(["--keep-going", "--max-attempts", "3", "--drain"])
        .shell(SOME_FAIL)
        .run()
        .assert_status(3)
        .assert_stderr("this queue doesn't count failures");
    queue.wait_ready(1);
}

#[test]
fn the_url_file_is_read_again_for_each_new_connection() {
    let broker = Broker::shared();
    let queue = broker.queue("rotated");
    queue.publish("body");
    let proxy = Proxy::of(broker);
    let file = temp_folder("rotated").join("url");
    std::fs::write(&file, proxy.url()).unwrap();
    proxy.refuse();
    let running = qconsume().queue(queue.name()).env("BROKER_URL_FILE", &file).arg("cat").spawn();
    running.wait_for_stderr("trying again", PATIENCE);
    // The secret changes while the old broker is gone.
    std::fs::write(&file, format!("{}\n", broker.url())).unwrap();
    let done = running.wait(PATIENCE);
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "body");
}

#[test]
fn a_wait_is_a_bound_whatever_the_queue_says_of_itself() {
    let broker = Broker::shared();
    let standby = broker.declare("standby").quorum().arg("x-single-active-consumer", true).create();
    let _active = standby.consume(false);
    standby.publish_all(["held by the active consumer", "ready"]);
    standby.wait_ready(1);
    worker(&standby).args(["--wait", "1s", "cat"]).run().assert_status(66).assert_stderr("within 1s (--wait)");
}

#[test]
fn a_stream_is_refused_before_anything_is_taken() {
    let broker = Broker::shared();
    // RabbitMQ cuts its refusal short after 255 bytes.
    for name in ["stream", &"long".repeat(50)] {
        let stream = broker.declare(name).arg("x-queue-type", LongString::from("stream")).create();
        stream.publish("kept");
        let ways = [&[][..], &["--drain"], &["--wait", "1s"], &["--declare"], &["--ack-timeout", "1m"], &["--no-ack"]];
        for options in ways {
            let done = worker(&stream).args(options).args(["echo", "started"]).run();
            done.assert_status(78).assert_stderr("is a stream").assert_stderr("quorum queue");
            assert_eq!(done.stdout_text(), "", "{options:?}");
        }
    }
}

#[test]
fn a_part_of_a_message_never_looks_like_all_of_it() {
    // The smaller body is in a pipe, the larger one in a file.
    for size in [300_000, 3_000_000] {
        let queue = Broker::shared().queue("whole");
        queue.publish("x".repeat(size));
        // The kernel kills the command together with qconsume. Its child survives, and then reads.
        let reader =
            "exec 3<&0; (while kill -0 $PPID 2>/dev/null; do sleep 0.01; done; wc -c <&3) & echo started >&2; wait";
        let running = worker(&queue).shell(reader).spawn();
        running.wait_for_stderr("started", PATIENCE);
        running.signal(Signal::SIGKILL);
        running.finish(PATIENCE);
        running.wait_for_stdout(&format!("{size}\n"), PATIENCE);
        queue.wait_ready(1);
    }
}

/// After a requeue the next consumer uses the same connection. What the broker still sends to the previous one mustn't count
/// for the next message: before its channel is closed it may be cancelled, or its channel be closed by the broker.
#[test]
fn what_comes_late_for_the_previous_consumer_does_not_concern_the_next_message() {
    let cancelled = |channel| {
        frames::method_frame(channel, Method::BASIC_CANCEL, &[&frames::short(b"qconsume")[..], &[1]].concat())
    };
    let timed_out = |channel| {
        frames::channel_close(channel, 406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out")
    };
    let run = |late: Method, nth, sends: fn(u16) -> Vec<u8>, before: bool| {
        let peer = Peer::new(move |request| {
            let first = request.connection == 1 && request.nth == 1;
            match request.method {
                Method::BASIC_CONSUME => {
                    let body: &[u8] = if first { b"bad" } else { b"good" };
                    let message = peer::counted_message(request.channel, 1, true, &[("x-delivery-count", 1)], body);
                    Answer::Bytes([peer::usual(request), message].concat())
                }
                // A close that crosses the peer's gets no reply.
                Method::CHANNEL_CLOSE if request.connection == 1 && late == Method::BASIC_QOS => {
                    Answer::Bytes(Vec::new())
                }
                method if method == late && (request.connection, request.nth) == (1, nth) => {
                    let (late, usual) = (sends(request.channel), peer::usual(request));
                    Answer::Bytes(if before { [late, usual] } else { [usual, late] }.concat())
                }
                _ => Answer::Usual,
            }
        });
        let options = ["--count", "1", "--keep-going", "--max-attempts", "9", "--log-level", "debug"];
        let done = qconsume().url(&peer.url()).queue("q").args(options).shell("grep -q good && sleep 0.2").run();
        done.assert_status(0).assert_stderr("message requeued").assert_stderr("message acknowledged");
        (done, peer.count(Method::CONNECTION_OPEN))
    };
    // The second basic.qos is the barrier.
    let (done, connections) = run(Method::BASIC_QOS, 2, timed_out, false);
    done.assert_stderr("the broker closed the channel of the previous message, or the connection: PRECONDITION_FAILED");
    assert_eq!(connections, 2);
    let (_, connections) = run(Method::CHANNEL_CLOSE, 1, cancelled, true);
    assert_eq!(connections, 1);
}

#[test]
fn a_run_that_ends_by_its_count_does_not_call_the_queue_empty() {
    let queue = Broker::shared().declare("counted").quorum().create();
    queue.publish_all(["one", "two", "three"]);
    let options = ["--drain", "--count", "2", "--keep-going", "--max-attempts", "1", "cat"];
    let run = worker(&queue).args(options).run();
    run.assert_status(0).assert_stderr("processed all messages that --count asked for");
    queue.wait_ready(1);
}

#[test]
fn the_last_line_says_that_the_delivery_limit_may_drop_a_requeued_message() {
    const MAY_DROP: &str =
        "message requeued; if the queue's delivery-limit is 20 (the default), the queue drops or dead-letters it";
    let broker = Broker::shared();
    // Before 4.0 a queue has no limit unless it is set.
    let limited = broker.version() >= (4, 0, 0);
    let queue = broker.declare("default-limit").quorum().create();
    queue.publish("fails");
    for failures in 0..=20 {
        let done = worker(&queue).arg("false").run();
        done.assert_status(1).assert_stderr("message requeued");
        let said = done.stderr.contains(MAY_DROP);
        assert_eq!(said, limited && failures == 20, "{failures} {done:?}");
    }
    // With a broker that has the limit, the message is gone by now.
    worker(&queue).args(["--wait", "1s", "true"]).run().assert_status(if limited { 66 } else { 0 });
}
