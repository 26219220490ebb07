//! A read-only tap on what the broker sends, frame by frame. It may refuse to read on; it alters, delays, invents and
//! swallows nothing.

use super::observed::{Shared, refuse};
use std::io;

/// Frame header (AMQP 0-9-1, 2.3.5): type, channel (2 bytes), size of the payload (4 bytes).
const HEADER: usize = 7;
/// The frame types that are looked into (2.3.5.1, 2.3.5.2); bodies and heartbeats are only counted.
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

/// Follows what one connection receives, in pieces of any size.
#[derive(Debug)]
pub(super) struct Tap {
    observed: Shared,
    /// The largest payload that is read, in bytes.
    payload_max: usize,
    /// The frame that has begun, as far as it is here.
    frame: Vec<u8>,
    /// How much of a frame that isn't looked into is still to come, in bytes.
    skip: usize,
    /// It isn't AMQP; lapin says so.
    foreign: bool,
}

impl Tap {
    pub(super) fn new(frame_max: u32, observed: Shared) -> Self {
        Self {
            observed,
            payload_max: frame_max as usize,
            frame: Vec::new(),
            skip: 0,
            foreign: false,
        }
    }

    /// Looks at what was received.
    ///
    /// # Errors
    /// `InvalidData` when lapin must not read on.
    pub(super) fn observe(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && !self.foreign {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let wanted = match self.frame.first_chunk::<HEADER>() {
                None => HEADER,
                Some(&[.., a, b, c, d]) => HEADER + u32::from_be_bytes([a, b, c, d]) as usize + 1,
            };
            let taken = (wanted - self.frame.len()).min(bytes.len());
            self.frame.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.frame.len() == HEADER && wanted == HEADER {
                self.frame_header()?;
            } else if self.frame.len() == wanted {
                let frame = std::mem::take(&mut self.frame);
                self.inspect(frame[0], &frame[HEADER..wanted - 1])?;
            }
        }
        Ok(())
    }

    fn frame_header(&mut self) -> io::Result<()> {
        let &[kind, _, _, a, b, c, d] = self.frame.first_chunk::<HEADER>().unwrap_or(&[0; HEADER]);
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        match kind {
            METHOD | CONTENT_HEADER | BODY | HEARTBEAT if size > self.payload_max => {
                return Err(refuse("a frame is larger than was agreed on"));
            }
            METHOD | CONTENT_HEADER => {}
            BODY | HEARTBEAT => {
                self.frame.clear();
                self.skip = size + 1;
            }
            _ => self.foreign = true,
        }
        Ok(())
    }

    fn inspect(&self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let mut observed = self.observed.lock();
        match kind {
            METHOD => observed.method(payload),
            _ => observed.content_header(payload),
        }
    }
}

#[cfg(test)]
mod tests;
