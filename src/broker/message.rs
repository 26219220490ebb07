//! A message as the worker sees it, and as the command's environment tells it.

use crate::command::Variable;
use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable},
};
use serde_json::{Map, Value, json};
use std::{ffi::OsString, os::unix::ffi::OsStringExt};

/// A message that was delivered and not settled yet.
#[derive(Debug)]
pub struct Message {
    /// The body, byte for byte.
    pub body: Vec<u8>,
    /// The `message-id` property, for messages to people.
    pub id: Option<String>,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// Which attempt this is, the first being 1; `None` when the queue doesn't tell.
    pub attempt: Option<u64>,
    /// How many failures the queue has counted; `None` when the queue doesn't count.
    pub failures: Option<u64>,
    /// What the command is told.
    pub variables: Vec<Variable>,
}

impl Message {
    pub(super) fn new(delivery: Delivery, queue: &str) -> Self {
        let headers = delivery.properties.headers().clone().unwrap_or_default();
        let counts = Counts::new(&headers, delivery.redelivered);
        let variables = variables(&delivery, &headers, &counts, queue);
        Self {
            id: delivery
                .properties
                .message_id()
                .as_ref()
                .map(|id| id.to_string()),
            redelivered: delivery.redelivered,
            attempt: counts.attempt,
            failures: counts.failures,
            variables,
            body: delivery.data,
        }
    }
}

/// What the queue has counted.
///
/// Quorum queues set `x-delivery-count` from the second delivery on, those of RabbitMQ 4.3 and newer
/// `x-acquired-count` too, which rises with evictions as well. Classic queues only have the redelivered flag.
struct Counts {
    attempt: Option<u64>,
    failures: Option<u64>,
}

impl Counts {
    fn new(headers: &FieldTable, redelivered: bool) -> Self {
        if !redelivered {
            // A count on a first delivery is not this queue's: it was published along with a copied message, by a
            // shovel for example.
            return Self {
                attempt: Some(1),
                failures: Some(0),
            };
        }
        let count = |name: &str| headers.inner().get(name).and_then(integer);
        let (acquired, delivered) = (count("x-acquired-count"), count("x-delivery-count"));
        Self {
            attempt: acquired.or(delivered).map(|n| n.saturating_add(1)),
            failures: match acquired {
                // A queue that counts acquisitions counts deliveries too, and says nothing of zero; a count of more
                // failures than acquisitions is one that was published along.
                Some(acquired) => Some(delivered.filter(|n| *n <= acquired).unwrap_or(0)),
                None => delivered,
            },
        }
    }
}

/// A count may have any of AMQP's integer types.
fn integer(value: &AMQPValue) -> Option<u64> {
    match *value {
        AMQPValue::ShortShortInt(n) => u64::try_from(n).ok(),
        AMQPValue::ShortShortUInt(n) => Some(n.into()),
        AMQPValue::ShortInt(n) => u64::try_from(n).ok(),
        AMQPValue::ShortUInt(n) => Some(n.into()),
        AMQPValue::LongInt(n) => u64::try_from(n).ok(),
        AMQPValue::LongUInt(n) => Some(n.into()),
        AMQPValue::LongLongInt(n) => u64::try_from(n).ok(),
        AMQPValue::Timestamp(n) => Some(n),
        _ => None,
    }
}

/// Every variable is named, so that one inherited from outside never passes for the message's own.
fn variables(
    delivery: &Delivery,
    headers: &FieldTable,
    counts: &Counts,
    queue: &str,
) -> Vec<Variable> {
    let properties = &delivery.properties;
    let text = |value: &Option<lapin::types::ShortString>| {
        value.as_ref().map(|value| OsString::from(value.as_str()))
    };
    let header = |name: &str| match headers.inner().get(name) {
        Some(AMQPValue::LongString(value)) => Some(OsString::from_vec(value.as_bytes().to_vec())),
        Some(AMQPValue::ShortString(value)) => Some(OsString::from(value.as_str())),
        _ => None,
    };
    let number = |value: Option<u64>| value.map(|value| OsString::from(value.to_string()));
    let list = [
        ("MESSAGE_ID", text(properties.message_id())),
        ("MESSAGE_CORRELATION_ID", text(properties.correlation_id())),
        ("MESSAGE_REPLY_TO", text(properties.reply_to())),
        ("MESSAGE_TYPE", text(properties.kind())),
        ("MESSAGE_APP_ID", text(properties.app_id())),
        ("MESSAGE_USER_ID", text(properties.user_id())),
        ("MESSAGE_CONTENT_TYPE", text(properties.content_type())),
        (
            "MESSAGE_CONTENT_ENCODING",
            text(properties.content_encoding()),
        ),
        ("MESSAGE_TIMESTAMP", number(*properties.timestamp())),
        (
            "MESSAGE_PRIORITY",
            number(properties.priority().map(u64::from)),
        ),
        ("MESSAGE_EXPIRATION", text(properties.expiration())),
        ("MESSAGE_EXCHANGE", text(&Some(delivery.exchange.clone()))),
        (
            "MESSAGE_ROUTING_KEY",
            text(&Some(delivery.routing_key.clone())),
        ),
        ("MESSAGE_QUEUE", Some(queue.into())),
        (
            "MESSAGE_REDELIVERED",
            Some(delivery.redelivered.to_string().into()),
        ),
        ("MESSAGE_ATTEMPT", number(counts.attempt)),
        (
            "MESSAGE_HEADERS",
            properties
                .headers()
                .as_ref()
                .map(|headers| table(headers).to_string().into()),
        ),
        // OpenTelemetry's environment carriers.
        ("TRACEPARENT", header("traceparent")),
        ("TRACESTATE", header("tracestate")),
        ("BAGGAGE", header("baggage")),
    ];
    list.into_iter()
        .map(|(name, value)| Variable { name, value })
        .collect()
}

fn table(table: &FieldTable) -> Value {
    let members: Map<String, Value> = table
        .inner()
        .iter()
        .map(|(name, value)| (name.to_string(), json(value)))
        .collect();
    Value::Object(members)
}

/// JSON has no bytes, no decimals and no times: text, exact text and seconds stand for them.
fn json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(value) => json!(value),
        AMQPValue::ShortShortInt(value) => json!(value),
        AMQPValue::ShortShortUInt(value) => json!(value),
        AMQPValue::ShortInt(value) => json!(value),
        AMQPValue::ShortUInt(value) => json!(value),
        AMQPValue::LongInt(value) => json!(value),
        AMQPValue::LongUInt(value) => json!(value),
        AMQPValue::LongLongInt(value) => json!(value),
        AMQPValue::Float(value) => json!(value),
        AMQPValue::Double(value) => json!(value),
        AMQPValue::DecimalValue(value) => json!(decimal(value.value, value.scale)),
        AMQPValue::ShortString(value) => json!(value.as_str()),
        AMQPValue::LongString(value) => json!(String::from_utf8_lossy(value.as_bytes())),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(json).collect(),
        AMQPValue::Timestamp(value) => json!(value),
        AMQPValue::FieldTable(value) => table(value),
        AMQPValue::ByteArray(value) => json!(String::from_utf8_lossy(value.as_slice())),
        AMQPValue::Void => Value::Null,
    }
}

/// A decimal as AMQP has it, an integer and the number of its digits behind the point, as exact text.
fn decimal(value: u32, scale: u8) -> String {
    let scale = usize::from(scale);
    if scale == 0 {
        return value.to_string();
    }
    let digits = format!("{value:0>width$}", width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    format!("{whole}.{fraction}")
}
