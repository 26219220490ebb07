//! What the broker's refusals mean, and one table of what follows: exit status, whether a retry may help, and advice.

use super::reach::{
    address::Address, connection::OpenConnection, credentials::Credentials, observed::Observed, tls_errors,
    token::Token,
};
use crate::exit::{Exit, Failure};
use lapin::{ErrorKind, protocol::constants::FRAME_MIN_SIZE as LAPIN_FRAME_MIN};
use std::{fmt, io, path::Path};

/// rabbitmqctl has no command for it, and rabbitmqadmin 1, which RabbitMQ 3 contains, has other arguments.
const REMOVE_MESSAGE: &str = "remove it on the management page ('Get messages', 'Reject requeue false'), or with \
                              rabbitmqadmin 2: `rabbitmqadmin get messages --queue NAME --ack-mode reject_requeue_false`";

/// Largest `connection.start-ok` frame, in bytes. RabbitMQ 3.10 and 4.3 close without a reason if it is larger.
const HANDSHAKE_FRAME_MAX: usize = 4096;
const HANDSHAKE_FRAME_MAX_SINCE_4: usize = 8192;

/// Smallest frame_max that RabbitMQ takes since 4.1, in bytes: seen with 4.3.6, and 4.0.5 takes a smaller one.
const RABBITMQ_FRAME_MIN: u32 = 8192;

/// The most that the client's properties take of `connection.start-ok`, in bytes.
const CLIENT_PROPERTIES_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    LoginRefused,
    VirtualHostRefused,
    NoVirtualHost,
    /// Of connections or channels.
    Limit,
    QueueLimit,
    QueueDown,
    NoExchange,
    /// Usually the queue.
    Missing,
    ExclusiveConsumer,
    ExclusiveQueue,
    ReservedName,
    InvalidName,
    InternalExchange,
    NotPermitted,
    TokenExpired,
    NewTokenRefused,
    AckTimeout,
    TooLarge,
    Stream,
    Precondition,
    NotImplemented,
    /// It may pass.
    Other,
}

