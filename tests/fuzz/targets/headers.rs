//! Properties and headers of a message, from the frame on the wire to the command's environment.
//!
//! - The result doesn't depend on the sizes of the pieces in which the bytes arrive.
//! - A message has the properties that this target's encoder encoded; `MESSAGE_HEADERS` is JSON of the same headers.
//! - Headers that are nested more than 100 deep are refused; others are read.
//! - In the environment only the documented names change; none has a value that was inherited or is too long.

#![no_main]

#[path = "headers/field.rs"]
mod field;

use arbitrary::{Arbitrary, Unstructured};
use field::{Field, Name, Table};
use libfuzzer_sys::fuzz_target;
use qconsume::{
    broker::Message,
    fuzzing::{Delivered, environment, message},
};
use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    num::NonZeroUsize,
};

/// The variables of the text properties, each with the property's bit in the flags.
const TEXTS: [(&str, u16); 9] = [
    ("MESSAGE_CONTENT_TYPE", 15),
    ("MESSAGE_CONTENT_ENCODING", 14),
    ("MESSAGE_CORRELATION_ID", 10),
    ("MESSAGE_REPLY_TO", 9),
    ("MESSAGE_EXPIRATION", 8),
    ("MESSAGE_ID", 7),
    ("MESSAGE_TYPE", 5),
    ("MESSAGE_USER_ID", 4),
    ("MESSAGE_APP_ID", 3),
];
const HEADERS: u16 = 13;
const PRIORITY: u16 = 11;
const TIMESTAMP: u16 = 6;

/// The documented names: docs/how-it-works.md.
#[rustfmt::skip]
const NAMES: [&str; 20] = [
    "MESSAGE_ID", "MESSAGE_CORRELATION_ID", "MESSAGE_REPLY_TO", "MESSAGE_TYPE", "MESSAGE_APP_ID", "MESSAGE_USER_ID",
    "MESSAGE_CONTENT_TYPE", "MESSAGE_CONTENT_ENCODING", "MESSAGE_TIMESTAMP", "MESSAGE_PRIORITY", "MESSAGE_EXPIRATION",
    "MESSAGE_EXCHANGE", "MESSAGE_ROUTING_KEY", "MESSAGE_QUEUE", "MESSAGE_REDELIVERED", "MESSAGE_ATTEMPT", "MESSAGE_HEADERS",
    "TRACEPARENT", "TRACESTATE", "BAGGAGE",
];

/// The longest `NAME=value` with its NUL that Linux takes, in bytes.
const VARIABLE_MAX: usize = 128 << 10;

const NESTING_MAX: usize = 100;

#[derive(Arbitrary, Debug)]
struct Properties {
    texts: [Option<Name>; 9],
    headers: Option<Table>,
    priority: Option<u8>,
    timestamp: Option<u64>,
    redelivered: bool,
    exchange: Name,
    routing_key: Name,
    piece: u8,
    /// How many more levels the headers are nested.
    deeper: u8,
}

fuzz_target!(
    init: {
        // An inherited value must not be taken for the message's.
        for name in NAMES {
            // SAFETY: nothing else runs yet.
            unsafe { env::set_var(name, "inherited") };
        }
    },
    |data: &[u8]| {
        let Some((kind, data)) = data.split_first() else {
            return;
        };
        if kind % 2 == 0 {
            check_any(data);
        } else if let Ok(properties) = Properties::arbitrary_take_rest(Unstructured::new(data)) {
            check(properties);
        }
    }
);

/// Checks arbitrary bytes as properties.
fn check_any(properties: &[u8]) {
    let delivered = Delivered { exchange: b"", routing_key: b"q", redelivered: properties.len() % 2 == 1, properties };
    let [whole, bytes] = [usize::MAX, 1].map(|piece| {
        let piece = NonZeroUsize::new(piece).expect("the size isn't zero");
        message(delivered, piece, "q").map_err(|error| error.to_string())
    });
    assert_eq!(format!("{whole:?}"), format!("{bytes:?}"));
    if let Ok(message) = whole {
        check_environment(&message);
        if let Some(headers) = variable(&message, "MESSAGE_HEADERS") {
            let headers: serde_json::Value = serde_json::from_slice(headers).expect("MESSAGE_HEADERS is JSON");
            assert!(headers.is_object());
        }
    }
}

