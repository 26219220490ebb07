//! qpublish's options and their environment.

use super::source::Source;
use crate::{
    broker::{Properties, QueueType, Route},
    cli::{
        BrokerArgs, BrokerOptions, NAME_MAX, OutputArgs, Request, VERSION, duration,
        duration_above_zero,
    },
    exit::{Exit, Failure},
    report::Output,
};
use clap::{ArgGroup, ArgMatches, CommandFactory, Parser, ValueEnum, parser::ValueSource};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::OsString,
    path::PathBuf,
    time::Duration,
};

/// Publishes messages, one of each argument, and exits with 0 only when the broker has confirmed every one. With no
/// argument all of standard input is one message.
///
/// Messages are persistent and mandatory, and the broker confirms each (publisher confirms). The first one that it
/// returns or refuses ends the run; what is said then names it, and how many from the start are confirmed without a gap,
/// so that a second run can begin behind them.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "qpublish",
    version = VERSION,
    override_usage = "qpublish [OPTIONS] [--] [MESSAGE]...",
    after_help = AFTER_HELP_IN_SHORT,
    after_long_help = AFTER_HELP,
    group = ArgGroup::new("source").args(["messages", "body", "file", "lines", "null"]),
)]
struct Cli {
    #[command(flatten)]
    broker: BrokerArgs,

    /// The queue to publish to, by way of the default exchange
    #[arg(short, long, value_name = "NAME", env = "QUEUE", value_parser = name, help_heading = "Destination")]
    queue: Option<String>,

    /// The exchange to publish to, instead of --queue
    #[arg(short, long, value_name = "NAME", value_parser = name, help_heading = "Destination")]
    exchange: Option<String>,

    /// The routing key; without --exchange, the name of a queue
    #[arg(short, long, value_name = "KEY", value_parser = name, help_heading = "Destination")]
    routing_key: Option<String>,

    /// Declare the queue first: quorum, classic or default
    ///
    /// Durable, of this type, or of the virtual host's default one. One that exists must be like that. With no message the queue is only declared, and standard input not read.
    #[arg(
        long,
        value_name = "TYPE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "default",
        hide_possible_values = true,
        value_enum,
        help_heading = "Destination"
    )]
    declare: Option<TypeArg>,

    /// Messages, one each
    #[arg(value_name = "MESSAGE", help_heading = "Messages")]
    messages: Vec<OsString>,

    /// One message; it may be empty, or begin with a dash
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        help_heading = "Messages"
    )]
    body: Option<OsString>,

    /// One message of each file
    #[arg(short, long, value_name = "FILE", num_args = 1.., help_heading = "Messages")]
    file: Vec<PathBuf>,

    /// One message of each line of standard input
    ///
    /// As soon as it is there, and without its newline, which amqp-publish keeps. An empty line is an empty message.
    #[arg(
        short,
        long,
        visible_alias = "line-buffered",
        help_heading = "Messages"
    )]
    lines: bool,

    /// The same with NUL instead of newline
    ///
    /// As find -print0 has it.
    #[arg(short = '0', long, help_heading = "Messages")]
    null: bool,

    /// Changes nothing: messages are always persistent
    #[arg(
        hide_short_help = true,
        short,
        long,
        help_heading = "Properties of every message"
    )]
    persistent: bool,

    /// For example text/plain
    #[arg(short = 'C', long, value_name = "TYPE", value_parser = name, help_heading = "Properties of every message")]
    content_type: Option<String>,

    /// For example gzip
    ///
    /// The message is sent as it is.
    #[arg(hide_short_help = true, short = 'E', long, value_name = "ENCODING", value_parser = name, help_heading = "Properties of every message")]
    content_encoding: Option<String>,

    /// The queue for answers
    #[arg(hide_short_help = true, short = 't', long, value_name = "NAME", value_parser = name, help_heading = "Properties of every message")]
    reply_to: Option<String>,

    /// A header; may be given several times
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE", value_parser = header, help_heading = "Properties of every message")]
    headers: Vec<(String, String)>,

    /// Told to the command as MESSAGE_ID
    #[arg(long, value_name = "ID", value_parser = name, help_heading = "Properties of every message")]
    message_id: Option<String>,

    /// What an answer is to carry
    #[arg(hide_short_help = true, long, value_name = "ID", value_parser = name, help_heading = "Properties of every message")]
    correlation_id: Option<String>,

    /// The higher, the sooner
    ///
    /// In queues that have x-max-priority, and in quorum queues of RabbitMQ 4 (above 4, or not).
    #[arg(
        long,
        value_name = "0-255",
        help_heading = "Properties of every message"
    )]
    priority: Option<u8>,

    /// Drop it when nobody has taken it for so long
    ///
    /// Or dead-letter it, where the queue says so.
    #[arg(hide_short_help = true, long, value_name = "DURATION", value_parser = expiration, help_heading = "Properties of every message")]
    expiration: Option<u32>,

    /// The kind of message
    #[arg(hide_short_help = true, long = "type", value_name = "NAME", value_parser = name, help_heading = "Properties of every message")]
    kind: Option<String>,

    /// Who sends it
    #[arg(hide_short_help = true, long, value_name = "NAME", value_parser = name, help_heading = "Properties of every message")]
    app_id: Option<String>,

    /// Longest wait for the next confirmation
    ///
    /// While messages are in flight, also while the broker blocks publishers. Then give up, with status 75.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration_above_zero, help_heading = "Publishing")]
    timeout: Duration,

    #[command(flatten)]
    output: OutputArgs,
}

