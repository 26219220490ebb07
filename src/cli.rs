//! Options and their environment: flag over variable over default. No I/O but reading secret files.

mod broker;
mod output;
mod parse;
mod values;

pub use broker::BrokerOptions;
pub use output::OutputOptions;
pub(crate) use parse::{AMQP_TOOLS, Given, VERSION, help_of_statuses, read};
pub use parse::{Request, command_line};
pub(crate) use values::{duration, duration_above_zero, name, queue_name, statuses, switch};

use crate::{
    broker::{Declare, Topology},
    command::{Limits, OnLost},
    exit::{Exit, Failure},
    program::Program,
    verdict::{Policy, Statuses},
};
use clap::Parser;
use std::{ffi::OsString, time::Duration};

/// Takes exactly one message from a queue, pipes it to COMMAND, acknowledges it only after COMMAND has succeeded,
/// and exits with COMMAND's status.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "qconsume",
    version = VERSION,
    override_usage = "qconsume [OPTIONS] [--] COMMAND [ARG]...",
    after_help = help_of_statuses(Program::Qconsume, false),
    after_long_help = help_of_statuses(Program::Qconsume, true),
)]
#[rustfmt::skip]
pub struct QconsumeOptions {
    /// Consume from this queue
    #[arg(short, long, value_name = "NAME", env = "QUEUE", default_value = "", hide_default_value = true, value_parser = queue_name, help_heading = "Broker")]
    pub queue: String,

    /// Wait this long for a message, such as 30s or 5m
    ///
    /// When none came, exit with --empty-exit-code. Only the time in which the consumer is registered counts. Without this option qconsume waits for ever.
    #[arg(short, long, value_name = "DURATION", env = "QCONSUME_WAIT", value_parser = duration, help_heading = "Taking")]
    pub wait: Option<Duration>,

    /// Exit with this status when no message came within --wait
    #[arg(long, hide_short_help = true, value_name = "N", env = "QCONSUME_EMPTY_EXIT_CODE", default_value_t = Exit::Empty.status(), help_heading = "Taking")]
    pub empty_exit_code: u8,

    /// Consume N messages, each with a command of its own [default: 1]
    ///
    /// 0 means no limit. The first command that fails ends the run, with its status.
    #[arg(short, long, value_name = "N", env = "QCONSUME_COUNT", help_heading = "Taking")]
    count: Option<u64>,

    /// Consume until the queue is empty
    ///
    /// Then exit with 0. With --wait, consume until the queue has been empty for that long.
    #[arg(long, env = "QCONSUME_DRAIN", value_parser = switch, help_heading = "Taking")]
    pub drain: bool,

    /// Take the next message after a failure, instead of ending the run
    ///
    /// It needs --drain or --count, and --max-attempts or --reject-on. The exit status is 0 when every message was acknowledged. Otherwise it is --reject-exit-code, or 1.
    #[arg(short, long, env = "QCONSUME_KEEP_GOING", value_parser = switch, help_heading = "Taking")]
    pub keep_going: bool,

    /// Ask the broker to wait this long for the acknowledgement
    ///
    /// This works with quorum queues of RabbitMQ 4.3 and newer. With every broker, a warning is logged when the command has run for 80 % of this time.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_ACK_TIMEOUT", value_parser = duration_above_zero, help_heading = "Taking")]
    pub ack_timeout: Option<Duration>,

    /// Stop the command after this time
    ///
    /// Send SIGTERM, and SIGKILL after --kill-after. The message is treated as after a failure, and the exit status is 124.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_TIMEOUT", value_parser = duration_above_zero, help_heading = "Running")]
    timeout: Option<Duration>,

    /// Send SIGKILL this long after qconsume's own SIGTERM
    ///
    /// qconsume sends SIGTERM after --timeout, and when the delivery is lost. Processes that a successful command has left behind may run this long, too. For forwarded signals see --grace.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_KILL_AFTER", default_value = "10s", value_parser = duration, help_heading = "Running")]
    kill_after: Duration,

    /// Send SIGKILL this long after a forwarded signal
    ///
    /// Without this option qconsume sends no SIGKILL; Kubernetes does, after terminationGracePeriodSeconds.
    #[arg(long, value_name = "DURATION", env = "QCONSUME_GRACE", value_parser = duration, help_heading = "Running")]
    grace: Option<Duration>,

