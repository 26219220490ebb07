//! A read-only tap on what the broker sends: it notes what lapin 4.12 keeps to itself, and refuses to read on where
//! lapin must not. It alters, delays, invents and swallows nothing.

use super::errors::Refusal;
use lapin::protocol::{
    AMQPClass,
    basic::{self, parse_properties},
    channel, connection, parse_class,
};
use std::{
    io,
    sync::{Arc, Mutex},
};

/// Frame header (AMQP 0-9-1, 2.3.5): type, channel (2 bytes), size of the payload (4 bytes).
const HEADER: usize = 7;
/// The frame types; bodies and heartbeats are only counted.
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
/// Class and method of `basic.deliver`, as its payload begins.
const DELIVER: [u8; 4] = [0, 60, 0, 60];
/// What begins the payload of a content header (2.3.5.2), in bytes: class, weight, size of the body.
const BEFORE_PROPERTIES: usize = 12;
/// How deep tables and arrays may be nested: lapin's parser calls itself for each level, and a thousand of them
/// overflow its thread's stack of 2 MiB.
const NESTING_MAX: usize = 100;

/// RabbitMQ's version: major and minor.
pub(super) type Version = (u32, u32);

/// What one connection's broker has sent so far.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// The broker's version, once it has greeted.
    pub(super) version: Option<Version>,
    /// The names of its login mechanisms, blanks between.
    pub(super) mechanisms: Option<String>,
    /// The heartbeat interval that it proposed, in seconds; 0 is none.
    pub(super) heartbeat: Option<u16>,
    /// Its last `channel.close` or `connection.close`: lapin drops those of unknown codes.
    pub(super) closed: Option<Refusal>,
    /// Whether lapin can't read that close.
    pub(super) closed_unreadably: bool,
    /// Whether it has cancelled a consumer.
    pub(super) cancelled: bool,
    /// Why the message that it delivers can't be read.
    pub(super) unreadable: Option<&'static str>,
    /// `basic.deliver` was the last method: a message's content comes next.
    delivering: bool,
}

/// Follows what one connection receives, in pieces of any size.
#[derive(Debug)]
pub(super) struct Tap {
    observed: Arc<Mutex<Observed>>,
    /// The largest payload that is read, in bytes.
    payload_max: usize,
    /// The frame that has begun, as far as it is here.
    frame: Vec<u8>,
    /// How much isn't looked into, in bytes: a body's rest, or everything where it isn't AMQP, which lapin says.
    skip: usize,
}

impl Tap {
    pub(super) fn new(frame_max: u32, observed: Arc<Mutex<Observed>>) -> Self {
        Self {
            observed,
            payload_max: frame_max as usize,
            frame: Vec::new(),
            skip: 0,
        }
    }

    /// Looks at what was received.
    ///
    /// # Errors
    /// `InvalidData` when lapin must not read on.
    pub(super) fn observe(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let wanted = payload_size(&self.frame).map_or(HEADER, |size| HEADER + size + 1);
            let taken = (wanted - self.frame.len()).min(bytes.len());
            self.frame.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            let Some(size) = payload_size(&self.frame) else {
                continue;
            };
            match self.frame[0] {
                METHOD | CONTENT_HEADER | BODY | HEARTBEAT if size > self.payload_max => {
                    return Err(refuse("a frame is larger than was agreed on"));
                }
                METHOD | CONTENT_HEADER if self.frame.len() <= HEADER + size => continue,
                kind @ (METHOD | CONTENT_HEADER) => self.inspect(kind, size)?,
                BODY | HEARTBEAT => self.skip = size + 1,
                _ => self.skip = usize::MAX,
            }
            self.frame.clear();
        }
        Ok(())
    }

    fn inspect(&self, kind: u8, size: usize) -> io::Result<()> {
        let payload = &self.frame[HEADER..HEADER + size];
        let mut observed = self.observed.lock().expect("nobody panics with it");
        if kind == METHOD {
            observed.delivering = payload.starts_with(&DELIVER);
        }
        let read = check_nesting(payload).and_then(|()| match kind {
            METHOD => observed.method(payload),
            _ => parse_properties(payload.get(BEFORE_PROPERTIES..).unwrap_or_default())
                .map(drop)
                .map_err(|_| "its properties are not valid AMQP"),
        });
        read.map_err(|problem| {
            // Only a message that was delivered comes again over a new connection.
            observed.unreadable = observed.delivering.then_some(problem);
            refuse(problem)
        })
    }
}

impl Observed {
    /// Takes note of a method.
    fn method(&mut self, payload: &[u8]) -> Result<(), &'static str> {
        use {basic::AMQPMethod as B, channel::AMQPMethod as Ch, connection::AMQPMethod as Co};
        match parse_class(payload).map(|(_, class)| class) {
            Ok(AMQPClass::Connection(Co::Start(start))) => {
                self.version = version(&start);
                self.mechanisms = Some(start.mechanisms.to_string());
            }
            Ok(AMQPClass::Connection(Co::Tune(tune))) => self.heartbeat = Some(tune.heartbeat),
            Ok(AMQPClass::Connection(Co::Close(close))) => {
                self.closed = Some(Refusal::new(close.reply_code, &close.reply_text));
            }
            Ok(AMQPClass::Channel(Ch::Close(close))) => {
                self.closed = Some(Refusal::new(close.reply_code, &close.reply_text));
            }
            Ok(AMQPClass::Basic(B::Cancel(_))) => self.cancelled = true,
            Err(_) if self.delivering => return Err("its exchange or routing key is not UTF-8"),
            Err(_) => self.unreadable_close(payload),
            _ => {}
        }
        Ok(())
    }

    /// Takes note of a close whose text isn't UTF-8: RabbitMQ shortens a text to 255 bytes wherever that is in a character
    /// (seen with 3.10).
    fn unreadable_close(&mut self, payload: &[u8]) {
        if let [0, 10, 0, 50, a, b, size, rest @ ..] | [0, 20, 0, 40, a, b, size, rest @ ..] =
            payload
            && let Some(text) = rest.get(..usize::from(*size))
        {
            let code = u16::from_be_bytes([*a, *b]);
            self.closed = Some(Refusal::new(code, String::from_utf8_lossy(text)));
            self.closed_unreadably = true;
        }
    }
}

fn refuse(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The size of the payload, once the frame's header is here.
fn payload_size(frame: &[u8]) -> Option<usize> {
    let &[_, _, _, a, b, c, d] = frame.first_chunk::<HEADER>()?;
    Some(u32::from_be_bytes([a, b, c, d]) as usize)
}

/// Refuses tables and arrays that may be nested too deep, wherever they stand: each begins with its type and its size
/// (4.2.5.5). What only looks like one, in a text, counts too, as long as it would fit.
fn check_nesting(payload: &[u8]) -> Result<(), &'static str> {
    let mut ends = Vec::new();
    for (at, field) in payload.windows(5).enumerate() {
        if let &[b'A' | b'F', a, b, c, d] = field {
            let end = at + 5 + u32::from_be_bytes([a, b, c, d]) as usize;
            ends.retain(|end| *end > at);
            if end <= payload.len() {
                ends.push(end);
            }
            if ends.len() > NESTING_MAX {
                return Err("its headers are nested more than 100 deep");
            }
        }
    }
    Ok(())
}

/// The version among the server's properties.
fn version(start: &connection::Start) -> Option<Version> {
    let version = start.server_properties.inner().get("version")?;
    let text = version.as_long_string()?.to_string();
    let mut numbers = text.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests;
