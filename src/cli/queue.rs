//! The options that say what to take messages from: a queue, and what amqp-consume would make of it.

use super::{AMQP_TOOLS, NAME_MAX};
use crate::{
    broker::{Declare, Topology},
    exit::{Exit, Failure},
};
use clap::{ArgAction, Args, builder::FalseyValueParser};

/// The queue.
#[derive(Clone, Debug, Args)]
pub(crate) struct QueueArgs {
    /// The queue
    #[arg(
        short,
        long,
        value_name = "NAME",
        env = "QUEUE",
        help_heading = "Broker"
    )]
    queue: Option<String>,

    /// Bind the queue to this exchange; without --queue, a new one of this connection's own, whose name is printed
    #[arg(hide_short_help = true, short, long, value_name = "EXCHANGE", env = "QCONSUME_EXCHANGE", help_heading = AMQP_TOOLS)]
    exchange: Option<String>,

    /// The routing keys to bind with, commas between; '' where the exchange takes no notice of them
    #[arg(hide_short_help = true,
        short,
        long,
        value_name = "KEYS",
        env = "QCONSUME_ROUTING_KEY",
        help_heading = AMQP_TOOLS
    )]
    routing_key: Option<String>,

    /// Declare the queue, durable, if it isn't there
    #[arg(hide_short_help = true, short, long, env = "QCONSUME_DECLARE", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new(), help_heading = AMQP_TOOLS)]
    declare: bool,

    /// Declare the queue as this connection's own, with which it goes
    #[arg(hide_short_help = true, short = 'x', long, env = "QCONSUME_EXCLUSIVE", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new(), help_heading = AMQP_TOOLS)]
    exclusive: bool,
}

impl QueueArgs {
    /// The queue's name, empty where the broker is to choose one, and what is made before it is consumed from.
    ///
    /// # Errors
    /// 64 for what isn't as it should be.
    pub(crate) fn resolve(self) -> Result<(String, Topology), Failure> {
        let routing_keys = match (&self.exchange, &self.routing_key) {
            (None, None) => Vec::new(),
            (Some(_), Some(keys)) => split(keys),
            (Some(_), None) => {
                return Err(usage(
                    "--exchange needs --routing-key; for an exchange that takes no notice of it: --routing-key ''",
                ));
            }
            (None, Some(_)) => return Err(usage("--routing-key needs --exchange")),
        };
        if self.exchange.as_deref() == Some("") {
            return Err(usage(
                "--exchange is empty: every queue is bound to the default exchange, by its name",
            ));
        }
        let declare = if self.exclusive || (self.queue.is_none() && self.declares()) {
            Declare::Exclusive
        } else if self.declares() {
            Declare::Durable
        } else {
            Declare::No
        };
        let queue = match self.queue {
            None if declare == Declare::No => {
                return Err(usage("no queue: set QUEUE, or use --queue NAME"));
            }
            None => String::new(),
            Some(name) if name.is_empty() => {
                return Err(usage(
                    "the queue's name is empty: QUEUE (or --queue) needs one",
                ));
            }
            Some(name) => name,
        };
        let names = [("queue", &queue)]
            .into_iter()
            .chain(self.exchange.iter().map(|name| ("exchange", name)))
            .chain(routing_keys.iter().map(|key| ("routing key", key)));
        for (what, name) in names {
            if name.len() > NAME_MAX {
                return Err(usage(format!(
                    "the {what}'s name has {} bytes; AMQP allows {NAME_MAX}",
                    name.len()
                )));
            }
        }
        let topology = Topology {
            declare,
            exchange: self.exchange,
            routing_keys,
        };
        Ok((queue, topology))
    }

    /// Whether a queue that isn't there is to be made: amqp-consume's `-e` does that too.
    fn declares(&self) -> bool {
        self.declare || self.exclusive || self.exchange.is_some()
    }
}

/// The keys between the commas; where there is none, the empty key.
fn split(keys: &str) -> Vec<String> {
    let parts: Vec<_> = keys
        .split(',')
        .filter(|key| !key.is_empty())
        .map(str::to_owned)
        .collect();
    if parts.is_empty() {
        vec![String::new()]
    } else {
        parts
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Usage, message)
}
