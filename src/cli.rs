//! Options and their environment: flag over variable over default. No I/O but reading secret files.

mod broker;
mod help;
mod output;
mod queue;

pub(crate) use broker::{BrokerArgs, BrokerOptions};
pub use output::LogFormat;
pub(crate) use output::OutputArgs;
use queue::QueueArgs;

use crate::{
    broker::{ConnectOptions, Topology, address::Address},
    command::{Limits, OnLost},
    exit::{Exit, Failure},
    report::{self, Output},
    verdict::{Policy, Statuses},
};
use clap::{
    ArgAction, ArgMatches, Command, CommandFactory, Parser, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use std::{
    ffi::{OsStr, OsString},
    time::Duration,
};

/// Longest time that an option may name: ten years. More than that is a slip of the finger, and overflows clocks.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Longest name that AMQP 0-9-1 has room for, in bytes: a short string.
pub(crate) const NAME_MAX: usize = 255;

/// The version and, as far as the build knew it, the commit.
pub(crate) const VERSION: &str = env!("QCONSUME_VERSION");

/// The help's section for what is there to take amqp-tools' place.
const AMQP_TOOLS: &str = "As in amqp-tools";

/// Takes exactly one message from a queue, pipes it to COMMAND, acknowledges it only after COMMAND has succeeded,
/// and exits with COMMAND's status.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "qconsume",
    version = VERSION,
    override_usage = "qconsume [OPTIONS] [--] COMMAND [ARG]...",
    after_help = EXIT_STATUSES_IN_SHORT,
    after_long_help = EXIT_STATUSES,
)]
pub struct Cli {
    #[command(flatten)]
    broker: BrokerArgs,

    #[command(flatten)]
    queue: QueueArgs,

    /// Longest wait for a message
    ///
    /// Then the run ends with --empty-exit-code. Only time counts in which a message could have come. Without it, wait for ever.
    #[arg(short, long, value_name = "DURATION", env = "QCONSUME_WAIT", value_parser = duration, help_heading = "Taking")]
    wait: Option<Duration>,

