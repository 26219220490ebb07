//! Brokers and queues that can't be reached or used: which status, and how soon.

use crate::common::{User, Vhost, behind, private_broker, qconsume, qpublish, worker};
use std::{
    io::Read,
    net::{Ipv6Addr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};
use testbed::{
    Action, Broker,
    Direction::{ToBroker, ToClient},
    Finished, FullBacklog, Method, PATIENCE, Program, Proxy, Signal, frames, missing,
    peer::{Answer, Peer},
    reserve_port,
};

/// How much longer it may take, on a machine that is busy with other things.
const SLACK: Duration = Duration::from_secs(20);

/// Runs it against what never works, and checks that it has tried for as long as it was told to, and no longer.
#[track_caller]
fn gives_up(program: Program, status: i32, says: &str) -> Finished {
    gives_up_after(Duration::from_secs(4), program, status, says)
}

#[track_caller]
fn gives_up_after(limit: Duration, program: Program, status: i32, says: &str) -> Finished {
    let done = program
        .args(["--connect-timeout", &format!("{limit:?}")])
        .args(["--", "touch", "/proc/never/run"])
        .spawn()
        .wait(limit + PATIENCE);
    done.assert_status(status)
        .assert_stderr(&format!("gave up after {limit:?} (--connect-timeout)"))
        .assert_stderr(says);
    assert!(done.wall >= limit, "gave up after {:?}", done.wall);
    assert!(done.wall < limit + SLACK, "gave up only after {:?}", done.wall);
    done
}

/// Runs it against what is no use trying again, and checks that it says so at once.
#[track_caller]
fn ends_at_once(program: Program, status: i32, says: &str) {
    let done = program.args(["--connect-timeout", "60s", "--", "touch", "/proc/never/run"]).run();
    done.assert_status(status).assert_stderr(says);
    assert!(done.wall < SLACK, "ended only after {:?}", done.wall);
}

fn at(address: SocketAddr) -> Program {
    qconsume().queue("q").url(&format!("amqp://guest:guest@{address}"))
}

#[test]
fn a_queue_that_is_missing_is_78_after_the_connect_timeout() {
    let queue = Broker::shared().declare("missing").absent();
    let done = gives_up(worker(&queue), 78, "there is no queue");
    let said = done.stderr.matches("there is no queue").count();
    assert_eq!(said, 2, "not once at once and once at the end:\n{}", done.stderr);
}

#[test]
fn a_queue_that_is_declared_later_is_waited_for() {
    for kind in testbed::QueueKind::ALL {
        let absent = Broker::shared().declare("declared-later").absent();
        let running = worker(&absent).args(["--", "cat"]).spawn();
        running.wait_for_stderr("there is no queue", PATIENCE);
        let queue = Broker::shared().declare("").exact_name(absent.name());
        let queue = queue.kind(kind).create();
        queue.publish("honeydew");
        let done = running.wait(PATIENCE);
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "honeydew");
    }
}

#[test]
fn a_wrong_password_is_77_at_once_and_is_not_shown() {
    let broker = Broker::shared();
    let url = broker.url_for("guest", "wr0ng-hunter2", "/");
    let program = qconsume().queue("q").url(&url);
    ends_at_once(program.clone(), 77, "check the user and the password");
    let done = program.args(["--log-level", "debug", "cat"]).run();
    done.assert_status(77);
    assert!(!done.stderr.contains("hunter2"), "{}", done.stderr);
    let unknown = broker.url_for("nobody-here", "x", "/");
    ends_at_once(qconsume().queue("q").url(&unknown), 77, "\"nobody-here\"");
}

#[test]
fn an_unknown_virtual_host_is_78_at_once() {
    let url = Broker::shared().url_for("guest", "guest", "no such host");
    ends_at_once(qconsume().queue("q").url(&url), 78, "no virtual host \"no such host\"");
}

