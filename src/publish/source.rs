//! Where messages come from.

use super::progress::Total;
use crate::{
    broker::Body,
    exit::{Exit, Failure},
};
use clap::Args;
use nix::unistd::{AccessFlags, access};
use std::{
    ffi::OsString,
    fs::{File, Metadata},
    io::{self, BufRead, BufReader, IsTerminal, Read, Seek},
    iter,
    mem::take,
    os::{fd::AsFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
};

/// How much may be read and not confirmed, in bytes: enough to keep a broker busy over a slow network, and little
/// enough for a small pod. A larger message goes alone.
const WINDOW_SIZE: usize = 16 << 20;

/// A permit for each byte of it.
static WINDOW: Semaphore = Semaphore::const_new(WINDOW_SIZE);

/// What a message takes of the window at least, in bytes: at most 2,048 messages are in flight.
const MESSAGE_MIN: usize = 8 << 10;

/// Largest message that any RabbitMQ can be configured to accept, in bytes. A longer one isn't read to its end.
const LARGEST: u64 = if cfg!(fuzzing) { 1 << 10 } else { 512 << 20 };

/// U+FEFF in UTF-8: some editors begin a file with it.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// What to publish. At most one of these is given.
#[derive(Debug, Args)]
#[group(multiple = false)]
#[command(next_help_heading = "Messages")]
pub(super) struct Input {
    /// Bodies, one for each message
    #[arg(hide_short_help = true, value_name = "MESSAGE")]
    messages: Vec<OsString>,

    /// Publish this text, which may be empty or begin with a dash
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    body: Option<OsString>,

    /// Publish one message for each file; - is standard input
    #[arg(short, long, value_name = "FILE", num_args = 1..)]
    file: Vec<PathBuf>,

    /// Publish one message for each line of standard input
    ///
    /// Each line is published at once, and without its newline, which amqp-publish keeps. An empty line is an empty
    /// message.
    #[arg(short, long, visible_alias = "line-buffered")]
    lines: bool,

    /// Publish one message for each part that ends with NUL
    ///
    /// find -print0 writes such parts to standard input.
    #[arg(short = '0', long)]
    null: bool,
}

impl Input {
    /// The source that was asked for. If neither an option nor a message is given, it is standard input; with
    /// --declare, it is nothing.
    ///
    /// # Errors
    /// If a file can't be read.
    pub(super) fn into_source(self, declares: bool) -> Result<Source, Failure> {
        Ok(match self {
            Self { lines: true, .. } => Source::Records(standard_input()?, b'\n'),
            Self { null: true, .. } => Source::Records(standard_input()?, 0),
            Self { body: Some(body), .. } => Source::Arguments(vec![body]),
            Self { file, .. } if file == [Path::new("-")] => Source::Input(standard_input()?),
            Self { file, .. } if !file.is_empty() => Source::Files(readable(file)?),
            Self { messages, .. } if declares || !messages.is_empty() => Source::Arguments(messages),
            _ => Source::Input(standard_input()?),
        })
    }
}

/// Where messages come from.
#[derive(Debug)]
pub(super) enum Source {
    /// One message for each argument.
    Arguments(Vec<OsString>),
    /// One message for each file.
    Files(Vec<PathBuf>),
    /// All of standard input is one message.
    Input(File),
    /// One message for each part of standard input that ends with this byte.
    Records(File, u8),
}

impl Source {
    /// How log lines name a message, counted from 1.
    pub(super) fn name(&self, message: u64) -> String {
        match self {
            Self::Files(files) if message <= files.len() as u64 => format!("file {:?}", files[message as usize - 1]),
            Self::Records(_, b'\n') => format!("line {message}"),
            Self::Input(_) => "the message on standard input".to_owned(),
            _ => format!("message {message}"),
        }
    }

    /// How much there is to publish: for records what is left of standard input, if that is a regular file. Call it
    /// before [`Self::start`].
    pub(super) fn total(&self) -> Option<Total> {
        let messages = match self {
            Self::Arguments(arguments) => arguments.len(),
            Self::Files(files) => files.len(),
            Self::Input(_) => 1,
            Self::Records(input, _) => {
                let size = input.metadata().ok().filter(Metadata::is_file)?.len();
                return Some(Total::Bytes(size.saturating_sub((&*input).stream_position().ok()?)));
            }
        };
        Some(Total::Messages(messages as u64))
    }

    /// Whether somebody types the messages on a terminal.
    pub(super) fn is_typed(&self) -> bool {
        matches!(self, Self::Input(input) | Self::Records(input, _) if input.is_terminal())
    }

    /// Starts to read, on a thread.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<mpsc::Receiver<Body>> {
        // The window limits what is read, not this capacity.
        let (sender, receiver) = mpsc::channel(1024);
        let (source, runtime) = (Arc::clone(self), Handle::current());
        let read = move || {
            for (index, body) in source.bodies().enumerate() {
                let message = match (body, &*source) {
                    (Ok(body), _) => {
                        let size = body.len().clamp(MESSAGE_MIN, WINDOW_SIZE) as u32;
                        let permit = runtime.block_on(WINDOW.acquire_many(size));
                        Ok((body, permit.expect("nobody closes the window")))
                    }
                    (Err(error), Self::Files(files)) => Err(cannot_read(&format!("{:?}", files[index]), &error)),
                    (Err(error), _) => Err(cannot_read("standard input", &error)),
                };
                let failed = message.is_err();
                if sender.blocking_send(message).is_err() || failed {
                    return;
                }
            }
        };
        thread::Builder::new().name("reader".to_owned()).spawn(read)?;
        Ok(receiver)
    }

    fn bodies(&self) -> Box<dyn Iterator<Item = io::Result<Vec<u8>>> + '_> {
        match self {
            Self::Arguments(arguments) => Box::new(arguments.iter().map(|argument| Ok(argument.clone().into_vec()))),
            Self::Files(files) => Box::new(files.iter().map(|path| whole(&File::open(path)?))),
            Self::Input(input) => Box::new(iter::once_with(|| {
                if self.is_typed() {
                    tracing::info!("reading one message from the terminal, to its end (Ctrl-D)");
                }
                let body = whole(input)?;
                if body.is_empty() {
                    tracing::warn!("standard input is empty: publishing one empty message");
                }
                Ok(body)
            })),
            Self::Records(input, separator) => Box::new(records(input, *separator)),
        }
    }
}

