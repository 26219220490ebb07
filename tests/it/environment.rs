//! The command's environment: the message's properties and headers, and nothing else of the message.

use crate::common::worker;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use testbed::{
    BasicProperties, Broker, Finished, Program, Queue, QueueKind,
    types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable, LongString},
};

/// The variables that a message sets, or that are unset; they are never inherited.
const VARIABLES: [&str; 20] = [
    "MESSAGE_ID",
    "MESSAGE_CORRELATION_ID",
    "MESSAGE_REPLY_TO",
    "MESSAGE_TYPE",
    "MESSAGE_APP_ID",
    "MESSAGE_USER_ID",
    "MESSAGE_CONTENT_TYPE",
    "MESSAGE_CONTENT_ENCODING",
    "MESSAGE_TIMESTAMP",
    "MESSAGE_PRIORITY",
    "MESSAGE_EXPIRATION",
    "MESSAGE_EXCHANGE",
    "MESSAGE_ROUTING_KEY",
    "MESSAGE_QUEUE",
    "MESSAGE_REDELIVERED",
    "MESSAGE_ATTEMPT",
    "MESSAGE_HEADERS",
    "TRACEPARENT",
    "TRACESTATE",
    "BAGGAGE",
];

type Environment = BTreeMap<String, Vec<u8>>;

/// Runs a command that prints its environment, and parses it.
fn run(program: Program) -> (Environment, Finished) {
    let run = program.args(["--", "env", "-0"]).run();
    run.assert_status(0);
    let environment = run
        .stdout
        .split(|byte| *byte == 0)
        .filter(|variable| !variable.is_empty())
        .map(|variable| {
            let equals = variable.iter().position(|byte| *byte == b'=');
            let (name, value) = variable.split_at(equals.expect("every variable has a value"));
            (String::from_utf8_lossy(name).into_owned(), value[1..].to_vec())
        })
        .collect();
    (environment, run)
}

fn environment_of(queue: &Queue) -> Environment {
    run(worker(queue)).0
}

fn message_variables(environment: &Environment) -> BTreeMap<&str, String> {
    environment
        .iter()
        .filter(|(name, _)| name.starts_with("MESSAGE_") || VARIABLES.contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value).into_owned()))
        .collect()
}

fn headers(environment: &Environment) -> Value {
    serde_json::from_slice(&environment["MESSAGE_HEADERS"]).expect("MESSAGE_HEADERS is JSON")
}

fn with_headers(entries: Vec<(&str, AMQPValue)>) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    BasicProperties::default().with_headers(table)
}

fn long(bytes: impl Into<Vec<u8>>) -> AMQPValue {
    AMQPValue::LongString(LongString::from(bytes.into()))
}

#[test]
fn every_property_that_is_set_is_a_variable() {
    for kind in QueueKind::ALL {
        let queue = Broker::shared().declare("environment-all").kind(kind).create();
        let properties = BasicProperties::default()
            .with_message_id("id".into())
            .with_correlation_id("correlation".into())
            .with_reply_to("reply".into())
            .with_type("type".into())
            .with_app_id("app".into())
            .with_user_id("guest".into())
            .with_content_type("text/plain".into())
            .with_content_encoding("gzip".into())
            .with_timestamp(1_700_000_000)
            .with_priority(3)
            .with_expiration("600000".into());
        queue.publish_with(properties, "");
        let environment = environment_of(&queue);
        let variables = message_variables(&environment);
        let expected = [
            ("MESSAGE_ID", "id"),
            ("MESSAGE_CORRELATION_ID", "correlation"),
            ("MESSAGE_REPLY_TO", "reply"),
            ("MESSAGE_TYPE", "type"),
            ("MESSAGE_APP_ID", "app"),
            ("MESSAGE_USER_ID", "guest"),
            ("MESSAGE_CONTENT_TYPE", "text/plain"),
            ("MESSAGE_CONTENT_ENCODING", "gzip"),
            ("MESSAGE_TIMESTAMP", "1700000000"),
            ("MESSAGE_PRIORITY", "3"),
            ("MESSAGE_EXPIRATION", "600000"),
            ("MESSAGE_EXCHANGE", ""),
            ("MESSAGE_ROUTING_KEY", queue.name()),
            ("MESSAGE_QUEUE", queue.name()),
            ("MESSAGE_REDELIVERED", "false"),
            ("MESSAGE_ATTEMPT", "1"),
        ];
        let expected: BTreeMap<_, _> = expected.map(|(name, value)| (name, value.to_owned())).into();
        let mut variables = variables;
        // Some brokers add an empty table of headers.
        variables.remove("MESSAGE_HEADERS");
        assert_eq!(variables, expected, "{kind:?}");
    }
}

