//! What lapin reads of what the broker sends, over a real connection and however the bytes are cut.

use super::*;
use crate::broker::{frames::Seen, incoming::Bodies};
use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

const START: [u8; 4] = [0, 10, 0, 10];
const TUNE_OK: [u8; 4] = [0, 10, 0, 31];
const OPEN: [u8; 4] = [0, 10, 0, 40];
const OPEN_OK: [u8; 4] = [0, 10, 0, 41];
const CLOSE: [u8; 4] = [0, 10, 0, 50];
const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
const CHANNEL_OPEN_OK: [u8; 4] = [0, 20, 0, 11];
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
const CANCEL: [u8; 4] = [0, 60, 0, 30];
const DELIVER: [u8; 4] = [0, 60, 0, 60];

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    frame.extend(channel.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame.push(0xce);
    frame
}

fn method(channel: u16, id: [u8; 4], arguments: &[u8]) -> Vec<u8> {
    frame(1, channel, &[&id[..], arguments].concat())
}

/// The frames in `bytes`, which has to end with one.
fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let size = u32::from_be_bytes(bytes[3..7].try_into().unwrap()) as usize + 8;
        let (frame, rest) = bytes.split_at(size);
        assert_eq!(frame.last(), Some(&0xce), "{frame:?}");
        frames.push(frame.to_vec());
        bytes = rest;
    }
    frames
}

/// lapin's side of a connection, and the broker's.
struct Connected {
    stream: Stream,
    seen: Arc<Seen>,
    bodies: Arc<Bodies>,
    broker: OwnedWriteHalf,
    received: OwnedReadHalf,
    /// What lapin has read.
    read: Vec<u8>,
}

impl Connected {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        theirs.set_nodelay(true).unwrap();
        let (received, broker) = theirs.into_split();
        let seen = Arc::new(Seen::default());
        let bodies = Arc::new(Bodies::default());
        let incoming = Incoming::new(1 << 20, Arc::clone(&seen), Arc::clone(&bodies));
        Self {
            stream: Stream::plain(ours, incoming),
            seen,
            bodies,
            broker,
            received,
            read: Vec::new(),
        }
    }

    /// lapin writes, `cut` at a time, and flushes.
    async fn write(&mut self, bytes: &[u8], cut: usize) {
        let mut stream = Pin::new(&mut self.stream);
        for mut piece in bytes.chunks(cut) {
            while !piece.is_empty() {
                let n = poll_fn(|cx| stream.as_mut().poll_write(cx, piece)).await;
                piece = &piece[n.unwrap()..];
            }
        }
        poll_fn(|cx| stream.as_mut().poll_flush(cx)).await.unwrap();
    }

    /// The broker receives this, and nothing before it.
    async fn receives(&mut self, expected: &[u8]) {
        let mut received = vec![0; expected.len()];
        self.received.read_exact(&mut received).await.unwrap();
        assert_eq!(received, expected);
    }

    /// lapin reads, `cut` at a time, until it has had `size` bytes in all or everything.
    async fn read(&mut self, size: usize, cut: usize) {
        while self.read.len() < size {
            let mut buffer = vec![0; cut.min(size - self.read.len())];
            let n = poll_fn(|cx| Pin::new(&mut self.stream).poll_read(cx, &mut buffer))
                .await
                .unwrap();
            if n == 0 {
                return;
            }
            self.read.extend(&buffer[..n]);
        }
    }
}

/// What lapin sends until it waits for the answer to `connection.open`.
fn opening() -> [Vec<u8>; 3] {
    [
        b"AMQP\x00\x00\x09\x01".to_vec(),
        method(0, TUNE_OK, &[0; 8]),
        method(0, OPEN, b"\x01/\0\0"),
    ]
}

fn channel_open(channel: u16) -> Vec<u8> {
    method(channel, CHANNEL_OPEN, &[0])
}

/// A `basic.deliver`.
fn deliver(channel: u16, tag: u64) -> Vec<u8> {
    let arguments = [b"\x03ctg".as_slice(), &tag.to_be_bytes(), b"\0\0\x01q"].concat();
    method(channel, DELIVER, &arguments)
}

