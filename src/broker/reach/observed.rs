//! Reads what the broker sends and lapin 4.12 doesn't expose, and refuses what would crash lapin's parser.

use crate::broker::errors::Refusal;
use lapin::{
    ErrorKind,
    protocol::{AMQPClass, basic, connection, parse_class},
};
use std::time::Instant;

/// A `basic.deliver` begins with its class and method.
const DELIVER: [u8; 4] = [0, 60, 0, 60];

/// What precedes the properties in a content header (AMQP 0-9-1, 2.3.5.2), in bytes: class, weight, body size.
const BEFORE_PROPERTIES: usize = 12;

/// Of tables and arrays. lapin's parser is recursive: a thousand levels overflow its thread's stack of 2 MiB.
const NESTING_MAX: usize = 100;

/// Major and minor.
pub(in crate::broker) type Version = (u32, u32);

#[derive(Debug, Default)]
pub(in crate::broker) struct Observed {
    /// RabbitMQ's. `None` for another product, or if it is hidden.
    pub(in crate::broker) version: Option<Version>,
    /// Another broker, or a proxy that hides the broker's version.
    pub(in crate::broker) is_another_product: bool,
    /// On this broker streams refuse `x-priority`, and 0 is the default of all other queues, so it keeps us from
    /// consuming a stream. (In Qpid Broker-J 0 isn't the default, by its manual.)
    pub(in crate::broker) priority_excludes_streams: bool,
    /// For the login, separated by blanks.
    pub(in crate::broker) mechanisms: Option<String>,
    /// Proposed interval, in seconds; 0 is none.
    pub(in crate::broker) heartbeat: Option<u16>,
    /// Proposed limit, in bytes; 0 is none.
    pub(in crate::broker) frame_max: Option<u32>,
    /// The last `channel.close` or `connection.close`: lapin drops those with a code that it doesn't know. It is never
    /// about an earlier consumer, as we don't subscribe on a connection that has a close.
    pub(in crate::broker) closed: Option<Refusal>,
    /// lapin's parser can't read that close.
    pub(in crate::broker) closed_unreadably: bool,
    /// Why a delivered message can't be read. The connection ends with it.
    pub(in crate::broker) unreadable: Option<String>,
    pub(in crate::broker) consumer: ObservedConsumer,
    /// Whether `basic.deliver` was the last method: its content follows.
    delivering: bool,
}

/// What the broker has sent to the present consumer.
#[derive(Debug, Default)]
pub(in crate::broker) struct ObservedConsumer {
    pub(in crate::broker) cancelled: bool,
    /// How many have begun. lapin drops those that come after a `basic.cancel` with `nowait`.
    pub(in crate::broker) deliveries: u64,
    /// Of the last delivery, as the next field.
    pub(in crate::broker) delivery_began: Option<Instant>,
    pub(in crate::broker) redelivered: bool,
}

impl Observed {
    /// Since 4.3, RabbitMQ takes `x-consumer-timeout`, and the queue watches it. Behind a proxy it may be any version.
    pub(in crate::broker) fn may_know_ack_timeout(&self) -> bool {
        self.is_another_product || self.version >= Some((4, 3))
    }

    /// lapin reports its own complaints as `ProtocolError`, too: the error is a refusal only if the broker has closed
    /// something. If lapin doesn't know the code or can't read the text, what we have read counts.
    pub(in crate::broker) fn refusal(&self, error: &lapin::Error) -> Option<Refusal> {
        match error.kind() {
            ErrorKind::ProtocolError(error) if self.closed.is_some() => {
                Some(Refusal::new(error.get_id(), error.get_message()))
            }
            ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => self.closed.clone(),
            ErrorKind::ParsingError(_) if self.closed_unreadably => self.closed.clone(),
            _ => None,
        }
    }

    /// To be called when the consumer's channel is closed: until then the broker may still send it something.
    pub(in crate::broker) fn forget_consumer(&mut self) {
        self.consumer = ObservedConsumer::default();
    }

    /// Fails if lapin must not read this payload.
    pub(super) fn read_method(&mut self, payload: &[u8]) -> Result<(), String> {
        self.delivering = payload.starts_with(&DELIVER);
        if self.delivering {
            self.consumer.deliveries += 1;
            self.consumer.delivery_began = Some(Instant::now());
            self.consumer.redelivered = redelivered(payload);
        }
        let read = check_nesting(payload).and_then(|()| self.note_method(payload));
        self.note_unreadable(read)
    }

    pub(super) fn read_content_header(&mut self, payload: &[u8]) -> Result<(), String> {
        let properties = payload.get(BEFORE_PROPERTIES..).unwrap_or_default();
        let read = check_nesting(payload).and_then(|()| {
            let read = basic::parse_properties(properties);
            read.map(drop).map_err(|_| "its properties are not valid AMQP".to_owned())
        });
        self.note_unreadable(read)
    }

