//! `qpublish --lines` and `--null`: whatever the sizes of the pieces that are read, the records are those that a simple
//! split of the whole input yields.
//!
//! No record is lost, invented or cut: at the end of a piece, after an interrupted system call, by an error in the
//! middle of a record, or by a record that is too long.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::io::{self, BufReader, ErrorKind, Read};

/// The largest message, in bytes: src/publish/input.rs has this small limit when it is fuzzed.
const LARGEST: usize = 1 << 10;

#[derive(Arbitrary, Debug)]
struct Input {
    null: bool,
    /// The most bytes that each read returns; 0 is an interrupted read.
    reads: Vec<u16>,
    /// Whether the input ends with an error.
    fails: bool,
    /// A byte and how often it is repeated, to make long records.
    long: Option<(u8, u16)>,
    content: Vec<u8>,
}

fuzz_target!(|input: Input| {
    let separator = if input.null { 0 } else { b'\n' };
    let mut content = input.content;
    if let Some((byte, count)) = input.long {
        let middle = content.len() / 2;
        content.splice(middle..middle, vec![byte; count.into()]);
    }
    let reader = Pieces { content: &content, reads: input.reads.iter(), fails: input.fails };
    let mut found = Vec::new();
    let mut error = None;
    for record in qconsume::fuzzing::records(BufReader::new(reader), separator) {
        match record {
            Ok(record) => found.push(record),
            Err(why) => {
                // qpublish stops there.
                error = Some(why.kind());
                break;
            }
        }
    }

    let (expected, ends) = split(&content, separator, input.fails);
    assert_eq!(error, ends);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
});

/// The records before the first error, and that error.
fn split(content: &[u8], separator: u8, fails: bool) -> (Vec<&[u8]>, Option<ErrorKind>) {
    let mut records: Vec<_> = content.split(|byte| *byte == separator).collect();
    let last = records.pop().expect("split yields at least one part");
    let mut error = None;
    if last.len() > LARGEST {
        error = Some(ErrorKind::FileTooLarge);
    } else if fails {
        error = Some(ErrorKind::Other);
    } else if !last.is_empty() {
        records.push(last);
    }
    if let Some(first) = records.iter().position(|record| record.len() > LARGEST) {
        records.truncate(first);
        error = Some(ErrorKind::FileTooLarge);
    }
    if separator == b'\n'
        && let Some(first) = records.first_mut()
    {
        *first = first.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(first);
    }
    (records, error)
}

struct Pieces<'a> {
    content: &'a [u8],
    reads: std::slice::Iter<'a, u16>,
    fails: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = match self.reads.next() {
            Some(0) => return Err(ErrorKind::Interrupted.into()),
            Some(size) => usize::from(*size),
            None => usize::MAX,
        };
        let size = size.min(self.content.len()).min(buffer.len());
        if size == 0 && self.fails {
            return Err(io::Error::other("the disk is gone"));
        }
        let (piece, rest) = self.content.split_at(size);
        buffer[..size].copy_from_slice(piece);
        self.content = rest;
        Ok(size)
    }
}