/// The broker's reason to close a channel or the connection.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: u16,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(code: u16, text: impl ToString) -> Self {
        let text = text.to_string();
        Self { code, text }
    }

    /// Goes by the reply code (AMQP 0-9-1, 1.2), and by parts of the text that no user chooses: names stand in the
    /// middle, in quotes. Prefer beginnings: RabbitMQ cuts texts at 255 bytes. The texts are those of RabbitMQ 3.10,
    /// 4.0 and 4.3, LavinMQ 2.9, amqproxy 3.1, Qpid Broker-J 9.2 and GarageMQ.
    pub(super) fn meaning(&self) -> Meaning {
        use Meaning as M;
        // RabbitMQ puts the code's name before the text: "NOT_FOUND - no queue …".
        let (name, text) = match self.text.split_once(" - ") {
            Some((name, rest)) if name.bytes().all(|c| c.is_ascii_uppercase() || c == b'_') => (name, rest),
            _ => ("", self.text.as_str()),
        };
        let starts = |with: &str| text.starts_with(with);
        let ends = |with: &str| text.ends_with(with);
        let is_cut = self.text.len() > 250 && ends("...");
        // amqproxy passes the broker's refusals on with code 403, whatever their own code was. Their texts name it.
        let code = if (self.code, name) == (403, "NOT_ALLOWED") { 530 } else { self.code };
        match code {
            403 if !["", "ACCESS_REFUSED"].contains(&name) => M::Other,
            402 => M::NoVirtualHost,
            403 if starts("queue '") || ends("' in exclusive use") => M::ExclusiveConsumer,
            403 if ends("' as it already has an existing exclusive consumer") => M::ExclusiveConsumer,
            403 if starts("queue limit in vhost '") => M::QueueLimit,
            403 if starts("queue name '") || starts("Prefix ") => M::ReservedName,
            403 if starts("cannot publish to internal exchange '") => M::InternalExchange,
            403 if starts("Login was refused") => M::LoginRefused,
            403 if starts("vhost '") => M::VirtualHostRefused,
            403 if token_expired(text) => M::TokenExpired,
            403 => M::NotPermitted,
            404 if starts("queue '") && ends("' not found") => M::Missing,
            404 if starts("queue '") || starts("home node '") => M::QueueDown,
            404 if starts("failed to perform operation on ") => M::QueueDown,
            404 if ends(" is down or inaccessible") => M::QueueDown,
            404 if ends(" process is stopped by supervisor") => M::QueueDown,
            404 if starts("no exchange '") || starts("Exchange '") || starts("exchange '") => M::NoExchange,
            404 if starts("Unknown virtual host: '") => M::NoVirtualHost,
            404 => M::Missing,
            405 => M::ExclusiveQueue,
            406 if starts("cannot declare queue '") => M::QueueLimit,
            406 if starts("Server low on disk space") => M::Other,
            406 if starts("Queue name isn't valid") => M::InvalidName,
            406 if starts("delivery acknowledgement on channel ") => M::AckTimeout,
            406 if starts("consumer timeout") || ends("consumer timeout") => M::AckTimeout,
            406 if starts("message size ") => M::TooLarge,
            406 if starts("invalid arg 'x-priority' for queue '") => M::Stream,
            406 if starts("x-priority not supported on stream") => M::Stream,
            406 => M::Precondition,
            320 if text == "credential expired" => M::TokenExpired,
            311 => M::TooLarge,
            530 if starts("number of channels opened") => M::Limit,
            530 if starts("Connection refused for user '") => M::Limit,
            530 if starts("New secret was refused") || starts("Secret update failed") => M::NewTokenRefused,
            // Broker-J, and two versions of GarageMQ.
            530 if ["Authentication failed", "login failure", "Authorization failed"].contains(&text) => {
                M::LoginRefused
            }
            530 if starts("vhost ") => M::NoVirtualHost,
            530 if ends(") is reached") => M::Limit,
            530 if ends("not found") || ends("doesn't exist") => M::NoVirtualHost,
            // A limit or a permission: the end of the text, which is cut off, would tell.
            530 if is_cut => M::Other,
            530 => M::VirtualHostRefused,
            540 => M::NotImplemented,
            _ => M::Other,
        }
    }
}

/// Goes by the text's end, as names stand before it (the OAuth 2 plugin of RabbitMQ 3.10 and 4.0).
fn token_expired(text: &str) -> bool {
    let Some((_, end)) = text.rsplit_once(": \"Provided JWT token has expired at timestamp ") else {
        return false;
    };
    let end = end.trim_start_matches(|c: char| c.is_ascii_digit());
    let end = end.strip_prefix(" (validated at ").and_then(|end| end.strip_suffix(")\""));
    end.is_some_and(|time| time.bytes().all(|c| c.is_ascii_digit()))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text.as_str() {
            "" => write!(f, "reply code {}", self.code),
            // The shutdown of amqproxy has code 0.
            text if self.code < 200 => write!(f, "{text} (reply code {})", self.code),
            text => f.write_str(text),
        }
    }
}