/// Checks well-formed properties.
fn check(mut properties: Properties) {
    if let Some(headers) = properties.headers.take() {
        let nest = |table, _| Table(vec![(Name::Text("n".to_owned()), Field::Table(table))]);
        properties.headers = Some((0..properties.deeper % 128).fold(headers, nest));
    }
    let (exchange, routing_key) = (properties.exchange.text(), properties.routing_key.text());
    let encoded = encode(&properties);
    let delivered = Delivered {
        exchange: exchange.as_bytes(),
        routing_key: routing_key.as_bytes(),
        redelivered: properties.redelivered,
        properties: &encoded,
    };
    let piece = NonZeroUsize::new(properties.piece.into()).unwrap_or(NonZeroUsize::MAX);
    let depth = properties.headers.as_ref().map_or(0, Table::depth);
    let message = match message(delivered, piece, "q") {
        Ok(message) => message,
        Err(error) => {
            // The guard counts bytes that look like a table or an array, those in texts included.
            let bytes = encoded.iter().chain(exchange.as_bytes()).chain(routing_key.as_bytes());
            let tables = bytes.filter(|byte| b"AF".contains(byte)).count();
            let too_large = encoded.len() + 12 > 128 << 10;
            let nested = tables > NESTING_MAX && error.to_string().contains("nested");
            assert!(nested || too_large, "{error}: {properties:?}");
            return;
        }
    };
    // The table of all headers is the first level.
    assert!(depth <= 1 + NESTING_MAX, "{depth} deep");

    check_environment(&message);
    for ((name, _), expected) in TEXTS.iter().zip(&properties.texts) {
        let expected = expected.as_ref().map(Name::text);
        assert_eq!(variable(&message, name), expected.map(str::as_bytes), "{name}");
    }
    let number = |value: Option<u64>| value.map(|value| value.to_string().into_bytes());
    let headers = properties.headers.as_ref();
    let traced = |name| match headers.and_then(|headers| headers.get(name)) {
        Some(Field::Text(text)) => Some(text.bytes()),
        _ => None,
    };
    for (name, expected) in [
        ("MESSAGE_PRIORITY", number(properties.priority.map(u64::from))),
        ("MESSAGE_TIMESTAMP", properties.timestamp.map(|seconds| seconds.cast_signed().to_string().into_bytes())),
        ("MESSAGE_ATTEMPT", number(attempt(&properties))),
        ("MESSAGE_QUEUE", Some(b"q".to_vec())),
        ("MESSAGE_EXCHANGE", Some(exchange.as_bytes().to_vec())),
        ("MESSAGE_ROUTING_KEY", Some(routing_key.as_bytes().to_vec())),
        ("MESSAGE_REDELIVERED", Some(properties.redelivered.to_string().into_bytes())),
        ("TRACEPARENT", traced("traceparent")),
        ("TRACESTATE", traced("tracestate")),
        ("BAGGAGE", traced("baggage")),
    ] {
        assert_eq!(variable(&message, name), expected.as_deref(), "{name}");
    }
    match (variable(&message, "MESSAGE_HEADERS"), headers) {
        (None, None) => {}
        (Some(found), Some(headers)) => {
            let found = serde_json::from_slice(found).expect("MESSAGE_HEADERS is JSON");
            assert!(headers.is(&found), "{found} of {headers:?}");
        }
        (found, headers) => panic!("{found:?} of {headers:?}"),
    }
}

/// The attempt's number, as docs/how-it-works.md defines it.
fn attempt(properties: &Properties) -> Option<u64> {
    if !properties.redelivered {
        return Some(1);
    }
    let headers = properties.headers.as_ref()?;
    let count = |name| headers.get(name)?.count();
    let count = count("x-acquired-count").or_else(|| count("x-delivery-count"))?;
    Some(count.saturating_add(1))
}

fn variable<'a>(message: &'a Message, name: &str) -> Option<&'a [u8]> {
    let variable = message.variables.iter().find(|variable| variable.name == name)?;
    variable.value.as_ref().map(|value| value.as_encoded_bytes())
}

/// Checks that the documented variables have the message's values, or are unset, and that no other variable changed.
fn check_environment(message: &Message) {
    let mut found = environment(&message.variables);
    for (name, value) in &found {
        // Plus the equals sign and the NUL at the end.
        assert!(name.len() + value.len() + 2 <= VARIABLE_MAX);
        assert!(!value.as_encoded_bytes().contains(&0));
    }
    for name in NAMES {
        let fits = |value: &&[u8]| !value.contains(&0) && name.len() + value.len() + 2 <= VARIABLE_MAX;
        let expected = variable(message, name).filter(fits);
        let value = found.remove(OsStr::new(name)).map(OsString::into_encoded_bytes);
        assert_eq!(value.as_deref(), expected, "{name}");
    }
    assert_eq!(found.remove(OsStr::new("QCONSUME_TERMINATION_LOG")), Some(OsString::new()));
    for (name, value) in env::vars_os() {
        if !NAMES.iter().any(|known| name == *known) {
            assert_eq!(found.remove(&name), Some(value));
        }
    }
    assert!(found.is_empty(), "{found:?}");
}

/// Encodes the properties for AMQP 0-9-1: the flags, then the properties whose flags are set, in the flags' order.
fn encode(properties: &Properties) -> Vec<u8> {
    let mut parts = BTreeMap::new();
    for ((_, bit), text) in TEXTS.iter().zip(&properties.texts) {
        if let Some(text) = text {
            parts.insert(*bit, text.encoded());
        }
    }
    if let Some(headers) = &properties.headers {
        parts.insert(HEADERS, headers.encoded());
    }
    if let Some(priority) = properties.priority {
        parts.insert(PRIORITY, vec![priority]);
    }
    if let Some(timestamp) = properties.timestamp {
        parts.insert(TIMESTAMP, timestamp.to_be_bytes().to_vec());
    }
    let flags = parts.keys().fold(0, |flags, bit| flags | 1_u16 << bit);
    let mut encoded = flags.to_be_bytes().to_vec();
    encoded.extend(parts.into_values().rev().flatten());
    encoded
}
