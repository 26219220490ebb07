//! Log lines on standard error, and the termination message.

mod human;
mod log;
mod reminder;
mod writer;

pub use human::{HumanDuration, counted};
#[cfg(fuzzing)]
pub use log::log_lines;
pub use log::{LogFormat, log_without_memory, show_progress};
pub use reminder::{Reminder, with_reminders};

use crate::{abort, exit::Failure, program::Program};
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

/// The variable that names another file for the termination message; if it is empty, none is written.
pub const TERMINATION_LOG_VARIABLE: &str = "QCONSUME_TERMINATION_LOG";

/// In bytes. Kubernetes cuts longer ones.
const TERMINATION_MESSAGE_MAX: usize = 4096;

static TERMINATION_LOG_PATH: OnceLock<PathBuf> = OnceLock::new();

/// Starts the log, unless it is started. An empty path means no termination message.
pub fn start(level: Level, format: LogFormat, termination_log: &Path) {
    let _ = TERMINATION_LOG_PATH.set(termination_log.to_owned());
    log::start(level, format);
}

/// The message that a log line or a summary is about.
#[derive(Clone, Debug)]
pub struct Subject {
    pub id: Option<String>,
    pub attempt: Option<u64>,
    pub size: usize,
    pub since: Instant,
}

/// What happened to a message: docs/logs.md explains each `outcome`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Acknowledged,
    Requeued,
    Released,
    DeadLettered,
    Unconfirmed,
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

#[derive(Clone, Debug)]
pub struct RunSummary {
    /// Whose status it is: `command`, `qconsume` or `qpublish`.
    pub source: &'static str,
    pub status: u8,
    pub text: String,
    pub outcome: Option<Outcome>,
    pub subject: Option<Subject>,
    pub queue: Option<String>,
    /// qpublish's: how many messages were sent, and how many of them confirmed.
    pub published: Option<(u64, u64)>,
}

impl RunSummary {
    pub fn without_message(status: u8, text: String) -> Self {
        let source = Program::current().name();
        Self { source, status, text, outcome: None, subject: None, queue: None, published: None }
    }

    /// Writes the termination message and the last log line. The status stands from now on.
    pub fn report(&self) {
        abort::note_result(self.status, self.source);
        if let Some(path) = TERMINATION_LOG_PATH.get()
            && let Err(error) = write_termination_message(path, &self.text, &self.fields())
        {
            tracing::debug!("no termination message: {}: {error}", path.display());
        }
        // The log comes last: `FallbackToLogsOnError` shows the end of it.
        self.log();
    }

    /// A failure is logged at every level, a success from `info` on.
    pub fn log(&self) {
        let (status, source) = (self.status, self.source);
        let (text, outcome, queue) = (&self.text, self.outcome.map(Outcome::name), self.queue.as_deref());
        let (sent, confirmed) = self.published.unzip();
        let subject = self.subject.as_ref();
        let id = subject.and_then(|subject| subject.id.as_deref());
        let attempt = subject.and_then(|subject| subject.attempt);
        let size = subject.map(|subject| subject.size);
        let seconds = subject.map(|subject| subject.since.elapsed().as_millis() as f64 / 1000.0);
        macro_rules! log_at {
            ($level:ident) => {
                tracing::$level!(
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
                )
            };
        }
        match status {
            0 => log_at!(info),
            _ => log_at!(error),
        }
    }

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

/// Writes only to an existing, empty file: the command may have written its own message. Fields are never cut.
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

/// Returns the status.
pub fn report_failure(failure: Failure) -> u8 {
    report_without_options(&RunSummary::without_message(failure.exit.status(), failure.message))
}

/// Starts the log if a failure or a panic came before the options were known. Returns the status.
pub fn report_without_options(summary: &RunSummary) -> u8 {
    start(Level::ERROR, LogFormat::Text, Path::new(TERMINATION_LOG));
    summary.report();
    summary.status
}

/// Ends the process when the last log lines are written, or after a second if nobody reads them.
pub fn exit(status: u8) -> ! {
    log::finish();
    std::process::exit(status.into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{
        log::{Line, LogSubscriber},
        *,
    };
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    pub(crate) struct Said(Arc<Mutex<Vec<String>>>);

    impl Said {
        pub(crate) fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
            let said = Self::default();
            let lines = Arc::clone(&said.0);
            let write = move |_, line: Line| lines.lock().unwrap().push(line.message);
            let level = Level::TRACE;
            let guard = tracing::subscriber::set_default(LogSubscriber { level, write });
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
        assert!((TERMINATION_MESSAGE_MAX - 1..=TERMINATION_MESSAGE_MAX).contains(&read().len()));
        assert!(read().ends_with("ä (status 75)\n"));
        std::fs::remove_file(&path).unwrap();
    }
}