#[test]
fn properties_that_are_not_set_are_no_variables_not_even_inherited_ones() {
    let queue = Broker::shared().queue("environment-inherited");
    queue.publish("");
    let mut program = worker(&queue).env("MINE", "kept");
    for name in VARIABLES {
        program = program.env(name, "inherited");
    }
    let (environment, _) = run(program);
    let mut variables = message_variables(&environment);
    // The testbed's client sends no headers; some brokers add an empty table.
    if variables.get("MESSAGE_HEADERS").is_some_and(|table| table == "{}") {
        variables.remove("MESSAGE_HEADERS");
    }
    let names: Vec<_> = variables.keys().copied().collect();
    assert_eq!(
        names,
        ["MESSAGE_ATTEMPT", "MESSAGE_EXCHANGE", "MESSAGE_QUEUE", "MESSAGE_REDELIVERED", "MESSAGE_ROUTING_KEY"]
    );
    assert!(variables.values().all(|value| value != "inherited"));
    assert_eq!(environment["MINE"], b"kept");
}

#[test]
fn a_time_before_1970_is_negative() {
    let queue = Broker::shared().queue("environment-1969");
    let moon_landing = (-14_256_000_i64).cast_unsigned();
    queue.publish_with(BasicProperties::default().with_timestamp(moon_landing), "");
    let environment = environment_of(&queue);
    assert_eq!(message_variables(&environment)["MESSAGE_TIMESTAMP"], "-14256000");
}

#[test]
fn an_empty_property_is_an_empty_variable() {
    let queue = Broker::shared().queue("environment-empty");
    let properties = BasicProperties::default()
        .with_message_id("".into())
        .with_type("".into())
        .with_priority(0)
        .with_timestamp(0)
        .with_headers(FieldTable::default());
    queue.publish_with(properties, "");
    let environment = environment_of(&queue);
    let variables = message_variables(&environment);
    assert_eq!(variables["MESSAGE_ID"], "");
    assert_eq!(variables["MESSAGE_TYPE"], "");
    assert_eq!(variables["MESSAGE_PRIORITY"], "0");
    assert_eq!(variables["MESSAGE_TIMESTAMP"], "0");
    assert_eq!(variables["MESSAGE_HEADERS"], "{}");
    assert!(!variables.contains_key("MESSAGE_CORRELATION_ID"));
}

#[test]
fn a_redelivered_message_says_so_and_has_an_attempt_if_the_queue_counts() {
    for (kind, attempt) in [(QueueKind::Classic, None), (QueueKind::Quorum, Some("2"))] {
        let queue = Broker::shared().declare("environment-again").kind(kind).create();
        queue.publish("");
        worker(&queue).shell("exit 1").run().assert_status(1);
        let environment = environment_of(&queue);
        let variables = message_variables(&environment);
        assert_eq!(variables["MESSAGE_REDELIVERED"], "true");
        assert_eq!(variables.get("MESSAGE_ATTEMPT").map(String::as_str), attempt, "{kind:?}");
    }
}

#[test]
fn counts_that_were_published_with_the_message_are_not_this_queues() {
    // A shovel copies these headers from the queue where the message failed.
    let copied = || {
        let count = || AMQPValue::LongLongInt(7);
        with_headers(vec![("x-acquired-count", count()), ("x-delivery-count", count())])
    };
    for kind in QueueKind::ALL {
        let queue = Broker::shared().declare("environment-copied").kind(kind).create();
        queue.publish_with(copied(), "");
        let environment = environment_of(&queue);
        assert_eq!(message_variables(&environment)["MESSAGE_ATTEMPT"], "1");
    }
}