    /// Stop the command, or let it finish, when its delivery is lost
    ///
    /// Another consumer may already have the message. The exit status is 75 in both cases.
    #[arg(long, hide_short_help = true, value_name = "WHAT", env = "QCONSUME_ON_LOST", value_enum, default_value_t, help_heading = "Running")]
    on_lost: OnLost,

    /// Keep the broker's address and passwords out of the command's environment
    #[arg(long, hide_short_help = true, env = "QCONSUME_HIDE_URL", value_parser = switch, help_heading = "Running")]
    hide_url: bool,

    /// Dead-letter the message when the command exits with one of these
    ///
    /// Separate statuses and ranges by commas, as in 65,100-120. A queue without a dead-letter exchange drops the message.
    #[arg(long, value_name = "CODES", env = "QCONSUME_REJECT_ON", value_parser = statuses, help_heading = "Settling")]
    reject_on: Option<Statuses>,

    /// Dead-letter the message at its Nth failure
    ///
    /// A quorum queue counts the failures. A classic queue doesn't, so only 1 has an effect there.
    #[arg(long, value_name = "N", env = "QCONSUME_MAX_ATTEMPTS", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Settling")]
    max_attempts: Option<u64>,

    /// Exit with this status when the message was dead-lettered [default: the command's status]
    ///
    /// With 0, a Job counts such a message as a completion.
    #[arg(long, hide_short_help = true, value_name = "N", env = "QCONSUME_REJECT_EXIT_CODE", help_heading = "Settling")]
    reject_exit_code: Option<u8>,

    /// Exit with this status for every failure of the command
    ///
    /// A podFailurePolicy can then tell the command's failures from qconsume's own.
    #[arg(long, value_name = "N", env = "QCONSUME_FAILURE_EXIT_CODE", value_parser = clap::value_parser!(u8).range(1..), help_heading = "Settling")]
    failure_exit_code: Option<u8>,

    /// What to say, how, and where.
    #[command(flatten)]
    pub output: OutputOptions,

    /// The command and its arguments
    ///
    /// Everything from the first word that isn't an option belongs to the command.
    #[arg(hide_short_help = true, value_name = "COMMAND", required = true, trailing_var_arg = true, help_heading = "Command")]
    pub command: Vec<OsString>,

    /// Where the broker is, and how to reach it.
    #[command(flatten)]
    pub broker: BrokerOptions,

    /// Bind the queue, or without --queue a new exclusive queue, to this exchange
    #[arg(short, long, hide_short_help = true, value_name = "EXCHANGE", env = "QCONSUME_EXCHANGE", value_parser = name, help_heading = AMQP_TOOLS)]
    exchange: Option<String>,

    /// Bind with these routing keys, separated by commas
    #[arg(short, long, hide_short_help = true, value_name = "KEYS", env = "QCONSUME_ROUTING_KEY", help_heading = AMQP_TOOLS)]
    routing_key: Option<String>,

    /// Declare the queue as durable, if it doesn't exist
    #[arg(short, long, hide_short_help = true, env = "QCONSUME_DECLARE", value_parser = switch, help_heading = AMQP_TOOLS)]
    declare: bool,

    /// Declare the queue as exclusive: it is deleted with the connection
    #[arg(short = 'x', long, hide_short_help = true, env = "QCONSUME_EXCLUSIVE", value_parser = switch, help_heading = AMQP_TOOLS)]
    exclusive: bool,

    /// Acknowledge the message before the command starts: a failure loses it
    #[arg(short = 'A', long, hide_short_help = true, env = "QCONSUME_NO_ACK", value_parser = switch, help_heading = AMQP_TOOLS)]
    pub no_ack: bool,

    /// Changes nothing: a worker holds one message at a time
    #[arg(short, long, hide = true, value_name = "N", env = "QCONSUME_PREFETCH_COUNT", help_heading = AMQP_TOOLS)]
    pub prefetch_count: Option<u32>,
}

/// qconsume's command line, for those who write its documentation.
#[must_use]
pub fn command() -> clap::Command {
    command_line::<QconsumeOptions>()
}

/// Reads the command line and the environment.
///
/// # Errors
/// 64 for anything that isn't as it should be, 78 for a file that can't be read.
pub fn parse(arguments: &[OsString]) -> Result<Request<QconsumeOptions>, Failure> {
    read(arguments, QconsumeOptions::check)
}

