//! The options that say what to say, how, and where: the same for qconsume and qpublish.

use crate::report::{Output, TERMINATION_LOG};
use clap::{ArgMatches, Args, Command, ValueEnum};
use std::{ffi::OsString, path::PathBuf};

/// What to say, how, and where.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// How much to say
    #[arg(
        long,
        value_name = "LEVEL",
        env = "QCONSUME_LOG",
        value_enum,
        default_value_t
    )]
    log_level: LevelArg,

    /// What log lines look like
    #[arg(
        long,
        value_name = "FORMAT",
        env = "QCONSUME_LOG_FORMAT",
        value_enum,
        default_value_t
    )]
    log_format: LogFormat,

    /// Where the last word goes, too
    ///
    /// If that file exists and is empty when the run ends: where Kubernetes looks for it.
    #[arg(hide_short_help = true, long, value_name = "FILE", env = "QCONSUME_TERMINATION_LOG", default_value = TERMINATION_LOG)]
    termination_log: PathBuf,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum LevelArg {
    /// only what ends the run
    Error,
    /// also what isn't as it should be
    Warn,
    /// also what is taken and what became of it
    #[default]
    Info,
    /// also each step
    Debug,
}

impl From<LevelArg> for tracing::Level {
    fn from(level: LevelArg) -> Self {
        match level {
            LevelArg::Error => Self::ERROR,
            LevelArg::Warn => Self::WARN,
            LevelArg::Info => Self::INFO,
            LevelArg::Debug => Self::DEBUG,
        }
    }
}

/// What log lines look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// for people
    #[default]
    Text,
    /// one JSON object a line
    Json,
}

impl OutputArgs {
    pub(crate) fn output(self) -> Output {
        Output {
            level: self.log_level.into(),
            format: self.log_format,
            termination_log: self.termination_log,
        }
    }

    /// The same, as far as it can be understood, from a command line that isn't as it should be.
    pub(super) fn understood(arguments: &[OsString]) -> Output {
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
        let matches = Self::augment_args(Command::new("").no_binary_name(true))
            .ignore_errors(true)
            .try_get_matches_from(own)
            .unwrap_or_default();
        let level: Option<LevelArg> = given(&matches, "log_level");
        Output {
            level: level.unwrap_or_default().into(),
            format: given(&matches, "log_format").unwrap_or_default(),
            termination_log: given(&matches, "termination_log")
                .unwrap_or_else(|| TERMINATION_LOG.into()),
        }
    }
}

fn given<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, id: &str) -> Option<T> {
    matches.try_get_one(id).ok().flatten().cloned()
}