#[test]
fn a_broker_that_refuses_and_hangs_up_is_understood_each_time() {
    let proxy = Proxy::of(Broker::shared());
    proxy.on(ToClient, Method::CONNECTION_CLOSE, Action::CutAfter);
    // A peer that no RabbitMQ is: it closes right behind its refusal.
    let text = "NOT_ALLOWED - vhost no-such-host not found";
    let peer = Peer::new(move |request| match request.method {
        Method::CONNECTION_OPEN => Answer::Last(frames::connection_close(530, text)),
        _ => Answer::Usual,
    });
    for url in [Broker::shared().url(), proxy.url(), peer.url()] {
        let url = format!("{url}/no-such-host");
        for _ in 0..20 {
            let done = qconsume().queue("q").url(&url).arg("cat").run();
            done.assert_status(78).assert_stderr("no virtual host \"no-such-host\"");
            assert!(!done.stderr.contains("trying again"), "{}", done.stderr);
        }
    }
}

#[test]
fn a_limit_of_channels_is_69_at_the_connect_timeout_and_named() {
    let broker = private_broker();
    let user = User::new(&broker, "silent", "silent").may([".*"; 3]);
    let limits = ["set_user_limits", "silent", r#"{"max-channels": 0}"#];
    broker.ctl(&limits).unwrap();
    let url = user.url("/");
    gives_up(
        qconsume().queue("q").url(&url),
        69,
        // RabbitMQ 4.0 names its node where the user's name should be.
        "has reached the maximum allowed user limit of",
    );
}

#[test]
fn a_reserved_name_is_78_at_once() {
    let url = Broker::shared().url();
    const ADVICE: &str = "names that begin with amq. are the broker's own";
    for option in ["--declare", "--exclusive"] {
        ends_at_once(qconsume().url(&url).queue("amq.mine").arg(option), 78, ADVICE);
    }
    let publishes = qpublish().url(&url).args(["-q", "amq.mine", "--declare", "-b", "apple"]);
    publishes.run().assert_status(78).assert_stderr(ADVICE);
}

#[test]
fn an_exchange_that_is_missing_is_told_as_such_and_asked_for_again() {
    let program = qconsume().url(&Broker::shared().url()).args(["-e", "not-there", "-r", "key"]);
    let done = gives_up(program, 78, "there is no exchange \"not-there\" to bind queue");
    assert!(!done.stderr.contains("there is no queue"), "{}", done.stderr);
}

#[test]
fn an_internal_exchange_is_78() {
    let broker = private_broker();
    let declare = "rabbit_exchange:declare(rabbit_misc:r(<<\"/\">>, exchange, <<\"inside\">>), direct, true, false, true, [], \
                   <<\"guest\">>).";
    broker.ctl(&["eval", declare]).unwrap();
    let publishes = qpublish().url(&broker.url()).args(["-e", "inside", "-r", "key", "-b", "apple"]);
    publishes.run().assert_status(78).assert_stderr("exchange \"inside\" is internal");
}

#[test]
fn a_limit_of_connections_is_69_although_a_long_name_pushes_it_out_of_the_text() {
    let broker = private_broker();
    let name = "v".repeat(221);
    let vhost = Vhost::new(&broker, Box::leak(name.into_boxed_str()));
    broker.ctl(&["set_permissions", "-p", vhost.name, "guest", ".*", ".*", ".*"]).unwrap();
    broker.ctl(&["set_vhost_limits", "-p", vhost.name, r#"{"max-connections": 0}"#]).unwrap();
    let url = broker.url_for("guest", "guest", vhost.name);
    gives_up(qconsume().queue("q").url(&url), 69, "NOT_ALLOWED - access to vhost 'vvv");
}

#[test]
fn an_exclusive_consumer_of_a_queue_with_a_long_name_is_78_at_once() {
    let name = "n".repeat(242);
    let queue = Broker::shared().declare("").exact_name(&name).create();
    let _consumer = queue.consume(true);
    ends_at_once(worker(&queue), 78, "has an exclusive consumer");
}

#[test]
fn a_frame_max_that_the_broker_does_not_take_is_78() {
    // One of its own, as nobody else can connect to it then.
    let broker = Broker::start();
    let at = |query: &str| qconsume().url(&format!("{}{query}", broker.url())).queue("q");
    // 4.0.5 still takes it.
    if broker.version() >= (4, 1, 0) {
        ends_at_once(at("?frame_max=4096"), 78, "the URL asks for 4096");
    }
    broker.ctl(&["eval", "application:set_env(rabbit, frame_max, 4096)."]).unwrap();
    ends_at_once(at(""), 78, "its frame_max is 4096 bytes");
}

#[test]
fn missing_permissions_are_77_at_once() {
    let broker = private_broker();
    let queue = broker.queue("unreadable");
    queue.publish("apple");
    let user = User::new(&broker, "writer", "writer").may([".*", ".*", "^$"]);
    let closed = Vhost::new(&broker, "closed");
    let at = |vhost| qconsume().url(&user.url(vhost)).queue(queue.name());
    ends_at_once(at("/"), 77, "user \"writer\" may not consume from queue");
    ends_at_once(at(closed.name), 77, "user \"writer\" may not use virtual host \"closed\"");
    assert!(!queue.get().expect("it is still there").redelivered);
}

#[test]
fn a_queue_of_another_connection_only_is_78_at_once() {
    let queue = Broker::shared().declare("exclusive").exclusive().create();
    ends_at_once(worker(&queue), 78, "exclusive to another connection");
}

#[test]
fn a_queue_with_an_exclusive_consumer_is_78_at_once() {
    // Of a classic queue: RabbitMQ grants no exclusivity on quorum queues.
    let queue = Broker::shared().queue("exclusive-consumer");
    let _consumer = queue.consume(true);
    ends_at_once(worker(&queue), 78, "has an exclusive consumer");
}

#[test]
fn a_broker_that_is_not_there_is_69_at_the_connect_timeout() {
    let port = reserve_port().unwrap();
    gives_up(at(([127, 0, 0, 1], port.number()).into()), 69, "refused");
}

#[test]
fn a_server_that_accepts_and_stays_silent_is_69_at_the_connect_timeout() {
    let done = gives_up(at(Proxy::silent().addr()), 69, "no answer while waiting for the AMQP handshake");
    assert!(!done.stderr.contains("guest:guest"));
}

#[test]
fn a_broker_that_falls_silent_during_the_handshake_is_69_at_the_connect_timeout() {
    let queue = Broker::shared().queue("half-way");
    for method in [Method::CONNECTION_START_OK, Method::CONNECTION_OPEN, Method::CHANNEL_OPEN, Method::BASIC_CONSUME] {
        let proxy = Proxy::of(Broker::shared());
        proxy.on(ToBroker, method, Action::Stall);
        let program = behind(&proxy, &queue);
        gives_up(program, 69, "no answer while");
        assert!(proxy.count(ToBroker, method) > 0);
    }
}

#[test]
fn a_server_that_closes_at_once_is_69_at_the_connect_timeout() {
    // By a reset, as there is nothing behind the proxy: it meets the handshake, or the dial already.
    let port = reserve_port().unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], port.number()).into());
    // Long enough for several attempts where each takes seconds.
    let limit = Duration::from_secs(10);
    gives_up_after(limit, at(proxy.addr()), 69, "trying again for up to");
    assert!(proxy.accepted() > 2, "it was tried {} times only", proxy.accepted());
    assert!(proxy.accepted() < 18, "it was tried {} times", proxy.accepted());

    // In order: it reads the greeting and says nothing to it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut connection = connection;
            let _ = connection.read(&mut [0; 64]);
        }
    });
    gives_up(at(address), 69, "the connection was closed during the AMQP handshake");
}

