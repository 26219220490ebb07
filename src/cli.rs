//! Options and their environment. The only I/O is reading the files with addresses, passwords and certificates.
//!
//! Other options stand where they are used: `Limits` (command/supervise.rs), `Policy` (verdict.rs), `TlsOptions`
//! (broker/reach/tls.rs), and qpublish's (publish/options.rs, publish/input.rs, broker/publish/options.rs). The
//! variable of an option that holds a secret belongs to `SECRETS` (cli/broker.rs), and an option that may hold an
//! address to `MAY_HOLD_ADDRESS` (cli/parse.rs).

mod broker;
mod output;
mod parse;
mod values;

pub use broker::BrokerOptions;
pub use output::OutputOptions;
pub(crate) use parse::{AMQP_TOOLS, Precedence, VERSION};
pub use parse::{Given, Options, Request, command_line, parse};
pub(crate) use values::{amqp_name, queue_name, switch};

use crate::{
    broker::{Declare, Topology},
    clock::{duration, duration_above_zero},
    command::Limits,
    exit::{Exit, Failure},
    program::Program,
    verdict::Policy,
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
)]
pub struct QconsumeOptions {
    /// Consume from this queue
    #[arg(short, long, value_name = "NAME", env = "QUEUE", default_value = "", hide_default_value = true, value_parser = queue_name, help_heading = "Broker")]
    pub queue: String,

    /// Wait this long for a message, such as 30s or 5m
    ///
    /// If none arrives, exit with --empty-exit-code. Time spent connecting doesn't count. Without this option, qconsume
    /// waits for ever.
    #[arg(short, long, value_name = "DURATION", env = "QCONSUME_WAIT", value_parser = duration, help_heading = "Taking")]
    pub wait: Option<Duration>,

    /// Exit with this status if no message arrives within --wait
    #[arg(long, hide_short_help = true, value_name = "N", env = "QCONSUME_EMPTY_EXIT_CODE", default_value_t = Exit::NoInput.status(), help_heading = "Taking")]
    pub empty_exit_code: u8,

    /// Consume N messages, one after the other, and run the command for each [default: 1]
    ///
    /// 0 means no limit. The first command that fails ends the run with its status.
    #[arg(short, long, value_name = "N", env = "QCONSUME_COUNT", help_heading = "Taking")]
    count: Option<u64>,

    /// Consume until the queue is empty
    ///
    /// Then exit with 0, even if there was no message. With --wait, consume until no message has come for that long and
    /// the queue is empty.
    #[arg(long, env = "QCONSUME_DRAIN", value_parser = switch, help_heading = "Taking")]
    pub drain: bool,

    /// Take the next message after a failure, instead of ending the run
    ///
    /// Needs --drain or --count, and --max-attempts or --reject-on. The exit status is 0 if every message was
    /// acknowledged. If one was dead-lettered, it is --reject-exit-code, or 1.
    #[arg(short, long, env = "QCONSUME_KEEP_GOING", value_parser = switch, help_heading = "Taking")]
    pub keep_going: bool,

    /// Ask the broker to wait this long for the acknowledgement
    ///
    /// Only quorum queues of RabbitMQ 4.3 and newer obey. With any broker, qconsume logs a warning when the message has
    /// been held for 80 % of this time.
    #[arg(long, hide_short_help = true, value_name = "DURATION", env = "QCONSUME_ACK_TIMEOUT", value_parser = duration_above_zero, help_heading = "Taking")]
    pub ack_timeout: Option<Duration>,

    #[command(flatten)]
    pub limits: Limits,

    /// Keep the broker's address and passwords out of the command's environment
    #[arg(long, hide_short_help = true, env = "QCONSUME_HIDE_URL", value_parser = switch, help_heading = "Running")]
    hide_url: bool,

    #[command(flatten)]
    pub policy: Policy,

    #[command(flatten)]
    pub output: OutputOptions,

