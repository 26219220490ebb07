//! The broker's texts, with names in them that contain each other's phrases.

use super::*;

fn meaning(code: u16, text: &str) -> Meaning {
    Refusal { code, text: text.to_owned() }.meaning()
}

#[test]
fn texts_of_rabbitmq_and_lavinmq() {
    for (code, text, expected) in [
        // RabbitMQ 3.10 to 4.3
        (530, "NOT_ALLOWED - vhost nowhere not found", Meaning::NoVirtualHost),
        (530, "NOT_ALLOWED - access to vhost 'limits' refused for user 'guest'", Meaning::VirtualHostRefused),
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
        (404, "NOT_FOUND - no exchange 'x' in vhost '/'", Meaning::NoExchange),
        (403, "ACCESS_REFUSED - queue name 'amq.x' contains reserved prefix 'amq.*'", Meaning::ReservedName),
        (403, "ACCESS_REFUSED - cannot publish to internal exchange 'x' in vhost '/'", Meaning::InternalExchange),
        (
            403,
            "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.",
            Meaning::LoginRefused,
        ),
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
        (406, "PRECONDITION_FAILED - Server low on disk space, can not create queue", Meaning::Other),
        (403, "ACCESS_REFUSED - queue limit in vhost 'lim' (1) is reached", Meaning::QueueLimit),
        (403, "ACCESS_REFUSED - Prefix [\"amq.\"] forbidden, please choose another name", Meaning::ReservedName),
        (406, "PRECONDITION_FAILED - Queue name isn't valid", Meaning::InvalidName),
        (406, "PRECONDITION_FAILED - consumer timeout", Meaning::AckTimeout),
        // amqproxy 3.1
        (500, "UPSTREAM_ERROR", Meaning::Other),
        (403, "NOT_ALLOWED - vhost x not found", Meaning::NoVirtualHost),
        (403, "NOT_ALLOWED - access to vhost 'x' refused for user 'u'", Meaning::VirtualHostRefused),
        (
            403,
            "NOT_ALLOWED - access to vhost 'x' refused for user 'u': connection limit (0) is reached",
            Meaning::Limit,
        ),
        (403, "ACCESS_REFUSED - vhost 'x' not found or access refused", Meaning::VirtualHostRefused),
        // Qpid Broker-J 9.2
        (530, "Authentication failed", Meaning::LoginRefused),
        (404, "Unknown virtual host: 'x'", Meaning::NoVirtualHost),
        (
            403,
            "Cannot subscribe to queue 'q' as it already has an existing exclusive consumer",
            Meaning::ExclusiveConsumer,
        ),
        // GarageMQ
        (530, "login failure", Meaning::LoginRefused),
        (402, "virtualHost 'x' does not exist", Meaning::NoVirtualHost),
        (404, "queue 'q' not found", Meaning::Missing),
        (404, "exchange 'x' not found", Meaning::NoExchange),
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
        "Login was refused",
        "Authentication failed",
        "queue limit in vhost '",
        "' not found",
        "...",
        "doesn't exist",
        " - ",
        "NO - x",
    ] {
        for (code, text, expected) in [
            (
                530,
                format!("NOT_ALLOWED - access to vhost '{name}' refused for user '{name}'"),
                Meaning::VirtualHostRefused,
            ),
            (530, format!("NOT_ALLOWED - vhost {name} not found"), Meaning::NoVirtualHost),
            (404, format!("NOT_FOUND - no exchange '{name}' in vhost '{name}'"), Meaning::NoExchange),
            (
                404,
                format!("NOT_FOUND - queue '{name}' in vhost '{name}' process is stopped by supervisor"),
                Meaning::QueueDown,
            ),
            (
                403,
                format!("ACCESS_REFUSED - queue '{name}' in vhost '{name}' in exclusive use"),
                Meaning::ExclusiveConsumer,
            ),
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

/// RabbitMQ's way to shorten a text to 255 bytes.
fn cut(text: &str) -> String {
    assert!(text.len() > 255);
    format!("{}...", &text[..252])
}

#[test]
fn a_text_that_is_cut_means_what_is_left_of_it() {
    let long = "n".repeat(255);
    for (code, text, expected) in [
        (403, format!("ACCESS_REFUSED - queue '{long}' in vhost '/' in exclusive use"), Meaning::ExclusiveConsumer),
        (403, format!("ACCESS_REFUSED - access to queue '{long}' in vhost '/' refused"), Meaning::NotPermitted),
        (403, format!("ACCESS_REFUSED - queue name 'amq.{long}' contains reserved prefix"), Meaning::ReservedName),
        (404, format!("NOT_FOUND - no queue '{long}' in vhost '/'"), Meaning::Missing),
        (404, format!("NOT_FOUND - queue '{long}' in vhost '/' process is stopped by supervisor"), Meaning::QueueDown),
        (530, format!("NOT_ALLOWED - vhost {long} not found"), Meaning::NoVirtualHost),
        // A limit, or a permission that is missing.
        (530, format!("NOT_ALLOWED - access to vhost '{long}' refused for user 'u'"), Meaning::Other),
    ] {
        assert_eq!(meaning(code, &cut(&text)), expected, "{text}");
    }
    let text = format!(
        "NOT_ALLOWED - access to vhost '{}' refused for user 'u': connection limit (0) is reached",
        &long[..190]
    );
    assert_eq!(meaning(530, &cut(&text)), Meaning::Other);
}

fn frame_sizes(version: Option<(u32, u32)>, theirs: u32, ours: Option<u32>) -> Option<String> {
    let mut observed = Observed::default();
    observed.version = version;
    observed.frame_max = Some(theirs);
    let mut address = Address::parse("amqp://h").unwrap();
    address.parameters.frame_max = ours;
    frame_max_problem(&observed, &address)
}

#[test]
fn a_frame_max_that_cannot_be_agreed_on_is_named() {
    for version in [None, Some((3, 10)), Some((4, 3))] {
        for theirs in [0, 8192, 131_072] {
            for ours in [None, Some(0), Some(8192), Some(u32::MAX)] {
                assert_eq!(frame_sizes(version, theirs, ours), None);
            }
        }
        assert!(frame_sizes(version, 4096, None).unwrap().contains("its frame_max is 4096 bytes"));
    }
    assert_eq!(frame_sizes(Some((3, 10)), 131_072, Some(4096)), None);
    assert_eq!(frame_sizes(Some((3, 10)), 4096, Some(4096)), None);
    assert!(frame_sizes(Some((4, 1)), 131_072, Some(4096)).unwrap().contains("the URL asks for 4096"));
    // Before the broker has proposed anything, that isn't why.
    let address = Address::parse("amqp://h?frame_max=4096").unwrap();
    let mut observed = Observed::default();
    observed.version = Some((4, 3));
    assert_eq!(frame_max_problem(&observed, &address), None);
}

#[test]
fn an_unknown_code_keeps_its_text() {
    let refusal = |code, text: &str| Refusal { code, text: text.to_owned() }.to_string();
    assert_eq!(refusal(0, ""), "reply code 0");
    assert_eq!(refusal(0, "upstream gone"), "upstream gone (reply code 0)");
    assert_eq!(refusal(500, "UPSTREAM_ERROR"), "UPSTREAM_ERROR");
}
