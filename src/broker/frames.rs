//! Reads along with the broker's frames, for two facts that lapin 4.12 keeps to itself: the broker's version,
//! and whether a consumer was cancelled by the broker rather than by us.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

/// Frame header of AMQP 0-9-1 (2.3.5): type, channel (2 bytes), size (4 bytes).
const HEADER: usize = 7;
/// The type of a method frame.
const METHOD: u8 = 1;
/// Class and method of `connection.start`.
const CONNECTION_START: [u8; 4] = [0, 10, 0, 10];
/// Class and method of `basic.cancel`.
const BASIC_CANCEL: [u8; 4] = [0, 60, 0, 30];
/// How much of a method is kept, in bytes: `connection.start` is the longest one that matters.
const KEPT: usize = 4096;

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Seen {
    version: Mutex<Option<Version>>,
    cancelled: AtomicBool,
    without_external: AtomicBool,
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
}

/// RabbitMQ's version: major and minor.
pub(super) type Version = (u32, u32);

/// Follows one connection's incoming bytes.
#[derive(Debug)]
pub(super) struct Frames {
    seen: Arc<Seen>,
    header: [u8; HEADER],
    have: usize,
    /// What is left of the frame behind its header, its end octet included, in bytes.
    left: usize,
    method: Vec<u8>,
}

impl Frames {
    pub(super) fn new(seen: Arc<Seen>) -> Self {
        Self {
            seen,
            header: [0; HEADER],
            have: 0,
            left: 0,
            method: Vec::new(),
        }
    }

    /// Takes note of the next bytes, in pieces of any size.
    pub(super) fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.have < HEADER {
                let n = bytes.len().min(HEADER - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                self.have += n;
                bytes = &bytes[n..];
                if self.have == HEADER {
                    let size = u32::from_be_bytes([
                        self.header[3],
                        self.header[4],
                        self.header[5],
                        self.header[6],
                    ]);
                    self.left = size as usize + 1;
                    self.method.clear();
                }
                continue;
            }
            let n = bytes.len().min(self.left);
            if self.header[0] == METHOD {
                let room = KEPT - self.method.len();
                self.method.extend_from_slice(&bytes[..n.min(room)]);
            }
            self.left -= n;
            bytes = &bytes[n..];
            if self.left == 0 {
                self.have = 0;
                if self.header[0] == METHOD {
                    self.method();
                }
            }
        }
    }

    fn method(&mut self) {
        if self.method.starts_with(&BASIC_CANCEL) {
            self.seen.cancelled.store(true, Ordering::Release);
        } else if self.method.starts_with(&CONNECTION_START) {
            *self
                .seen
                .version
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = version(&self.method);
            let offered = mechanisms(&self.method);
            let without = offered.is_some_and(|names| !names.split(' ').any(|it| it == "EXTERNAL"));
            self.seen.without_external.store(without, Ordering::Release);
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

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![kind, 0, 1];
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(0xce);
        frame
    }

    fn stream() -> Vec<u8> {
        let start = [
            &CONNECTION_START[..],
            b"\0\x09\0\0\0\x30\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x064.3.61\0\0",
        ]
        .concat();
        let mut bytes = frame(METHOD, &start);
        bytes.extend(frame(METHOD, &[0, 60, 0, 60, 1, 2, 3]));
        // a body that looks like a cancel isn't one
        bytes.extend(frame(3, &frame(METHOD, &BASIC_CANCEL)));
        bytes.extend(frame(3, &[0; 3 * KEPT]));
        bytes.extend(frame(8, &[]));
        bytes
    }

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
            let seen = Arc::new(Seen::default());
            Frames::new(Arc::clone(&seen)).read(&frame(METHOD, &start));
            assert_eq!(seen.without_external(), without, "{names:?}");
        }
    }

    #[test]
    fn version_and_cancel_are_seen_however_the_bytes_are_cut() {
        let calm = stream();
        let cancelled = [calm.clone(), frame(METHOD, &BASIC_CANCEL)].concat();
        for size in [1, 2, 3, 7, 8, 13, 4096, usize::MAX] {
            for (bytes, expected) in [(&calm, false), (&cancelled, true)] {
                let seen = Arc::new(Seen::default());
                let mut frames = Frames::new(Arc::clone(&seen));
                for piece in bytes.chunks(size.min(bytes.len())) {
                    frames.read(piece);
                }
                assert_eq!(seen.version(), Some((4, 3)), "pieces of {size}");
                assert_eq!(seen.cancelled(), expected, "pieces of {size}");
            }
        }
    }
}