#[test]
fn every_type_of_header_is_in_the_json() {
    let mut inner = FieldTable::default();
    inner.insert("deep".into(), AMQPValue::LongInt(-1));
    let queue = Broker::shared().queue("environment-types");
    let list: Vec<AMQPValue> = vec![AMQPValue::Boolean(false), long("x"), AMQPValue::Void];
    queue.publish_with(
        with_headers(vec![
            ("boolean", AMQPValue::Boolean(true)),
            ("int8", AMQPValue::ShortShortInt(-8)),
            ("uint8", AMQPValue::ShortShortUInt(200)),
            ("int16", AMQPValue::ShortInt(-16000)),
            ("uint16", AMQPValue::ShortUInt(65000)),
            ("int32", AMQPValue::LongInt(-2_000_000_000)),
            ("uint32", AMQPValue::LongUInt(4_000_000_000)),
            ("int64", AMQPValue::LongLongInt(i64::MIN)),
            ("float", AMQPValue::Float(1.5)),
            ("double", AMQPValue::Double(-0.1)),
            ("decimal", AMQPValue::DecimalValue(DecimalValue { scale: 4, value: 12345 })),
            ("negative", AMQPValue::DecimalValue(DecimalValue { scale: 2, value: (-51_i32).cast_unsigned() })),
            ("string", long("grüße \"quoted\"\n")),
            ("empty", long("")),
            ("not-utf8", long(vec![b'a', 0xff, b'b'])),
            ("list", AMQPValue::FieldArray(FieldArray::from(list))),
            ("time", AMQPValue::Timestamp(1_700_000_000)),
            ("before-1970", AMQPValue::Timestamp((-14_256_000_i64).cast_unsigned())),
            ("table", AMQPValue::FieldTable(inner)),
            ("bytes", AMQPValue::ByteArray(ByteArray::from(vec![b'h', b'i', 0xfe]))),
            ("void", AMQPValue::Void),
        ]),
        "",
    );
    assert_eq!(
        headers(&environment_of(&queue)),
        json!({
            "boolean": true,
            "int8": -8,
            "uint8": 200,
            "int16": -16000,
            "uint16": 65000,
            "int32": -2_000_000_000,
            "uint32": 4_000_000_000_u32,
            "int64": i64::MIN,
            "float": 1.5,
            "double": -0.1,
            "decimal": "1.2345",
            "negative": "-0.51",
            "string": "grüße \"quoted\"\n",
            "empty": "",
            "not-utf8": "a\u{fffd}b",
            "list": [false, "x", null],
            "time": 1_700_000_000,
            "before-1970": -14_256_000,
            "table": {"deep": -1},
            "bytes": "hi\u{fffd}",
            "void": null,
        })
    );
}

#[test]
fn the_trace_context_of_the_headers_is_the_commands() {
    let queue = Broker::shared().queue("environment-trace");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    queue.publish_with(
        with_headers(vec![
            ("traceparent", long(parent)),
            ("tracestate", long(vec![b'v', b'=', 0xff])),
            ("baggage", long("")),
        ]),
        "",
    );
    let environment = environment_of(&queue);
    assert_eq!(environment["TRACEPARENT"], parent.as_bytes());
    assert_eq!(environment["TRACESTATE"], [b'v', b'=', 0xff], "the bytes are unchanged");
    assert_eq!(environment["BAGGAGE"], b"");

    // Only text can be a trace context, and only under its own name.
    queue.publish_with(with_headers(vec![("traceparent", AMQPValue::LongInt(1)), ("TRACESTATE", long("other"))]), "");
    let (environment, _) = run(worker(&queue).env("TRACEPARENT", "inherited").env("TRACESTATE", "inherited"));
    assert!(!environment.contains_key("TRACEPARENT"));
    assert!(!environment.contains_key("TRACESTATE"));
}

