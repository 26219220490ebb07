//! The broker's texts, with names in them that contain each other's phrases.

use super::*;

fn meaning(code: u16, text: &str) -> Meaning {
    Refusal { code, text: text.to_owned() }.meaning()
}

#[test]
fn texts_of_rabbitmq_and_lavinmq() {
    for (code, text, expected) in [
        // RabbitMQ 3.10 to 4.3
        (530, "NOT_ALLOWED - vhost nowhere not found", Meaning::Missing),
        (530, "NOT_ALLOWED - access to vhost 'limits' refused for user 'guest'", Meaning::NotPermitted),
        (
            530,
            "NOT_ALLOWED - access to vhost '/' refused for user 'guest': connection limit (0) is reached",
            Meaning::Limit,
        ),
        (
            530,
            "NOT_ALLOWED - Connection refused for user 'guest': user connection limit (0) is reached",
            Meaning::Limit,
        ),
        (
            530,
            "NOT_ALLOWED - number of channels opened for user 'guest' has reached the maximum allowed user limit of (0)",
            Meaning::Limit,
        ),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", Meaning::Missing),
        (
            404,
            "NOT_FOUND - home node 'rabbit@a' of durable queue 'q' in vhost '/' is down or inaccessible",
            Meaning::QueueDown,
        ),
        (404, "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor", Meaning::QueueDown),
        (404, "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout", Meaning::QueueDown),
        // A long name pushes the end out of the text.
        (404, "NOT_FOUND - home node 'rabbit@a' of durable queue 'qqqqqqqqqqqqqqqq", Meaning::QueueDown),
        (403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use", Meaning::ExclusiveConsumer),
        (403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'", Meaning::NotPermitted),
        (403, "ACCESS_REFUSED - read access to queue 'q' in vhost '/' refused for user 'u'", Meaning::NotPermitted),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u', backend rabbit_auth_backend_oauth2 returned an error: \"Provided JWT token has expired at timestamp 1796065016 (validated at 1796065021)\"",
            Meaning::TokenExpired,
        ),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u', backend rabbit_auth_backend_oauth2 returned an error: \"Provided JWT token has...",
            Meaning::NotPermitted,
        ),
        (
            406,
            "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 'q' in vhost '/' of queue type rabbit_stream_queue",
            Meaning::Stream,
        ),
        (406, "PRECONDITION_FAILED - x-priority not supported on streams", Meaning::Stream),
        (320, "CONNECTION_FORCED - credential expired", Meaning::TokenExpired),
        (530, "NOT_ALLOWED - New secret was refused by one of the backends", Meaning::NewTokenRefused),
        (
            405,
            "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'",
            Meaning::ExclusiveQueue,
        ),
        (
            406,
            "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost 'v' (1) is reached",
            Meaning::QueueLimit,
        ),
        (
            406,
            "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': received 'true' but current is 'false'",
            Meaning::Precondition,
        ),
        (
            406,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 60000 ms.",
            Meaning::AckTimeout,
        ),
        (406, "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000", Meaning::TooLarge),
        (540, "NOT_IMPLEMENTED - whatever", Meaning::NotImplemented),
        (541, "INTERNAL_ERROR", Meaning::Other),
        (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'", Meaning::Other),
        // LavinMQ 2.9
        (404, "NOT_FOUND - Queue 'q' doesn't exist", Meaning::Missing),
        (406, "PRECONDITION_FAILED - Server low on disk space", Meaning::Other),
        (406, "PRECONDITION_FAILED - consumer timeout", Meaning::AckTimeout),
        // amqproxy 3.1
        (500, "UPSTREAM_ERROR", Meaning::Other),
        (0, "", Meaning::Other),
    ] {
        assert_eq!(meaning(code, text), expected, "{code} {text}");
    }
}

#[test]
fn names_do_not_change_what_a_text_means() {
    for name in [
        "credit-limit-svc",
        "limits",
        "x down or inaccessible",
        "x is down or inaccessible",
        "(1) is reached",
        "not found",
        "in exclusive use",
        "Server low on disk space",
        "consumer timeout",
        "message size 1",
        ": \"Provided JWT token has expired at timestamp 1 (validated at 2)\"",
        "credential expired",
        "New secret was refused",
        "doesn't exist",
        " - ",
        "NO - x",
    ] {
        for (code, text, expected) in [
            (530, format!("NOT_ALLOWED - access to vhost '{name}' refused for user '{name}'"), Meaning::NotPermitted),
            (530, format!("NOT_ALLOWED - vhost {name} not found"), Meaning::Missing),
            (404, format!("NOT_FOUND - no queue '{name}' in vhost '{name}'"), Meaning::Missing),
            (
                403,
                format!("ACCESS_REFUSED - access to queue '{name}' in vhost '{name}' refused for user '{name}'"),
                Meaning::NotPermitted,
            ),
            (
                406,
                format!(
                    "PRECONDITION_FAILED - inequivalent arg 'durable' for queue '{name}' in vhost '{name}': received 'true' but current is 'false'"
                ),
                Meaning::Precondition,
            ),
        ] {
            assert_eq!(meaning(code, &text), expected, "{text}");
        }
    }
}

#[test]
fn an_unknown_code_keeps_its_text() {
    let refusal = |code, text: &str| Refusal { code, text: text.to_owned() }.to_string();
    assert_eq!(refusal(0, ""), "reply code 0");
    assert_eq!(refusal(0, "upstream gone"), "upstream gone (reply code 0)");
    assert_eq!(refusal(500, "UPSTREAM_ERROR"), "UPSTREAM_ERROR");
}
