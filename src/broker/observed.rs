//! What one connection's broker was seen to say: lapin 4.12 keeps it to itself.

use super::errors::Refusal;
use lapin::{
    ErrorKind,
    protocol::{AMQPClass, basic, channel, connection, parse_class},
};

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
    pub(super) delivering: bool,
}

impl Observed {
    /// The refusal behind an error, if it is one. lapin has no text for a code that it doesn't know.
    pub(super) fn refusal(&self, error: &lapin::Error) -> Option<Refusal> {
        match error.kind() {
            ErrorKind::ProtocolError(error) => {
                Some(Refusal::new(error.get_id(), error.get_message()))
            }
            ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => {
                self.closed.clone()
            }
            ErrorKind::ParsingError(_) if self.closed_unreadably => self.closed.clone(),
            _ => None,
        }
    }

    /// Takes note of a method.
    pub(super) fn method(&mut self, payload: &[u8]) -> Result<(), &'static str> {
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

/// The version among the server's properties.
fn version(start: &connection::Start) -> Option<Version> {
    let version = start.server_properties.inner().get("version")?;
    let text = version.as_long_string()?.to_string();
    let mut numbers = text.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
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
        let mut observed = Observed {
            closed: Some(Refusal::new(404, "NOT_FOUND - no queue 'q\u{fffd}...")),
            ..Observed::default()
        };
        // An earlier close is not what lapin stumbled over.
        assert!(observed.refusal(&error).is_none());
        observed.closed_unreadably = true;
        let refusal = observed.refusal(&error).unwrap();
        assert_eq!(refusal.meaning(), Meaning::Missing);
    }
}