    /// What to exit with when no message has come within --wait [default: 66]
    #[arg(
        hide_short_help = true,
        long,
        value_name = "N",
        env = "QCONSUME_EMPTY_EXIT_CODE",
        help_heading = "Taking"
    )]
    empty_exit_code: Option<u8>,

    /// Messages to take [default: 1]
    ///
    /// One after the other, each by a command of its own; the first failure ends the run with its status. 0 is without limit.
    #[arg(
        short,
        long,
        value_name = "N",
        env = "QCONSUME_COUNT",
        help_heading = "Taking"
    )]
    count: Option<u64>,

    /// Work until the queue is empty
    ///
    /// Then exit 0. With --wait, until it has been empty for so long.
    #[arg(long, env = "QCONSUME_DRAIN", action = ArgAction::SetTrue, value_parser = clap::builder::FalseyValueParser::new(), help_heading = "Taking")]
    drain: bool,

    /// After a failed command, take the next message instead of ending the run
    #[arg(short, long, env = "QCONSUME_KEEP_GOING", action = ArgAction::SetTrue, value_parser = clap::builder::FalseyValueParser::new(), help_heading = "Taking")]
    keep_going: bool,

    /// How long the broker waits for the acknowledgement
    ///
    /// Asked of RabbitMQ 4.3 and newer, for quorum queues. Everywhere a command that has run for 80 % of it is mentioned.
    #[arg(hide_short_help = true, long, value_name = "DURATION", env = "QCONSUME_ACK_TIMEOUT", value_parser = duration_above_zero, help_heading = "Taking")]
    ack_timeout: Option<Duration>,

    /// Acknowledge the message before the command starts: whatever becomes of the command, it is gone
    #[arg(hide_short_help = true, short = 'A', long, env = "QCONSUME_NO_ACK", action = ArgAction::SetTrue, value_parser = clap::builder::FalseyValueParser::new(), help_heading = AMQP_TOOLS)]
    no_ack: bool,

    /// Changes nothing: a worker holds one message at a time
    #[arg(hide_short_help = true,
        short,
        long,
        value_name = "N",
        env = "QCONSUME_PREFETCH_COUNT",
        help_heading = AMQP_TOOLS
    )]
    prefetch_count: Option<u32>,

    /// Keep the broker's address and passwords out of the command's environment
    #[arg(hide_short_help = true, long, env = "QCONSUME_HIDE_URL", action = ArgAction::SetTrue, value_parser = clap::builder::FalseyValueParser::new(), help_heading = "Running")]
    hide_url: bool,

    /// The command's time limit
    ///
    /// Then it gets TERM, and KILL after --kill-after: a failure, with status 124.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_TIMEOUT", value_parser = duration_above_zero, help_heading = "Running")]
    timeout: Option<Duration>,

    /// Kill the command so long after qconsume's own TERM
    ///
    /// After --timeout, and when the message was lost. What was passed on from outside has --grace.
    #[arg(hide_short_help = true, long, value_name = "DURATION", env = "QCONSUME_KILL_AFTER", default_value = "10s", value_parser = duration, help_heading = "Running")]
    kill_after: Duration,

    /// Kill it so long after a signal
    ///
    /// After a TERM, INT, HUP or QUIT that was passed on to the command. Without it the command isn't killed, other than by the platform: terminationGracePeriodSeconds.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_GRACE", value_parser = duration, help_heading = "Running")]
    grace: Option<Duration>,

    /// What to do with the command when its message was lost
    ///
    /// Somebody else may have it already. The status is 75 either way.
    #[arg(
        hide_short_help = true,
        long,
        value_name = "WHAT",
        env = "QCONSUME_ON_LOST",
        value_enum,
        default_value_t,
        help_heading = "Running"
    )]
    on_lost: LostArg,

    /// Dead-letter the message on these statuses of the command
    ///
    /// A list such as 65,100-120. Without a dead-letter exchange the message is dropped.
    #[arg(long, value_name = "CODES", env = "QCONSUME_REJECT_ON", value_parser = statuses, help_heading = "Settling")]
    reject_on: Option<Statuses>,

    /// Dead-letter the message at its Nth failure
    ///
    /// As counted by a quorum queue; a classic queue doesn't count, so only 1 has an effect there.
    #[arg(long, value_name = "N", env = "QCONSUME_MAX_ATTEMPTS", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Settling")]
    max_attempts: Option<u64>,

    /// What to exit with when the message was dead-lettered [default: the command's status]
    ///
    /// 0 lets a Job count such a message as done.
    #[arg(
        hide_short_help = true,
        long,
        value_name = "N",
        env = "QCONSUME_REJECT_EXIT_CODE",
        help_heading = "Settling"
    )]
    reject_exit_code: Option<u8>,

    /// One status for all failures of the command
    ///
    /// Whatever its own was, so that a podFailurePolicy can tell the command's from qconsume's.
    #[arg(long, value_name = "N", env = "QCONSUME_FAILURE_EXIT_CODE", value_parser = clap::value_parser!(u8).range(1..), help_heading = "Settling")]
    failure_exit_code: Option<u8>,

    #[command(flatten)]
    output: OutputArgs,

    /// The command and its arguments
    ///
    /// Everything after the first word that is no option belongs to it.
    #[arg(
        value_name = "COMMAND",
        required = true,
        trailing_var_arg = true,
        help_heading = "Command"
    )]
    command: Vec<OsString>,
}

/// qconsume's command line, for those who write its documentation.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

const EXIT_STATUSES_IN_SHORT: &str = "\
Exit status: COMMAND's own, and 0 only when the broker has taken in the acknowledgement. 64 wrong options, 66 no message, \
69 no broker, 75 message lost or acknowledgement unconfirmed, 77 refused, 78 configuration, 124 timeout, 126 and 127 \
COMMAND can't be run, 128+N signal N. More, and all options: --help";

const EXIT_STATUSES: &str = "\
Exit status:
  COMMAND's own, and of qconsume's own:
  0    COMMAND succeeded and the broker has taken in the acknowledgement
  64   wrong options, or a malformed or empty BROKER_URL or QUEUE
  66   no message within --wait
  69   broker not reachable within --connect-timeout
  70   a defect in qconsume
  75   the message was lost while COMMAND ran, or its acknowledgement not confirmed: it may come again
  77   the broker refused the credentials or a permission
  78   no such queue or virtual host, an exclusive queue, an unreadable certificate
  124  --timeout has passed
  126  COMMAND can't be executed
  127  COMMAND not found
  128+N COMMAND, or qconsume while it waited, ended on signal N";

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum LostArg {
    /// TERM, and KILL after --kill-after
    #[default]
    Terminate,
    /// let it finish
    Finish,
}

