//! The frames of AMQP 0-9-1, and what is noted of the broker's, as lapin 4.12 keeps it to itself.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::Notify;

/// Frame header of AMQP 0-9-1 (2.3.5): type, channel (2 bytes), size (4 bytes).
pub(super) const HEADER: usize = 7;
/// The last octet of a frame (2.3.5).
pub(super) const FRAME_END: u8 = 0xce;
/// The type of a method frame (2.3.5.1).
pub(super) const METHOD: u8 = 1;
/// The type of a frame with a content's header (2.3.5.2).
pub(super) const CONTENT_HEADER: u8 = 2;
/// The type of a frame with a piece of a body (2.3.5.2).
pub(super) const BODY: u8 = 3;
/// The type of a heartbeat frame (2.3.5.3).
pub(super) const HEARTBEAT: u8 = 8;

/// Class and method, as a method frame's payload begins.
type Id = [u8; 4];
/// `connection.start`.
const CONNECTION_START: Id = [0, 10, 0, 10];
/// `connection.open`.
pub(super) const CONNECTION_OPEN: Id = [0, 10, 0, 40];
/// `connection.open-ok`.
pub(super) const CONNECTION_OPEN_OK: Id = [0, 10, 0, 41];
/// `connection.close-ok`.
const CONNECTION_CLOSE_OK: Id = [0, 10, 0, 51];
/// `connection.blocked`.
pub(super) const CONNECTION_BLOCKED: Id = [0, 10, 0, 60];
/// `channel.close`.
pub(super) const CHANNEL_CLOSE: Id = [0, 20, 0, 40];
/// `basic.cancel`.
const BASIC_CANCEL: Id = [0, 60, 0, 30];
/// `basic.deliver`.
pub(super) const BASIC_DELIVER: Id = [0, 60, 0, 60];

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Seen {
    version: Mutex<Option<Version>>,
    cancelled: AtomicBool,
    without_external: AtomicBool,
    closed: Notify,
}

impl Seen {
    /// The broker's version, once it has greeted.
    pub(super) fn version(&self) -> Option<Version> {
        *self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the broker has greeted without offering the mechanism EXTERNAL. Who asks for it then is cut off without
    /// a word (seen with RabbitMQ 3.10 and 4.3).
    pub(super) fn without_external(&self) -> bool {
        self.without_external.load(Ordering::Acquire)
    }

    /// Whether the broker has cancelled a consumer of this connection.
    pub(super) fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Waits until the broker has confirmed that the connection is closed.
    pub(super) async fn closed(&self) {
        self.closed.notified().await;
    }
}

/// RabbitMQ's version: major and minor.
pub(super) type Version = (u32, u32);

impl Seen {
    /// Takes note of a method of the broker's.
    pub(super) fn method(&self, method: &[u8]) {
        if method.starts_with(&BASIC_CANCEL) {
            self.cancelled.store(true, Ordering::Release);
        } else if method.starts_with(&CONNECTION_CLOSE_OK) {
            self.closed.notify_one();
        } else if method.starts_with(&CONNECTION_START) {
            *self.version.lock().unwrap_or_else(PoisonError::into_inner) = version(method);
            let offered = mechanisms(method);
            let without = offered.is_some_and(|names| !names.split(' ').any(|it| it == "EXTERNAL"));
            self.without_external.store(without, Ordering::Release);
        }
    }
}

/// The version among the server's properties: the field's name, `S`, and a long string.
fn version(start: &[u8]) -> Option<Version> {
    const FIELD: &[u8] = b"\x07versionS";
    let at = start
        .windows(FIELD.len())
        .position(|window| window == FIELD)?
        + FIELD.len();
    let length = u32::from_be_bytes(start.get(at..at + 4)?.try_into().ok()?);
    let text = start.get(at + 4..)?.get(..length as usize)?;
    let mut numbers = std::str::from_utf8(text).ok()?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The names of the mechanisms, blanks between: a long string behind the protocol's version and the server's properties.
fn mechanisms(start: &[u8]) -> Option<&str> {
    let long = |bytes: &[u8]| -> Option<usize> {
        let length = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?);
        usize::try_from(length).ok()
    };
    let properties = start.get(CONNECTION_START.len() + 2..)?;
    let rest = properties.get(4 + long(properties)?..)?;
    std::str::from_utf8(rest.get(4..4 + long(rest)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_are_seen() {
        for (names, without) in [
            ("PLAIN EXTERNAL", false),
            ("AMQPLAIN PLAIN", true),
            ("", true),
        ] {
            let start = [
                &CONNECTION_START[..],
                b"\0\x09\0\0\0\x0b\x09copyrightV",
                &(names.len() as u32).to_be_bytes(),
                names.as_bytes(),
                b"\0\0\0\x05en_US",
            ]
            .concat();
            let seen = Seen::default();
            seen.method(&start);
            assert_eq!(seen.without_external(), without, "{names:?}");
        }
    }

    #[test]
    fn version_and_cancel_are_seen() {
        let seen = Seen::default();
        seen.method(b"\0\x0a\0\x0a\0\x09\0\0\0\x30\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x064.3.61\0\0");
        assert_eq!(seen.version(), Some((4, 3)));
        seen.method(&[0, 60, 0, 31, 1, 2, 3]);
        assert!(!seen.cancelled());
        seen.method(&[0, 60, 0, 30, 1, 2, 3]);
        assert!(seen.cancelled());
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_seen() {
        let seen = Seen::default();
        seen.method(&[0, 10, 0, 50]);
        let soon = std::time::Duration::from_millis(1);
        assert!(tokio::time::timeout(soon, seen.closed()).await.is_err());
        seen.method(&[0, 10, 0, 51]);
        seen.closed().await;
    }
}
