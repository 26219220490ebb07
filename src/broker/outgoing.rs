//! What lapin sends until its first channel is open, and the first `channel.open` one round trip before it.
//!
//! lapin 4.12 waits for the answer to `connection.open` before it asks for a channel, though neither answer says anything
//! that it goes on by, and a broker works off a connection's methods in order. So channel 1 is asked for right behind
//! `connection.open`, and when lapin asks for it itself, that isn't sent again. lapin is told nothing before it has
//! happened: what follows `connection.open-ok` answers what lapin hasn't asked yet, and is read when it has
//! ([`Incoming`](super::incoming::Incoming)). A broker that refuses the connection takes no notice of the rest (seen with
//! RabbitMQ 3.10, 4.0 and 4.3).

use super::frames::{CONNECTION_OPEN, FRAME_END, HEADER, HEARTBEAT, METHOD};
use std::mem;

/// What a client sends first (4.2.2), in bytes: it is no frame.
const PROTOCOL_HEADER: usize = 8;

/// `channel.open` on channel 1, lapin's first, with its one argument, which is reserved: an empty short string.
const CHANNEL_OPEN: [u8; 13] = [METHOD, 0, 1, 0, 0, 0, 5, 0, 20, 0, 10, 0, FRAME_END];

/// What lapin has sent, until it goes out.
#[derive(Debug)]
pub(super) struct Outgoing {
    stage: Stage,
    /// What has begun and isn't whole.
    begun: Vec<u8>,
    waiting: Vec<u8>,
}

/// How far the opening has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not even the protocol header was sent.
    New,
    /// The handshake is under way.
    Handshake,
    /// lapin has sent `connection.open`, and we have asked for the first channel.
    Opening,
    /// lapin has gone on: nothing is left to be done.
    Open,
}

impl Outgoing {
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::New,
            begun: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Whether what lapin sends can go out as it is, past this.
    pub(super) fn is_done(&self) -> bool {
        self.stage == Stage::Open && self.waiting.is_empty()
    }

    /// What is to be sent.
    pub(super) fn waiting(&self) -> &[u8] {
        &self.waiting
    }

    /// So many bytes of it were.
    pub(super) fn sent(&mut self, n: usize) {
        self.waiting.drain(..n);
    }

    /// Takes what lapin sends, in pieces of any size, and returns whether it wants to read what follows
    /// `connection.open-ok`.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> bool {
        let before = self.stage;
        while !bytes.is_empty() && self.stage != Stage::Open {
            let lacks = self.size() - self.begun.len();
            let (piece, rest) = bytes.split_at(lacks.min(bytes.len()));
            bytes = rest;
            self.begun.extend_from_slice(piece);
            // Of a frame its header comes first, and says how long it is.
            if self.begun.len() == self.size() {
                self.whole();
            }
        }
        self.waiting.extend_from_slice(bytes);
        before != Stage::Open && self.stage == Stage::Open
    }

    /// How large that is which has begun, in bytes, as far as it is known.
    fn size(&self) -> usize {
        match (self.stage, self.begun.first_chunk::<HEADER>()) {
            (Stage::New, _) => PROTOCOL_HEADER,
            (_, None) => HEADER,
            (_, Some(&[.., a, b, c, d])) => HEADER + u32::from_be_bytes([a, b, c, d]) as usize + 1,
        }
    }

    fn whole(&mut self) {
        let frame = mem::take(&mut self.begun);
        let opens = frame.first() == Some(&METHOD) && frame[HEADER..].starts_with(&CONNECTION_OPEN);
        match self.stage {
            Stage::New => self.stage = Stage::Handshake,
            Stage::Handshake if opens => {
                self.stage = Stage::Opening;
                self.waiting.extend(frame);
                return self.waiting.extend(CHANNEL_OPEN);
            }
            Stage::Opening if frame.first() != Some(&HEARTBEAT) => {
                self.stage = Stage::Open;
                if frame == CHANNEL_OPEN {
                    return;
                }
            }
            Stage::Handshake | Stage::Opening | Stage::Open => {}
        }
        self.waiting.extend(frame);
    }
}