/// What the broker was asked for when it refused.
#[derive(Clone, Copy)]
pub(super) enum Asked<'a> {
    Login(&'a Address),
    /// `action` is a phrase such as "consume from".
    Queue {
        action: &'a str,
        queue: &'a str,
    },
    Bind {
        queue: &'a str,
        exchange: &'a str,
    },
    /// `--declare` of qpublish, which gives the queue's type. That of qconsume is [`Queue`](Self::Queue).
    Declare(&'a str),
    /// To this exchange.
    Publish(&'a str),
    /// Nothing: it closed the channel or the connection while a message was held or waited for.
    Delivery {
        closed: &'a str,
        observed: &'a Observed,
    },
}

struct Row {
    exit: Exit,
    transient: bool,
    login_refused: bool,
    what: String,
    advice: String,
}

impl Row {
    fn new(exit: Exit, what: impl Into<String>, advice: impl Into<String>) -> Self {
        let transient = exit == Exit::Unavailable;
        Self { exit, transient, login_refused: false, what: what.into(), advice: advice.into() }
    }

    fn config(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(Exit::Config, what, advice)
    }

    fn unavailable(what: impl Into<String>) -> Self {
        Self::new(Exit::Unavailable, what, "")
    }

    fn not_permitted(what: impl Into<String>, credentials: Credentials<'_>) -> Self {
        Self::new(Exit::NoPermission, what, credentials.how_to_grant())
    }

    fn transient_if(self, transient: bool) -> Self {
        Self { transient, ..self }
    }
}

/// The table: the first match wins. Each row has a line in `every_row_of_the_table`.
fn row(asked: Asked<'_>, meaning: Meaning, credentials: Credentials<'_>) -> Row {
    use Asked::{Bind, Declare, Delivery, Login, Publish, Queue};
    use Meaning as M;
    let Credentials { user, virtual_host, file, .. } = credentials;
    // The next connection uses the password that is in the file then.
    let renewable = file.is_some();
    match (asked, meaning) {
        (Delivery { observed, .. }, M::AckTimeout) => {
            Row::new(Exit::Unconfirmed, "acknowledgement timeout", how_to_raise_ack_timeout(observed))
        }
        (_, M::TokenExpired | M::NewTokenRefused) if !matches!(asked, Login(_)) => {
            let expired = meaning == M::TokenExpired;
            let what = if expired { "the token has expired" } else { "the broker refused the new token" };
            let exit = match asked {
                // qpublish doesn't try again by itself: 75 tells its caller that another run may succeed.
                Publish(_) if renewable => Exit::Unconfirmed,
                _ => Exit::NoPermission,
            };
            Row::new(exit, what, credentials.how_to_renew()).transient_if(renewable)
        }
        (Delivery { closed, .. }, _) => Row::new(Exit::Unconfirmed, format!("the broker closed the {closed}"), ""),

        // The login. Behind a proxy, anything may have been asked: see `Connector::login_accepted`.
        (Login(address), M::LoginRefused) if address.logs_in_by_certificate() => Row::new(
            Exit::NoPermission,
            "the broker refused the login by client certificate (EXTERNAL)",
            "create a user of the certificate's name, or give a password",
        ),
        (_, M::LoginRefused) => {
            let what = format!("the broker refused the login of user {user:?}");
            // `Connector::note_login_refused` decides whether it is transient.
            Row { login_refused: true, ..Row::new(Exit::NoPermission, what, credentials.advice_on_login()) }
        }
        (_, M::NoVirtualHost) | (Login(_), M::Missing) => {
            let what = format!("the broker has no virtual host {virtual_host:?}");
            Row::config(what, "create it, or correct its name (the URL's path, or --vhost)")
        }
        (_, M::VirtualHostRefused) => {
            Row::not_permitted(format!("user {user:?} may not use virtual host {virtual_host:?}"), credentials)
        }
        (Login(_), _) => Row::unavailable("the broker closed the connection"),

        (Publish(exchange), M::Missing | M::NoExchange) => Row::config(
            format!("there is no exchange {exchange:?} in this virtual host"),
            "declare it, or check the name",
        ),
        (Publish(exchange), M::InternalExchange) => {
            Row::config(format!("exchange {exchange:?} is internal"), "only exchanges publish to it: name another")
        }
        (Publish(_), M::NotPermitted) => Row::not_permitted(format!("user {user:?} may not publish here"), credentials),
        (Publish(_), M::TooLarge) => Row::config(
            "the message is too large for this broker",
            "raise max_message_size in its rabbitmq.conf, or split the message",
        ),
        (Publish(_), M::Precondition | M::NotImplemented) => {
            Row::config("the broker refused a message", "check its properties and headers")
        }
        (Publish(_), _) => Row::new(Exit::Unconfirmed, "the broker closed the channel or the connection", ""),

        // What is missing is tried again: somebody may still declare it.
        (Bind { queue, exchange }, M::NoExchange) => {
            let what = format!("there is no exchange {exchange:?} to bind queue {queue:?} to");
            Row::config(what, "declare it, or check the name and the virtual host").transient_if(true)
        }
        (Declare(queue), M::Precondition) => {
            let what = format!("queue {queue:?} exists and is another kind of queue");
            Row::config(what, "publish to it without --declare, or name another")
        }
        (Queue { action, queue }, _) => queue_row(action, queue, meaning, credentials),
        (Bind { queue, .. }, _) => queue_row("bind", queue, meaning, credentials),
        (Declare(queue), _) => queue_row("declare", queue, meaning, credentials),
    }
}

/// The rows for everything that is done with a queue.
fn queue_row(action: &str, queue: &str, meaning: Meaning, credentials: Credentials<'_>) -> Row {
    use Meaning as M;
    let cannot = format!("can't {action} queue {queue:?}");
    match meaning {
        M::Missing | M::NoExchange => {
            let what = format!("there is no queue {queue:?} to {action}");
            Row::config(what, "declare it, or check QUEUE and the virtual host").transient_if(true)
        }
        M::ReservedName => Row::config(cannot, "names that begin with amq. are the broker's own"),
        M::InvalidName => Row::config(cannot, "choose another name"),
        M::QueueDown => Row::unavailable(format!("queue {queue:?} is not available now")),
        M::ExclusiveConsumer => {
            Row::config(format!("queue {queue:?} has an exclusive consumer"), "stop it, or use another queue")
        }
        M::Stream => Row::config(
            format!("queue {queue:?} is a stream, which keeps its messages"),
            "bind a quorum queue to the same exchange and use that, or read the stream with a client that keeps its offset",
        ),
        M::ExclusiveQueue => {
            Row::config(format!("queue {queue:?} is exclusive to another connection"), "use another queue")
        }
        M::NotPermitted => {
            let user = credentials.user;
            Row::not_permitted(format!("user {user:?} may not {action} queue {queue:?}"), credentials)
        }
        M::QueueLimit => Row::config(cannot, "raise the limit, or delete queues"),
        M::Limit | M::Other => Row::unavailable(format!("{cannot} now")),
        _ => Row::config(format!("{cannot} with these options"), "compare them with the queue's type and properties"),
    }
}

/// The acknowledgement timeout has moved: since RabbitMQ 3.12 a queue can set it, since 4.3 a consumer.
fn how_to_raise_ack_timeout(observed: &Observed) -> &'static str {
    if observed.may_know_ack_timeout() {
        "raise --ack-timeout, the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in the \
         broker's configuration"
    } else if observed.version >= Some((3, 12)) {
        "raise the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"
    } else {
        "raise consumer_timeout in the broker's rabbitmq.conf"
    }
}

/// Why connecting, subscribing or publishing failed.
#[derive(Debug)]
pub struct ConnectError {
    pub transient: bool,
    /// How the run ends if no other try succeeds.
    pub failure: Failure,
    pub(super) login_refused: bool,
}

/// A failure is transient if its status is `Unavailable`, unless the table says otherwise.
impl From<Failure> for ConnectError {
    fn from(failure: Failure) -> Self {
        Self { transient: failure.exit == Exit::Unavailable, failure, login_refused: false }
    }
}

impl ConnectError {
    pub(super) fn transient(message: impl Into<String>) -> Self {
        Failure::new(Exit::Unavailable, message).into()
    }

    pub(super) fn no_answer(stage: &str) -> Self {
        Self::transient(format!("no answer while {stage}"))
    }

    pub(super) fn config(message: impl Into<String>) -> Self {
        Failure::config(message).into()
    }

    /// If memory or descriptors run out here, that isn't the broker's fault.
    pub(super) fn of_system(what: impl fmt::Display, error: &io::Error) -> Self {
        if crate::exit::is_shortage(error) {
            Failure::system(what, error).into()
        } else {
            Self::transient(format!("{what}: {error}"))
        }
    }

    /// The message is "what happened: the broker's text; what to do".
    pub(super) fn from_refusal(asked: Asked<'_>, refusal: &Refusal, credentials: Credentials<'_>) -> Self {
        let meaning = match asked {
            // Before connection.open-ok a 403 is always the login; for the virtual host it is 530.
            Asked::Login(_) if refusal.code == 403 => Meaning::LoginRefused,
            _ => credentials.meaning_of(refusal),
        };
        let Row { exit, transient, login_refused, what, advice } = row(asked, meaning, credentials);
        let separator = if advice.is_empty() { "" } else { "; " };
        let failure = Failure::new(exit, format!("{what}: {refusal}{separator}{advice}"));
        Self { transient, failure, login_refused }
    }

    pub(super) fn after_handshake(error: &lapin::Error, connection: &OpenConnection, asked: Asked<'_>) -> Self {
        let observed = connection.observed();
        if let (Some(problem), Asked::Queue { queue, .. }) = (&observed.unreadable, asked) {
            return unreadable_message(queue, problem).into();
        }
        match (observed.refusal(error), asked) {
            (Some(refusal), _) => Self::from_refusal(asked, &refusal, connection.credentials.now()),
            (None, Asked::Publish(_)) => Failure::new(Exit::Unconfirmed, described(error)).into(),
            (None, _) => Self::transient(format!("the connection failed: {}", described(error))),
        }
    }

    pub(super) fn in_handshake(
        error: &lapin::Error,
        observed: &Observed,
        address: &Address,
        file: Option<&Path>,
    ) -> Self {
        if let Some(refusal) = observed.refusal(error) {
            let token = Token::parse(address.password.expose());
            let credentials = Credentials { user: &address.username, virtual_host: &address.virtual_host, token, file };
            return Self::from_refusal(Asked::Login(address), &refusal, credentials);
        }
        let mechanisms = observed.mechanisms.as_deref();
        // RabbitMQ 3.10 and 4.3 close without a reason if they don't offer what we ask for.
        if address.logs_in_by_certificate()
            && mechanisms.is_some_and(|names| !names.split(' ').any(|name| name == "EXTERNAL"))
        {
            return Self::config(
                "the broker doesn't offer the login by client certificate (EXTERNAL): enable its plugin \
                 rabbitmq_auth_mechanism_ssl and list EXTERNAL in auth_mechanisms, or give a password",
            );
        }
        match error.kind() {
            ErrorKind::IOError(error) => Self::lost_in_handshake(error, observed, address),
            ErrorKind::InvalidProtocolVersion(version) => Self::config(match version.to_string().as_str() {
                "0.9.1" => {
                    "the broker speaks AMQP 0-9-1, but got something else first: if a load balancer sends the PROXY \
                     protocol (HAProxy: send-proxy), turn that off, or set proxy_protocol = true in rabbitmq.conf"
                        .to_owned()
                }
                version => format!("the broker speaks AMQP {version} here, not 0-9-1"),
            }),
            ErrorKind::ParsingError(_) if mechanisms.is_none() => Self::config(if address.tls {
                "what answers isn't AMQP: check the port"
            } else {
                "what answers isn't AMQP: check the port; one for TLS needs amqps://"
            }),
            _ => Self::transient(format!("the AMQP handshake failed: {}", described(error))),
        }
    }

    fn lost_in_handshake(error: &io::Error, observed: &Observed, address: &Address) -> Self {
        if let Some(alert) = tls_errors::alert_after_handshake(error, address) {
            return alert;
        }
        if !is_disconnect(error) {
            return Self::of_system("the AMQP handshake failed", error);
        }
        if let Some(problem) = credentials_problem(observed, address) {
            return Self::config(format!("the broker closed the connection when it got the credentials: {problem}"));
        }
        if let Some(problem) = frame_max_problem(observed, address) {
            return Self::config(format!("the broker closed the connection during the AMQP handshake: {problem}"));
        }
        let greeted = observed.mechanisms.is_some();
        Self::transient(match (greeted, address.tls) {
            (true, _) => {
                "the broker closed the connection during the AMQP handshake without saying why; its log may tell"
            }
            (false, true) => {
                "the connection was closed during the AMQP handshake: the port isn't for AMQP, or a load balancer has no \
                 backend"
            }
            (false, false) => {
                "the connection was closed during the AMQP handshake: the port isn't for AMQP, or is for TLS (amqps://), \
                 or a load balancer has no backend"
            }
        })
    }
}

/// Whether RabbitMQ has closed the connection because the credentials are too long for its first frame.
fn credentials_problem(observed: &Observed, address: &Address) -> Option<String> {
    let bytes = address.username.len() + address.password.expose().len();
    let limit = match observed.version {
        Some((4.., _)) => HANDSHAKE_FRAME_MAX_SINCE_4,
        _ => HANDSHAKE_FRAME_MAX,
    };
    // Between connection.start and connection.tune, which proposes a heartbeat.
    let got_credentials_last = observed.mechanisms.is_some() && observed.heartbeat.is_none();
    (got_credentials_last && !observed.is_another_product && bytes + CLIENT_PROPERTIES_MAX > limit).then(|| {
        format!(
            "user and password have {bytes} bytes, and this RabbitMQ takes {limit} for the whole frame; use a shorter \
             token"
        )
    })
}

/// Whether the frame size made the broker close the connection. RabbitMQ gives no reason for that.
fn frame_max_problem(observed: &Observed, address: &Address) -> Option<String> {
    let theirs = observed.frame_max.filter(|size| *size > 0).unwrap_or(u32::MAX);
    let ours = address.frame_max();
    // What lapin 4.12 answers.
    let answered = if theirs < ours { theirs.max(LAPIN_FRAME_MIN) } else { ours };
    if answered > theirs {
        return Some(format!(
            "its frame_max is {theirs} bytes, and this client needs {LAPIN_FRAME_MIN}: raise frame_max in rabbitmq.conf"
        ));
    }
    let has_proposed = observed.frame_max.is_some();
    (has_proposed && answered < RABBITMQ_FRAME_MIN && observed.version >= Some((4, 1))).then(|| {
        format!(
            "this RabbitMQ takes no frame_max below {RABBITMQ_FRAME_MIN} bytes, and the URL asks for {ours}: leave frame_max out of the URL"
        )
    })
}

/// Why a delivery or the subscription was lost. It has no exit status: that depends on what the command has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryLost {
    cause: Cause,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Unreadable,
    LostTwice,
    Other,
}