impl QconsumeOptions {
    /// Checks what one option can't know of another.
    fn check(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.broker.find_nodes(given)?;
        self.check_queue(given)?;
        let dead_letters = [
            (self.reject_on.is_some(), "--reject-on"),
            (self.max_attempts.is_some(), "--max-attempts"),
            (self.reject_exit_code.is_some(), "--reject-exit-code"),
        ];
        if let Some((_, option)) = dead_letters.iter().find(|(set, _)| *set && self.no_ack) {
            return Err(Failure::usage(format!(
                "{option} can't be used with --no-ack: no message is left to requeue or dead-letter"
            )));
        }
        if self.keep_going && !self.drain && self.count.is_none() {
            return Err(Failure::usage(
                "--keep-going is only for --drain and --count",
            ));
        }
        if self.keep_going && self.max_attempts.is_none() && self.reject_on.is_none() {
            return Err(Failure::usage(
                "--keep-going needs --max-attempts or --reject-on: otherwise a message that always fails is consumed for ever",
            ));
        }
        // A URL that lacks its option must not be looked for as a command, and printed.
        if self.command.first().is_some_and(parse::is_address) {
            return Err(Failure::usage(
                "there is an amqp:// address where the command should be: it goes to --url",
            ));
        }
        Ok(())
    }

    fn check_queue(&self, given: &Given<'_>) -> Result<(), Failure> {
        let mistake = match (&self.exchange, &self.routing_key) {
            (Some(exchange), _) if exchange.is_empty() => {
                "--exchange is empty: every queue is bound to the default exchange, by its name"
            }
            (Some(_), None) => {
                "--exchange needs --routing-key; for an exchange that ignores it: --routing-key ''"
            }
            (None, Some(_)) => "--routing-key needs --exchange",
            _ if given.level("queue") > 0 && self.queue.is_empty() => {
                "the queue's name is empty: QUEUE (or --queue) needs one"
            }
            _ if self.queue.is_empty() && !self.declares() => {
                "no queue: set QUEUE, or use --queue NAME"
            }
            _ => {
                let too_long = |key: &String| name(key).err();
                return match self.topology().routing_keys.iter().find_map(too_long) {
                    Some(problem) => Err(Failure::usage(format!("--routing-key {problem}"))),
                    None => Ok(()),
                };
            }
        };
        Err(Failure::usage(mistake))
    }

    /// Whether a queue that doesn't exist is declared: amqp-consume's `-e` does that too.
    const fn declares(&self) -> bool {
        self.declare || self.exclusive || self.exchange.is_some()
    }

    /// What is declared before the consumer is registered.
    #[must_use]
    pub fn topology(&self) -> Topology {
        let declare = if !self.declares() {
            Declare::No
        } else if self.exclusive || self.queue.is_empty() {
            Declare::Exclusive
        } else {
            Declare::Durable
        };
        let keys = self.routing_key.as_deref().unwrap_or_default().split(',');
        let mut routing_keys: Vec<_> = keys
            .filter(|key| !key.is_empty())
            .map(str::to_owned)
            .collect();
        if routing_keys.is_empty() && self.exchange.is_some() {
            routing_keys.push(String::new());
        }
        Topology {
            declare,
            exchange: self.exchange.clone(),
            routing_keys,
        }
    }

    /// How many messages to consume; `None` is without limit.
    #[must_use]
    pub const fn count(&self) -> Option<u64> {
        match (self.count, self.drain) {
            (Some(0), _) | (None, true) => None,
            (Some(n), _) => Some(n),
            (None, false) => Some(1),
        }
    }

    /// Variables that the command doesn't get.
    #[must_use]
    pub const fn hidden_variables(&self) -> &'static [&'static str] {
        if self.hide_url { &broker::SECRETS } else { &[] }
    }

    /// How long the command may take.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        Limits {
            timeout: self.timeout,
            kill_after: self.kill_after,
            grace: self.grace,
            on_lost: self.on_lost,
        }
    }

    /// What decides about failures.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            reject_on: self.reject_on.clone().unwrap_or_default(),
            max_attempts: self.max_attempts,
            reject_exit_code: self.reject_exit_code,
            failure_exit_code: self.failure_exit_code,
        }
    }
}

#[cfg(test)]
mod tests;