/// The header of a content, with a content type and a message id.
fn content_header(channel: u16, size: u64) -> Vec<u8> {
    let properties = b"\x80\x80\x03a/b\x02id";
    let payload = [&[0, 60, 0, 0][..], &size.to_be_bytes(), properties].concat();
    frame(2, channel, &payload)
}

/// A body that shows when a piece of it is missing, doubled or out of its place.
fn body(size: usize) -> Vec<u8> {
    (0..size).map(|n| (n % 251) as u8).collect()
}

/// Notes that it was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn the_first_channel_is_asked_for_once_and_answered_when_lapin_has_asked() {
    let asked_first = [&opening().concat()[..], &channel_open(1)].concat();
    let (qos, beat) = (method(1, [0, 60, 0, 10], &[0; 7]), frame(8, 0, &[]));
    let answers = [
        method(1, CHANNEL_OPEN_OK, &[0; 4]),
        method(0, CLOSE, b"\x01\x40\x04stop\0\0\0\0"),
    ]
    .concat();
    let open_ok = method(0, OPEN_OK, &[0]);
    for cut in [1, 2, 7, 8, 12, 1 << 20] {
        // What lapin sends next, and what the broker gets of it.
        for (next, rest) in [
            (channel_open(1), vec![]),
            // Whatever else it may be, it is sent as it is.
            (channel_open(2), channel_open(2)),
            (method(0, CLOSE, &[0; 11]), method(0, CLOSE, &[0; 11])),
        ] {
            let mut it = Connected::new().await;
            it.write(&opening().concat(), cut).await;
            it.receives(&asked_first).await;
            for piece in [&open_ok[..], &answers].concat().chunks(cut) {
                it.broker.write_all(piece).await.unwrap();
            }
            it.broker.shutdown().await.unwrap();
            it.read(open_ok.len(), cut).await;
            // The answer is there and waits, whatever of it has been received already.
            let woken = Arc::new(Woken::default());
            let waker = Arc::clone(&woken).into();
            for _ in 0..2 {
                let mut cx = Context::from_waker(&waker);
                let read = Pin::new(&mut it.stream).poll_read(&mut cx, &mut [0; PIECE]);
                assert!(read.is_pending(), "{read:?}");
                it.write(&beat, cut).await;
                it.receives(&beat).await;
                assert!(!woken.0.load(Ordering::Relaxed));
            }
            it.write(&next, cut).await;
            assert!(woken.0.load(Ordering::Relaxed));
            it.read(usize::MAX, cut.min(PIECE)).await;
            assert_eq!(it.read, [&open_ok[..], &answers].concat(), "cut {cut}");
            it.write(&qos, cut).await;
            it.write(&channel_open(1), cut).await;
            it.receives(&[rest, qos.clone(), channel_open(1)].concat())
                .await;
        }
    }
}

#[tokio::test]
async fn a_refused_connection_is_heard_of_at_once() {
    let mut it = Connected::new().await;
    it.write(&opening().concat(), PIECE).await;
    let refusal = method(0, CLOSE, b"\x02\x12\x02no\0\0\0\0");
    it.broker.write_all(&refusal).await.unwrap();
    it.broker.shutdown().await.unwrap();
    it.read(usize::MAX, PIECE).await;
    assert_eq!(it.read, refusal);
}

#[tokio::test]
async fn a_broker_that_blocks_before_it_opens_is_read_on() {
    let mut it = Connected::new().await;
    it.write(&opening().concat(), PIECE).await;
    let sent = [
        method(0, [0, 10, 0, 60], b"\x03low"),
        method(0, OPEN_OK, &[0]),
        method(0, [0, 10, 0, 61], &[]),
    ];
    it.broker.write_all(&sent.concat()).await.unwrap();
    it.broker.shutdown().await.unwrap();
    it.read(usize::MAX, PIECE).await;
    assert_eq!(it.read, sent.concat());
}