impl DeliveryLost {
    pub(super) fn because(text: impl Into<String>) -> Self {
        Self { cause: Cause::Other, text: text.into() }
    }

    pub(super) fn from_error(error: &lapin::Error, connection: &OpenConnection) -> Self {
        let observed = connection.observed();
        if let Some(problem) = &observed.unreadable {
            return Self { cause: Cause::Unreadable, text: problem.clone() };
        }
        let Some(refusal) = observed.refusal(error) else {
            return Self::because(described(error));
        };
        let closed = match error.kind() {
            // AMQP 0-9-1, 1.2: of the codes below 500, only 320 closes the connection (and 402, at the login).
            ErrorKind::ProtocolError(error) if error.get_id() < 500 && error.get_id() != 320 => "channel",
            ErrorKind::ParsingError(_) => "channel or the connection",
            _ => "connection",
        };
        let asked = Asked::Delivery { closed, observed: &observed };
        // Only the text counts: the status depends on the command.
        Self::because(ConnectError::from_refusal(asked, &refusal, connection.credentials.now()).failure.message)
    }

    /// Without an error: the consumer was cancelled, or lapin has dropped a close whose code it doesn't know.
    pub(super) fn ended(observed: &Observed) -> Self {
        const CANCELLED: &str = "the broker cancelled the consumer: the queue was deleted or has moved";
        match (&observed.unreadable, &observed.closed) {
            (Some(problem), _) => Self { cause: Cause::Unreadable, text: problem.clone() },
            (None, Some(refusal)) if !observed.consumer.cancelled => {
                Self::because(format!("the broker closed the channel or the connection: {refusal}"))
            }
            _ if observed.may_know_ack_timeout() => Self::because(format!(
                "{CANCELLED}, or its acknowledgement timeout has passed ({})",
                how_to_raise_ack_timeout(observed)
            )),
            _ => Self::because(CANCELLED),
        }
    }