#[test]
fn an_address_that_swallows_packets_is_69_at_the_connect_timeout() {
    gives_up(at(FullBacklog::start().addr()), 69, "no answer while connecting to");
}

#[test]
fn a_name_that_does_not_resolve_is_69_at_the_connect_timeout() {
    let program = qconsume().queue("q").url("amqp://no-such-host.invalid");
    gives_up(program, 69, "look");
}

#[test]
fn what_is_no_amqp_is_said_to_be_none() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        use std::io::Write;
        for mut connection in listener.incoming().flatten() {
            let _ = connection.read(&mut [0; 64]);
            let _ = connection.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    ends_at_once(at(address), 78, "what answers isn't AMQP");
}

#[test]
fn where_one_node_is_gone_another_serves() {
    let queue = Broker::shared().queue("nodes");
    let good = Broker::shared().url();
    let refusing = reserve_port().unwrap();
    let refusing = format!("amqp://guest:guest@127.0.0.1:{}", refusing.number());
    let full = FullBacklog::start();
    let swallowing = format!("{}?connection_timeout=200", full.url());
    for nodes in [
        vec![&refusing, &good],
        vec![&swallowing, &good],
        vec![&refusing, &swallowing, &refusing, &good],
        vec![&good, &refusing],
    ] {
        let urls = nodes.iter().map(|url| url.as_str()).collect::<Vec<_>>().join(",");
        queue.publish("jackfruit");
        let done = qconsume().url(&urls).queue(queue.name()).arg("cat").run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "jackfruit");
    }
}

