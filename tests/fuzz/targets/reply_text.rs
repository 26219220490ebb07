//! The texts with which a broker refuses an operation. An input has four lines: the operation and the reply code; the
//! name of a queue or exchange; a name that serves as virtual host and user; the text.
//!
//! - RabbitMQ's own texts lead to the same status and the same words whatever names are in them. If a long name makes
//!   the broker cut off a text's end, its beginning determines the status.
//! - Any other text leads to one of the documented statuses, and is shown; no part of it can be taken for a log line.
//! - The password makes no difference.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qconsume::{
    broker::{
        ConnectError,
        reach::address::{Address, Secret},
    },
    exit::Exit::{self, Config, NoPermission, Unavailable, Unconfirmed},
    fuzzing::{
        Request::{self, Consume, Declare, Login, Publish},
        answer, log_lines,
    },
};

/// The longest reply text, in bytes.
const TEXT_MAX: usize = 255;

/// The operation; the reply code and text, with `{Q}` for the queue or exchange, `{V}` for the virtual host, and `{U}`
/// for the user; the status, and the status if the text's end is cut off.
type Row = (Request, u16, &'static str, Exit, Exit);

/// The texts of RabbitMQ 3.10 to 4.3, as in src/broker/errors/tests.rs.
#[rustfmt::skip]
const TEXTS: [Row; 28] = [
    (Login, 403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.", NoPermission, NoPermission),
    (Login, 530, "NOT_ALLOWED - vhost {V} not found", Config, Config),
    (Login, 530, "NOT_ALLOWED - access to vhost '{V}' refused for user '{U}'", NoPermission, Unavailable),
    (Login, 530, "NOT_ALLOWED - access to vhost '{V}' refused for user '{U}': connection limit (0) is reached", Unavailable, Unavailable),
    (Login, 530, "NOT_ALLOWED - Connection refused for user '{U}': user connection limit (0) is reached", Unavailable, Unavailable),
    (Login, 541, "INTERNAL_ERROR - access to vhost '{V}' refused for user '{U}': vhost '{V}' is down", Unavailable, Unavailable),
    (Consume, 530, "NOT_ALLOWED - number of channels opened for user '{U}' has reached the maximum allowed user limit of (0)", Unavailable, Unavailable),
    (Consume, 404, "NOT_FOUND - no queue '{Q}' in vhost '{V}'", Config, Config),
    (Consume, 404, "NOT_FOUND - home node 'rabbit@a' of durable queue '{Q}' in vhost '{V}' is down or inaccessible", Unavailable, Unavailable),
    (Consume, 404, "NOT_FOUND - queue '{Q}' in vhost '{V}' process is stopped by supervisor", Unavailable, Unavailable),
    (Consume, 404, "NOT_FOUND - failed to perform operation on queue '{Q}' in vhost '{V}' due to timeout", Unavailable, Unavailable),
    (Consume, 404, "NOT_FOUND - Queue '{Q}' doesn't exist", Config, Config),
    (Consume, 403, "ACCESS_REFUSED - queue '{Q}' in vhost '{V}' in exclusive use", Config, Config),
    (Consume, 403, "ACCESS_REFUSED - access to queue '{Q}' in vhost '{V}' refused for user '{U}'", NoPermission, NoPermission),
    (Consume, 403, "ACCESS_REFUSED - read access to queue '{Q}' in vhost '{V}' refused for user '{U}'", NoPermission, NoPermission),
    (Consume, 320, "CONNECTION_FORCED - credential expired", NoPermission, NoPermission),
    (Consume, 530, "NOT_ALLOWED - New secret was refused by one of the backends", NoPermission, NoPermission),
    (Consume, 405, "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{Q}' in vhost '{V}'", Config, Config),
    (Consume, 404, "queue '{Q}' not found", Config, Unavailable),
    (Declare, 403, "ACCESS_REFUSED - queue name '{Q}' contains reserved prefix 'amq.*'", Config, Config),
    (Declare, 403, "ACCESS_REFUSED - configure access to queue '{Q}' in vhost '{V}' refused for user '{U}'", NoPermission, NoPermission),
    (Declare, 406, "PRECONDITION_FAILED - cannot declare queue '{Q}': queue limit in vhost '{V}' (1) is reached", Config, Config),
    (Declare, 406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue '{Q}' in vhost '{V}': received 'true' but current is 'false'", Config, Config),
    (Publish, 404, "NOT_FOUND - no exchange '{Q}' in vhost '{V}'", Config, Config),
    (Publish, 403, "ACCESS_REFUSED - write access to exchange '{Q}' in vhost '{V}' refused for user '{U}'", NoPermission, NoPermission),
    (Publish, 403, "ACCESS_REFUSED - cannot publish to internal exchange '{Q}' in vhost '{V}'", Config, Config),
    (Publish, 406, "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000", Config, Config),
    (Publish, 541, "INTERNAL_ERROR", Unconfirmed, Unconfirmed),
];

struct Names<'a> {
    queue: &'a str,
    virtual_host: &'a str,
    user: &'a str,
}

const PLAIN: Names<'static> = Names { queue: "the-queue", virtual_host: "the-host", user: "the-user" };

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(4, |byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let (asked, names) = (line(), [line(), line()]);
    let text = line();
    let Some((request, code)) = parse(asked) else {
        return;
    };
    let [Some(queue), Some(name)] = names.map(name) else {
        return;
    };
    let names = Names { queue, virtual_host: name, user: name };
    for row in &TEXTS {
        check_row(row, &names);
    }
    check_any(request, &names, code, &text[..text.len().min(TEXT_MAX)]);
});

/// Parses a line such as `consume 404`.
fn parse(asked: &[u8]) -> Option<(Request, u16)> {
    let (request, code) = std::str::from_utf8(asked).ok()?.split_once(' ')?;
    let request = match request {
        "login" => Login,
        "consume" => Consume,
        "declare" => Declare,
        "publish" => Publish,
        _ => return None,
    };
    Some((request, code.parse().ok()?))
}

/// The text, if it is a name that AMQP allows.
fn name(text: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(text).ok()?;
    (1..=TEXT_MAX).contains(&text.len()).then_some(text)
}

fn ask(request: Request, names: &Names<'_>, code: u16, text: &[u8]) -> Option<ConnectError> {
    let mut address = Address::parse("amqp://:S3CRET@h").expect("a URL");
    address.username = names.user.to_owned();
    address.virtual_host = names.virtual_host.to_owned();
    let answered = answer(request, &address, names.queue, code, text);
    address.password = Secret::from("another".to_owned());
    let again = answer(request, &address, names.queue, code, text);
    assert_eq!(format!("{answered:?}"), format!("{again:?}"));
    answered
}

fn check_row(&(request, code, text, exit, exit_if_cut): &Row, names: &Names<'_>) {
    let plain_text = fill(text, &PLAIN);
    let plain = ask(request, &PLAIN, code, plain_text.as_bytes()).expect("the plain refusal can be read");
    assert_eq!(plain.failure.exit, exit, "{plain_text}");

    let full = fill(text, names);
    let cut = cut(&full);
    let answered = ask(request, names, code, &cut).unwrap_or_else(|| panic!("{full:?} can't be read"));
    if cut.len() < full.len() && exit_if_cut != exit {
        assert_eq!(answered.failure.exit, exit_if_cut, "{full}");
        return;
    }
    assert_eq!(answered.transient, plain.transient, "{full}");
    assert_eq!(answered.failure.exit, exit, "{full}");
    // The same words, except for the names and the text.
    let mut expected = String::new();
    let (before, after) = plain.failure.message.split_once(&plain_text).expect("the message shows the text");
    for (part, text) in [(before, String::from_utf8_lossy(&cut)), (after, "".into())] {
        let quoted = [(PLAIN.queue, names.queue), (PLAIN.virtual_host, names.virtual_host), (PLAIN.user, names.user)];
        expected += &substitute(part, &quoted.map(|(from, to)| (format!("{from:?}"), format!("{to:?}"))));
        expected += &text;
    }
    assert_eq!(answered.failure.message, expected);
}

/// Checks a refusal with any code and text.
fn check_any(request: Request, names: &Names<'_>, code: u16, text: &[u8]) {
    let Some(ConnectError { transient, failure, .. }) = ask(request, names, code, text) else {
        panic!("{text:?} can't be read");
    };
    let (exit, message) = (failure.exit, failure.message);
    let no_host = message.starts_with("the broker has no virtual host");
    let may_be_declared_yet = matches!(request, Consume | Declare) && code == 404 && exit == Config && !no_host;
    assert_eq!(transient, exit == Unavailable || may_be_declared_yet, "{message}");
    let documented = match request {
        Login if code == 403 => &[NoPermission][..],
        Publish => &[Config, NoPermission, Unconfirmed],
        _ => &[Config, NoPermission, Unavailable],
    };
    assert!(documented.contains(&exit), "{exit:?}: {message}");
    let shown = String::from_utf8_lossy(text);
    assert!(message.contains(&*shown), "{shown:?} is not in {message:?}");

    let (line, json) = log_lines(&message, names.queue);
    for line in [&line, &json] {
        assert!(!line.contains(char::is_control), "{line:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&json).expect("the log line is JSON");
    assert_eq!((&json["message"], &json["id"]), (&message.into(), &names.queue.into()));
}

fn fill(text: &str, names: &Names<'_>) -> String {
    let names = [("{Q}", names.queue), ("{V}", names.virtual_host), ("{U}", names.user)];
    substitute(text, &names.map(|(from, to)| (from.to_owned(), to.to_owned())))
}

/// Replaces each of these in one pass; replacements are not searched again.
fn substitute(text: &str, pairs: &[(String, String)]) -> String {
    let next = pairs.iter().filter_map(|pair| Some((text.find(&pair.0)?, pair)));
    match next.min_by_key(|(at, _)| *at) {
        Some((at, (from, to))) => text[..at].to_owned() + to + &substitute(&text[at + from.len()..], pairs),
        None => text.to_owned(),
    }
}

/// Cuts a text as RabbitMQ does (`rabbit_binary_generator`): at a byte, even within a character.
fn cut(text: &str) -> Vec<u8> {
    match text.as_bytes() {
        text if text.len() > TEXT_MAX => [&text[..TEXT_MAX - 3], b"..."].concat(),
        text => text.to_vec(),
    }
}
