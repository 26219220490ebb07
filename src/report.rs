//! What qconsume and qpublish say: log lines on standard error, and the last word in the termination message.

use crate::{cli::LogFormat, exit::Exit};
use serde_json::{Map, Value};
use std::{
    fmt::{self, Write as _},
    fs::OpenOptions,
    future::Future,
    io::{self, IsTerminal, Write as _},
    path::{Path, PathBuf},
    pin::pin,
    sync::OnceLock,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
};

/// Where Kubernetes looks for a container's termination message.
pub const TERMINATION_LOG: &str = "/dev/termination-log";

/// Where else to write it; an empty value is nowhere.
pub const TERMINATION_LOG_VARIABLE: &str = "QCONSUME_TERMINATION_LOG";

/// Longest termination message that Kubernetes keeps, in bytes.
const TERMINATION_MESSAGE_MAX: usize = 4096;

/// What to say, how, and where.
#[derive(Clone, Debug)]
pub struct Output {
    /// `--log-level`: lines of this level and the more important ones.
    pub level: Level,
    /// `--log-format`
    pub format: LogFormat,
    /// `--termination-log`
    pub termination_log: PathBuf,
}

static PROGRAM: OnceLock<&str> = OnceLock::new();

/// Where the last word goes besides the log.
static TERMINATION_LOG_PATH: OnceLock<PathBuf> = OnceLock::new();

/// Sets the name that every line begins with, where it isn't qconsume's.
pub fn set_program_name(program: &'static str) {
    let _ = PROGRAM.set(program);
}

/// The name that every line begins with.
pub fn program() -> &'static str {
    PROGRAM.get().copied().unwrap_or("qconsume")
}

/// Starts to write log lines.
///
/// Only qconsume's own: lapin's include frames, and one of those carries the password.
pub fn start(output: Output) {
    let _ = TERMINATION_LOG_PATH.set(output.termination_log);
    let lines = Lines {
        level: output.level,
        format: output.format,
        colour: io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
    };
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines));
}

/// Who ended the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The command, whose status (or what an option maps it to) is the exit status.
    Command,
    /// qconsume, whose exit statuses are documented.
    Qconsume,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Qconsume => program(),
        }
    }
}

/// What became of a message; for machines, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done: the broker has confirmed the acknowledgement.
    Acknowledged,
    /// Requeued as a failure (`basic.reject`).
    Requeued,
    /// Requeued without a failure (`basic.nack`).
    Released,
    /// Dead-lettered, or dropped where the queue has no dead-letter exchange.
    DeadLettered,
    /// It was settled, but the broker hasn't confirmed it.
    Unconfirmed,
    /// Requeued by the broker before the command had ended.
    Lost,
}

impl Outcome {
    /// As the field `outcome` has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
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

/// What is known of the message that a line is about.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Its `message-id`.
    pub id: Option<String>,
    /// Which attempt it is, where the queue tells.
    pub attempt: Option<u64>,
    /// The body's size in bytes.
    pub size: Option<usize>,
    /// How long it has been here, in seconds.
    pub seconds: Option<f64>,
    /// What became of it.
    pub outcome: Option<Outcome>,
}

/// The last word of a run: its last log line, and the termination message.
#[derive(Clone, Debug)]
pub struct RunSummary {
    /// Who ended the run.
    pub source: Source,
    /// The exit status.
    pub status: u8,
    /// Why, and what became of the message.
    pub text: String,
    /// The message, if one was taken.
    pub subject: Subject,
}

impl RunSummary {
    /// The end of a run without a message, which is always qconsume's doing.
    #[must_use]
    pub fn without_message(status: u8, text: String) -> Self {
        Self {
            source: Source::Qconsume,
            status,
            text,
            subject: Subject::default(),
        }
    }

    /// Says it, in the log and where Kubernetes looks for it.
    pub fn report(&self) {
        let path = TERMINATION_LOG_PATH
            .get()
            .map_or(Path::new(TERMINATION_LOG), PathBuf::as_path);
        if let Err(error) = write_termination_message(path, &self.text, &self.facts()) {
            tracing::debug!("no termination message: {}: {error}", path.display());
        }
        // Behind that, as the last line is what `FallbackToLogsOnError` shows.
        self.log();
    }

