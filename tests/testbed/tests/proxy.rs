//! The proxy's faults, with the tests' client as the worker.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use testbed::{
    Action, Broker, Client, Direction, FullBacklog, Method, PATIENCE, Proxy, Queue, block_on, eventually, frames,
};

#[test]
fn methods_are_seen_in_order() {
    let broker = Broker::shared();
    let queue = broker.queue("seen");
    queue.publish("x");
    let proxy = Proxy::of(broker);
    let client = Client::new(&proxy.url());
    assert!(client.get(queue.name()).expect("an answer").is_some());
    proxy.wait_for(Direction::ToBroker, Method::CHANNEL_CLOSE);
    let expected = [
        Method::CONNECTION_START_OK,
        Method::CONNECTION_TUNE_OK,
        Method::CONNECTION_OPEN,
        Method::CHANNEL_OPEN,
        Method::BASIC_GET,
        Method::BASIC_ACK,
        Method::CHANNEL_CLOSE,
    ];
    assert_eq!(proxy.sent(), expected);
    assert_eq!((proxy.accepted(), proxy.open()), (1, 1));
    client.disconnect();
    proxy.wait_open(0);
}

#[test]
fn an_ack_can_be_cut_off_before_and_after() {
    let broker = Broker::shared();
    for (action, left) in [(Action::CutBefore, 1), (Action::CutAfter, 0)] {
        let queue = broker.queue("cut");
        queue.publish("x");
        let proxy = Proxy::of(broker);
        proxy.once(Direction::ToBroker, Method::BASIC_ACK, action);
        let client = Client::new(&proxy.url());
        assert!(client.get(queue.name()).is_err());
        proxy.wait_open(0);
        queue.wait_ready(left);
    }
}

#[test]
fn an_ack_can_disappear_and_a_channel_error_can_cross_it() {
    let broker = Broker::shared();
    let queue = broker.queue("swallowed");
    queue.publish("x");
    let proxy = Proxy::of(broker);
    proxy.once(Direction::ToBroker, Method::BASIC_ACK, Action::SwallowFrame);
    let client = Client::new(&proxy.url());
    assert!(client.get(queue.name()).is_ok());
    queue.wait_ready(1);

    proxy.once(Direction::ToBroker, Method::BASIC_ACK, Action::Replace(Arc::new(frames::unknown_ack)));
    let _ = client.get(queue.name());
    proxy.wait_for(Direction::ToClient, Method::CHANNEL_CLOSE);

    let client = Client::new(&proxy.url());
    let close = frames::channel_close(1, 406, "PRECONDITION_FAILED - from the proxy");
    proxy.once(Direction::ToBroker, Method::BASIC_GET, Action::InjectInstead(close));
    let error = client.get(queue.name()).expect_err("a channel error");
    assert!(format!("{error:#}").contains("from the proxy"), "{error:#}");
}

#[test]
fn a_broker_can_cancel_a_consumer() {
    let broker = Broker::shared();
    let queue = broker.queue("cancelled");
    let proxy = Proxy::of(broker);
    proxy.on(Direction::ToClient, Method::BASIC_CONSUME_OK, Action::Inject(frames::basic_cancel(1, "me")));
    let channel = Client::new(&proxy.url()).channel().expect("a channel");
    let name = queue.name().into();
    let mut consumer =
        block_on(channel.basic_consume(name, "me".into(), Default::default(), Default::default())).expect("a consumer");
    let next = block_on(async { tokio::time::timeout(PATIENCE, tokio_stream::StreamExt::next(&mut consumer)).await });
    assert!(next.expect("noticed").is_none());
}

/// An answer that isn't held arrives within this time.
const HELD_UP: Duration = Duration::from_millis(300);

/// Asks for a queue's counts; checks that they come only after `meanwhile`, which ends a fault.
fn counts_come_after(proxy: &Proxy, queue: &Queue, meanwhile: impl FnOnce()) {
    let client = Client::new(&proxy.url());
    std::thread::scope(|scope| {
        let counts = scope.spawn(|| client.counts(queue.name()));
        proxy.wait_accepted(1);
        assert!(!eventually(HELD_UP, || counts.is_finished()));
        meanwhile();
        let counts = counts.join().expect("no panic").expect("counts");
        assert_eq!(counts, Some((0, 0)));
    });
}

#[test]
fn a_frame_can_be_held_and_released() {
    let broker = Broker::shared();
    let queue = broker.queue("held");
    let proxy = Proxy::of(broker);
    proxy.once(Direction::ToClient, Method::CONNECTION_TUNE, Action::Hold);
    counts_come_after(&proxy, &queue, || {
        proxy.wait_for(Direction::ToClient, Method::CONNECTION_TUNE);
        let answers = proxy.count(Direction::ToBroker, Method::CONNECTION_TUNE_OK);
        assert_eq!(answers, 0);
        proxy.release();
    });
}