const AFTER_HELP_IN_SHORT: &str = "\
Exit status: 0 only when the broker has confirmed every message. 64 wrong options, 66 unreadable input, 69 no broker, \
75 not all confirmed (another try may help), 77 refused, 78 configuration (no such queue), 128+N signal N. More, and all \
options: --help";

const AFTER_HELP: &str = "\
Exit status:
  0    every message is confirmed
  64   wrong options, or a malformed or empty BROKER_URL or QUEUE
  66   a file or standard input can't be read
  69   broker not reachable within --connect-timeout; nothing was published
  70   a defect in qpublish
  75   not every message is confirmed, and another try may help: connection
       lost, nothing confirmed within --timeout, publishers blocked (memory or
       disk alarm), message refused (queue full)
  77   the broker refused the credentials or a permission
  78   no such queue, exchange, binding or virtual host; a queue of another
       kind than --declare asks for; a message larger than the broker takes;
       an unreadable certificate
  128+N ended on signal N before every message was confirmed

Examples:
  qpublish -q job1 --declare apple banana cherry
  seq 100000 | qpublish -q job1 --lines
  find . -name '*.png' -print0 | qpublish -q images --null
  qpublish -q job1 -f tasks/*.json";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TypeArg {
    Default,
    Quorum,
    Classic,
}

/// What a run needs to know.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) broker: BrokerOptions,
    pub(super) route: Route,
    /// The queue to declare.
    pub(super) declare: Option<QueueType>,
    /// Where messages come from; `None` is when there are none, only a queue to declare.
    pub(super) source: Option<Source>,
    pub(super) properties: Properties,
    pub(super) timeout: Duration,
    pub(super) output: Output,
}

/// qpublish's command line, for those who write its documentation.
pub(super) fn command() -> clap::Command {
    Cli::command()
}

/// Reads the command line and the environment.
pub(super) fn parse(arguments: &[OsString]) -> Result<Request<Options>, Failure> {
    crate::cli::read(arguments, Cli::options)
}

impl Cli {
    fn options(self, matches: &ArgMatches) -> Result<Options, Failure> {
        let route = self.route(matches)?;
        let declare = self.declare.map(|kind| match kind {
            TypeArg::Default => QueueType::Default,
            TypeArg::Quorum => QueueType::Quorum,
            TypeArg::Classic => QueueType::Classic,
        });
        let source = if self.lines {
            Some(Source::Records(b'\n'))
        } else if self.null {
            Some(Source::Records(0))
        } else if let Some(body) = self.body {
            Some(Source::Arguments(vec![body]))
        } else if !self.file.is_empty() {
            Some(Source::Files(self.file))
        } else if !self.messages.is_empty() {
            Some(Source::Arguments(self.messages))
        } else if declare.is_none() {
            Some(Source::Input)
        } else {
            None
        };
        let mut headers = BTreeMap::new();
        for (name, value) in self.headers {
            match headers.entry(name) {
                Entry::Vacant(entry) => entry.insert(value),
                Entry::Occupied(entry) => {
                    return Err(usage(format!("--header {:?} is given twice", entry.key())));
                }
            };
        }
        Ok(Options {
            broker: self.broker.resolve(matches)?,
            route,
            declare,
            source,
            properties: Properties {
                content_type: self.content_type,
                content_encoding: self.content_encoding,
                reply_to: self.reply_to,
                message_id: self.message_id,
                correlation_id: self.correlation_id,
                priority: self.priority,
                expiration: self.expiration,
                kind: self.kind,
                app_id: self.app_id,
                headers,
            },
            timeout: self.timeout,
            output: self.output.output(),
        })
    }

    /// Where to: `--exchange` and `--routing-key`, or else the queue.
    fn route(&self, matches: &ArgMatches) -> Result<Route, Failure> {
        if self.exchange.is_some() || self.routing_key.is_some() {
            if self.declare.is_some() {
                return Err(usage(
                    "--declare is for a --queue to publish to, not for --exchange or --routing-key",
                ));
            }
            // A variable that is there for others gives way.
            if matches.value_source("queue") == Some(ValueSource::CommandLine) {
                return Err(usage(
                    "--queue and --exchange or --routing-key are both set; only one of them can count",
                ));
            }
            return Ok(Route {
                exchange: self.exchange.clone().unwrap_or_default(),
                routing_key: self.routing_key.clone().unwrap_or_default(),
            });
        }
        match self.queue.as_deref() {
            None => Err(usage(
                "nowhere to publish to: set QUEUE, or use --queue NAME, or --exchange and --routing-key",
            )),
            Some("") => Err(usage(
                "the queue's name is empty: QUEUE (or --queue) needs one",
            )),
            Some(queue) => Ok(Route {
                exchange: String::new(),
                routing_key: queue.to_owned(),
            }),
        }
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Usage, message)
}

/// What AMQP has a short string for.
fn name(text: &str) -> Result<String, String> {
    if text.len() > NAME_MAX {
        return Err(format!("has {} bytes; AMQP allows {NAME_MAX}", text.len()));
    }
    Ok(text.to_owned())
}

/// `name: value`, as amqp-publish takes it apart: spaces before the value aren't part of it.
fn header(text: &str) -> Result<(String, String), String> {
    let Some((key, value)) = text.split_once(':') else {
        return Err("has no colon between a name and a value".to_owned());
    };
    if key.is_empty() {
        return Err("has no name before its colon".to_owned());
    }
    Ok((name(key)?, value.trim_start().to_owned()))
}

/// In milliseconds; RabbitMQ's timers end at 2³² of them.
fn expiration(text: &str) -> Result<u32, String> {
    u32::try_from(duration(text)?.as_millis())
        .map_err(|_| "longer than RabbitMQ allows, which is 49 days".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_header_is_split_at_its_first_colon_as_amqp_publish_does() {
        let pair = |name: &str, value: &str| Ok((name.to_owned(), value.to_owned()));
        assert_eq!(header("k:  v w "), pair("k", "v w "));
        assert_eq!(header("a:b:c"), pair("a", "b:c"));
        assert_eq!(header("e:"), pair("e", ""));
        assert!(header("none").is_err());
        assert!(header(": value").is_err());
        assert!(header(&format!("{}:", "n".repeat(256))).is_err());
    }

    #[test]
    fn an_expiration_is_a_duration_that_rabbitmq_has_room_for() {
        assert_eq!(expiration("5m"), Ok(300_000));
        assert_eq!(expiration("1.5"), Ok(1500));
        assert_eq!(expiration("0s"), Ok(0));
        assert!(expiration("50days").is_err());
        assert!(expiration("soon").is_err());
    }
}