    /// See `Settling::means_requeued`. The other message is requeued when the connection ends.
    pub(super) fn delivered_again() -> Self {
        Self::because(
            "the broker delivered another message, so it has requeued this one; in a cluster, its nodes may have lost \
             each other, or the queue's leader may have changed",
        )
    }

    /// The broker has closed the channel because of the acknowledgement timeout; lapin doesn't always say so.
    pub(super) fn timed_out(observed: &Observed) -> Self {
        Self::because(format!("acknowledgement timeout: {}", how_to_raise_ack_timeout(observed)))
    }

    /// This was the second connection that was lost while a message arrived, and no message arrived in between.
    pub(super) fn for_the_second_time(self) -> Self {
        let cause = if self.cause == Cause::Unreadable { Cause::Unreadable } else { Cause::LostTwice };
        Self { cause, ..self }
    }

    /// The end of the run, if a new connection would only get the same message: each delivery counts towards the
    /// queue's `delivery-limit`, at which the broker dead-letters or drops the message.
    pub fn end_of_run(&self, queue: &str) -> Option<Failure> {
        match self.cause {
            Cause::Unreadable => Some(unreadable_message(queue, &self.text)),
            Cause::LostTwice => Some(lost_twice(queue, &self.text)),
            Cause::Other => None,
        }
    }
}