    /// Notes that a header frame of `size` bytes exceeds the connection's `limit`. lapin then ends the connection.
    pub(super) fn note_too_large(&mut self, size: usize, limit: usize) {
        let problem = format!(
            "its headers are a frame of {size} bytes, and this connection takes {limit} (frame_max): raise frame_max in the URL and in rabbitmq.conf"
        );
        let _ = self.note_unreadable(Err(problem));
    }

    fn note_unreadable(&mut self, read: Result<(), String>) -> Result<(), String> {
        if let Err(problem) = &read
            && self.delivering
        {
            // Only a message is delivered again on the next connection, which would then fail, too.
            self.unreadable.get_or_insert_with(|| problem.clone());
        }
        read
    }

    fn note_method(&mut self, payload: &[u8]) -> Result<(), String> {
        use {basic::AMQPMethod as B, connection::AMQPMethod as Co};
        let method = parse_class(payload).map(|(_, class)| class);
        // connection.close and channel.close are read by hand: RabbitMQ 3.10 cuts a text at 255 bytes, even inside a
        // character, and lapin's parser refuses that.
        if let [0, 10, 0, 50, a, b, size, rest @ ..] | [0, 20, 0, 40, a, b, size, rest @ ..] = payload
            && let Some(text) = rest.get(..usize::from(*size))
        {
            let code = u16::from_be_bytes([*a, *b]);
            self.closed = Some(Refusal::new(code, String::from_utf8_lossy(text)));
            self.closed_unreadably = method.is_err();
        }
        match method {
            Ok(AMQPClass::Connection(Co::Start(start))) => {
                let product = property(&start, "product");
                self.priority_excludes_streams =
                    product.as_deref().is_none_or(|product| ["RabbitMQ", "LavinMQ", "AMQProxy"].contains(&product));
                self.is_another_product = product.is_some_and(|product| product != "RabbitMQ");
                self.version = version(&start).filter(|_| !self.is_another_product);
                self.mechanisms = Some(start.mechanisms.to_string());
            }
            Ok(AMQPClass::Connection(Co::Tune(tune))) => {
                self.heartbeat = Some(tune.heartbeat);
                self.frame_max = Some(tune.frame_max);
            }
            Ok(AMQPClass::Basic(B::Cancel(_))) => self.consumer.cancelled = true,
            Err(_) if self.delivering => {
                return Err("its exchange or routing key is not UTF-8".to_owned());
            }
            _ => {}
        }
        Ok(())
    }
}

/// The flag of a `basic.deliver` (1.8.3.13). It follows class and method, consumer tag and delivery tag.
fn redelivered(payload: &[u8]) -> bool {
    let tag = payload.get(DELIVER.len()).copied().unwrap_or_default();
    payload.get(DELIVER.len() + 1 + usize::from(tag) + 8).is_some_and(|flags| flags & 1 == 1)
}

fn property(start: &connection::Start, name: &str) -> Option<String> {
    Some(start.server_properties.inner().get(name)?.as_long_string()?.to_string())
}

fn version(start: &connection::Start) -> Option<Version> {
    let text = property(start, "version")?;
    let mut numbers = text.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Tables and arrays begin with their type and size (4.2.5.5). Text that looks like one counts, too.
fn check_nesting(payload: &[u8]) -> Result<(), String> {
    let mut ends = Vec::new();
    for (at, field) in payload.windows(5).enumerate() {
        if let &[b'A' | b'F', a, b, c, d] = field {
            let end = at + 5 + u32::from_be_bytes([a, b, c, d]) as usize;
            ends.retain(|end| *end > at);
            if end <= payload.len() {
                ends.push(end);
            }
            if ends.len() > NESTING_MAX {
                return Err("its headers are nested more than 100 deep".to_owned());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::errors::Meaning;

    #[test]
    fn a_text_that_lapin_cannot_read_is_a_refusal_too() {
        let cut = b"\0\x14\0\x28\x01\x94\x05q\xc3...\0\0\0\0";
        let error = parse_class(&cut[..]).unwrap_err();
        let error = ErrorKind::ParsingError(error).into();
        let mut observed =
            Observed { closed: Some(Refusal::new(404, "NOT_FOUND - no queue 'q\u{fffd}...")), ..Observed::default() };
        // lapin could read that close, so the error is about something else.
        assert!(observed.refusal(&error).is_none());
        observed.closed_unreadably = true;
        let refusal = observed.refusal(&error).unwrap();
        assert_eq!(refusal.meaning(), Meaning::Missing);
    }
}
