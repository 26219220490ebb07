//! What qpublish's messages carry, and where they go.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use std::collections::BTreeMap;

/// The delivery mode that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// Where messages go. Names have 255 bytes at most.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// The exchange; the empty name is the default exchange, which leads to the queue that the routing key names.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// Whether the broker returns a message that it can route to no queue, instead of dropping it.
    pub mandatory: bool,
}

impl Route {
    /// The mandatory flag of `basic.publish`. Never for a reply to a client that waits with direct reply-to: RabbitMQ 3.10 and
    /// 4.0 return it although the client gets it. 4.3 returns it only if the client is gone, and then nobody wants the reply.
    pub(super) fn mandatory(&self) -> bool {
        self.mandatory && !(self.exchange.is_empty() && self.routing_key.starts_with("amq.rabbitmq.reply-to."))
    }

    /// Why a message that went there would be returned.
    #[must_use]
    pub fn missing(&self) -> String {
        if self.exchange.is_empty() {
            format!(
                "there is no queue {:?} in this virtual host; create it (--declare --queue NAME), or check the name",
                self.routing_key
            )
        } else {
            format!(
                "no queue is bound to exchange {:?} for routing key {:?}; bind one, or use --no-mandatory if the exchange delays messages",
                self.exchange, self.routing_key
            )
        }
    }
}

/// The types of queue that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// What the virtual host makes of a queue whose type isn't named.
    Default,
    /// Replicated.
    Quorum,
    /// On one node.
    Classic,
}

impl QueueType {
    /// The arguments of `queue.declare` that ask for it.
    pub(super) fn arguments(self) -> FieldTable {
        let mut arguments = FieldTable::default();
        let name = match self {
            Self::Default => return arguments,
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        };
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(name.into()));
        arguments
    }
}

/// What every message carries, by AMQP's own names. Texts have 255 bytes at most, but for the values of headers.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "AMQP 0-9-1 has it")]
pub struct Properties {
    pub content_type: Option<String>,
    pub content_encoding: Option<String>,
    pub reply_to: Option<String>,
    pub message_id: Option<String>,
    pub correlation_id: Option<String>,
    pub kind: Option<String>,
    pub app_id: Option<String>,
    /// In milliseconds.
    pub expiration: Option<u32>,
    pub priority: Option<u8>,
    pub headers: BTreeMap<String, String>,
}

impl Properties {
    pub(super) fn into_amqp(self) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let texts: [(_, fn(_, _) -> _); 8] = [
            (self.content_type, BasicProperties::with_content_type),
            (self.content_encoding, BasicProperties::with_content_encoding),
            (self.reply_to, BasicProperties::with_reply_to),
            (self.message_id, BasicProperties::with_message_id),
            (self.correlation_id, BasicProperties::with_correlation_id),
            (self.kind, BasicProperties::with_type),
            (self.app_id, BasicProperties::with_app_id),
            (self.expiration.map(|time| time.to_string()), BasicProperties::with_expiration),
        ];
        for (value, with) in texts {
            if let Some(value) = value {
                properties = with(properties, ShortString::from(value));
            }
        }
        if let Some(priority) = self.priority {
            properties = properties.with_priority(priority);
        }
        if !self.headers.is_empty() {
            let mut table = FieldTable::default();
            for (name, value) in self.headers {
                table.insert(name.into(), AMQPValue::LongString(value.into()));
            }
            properties = properties.with_headers(table);
        }
        properties
    }
}
