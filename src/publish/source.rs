//! Where messages come from: read on a thread of its own, no further ahead than the window lets it.

use super::progress::Total;
use crate::{
    broker::Messages,
    exit::{Exit, Failure},
};
use nix::unistd::{AccessFlags, access};
use std::{
    ffi::OsString,
    fmt,
    fs::{File, Metadata},
    io::{self, BufRead, BufReader, IsTerminal, Read, Seek},
    iter, mem,
    os::{fd::AsFd, unix::ffi::OsStringExt},
    path::PathBuf,
    sync::Arc,
    thread,
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
};

/// How much may be read and not confirmed, in KiB: enough to keep a broker busy over a slow network, and little
/// enough for a small pod. A message that is larger than that goes alone.
const WINDOW: u32 = 16 * 1024;

/// What a message counts beside its size, in KiB: at most 2,048 are in flight.
const BESIDE: u32 = 8;

/// Largest message that any RabbitMQ can be made to take, in bytes. What is longer isn't read to its end.
const LARGEST: u64 = if cfg!(fuzzing) { 1 << 10 } else { 512 << 20 };

/// U+FEFF in UTF-8: some editors begin a file with it.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Where messages come from.
#[derive(Debug)]
pub(super) enum Source {
    /// Each is a message.
    Arguments(Vec<OsString>),
    /// Each is a message.
    Files(Vec<PathBuf>),
    /// All of standard input is one.
    Input,
    /// What is between these bytes on standard input.
    Records(u8),
}

impl Source {
    /// These files, of which `-` is standard input.
    ///
    /// # Errors
    /// When one can't be read.
    pub(super) fn files(mut files: Vec<PathBuf>) -> Result<Self, Failure> {
        for file in &mut files {
            if file.as_os_str() == "-" {
                *file = "/dev/stdin".into();
            }
            let readable = if file.is_dir() {
                Err(io::ErrorKind::IsADirectory.into())
            } else {
                access(file, AccessFlags::R_OK).map_err(io::Error::from)
            };
            readable.map_err(|error| unreadable(format!("{file:?}"), &error))?;
        }
        Ok(Self::Files(files))
    }

    /// What people call a message, counted from 1.
    pub(super) fn name(&self, message: u64) -> String {
        match self {
            Self::Files(files) if message <= files.len() as u64 => format!("file {:?}", files[message as usize - 1]),
            Self::Records(b'\n') => format!("line {message}"),
            Self::Input => "the message on standard input".to_owned(),
            _ => format!("message {message}"),
        }
    }

    /// How much there is to publish, if that is known: of standard input the rest of a regular file. Before it is read.
    pub(super) fn total(&self) -> Option<Total> {
        let messages = match self {
            Self::Arguments(arguments) => arguments.len(),
            Self::Files(files) => files.len(),
            Self::Input => 1,
            Self::Records(_) => {
                let mut input = standard_input().ok()?;
                let size = input.metadata().ok().filter(Metadata::is_file)?.len();
                return Some(Total::Bytes(size.saturating_sub(input.stream_position().ok()?)));
            }
        };
        Some(Total::Messages(messages as u64))
    }

    /// Whether somebody types the messages on a terminal.
    pub(super) fn is_typed(&self) -> bool {
        matches!(self, Self::Input | Self::Records(_)) && io::stdin().is_terminal()
    }

    /// Begins to read.
    pub(super) fn start(self: Arc<Self>) -> io::Result<Messages> {
        // The window is what bounds it.
        let (sender, messages) = mpsc::channel(1024);
        let window = Arc::new(Semaphore::new(WINDOW as usize));
        let runtime = Handle::current();
        let read = move || {
            for body in self.bodies() {
                let message = body.map(|body| {
                    let size = u32::try_from(body.len() / 1024).unwrap_or(WINDOW);
                    let size = size.saturating_add(BESIDE).min(WINDOW);
                    let share = runtime.block_on(Arc::clone(&window).acquire_many_owned(size));
                    (body, share.expect("nobody closes the window"))
                });
                let failed = message.is_err();
                if sender.blocking_send(message).is_err() || failed {
                    // Nobody wants any more, or there is none.
                    return;
                }
            }
        };
        thread::Builder::new().name("reader".to_owned()).spawn(read)?;
        Ok(messages)
    }

