//! What qconsume and qpublish say: log lines on standard error, and the last word in the termination message.

mod log;
mod reminder;
mod writer;

#[cfg(fuzzing)]
pub use log::log_lines;
pub use log::{LogFormat, show_progress};
pub use reminder::{HumanDuration, Reminder, counted, with_reminders};

use crate::exit::Failure;
use log::one_line;
use std::{
    fmt::Write as _,
    fs::OpenOptions,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Instant,
};
use tracing::Level;

/// Where Kubernetes looks for a container's termination message.
pub const TERMINATION_LOG: &str = "/dev/termination-log";

/// Where else to write it; an empty value is nowhere.
pub const TERMINATION_LOG_VARIABLE: &str = "QCONSUME_TERMINATION_LOG";

/// Longest termination message that Kubernetes keeps, in bytes.
const TERMINATION_MESSAGE_MAX: usize = 4096;

static PROGRAM: OnceLock<&str> = OnceLock::new();
static TERMINATION_LOG_PATH: OnceLock<PathBuf> = OnceLock::new();

/// Sets the name that every line begins with.
pub fn set_program_name(program: &'static str) {
    let _ = PROGRAM.set(program);
}

/// The name that every line begins with.
pub fn program() -> &'static str {
    PROGRAM.get().copied().unwrap_or("qconsume")
}

/// Starts to report: lines of this level and the more important ones, and the termination message to this file, or to
/// none where the path is empty.
pub fn start(level: Level, format: LogFormat, termination_log: &Path) {
    let _ = TERMINATION_LOG_PATH.set(termination_log.to_owned());
    log::start(level, format);
}

/// What is known of the message that a line is about.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its `message-id`.
    pub id: Option<String>,
    /// Which attempt it is, where the queue counts.
    pub attempt: Option<u64>,
    /// The body's size in bytes.
    pub size: usize,
    /// When it came.
    pub since: Instant,
}

/// What became of a message: the field `outcome` of docs/logs.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The broker confirmed the acknowledgement.
    Acknowledged,
    /// It is back in the queue, and this failure counts.
    Requeued,
    /// It is back in the queue; from RabbitMQ 4.3 on that doesn't count.
    Released,
    /// It is in the dead-letter queue, if there is one.
    DeadLettered,
    /// The broker has not confirmed what it was told.
    Unconfirmed,
    /// The broker requeued it while the command ran.
    Lost,
}

impl Outcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Acknowledged => "acknowledged",
            Self::Requeued => "requeued",
            Self::Released => "released",
            Self::DeadLettered => "dead-lettered",
            Self::Unconfirmed => "unconfirmed",
            Self::Lost => "lost",
        }
    }
}

/// The end of a run: its last log line, and the termination message.
#[derive(Clone, Debug)]
pub struct RunSummary {
    /// Who the exit status comes from: `command`, or the program, whose own statuses are documented.
    pub source: &'static str,
    /// The exit status.
    pub status: u8,
    /// Why, and what became of the message.
    pub text: String,
    /// What became of the message, if one was taken.
    pub outcome: Option<Outcome>,
    /// The message, if one was taken.
    pub subject: Option<Subject>,
    /// The queue that the run consumed from, if it has a name.
    pub queue: Option<String>,
    /// How many messages qpublish has sent, and how many of them are confirmed.
    pub published: Option<(u64, u64)>,
}

impl RunSummary {
    /// The end of a run without a message, which is always qconsume's doing.
    pub fn without_message(status: u8, text: String) -> Self {
        Self { source: program(), status, text, outcome: None, subject: None, queue: None, published: None }
    }

    /// Says it, in the log and where Kubernetes looks for it.
    pub fn report(&self) {
        let path = TERMINATION_LOG_PATH.get();
        if let Some(path) = path
            && let Err(error) = write_termination_message(path, &self.text, &self.fields())
        {
            tracing::debug!("no termination message: {}: {error}", path.display());
        }
        // Behind that, as the last line is what `FallbackToLogsOnError` shows.
        self.log();
    }

