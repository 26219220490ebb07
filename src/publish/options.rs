//! qpublish's options and their environment.

use super::source::Input;
use crate::{
    broker::{Properties, Route},
    cli::{BrokerOptions, Given, Options, OutputOptions, Precedence, VERSION, queue_name},
    clock::duration_above_zero,
    exit::Failure,
    program::Program,
};
use clap::Parser;
use std::{collections::HashSet, time::Duration};

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
    next_help_heading = "Destination",
)]
pub struct QpublishOptions {
    /// Publish to this queue, through the default exchange
    #[arg(short, long, value_name = "NAME", env = "QUEUE", value_parser = queue_name)]
    queue: Option<String>,

    /// Where to publish to; [`Options::check`] writes the queue into it.
    #[command(flatten)]
    pub(super) route: Route,

    /// Declare the queue first: quorum, classic or default
    ///
    /// The queue is durable. quorum is replicated, classic is on one node, and default is the virtual host's default
    /// type. A queue that exists must be of the same type. Without a message the queue is only declared, and standard
    /// input is not read.
    #[arg(long, value_name = "TYPE", value_parser = ["default", "quorum", "classic"], hide_possible_values = true)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "default")]
    #[arg(conflicts_with_all = ["exchange", "routing_key"])]
    pub(super) declare: Option<String>,

    /// What to publish.
    #[command(flatten)]
    pub(super) input: Input,

    /// Changes nothing: messages are always persistent
    #[arg(short, long, hide = true)]
    persistent: bool,

    /// The properties of every message.
    #[command(flatten)]
    pub(super) properties: Properties,

    /// Wait this long for the next confirmation
    ///
    /// The time runs while a message is unconfirmed, also while the broker blocks publishers. When it has passed, exit
    /// with 75.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_above_zero)]
    #[arg(help_heading = "Publishing")]
    pub(super) timeout: Duration,

    /// What to say, how, and where.
    #[command(flatten)]
    pub(super) output: OutputOptions,

    /// Where the broker is, and how to reach it.
    #[command(flatten)]
    pub(super) broker: BrokerOptions,
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
        let by_queue = !given.is_given("exchange") && !given.is_given("routing_key");
        match self.queue.take() {
            // QUEUE from the environment gives way to --exchange or --routing-key.
            _ if !by_queue && given.precedence("queue") < Precedence::Flag => {}
            _ if !by_queue => {
                let text = "--queue can't be used together with --exchange or --routing-key: leave one out";
                return Err(Failure::usage(text));
            }
            None => {
                let text = "nowhere to publish to: set QUEUE, or use --queue NAME, or --exchange and --routing-key";
                return Err(Failure::usage(text));
            }
            Some(queue) if queue.is_empty() => {
                return Err(Failure::usage("the queue's name is empty: QUEUE (or --queue) needs one"));
            }
            Some(queue) => self.route.routing_key = queue,
        }
        self.broker.find_nodes(given)?;
        let mut names = HashSet::new();
        match self.properties.headers.iter().find(|(name, _)| !names.insert(name)) {
            Some((name, _)) => Err(Failure::usage(format!("--header {name:?} is given twice"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::source::Source, *};
    use crate::cli::{Request, command_line, parse};
    use std::{ffi::OsString, path::PathBuf};

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
                Ok(Request::Run(options)) => options.input.into_source(false).unwrap(),
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(source(&["-"]), Source::Input(_)));
        let Source::Files(files) = source(&["/dev/null", "-"]) else {
            panic!("no files");
        };
        assert_eq!(files, [PathBuf::from("/dev/null"), "/dev/stdin".into()]);
    }
}