    /// The command and its arguments
    ///
    /// Everything from the first word that isn't an option belongs to the command. It gets the message on standard
    /// input, and its properties in MESSAGE_* variables.
    #[arg(
        hide_short_help = true,
        value_name = "COMMAND",
        required = true,
        trailing_var_arg = true,
        help_heading = "Command"
    )]
    pub command: Vec<OsString>,

    #[command(flatten)]
    pub broker: BrokerOptions,

    /// Bind the queue to this exchange
    ///
    /// The queue is declared first, as by --declare.
    #[arg(short, long, hide_short_help = true, value_name = "EXCHANGE", env = "QCONSUME_EXCHANGE", value_parser = amqp_name, help_heading = AMQP_TOOLS)]
    exchange: Option<String>,

    /// Bind with these routing keys, separated by commas
    #[arg(short, long, hide_short_help = true, value_name = "KEYS", env = "QCONSUME_ROUTING_KEY", value_delimiter = ',', value_parser = amqp_name, help_heading = AMQP_TOOLS)]
    routing_key: Vec<String>,

    /// Declare the queue if it doesn't exist
    ///
    /// The new queue is durable, and of the virtual host's default type. If the queue exists, its properties are
    /// neither checked nor changed. Without --queue, a new queue is declared as by --exclusive, and the broker chooses
    /// its name.
    #[arg(short, long, hide_short_help = true, env = "QCONSUME_DECLARE", value_parser = switch, help_heading = AMQP_TOOLS)]
    declare: bool,

    /// Declare an exclusive queue, which is deleted when the connection ends
    ///
    /// No other connection to the broker can use it, but clients of amqproxy may share one. If the broker has another
    /// queue of this name, the exit status is 78.
    #[arg(short = 'x', long, hide_short_help = true, env = "QCONSUME_EXCLUSIVE", value_parser = switch, help_heading = AMQP_TOOLS)]
    exclusive: bool,

    /// Acknowledge before the command starts; if it fails, the message is lost
    #[arg(short = 'A', long, hide_short_help = true, env = "QCONSUME_NO_ACK", value_parser = switch, help_heading = AMQP_TOOLS)]
    pub no_ack: bool,

    /// Changes nothing: a worker holds one message at a time
    #[arg(short, long, hide = true, value_name = "N", env = "QCONSUME_PREFETCH_COUNT", help_heading = AMQP_TOOLS)]
    pub prefetch_count: Option<u32>,
}

impl Options for QconsumeOptions {
    const PROGRAM: Program = Program::Qconsume;
    const EXAMPLES: &'static str = "

Examples:
  qconsume -u amqp://rabbitmq -q job1 -- ./task.sh
  qconsume --wait 30s --timeout 10m -- python3 task.py
  qconsume --drain --keep-going --max-attempts 3 -- ./task.sh
  qconsume --hide-url -- sh -c 'echo message $MESSAGE_ID; cat'";

    fn output(&self) -> &OutputOptions {
        &self.output
    }

    fn check(&mut self, given: &Given<'_>) -> Result<(), Failure> {
        self.broker.find_nodes(given)?;
        let policy = &self.policy;
        let dead_letters = policy.reject_on.is_some() || policy.max_attempts.is_some();
        let mistake = if self.exchange.as_deref() == Some("") {
            "--exchange is empty: the default exchange needs no binding, so leave the option out"
        } else if self.exchange.is_some() && self.routing_key.is_empty() {
            "--exchange needs --routing-key; for an exchange that ignores it: --routing-key ''"
        } else if self.exchange.is_none() && !self.routing_key.is_empty() {
            "--routing-key needs --exchange"
        } else if self.queue.is_empty() && given.is_given("queue") {
            "the queue's name is empty: QUEUE (or --queue) needs one"
        } else if self.queue.is_empty() && !self.creates_queue() {
            "no queue: set QUEUE, or use --queue NAME"
        } else if self.no_ack && (dead_letters || policy.reject_exit_code.is_some()) {
            "--reject-on, --max-attempts and --reject-exit-code can't be used with --no-ack: no message is left to requeue or dead-letter"
        } else if self.keep_going && !self.drain && self.count.is_none() {
            "--keep-going is only for --drain and --count"
        } else if self.keep_going && !dead_letters {
            "--keep-going needs --max-attempts or --reject-on: otherwise a message that always fails is consumed for ever"
        } else if self.command.first().is_some_and(parse::is_address) {
            // It would be looked up as a command, and the error would show its password.
            "COMMAND is an amqp:// address: give it to --url"
        } else {
            return Ok(());
        };
        Err(Failure::usage(mistake))
    }
}

impl QconsumeOptions {
    /// Whether to declare the queue; `--exchange` does that too, as amqp-consume's `-e` does.
    const fn creates_queue(&self) -> bool {
        self.declare || self.exclusive || self.exchange.is_some()
    }

    pub fn topology(&self) -> Topology {
        let declare = if !self.creates_queue() {
            Declare::No
        } else if self.exclusive || self.queue.is_empty() {
            Declare::Exclusive
        } else {
            Declare::Durable
        };
        let mut routing_keys = self.routing_key.clone();
        // Empty keys are left out. If no other key is left, bind with one empty key.
        routing_keys.retain(|key| !key.is_empty());
        if routing_keys.is_empty() && self.exchange.is_some() {
            routing_keys.push(String::new());
        }
        Topology { declare, exchange: self.exchange.clone(), routing_keys }
    }

    /// How many messages to consume; `None` means no limit.
    pub const fn count(&self) -> Option<u64> {
        match (self.count, self.drain) {
            (Some(0), _) | (None, true) => None,
            (Some(n), _) => Some(n),
            (None, false) => Some(1),
        }
    }

    pub const fn hidden_variables(&self) -> &'static [&'static str] {
        if self.hide_url { &broker::SECRETS } else { &[] }
    }
}

#[cfg(test)]
mod tests;
