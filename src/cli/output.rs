//! The options that say what to say, how, and where: the same for qconsume and qpublish.

use crate::report::{self, LogFormat, TERMINATION_LOG};
use clap::{
    ArgMatches, Args, Command,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser},
};
use std::{
    ffi::OsString,
    io::{self, IsTerminal},
    path::PathBuf,
};
use tracing::Level;

/// What to say, how, and where.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputOptions {
    /// Log messages of this level and of the more important ones
    ///
    /// error: why the run ends with a failure. warn: what isn't as it should be. info: which message was taken, and its outcome, or how many were published. debug: each step.
    #[arg(long, value_name = "LEVEL", env = "QCONSUME_LOG", default_value = "info", value_parser = levels())]
    log_level: Level,

    /// Write log lines in this format
    #[arg(
        long,
        hide_short_help = true,
        value_name = "FORMAT",
        env = "QCONSUME_LOG_FORMAT",
        value_enum,
        default_value_t
    )]
    log_format: LogFormat,

    /// Write the termination message to this file
    ///
    /// The file must exist and be empty when the run ends. With an empty name nothing is written. The command gets an empty QCONSUME_TERMINATION_LOG, so a qconsume or qpublish that it calls writes no termination message.
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_TERMINATION_LOG", default_value = TERMINATION_LOG, value_parser = OsStringValueParser::new().map(PathBuf::from))]
    termination_log: PathBuf,
}

fn levels() -> impl TypedValueParser<Value = Level> {
    PossibleValuesParser::new(["error", "warn", "info", "debug"]).try_map(|name| name.parse::<Level>())
}

impl OutputOptions {
    /// Starts the log.
    pub fn start(&self) {
        report::start(self.log_level, self.log_format, &self.termination_log);
    }

    /// Whether somebody may be watching: standard error is a terminal, and nothing asks for less, or for JSON.
    pub(crate) fn shows_progress(&self) -> bool {
        self.log_level >= Level::INFO && self.log_format == LogFormat::Text && io::stderr().is_terminal()
    }

    /// Starts the log as a command line asks for that isn't as it should be.
    pub(super) fn start_as_understood(arguments: &[OsString]) {
        // clap stops at the first error, so it is given nothing else to stumble over.
        let mut words = arguments.iter().take_while(|word| *word != "--");
        let mut own = Vec::new();
        while let Some(word) = words.next() {
            let text = word.to_string_lossy();
            let name = text.split('=').next().unwrap_or_default();
            if matches!(name, "--log-level" | "--log-format" | "--termination-log") {
                own.push(word);
                if name == text {
                    own.extend(words.next());
                }
            }
        }
        let matches = super::parse::without_empty_variables(
            Self::augment_args(Command::new("").no_binary_name(true)).ignore_errors(true),
        )
        .try_get_matches_from(own)
        .unwrap_or_default();
        let termination_log: Option<PathBuf> = given(&matches, "termination_log");
        report::start(
            given(&matches, "log_level").unwrap_or(Level::INFO),
            given(&matches, "log_format").unwrap_or_default(),
            &termination_log.unwrap_or_else(|| TERMINATION_LOG.into()),
        );
    }
}

fn given<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Option<T> {
    matches.try_get_one(id).ok().flatten().cloned()
}