/// What a run needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The nodes of the broker.
    pub nodes: Vec<Address>,
    /// The queue's name; empty where the broker is to choose one.
    pub queue: String,
    /// What is made before it is consumed from.
    pub topology: Topology,
    /// How to connect to them.
    pub connect: ConnectOptions,
    /// `--wait`
    pub wait: Option<Duration>,
    /// `--empty-exit-code`
    pub empty_exit_code: u8,
    /// How many messages to take; `None` is without limit.
    pub count: Option<u64>,
    /// `--drain`
    pub drain: bool,
    /// `--keep-going`
    pub keep_going: bool,
    /// `--ack-timeout`
    pub ack_timeout: Option<Duration>,
    /// `--no-ack`
    pub no_ack: bool,
    /// `--prefetch-count`
    pub prefetch_count: Option<u32>,
    /// Variables that the command doesn't get: `--hide-url`.
    pub hidden: &'static [&'static str],
    /// How long the command may take.
    pub limits: Limits,
    /// What decides about failures.
    pub policy: Policy,
    /// What to say, how, and where.
    pub output: Output,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Request<T = Options> {
    /// A run.
    Run(Box<T>),
    /// This text on standard output, and nothing else: `--help`, `--version`.
    Show(String),
}

/// Reads the command line and the environment.
///
/// # Errors
/// 64 for anything that isn't as it should be, 78 for a file that can't be read.
pub fn parse(arguments: &[OsString]) -> Result<Request, Failure> {
    read(arguments, Cli::options)
}

/// Reads a program's command line and environment, and makes its options of them. When they aren't as they should be,
/// that is said in the form that they ask for, so the log is started here then.
pub(crate) fn read<C: Parser, T>(
    arguments: &[OsString],
    options: impl FnOnce(C, &ArgMatches) -> Result<T, Failure>,
) -> Result<Request<T>, Failure> {
    understand(arguments, options).inspect_err(|_| report::start(OutputArgs::understood(arguments)))
}

fn understand<C: Parser, T>(
    arguments: &[OsString],
    options: impl FnOnce(C, &ArgMatches) -> Result<T, Failure>,
) -> Result<Request<T>, Failure> {
    // Once: with its dozens of options it costs more than anything else before the connection.
    let mut command = C::command();
    let matches = match command.try_get_matches_from_mut(arguments) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayVersion => {
            return Ok(Request::Show(error.render().to_string()));
        }
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            let short = error.render().to_string() == command.render_help().to_string();
            return Ok(Request::Show(shown_help::<C>(short)));
        }
        Err(error) => return Err(usage(&error, &command)),
    };
    no_address_astray(&command, &matches)?;
    let cli = C::from_arg_matches(&matches).map_err(|error| usage(&error, &command))?;
    Ok(Request::Run(Box::new(options(cli, &matches)?)))
}

/// Help goes where it is pasted: it names variables, and leaves what this machine has in them alone.
fn shown_help<C: CommandFactory>(short: bool) -> String {
    let mut command = C::command().mut_args(|arg| arg.hide_env_values(true));
    let text = if short {
        command.render_help()
    } else {
        command.render_long_help()
    };
    help::fitted(&text.to_string(), short)
}

/// Options whose values are printed: the names of files, and of what is on the broker.
const NAMES: [&str; 13] = [
    "url_file",
    "queue",
    "exchange",
    "routing_key",
    "server",
    "server_name",
    "vhost",
    "authfile",
    "cacert",
    "cert",
    "key",
    "file",
    "termination_log",
];

/// None of them looks like an address. One that has slipped in there would be printed, with its password.
fn no_address_astray(command: &Command, matches: &ArgMatches) -> Result<(), Failure> {
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        if !NAMES.contains(&id) || !matches.get_raw(id).into_iter().flatten().any(is_address) {
            continue;
        }
        let option = match (matches.value_source(id), arg.get_env()) {
            (Some(ValueSource::EnvVariable), Some(variable)) => {
                variable.to_string_lossy().into_owned()
            }
            _ => format!("--{}", arg.get_long().unwrap_or(id)),
        };
        return Err(Failure::new(
            Exit::Usage,
            format!("{option} is an amqp:// address, which goes to BROKER_URL or --url"),
        ));
    }
    Ok(())
}

