//! The options for the log and the termination message, which qconsume and qpublish share.

use super::values::without_empty_variables;
use crate::report::{self, LogFormat, TERMINATION_LOG};
use clap::{
    ArgMatches, Args,
    builder::{OsStringValueParser, PossibleValuesParser, TypedValueParser},
};
use std::{
    ffi::OsString,
    io::{self, IsTerminal},
    path::PathBuf,
};
use tracing::Level;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputOptions {
    /// Write log lines of this level and above
    ///
    /// error: why the run failed. warn: problems that don't end the run. info: which message was taken and its outcome,
    /// or how many messages were published. debug: each step.
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
    /// It is written at the end of the run if the file exists and is empty. With an empty name, nothing is written. The
    /// command gets an empty QCONSUME_TERMINATION_LOG, so a qconsume or qpublish that it calls writes no termination
    /// message.
    #[arg(long, hide_short_help = true, value_name = "FILE", env = "QCONSUME_TERMINATION_LOG", default_value = TERMINATION_LOG, value_parser = OsStringValueParser::new().map(PathBuf::from))]
    termination_log: PathBuf,
}

fn levels() -> impl TypedValueParser<Value = Level> {
    PossibleValuesParser::new(["error", "warn", "info", "debug"]).try_map(|name| name.parse::<Level>())
}

impl OutputOptions {
    pub fn start(&self) {
        report::start(self.log_level, self.log_format, &self.termination_log);
    }

    /// Whether to show progress: on a terminal, unless the options ask for less than `info` or for JSON.
    pub(crate) fn shows_progress(&self) -> bool {
        self.log_level >= Level::INFO && self.log_format == LogFormat::Text && io::stderr().is_terminal()
    }

    /// Starts the log with those of its options that can be parsed.
    pub(crate) fn start_after_failed_parse(arguments: &[OsString]) {
        // clap stops at the first error, so it gets the log's options only. Without `--` before COMMAND these may be
        // COMMAND's options. Then they decide how our error is logged, and which file gets the termination message.
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
        let command = Self::augment_args(clap::Command::new("").no_binary_name(true)).ignore_errors(true);
        let matches = without_empty_variables(command).try_get_matches_from(own).unwrap_or_default();
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
