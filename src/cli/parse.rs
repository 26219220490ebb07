//! From the words of a command line to the options of a program, and from clap's errors to ours.

use super::OutputOptions;
use crate::{
    broker::reach::address::strip_scheme,
    exit::{self, Failure},
    program::Program,
};
use clap::{
    ArgMatches, Command, Parser,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
};

/// The version and, as far as the build knew it, the commit.
pub(crate) const VERSION: &str = env!("QCONSUME_VERSION");

/// The help's section for what is there to take amqp-tools' place.
pub(crate) const AMQP_TOOLS: &str = "As in amqp-tools";

/// What every terminal has, in columns.
const WIDTH: usize = 80;

/// What the command line asks for.
#[derive(Debug)]
pub enum Request<T> {
    /// A run.
    Run(Box<T>),
    /// This text on standard output, and nothing else: `--help`, `--version`.
    Show(String),
}

/// A program's options.
pub trait Options: Parser {
    /// The program.
    const PROGRAM: Program;

    /// What its long help ends with.
    const EXAMPLES: &'static str = "";

    /// Checks what one option can't know of another.
    ///
    /// # Errors
    /// 64 for anything that isn't as it should be, 78 for a file that can't be read.
    fn check(&mut self, given: &Given<'_>) -> Result<(), Failure>;

    /// What to say, how, and where.
    fn output(&self) -> &OutputOptions;
}

/// What was given, and how.
#[derive(Debug)]
pub struct Given<'a> {
    command: &'a Command,
    matches: &'a ArgMatches,
}

impl Given<'_> {
    /// How an option was given, the weaker first: 0 is not at all, 1 by its variable, 2 by a flag.
    pub(crate) fn level(&self, id: &str) -> u8 {
        match self.matches.value_source(id) {
            Some(ValueSource::CommandLine) => 2,
            Some(ValueSource::EnvVariable) => 1,
            _ => 0,
        }
    }

    /// What the user knows an option by: its variable, if it was given by that.
    pub(crate) fn name(&self, id: &str) -> String {
        let arg = self.command.get_arguments().find(|arg| arg.get_id() == id);
        match arg.and_then(|arg| arg.get_env()) {
            Some(variable) if self.level(id) == 1 => variable.to_string_lossy().into_owned(),
            _ => format!("--{}", id.replace('_', "-")),
        }
    }

    /// No name of a file or of something on the broker looks like an address. One that has slipped in there would be
    /// printed, with its password.
    fn check_addresses(&self) -> Result<(), Failure> {
        const MAY_BE: [&str; 9] =
            ["url", "password", "command", "messages", "body", "headers", "reply_to", "correlation_id", "message_id"];
        for arg in self.command.get_arguments() {
            let id = arg.get_id().as_str();
            let mut given = self.matches.get_raw(id).into_iter().flatten();
            if !MAY_BE.contains(&id) && given.any(is_address) {
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

/// A program's command line, as help and the documentation show it.
pub fn command_line<O: Options>() -> Command {
    O::command()
        .term_width(WIDTH)
        .after_help(help_of_statuses(O::PROGRAM, false))
        .after_long_help(help_of_statuses(O::PROGRAM, true) + O::EXAMPLES)
        // Help names variables and leaves alone what this machine has in them: it goes where it is pasted.
        .mut_args(|arg| arg.hide_env_values(true))
}

/// A variable that is empty is unset, as templates leave them; but for the two that matter, and the one that means "none".
pub(super) fn without_empty_variables(command: Command) -> Command {
    const MAY_BE_EMPTY: [&str; 3] = ["BROKER_URL", "QUEUE", "QCONSUME_TERMINATION_LOG"];
    let mut empty: Vec<_> = std::env::vars_os().filter(|(_, value)| value.is_empty()).map(|(name, _)| name).collect();
    empty.retain(|name| !MAY_BE_EMPTY.iter().any(|known| name == known));
    if empty.is_empty() {
        return command;
    }
    command.mut_args(|arg| match arg.get_env() {
        Some(name) if empty.iter().any(|empty| empty == name) => arg.env(None),
        _ => arg,
    })
}

/// One screen: of the variables only those that matter most.
fn short_help<O: Options>() -> String {
    let mut command = command_line::<O>().mut_args(|arg| {
        let matters = matches!(arg.get_id().as_str(), "url" | "queue");
        arg.hide_env(!matters)
    });
    command.render_help().to_string()
}

/// Reads a program's command line and environment, and checks its options. When they aren't as they should be, that is
/// said in the form that they ask for, so the log is started here then.
///
/// # Errors
/// 64 for anything that isn't as it should be, 78 for a file that can't be read.
pub fn parse<O: Options>(arguments: &[OsString]) -> Result<Request<O>, Failure> {
    understand(arguments).inspect_err(|_| OutputOptions::start_as_understood(arguments))
}

fn understand<O: Options>(arguments: &[OsString]) -> Result<Request<O>, Failure> {
    // Once, and without what only help shows: with its dozens of options it costs more than anything else before the
    // connection.
    let mut command = without_empty_variables(O::command().term_width(WIDTH));
    let matches = match command.try_get_matches_from_mut(arguments) {
        Ok(matches) => matches,
        Err(error) if !error.use_stderr() => {
            let text = error.render().to_string();
            return Ok(Request::Show(match error.kind() {
                ErrorKind::DisplayHelp if text.contains("see a summary with '-h'") => {
                    command_line::<O>().render_long_help().to_string()
                }
                ErrorKind::DisplayHelp => short_help::<O>(),
                _ => text,
            }));
        }
        Err(error) => return Err(usage(&error, &command)),
    };
    let given = Given { command: &command, matches: &matches };
    given.check_addresses()?;
    let mut options = O::from_arg_matches(&matches).map_err(|error| usage(&error, &command))?;
    options.check(&given)?;
    Ok(Request::Run(Box::new(options)))
}

/// clap's message in one line, as a log has it: without the usage, and with its tips and the variable that is to blame.
fn usage(error: &clap::Error, command: &Command) -> Failure {
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
    // It quotes what was given. An address that has slipped in after the wrong option has a password in it.
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
        // What comes after a typo isn't meant to be a value.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"))
        .collect();
    let text = parts.join("; ").replace(":;", ":").replace("; [", " [");
    Failure::usage(format!("{text}; see --help"))
}

/// The exit statuses, for the end of the help: in a paragraph, or as a list.
fn help_of_statuses(program: Program, in_full: bool) -> String {
    let own = match program {
        Program::Qconsume => "COMMAND's own, and qconsume's",
        Program::Qpublish => "qpublish's",
    };
    if !in_full {
        let short = |(status, meaning, _): (String, &'static str, _)| {
            let short = meaning.split(':').next().unwrap_or_default();
            format!("{status} {short}")
        };
        let all: Vec<_> = exit::table(program).into_iter().map(short).collect();
        return format!("Exit status, {own}: {}. More, all options, and their variables: --help", all.join(", "));
    }
    let mut text = format!("Exit status, {own}:");
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
