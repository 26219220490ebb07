//! What each of the broker's texts means, and what follows from it.

use super::{Meaning as M, *};

fn meaning(code: u16, text: &str) -> Meaning {
    Refusal::new(code, text).meaning()
}

#[test]
fn texts_of_rabbitmq_and_lavinmq() {
    for (code, text, expected) in [
        // RabbitMQ 3.10 to 4.3
        (530, "NOT_ALLOWED - vhost nowhere not found", M::NoVirtualHost),
        (530, "NOT_ALLOWED - access to vhost 'limits' refused for user 'guest'", M::VirtualHostRefused),
        (530, "NOT_ALLOWED - access to vhost '/' refused for user 'guest': connection limit (0) is reached", M::Limit),
        (530, "NOT_ALLOWED - Connection refused for user 'guest': user connection limit (0) is reached", M::Limit),
        (
            530,
            "NOT_ALLOWED - number of channels opened for user 'guest' has reached the maximum allowed user limit of (0)",
            M::Limit,
        ),
        (404, "NOT_FOUND - no queue 'q' in vhost '/'", M::Missing),
        (
            404,
            "NOT_FOUND - home node 'rabbit@a' of durable queue 'q' in vhost '/' is down or inaccessible",
            M::QueueDown,
        ),
        (404, "NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor", M::QueueDown),
        (404, "NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout", M::QueueDown),
        (404, "NOT_FOUND - no exchange 'x' in vhost '/'", M::NoExchange),
        (403, "ACCESS_REFUSED - queue name 'amq.x' contains reserved prefix 'amq.*'", M::ReservedName),
        (403, "ACCESS_REFUSED - cannot publish to internal exchange 'x' in vhost '/'", M::InternalExchange),
        (
            403,
            "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.",
            M::LoginRefused,
        ),
        // A long name pushes the end out of the text.
        (404, "NOT_FOUND - home node 'rabbit@a' of durable queue 'qqqqqqqqqqqqqqqq", M::QueueDown),
        (403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use", M::ExclusiveConsumer),
        (403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'", M::NotPermitted),
        (403, "ACCESS_REFUSED - read access to queue 'q' in vhost '/' refused for user 'u'", M::NotPermitted),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u', backend rabbit_auth_backend_oauth2 returned an error: \"Provided JWT token has expired at timestamp 1796065016 (validated at 1796065021)\"",
            M::TokenExpired,
        ),
        (
            403,
            "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u', backend rabbit_auth_backend_oauth2 returned an error: \"Provided JWT token has...",
            M::NotPermitted,
        ),
        (
            406,
            "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 'q' in vhost '/' of queue type rabbit_stream_queue",
            M::Stream,
        ),
        (406, "PRECONDITION_FAILED - x-priority not supported on streams", M::Stream),
        (320, "CONNECTION_FORCED - credential expired", M::TokenExpired),
        (530, "NOT_ALLOWED - New secret was refused by one of the backends", M::NewTokenRefused),
        (405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'", M::ExclusiveQueue),
        (406, "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost 'v' (1) is reached", M::QueueLimit),
        (
            406,
            "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': received 'true' but current is 'false'",
            M::Precondition,
        ),
        (
            406,
            "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 60000 ms.",
            M::AckTimeout,
        ),
        (406, "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000", M::TooLarge),
        (540, "NOT_IMPLEMENTED - whatever", M::NotImplemented),
        (541, "INTERNAL_ERROR", M::Other),
        (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'", M::Other),
        // LavinMQ 2.9
        (404, "NOT_FOUND - Queue 'q' doesn't exist", M::Missing),
        (406, "PRECONDITION_FAILED - Server low on disk space", M::Other),
        (406, "PRECONDITION_FAILED - Server low on disk space, can not create queue", M::Other),
        (403, "ACCESS_REFUSED - queue limit in vhost 'lim' (1) is reached", M::QueueLimit),
        (403, "ACCESS_REFUSED - Prefix [\"amq.\"] forbidden, please choose another name", M::ReservedName),
        (406, "PRECONDITION_FAILED - Queue name isn't valid", M::InvalidName),
        (406, "PRECONDITION_FAILED - consumer timeout", M::AckTimeout),
        // amqproxy 3.1
        (500, "UPSTREAM_ERROR", M::Other),
        (403, "NOT_ALLOWED - vhost x not found", M::NoVirtualHost),
        (403, "NOT_ALLOWED - access to vhost 'x' refused for user 'u'", M::VirtualHostRefused),
        (403, "NOT_ALLOWED - access to vhost 'x' refused for user 'u': connection limit (0) is reached", M::Limit),
        (403, "ACCESS_REFUSED - vhost 'x' not found or access refused", M::VirtualHostRefused),
        // Qpid Broker-J 9.2
        (530, "Authentication failed", M::LoginRefused),
        (404, "Unknown virtual host: 'x'", M::NoVirtualHost),
        (403, "Cannot subscribe to queue 'q' as it already has an existing exclusive consumer", M::ExclusiveConsumer),
        // GarageMQ
        (530, "login failure", M::LoginRefused),
        (402, "virtualHost 'x' does not exist", M::NoVirtualHost),
        (404, "queue 'q' not found", M::Missing),
        (404, "exchange 'x' not found", M::NoExchange),
        (0, "", M::Other),
    ] {
        assert_eq!(meaning(code, text), expected, "{code} {text}");
    }
}

/// The names contain phrases of other texts.
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
            (530, format!("NOT_ALLOWED - access to vhost '{name}' refused for user '{name}'"), M::VirtualHostRefused),
            (530, format!("NOT_ALLOWED - vhost {name} not found"), M::NoVirtualHost),
            (404, format!("NOT_FOUND - no exchange '{name}' in vhost '{name}'"), M::NoExchange),
            (
                404,
                format!("NOT_FOUND - queue '{name}' in vhost '{name}' process is stopped by supervisor"),
                M::QueueDown,
            ),
            (403, format!("ACCESS_REFUSED - queue '{name}' in vhost '{name}' in exclusive use"), M::ExclusiveConsumer),
            (404, format!("NOT_FOUND - no queue '{name}' in vhost '{name}'"), M::Missing),
            (
                403,
                format!("ACCESS_REFUSED - access to queue '{name}' in vhost '{name}' refused for user '{name}'"),
                M::NotPermitted,
            ),
            (
                406,
                format!(
                    "PRECONDITION_FAILED - inequivalent arg 'durable' for queue '{name}' in vhost '{name}': received 'true' but current is 'false'"
                ),
                M::Precondition,
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
        (403, format!("ACCESS_REFUSED - queue '{long}' in vhost '/' in exclusive use"), M::ExclusiveConsumer),
        (403, format!("ACCESS_REFUSED - access to queue '{long}' in vhost '/' refused"), M::NotPermitted),
        (403, format!("ACCESS_REFUSED - queue name 'amq.{long}' contains reserved prefix"), M::ReservedName),
        (404, format!("NOT_FOUND - no queue '{long}' in vhost '/'"), M::Missing),
        (404, format!("NOT_FOUND - queue '{long}' in vhost '/' process is stopped by supervisor"), M::QueueDown),
        (530, format!("NOT_ALLOWED - vhost {long} not found"), M::NoVirtualHost),
        // A limit, or a permission that is missing.
        (530, format!("NOT_ALLOWED - access to vhost '{long}' refused for user 'u'"), M::Other),
    ] {
        assert_eq!(meaning(code, &cut(&text)), expected, "{text}");
    }
    let text = format!(
        "NOT_ALLOWED - access to vhost '{}' refused for user 'u': connection limit (0) is reached",
        &long[..190]
    );
    assert_eq!(meaning(530, &cut(&text)), M::Other);
}

/// Each row of `row`, in its order; "…" stands for the broker's text.
#[test]
fn every_row_of_the_table() {
    use Asked::{Bind, Declare, Delivery, Login, Publish, Queue};
    use Exit::{Config, NoPermission, Unavailable, Unconfirmed};
    const LOGIN: (u16, &str) = (403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN");
    const NO_VHOST: (u16, &str) = (530, "NOT_ALLOWED - vhost v not found");
    const VHOST_REFUSED: (u16, &str) = (530, "NOT_ALLOWED - access to vhost 'v' refused for user 'u'");
    const SHUTDOWN: (u16, &str) = (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'");
    const EXPIRED: (u16, &str) = (320, "CONNECTION_FORCED - credential expired");
    const NEW_TOKEN: (u16, &str) = (530, "NOT_ALLOWED - New secret was refused by one of the backends");
    const ACK_TIMEOUT: (u16, &str) = (406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out");
    const NO_EXCHANGE: (u16, &str) = (404, "NOT_FOUND - no exchange 'x' in vhost 'v'");
    const NO_QUEUE: (u16, &str) = (404, "NOT_FOUND - no queue 'q' in vhost 'v'");
    const NO_ACCESS: (u16, &str) = (403, "ACCESS_REFUSED - access to queue 'q' in vhost 'v' refused for user 'u'");
    const UNEQUAL: (u16, &str) = (406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost 'v'");
    const CHANNELS: (u16, &str) = (530, "NOT_ALLOWED - number of channels opened for user 'u' has reached the maximum");

    let with_version = |version| {
        let mut observed = Observed::default();
        observed.version = Some(version);
        observed
    };
    let (old, middle, new) = (with_version((3, 10)), with_version((4, 2)), with_version((4, 3)));
    let held = |observed| Delivery { closed: "channel", observed };
    let password = &Address::parse("amqp://h").unwrap();
    let certificate = &Address::parse("amqps://h?auth_mechanism=external").unwrap();
    let (consume, declare) = (Queue { action: "consume from", queue: "q" }, Queue { action: "declare", queue: "q" });
    let bind = Bind { queue: "q", exchange: "x" };
    let (declare_type, publish) = (Declare("q"), Publish("x"));

    let no_file = Credentials { user: "u", virtual_host: "v", token: None, file: None };
    let file = Credentials { file: Some(Path::new("/f")), ..no_file };
    // {"alg":"none"} and {}, or {"exp":0}
    let (lasting, expired) =
        (Token::parse("eyJhbGciOiJub25lIn0.e30."), Token::parse("eyJhbGciOiJub25lIn0.eyJleHAiOjB9."));
    assert!(lasting.is_some() && expired.is_some());
    let (lasting, expired) = (Credentials { token: lasting, ..no_file }, Credentials { token: expired, ..no_file });

    #[rustfmt::skip]
    let rows = [
        // A delivery.
        (held(&old), ACK_TIMEOUT, no_file, Unconfirmed, false,
         "acknowledgement timeout: …; raise consumer_timeout in the broker's rabbitmq.conf"),
        (held(&middle), ACK_TIMEOUT, no_file, Unconfirmed, false,
         "acknowledgement timeout: …; raise the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"),
        (held(&new), ACK_TIMEOUT, no_file, Unconfirmed, false,
         "acknowledgement timeout: …; raise --ack-timeout, the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in the broker's configuration"),
        (held(&old), EXPIRED, no_file, NoPermission, false,
         "the token has expired: …; mount one that is renewed (--password-file)"),
        (held(&old), SHUTDOWN, no_file, Unconfirmed, false, "the broker closed the channel: …"),
        (held(&old), LOGIN, no_file, Unconfirmed, false, "the broker closed the channel: …"),
        // A token.
        (consume, EXPIRED, no_file, NoPermission, false,
         "the token has expired: …; mount one that is renewed (--password-file)"),
        (consume, EXPIRED, file, NoPermission, true, "the token has expired: …; check what renews /f"),
        (consume, NEW_TOKEN, file, NoPermission, true, "the broker refused the new token: …; check what renews /f"),
        (consume, NO_ACCESS, expired, NoPermission, false,
         "the token has expired: …; mount one that is renewed (--password-file)"),
        (publish, EXPIRED, no_file, NoPermission, false,
         "the token has expired: …; mount one that is renewed (--password-file)"),
        (publish, EXPIRED, file, Unconfirmed, true, "the token has expired: …; check what renews /f"),
        // The login, at once or when a channel is opened.
        (Login(certificate), LOGIN, no_file, NoPermission, false,
         "the broker refused the login by client certificate (EXTERNAL): …; create a user of the certificate's name, or give a password"),
        (Login(password), LOGIN, no_file, NoPermission, false,
         "the broker refused the login of user \"u\": …; check the user and the password"),
        (Login(password), LOGIN, file, NoPermission, false,
         "the broker refused the login of user \"u\": …; check the user and the password"),
        (Login(password), LOGIN, lasting, NoPermission, false,
         "the broker refused the login of user \"u\": …; check the token's audience, and who has signed it"),
        (Login(password), NO_ACCESS, no_file, NoPermission, false,
         "the broker refused the login of user \"u\": …; check the user and the password"),
        (consume, LOGIN, no_file, NoPermission, false,
         "the broker refused the login of user \"u\": …; check the user and the password"),
        (Login(password), NO_VHOST, no_file, Config, false,
         "the broker has no virtual host \"v\": …; create it, or correct its name (the URL's path, or --vhost)"),
        (Login(password), NO_QUEUE, no_file, Config, false,
         "the broker has no virtual host \"v\": …; create it, or correct its name (the URL's path, or --vhost)"),
        (consume, NO_VHOST, no_file, Config, false,
         "the broker has no virtual host \"v\": …; create it, or correct its name (the URL's path, or --vhost)"),
        (Login(password), VHOST_REFUSED, no_file, NoPermission, false,
         "user \"u\" may not use virtual host \"v\": …; grant it with rabbitmqctl set_permissions"),
        (consume, VHOST_REFUSED, lasting, NoPermission, false,
         "user \"u\" may not use virtual host \"v\": …; the token needs a scope for it"),
        (Login(password), CHANNELS, no_file, Unavailable, true, "the broker closed the connection: …"),
        (Login(password), EXPIRED, no_file, Unavailable, true, "the broker closed the connection: …"),
        // Publishing.
        (publish, NO_EXCHANGE, no_file, Config, false,
         "there is no exchange \"x\" in this virtual host: …; declare it, or check the name"),
        (publish, (403, "ACCESS_REFUSED - cannot publish to internal exchange 'x' in vhost 'v'"), no_file, Config, false,
         "exchange \"x\" is internal: …; only exchanges publish to it: name another"),
        (publish, NO_ACCESS, no_file, NoPermission, false,
         "user \"u\" may not publish here: …; grant it with rabbitmqctl set_permissions"),
        (publish, (406, "PRECONDITION_FAILED - message size 2 is larger than configured max size 1"), no_file, Config, false,
         "the message is too large for this broker: …; raise max_message_size in its rabbitmq.conf, or split the message"),
        (publish, UNEQUAL, no_file, Config, false, "the broker refused a message: …; check its properties and headers"),
        (publish, (540, "NOT_IMPLEMENTED - immediate=true"), no_file, Config, false,
         "the broker refused a message: …; check its properties and headers"),
        (publish, SHUTDOWN, no_file, Unconfirmed, false, "the broker closed the channel or the connection: …"),
        // A queue.
        (bind, NO_EXCHANGE, no_file, Config, true,
         "there is no exchange \"x\" to bind queue \"q\" to: …; declare it, or check the name and the virtual host"),
        (declare_type, UNEQUAL, no_file, Config, false,
         "queue \"q\" exists and is another kind of queue: …; publish to it without --declare, or name another"),
        (bind, NO_QUEUE, no_file, Config, true,
         "there is no queue \"q\" to bind: …; declare it, or check QUEUE and the virtual host"),
        (declare_type, NO_ACCESS, no_file, NoPermission, false,
         "user \"u\" may not declare queue \"q\": …; grant it with rabbitmqctl set_permissions"),
        (consume, NO_QUEUE, no_file, Config, true,
         "there is no queue \"q\" to consume from: …; declare it, or check QUEUE and the virtual host"),
        (consume, NO_EXCHANGE, no_file, Config, true,
         "there is no queue \"q\" to consume from: …; declare it, or check QUEUE and the virtual host"),
        (declare, (403, "ACCESS_REFUSED - queue name 'amq.q' contains reserved prefix 'amq.*'"), no_file, Config, false,
         "can't declare queue \"q\": …; names that begin with amq. are the broker's own"),
        (declare, (406, "PRECONDITION_FAILED - Queue name isn't valid"), no_file, Config, false,
         "can't declare queue \"q\": …; choose another name"),
        (consume, (404, "NOT_FOUND - queue 'q' in vhost 'v' process is stopped by supervisor"), no_file, Unavailable, true,
         "queue \"q\" is not available now: …"),
        (consume, (403, "ACCESS_REFUSED - queue 'q' in vhost 'v' in exclusive use"), no_file, Config, false,
         "queue \"q\" has an exclusive consumer: …; stop it, or use another queue"),
        (consume, (406, "PRECONDITION_FAILED - x-priority not supported on streams"), no_file, Config, false,
         "queue \"q\" is a stream, which keeps its messages: …; bind a quorum queue to the same exchange and use that, or read the stream with a client that keeps its offset"),
        (consume, (405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q'"), no_file, Config, false,
         "queue \"q\" is exclusive to another connection: …; use another queue"),
        (consume, NO_ACCESS, no_file, NoPermission, false,
         "user \"u\" may not consume from queue \"q\": …; grant it with rabbitmqctl set_permissions"),
        (declare, (403, "ACCESS_REFUSED - queue limit in vhost 'v' (1) is reached"), no_file, Config, false,
         "can't declare queue \"q\": …; raise the limit, or delete queues"),
        (consume, CHANNELS, no_file, Unavailable, true, "can't consume from queue \"q\" now: …"),
        (consume, (541, "INTERNAL_ERROR"), no_file, Unavailable, true, "can't consume from queue \"q\" now: …"),
        (consume, UNEQUAL, no_file, Config, false, "can't consume from queue \"q\" with these options: …; compare them with the queue's type and properties"),
    ];
    for (asked, (code, text), credentials, exit, transient, message) in rows {
        let error = ConnectError::from_refusal(asked, &Refusal::new(code, text), credentials);
        let Failure { exit: got, message: said } = error.failure;
        assert_eq!((got, error.transient, &*said.replace(text, "…")), (exit, transient, message), "{text}");
        // The caller retries a refused login for two minutes. A certificate isn't read again.
        let by_password = message.starts_with("the broker refused the login of");
        assert_eq!(error.login_refused, by_password, "{message}");
    }
    let error = ConnectError::from_refusal(Login(password), &Refusal::new(LOGIN.0, LOGIN.1), expired);
    assert!(error.failure.message.contains("; the token expired "), "{}", error.failure.message);
}

#[test]
fn a_loss_ends_the_run_if_the_next_connection_would_get_the_same_message() {
    let end = |lost: DeliveryLost| lost.end_of_run("q").map(|failure| (failure.exit, failure.message));
    let starts = |lost, start: &str| {
        let (exit, message) = end(lost).unwrap();
        assert!(exit == Exit::Software && message.starts_with(start) && message.contains(REMOVE_MESSAGE), "{message}");
    };
    let unreadable = || {
        let mut observed = Observed::default();
        observed.unreadable = Some("it is broken".to_owned());
        DeliveryLost::ended(&observed)
    };
    let lost = || DeliveryLost::because("reset");
    assert!(end(lost()).is_none());
    starts(
        lost().for_the_second_time(),
        "two connections were lost while a message from queue \"q\" arrived, and no message arrived in between; the last error: reset; ",
    );
    starts(unreadable(), "the next message in queue \"q\" can't be read: it is broken; ");
    starts(unreadable().for_the_second_time(), "the next message in queue \"q\" can't be read: it is broken; ");
    assert_eq!(unreadable().to_string(), "the broker delivered another message, which can't be read: it is broken");
}

#[test]
fn only_of_rabbitmq_is_it_known_how_long_credentials_may_be() {
    let problem = |version, is_another_product| {
        let mut observed = Observed::default();
        observed.mechanisms = Some("PLAIN".to_owned());
        (observed.version, observed.is_another_product) = (version, is_another_product);
        let mut address = Address::parse("amqp://h").unwrap();
        address.set_password("x".repeat(5000).into());
        credentials_problem(&observed, &address)
    };
    let said = problem(Some((3, 10)), false).unwrap();
    assert!(said.starts_with("user and password have 5005 bytes, and this RabbitMQ takes 4096"), "{said}");
    assert_eq!(problem(Some((4, 3)), false), None);
    assert_eq!(problem(None, true), None);
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
    let refusal = |code, text: &str| Refusal::new(code, text).to_string();
    assert_eq!(refusal(0, ""), "reply code 0");
    assert_eq!(refusal(0, "upstream gone"), "upstream gone (reply code 0)");
    assert_eq!(refusal(500, "UPSTREAM_ERROR"), "UPSTREAM_ERROR");
}
