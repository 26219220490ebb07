//! qpublish's options and their environment.

use super::input::Input;
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
/// Messages are persistent, mandatory unless --no-mandatory is given, and the broker confirms each (publisher
/// confirms). The first message that the broker returns or refuses ends the run. The last line then says how many
/// messages from the start are confirmed without a gap, so that a second run can continue after them.
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

    #[command(flatten)]
    pub(super) input: Input,

    /// Changes nothing: messages are always persistent
    #[arg(short, long, hide = true)]
    persistent: bool,

    #[command(flatten)]
    pub(super) properties: Properties,

    /// Wait this long for the next confirmation
    ///
    /// The time runs while a message is unconfirmed, also while the broker blocks publishers. When it has passed, exit
    /// with 75. It also limits the wait for the broker's replies before the first message; then exit with 69.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_above_zero)]
    #[arg(help_heading = "Publishing")]
    pub(super) timeout: Duration,

    #[command(flatten)]
    pub(super) output: OutputOptions,

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
        let routed = given.is_given("exchange") || given.is_given("routing_key");
        // QUEUE from the environment gives way to --exchange or --routing-key.
        let queue = self.queue.take().filter(|_| !routed || given.precedence("queue") == Precedence::Flag);
        let usage = |text: &str| Err(Failure::usage(text));
        match queue {
            Some(_) if routed => {
                return usage("--queue can't be used together with --exchange or --routing-key: leave one out");
            }
            Some(queue) if queue.is_empty() => return usage("the queue's name is empty: QUEUE (or --queue) needs one"),
            Some(queue) => self.route.routing_key = queue,
            None if routed => {}
            None => {
                return usage("nowhere to publish to: set QUEUE, or use --queue NAME, or --exchange and --routing-key");
            }
        }
        self.broker.find_nodes(given)?;
        let mut names = HashSet::new();
        match self.properties.headers.iter().find(|(name, _)| !names.insert(name)) {
            Some((name, _)) => usage(&format!("--header {:?} is given twice", name.as_str())),
            None => Ok(()),
        }
    }
}
