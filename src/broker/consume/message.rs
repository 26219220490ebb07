//! A message as the worker sees it, and as the command's environment tells it.

use crate::command::Variable;
use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::ffi::OsStringExt,
};

/// A message that was delivered and not settled yet.
#[derive(Debug)]
pub struct Message {
    /// The body, byte for byte.
    pub body: Vec<u8>,
    /// The `message-id` property, for messages to people.
    pub id: Option<String>,
    /// Which attempt this is, the first being 1; `None` when the queue doesn't tell.
    pub attempt: Option<u64>,
    /// How many failures the queue has counted; `None` when the queue doesn't count.
    pub failures: Option<u64>,
    /// What the command is told.
    pub variables: Vec<Variable>,
}

/// Enough of a message to tell it from the next one in its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    id: Option<String>,
    size: usize,
    hash: u64,
}

/// How much of a body its fingerprint looks at, in bytes: a large one isn't read for it.
const FINGERPRINT: usize = 4096;

impl Fingerprint {
    pub(super) fn of(delivery: &Delivery) -> Self {
        let (size, mut hasher) = (delivery.data.len(), DefaultHasher::new());
        let (begin, end) =
            (&delivery.data[..size.min(FINGERPRINT)], &delivery.data[size.saturating_sub(FINGERPRINT)..]);
        (delivery.exchange.as_str(), delivery.routing_key.as_str(), begin, end).hash(&mut hasher);
        let id = delivery.properties.message_id().as_ref().map(ToString::to_string);
        Self { id, size, hash: hasher.finish() }
    }
}

impl Message {
    pub(in crate::broker) fn new(delivery: Delivery, queue: &str) -> Self {
        let headers = delivery.properties.headers().clone().unwrap_or_default();
        let (attempt, failures) = counts(&headers, delivery.redelivered);
        let id = delivery.properties.message_id().as_ref();
        Self {
            id: id.map(ToString::to_string),
            attempt,
            failures,
            variables: variables(&delivery, &headers, attempt, queue),
            body: delivery.data,
        }
    }
}

/// Which attempt this is, and how many failures the queue has counted.
///
/// Quorum queues set `x-delivery-count` from the second delivery on, those of RabbitMQ 4.3 and newer
/// `x-acquired-count` too, which rises with evictions as well. Classic queues only have the redelivered flag.
fn counts(headers: &FieldTable, redelivered: bool) -> (Option<u64>, Option<u64>) {
    if !redelivered {
        // A count on a first delivery is not this queue's: it was published along with a copied message, by a
        // shovel for example.
        return (Some(1), Some(0));
    }
    // It may have any of AMQP's integer types.
    let count = |name: &str| headers.inner().get(name).and_then(|n| json(n).as_u64());
    let (acquired, delivered) = (count("x-acquired-count"), count("x-delivery-count"));
    let attempt = acquired.or(delivered).map(|n| n.saturating_add(1));
    let failures = match acquired {
        // A queue that counts acquisitions counts deliveries too, and says nothing of zero; a count of more
        // failures than acquisitions is one that was published along.
        Some(acquired) => Some(delivered.filter(|n| *n <= acquired).unwrap_or(0)),
        None => delivered,
    };
    (attempt, failures)
}

/// Every variable is named, so that one inherited from outside never passes for the message's own.
fn variables(delivery: &Delivery, headers: &FieldTable, attempt: Option<u64>, queue: &str) -> Vec<Variable> {
    let message = &delivery.properties;
    let text = |value: &Option<ShortString>| Some(value.as_ref()?.as_str().into());
    let header = |name: &str| match headers.inner().get(name)? {
        AMQPValue::LongString(value) => Some(OsString::from_vec(value.as_bytes().to_vec())),
        AMQPValue::ShortString(value) => Some(value.as_str().into()),
        _ => None,
    };
    let number = |value: Option<u64>| Some(value?.to_string().into());
    let json = message.headers().as_ref().map(table);
    let list = [
        ("MESSAGE_ID", text(message.message_id())),
        ("MESSAGE_CORRELATION_ID", text(message.correlation_id())),
        ("MESSAGE_REPLY_TO", text(message.reply_to())),
        ("MESSAGE_TYPE", text(message.kind())),
        ("MESSAGE_APP_ID", text(message.app_id())),
        ("MESSAGE_USER_ID", text(message.user_id())),
        ("MESSAGE_CONTENT_TYPE", text(message.content_type())),
        ("MESSAGE_CONTENT_ENCODING", text(message.content_encoding())),
        ("MESSAGE_TIMESTAMP", number(*message.timestamp())),
        ("MESSAGE_PRIORITY", number(message.priority().map(u64::from))),
        ("MESSAGE_EXPIRATION", text(message.expiration())),
        ("MESSAGE_EXCHANGE", Some(delivery.exchange.as_str().into())),
        ("MESSAGE_ROUTING_KEY", Some(delivery.routing_key.as_str().into())),
        ("MESSAGE_QUEUE", Some(queue.into())),
        ("MESSAGE_REDELIVERED", Some(delivery.redelivered.to_string().into())),
        ("MESSAGE_ATTEMPT", number(attempt)),
        ("MESSAGE_HEADERS", json.map(|json| json.to_string().into())),
        // OpenTelemetry's environment carriers.
        ("TRACEPARENT", header("traceparent")),
        ("TRACESTATE", header("tracestate")),
        ("BAGGAGE", header("baggage")),
    ];
    let named = list.into_iter().map(|(name, value)| Variable { name, value });
    named.collect()
}

fn table(table: &FieldTable) -> Value {
    let members = table.inner().iter();
    let members = members.map(|(name, value)| (name.to_string(), json(value)));
    Value::Object(members.collect())
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
    let mut digits = format!("{value:0>width$}", width = scale + 1);
    if scale > 0 {
        digits.insert(digits.len() - scale, '.');
    }
    digits
}
