//! What the broker has sent that lapin 4.12 keeps to itself, and what lapin must not be given to read: [`Tap`]'s part
//! that knows methods and headers.
//!
//! [`Tap`]: super::tap::Tap

use lapin::protocol::{
    AMQPClass,
    basic::{self, parse_properties},
    channel, connection, parse_class,
};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Class and method of `connection.start` and `basic.deliver`, as their frames' payloads begin.
const START: [u8; 4] = [0, 10, 0, 10];
const DELIVER: [u8; 4] = [0, 60, 0, 60];
/// What begins the payload of a content header (AMQP 0-9-1, 2.3.5.2), in bytes: class, weight, size of the body.
const BEFORE_PROPERTIES: usize = 12;
/// How deep tables and arrays may be nested: lapin's parser calls itself for each level, and a thousand of them
/// overflow its thread's stack of 2 MiB.
const NESTING_MAX: usize = 100;

/// RabbitMQ's version: major and minor.
pub(super) type Version = (u32, u32);

/// What one connection's broker has sent so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    /// The broker's version, once it has greeted.
    pub(super) version: Option<Version>,
    /// The names of its login mechanisms, blanks between.
    pub(super) mechanisms: Option<String>,
    /// The heartbeat interval that it proposed, in seconds; 0 is none.
    pub(super) heartbeat: Option<u16>,
    /// Reply code and text of its last `channel.close` or `connection.close`: lapin drops those of unknown codes.
    pub(super) closed: Option<(u16, String)>,
    /// Whether it has cancelled a consumer.
    pub(super) cancelled: bool,
    /// Why the message that it delivers can't be read.
    pub(super) unreadable: Option<String>,
    /// `basic.deliver` was the last method: a message's content comes next.
    delivering: bool,
}

impl Observed {
    /// Takes note of a method.
    ///
    /// # Errors
    /// When lapin must not read it.
    pub(super) fn method(&mut self, payload: &[u8]) -> io::Result<()> {
        self.delivering = payload.starts_with(&DELIVER);
        if payload.starts_with(&START) && table_too_deep(payload.get(6..).unwrap_or_default()) {
            return Err(refuse("the broker's properties are nested too deep"));
        }
        // Methods with a table in them that only a client sends: the nesting of those isn't checked.
        if let &[0, class, 0, method, ..] = payload
            && matches!(
                (class, method),
                (10, 11) | (40, 10 | 30 | 40) | (50, 10 | 20 | 50) | (60, 20)
            )
        {
            return Err(refuse("the broker sent a method that is a client's"));
        }
        match parse_class(payload) {
            Ok((_, AMQPClass::Connection(connection::AMQPMethod::Start(start)))) => {
                self.version = version(&start);
                self.mechanisms = Some(start.mechanisms.to_string());
            }
            Ok((_, AMQPClass::Connection(connection::AMQPMethod::Tune(tune)))) => {
                self.heartbeat = Some(tune.heartbeat);
            }
            Ok((_, AMQPClass::Connection(connection::AMQPMethod::Close(close)))) => {
                self.closed = Some((close.reply_code, close.reply_text.to_string()));
            }
            Ok((_, AMQPClass::Channel(channel::AMQPMethod::Close(close)))) => {
                self.closed = Some((close.reply_code, close.reply_text.to_string()));
            }
            Ok((_, AMQPClass::Basic(basic::AMQPMethod::Cancel(_)))) => self.cancelled = true,
            Err(_) if self.delivering => {
                return self.refuse_content("its exchange or routing key is not UTF-8");
            }
            _ => {}
        }
        Ok(())
    }

    /// Checks the header of a message's content.
    ///
    /// # Errors
    /// When lapin must not read it, or can't.
    pub(super) fn content_header(&mut self, payload: &[u8]) -> io::Result<()> {
        let properties = payload.get(BEFORE_PROPERTIES..).unwrap_or_default();
        if headers(properties).is_some_and(table_too_deep) {
            let problem = format!("its headers are nested more than {NESTING_MAX} deep");
            return self.refuse_content(&problem);
        }
        match parse_properties(properties) {
            Ok(_) => Ok(()),
            Err(_) => self.refuse_content("its properties are not valid AMQP"),
        }
    }

    /// Only a message that was delivered is one that can't be read: it would come again over a new connection.
    fn refuse_content(&mut self, problem: &str) -> io::Result<()> {
        if self.delivering {
            self.unreadable = Some(problem.to_owned());
        }
        Err(refuse(problem))
    }
}

/// [`Observed`], shared by the tap on lapin's thread and the connection's owner.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Mutex<Observed>>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Observed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn refuse(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

/// Where the headers begin among the properties: behind the flags and two short strings (4.2.6.1).
fn headers(properties: &[u8]) -> Option<&[u8]> {
    let (&[high, _], mut rest) = properties.split_first_chunk()?;
    for flag in [0x80, 0x40] {
        if high & flag != 0 {
            rest = rest.get(1 + usize::from(*rest.first()?)..)?;
        }
    }
    (high & 0x20 != 0).then_some(rest)
}

/// Whether the table at the beginning of `bytes`, its size first, is nested too deep.
fn table_too_deep(bytes: &[u8]) -> bool {
    let Some((size, rest)) = bytes.split_first_chunk() else {
        return false;
    };
    let size = u32::from_be_bytes(*size) as usize;
    too_deep(&rest[..size.min(rest.len())], true, NESTING_MAX)
}

/// Whether there are more than `levels` tables or arrays within each other in this table or array (4.2.5.5, with
/// RabbitMQ's types). What is malformed ends the search, as lapin's parser gets no further either.
fn too_deep(mut fields: &[u8], is_table: bool, levels: usize) -> bool {
    while !fields.is_empty() {
        let name = if is_table {
            1 + usize::from(fields[0])
        } else {
            0
        };
        let Some((&kind, value)) = fields.get(name..).and_then(|field| field.split_first()) else {
            return false;
        };
        let size = match (kind, value.first_chunk()) {
            (b'V', _) => 0,
            (b't' | b'b' | b'B', _) => 1,
            (b's' | b'U' | b'u', _) => 2,
            (b'I' | b'i' | b'f', _) => 4,
            (b'D', _) => 5,
            (b'L' | b'l' | b'd' | b'T', _) => 8,
            (b'S' | b'x' | b'A' | b'F', Some(size)) => 4 + u32::from_be_bytes(*size) as usize,
            _ => return false,
        };
        let Some((value, rest)) = value.split_at_checked(size) else {
            return false;
        };
        if matches!(kind, b'A' | b'F')
            && (levels == 0 || too_deep(&value[4..], kind == b'F', levels - 1))
        {
            return true;
        }
        fields = rest;
    }
    false
}

/// The version among the server's properties.
fn version(start: &connection::Start) -> Option<Version> {
    let text = match start.server_properties.inner().get("version")? {
        lapin::types::AMQPValue::LongString(text) => text.to_string(),
        _ => return None,
    };
    let mut numbers = text.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}
