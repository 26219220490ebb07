//! What the broker sends, on its way to lapin: frame by frame, and without what lapin 4.12 does badly.
//!
//! - The broker's version, its mechanisms, and whether it was the broker that has cancelled a consumer, are noted in
//!   [`Seen`]: lapin keeps them to itself.
//! - The body of a delivery is read to where it stays, in [`Bodies`], and lapin gets a delivery without one: it would
//!   read a large body through a ring of 32 frames, copy it out byte by byte, and gather it from there. lapin hears of the
//!   delivery when the body is complete, so to it a connection that is lost half-way has delivered nothing.
//! - What follows `connection.open-ok` waits until lapin has asked for it: see [`Outgoing`](super::outgoing::Outgoing).

use super::frames::{
    BASIC_DELIVER, BODY, CHANNEL_CLOSE, CONNECTION_BLOCKED, CONNECTION_OPEN_OK, CONTENT_HEADER,
    FRAME_END, HEADER, HEARTBEAT, METHOD, Seen,
};
use bytes::{BufMut, buf::Limit};
use lapin::types::DeliveryTag;
use std::{
    mem,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Waker},
};

/// The types that a frame may have.
const KINDS: [u8; 4] = [METHOD, CONTENT_HEADER, BODY, HEARTBEAT];
/// Where the size of the body is in a frame with a content header (2.3.5.2): behind class and weight.
const BODY_SIZE: std::ops::Range<usize> = HEADER + 4..HEADER + 12;

/// A channel and a delivery on it.
type Key = (u16, DeliveryTag);

/// The bodies of the deliveries that lapin was told of.
#[derive(Debug, Default)]
pub(super) struct Bodies(Mutex<Vec<(Key, Vec<u8>)>>);

impl Bodies {
    /// The body of a delivery, if it has one; only once.
    pub(super) fn take(&self, channel: u16, tag: DeliveryTag) -> Option<Vec<u8>> {
        let mut bodies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = bodies.iter().position(|&(key, _)| key == (channel, tag))?;
        Some(bodies.swap_remove(found).1)
    }

    fn put(&self, key: Key, body: Vec<u8>) {
        let mut bodies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.push((key, body));
    }
}

/// The body of a delivery, as far as it is here.
#[derive(Debug)]
struct Content {
    key: Key,
    /// The frame that lapin gets in its place: the same header, and no body.
    header: Vec<u8>,
    size: u64,
    body: Vec<u8>,
}

/// Where in the stream of frames the next byte belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the header of a frame.
    Header,
    /// In a frame that is kept until it is whole, which is when it has so many bytes.
    Whole(usize),
    /// In the body, which this frame has so many bytes more of.
    Body(usize),
    /// Behind them.
    End,
    /// There are no frames: it isn't AMQP, and all the same it is for lapin to say so.
    Nowhere,
}

/// Whether what follows `connection.open-ok` may be read.
#[derive(Debug)]
enum Gate {
    /// It hasn't come yet.
    Ahead,
    /// lapin hasn't gone on yet. What was received in one piece with `connection.open-ok` is here, and whoever would
    /// read on.
    Shut(Vec<u8>, Option<Waker>),
    /// It may.
    Open,
}

/// Follows what one connection receives, in pieces of any size.
#[derive(Debug)]
pub(super) struct Incoming {
    /// What is larger is no frame, in bytes.
    frame_max: u32,
    seen: Arc<Seen>,
    bodies: Arc<Bodies>,
    gate: Gate,
    place: Place,
    /// The frame that has begun; of a body's frame, its header only.
    frame: Vec<u8>,
    /// A `basic.deliver` that has come: its content is next on its channel.
    delivered: Option<Key>,
    content: Option<Content>,
    /// Whole frames, for lapin.
    through: Vec<u8>,
}

impl Incoming {
    /// `frame_max`: what the broker is asked for at most, in bytes.
    pub(super) fn new(frame_max: u32, seen: Arc<Seen>, bodies: Arc<Bodies>) -> Self {
        Self {
            frame_max,
            seen,
            bodies,
            gate: Gate::Ahead,
            place: Place::Header,
            frame: Vec::new(),
            delivered: None,
            content: None,
            through: Vec::new(),
        }
    }

