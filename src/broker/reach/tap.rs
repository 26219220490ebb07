//! A read-only tap: finds the frames that [`Observed`] reads. The connection fails at one that lapin must not read.

use super::observed::Observed;
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard},
};

/// The limit to propose, in bytes: RabbitMQ's default. With it, lapin 4.12 allocates its two buffers of 4 MiB at once,
/// and most of their zero pages are never touched. Without it, lapin grows them later, which writes to every page.
pub(in crate::broker) const FRAME_MAX: u32 = 131_072;

/// Size of a frame's header (AMQP 0-9-1, 2.3.5), in bytes: type, channel (2), size of the payload (4).
const HEADER: usize = 7;
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

#[derive(Debug)]
pub(in crate::broker) struct Tap {
    observed: Arc<Mutex<Observed>>,
    proposed_frame_max: usize,
    /// Largest payload to read, in bytes: at least [`FRAME_MAX`], for frames that come before the limit is agreed on.
    payload_max: usize,
    /// Empty, or the start of one frame.
    frame: Vec<u8>,
    /// How many bytes to skip: the rest of a body, or everything if it isn't AMQP (lapin reports that).
    skip: usize,
}

impl Tap {
    pub(in crate::broker) fn new(frame_max: u32, observed: Arc<Mutex<Observed>>) -> Self {
        let payload_max = frame_max.max(FRAME_MAX) as usize;
        Self { observed, proposed_frame_max: frame_max as usize, payload_max, frame: Vec::new(), skip: 0 }
    }

    /// Takes the next piece, of any size. Fails with `InvalidData` if lapin must not read on.
    pub(in crate::broker) fn observe(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            // First the header. Once that tells the size: the rest of a method or content header. A body is skipped.
            let wanted = payload_size(&self.frame).map_or(HEADER, |size| HEADER + size + 1);
            let taken = (wanted - self.frame.len()).min(bytes.len());
            self.frame.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            let Some(size) = payload_size(&self.frame) else {
                continue;
            };
            if self.frame.len() == HEADER && self.frame[0] == CONTENT_HEADER {
                self.note_if_too_large(size);
            }
            match self.frame[0] {
                METHOD | CONTENT_HEADER | BODY | HEARTBEAT if size > self.payload_max => {
                    let limit = self.payload_max;
                    return Err(refuse(format!("a frame with {size} bytes of payload, and at most {limit} are read")));
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
        let mut observed = self.observed();
        let read = match kind {
            METHOD => observed.read_method(payload),
            _ => observed.read_content_header(payload),
        };
        read.map_err(refuse)
    }

    /// RabbitMQ 3.10 and 4.3 send all headers in one frame, even if it is larger than agreed. lapin refuses it then.
    fn note_if_too_large(&self, size: usize) {
        let mut observed = self.observed();
        let theirs = observed.frame_max.filter(|max| *max > 0).map(|max| max as usize);
        let agreed = theirs.map_or(self.proposed_frame_max, |theirs| theirs.min(self.proposed_frame_max));
        let frame = HEADER + size + 1;
        if frame > agreed {
            observed.note_too_large(frame, agreed);
        }
    }

    fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().expect("nobody panics with it")
    }
}

fn refuse(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

fn payload_size(frame: &[u8]) -> Option<usize> {
    let &[_, _, _, a, b, c, d] = frame.first_chunk::<HEADER>()?;
    Some(u32::from_be_bytes([a, b, c, d]) as usize)
}

#[cfg(test)]
mod tests;
