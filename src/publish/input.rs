//! What to publish: arguments, files, or what standard input has.

use crate::{
    broker::{Body, Confirms},
    exit::{Exit, Failure},
    report::counted,
};
use clap::Args;
use nix::{
    errno::Errno,
    unistd::{AccessFlags, access},
};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader, IsTerminal, Read},
    iter,
    mem::take,
    os::{fd::AsFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};
use tokio::{
    runtime::Handle,
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, unbounded_channel},
    },
};

/// How much may be in flight, in bytes: enough to keep a broker busy over a slow network, and little enough for a small
/// pod. A larger message goes alone. One more message may be read and waiting.
const WINDOW_SIZE: usize = 16 << 20;

/// A permit for each byte of it.
static WINDOW: Semaphore = Semaphore::const_new(WINDOW_SIZE);

/// What a message takes of the window at least, in bytes: at most 2,048 messages are in flight.
const MESSAGE_MIN: usize = 8 << 10;

/// Largest message that any RabbitMQ can be configured to accept, in bytes. A longer one isn't read to its end.
const LARGEST: u64 = if cfg!(fuzzing) { 1 << 10 } else { 512 << 20 };

/// What to publish. At most one of these is given.
#[derive(Debug, Default, Args)]
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
    /// Completes what was given: without a message, it is all of standard input, unless a queue is declared. A file that
    /// can't be read is found here, before anything is published.
    pub(super) fn complete(mut self, declares: bool) -> Result<Self, Failure> {
        self.messages.extend(self.body.take());
        if self.messages.is_empty() && self.file.is_empty() && self.separator().is_none() {
            if declares {
                tracing::info!(
                    "nothing is published, as no message is given \
                     (with --declare, standard input is read by --lines, --null or --file -)"
                );
            } else {
                self.file.push("-".into());
            }
        }
        for file in self.file.iter().filter(|file| !is_stdin(file)) {
            let readable = if file.is_dir() { Err(Errno::EISDIR) } else { access(file, AccessFlags::R_OK) };
            readable.map_err(|error| cannot_read(&format!("file {file:?}"), &error.into()))?;
        }
        Ok(self)
    }

    /// The byte that ends each message on standard input.
    fn separator(&self) -> Option<u8> {
        if self.lines { Some(b'\n') } else { self.null.then_some(0) }
    }

    /// Whether standard input is read from a terminal: progress lines would mix with what is typed.
    pub(super) fn is_typed(&self) -> bool {
        let reads_stdin = self.separator().is_some() || self.file.iter().any(|file| is_stdin(file));
        reads_stdin && io::stdin().is_terminal()
    }

    /// How log lines name a message, counted from 1.
    pub(super) fn name(&self, number: u64) -> String {
        match self.file.get(number as usize - 1) {
            Some(file) if is_stdin(file) => "the message on standard input".to_owned(),
            Some(file) => format!("file {file:?}"),
            None if self.lines => format!("line {number}"),
            None => format!("message {number}"),
        }
    }

    /// The progress line, such as `3 of 10 messages confirmed, 1/s`. With --lines and --null the number of messages
    /// isn't known, so it says how much of a file on standard input is done.
    pub(super) fn progress(&self, confirms: &Confirms, rate: u64) -> String {
        let (confirmed, messages) = (confirms.confirmed(), |number| counted(number, "message", "messages"));
        if self.separator().is_none() {
            let all = self.messages.len() + self.file.len();
            return format!("{confirmed} of {} confirmed, {rate}/s", messages(all as u64));
        }
        let text = format!("{} confirmed, {rate}/s", messages(confirmed));
        match fs::metadata("/dev/stdin") {
            Ok(file) if file.is_file() => {
                // The last message may lack its separator.
                let (done, all) = (confirms.bytes.min(file.len()) / 1024, file.len().div_ceil(1024));
                format!("{text}, {done} of {all} KiB")
            }
            _ => text,
        }
    }

    /// Starts to read, on a thread, because that may block. The window limits how much. lapin holds the properties of
    /// each message in flight, so their size counts, too.
    pub(super) fn start(self: &Arc<Self>, properties_size: usize) -> Result<UnboundedReceiver<Body>, Failure> {
        let failed = |error| Failure::system("can't start to read", &error);
        // Not `Stdin`: it takes a descriptor that is open for writing only, as nohup(1) leaves it, for an empty input.
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
        let (sender, receiver) = unbounded_channel();
        let (input, runtime) = (Arc::clone(self), Handle::current());
        let read = move || {
            for (number, body) in (1..).zip(input.bodies(&stdin)) {
                let message = match body {
                    Ok(body) => {
                        let size = (body.len() + properties_size).clamp(MESSAGE_MIN, WINDOW_SIZE) as u32;
                        let permit = runtime.block_on(WINDOW.acquire_many(size));
                        Ok((body, permit.expect("nobody closes the window")))
                    }
                    Err(error) => Err(cannot_read(&input.name(number), &error)),
                };
                let is_last = message.is_err();
                if sender.send(message).is_err() || is_last {
                    return;
                }
            }
        };
        thread::Builder::new().name("reader".to_owned()).spawn(read).map_err(failed)?;
        Ok(receiver)
    }

    fn bodies(&self, stdin: &File) -> impl Iterator<Item = io::Result<Vec<u8>>> {
        let records = self.separator().map(|separator| records(BufReader::new(stdin), separator));
        let arguments = self.messages.iter().map(|argument| Ok(argument.clone().into_vec()));
        let files =
            self.file.iter().map(|path| if is_stdin(path) { all_of_stdin(stdin) } else { whole(&File::open(path)?) });
        records.into_iter().flatten().chain(arguments).chain(files)
    }
}

fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

fn all_of_stdin(stdin: &File) -> io::Result<Vec<u8>> {
    if stdin.is_terminal() {
        tracing::info!("reading one message from the terminal, to its end (Ctrl-D)");
    }
    let body = whole(stdin)?;
    if body.is_empty() {
        tracing::warn!("standard input is empty: publishing one empty message");
    }
    Ok(body)
}

fn whole(file: &File) -> io::Result<Vec<u8>> {
    let mut body = Vec::with_capacity(file.metadata()?.len().min(LARGEST) as usize);
    file.take(LARGEST + 1).read_to_end(&mut body)?;
    checked(body)
}

/// The parts that end with `separator`; the last one needs none.
pub fn records(mut input: impl BufRead, separator: u8) -> impl Iterator<Item = io::Result<Vec<u8>>> {
    let mut is_first_line = separator == b'\n';
    iter::from_fn(move || {
        let mut record = Vec::new();
        match (&mut input).take(LARGEST + 1).read_until(separator, &mut record) {
            Ok(0) => return None,
            Ok(_) => record.pop_if(|last| *last == separator),
            Err(error) => return Some(Err(error)),
        };
        // Some editors begin a file with a byte order mark. It is no part of the first line.
        if take(&mut is_first_line)
            && let Some(rest) = record.strip_prefix("\u{feff}".as_bytes())
        {
            tracing::warn!("standard input begins with a byte order mark: left out of the first message");
            record = rest.to_vec();
        }
        Some(checked(record))
    })
}

fn checked(body: Vec<u8>) -> io::Result<Vec<u8>> {
    if body.len() as u64 <= LARGEST {
        return Ok(body);
    }
    Err(io::ErrorKind::FileTooLarge.into())
}

fn cannot_read(what: &str, error: &io::Error) -> Failure {
    let why = match error.kind() {
        io::ErrorKind::FileTooLarge => "is larger than 512 MiB, which no RabbitMQ takes: split it".to_owned(),
        _ => format!("can't be read: {error}"),
    };
    Failure::new(Exit::NoInput, format!("{what} {why}"))
}