    /// Puts what there is for lapin into `buffer`, as far as it fits, and returns how many bytes.
    pub(super) fn pass(&mut self, buffer: &mut [u8]) -> usize {
        let n = self.through.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.through[..n]);
        self.through.drain(..n);
        n
    }

    /// Whether lapin has to go on before more is read; then the reader is woken when it has.
    pub(super) fn is_shut(&mut self, cx: &Context<'_>) -> bool {
        let Gate::Shut(_, reader) = &mut self.gate else {
            return false;
        };
        *reader = Some(cx.waker().clone());
        true
    }

    /// lapin has gone on behind `connection.open`.
    pub(super) fn unshut(&mut self) {
        if let Gate::Shut(rest, reader) = mem::replace(&mut self.gate, Gate::Open) {
            self.received(&rest);
            if let Some(reader) = reader {
                reader.wake();
            }
        }
    }

    /// Where the next bytes may be read to, if they are a body's. How many they were is for [`Self::read_in_place`]: they
    /// aren't [received](Self::received) as well.
    pub(super) fn in_place(&mut self) -> Option<Limit<&mut Vec<u8>>> {
        match (self.place, &mut self.content) {
            (Place::Body(left), Some(content)) => Some((&mut content.body).limit(left)),
            _ => None,
        }
    }

    /// So many bytes of a body were read.
    pub(super) fn read_in_place(&mut self, n: usize) {
        if let Place::Body(left) = self.place
            && n > 0
        {
            self.place = in_body(left - n);
            self.sign_of_life();
        }
    }

    /// Takes what the broker has sent.
    pub(super) fn received(&mut self, mut bytes: &[u8]) {
        let (mut of_body, before) = (false, self.through.len());
        while let [first, ..] = *bytes {
            if let Gate::Shut(rest, _) = &mut self.gate {
                rest.extend_from_slice(bytes);
                break;
            }
            if self.place == Place::Header && self.frame.is_empty() && !KINDS.contains(&first) {
                self.place = Place::Nowhere;
            }
            let n = match self.place {
                Place::Header => self.collect(bytes, HEADER),
                Place::Whole(size) => self.collect(bytes, size),
                Place::Body(left) => left.min(bytes.len()),
                Place::End => 1,
                Place::Nowhere => bytes.len(),
            };
            let (piece, rest) = bytes.split_at(n);
            bytes = rest;
            match self.place {
                Place::Header if self.frame.len() == HEADER => self.begun(),
                Place::Whole(size) if self.frame.len() == size => self.whole(),
                Place::Header | Place::Whole(_) => {}
                Place::Body(left) => {
                    if let Some(content) = &mut self.content {
                        content.body.extend_from_slice(piece);
                    }
                    self.place = in_body(left - n);
                    of_body = true;
                }
                Place::End if first == FRAME_END => self.body_frame(),
                Place::End => self.spoil(),
                Place::Nowhere => self.through.extend_from_slice(piece),
            }
        }
        if of_body && self.through.len() == before {
            self.sign_of_life();
        }
    }

    /// Takes from `bytes` what the frame lacks to be of this size, as far as it is here, and returns how many bytes.
    fn collect(&mut self, bytes: &[u8], size: usize) -> usize {
        let n = bytes.len().min(size - self.frame.len());
        self.frame.extend_from_slice(&bytes[..n]);
        n
    }

    /// lapin takes a broker for dead that it hears nothing from, and of a body it hears nothing before its end.
    fn sign_of_life(&mut self) {
        self.through
            .extend([HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END]);
    }

    /// What the frame is, which channel it is on, and how long its payload is, by its header.
    fn header(&self) -> Option<(u8, u16, usize)> {
        let &[kind, high, low, a, b, c, d] = self.frame.first_chunk::<HEADER>()?;
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        Some((kind, u16::from_be_bytes([high, low]), size))
    }

    /// What has come is no body: lapin is given what it can't read either, and ends the connection.
    fn spoil(&mut self) {
        self.content = None;
        self.frame.clear();
        self.place = Place::Nowhere;
        // A frame without its end.
        self.through.extend([BODY, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// The header of a frame is there.
    fn begun(&mut self) {
        let Some((kind, channel, payload)) = self.header() else {
            return;
        };
        if payload > self.frame_max as usize {
            self.place = Place::Nowhere;
            self.through.append(&mut self.frame);
            return;
        }
        self.place = match &self.content {
            Some(content) if kind == BODY && content.key.0 == channel => {
                if payload as u64 > content.size - content.body.len() as u64 {
                    return self.spoil();
                }
                self.frame.clear();
                in_body(payload)
            }
            _ => Place::Whole(HEADER + payload + 1),
        };
    }

    /// A frame is there, up to its end octet, and is no part of a body that is kept.
    fn whole(&mut self) {
        self.place = Place::Header;
        if let Some((kind, channel, payload)) = self.header()
            && self.is_for_lapin(kind, channel, HEADER + payload)
        {
            self.through.extend_from_slice(&self.frame);
        }
        self.frame.clear();
    }

    /// `end`: where its end octet is.
    fn is_for_lapin(&mut self, kind: u8, channel: u16, end: usize) -> bool {
        // Something else on that channel than the body's next frame.
        let interrupted = self.content.take_if(|content| content.key.0 == channel);
        let closes = kind == METHOD && self.frame[HEADER..end].starts_with(&CHANNEL_CLOSE);
        if interrupted.is_some() && !closes {
            self.spoil();
            return false;
        }
        let delivered = self.delivered.take_if(|&mut (on, _)| on == channel);
        match (kind, delivered) {
            (METHOD, _) => {
                let method = &self.frame[HEADER..end];
                self.seen.method(method);
                if matches!(self.gate, Gate::Ahead) {
                    if method.starts_with(&CONNECTION_OPEN_OK) {
                        self.gate = Gate::Shut(Vec::new(), None);
                    } else if method.starts_with(&CONNECTION_BLOCKED) {
                        // Until the opposite comes, lapin sends nothing that could open it.
                        self.gate = Gate::Open;
                    }
                }
                if let Some(tag) = delivery_tag(method) {
                    self.delivered = Some((channel, tag));
                    // The one of an earlier channel of that number: tags begin anew with a channel.
                    self.bodies.take(channel, tag);
                }
                true
            }
            // One body at a time is enough for one consumer; others' are lapin's.
            (CONTENT_HEADER, Some(key)) if self.content.is_none() => {
                let Some(field) = self.frame[..end]
                    .get_mut(BODY_SIZE)
                    .and_then(|field| field.first_chunk_mut())
                else {
                    return true;
                };
                let size = u64::from_be_bytes(mem::take(field));
                if size == 0 {
                    return true;
                }
                let mut body = Vec::new();
                // Whether that much can be had shows when it is there.
                let _ = body.try_reserve_exact(usize::try_from(size).unwrap_or(usize::MAX));
                self.content = Some(Content {
                    key,
                    header: mem::take(&mut self.frame),
                    size,
                    body,
                });
                false
            }
            _ => true,
        }
    }

    /// A frame of the body has come to its end.
    fn body_frame(&mut self) {
        self.place = Place::Header;
        if let Some(content) = self
            .content
            .take_if(|content| content.body.len() as u64 == content.size)
        {
            self.bodies.put(content.key, content.body);
            self.through.extend(content.header);
        }
    }
}

fn in_body(left: usize) -> Place {
    match left {
        0 => Place::End,
        left => Place::Body(left),
    }
}

/// The tag of a `basic.deliver`, which is behind the consumer's, a short string.
fn delivery_tag(method: &[u8]) -> Option<DeliveryTag> {
    let arguments = method.strip_prefix(&BASIC_DELIVER)?;
    let (&length, rest) = arguments.split_first()?;
    let tag = rest.get(length.into()..)?.first_chunk()?;
    Some(u64::from_be_bytes(*tag))
}