    /// Says it in the log. Success is worth a line like any other; anything else is an error, logged at every level.
    pub fn log(&self) {
        let Self {
            source,
            status,
            text,
            subject,
        } = self;
        let Subject {
            id,
            attempt,
            size,
            seconds,
            outcome,
        } = subject;
        let (source, outcome) = (source.name(), outcome.map(Outcome::name));
        if *status == 0 {
            tracing::info!(
                id, attempt, size, seconds, outcome, status, source, "{text}"
            );
        } else {
            tracing::error!(
                id, attempt, size, seconds, outcome, status, source, "{text}"
            );
        }
    }

    /// What the termination message ends with, however long its text is.
    fn facts(&self) -> String {
        let mut facts = format!(" (status {} by {}", self.status, self.source.name());
        if let Some(id) = &self.subject.id {
            let _ = write!(facts, ", message id {id:?}");
        }
        if let Some(attempt) = self.subject.attempt {
            let _ = write!(facts, ", attempt {attempt}");
        }
        facts.push(')');
        facts
    }
}

/// Writes the termination message, where somebody is waiting for one and the command hasn't left its own.
fn write_termination_message(path: &Path, text: &str, facts: &str) -> io::Result<()> {
    let found = std::fs::metadata(path)?;
    if !found.is_file() || found.len() > 0 {
        return Ok(());
    }
    let (mut line, facts) = (one_line(text), one_line(facts));
    let room = TERMINATION_MESSAGE_MAX.saturating_sub(facts.len() + 1);
    line.truncate(line.floor_char_boundary(room));
    line.push_str(&facts);
    line.push('\n');
    OpenOptions::new()
        .append(true)
        .open(path)?
        .write_all(line.as_bytes())
}

/// What the broker, the message or an option says mustn't pass for a line of ours.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The one printer of what ends a run before a command could. Should it be before the log's start, too, it goes
/// straight to standard error.
pub fn failure(text: String, exit: Exit) {
    let word = RunSummary::without_message(exit.status(), text);
    if !tracing::enabled!(Level::ERROR) {
        let _ = writeln!(
            io::stderr(),
            "{}: error: {}",
            program(),
            one_line(&word.text)
        );
    }
    word.report();
}

struct Lines {
    level: Level,
    format: LogFormat,
    colour: bool,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        *metadata.level() <= self.level
            && metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let level = *event.metadata().level();
        let mut text = match self.format {
            LogFormat::Text => self.text(level, line),
            LogFormat::Json => json(level, line),
        };
        text.push('\n');
        // In one write, so that lines of several processes don't mix. Nobody may be reading; that is no reason to fail.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

impl Lines {
    /// `qconsume: what happened key=value …`, the level named where it is more than information.
    fn text(&self, level: Level, line: Line) -> String {
        let (name, colour) = match level {
            Level::ERROR => ("error: ", "\x1b[31m"),
            Level::WARN => ("warning: ", "\x1b[33m"),
            _ => ("", ""),
        };
        let mut text = format!("{}: ", program());
        if self.colour && !colour.is_empty() {
            let _ = write!(text, "{colour}{name}\x1b[0m");
        } else {
            text.push_str(name);
        }
        text.push_str(&one_line(&line.message));
        for (name, value) in line.fields {
            let _ = write!(text, " {name}={}", one_line(&value.to_string()));
        }
        text
    }
}

/// One object a line: `time`, `level`, `message`, and the fields that apply.
fn json(level: Level, line: Line) -> String {
    let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        _ => "debug",
    };
    let mut object = Map::new();
    object.insert("time".into(), time.into());
    object.insert("level".into(), level.into());
    object.insert("message".into(), line.message.into());
    for (name, value) in line.fields {
        object.insert(name.into(), value);
    }
    Value::Object(object).to_string()
}

