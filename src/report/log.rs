//! Log lines on standard error, as text or JSON.

use super::{
    human::counted,
    writer::{FINISH_TIMEOUT, Writer, write_when_ready},
};
use crate::program::Program;
use serde_json::{Map, Value};
use std::{
    fmt::{self, Write as _},
    io::{self, Cursor, IsTerminal, Stderr, Write as _},
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// for people
    #[default]
    Text,
    /// one JSON object a line
    Json,
}

/// Fields with this prefix are shown in JSON only, without the prefix.
const JSON_ONLY: &str = "json.";

static WRITER: OnceLock<Writer<Stderr>> = OnceLock::new();

const CLEAR_LINE: &str = "\r\x1b[K";

static SHOWS_PROGRESS: AtomicBool = AtomicBool::new(false);

pub(super) fn start(level: Level, format: LogFormat) {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let renderer = Renderer { format, colour };
    let writer = WRITER.get_or_init(|| Writer::new(io::stderr(), renderer));
    let write = move |level, line| {
        let clear = if SHOWS_PROGRESS.swap(false, Relaxed) { CLEAR_LINE } else { "" };
        writer.write(clear.to_owned() + &renderer.render(level, line));
    };
    let _ = tracing::subscriber::set_global_default(LogSubscriber { level, write });
}

/// For a terminal: the next progress or log line takes the place of this one.
pub fn show_progress(text: &str) {
    if let Some(writer) = WRITER.get() {
        SHOWS_PROGRESS.store(true, Relaxed);
        writer.write(format!("{CLEAR_LINE}{}: {text}", Program::current().name()));
    }
}

pub(super) fn finish() {
    if let Some(writer) = WRITER.get() {
        writer.finish();
    }
}

/// Logs an error without allocating, ahead of the lines that still wait. The text must need no escaping in JSON.
pub fn log_without_memory(text: fmt::Arguments<'_>, status: u8, source: &str) {
    let mut line = Cursor::new([0; 512]);
    let program = Program::current().name();
    let _ = match WRITER.get().map(|writer| writer.renderer.format) {
        Some(LogFormat::Json) => {
            let time = humantime::format_rfc3339_millis(SystemTime::now());
            writeln!(
                line,
                r#"{{"time":"{time}","level":"error","message":"{text}","status":{status},"source":"{source}"}}"#
            )
        }
        _ => writeln!(line, "{program}: error: {text} status={status} source={source:?}"),
    };
    let length = line.position() as usize;
    let _ = write_when_ready(&io::stderr(), &line.get_ref()[..length], FINISH_TIMEOUT);
}

/// Replaces control characters, so that text from outside can't pass for a line of ours.
pub(super) fn one_line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

pub(super) struct LogSubscriber<W> {
    pub(super) level: Level,
    pub(super) write: W,
}

impl<W: Fn(Level, Line) + Send + Sync + 'static> Subscriber for LogSubscriber<W> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // lapin's lines show frames, and one of those contains the password.
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

    // Nobody opens spans: we have none, and lapin's are not enabled.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Clone, Copy, Default)]
pub(super) struct Renderer {
    format: LogFormat,
    colour: bool,
}

impl Renderer {
    fn render(&self, level: Level, line: Line) -> String {
        let text = match self.format {
            LogFormat::Text => self.text(level, line),
            LogFormat::Json => json(level, line),
        };
        text + "\n"
    }

    pub(super) fn about_dropped(&self, dropped: u64) -> String {
        let lines = counted(dropped, "line was", "lines were");
        let message = format!("{lines} dropped here: nobody was reading standard error");
        self.render(Level::WARN, Line { message, ..Line::default() })
    }

    /// Leaves out the fields for JSON only: the message or an earlier line says the same.
    fn text(&self, level: Level, line: Line) -> String {
        let name = match (level, self.colour) {
            (Level::ERROR, false) => "error: ",
            (Level::ERROR, true) => "\x1b[31merror: \x1b[0m",
            (Level::WARN, false) => "warning: ",
            (Level::WARN, true) => "\x1b[33mwarning: \x1b[0m",
            _ => "",
        };
        let mut text = format!("{}: {name}{}", Program::current().name(), one_line(&line.message));
        for (name, value) in line.fields.into_iter().filter(|(name, _)| !name.starts_with(JSON_ONLY)) {
            let _ = write!(text, " {name}={}", one_line(&value.to_string()));
        }
        text
    }
}

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
        // serde_json 1 escapes neither DEL nor U+0080 to U+009F, and terminals obey some of them.
        if c.is_control() {
            let _ = write!(text, "\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

#[cfg(any(test, fuzzing))]
pub fn log_lines(message: &str, id: &str) -> (String, String) {
    let line = || Line { message: message.to_owned(), fields: vec![("id", id.into())] };
    let renderer = Renderer { format: LogFormat::Text, colour: false };
    (renderer.text(Level::ERROR, line()), json(Level::ERROR, line()))
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