#[test]
fn a_stalled_proxy_goes_on_where_it_stopped() {
    let broker = Broker::shared();
    let queue = broker.queue("stalled");
    let proxy = Proxy::of(broker);
    proxy.stall();
    counts_come_after(&proxy, &queue, || proxy.pass());
}

#[test]
fn a_refusing_proxy_listens_again() {
    let broker = Broker::shared();
    let proxy = Proxy::of(broker);
    let queue = broker.queue("refused");
    let client = Client::new(&proxy.url());
    assert_eq!(client.counts(queue.name()).expect("counts"), Some((0, 0)));
    proxy.refuse();
    let refused = std::net::TcpStream::connect(proxy.addr()).expect_err("refused");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(client.counts(queue.name()).expect("the old connection works"), Some((0, 0)));
    proxy.cut();
    assert!(client.counts(queue.name()).is_err());
    proxy.pass();
    assert_eq!(client.counts(queue.name()).expect("counts"), Some((0, 0)));
}

#[test]
fn a_cut_ends_existing_connections_and_no_later_ones() {
    let proxy = Proxy::silent();
    let mut there = TcpStream::connect(proxy.addr()).expect("a connection");
    proxy.wait_accepted(1);
    let is_cut = AtomicBool::new(false);
    let others = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut others = Vec::new();
            while !is_cut.load(Relaxed) {
                others.push(TcpStream::connect(proxy.addr()).expect("a connection"));
                std::thread::sleep(Duration::from_millis(10));
            }
            others
        });
        proxy.wait_accepted(2);
        proxy.cut();
        is_cut.store(true, Relaxed);
        others.join().expect("no panic")
    });
    let error = there.read(&mut [0]).expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let _late = TcpStream::connect(proxy.addr()).expect("a connection");
    proxy.wait_accepted(others.len() + 2);
    assert!(proxy.open() > 0);
}

#[test]
fn a_delay_applies_to_each_piece_independently() {
    const DELAY: Duration = Duration::from_millis(200);
    const PIECES: usize = 50;
    // Not AMQP: bytes come back one by one.
    let echo = TcpListener::bind("127.0.0.1:0").expect("a port");
    let proxy = Proxy::to(echo.local_addr().expect("an address"));
    proxy.delay(Direction::ToBroker, DELAY);
    proxy.delay(Direction::ToClient, DELAY);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut from, _) = echo.accept().expect("a connection");
            let mut to = from.try_clone().expect("a second handle");
            std::io::copy(&mut from, &mut to).expect("an echo");
        });
        let start = Instant::now();
        let mut out = TcpStream::connect(proxy.addr()).expect("a connection");
        out.set_nodelay(true).expect("no delay of the kernel's");
        let mut back = out.try_clone().expect("a second handle");
        let came = scope.spawn(move || {
            let mut byte = [0];
            let times = (0..PIECES).map(|_| {
                back.read_exact(&mut byte).expect("an echo");
                start.elapsed()
            });
            times.collect::<Vec<_>>()
        });
        let sent: Vec<_> = (0..PIECES)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                let at = start.elapsed();
                out.write_all(&[1]).expect("sent");
                at
            })
            .collect();
        let came = came.join().expect("no panic");
        out.shutdown(std::net::Shutdown::Both).expect("an end");
        // The first byte waits for the handshake, too.
        assert!(came[0] >= 4 * DELAY, "{:?}", came[0]);
        for (sent, came) in sent.iter().zip(&came) {
            assert!(*came >= *sent + 2 * DELAY, "{came:?}, sent {sent:?}");
        }
        // If each waited for the one before, they would take 50 × 400 ms.
        assert!(came[PIECES - 1] < Duration::from_secs(10), "{came:?}");
    });
}

#[test]
fn large_messages_pass_in_pieces() {
    let broker = Broker::shared();
    let queue = broker.queue("large");
    let proxy = Proxy::of(broker);
    let client = Client::new(&proxy.url());
    let body: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    client.publish(queue.name(), [&body], Default::default()).expect("published");
    assert!(client.get(queue.name()).expect("an answer").expect("a message").data == body);
    assert!(proxy.count(Direction::ToClient, Method::BODY) > 1);
}

#[test]
fn a_full_backlog_drops_packets() {
    let backlog = FullBacklog::start();
    let limit = Duration::from_millis(700);
    let error = std::net::TcpStream::connect_timeout(&backlog.addr(), limit).expect_err("no answer");
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
}
