//! A message as the worker sees it, and the variables that describe it to the command.

use crate::{broker::reach::observed::Version, variable::Variable};
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

/// The `delivery-limit` of a quorum queue unless it is set, since RabbitMQ 4.0.
const DEFAULT_DELIVERY_LIMIT: u64 = 20;
const DEFAULT_DELIVERY_LIMIT_SINCE: Version = (4, 0);

#[derive(Debug)]
pub struct Message {
    pub body: Vec<u8>,
    pub id: Option<String>,
    /// `MESSAGE_ATTEMPT`: the number of this delivery, from 1; `None` if the queue doesn't tell.
    pub attempt: Option<u64>,
    /// Earlier failures: `Some(0)` for a first delivery from any queue, `None` for a redelivery from a queue that
    /// doesn't count.
    pub failures: Option<u64>,
    /// One more failure exceeds the `delivery-limit`, if this is a quorum queue with the default limit.
    pub at_default_delivery_limit: bool,
    pub variables: Vec<Variable>,
}

/// Tells a message from the next one in its queue, unless both have the same size, exchange, routing key and id (or no
/// id), and the same first and last [`HASHED`] bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    id: Option<String>,
    size: usize,
    hash: u64,
}

/// How many bytes of a body are hashed at its start and at its end, so that a large body isn't read whole.
const HASHED: usize = 4096;

impl Fingerprint {
    pub(super) fn of(delivery: &Delivery) -> Self {
        let (size, mut hasher) = (delivery.data.len(), DefaultHasher::new());
        let (begin, end) = (&delivery.data[..size.min(HASHED)], &delivery.data[size.saturating_sub(HASHED)..]);
        (delivery.exchange.as_str(), delivery.routing_key.as_str(), begin, end).hash(&mut hasher);
        let id = delivery.properties.message_id().as_ref().map(ToString::to_string);
        Self { id, size, hash: hasher.finish() }
    }
}

impl Message {
    pub(in crate::broker) fn new(delivery: Delivery, queue: &str, version: Option<Version>) -> Self {
        let headers = delivery.properties.headers().clone().unwrap_or_default();
        let (attempt, failures) = attempt_and_failures(&headers, delivery.redelivered);
        let id = delivery.properties.message_id().as_ref();
        Self {
            id: id.map(ToString::to_string),
            attempt,
            failures,
            at_default_delivery_limit: version >= Some(DEFAULT_DELIVERY_LIMIT_SINCE)
                && failures >= Some(DEFAULT_DELIVERY_LIMIT),
            variables: variables(&delivery, &headers, attempt, queue),
            body: delivery.data,
        }
    }
}

/// [`Message::attempt`] and [`Message::failures`]. From the second delivery on, quorum queues count failures in
/// `x-delivery-count`, and since RabbitMQ 4.3 all earlier deliveries in `x-acquired-count`. Classic queues count
/// nothing.
fn attempt_and_failures(headers: &FieldTable, redelivered: bool) -> (Option<u64>, Option<u64>) {
    if !redelivered {
        // A count on a first delivery was published with the message, for example by a shovel.
        return (Some(1), Some(0));
    }
    // A count may have any of AMQP's integer types.
    let count = |name: &str| headers.inner().get(name).and_then(|n| json(n).as_u64());
    let (acquired, delivered) = (count("x-acquired-count"), count("x-delivery-count"));
    let attempt = acquired.or(delivered).map(|n| n.saturating_add(1));
    let failures = match acquired {
        // x-delivery-count is missing if it is 0. One that exceeds x-acquired-count was published with the message.
        Some(acquired) => Some(delivered.filter(|n| *n <= acquired).unwrap_or(0)),
        None => delivered,
    };
    (attempt, failures)
}

/// Lists every variable, even without a value, so that one inherited from outside never passes for the message's own.
fn variables(delivery: &Delivery, headers: &FieldTable, attempt: Option<u64>, queue: &str) -> Vec<Variable> {
    let properties = &delivery.properties;
    let text = |value: &Option<ShortString>| Some(value.as_ref()?.as_str().into());
    let header = |name: &str| match headers.inner().get(name)? {
        AMQPValue::LongString(value) => Some(OsString::from_vec(value.as_bytes().to_vec())),
        AMQPValue::ShortString(value) => Some(value.as_str().into()),
        _ => None,
    };
    let number = |value: Option<u64>| Some(value?.to_string().into());
    let variables = [
        ("MESSAGE_ID", text(properties.message_id())),
        ("MESSAGE_CORRELATION_ID", text(properties.correlation_id())),
        ("MESSAGE_REPLY_TO", text(properties.reply_to())),
        ("MESSAGE_TYPE", text(properties.kind())),
        ("MESSAGE_APP_ID", text(properties.app_id())),
        ("MESSAGE_USER_ID", text(properties.user_id())),
        ("MESSAGE_CONTENT_TYPE", text(properties.content_type())),
        ("MESSAGE_CONTENT_ENCODING", text(properties.content_encoding())),
        ("MESSAGE_TIMESTAMP", properties.timestamp().map(|seconds| signed(seconds).to_string().into())),
        ("MESSAGE_PRIORITY", number(properties.priority().map(u64::from))),
        ("MESSAGE_EXPIRATION", text(properties.expiration())),
        ("MESSAGE_EXCHANGE", Some(delivery.exchange.as_str().into())),
        ("MESSAGE_ROUTING_KEY", Some(delivery.routing_key.as_str().into())),
        ("MESSAGE_QUEUE", Some(queue.into())),
        ("MESSAGE_REDELIVERED", Some(delivery.redelivered.to_string().into())),
        ("MESSAGE_ATTEMPT", number(attempt)),
        ("MESSAGE_HEADERS", properties.headers().as_ref().map(|headers| table(headers).to_string().into())),
        // OpenTelemetry's environment carriers.
        ("TRACEPARENT", header("traceparent")),
        ("TRACESTATE", header("tracestate")),
        ("BAGGAGE", header("baggage")),
    ];
    variables.into_iter().map(|(name, value)| Variable { name, value }).collect()
}

fn table(table: &FieldTable) -> Value {
    Value::Object(table.inner().iter().map(|(name, value)| (name.to_string(), json(value))).collect())
}

/// JSON has no bytes, no decimals and no times: they become text, exact text and seconds.
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
        AMQPValue::Timestamp(value) => json!(signed(*value)),
        AMQPValue::FieldTable(value) => table(value),
        AMQPValue::ByteArray(value) => json!(String::from_utf8_lossy(value.as_slice())),
        AMQPValue::Void => Value::Null,
    }
}

/// Seconds since 1970. AMQP 0-9-1 says unsigned, but clients pack earlier times as negative numbers.
fn signed(seconds: u64) -> i64 {
    seconds.cast_signed()
}

/// Exact text: `scale` digits follow the point. AMQP 0-9-1 says unsigned, but clients pack negative ones.
fn decimal(value: u32, scale: u8) -> String {
    let (value, scale) = (value.cast_signed(), usize::from(scale));
    let mut text = format!("{:0>width$}", value.unsigned_abs(), width = scale + 1);
    if scale > 0 {
        text.insert(text.len() - scale, '.');
    }
    if value < 0 {
        text.insert(0, '-');
    }
    text
}