#[test]
fn no_other_header_becomes_a_variable() {
    let queue = Broker::shared().queue("environment-hostile");
    let names = ["LD_PRELOAD", "PATH", "IFS", "BASH_ENV", "MESSAGE_ID", "MESSAGE_ID\n", "A=B", ""];
    let entries = names.iter().map(|name| (*name, long("/hostile"))).collect();
    queue.publish_with(with_headers(entries), "");
    let (environment, run) = run(worker(&queue));
    let table = headers(&environment);
    for name in names {
        assert_eq!(table[name], "/hostile");
        assert_ne!(environment.get(name).map(Vec::as_slice), Some(&b"/hostile"[..]), "{name}");
    }
    assert!(!environment.contains_key("LD_PRELOAD"));
    assert!(!environment.contains_key("A"));
    assert!(!run.stderr.contains("warning"), "{}", run.stderr);
}

#[test]
fn a_value_with_a_newline_stays_one_value() {
    let queue = Broker::shared().queue("environment-newline");
    let properties =
        with_headers(vec![("baggage", long("a=1\nLD_PRELOAD=/hostile"))]).with_message_id("x\nPATH=/hostile".into());
    queue.publish_with(properties, "");
    let environment = environment_of(&queue);
    assert_eq!(environment["MESSAGE_ID"], b"x\nPATH=/hostile");
    assert_eq!(environment["BAGGAGE"], b"a=1\nLD_PRELOAD=/hostile");
    assert!(!environment.contains_key("LD_PRELOAD"));
}

#[test]
fn what_cannot_be_a_variable_is_left_out_with_a_warning_and_the_command_runs() {
    let queue = Broker::shared().queue("environment-nul");
    let properties = with_headers(vec![("traceparent", long("a\0b"))]).with_message_id("x\0y".into());
    queue.publish_with(properties, "");
    let (environment, finished) = run(worker(&queue).env("MESSAGE_ID", "inherited").env("TRACEPARENT", "inherited"));
    for name in ["MESSAGE_ID", "TRACEPARENT"] {
        assert!(!environment.contains_key(name));
        finished.assert_stderr(&format!("warning: {name} is left out"));
    }
    // In JSON a NUL is escaped, so the variable is valid.
    assert_eq!(headers(&environment)["traceparent"], "a\0b");
}

#[test]
fn a_variable_of_128_kib_is_set_and_a_longer_one_is_left_out() {
    let queue = Broker::shared().queue("environment-huge");
    // Almost as much as fits into one frame; in JSON it is larger, as each of these bytes becomes six characters.
    let huge = vec![1; 120_000];
    queue.publish_with(with_headers(vec![("baggage", long(huge.clone()))]), "");
    let (environment, finished) = run(worker(&queue).env("MESSAGE_HEADERS", "inherited"));
    assert_eq!(environment["BAGGAGE"], huge);
    assert!(!environment.contains_key("MESSAGE_HEADERS"));
    finished.assert_stderr("warning: MESSAGE_HEADERS is left out");

    // With the name, the equals sign and the final NUL it is exactly as long as the kernel allows.
    let longest = 128 * 1024 - "MESSAGE_HEADERS=".len() - 1 - "{\"x\":\"\"}".len();
    let mut text = vec![b'a'; longest - 6 * 10_000];
    text.extend(vec![1; 10_000]);
    queue.publish_with(with_headers(vec![("x", long(text.clone()))]), "");
    let (environment, finished) = run(worker(&queue));
    assert_eq!(environment["MESSAGE_HEADERS"].len(), 128 * 1024 - "MESSAGE_HEADERS=".len() - 1);
    assert!(!finished.stderr.contains("left out"), "{}", finished.stderr);
    text.push(b'a');
    queue.publish_with(with_headers(vec![("x", long(text))]), "");
    let (environment, finished) = run(worker(&queue));
    assert!(!environment.contains_key("MESSAGE_HEADERS"));
    finished.assert_stderr("warning: MESSAGE_HEADERS is left out");
}

#[test]
fn with_count_each_message_has_an_environment_of_its_own() {
    let queue = Broker::shared().queue("environment-next");
    queue.publish_with(with_headers(vec![("traceparent", long("first"))]).with_message_id("one".into()), "");
    queue.publish("");
    let run = worker(&queue).args(["--count", "2"]).shell("echo \"${MESSAGE_ID-none} ${TRACEPARENT-none}\"").run();
    run.assert_status(0);
    assert_eq!(run.stdout_text(), "one first\nnone none\n");
}