#[tokio::test]
async fn what_came_before_a_reset_is_looked_at_first() {
    let mut it = Connected::new().await;
    it.write(&opening().concat(), PIECE).await;
    let refusal = method(0, CLOSE, b"\x02\x12\x02no\0\0\0\0");
    it.broker.write_all(&refusal).await.unwrap();
    // With more to read than it has read, a socket is closed by a reset.
    drop(it.received.reunite(it.broker));
    let woken = Arc::new(Woken::default());
    let waker = Arc::clone(&woken).into();
    let mut stream = Pin::new(&mut it.stream);
    let mut buffer = [0; PIECE];
    let n = poll_fn(|cx| stream.as_mut().poll_read(cx, &mut buffer)).await;
    assert_eq!(buffer[..n.unwrap()], refusal);
    let read = stream
        .as_mut()
        .poll_read(&mut Context::from_waker(&waker), &mut buffer);
    assert!(read.is_pending(), "{read:?}");
    assert!(woken.0.load(Ordering::Relaxed));
    let read = poll_fn(|cx| stream.as_mut().poll_read(cx, &mut buffer)).await;
    assert_eq!(
        read.unwrap_err().kind(),
        io::ErrorKind::ConnectionReset,
        "only put off"
    );
}

#[tokio::test]
async fn each_body_is_kept_however_the_bytes_are_cut() {
    let start = method(0, START, b"\0\x09\0\0\0\0");
    let heartbeat = frame(8, 0, &[]);
    let answer = method(2, CHANNEL_OPEN_OK, &[0, 0, 0, 0]);
    let cancel = method(2, CANCEL, b"\x03ctg\0");
    let (small, large) = (body(10), body(150_000));
    // A body that looks like a deliver and like a cancel is neither.
    let tricky = [deliver(1, 9), method(1, CANCEL, &[])].concat();
    let from_broker = [
        start.clone(),
        method(0, OPEN_OK, &[0]),
        heartbeat.clone(),
        deliver(1, 1),
        content_header(1, large.len() as u64),
        frame(3, 1, &large[..PIECE + 1]),
        // Other channels go on meanwhile.
        answer.clone(),
        deliver(2, 1),
        content_header(2, small.len() as u64),
        frame(3, 1, &[]),
        frame(3, 2, &small[..4]),
        frame(3, 1, &large[PIECE + 1..]),
        frame(3, 2, &small[4..]),
        deliver(1, 2),
        content_header(1, tricky.len() as u64),
        frame(3, 1, &tricky),
        // Of an empty message there is nothing to keep.
        deliver(1, 3),
        content_header(1, 0),
        cancel.clone(),
    ]
    .concat();
    let expected = [
        start,
        method(0, OPEN_OK, &[0]),
        deliver(1, 1),
        answer,
        deliver(2, 1),
        content_header(2, small.len() as u64),
        frame(3, 2, &small[..4]),
        content_header(1, 0),
        frame(3, 2, &small[4..]),
        deliver(1, 2),
        content_header(1, 0),
        deliver(1, 3),
        content_header(1, 0),
        cancel,
    ];
    for cut in [1, 2, 7, 8, 13, PIECE - 1, PIECE, 1 << 20] {
        let mut it = Connected::new().await;
        it.write(&[opening().concat(), channel_open(1)].concat(), cut)
            .await;
        for piece in from_broker.chunks(cut) {
            it.broker.write_all(piece).await.unwrap();
        }
        it.broker.shutdown().await.unwrap();
        it.read(usize::MAX, cut.min(PIECE)).await;
        let mut frames = frames(&it.read);
        frames.retain(|frame| *frame != heartbeat);
        assert!(frames == expected, "cut {cut}: {frames:?}");
        assert!(it.seen.cancelled());
        for (channel, tag, body) in [(1, 1, &large), (1, 2, &tricky)] {
            let kept = it.bodies.take(channel, tag);
            assert!(kept.as_ref() == Some(body), "{channel} {tag}, cut {cut}");
            assert_eq!(it.bodies.take(channel, tag), None, "only once");
        }
        assert_eq!(it.bodies.take(1, 3), None);
        assert_eq!(it.bodies.take(2, 1), None, "two at a time");
    }
}