#[test]
fn where_a_node_is_silent_another_serves() {
    let queue = Broker::shared().queue("silent-node");
    queue.publish("kiwi");
    let by_way_of = |silent: &Proxy| {
        let urls = format!("{},{}", silent.url(), Broker::shared().url());
        let done = qconsume().url(&urls).queue(queue.name()).args(["--connect-timeout", "20s", "cat"]).run();
        done.assert_status(0).assert_stderr("no answer while");
        assert_eq!(done.stdout_text(), "kiwi");
    };
    by_way_of(&Proxy::silent());
    // From the middle of the handshake on.
    queue.publish("kiwi");
    let silent = Proxy::of(Broker::shared());
    silent.on(ToBroker, Method::CONNECTION_OPEN, Action::Stall);
    by_way_of(&silent);
}

#[test]
fn each_address_of_a_name_is_tried() {
    let broker = Broker::shared();
    let queue = broker.queue("localhost");
    let by_name = |port| broker.url().replace(&broker.addr().to_string(), &format!("localhost:{port}"));
    // The broker has an IPv4 address only, the proxy one of IPv6: whichever comes first, once it is the dead one.
    queue.publish("lemon");
    let url = by_name(broker.port());
    qconsume().url(&url).queue(queue.name()).arg("cat").run().assert_status(0);

    // musl, which the shipped programs have, takes the name's addresses from this file; what the build has left doesn't.
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let listed = |line: &str| line.starts_with("::1") && line.contains("localhost");
    if std::env::var_os("QCONSUME_BIN").is_some() && !hosts.lines().any(listed) {
        eprintln!("the second half is skipped: localhost has no IPv6 address in /etc/hosts");
        return;
    }
    let Ok(proxy) = Proxy::listen(Ipv6Addr::LOCALHOST.into(), Some(broker.addr())) else {
        return missing("IPv6 on loopback");
    };
    queue.publish("melon");
    let url = by_name(proxy.addr().port());
    qconsume().url(&url).queue(queue.name()).arg("cat").run().assert_status(0);
    assert_eq!(proxy.accepted(), 1);
}

#[test]
fn an_ipv6_address_works() {
    let broker = Broker::shared();
    let Ok(proxy) = Proxy::listen(Ipv6Addr::LOCALHOST.into(), Some(broker.addr())) else {
        return missing("IPv6 on loopback");
    };
    let queue = broker.queue("ipv6");
    queue.publish("nectarine");
    let url = broker.url_at(proxy.addr());
    assert!(url.contains("@[::1]:"), "{url}");
    let done = qconsume().url(&url).queue(queue.name()).arg("cat").run();
    done.assert_status(0);
    assert_eq!(done.stdout_text(), "nectarine");
    assert_eq!(proxy.accepted(), 1);
}