#[derive(Default)]
struct Line {
    message: String,
    fields: Vec<(&'static str, Value)>,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields
                .push((field.name(), format!("{value:?}").into()));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.push((field.name(), value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.fields.push((field.name(), value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.fields.push((field.name(), value.into()));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.fields.push((field.name(), value.into()));
    }
}

/// A length of time for people: `1m 30s`.
#[derive(Clone, Copy, Debug)]
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nobody cares for microseconds behind seconds.
        let shown = if self.0 >= Duration::from_secs(1) {
            Duration::from_millis((self.0.as_secs_f64() * 10.0).round() as u64 * 100)
        } else {
            Duration::from_millis(u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX))
        };
        humantime::format_duration(shown).fmt(f)
    }
}

/// When to mention again that something takes long: at first after some time, then at growing intervals.
#[derive(Debug)]
pub struct Patience {
    since: Instant,
    next: Duration,
}

/// The first interval between two mentions; it doubles.
pub const FIRST_MENTION: Duration = Duration::from_secs(10);

impl Patience {
    /// First due after `first`.
    #[must_use]
    pub fn new(first: Duration) -> Self {
        Self {
            since: Instant::now(),
            next: first,
        }
    }

    /// Whether it is time to mention it; each time that it is, the next one is further away.
    pub fn is_due(&mut self) -> bool {
        let due = self.since.elapsed() >= self.next;
        if due {
            self.next = (self.since.elapsed() * 2).max(FIRST_MENTION);
        }
        due
    }

    /// Waits until it is time to mention it; returns how long it has taken.
    pub async fn due(&mut self) -> Duration {
        tokio::time::sleep_until(self.since + self.next).await;
        self.is_due();
        self.since.elapsed()
    }
}

/// Waits for what should take no time, and mentions it at growing intervals where it does.
pub async fn mentioned<T>(what: impl fmt::Display, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut patience = Patience::new(FIRST_MENTION);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            waited = patience.due() => tracing::info!("still {what}, for {} now", Span(waited)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// What is said, without the fields; as long as the guard is there.
    #[derive(Clone, Default)]
    pub(crate) struct Said(Arc<Mutex<Vec<String>>>);

    impl Said {
        pub(crate) fn listen() -> (Self, tracing::subscriber::DefaultGuard) {
            let said = Self::default();
            let subscriber = tracing_subscriber::registry().with(said.clone());
            (said, tracing::subscriber::set_default(subscriber))
        }

        pub(crate) fn lines(&self) -> Vec<String> {
            self.0.lock().unwrap().clone()
        }
    }

    impl<S: Subscriber> Layer<S> for Said {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut line = Line::default();
            event.record(&mut line);
            self.0.lock().unwrap().push(line.message);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_mentioned_with_what_is_waited_for() {
        let (said, _guard) = Said::listen();
        mentioned(
            "waiting for godot",
            tokio::time::sleep(Duration::from_secs(9)),
        )
        .await;
        assert!(said.lines().is_empty());
        mentioned(
            "waiting for godot",
            tokio::time::sleep(Duration::from_secs(90)),
        )
        .await;
        assert_eq!(
            said.lines(),
            ["10s", "20s", "40s", "1m 20s"]
                .map(|time| format!("still waiting for godot, for {time} now"))
        );
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
        write_termination_message(
            &path,
            &format!("x{}", "ä".repeat(TERMINATION_MESSAGE_MAX)),
            " (status 75)",
        )
        .unwrap();
        // A character that would be cut in two is left out.
        assert!((TERMINATION_MESSAGE_MAX - 1..=TERMINATION_MESSAGE_MAX).contains(&read().len()));
        assert!(read().ends_with("ä (status 75)\n"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn spans_are_short() {
        let shown = |seconds| Span(Duration::from_secs_f64(seconds)).to_string();
        assert_eq!(shown(0.25), "250ms");
        assert_eq!(shown(59.951), "1m");
        assert_eq!(shown(90.04), "1m 30s");
        assert_eq!(shown(1.26), "1s 300ms");
    }

    #[tokio::test(start_paused = true)]
    async fn mentions_come_at_growing_intervals() {
        let mut patience = Patience::new(Duration::from_secs(30));
        let mut at = Vec::new();
        for _ in 0..4 {
            at.push(patience.due().await.as_secs());
        }
        assert_eq!(at, [30, 60, 120, 240]);
    }
}
