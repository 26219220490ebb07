//! Log lines on standard error, as text or JSON.

use super::{counted, program, writer::Writer};
use serde_json::{Map, Value};
use std::{
    fmt::{self, Write as _},
    io::{self, IsTerminal, Stderr},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::SystemTime,
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};

/// What log lines look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// for people
    #[default]
    Text,
    /// one JSON object a line
    Json,
}

/// What the names of fields begin with that only JSON has.
const JSON_ONLY: &str = "json.";

static WRITER: OnceLock<Writer<Stderr>> = OnceLock::new();

/// Starts to write lines of this level and the more important ones.
pub(super) fn start(level: Level, format: LogFormat) {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let lines = Lines { format, colour };
    let writer = WRITER.get_or_init(|| Writer::new(io::stderr(), lines));
    let write = move |level, line| {
        let clear = if SHOWS_PROGRESS.swap(false, Relaxed) { CLEAR_LINE } else { "" };
        writer.write(clear.to_owned() + &lines.render(level, line));
    };
    let _ = tracing::subscriber::set_global_default(Events { level, write });
}

/// Takes away what the terminal's last line shows.
const CLEAR_LINE: &str = "\r\x1b[K";

/// Whether the terminal's last line is one of [`show_progress`].
static SHOWS_PROGRESS: AtomicBool = AtomicBool::new(false);

/// Shows how far a run is, for people at a terminal only: in place of the last such line, until a log line takes its place.
pub fn show_progress(text: &str) {
    if let Some(writer) = WRITER.get() {
        SHOWS_PROGRESS.store(true, Relaxed);
        writer.write(format!("{CLEAR_LINE}{}: {text}", program()));
    }
}

/// Waits for the last lines to be written, for a second at most.
pub(super) fn finish() {
    if let Some(writer) = WRITER.get() {
        writer.finish();
    }
}

/// What the broker, the message or an option says mustn't pass for a line of ours.
pub(super) fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

/// Hands qconsume's own events of this level and the more important ones to `write`.
pub(super) struct Events<W> {
    pub(super) level: Level,
    pub(super) write: W,
}

impl<W: Fn(Level, Line) + Send + Sync + 'static> Subscriber for Events<W> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Not lapin's: they include frames, and one of those carries the password.
        *metadata.level() <= self.level && metadata.target().split("::").next() == Some(env!("CARGO_CRATE_NAME"))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        (self.write)(*event.metadata().level(), line);
    }

    // qconsume opens no spans, and lapin's are not enabled.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Clone, Copy, Default)]
pub(super) struct Lines {
    format: LogFormat,
    colour: bool,
}

impl Lines {
    fn render(&self, level: Level, line: Line) -> String {
        let text = match self.format {
            LogFormat::Text => self.text(level, line),
            LogFormat::Json => json(level, line),
        };
        text + "\n"
    }

    /// The line in the place of those that were dropped.
    pub(super) fn about_dropped(&self, dropped: u64) -> String {
        let lines = counted(dropped, "line was", "lines were");
        let message = format!("{lines} dropped here: nobody was reading standard error");
        self.render(Level::WARN, Line { message, ..Line::default() })
    }

    /// `qconsume: what happened key=value …`, the level named where it is more than information. Without the fields for JSON
    /// only: what they have is in the message, or in an earlier line.
    fn text(&self, level: Level, line: Line) -> String {
        let name = match (level, self.colour) {
            (Level::ERROR, false) => "error: ",
            (Level::ERROR, true) => "\x1b[31merror: \x1b[0m",
            (Level::WARN, false) => "warning: ",
            (Level::WARN, true) => "\x1b[33mwarning: \x1b[0m",
            _ => "",
        };
        let mut text = format!("{}: {name}{}", program(), one_line(&line.message));
        for (name, value) in line.fields.into_iter().filter(|(name, _)| !name.starts_with(JSON_ONLY)) {
            let _ = write!(text, " {name}={}", one_line(&value.to_string()));
        }
        text
    }
}

/// One object a line: `time`, `level`, `message`, and the fields that apply.
fn json(level: Level, line: Line) -> String {
    let mut object = Map::new();
    let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    object.insert("time".into(), time.into());
    object.insert("level".into(), level.as_str().to_lowercase().into());
    object.insert("message".into(), line.message.into());
    let fields =
        line.fields.into_iter().map(|(name, value)| (name.strip_prefix(JSON_ONLY).unwrap_or(name).into(), value));
    object.extend(fields);
    let mut text = String::new();
    for c in Value::Object(object).to_string().chars() {
        // serde_json leaves DEL and Unicode's 32 control characters as they are; terminals obey some of them.
        if c.is_control() {
            let _ = write!(text, "\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

/// What an error line with this message and message id looks like, as text and as JSON.
#[cfg(any(test, fuzzing))]
pub fn log_lines(message: &str, id: &str) -> (String, String) {
    let line = || Line { message: message.to_owned(), fields: vec![("id", id.into())] };
    let lines = Lines { format: LogFormat::Text, colour: false };
    (lines.text(Level::ERROR, line()), json(Level::ERROR, line()))
}

#[derive(Default)]
pub(super) struct Line {
    pub(super) message: String,
    fields: Vec<(&'static str, Value)>,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.record_str(field, &format!("{value:?}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_controls_no_terminal_and_is_whole_in_json() {
        let message = "two\nlines \u{1b}[31m \u{7f} \u{9b}31m \u{85} ä";
        let (text, json) = log_lines(message, message);
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(!json.contains(char::is_control), "{json:?}");
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["message"], &json["id"]), (&message.into(), &message.into()));
    }
}
