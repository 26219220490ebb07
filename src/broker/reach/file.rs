//! The files that options and URLs name: secrets, addresses and certificates.

use crate::exit::{Failure, is_shortage};
use std::{io, path::Path};

/// Some editors begin a file with it (U+FEFF in UTF-8). It isn't part of the text.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

pub(super) fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = std::fs::read(file)?;
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(bytes)
}

pub(super) fn read_text(file: &Path) -> io::Result<String> {
    String::from_utf8(read(file)?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it isn't UTF-8"))
}

/// The failure for a file that can't be read, 71 if the system is short of something; `what` names the file.
pub(super) fn read_failure(what: &str, error: &io::Error) -> Failure {
    if is_shortage(error) {
        Failure::system(format!("{what} can't be read"), error)
    } else {
        Failure::config(format!("{what} can't be read: {error}"))
    }
}

/// Most editors and tools end a file with a newline.
pub(super) fn without_newline(text: &str) -> &str {
    let line = text.strip_suffix('\n');
    line.map_or(text, |line| line.strip_suffix('\r').unwrap_or(line))
}