#[tokio::test]
async fn what_comes_before_the_end_of_a_body_is_a_sign_of_life_and_no_delivery() {
    let body = body(5 * PIECE);
    let beginning = [
        deliver(1, 7),
        content_header(1, body.len() as u64),
        frame(3, 1, &body),
    ]
    .concat();
    let heartbeat = frame(8, 0, &[]);
    let mut it = Connected::new().await;
    let mut signs = 0;
    for piece in beginning[..beginning.len() - 1].chunks(PIECE + 1) {
        it.broker.write_all(piece).await.unwrap();
        signs += 1;
        let least = deliver(1, 7).len() + signs * heartbeat.len();
        it.read(least, PIECE).await;
    }
    assert_eq!(it.bodies.take(1, 7), None);
    it.broker.write_all(&[0xce]).await.unwrap();
    it.broker.shutdown().await.unwrap();
    it.read(usize::MAX, PIECE).await;
    let mut frames = frames(&it.read);
    assert_eq!(frames.remove(0), deliver(1, 7));
    assert_eq!(frames.pop(), Some(content_header(1, 0)));
    assert!(frames.iter().all(|frame| *frame == heartbeat), "{frames:?}");
    assert!(it.bodies.take(1, 7) == Some(body));
}

#[tokio::test]
async fn a_body_that_is_not_what_its_header_says_is_unreadable_and_no_delivery() {
    let short = [deliver(1, 1), content_header(1, 8), frame(3, 1, &[1; 7])].concat();
    let mut endless = [deliver(1, 1), content_header(1, 7), frame(3, 1, &[1; 7])].concat();
    *endless.last_mut().unwrap() = 0;
    for bytes in [
        [short.clone(), frame(3, 1, &[1; 2])].concat(),
        [short.clone(), deliver(1, 2)].concat(),
        endless,
    ] {
        let mut it = Connected::new().await;
        it.broker.write_all(&bytes).await.unwrap();
        it.broker.shutdown().await.unwrap();
        it.read(usize::MAX, PIECE).await;
        let unreadable = [3, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(it.read[..deliver(1, 1).len()], deliver(1, 1));
        assert!(it.read.windows(8).any(|frame| frame == unreadable));
        assert!(
            !it.read.windows(7).any(|frame| frame[..3] == [2, 0, 1]),
            "a header"
        );
        assert_eq!(it.bodies.take(1, 1), None);
    }
    // A channel may end in the middle, and the next delivery is whole.
    let close = method(1, CHANNEL_CLOSE, b"\x01\x94\0\0\0\0\0");
    let closed = [
        short,
        close.clone(),
        deliver(1, 1),
        content_header(1, 2),
        frame(3, 1, &[2; 2]),
    ];
    let mut it = Connected::new().await;
    it.broker.write_all(&closed.concat()).await.unwrap();
    it.broker.shutdown().await.unwrap();
    it.read(usize::MAX, PIECE).await;
    let mut frames = frames(&it.read);
    frames.retain(|frame| frame[0] != 8);
    assert_eq!(
        frames,
        [deliver(1, 1), close, deliver(1, 1), content_header(1, 0)]
    );
    assert_eq!(it.bodies.take(1, 1), Some(vec![2; 2]));
}

#[tokio::test]
async fn a_body_of_an_earlier_channel_is_not_taken_for_a_later_ones() {
    let mut it = Connected::new().await;
    let bytes = [
        deliver(1, 1),
        content_header(1, 2),
        frame(3, 1, &[1; 2]),
        deliver(1, 1),
        content_header(1, 0),
    ];
    it.broker.write_all(&bytes.concat()).await.unwrap();
    it.broker.shutdown().await.unwrap();
    it.read(usize::MAX, PIECE).await;
    assert_eq!(it.bodies.take(1, 1), None);
}

#[tokio::test]
async fn what_has_no_delivery_and_what_is_no_amqp_passes_as_it_is() {
    let returned = [
        method(1, [0, 60, 0, 50], b"\x01\x38\x08NO_ROUTE\0\x01q"),
        content_header(1, 3),
        frame(3, 1, b"abc"),
    ];
    for bytes in [
        returned.concat(),
        b"AMQP\x00\x00\x09\x01".to_vec(),
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        b"-ERR\r\n".to_vec(),
        b"\x01\0\0\xff\0\0\0too large".to_vec(),
    ] {
        let mut it = Connected::new().await;
        for piece in bytes.chunks(5) {
            it.broker.write_all(piece).await.unwrap();
        }
        it.broker.shutdown().await.unwrap();
        it.read(usize::MAX, 3).await;
        assert_eq!(it.read, bytes);
    }
}