    fn bodies(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, Failure>> + '_> {
        let no_input = |error: io::Error| unreadable("standard input", &error);
        match self {
            Self::Arguments(arguments) => Box::new(arguments.iter().map(|argument| Ok(argument.clone().into_vec()))),
            Self::Files(files) => Box::new(files.iter().map(|path| {
                let body = File::open(path).and_then(whole);
                body.map_err(|error| unreadable(format!("{path:?}"), &error))
            })),
            Self::Input => Box::new(iter::once_with(move || {
                if self.is_typed() {
                    tracing::info!("reading one message from the terminal, to its end (Ctrl-D)");
                }
                let body = standard_input().and_then(whole).map_err(no_input)?;
                if body.is_empty() {
                    tracing::warn!("standard input is empty: publishing one empty message");
                }
                Ok(body)
            })),
            Self::Records(separator) => match standard_input() {
                Err(error) => Box::new(iter::once(Err(no_input(error)))),
                Ok(input) => Box::new(records(input, *separator).map(move |body| body.map_err(no_input))),
            },
        }
    }
}

/// Standard input without a buffer of the library's, and with the errors that it hides.
fn standard_input() -> io::Result<File> {
    Ok(io::stdin().as_fd().try_clone_to_owned()?.into())
}

fn whole(file: File) -> io::Result<Vec<u8>> {
    let size = file.metadata().map_or(0, |found| found.len());
    let mut body = Vec::with_capacity(usize::try_from(size.min(LARGEST)).unwrap_or(0));
    file.take(LARGEST + 1).read_to_end(&mut body)?;
    checked(body)
}

/// What is before each separator; the last record needs none. A byte order mark before the first line is left out.
pub fn records(input: impl Read, separator: u8) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    let mut input = BufReader::with_capacity(64 * 1024, input);
    let mut is_first_line = separator == b'\n';
    iter::from_fn(move || {
        let mut record = Vec::new();
        match (&mut input).take(LARGEST + 1).read_until(separator, &mut record) {
            Ok(0) => return None,
            Ok(_) => record.pop_if(|last| *last == separator),
            Err(error) => return Some(Err(error)),
        };
        if mem::take(&mut is_first_line) && record.starts_with(BYTE_ORDER_MARK) {
            tracing::warn!("standard input begins with a byte order mark: left out of the first message");
            record.drain(..BYTE_ORDER_MARK.len());
        }
        Some(checked(record))
    })
}

fn checked(body: Vec<u8>) -> io::Result<Vec<u8>> {
    if body.len() as u64 > LARGEST {
        let text = "a message of more than 512 MiB, which no RabbitMQ takes";
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(body)
}

fn unreadable(what: impl fmt::Display, error: &io::Error) -> Failure {
    Failure::new(Exit::Empty, format!("{what} can't be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_what_is_between_separators_and_the_last_needs_none() {
        let records = |input: &[u8], separator| records(input, separator).collect::<io::Result<Vec<_>>>().unwrap();
        assert!(records(b"", b'\n').is_empty());
        assert_eq!(records(b"\n", b'\n'), [b""]);
        assert_eq!(records(b"a\nb\n", b'\n'), [b"a", b"b"]);
        assert_eq!(records(b"a\n\n b \nlast", b'\n'), [&b"a"[..], b"", b" b ", b"last"]);
        assert_eq!(records(b"a\r\n\0b", b'\n'), [&b"a\r"[..], b"\0b"]);
        assert_eq!(records(b"a\nb\0\0c", 0), [&b"a\nb"[..], b"", b"c"]);
    }

    #[test]
    fn a_message_is_named_as_people_find_it() {
        assert_eq!(Source::Records(b'\n').name(3), "line 3");
        assert_eq!(Source::Records(0).name(3), "message 3");
        assert_eq!(Source::Files(vec!["a".into(), "b".into()]).name(2), "file \"b\"");
        assert_eq!(Source::Arguments(Vec::new()).name(1), "message 1");
    }
}