fn is_address(text: impl AsRef<OsStr>) -> bool {
    let text = text.as_ref().to_string_lossy().to_lowercase();
    let text = text.trim_start();
    text.starts_with("amqp://") || text.starts_with("amqps://")
}

/// clap's message in one line, as a log has it: without the usage, and with its tips and the variable that is to blame.
fn usage(error: &clap::Error, command: &Command) -> Failure {
    let mut text = error.render().to_string();
    if let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
        && let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        && let Some(arg) = command
            .get_arguments()
            .find(|arg| arg.to_string() == *option)
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
    Failure::new(Exit::Usage, format!("{text}; see --help"))
}

impl Cli {
    fn options(self, matches: &ArgMatches) -> Result<Options, Failure> {
        let broker = self.broker.resolve(matches)?;
        let (queue, topology) = self.queue.resolve()?;
        let returns = [
            (self.reject_on.is_some(), "--reject-on"),
            (self.max_attempts.is_some(), "--max-attempts"),
            (self.reject_exit_code.is_some(), "--reject-exit-code"),
        ];
        if let Some((_, option)) = returns.iter().find(|(set, _)| *set && self.no_ack) {
            return Err(Failure::new(
                Exit::Usage,
                format!(
                    "{option} can't do anything with --no-ack: no message is left to return or reject"
                ),
            ));
        }
        // A URL that lacks its option must not be looked for as a command, and printed.
        if self.command.first().is_some_and(is_address) {
            return Err(Failure::new(
                Exit::Usage,
                "there is an amqp:// address where the command should be: it goes to --url",
            ));
        }
        let count = match (self.count, self.drain) {
            (Some(0), _) | (None, true) => None,
            (Some(n), _) => Some(n),
            (None, false) => Some(1),
        };
        Ok(Options {
            nodes: broker.nodes,
            connect: broker.connect,
            queue,
            topology,
            wait: self.wait,
            empty_exit_code: self.empty_exit_code.unwrap_or(Exit::Empty.status()),
            count,
            drain: self.drain,
            keep_going: self.keep_going,
            ack_timeout: self.ack_timeout,
            no_ack: self.no_ack,
            prefetch_count: self.prefetch_count,
            hidden: if self.hide_url { &broker::SECRETS } else { &[] },
            limits: Limits {
                timeout: self.timeout,
                kill_after: self.kill_after,
                grace: self.grace,
                on_lost: match self.on_lost {
                    LostArg::Terminate => OnLost::Terminate,
                    LostArg::Finish => OnLost::Finish,
                },
            },
            policy: Policy {
                reject_on: self.reject_on.unwrap_or_default(),
                max_attempts: self.max_attempts,
                reject_exit_code: self.reject_exit_code,
                failure_exit_code: self.failure_exit_code,
            },
            output: self.output.output(),
            command: self.command,
        })
    }
}

/// `500ms`, `10s`, `5m`, `1h30m`, or plain seconds, with a fraction if need be.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let plain = text.parse::<f64>().ok().map(Duration::try_from_secs_f64);
    let duration = match plain {
        Some(plain) => plain.map_err(|error| error.to_string()),
        None => humantime::parse_duration(text)
            .map_err(|_| "not a duration such as 500ms, 10s, 5m, 1h30m, or seconds".to_owned()),
    }?;
    if duration > LONGEST {
        return Err("longer than ten years".to_owned());
    }
    Ok(duration)
}

/// A duration where none at all makes no sense.
pub(crate) fn duration_above_zero(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than nothing".to_owned()),
        duration => Ok(duration),
    }
}

fn statuses(text: &str) -> Result<Statuses, String> {
    let number = |text: &str| match text.trim().parse::<u8>() {
        Ok(0) => Err("0 is no failure".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("{text:?} is no status from 1 to 255")),
    };
    text.split(',')
        .map(|part| match part.split_once('-') {
            Some((first, last)) => {
                let range = number(first)?..=number(last)?;
                if range.is_empty() {
                    return Err(format!(
                        "{part:?} is no range: its end comes before its start"
                    ));
                }
                Ok(range)
            }
            None => number(part).map(|status| status..=status),
        })
        .collect::<Result<_, _>>()
        .map(Statuses)
}

#[cfg(test)]
mod tests;
