//! qpublish's options and their environment.

use super::source::Source;
use crate::{
    broker::{Properties, Route},
    cli::{BrokerOptions, Given, Options, OutputOptions, VERSION, name, queue_name},
    clock::duration_above_zero,
    exit::Failure,
    program::Program,
};
use clap::{ArgGroup, Parser};
use std::{
    ffi::OsString,
    mem::take,
    path::{Path, PathBuf},
    time::Duration,
};

/// Publishes one message for each argument, and exits with 0 only when the broker has confirmed all of them. Without
/// an argument, all of standard input is one message.
///
/// Messages are persistent and mandatory, and the broker confirms each (publisher confirms). The first message that the
/// broker returns or refuses ends the run. The last line then says how many messages from the start are confirmed
/// without a gap, so that a second run can continue after them.
#[derive(Debug, Parser)]
#[command(
    name = "qpublish",
    version = VERSION,
    override_usage = "qpublish [OPTIONS] [--] [MESSAGE]...",
    group = ArgGroup::new("input").args(["messages", "body", "file", "lines", "null"]),
)]
pub struct QpublishOptions {
    /// Publish to this queue, through the default exchange
    #[arg(short, long, value_name = "NAME", env = "QUEUE", default_value = "", hide_default_value = true, value_parser = queue_name, help_heading = "Destination")]
    queue: String,

    /// Publish to this exchange, instead of --queue
    #[arg(short, long, value_name = "NAME", value_parser = name, help_heading = "Destination")]
    exchange: Option<String>,

    /// Publish with this routing key; without --exchange it names a queue
    #[arg(short, long, value_name = "KEY", value_parser = name, help_heading = "Destination")]
    routing_key: Option<String>,

    /// Declare the queue first: quorum, classic or default
    ///
    /// The queue is durable. quorum is replicated, classic is on one node, and default is the virtual host's default type. A queue that exists must be of the same type. Without a message the queue is only declared, and standard input is not read.
    #[arg(long, value_name = "TYPE", num_args = 0..=1, require_equals = true, default_missing_value = "default", hide_possible_values = true, value_parser = ["default", "quorum", "classic"], help_heading = "Destination")]
    pub(super) declare: Option<String>,

    /// Let the broker drop a message that no queue takes
    ///
    /// Messages are then published without AMQP's mandatory flag. The broker drops a message that it can route to no queue, and still confirms it, so qpublish can't tell. An exchange of the delayed-message plugin needs this: it returns every mandatory message, although it delivers the message later.
    #[arg(long, hide_short_help = true, help_heading = "Destination")]
    no_mandatory: bool,

    /// Bodies, one for each message
    #[arg(hide_short_help = true, value_name = "MESSAGE", help_heading = "Messages")]
    messages: Vec<OsString>,

    /// Publish this text, which may be empty or begin with a dash
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Messages")]
    body: Option<OsString>,

    /// Publish one message for each file; - is standard input
    #[arg(short, long, value_name = "FILE", num_args = 1.., help_heading = "Messages")]
    file: Vec<PathBuf>,

    /// Publish one message for each line of standard input
    ///
    /// Each line is published at once, and without its newline, which amqp-publish keeps. An empty line is an empty message.
    #[arg(short, long, visible_alias = "line-buffered", help_heading = "Messages")]
    lines: bool,

    /// Publish one message for each part that ends with NUL
    ///
    /// find -print0 writes such parts to standard input.
    #[arg(short = '0', long, help_heading = "Messages")]
    null: bool,

    /// Changes nothing: messages are always persistent
    #[arg(short, long, hide = true)]
    persistent: bool,

    /// What every message carries.
    #[command(flatten)]
    pub(super) properties: Properties,

    /// Wait this long for the next confirmation
    ///
    /// The time runs while a message is unconfirmed, also while the broker blocks publishers. When it has passed, exit with 75.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_above_zero, help_heading = "Publishing")]
    pub(super) timeout: Duration,