#[test]
fn names_that_contain_words_of_other_refusals_change_nothing() {
    let broker = private_broker();
    let limited = User::new(&broker, "credit-limit-svc", "x");
    let limits = Vhost::new(&broker, "limits");
    for vhost in ["/", limits.name] {
        let program = qconsume().queue("q").url(&limited.url(vhost));
        ends_at_once(program, 77, "may not use virtual host");
    }
    let other = User::new(&broker, "some-svc", "x");
    let program = qconsume().queue("q").url(&other.url(limits.name));
    ends_at_once(program, 77, "may not use virtual host \"limits\"");

    let program = qconsume().url(&broker.url()).queue("x down or inaccessible");
    gives_up(program, 78, "there is no queue \"x down or inaccessible\"");
}

#[test]
fn a_limit_of_queues_is_78_and_named() {
    let broker = private_broker();
    let vhost = Vhost::new(&broker, "no-more-queues").of("guest");
    let limits = r#"{"max-queues": 0}"#;
    broker.ctl(&["set_vhost_limits", "-p", vhost.name, limits]).unwrap();
    let url = broker.url_for("guest", "guest", vhost.name);
    let program = qconsume().queue("q").url(&url).arg("--declare");
    ends_at_once(program, 78, "is reached");
    let program = qpublish().url(&url).args(["-q", "q", "--declare", "apple"]);
    let done = program.run();
    done.assert_status(78).assert_stderr("is reached");
    assert!(!done.stderr.contains("another kind"), "{}", done.stderr);
}

#[test]
fn credentials_that_no_handshake_frame_holds_are_78_and_named() {
    let broker = Broker::shared();
    let size = if broker.version() < (4, 0, 0) { 6000 } else { 9000 };
    let url = broker.url_for("guest", &"j".repeat(size), "/");
    let says = "user and password have";
    ends_at_once(qconsume().queue("q").url(&url), 78, says);
    let done = qpublish().url(&url).args(["-q", "q", "apple"]).run();
    done.assert_status(78).assert_stderr(says);
    assert!(!done.stderr.contains("jjjj"), "{}", done.stderr);
}

#[test]
fn every_orderly_end_without_a_message_says_goodbye() {
    // One of its own, for its log.
    let broker = Broker::start();
    let at = |queue: &str| qconsume().url(&broker.url()).queue(queue);
    // How many open connections have ended, by what the broker says of their names, which end with the queue's.
    let ended = |level: &str, queue: &str| {
        let name = format!(" {queue}, vhost: ");
        let log = broker.log();
        let ends = log
            .lines()
            .filter(|line| line.contains(level) && line.contains("closing AMQP connection") && line.contains(&name));
        ends.count()
    };
    let with_goodbye = |queue: &str| ended("[info]", queue);
    let without = |queue: &str| ended("[warning]", queue);
    let [waited, stopped, killed] = ["waited", "stopped", "killed"].map(|name| broker.queue(name));

    let options = ["--connect-timeout", "5s", "cat"];
    at("not-there").args(options).run().assert_status(78);
    let options = ["--wait", "100ms", "cat"];
    at(waited.name()).args(options).run().assert_status(66);
    let running = at(stopped.name()).arg("cat").spawn();
    stopped.wait_consumers(1);
    running.signal(Signal::SIGTERM);
    running.finish(PATIENCE).assert_status(143);

    // This one can't, and its line shows that there would be lines of the others.
    let running = at(killed.name()).arg("cat").spawn();
    killed.wait_consumers(1);
    running.signal(Signal::SIGKILL);
    let log = || broker.log();
    assert!(testbed::eventually(PATIENCE, || without(killed.name()) == 1), "{}", log());
    for queue in [waited.name(), stopped.name()] {
        let ends = (with_goodbye(queue), without(queue));
        assert_eq!(ends, (1, 0), "{queue}: {}", log());
    }
    // The time limit may have cut the last of its attempts.
    let refused = "not-there";
    assert!(with_goodbye(refused) > 0 && without(refused) <= 1, "{}", log());
}
