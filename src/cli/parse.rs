//! Parses a program's command line and environment, and words clap's errors.

use super::{OutputOptions, values::without_empty_variables};
use crate::{
    broker::reach::address::strip_scheme,
    exit::{self, Failure},
    program::Program,
};
use clap::{
    ArgMatches, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
};

/// With the commit if the build knew it.
pub(crate) const VERSION: &str = env!("QCONSUME_VERSION");

/// The help's section for options that exist for users of amqp-tools.
pub(crate) const AMQP_TOOLS: &str = "As in amqp-tools";

/// The width of the help, in columns, which every terminal has.
const WIDTH: usize = 80;

#[derive(Debug)]
pub enum Request<T> {
    Run(Box<T>),
    /// Show this text on standard output, and end: `--help`, `--version`.
    Show(String),
}

pub trait Options: Parser {
    const PROGRAM: Program;

    const EXAMPLES: &'static str;

    /// Checks the options against each other.
    fn check(&mut self, given: &Given<'_>) -> Result<(), Failure>;

    fn output(&self) -> &OutputOptions;
}

#[derive(Debug)]
pub struct Given<'a> {
    command: &'a clap::Command,
    matches: &'a ArgMatches,
}

/// How an option was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Precedence {
    Default,
    Variable,
    Flag,
}

impl Given<'_> {
    pub(crate) fn precedence(&self, id: &str) -> Precedence {
        match self.matches.value_source(id) {
            Some(ValueSource::CommandLine) => Precedence::Flag,
            Some(ValueSource::EnvVariable) => Precedence::Variable,
            _ => Precedence::Default,
        }
    }

    pub(crate) fn is_given(&self, id: &str) -> bool {
        self.precedence(id) > Precedence::Default
    }

    /// For errors: the variable if the option was given by that, otherwise the flag.
    pub(crate) fn name(&self, id: &str) -> String {
        let arg = self.command.get_arguments().find(|arg| arg.get_id() == id);
        match arg.and_then(|arg| arg.get_env()) {
            Some(variable) if self.precedence(id) == Precedence::Variable => variable.to_string_lossy().into_owned(),
            _ => format!("--{}", id.replace('_', "-")),
        }
    }

    /// Refuses an amqp:// address in an option that takes none: a later error would quote it with its password.
    fn refuse_misplaced_addresses(&self) -> Result<(), Failure> {
        const MAY_HOLD_ADDRESS: [&str; 9] =
            ["url", "password", "command", "messages", "body", "headers", "reply_to", "correlation_id", "message_id"];
        for arg in self.command.get_arguments() {
            let id = arg.get_id().as_str();
            let mut given = self.matches.get_raw(id).into_iter().flatten();
            if !MAY_HOLD_ADDRESS.contains(&id) && given.any(is_address) {
                return Err(Failure::usage(format!(
                    "{} is an amqp:// address, which goes to BROKER_URL or --url",
                    self.name(id)
                )));
            }
        }
        Ok(())
    }
}

pub(super) fn is_address(text: impl AsRef<OsStr>) -> bool {
    let text = text.as_ref().to_string_lossy();
    strip_scheme(text.trim_start()).is_some()
}

/// The command line as the help and the documentation show it.
pub fn command_line<O: Options>() -> clap::Command {
    O::command()
        .term_width(WIDTH)
        .after_help(paragraph_of_statuses(O::PROGRAM))
        .after_long_help(list_of_statuses(O::PROGRAM) + O::EXAMPLES)
        // Help is pasted into issues and chats: it must not show the values of variables.
        .mut_args(|arg| arg.hide_env_values(true))
}

/// Fits on one screen, and shows only the variables that matter most.
fn short_help<O: Options>() -> String {
    let mut command = command_line::<O>().mut_args(|arg| {
        let matters = matches!(arg.get_id().as_str(), "url" | "queue");
        arg.hide_env(!matters)
    });
    command.render_help().to_string()
}

/// # Errors
/// 64 for a usage error, 78 for a file that can't be used, 71 if the system is short of something.
pub fn parse<O: Options>(arguments: &[OsString]) -> Result<Request<O>, Failure> {
    // Building clap's command takes longer than anything else before the connection, so it is built once, and without
    // the statuses and examples at the end of the help.
    let mut command = without_empty_variables(O::command().term_width(WIDTH));
    let matches = match command.try_get_matches_from_mut(arguments) {
        Ok(matches) => matches,
        Err(error) if !error.use_stderr() => {
            let text = error.render().to_string();
            return Ok(Request::Show(match error.kind() {
                // clap has one kind for -h and --help. Only the text of --help names the other.
                ErrorKind::DisplayHelp if text.contains("see a summary with '-h'") => {
                    command_line::<O>().render_long_help().to_string()
                }
                ErrorKind::DisplayHelp => short_help::<O>(),
                _ => text,
            }));
        }
        Err(error) => return Err(usage_error(&error, &command)),
    };
    let given = Given { command: &command, matches: &matches };
    given.refuse_misplaced_addresses()?;
    let mut options = O::from_arg_matches(&matches).map_err(|error| usage_error(&error, &command))?;
    options.check(&given)?;
    Ok(Request::Run(Box::new(options)))
}

/// clap's message in one line, without the usage, and with the variable that has the wrong value.
fn usage_error(error: &clap::Error, command: &clap::Command) -> Failure {
    let mut text = error.render().to_string();
    if let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
        && let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        && let Some(arg) = command.get_arguments().find(|arg| arg.to_string() == *option)
        && let Some(variable) = arg.get_env()
        && std::env::var_os(variable).is_some_and(|set| set.to_string_lossy() == *value)
    {
        let quoted = format!("'{option}'");
        text = text.replace(&quoted, &format!("{quoted} ({})", variable.display()));
    }
    // clap quotes the value. If that is an address after the wrong option, it contains a password.
    for (_, given) in error.context() {
        if let ContextValue::String(given) = given
            && given.contains("://")
        {
            text = text.replace(given, "amqp://***");
        }
    }
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let parts: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        // This tip says how to pass a misspelt option as a value, which nobody wants.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"))
        .collect();
    let text = parts.join("; ").replace(":;", ":").replace("; [", " [");
    Failure::usage(format!("{text}; see --help"))
}

fn paragraph_of_statuses(program: Program) -> String {
    let statuses = exit::table(program).into_iter().map(|(status, meaning, _)| {
        let short = meaning.split(':').next().unwrap_or_default();
        format!("{status} {short}")
    });
    let statuses = statuses.collect::<Vec<_>>().join(", ");
    format!("{}: {statuses}. All options, their variables and examples: --help", title_of_statuses(program))
}

fn list_of_statuses(program: Program) -> String {
    let mut text = format!("{}:", title_of_statuses(program));
    for (status, meaning, _) in exit::table(program) {
        let mut line = format!("\n  {status:<5}");
        for word in meaning.split(' ') {
            if line.len() + word.len() >= WIDTH {
                text.push_str(&line);
                line = format!("\n{:7}", "");
            }
            let _ = write!(line, " {word}");
        }
        text.push_str(&line);
    }
    text
}

const fn title_of_statuses(program: Program) -> &'static str {
    match program {
        Program::Qconsume => "Exit status, COMMAND's own, and qconsume's",
        Program::Qpublish => "Exit status, qpublish's",
    }
}