    /// What to say, how, and where.
    #[command(flatten)]
    pub(super) output: OutputOptions,

    /// Where the broker is, and how to reach it.
    #[command(flatten)]
    pub(super) broker: BrokerOptions,

    /// Where to, once the options are checked.
    #[arg(skip)]
    pub(super) route: Route,
}

impl Options for QpublishOptions {
    const PROGRAM: Program = Program::Qpublish;
    const EXAMPLES: &'static str = "

Examples:
  qpublish -q job1 --declare apple banana cherry
  seq 100000 | qpublish -q job1 --lines
  find . -name '*.png' -print0 | qpublish -q images --null
  qpublish -q job1 -f tasks/*.json";

    fn output(&self) -> &OutputOptions {
        &self.output
    }

    fn check(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.route = self.find_route(given)?;
        self.broker.find_nodes(given)?;
        let headers = &self.properties.headers;
        for (at, (name, _)) in headers.iter().enumerate() {
            if headers[..at].iter().any(|(other, _)| other == name) {
                return Err(Failure::usage(format!("--header {name:?} is given twice")));
            }
        }
        Ok(())
    }
}

impl QpublishOptions {
    /// Where messages come from. With `--declare` alone there are none.
    ///
    /// # Errors
    /// When a file can't be read.
    pub(super) fn find_source(&mut self) -> Result<Source, Failure> {
        Ok(if self.lines || self.null {
            Source::Records(if self.lines { b'\n' } else { 0 })
        } else if let Some(body) = self.body.take() {
            Source::Arguments(vec![body])
        } else if self.file == [Path::new("-")] {
            Source::Input
        } else if !self.file.is_empty() {
            Source::files(take(&mut self.file))?
        } else if !self.messages.is_empty() || self.declare.is_some() {
            Source::Arguments(take(&mut self.messages))
        } else {
            Source::Input
        })
    }

    /// Where to: `--exchange` and `--routing-key`, or else the queue.
    fn find_route(&mut self, given: &Given<'_>) -> Result<Route, Failure> {
        let by_queue = self.exchange.is_none() && self.routing_key.is_none();
        let mistake = if !by_queue && self.declare.is_some() {
            "--declare is for a --queue to publish to, not for --exchange or --routing-key"
        // A variable that is there for others gives way.
        } else if !by_queue && given.level("queue") == 2 {
            "--queue and --exchange or --routing-key are both set; only one of them can count"
        } else if by_queue && given.level("queue") == 0 {
            "nowhere to publish to: set QUEUE, or use --queue NAME, or --exchange and --routing-key"
        } else if by_queue && self.queue.is_empty() {
            "the queue's name is empty: QUEUE (or --queue) needs one"
        } else {
            let key = by_queue.then(|| take(&mut self.queue));
            return Ok(Route {
                exchange: self.exchange.take().unwrap_or_default(),
                routing_key: key.or(self.routing_key.take()).unwrap_or_default(),
                mandatory: !self.no_mandatory,
            });
        };
        Err(Failure::usage(mistake))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Request, command_line, parse};

    #[test]
    fn the_options_are_consistent() {
        command_line::<QpublishOptions>().debug_assert();
    }

    #[test]
    fn a_dash_is_standard_input() {
        let source = |files: &[&str]| {
            let words = ["qpublish", "-u", "amqp://h", "-q", "q", "-f"].iter();
            let words: Vec<_> = words.chain(files).map(OsString::from).collect();
            match parse::<QpublishOptions>(&words) {
                Ok(Request::Run(mut options)) => options.find_source().unwrap(),
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(source(&["-"]), Source::Input));
        let Source::Files(files) = source(&["/dev/null", "-"]) else {
            panic!("no files");
        };
        assert_eq!(files, [PathBuf::from("/dev/null"), "/dev/stdin".into()]);
    }
}
