//! The options that the publisher takes: where messages go, and what they carry.

use crate::broker::reach::address::amqp_name;
use clap::Args;
use lapin::{
    BasicProperties,
    types::{AMQPValue, ShortString},
};
use std::collections::BTreeMap;

/// Delivery mode (AMQP 0-9-1, `basic`).
const PERSISTENT: u8 = 2;

/// Where messages go, and whether the queue is declared first. Names have 255 bytes at most.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Destination")]
pub struct Route {
    /// Publish to this exchange, instead of --queue
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true, value_parser = amqp_name)]
    pub exchange: String,

    /// Publish with this routing key; without --exchange it names a queue
    #[arg(short, long, value_name = "KEY", default_value = "", hide_default_value = true, value_parser = amqp_name)]
    pub routing_key: String,

    /// Let the broker drop a message that no queue takes
    ///
    /// Messages are then published without AMQP's mandatory flag. The broker drops a message that it can route to no
    /// queue, and still confirms it, so qpublish can't tell. An exchange of the delayed-message plugin needs this: it
    /// returns every mandatory message, although it delivers the message later.
    #[arg(long, hide_short_help = true)]
    no_mandatory: bool,

    /// Declare the queue first: quorum, classic or default
    ///
    /// The queue is durable. quorum is replicated, classic is on one node, and default is the virtual host's default
    /// type. A queue that exists must be of the same type. Without a message the queue is only declared, and standard
    /// input is not read.
    #[arg(long, value_name = "TYPE", value_parser = ["default", "quorum", "classic"], hide_possible_values = true)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "default")]
    #[arg(conflicts_with_all = ["exchange", "routing_key"])]
    pub declare: Option<String>,
}

impl Route {
    /// The mandatory flag of `basic.publish`. Never set for a reply to direct reply-to: RabbitMQ 3.10 and 4.0 return it
    /// although the client gets it. 4.3 returns it only if the client is gone, and then nobody wants the reply.
    pub(super) fn mandatory_flag(&self) -> bool {
        let is_reply = self.exchange.is_empty() && self.routing_key.starts_with("amq.rabbitmq.reply-to.");
        !self.no_mandatory && !is_reply
    }

    #[must_use]
    pub fn why_returned(&self) -> String {
        let Self { exchange, routing_key: key, .. } = self;
        if exchange.is_empty() {
            format!(
                "there is no queue {key:?} in this virtual host; create it (--declare --queue NAME), or check the name"
            )
        } else {
            format!(
                "no queue is bound to exchange {exchange:?} for routing key {key:?}; bind one, or use --no-mandatory \
                 if the exchange delays messages"
            )
        }
    }
}

/// The properties of every message.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Properties of every message")]
pub struct Properties {
    /// Content type, such as text/plain
    #[arg(short = 'C', long, value_name = "TYPE", value_parser = amqp_name)]
    pub content_type: Option<String>,

    /// Content encoding, such as gzip; the message is sent as it is
    #[arg(short = 'E', long, hide_short_help = true, value_name = "ENCODING", value_parser = amqp_name)]
    pub content_encoding: Option<String>,

    /// Queue for replies
    #[arg(short = 't', long, hide_short_help = true, value_name = "NAME", value_parser = amqp_name)]
    pub reply_to: Option<String>,

    /// Add a header (repeatable)
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE", value_parser = header)]
    pub headers: Vec<(ShortString, AMQPValue)>,

    /// Message id; the command gets it as MESSAGE_ID
    #[arg(long, value_name = "ID", value_parser = amqp_name)]
    pub message_id: Option<String>,

    /// Correlation id, which relates a reply to its request
    #[arg(long, hide_short_help = true, value_name = "ID", value_parser = amqp_name)]
    pub correlation_id: Option<String>,

    /// Type, for the consumer to tell messages apart
    #[arg(long = "type", hide_short_help = true, value_name = "TYPE", value_parser = amqp_name)]
    pub kind: Option<String>,

    /// Application that publishes the message
    #[arg(long, hide_short_help = true, value_name = "ID", value_parser = amqp_name)]
    pub app_id: Option<String>,

    /// Milliseconds in the queue after which the message expires
    ///
    /// The queue then drops the message, or dead-letters it.
    #[arg(long, hide_short_help = true, value_name = "MILLISECONDS")]
    pub expiration: Option<u32>,

    /// Priority: messages of a higher one are delivered first
    ///
    /// It works in classic queues with x-max-priority, and in quorum queues of RabbitMQ 4. Before 4.3 those have only two
    /// priorities: up to 4, and above.
    #[arg(long, value_name = "0-255")]
    pub priority: Option<u8>,
}

impl Properties {
    /// As AMQP has them, and with the delivery mode that survives a restart of the broker.
    pub(super) fn encode(&self) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let expiration = self.expiration.map(|milliseconds| milliseconds.to_string());
        let texts: [(_, fn(_, ShortString) -> _); 8] = [
            (&self.content_type, BasicProperties::with_content_type),
            (&self.content_encoding, BasicProperties::with_content_encoding),
            (&self.reply_to, BasicProperties::with_reply_to),
            (&self.message_id, BasicProperties::with_message_id),
            (&self.correlation_id, BasicProperties::with_correlation_id),
            (&self.kind, BasicProperties::with_type),
            (&self.app_id, BasicProperties::with_app_id),
            (&expiration, BasicProperties::with_expiration),
        ];
        for (value, with) in texts.into_iter().filter_map(|(value, with)| Some((value.as_deref()?, with))) {
            properties = with(properties, value.into());
        }
        if let Some(priority) = self.priority {
            properties = properties.with_priority(priority);
        }
        if !self.headers.is_empty() {
            properties = properties.with_headers(BTreeMap::from_iter(self.headers.clone()).into());
        }
        properties
    }
}

/// `name: value`, split as amqp-publish does: spaces before the value aren't part of it.
fn header(text: &str) -> Result<(ShortString, AMQPValue), String> {
    match text.split_once(':') {
        None => Err("has no colon between a name and a value".to_owned()),
        Some(("", _)) => Err("has no name before its colon".to_owned()),
        Some((key, value)) => Ok((amqp_name(key)?.into(), AMQPValue::LongString(value.trim_start().into()))),
    }
}