/// The same files, with - as a path. A file that can't be read is found here, before anything is published.
fn readable(mut files: Vec<PathBuf>) -> Result<Vec<PathBuf>, Failure> {
    for file in &mut files {
        if file.as_os_str() == "-" {
            *file = "/dev/stdin".into();
        }
        let readable = if file.is_dir() {
            Err(io::ErrorKind::IsADirectory.into())
        } else {
            access(file, AccessFlags::R_OK).map_err(io::Error::from)
        };
        readable.map_err(|error| cannot_read(&format!("{file:?}"), &error))?;
    }
    Ok(files)
}

/// Standard input as a file: `Stdin` has no size, and a buffer of its own.
fn standard_input() -> Result<File, Failure> {
    let input = io::stdin().as_fd().try_clone_to_owned();
    input.map(File::from).map_err(|error| cannot_read("standard input", &error))
}

fn whole(file: &File) -> io::Result<Vec<u8>> {
    let size = file.metadata().map_or(0, |found| found.len());
    let mut body = Vec::with_capacity(usize::try_from(size.min(LARGEST)).unwrap_or(0));
    file.take(LARGEST + 1).read_to_end(&mut body)?;
    checked(body)
}

/// The parts that end with `separator`; the last one needs none. A byte order mark before the first line is left out.
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
        if take(&mut is_first_line) && record.starts_with(BYTE_ORDER_MARK) {
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

fn cannot_read(what: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::NoInput, format!("{what} can't be read: {error}"))
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
        assert_eq!(Source::Records(standard_input().unwrap(), b'\n').name(3), "line 3");
        assert_eq!(Source::Records(standard_input().unwrap(), 0).name(3), "message 3");
        assert_eq!(Source::Files(vec!["a".into(), "b".into()]).name(2), "file \"b\"");
        assert_eq!(Source::Arguments(Vec::new()).name(1), "message 1");
    }
}