impl fmt::Display for DeliveryLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            Cause::Unreadable => write!(f, "the broker delivered another message, which can't be read: {}", self.text),
            Cause::LostTwice | Cause::Other => f.write_str(&self.text),
        }
    }
}

fn unreadable_message(queue: &str, problem: &str) -> Failure {
    Failure::new(
        Exit::Software,
        format!(
            "the next message in queue {queue:?} can't be read: {problem}; it is requeued, and every worker gets it: \
             {REMOVE_MESSAGE}"
        ),
    )
}

/// Whether the message or something else ended both connections can't be known here.
pub(super) fn lost_twice(queue: &str, last_error: &str) -> Failure {
    Failure::new(
        Exit::Software,
        format!(
            "two connections were lost while a message from queue {queue:?} arrived, and no message arrived in between; \
             the last error: {last_error}; the message is requeued: check the broker's log, and what is between it and here; \
             if you find nothing, the message may be one that can't be read: {REMOVE_MESSAGE}"
        ),
    )
}

pub(super) fn described(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::MissingHeartbeatError => {
            "the broker has been silent for two heartbeat intervals: frozen, or cut off from here".to_owned()
        }
        ErrorKind::IOError(error) if is_disconnect(error) => {
            "the broker closed the connection without saying why; if it does so again, the idle timeout of a load balancer \
             may be too short for --heartbeat"
                .to_owned()
        }
        ErrorKind::IOError(error) if error.kind() == io::ErrorKind::InvalidData => {
            format!("what the broker sent can't be read: {error}")
        }
        ErrorKind::IOError(error) => format!("the connection broke: {error}"),
        ErrorKind::ParsingError(error) => format!("what the broker sent can't be read: {error}"),
        ErrorKind::ProtocolError(error) => format!("the broker sent what AMQP doesn't allow: {}", error.get_message()),
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => {
            "the channel or the connection is closed".to_owned()
        }
        _ => error.to_string(),
    }
}

fn is_disconnect(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

#[cfg(test)]
mod tests;