    /// Says it in the log. Success is worth a line like any other; anything else is an error, logged at every level.
    pub fn log(&self) {
        let (status, source) = (self.status, self.source);
        let (text, outcome, queue) = (&self.text, self.outcome.map(Outcome::name), self.queue.as_deref());
        let (sent, confirmed) = self.published.unzip();
        let subject = self.subject.as_ref();
        let id = subject.and_then(|subject| subject.id.as_deref());
        let attempt = subject.and_then(|subject| subject.attempt);
        let size = subject.map(|subject| subject.size);
        // To the millisecond.
        let seconds = subject.map(|subject| subject.since.elapsed().as_millis() as f64 / 1000.0);
        if status == 0 {
            tracing::info!(json.queue = queue, id, attempt, size, seconds, outcome, status, source, "{text}");
        } else {
            tracing::error!(
                json.queue = queue,
                json.sent = sent,
                json.confirmed = confirmed,
                id,
                attempt,
                size,
                seconds,
                outcome,
                status,
                source,
                "{text}"
            );
        }
    }

    /// What the termination message ends with, however long its text is: fields as in the log.
    fn fields(&self) -> String {
        let mut fields = format!(" (status={} source={}", self.status, self.source);
        if let Some(subject) = &self.subject {
            if let Some(id) = &subject.id {
                let _ = write!(fields, " id={id:?}");
            }
            if let Some(attempt) = subject.attempt {
                let _ = write!(fields, " attempt={attempt}");
            }
        }
        fields + ")"
    }
}

/// Writes the termination message, where somebody is waiting for one and the command hasn't left its own.
fn write_termination_message(path: &Path, text: &str, fields: &str) -> io::Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let found = std::fs::metadata(path)?;
    if !found.is_file() || found.len() > 0 {
        return Ok(());
    }
    let (mut line, fields) = (one_line(text), one_line(fields));
    let room = TERMINATION_MESSAGE_MAX.saturating_sub(fields.len() + 1);
    line.truncate(line.floor_char_boundary(room));
    line.push_str(&fields);
    line.push('\n');
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(line.as_bytes())
}

/// Reports a failure that has reached `main`, or a panic, and returns its status; starts the log if nothing has. qconsume's
/// runs report by their [`RunSummary`].
pub fn failure(failure: Failure) -> u8 {
    start(Level::ERROR, LogFormat::Text, Path::new(TERMINATION_LOG));
    let status = failure.exit.status();
    RunSummary::without_message(status, failure.message).report();
    status
}

/// Ends the process with this status as soon as the last log lines are written, or after a second if nobody reads them.
pub fn exit(status: u8) -> ! {
    log::finish();
    std::process::exit(status.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{
        log::{Events, Line},
        *,
    };
    use std::sync::{Arc, Mutex};

    /// What is said, without the fields; as long as the guard is there.
    #[derive(Clone, Default)]
    pub(crate) struct Said(Arc<Mutex<Vec<String>>>);

    impl Said {
        pub(crate) fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
            let said = Self::default();
            let lines = Arc::clone(&said.0);
            let write = move |_, line: Line| lines.lock().unwrap().push(line.message);
            let level = Level::TRACE;
            let guard = tracing::subscriber::set_default(Events { level, write });
            (said, guard)
        }

        pub(crate) fn lines(&self) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
    }

    #[test]
    fn the_termination_message_is_one_short_line_and_never_replaces_another() {
        let path = std::env::temp_dir().join(format!("qconsume-report-{}", std::process::id()));
        let read = || std::fs::read_to_string(&path).unwrap();
        let _ = std::fs::remove_file(&path);
        assert!(write_termination_message(&path, "nobody waits", "").is_err());
        assert!(!path.exists());

        std::fs::write(&path, "").unwrap();
        write_termination_message(&path, "two\nlines", " (status 1)").unwrap();
        assert_eq!(read(), "two lines (status 1)\n");
        write_termination_message(&path, "another", "").unwrap();
        assert_eq!(read(), "two lines (status 1)\n");

        std::fs::write(&path, "").unwrap();
        write_termination_message(&path, &format!("x{}", "ä".repeat(TERMINATION_MESSAGE_MAX)), " (status 75)").unwrap();
        // A character that would be cut in two is left out.
        assert!((TERMINATION_MESSAGE_MAX - 1..=TERMINATION_MESSAGE_MAX).contains(&read().len()));
        assert!(read().ends_with("ä (status 75)\n"));
        std::fs::remove_file(&path).unwrap();
    }
}
