//! Opens the connection and its channels without waiting: two round trips less for each message.
//!
//! AMQP 0-9-1 has an answer to `connection.open` and to `channel.open`, but neither answer says anything that a client
//! goes on by, and a broker works off a connection's methods in order, so what comes next may as well go out at once
//! (seen with RabbitMQ 3.10, 4.0 and 4.3, and taken by any broker that reads its connection as a stream). lapin 4.12
//! waits for both. So lapin is given the answers as soon as the question is on its way, and the broker's own are taken out
//! when they come ([`Incoming`](super::incoming::Incoming)). What the broker says instead, that there is no such virtual
//! host for example, comes through; whether it has opened the connection is known to [`Seen`](super::frames::Seen).

use super::frames::{
    CHANNEL_OPEN, CHANNEL_OPEN_OK, CONNECTION_OPEN, CONNECTION_OPEN_OK, FRAME_END, HEADER, Id,
    METHOD,
};
use std::task::{Context, Waker};

/// What a client sends first (4.2.2), in bytes: it is no frame.
const PROTOCOL_HEADER: usize = 8;

/// The answers on one connection that are given in the broker's name.
#[derive(Debug)]
pub(super) struct Pipelining {
    /// How much of the protocol header is still to be sent, in bytes.
    greeting: usize,
    sent: Scanner,
    /// The broker's own answers, by channel, which lapin mustn't see.
    owed: Vec<(u16, Id)>,
    reader: Option<Waker>,
}

impl Pipelining {
    pub(super) fn new() -> Self {
        Self {
            greeting: PROTOCOL_HEADER,
            sent: Scanner::default(),
            owed: Vec::new(),
            reader: None,
        }
    }

    /// Takes note of bytes that are on their way to the broker, in pieces of any size, and puts the answers to them
    /// into `answers`.
    pub(super) fn sent(&mut self, bytes: &[u8], answers: &mut Vec<u8>) {
        let greeting = self.greeting.min(bytes.len());
        self.greeting -= greeting;
        let owed = &mut self.owed;
        let before = owed.len();
        self.sent.read(&bytes[greeting..], |channel, method| {
            // With the one argument that either has, which is reserved: an empty short string and an empty long one.
            let (answer, argument) = match method {
                CONNECTION_OPEN => (CONNECTION_OPEN_OK, &[0][..]),
                CHANNEL_OPEN => (CHANNEL_OPEN_OK, &[0, 0, 0, 0][..]),
                _ => return,
            };
            owed.push((channel, answer));
            answers.push(METHOD);
            answers.extend(channel.to_be_bytes());
            answers.extend(((answer.len() + argument.len()) as u32).to_be_bytes());
            answers.extend(answer);
            answers.extend(argument);
            answers.push(FRAME_END);
        });
        if owed.len() > before
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
    }

    /// Whether this method is the broker's own answer, which was given already.
    pub(super) fn is_paid(&mut self, channel: u16, method: &[u8]) -> bool {
        let mut owed = self.owed.iter();
        let found = owed.position(|&(on, answer)| on == channel && method.starts_with(&answer));
        found.map(|found| self.owed.remove(found)).is_some()
    }

    /// Whoever reads has found nothing: it is told of the next answer.
    pub(super) fn wait(&mut self, cx: &Context<'_>) {
        match &mut self.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            reader => *reader = Some(cx.waker().clone()),
        }
    }
}

/// Follows what is sent, frame by frame, in pieces of any size.
#[derive(Debug, Default)]
struct Scanner {
    header: [u8; HEADER],
    have: usize,
    /// What is left of the frame behind its header, its end octet included, in bytes.
    left: usize,
    id: Id,
    /// How much of it is there, in bytes.
    known: usize,
}

impl Scanner {
    /// Tells of each method that the next bytes complete, with its channel.
    fn read(&mut self, mut bytes: &[u8], mut method: impl FnMut(u16, Id)) {
        while !bytes.is_empty() {
            if self.have < HEADER {
                let n = bytes.len().min(HEADER - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                self.have += n;
                bytes = &bytes[n..];
                if self.have == HEADER {
                    let [.., a, b, c, d] = self.header;
                    self.left = u32::from_be_bytes([a, b, c, d]) as usize + 1;
                    self.known = 0;
                }
                continue;
            }
            let n = bytes.len().min(self.left);
            let new = n.min(self.id.len() - self.known);
            self.id[self.known..self.known + new].copy_from_slice(&bytes[..new]);
            self.known += new;
            self.left -= n;
            bytes = &bytes[n..];
            if self.left == 0 {
                self.have = 0;
                let [kind, high, low, ..] = self.header;
                if kind == METHOD {
                    method(u16::from_be_bytes([high, low]), self.id);
                }
            }
        }
    }
}
