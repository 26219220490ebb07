//! Breaks AMQP at random: what a peer says where the protocol wants something else. The same seed gives the same bytes.

use crate::peer::{Answer, Call, Peer, consumer_tag, delivery, frame, nested, usual};
use crate::proxy::{Method, frames};
use fastrand::Rng;

/// After so many connections the peer hangs up at once: what it says to them all would keep a client busy for ever.
const CONNECTIONS: usize = 3;

/// The methods at which it may begin: each of them comes in nearly every conversation.
const MOMENTS: [Method; 8] = [
    Method::CONNECTION_OPEN,
    Method::CHANNEL_OPEN,
    Method::BASIC_CONSUME,
    Method::BASIC_CONSUME,
    Method::BASIC_CONSUME,
    Method::BASIC_CONSUME,
    Method::BASIC_ACK,
    Method::BASIC_CANCEL,
];

/// A peer that does the handshake as it should and breaks AMQP afterwards, the way the seed says.
pub fn peer(seed: u64) -> Peer {
    let mut rng = Rng::with_seed(seed);
    let moment = *rng.choice(&MOMENTS).unwrap_or(&Method::BASIC_CONSUME);
    let usual_first = rng.bool();
    let hangs_up = rng.u8(..10) < 7;
    Peer::start(move |call| {
        if call.connection > CONNECTIONS {
            return Answer::Last(Vec::new());
        }
        // A command runs, and then there is an acknowledgement to spoil.
        let delivers = moment == Method::BASIC_ACK && call.method == Method::BASIC_CONSUME;
        if delivers {
            let sound = delivery(call.channel, &consumer_tag(call), b"", 2, b"ok");
            return Answer::Bytes([usual(call), sound.concat()].concat());
        }
        if call.method != moment {
            return Answer::Usual;
        }
        let mut bytes = if usual_first || moment == Method::BASIC_CONSUME {
            usual(call)
        } else {
            Vec::new()
        };
        bytes.extend(garbage(&mut Rng::with_seed(seed), call));
        if hangs_up {
            Answer::Last(bytes)
        } else {
            Answer::Bytes(bytes)
        }
    })
}

/// A number that is often one at which something overflows.
fn number(rng: &mut Rng) -> u64 {
    let near = [
        0,
        1,
        127,
        255,
        65_535,
        131_072,
        1 << 31,
        1 << 32,
        1 << 63,
        u64::MAX,
    ];
    let base = *rng.choice(&near).unwrap_or(&0);
    match rng.u8(..4) {
        0 => rng.u64(..),
        1 => base.wrapping_sub(1),
        2 => base.wrapping_add(1),
        _ => base,
    }
}

fn noise(rng: &mut Rng, most: usize) -> Vec<u8> {
    let length = rng.usize(..=most);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

/// A field table of random names, types and contents, without its length.
fn table(rng: &mut Rng) -> Vec<u8> {
    let mut table = Vec::new();
    for _ in 0..rng.usize(..8) {
        let name = noise(rng, 20);
        table.push(name.len() as u8);
        table.extend(&name);
        table.push(*rng.choice(b"tbBsuIilLfdDSATFVxQ\0\xff").unwrap_or(&b'S'));
        let length = number(rng) as u32;
        if rng.bool() {
            table.extend(length.to_be_bytes());
        }
        table.extend(noise(rng, 40));
    }
    table
}

fn garbage(rng: &mut Rng, call: &Call) -> Vec<u8> {
    let channel = call.channel.max(1);
    let tag = consumer_tag(call);
    let body = noise(rng, 2000);
    let size = body.len() as u64;
    match rng.u8(..14) {
        0 => noise(rng, 500),
        1 => {
            let levels = rng.usize(50..2000);
            delivery(channel, &tag, &nested(levels, rng.bool()), size, &body).concat()
        }
        2 => delivery(channel, &tag, &table(rng), size, &body).concat(),
        3 => delivery(channel, &tag, b"", number(rng), &body).concat(),
        4 => {
            // In another order, or some of it twice.
            let parts = delivery(channel, &tag, b"", size, &body);
            let any = |_| parts[rng.usize(..3)].clone();
            (0..5).flat_map(any).collect()
        }
        5 => delivery(number(rng) as u16, &tag, b"", size, &body).concat(),
        6 => {
            let tag = noise(rng, 255);
            let tag = [&[tag.len() as u8][..], &tag].concat();
            delivery(channel, &tag, b"", size, &body).concat()
        }
        7 => {
            // A method of any number with any arguments.
            let classes = [0, 10, 20, 40, 50, 60, 85, 90, rng.u16(..)];
            let class = *rng.choice(&classes).unwrap_or(&0);
            let method = Method(class, rng.u16(..13) * 10 + rng.u16(..2));
            frames::method_frame(rng.u16(..3), method, &noise(rng, 100))
        }
        8 => {
            // A close of the channel or the connection, with any code and text.
            let text = noise(rng, 255);
            let mut close = (number(rng) as u16).to_be_bytes().to_vec();
            close.push(text.len() as u8);
            close.extend(text);
            close.extend((number(rng) as u32).to_be_bytes());
            if rng.bool() {
                frames::method_frame(channel, Method::CHANNEL_CLOSE, &close)
            } else {
                frames::method_frame(0, Method::CONNECTION_CLOSE, &close)
            }
        }
        9 => frame(rng.u8(..), number(rng) as u16, &body),
        10 => {
            // A frame whose length isn't true.
            let mut bytes = frame(rng.u8(1..4), channel, &body);
            bytes[3..7].copy_from_slice(&(number(rng) as u32).to_be_bytes());
            bytes
        }
        11 => {
            // An end that is none.
            let mut bytes = delivery(channel, &tag, b"", size, &body).concat();
            *bytes.last_mut().expect("a frame isn't empty") = rng.u8(..);
            bytes
        }
        12 => {
            let mut bytes = delivery(channel, &tag, &table(rng), size, &body).concat();
            bytes.truncate(rng.usize(..bytes.len()));
            bytes
        }
        _ => {
            // Sound, but for some bytes.
            let mut bytes = delivery(channel, &tag, b"\x01kS\0\0\0\x01v", size, &body).concat();
            for _ in 0..rng.usize(1..6) {
                let at = rng.usize(..bytes.len().min(120));
                bytes[at] = rng.u8(..);
            }
            bytes
        }
    }
}
