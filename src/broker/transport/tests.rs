//! What lapin reads of what the broker sends, over a real connection and however the bytes are cut.

use super::*;
use crate::broker::{frames::Seen, incoming::Bodies};
use std::{future::poll_fn, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, tcp::OwnedWriteHalf},
};

const START: [u8; 4] = [0, 10, 0, 10];
const OPEN_OK: [u8; 4] = [0, 10, 0, 41];
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
        let (mut received, broker) = theirs.into_split();
        // The broker reads, so that nothing is stuck.
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while received.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        let seen = Arc::new(Seen::default());
        let bodies = Arc::new(Bodies::default());
        let incoming = Incoming::new(1 << 20, Arc::clone(&seen), Arc::clone(&bodies));
        Self {
            stream: Stream::plain(ours, incoming),
            seen,
            bodies,
            broker,
            read: Vec::new(),
        }
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
