//! What the broker's refusals mean, by reply code and the fixed parts of the text, and what each leads to: two tables.

use super::{address::Address, connection::OpenConnection, tap::Observed, tls};
use crate::exit::{Exit, Failure};
use lapin::ErrorKind;
use std::{fmt, io};

/// Largest `connection.start-ok` frame, in bytes, that RabbitMQ takes before and since 4.0: with a longer one it ends
/// the connection without a word (seen with 3.10 and 4.3).
const HANDSHAKE_FRAME_MAX: usize = 4096;
const HANDSHAKE_FRAME_MAX_SINCE_4: usize = 8192;
/// What that frame holds besides the credentials: the client's properties, at most.
const START_OK_REST: usize = 1024;

/// What a refusal means, as far as that doesn't depend on what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A limit of connections, channels or queues is reached.
    Limit,
    /// The queue is there, but none of its replicas answers.
    QueueDown,
    /// There is no such queue, exchange or virtual host.
    Missing,
    /// Another consumer has the queue to itself.
    ExclusiveConsumer,
    /// The queue is another connection's own.
    ExclusiveQueue,
    /// The user lacks a permission.
    NotPermitted,
    /// The delivery wasn't acknowledged in time.
    AckTimeout,
    /// A message is larger than the broker takes.
    TooLarge,
    /// What was asked for contradicts what is there.
    Precondition,
    /// The broker doesn't do what was asked for.
    NotImplemented,
    /// Anything else: the broker's own trouble, which may pass.
    Other,
}

/// What the broker said as it closed a channel or the connection.
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

    /// The refusal behind an error, if it is one. Of a code that lapin doesn't know the tap has the text.
    pub(super) fn of(error: &lapin::Error, observed: &Observed) -> Option<Self> {
        match error.kind() {
            ErrorKind::ProtocolError(error) => Some(Self::new(error.get_id(), error.get_message())),
            ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => {
                observed.closed.clone()
            }
            ErrorKind::ParsingError(_) if observed.closed_unreadably => observed.closed.clone(),
            _ => None,
        }
    }

    /// By the reply code (AMQP 0-9-1, 1.2) and the part of the text that no user chooses, as seen from RabbitMQ 3.10, 4.0
    /// and 4.3, and LavinMQ 2.9: names stand in its middle, in quotes. A beginning is better than an end, as a text has
    /// 255 bytes at most and long names push the end out of it.
    pub(super) fn meaning(&self) -> Meaning {
        use Meaning as M;
        // RabbitMQ puts the code's name before the text: "NOT_FOUND - no queue …".
        let text = match self.text.split_once(" - ") {
            Some((name, rest)) if name.bytes().all(|c| c.is_ascii_uppercase() || c == b'_') => rest,
            _ => &self.text,
        };
        let starts = |with: &str| text.starts_with(with);
        let ends = |with: &str| text.ends_with(with);
        match self.code {
            403 if ends("' in exclusive use") => M::ExclusiveConsumer,
            403 => M::NotPermitted,
            404 if starts("queue '") || starts("home node '") => M::QueueDown,
            404 if starts("failed to perform operation on ") => M::QueueDown,
            404 if ends(" is down or inaccessible") => M::QueueDown,
            404 if ends(" process is stopped by supervisor") => M::QueueDown,
            404 => M::Missing,
            405 => M::ExclusiveQueue,
            406 if starts("cannot declare queue '") => M::Limit,
            406 if ends("Server low on disk space") => M::Other,
            406 if starts("delivery acknowledgement on channel ") => M::AckTimeout,
            406 if starts("consumer timeout") || ends("consumer timeout") => M::AckTimeout,
            406 if starts("message size ") => M::TooLarge,
            406 => M::Precondition,
            311 => M::TooLarge,
            530 if starts("number of channels opened") => M::Limit,
            530 if starts("Connection refused for user '") => M::Limit,
            530 if starts("vhost ") => M::Missing,
            530 if ends(") is reached") => M::Limit,
            530 if ends("not found") || ends("doesn't exist") => M::Missing,
            530 => M::NotPermitted,
            540 => M::NotImplemented,
            _ => M::Other,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text.as_str() {
            "" => write!(f, "reply code {}", self.code),
            text if self.code < 200 => write!(f, "{text} (reply code {})", self.code),
            text => f.write_str(text),
        }
    }
}

/// What the broker was asked for when it refused.
#[derive(Clone, Copy)]
pub(super) enum Asked<'a> {
    /// To let us in, and into the virtual host.
    Login(&'a Address),
    /// For a queue, to do this with it: "consume from".
    Queue(&'a str, &'a str),
    /// To declare a queue of a given type.
    Declare(&'a str),
    /// To publish to this exchange.
    Publish(&'a str),
}

/// An attempt that failed: whether another one may help, and how the run ends if none does.
#[derive(Debug)]
pub struct ConnectError {
    /// It may pass by itself.
    pub transient: bool,
    /// What the run ends with when it doesn't.
    pub failure: Failure,
}

/// Where the status says that the broker is not reachable, another attempt may help.
impl From<Failure> for ConnectError {
    fn from(failure: Failure) -> Self {
        Self {
            transient: failure.exit == Exit::Unavailable,
            failure,
        }
    }
}

impl ConnectError {
    pub(super) fn transient(message: impl Into<String>) -> Self {
        Failure::new(Exit::Unavailable, message).into()
    }

    pub(super) fn no_answer(stage: &str) -> Self {
        Self::transient(format!("no answer while {stage}"))
    }

    fn config(message: impl Into<String>) -> Self {
        Failure::config(message).into()
    }

    /// What an error of a system call on the way to the broker means; a shortage here is none of the broker's.
    pub(super) fn of_system(what: impl fmt::Display, error: &io::Error) -> Self {
        if crate::exit::is_shortage(error) {
            Failure::system(what, error).into()
        } else {
            Self::transient(format!("{what}: {error}"))
        }
    }

    /// What an error during the AMQP handshake, up to `connection.open-ok`, means.
    pub(super) fn in_handshake(
        error: &lapin::Error,
        observed: &Observed,
        address: &Address,
    ) -> Self {
        if let Some(refusal) = Refusal::of(error, observed) {
            return Self::answer(Asked::Login(address), &refusal, &address.username);
        }
        let offered = observed.mechanisms.as_deref();
        match error.kind() {
            // Who asks for a mechanism that isn't offered is cut off without a word (seen with RabbitMQ 3.10 and 4.3).
            _ if address.logs_in_by_certificate()
                && offered
                    .is_some_and(|names| !names.split(' ').any(|name| name == "EXTERNAL")) =>
            {
                Self::config(
                    "the broker doesn't offer the login by client certificate (EXTERNAL): enable its plugin rabbitmq_auth_mechanism_ssl and list EXTERNAL in auth_mechanisms, or give a password",
                )
            }
            ErrorKind::IOError(error) => Self::lost_in_handshake(error, observed, address),
            ErrorKind::InvalidProtocolVersion(version) => {
                Self::config(format!("the broker speaks AMQP {version} here, not 0-9-1"))
            }
            ErrorKind::ParsingError(_) if offered.is_none() => Self::config(if address.tls {
                "what answers isn't AMQP: check the port"
            } else {
                "what answers isn't AMQP: check the port; one for TLS needs amqps://"
            }),
            _ => Self::transient(format!("the AMQP handshake failed: {}", described(error))),
        }
    }

    fn lost_in_handshake(error: &io::Error, observed: &Observed, address: &Address) -> Self {
        if let Some(refusal) = tls::refusal(error, address) {
            return refusal;
        }
        if !closed(error) {
            return Self::of_system("the AMQP handshake failed", error);
        }
        let credentials = address.username.len() + address.password.expose().len();
        let limit = match observed.version {
            Some((4.., _)) => HANDSHAKE_FRAME_MAX_SINCE_4,
            _ => HANDSHAKE_FRAME_MAX,
        };
        let greeted = observed.mechanisms.is_some();
        if greeted && observed.heartbeat.is_none() && credentials + START_OK_REST > limit {
            return Self::config(format!(
                "the broker closed the connection when it got the credentials: user and password have {credentials} bytes, and this RabbitMQ takes {limit} for the whole frame; use a shorter token"
            ));
        }
        Self::transient(match (greeted, address.tls) {
            (true, _) => {
                "the broker closed the connection during the AMQP handshake without saying why; its log may"
            }
            (false, true) => {
                "the connection was closed during the AMQP handshake; is this an AMQP port?"
            }
            (false, false) => {
                "the connection was closed during the AMQP handshake; is this an AMQP port, and not one for TLS?"
            }
        })
    }

    /// What an error from `channel.open` on means.
    pub(super) fn refused(
        error: &lapin::Error,
        connection: &OpenConnection,
        asked: Asked<'_>,
    ) -> Self {
        let observed = connection.observed();
        match (Refusal::of(error, &observed), observed.unreadable, asked) {
            (_, Some(problem), Asked::Queue(_, queue)) => unreadable(queue, problem).into(),
            (Some(refusal), ..) => {
                Self::answer(asked, &refusal, &connection.lapin.status().username())
            }
            (None, _, Asked::Publish(_)) => {
                Failure::new(Exit::Unconfirmed, described(error)).into()
            }
            (None, ..) => Self::transient(format!("the connection failed: {}", described(error))),
        }
    }

    /// What a refusal leads to, by what was asked for and what it means.
    #[rustfmt::skip]
    pub(super) fn answer(asked: Asked<'_>, refusal: &Refusal, user: &str) -> Self {
        use {Exit::{Config, NoPermission, Unavailable, Unconfirmed}, Meaning as M};
        let meaning = refusal.meaning();
        let (exit, message) = match asked {
            // Before connection.open-ok a 403 is always the login; one for the virtual host is 530.
            Asked::Login(address) => match meaning {
                _ if refusal.code == 403 && address.logs_in_by_certificate() => (NoPermission, format!(
                    "the broker refused the login by client certificate (EXTERNAL): {refusal}; create a user of the certificate's name, or give a password")),
                _ if refusal.code == 403 => (NoPermission, format!(
                    "the broker refused the login of user {user:?}: {refusal}; check the user and the password")),
                M::Missing => (Config, format!(
                    "the broker has no virtual host {:?}: {refusal}; create it, or correct the URL's path", address.virtual_host)),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not use virtual host {:?}: {refusal}; grant it with rabbitmqctl set_permissions", address.virtual_host)),
                _ => (Unavailable, format!("the broker closed the connection: {refusal}")),
            },
            Asked::Publish(exchange) => match meaning {
                M::Missing => (Config, format!(
                    "there is no exchange {exchange:?} in this virtual host: {refusal}; declare it, or check the name")),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not publish here: {refusal}; grant it with rabbitmqctl set_permissions")),
                M::TooLarge => (Config, format!(
                    "too large for this broker: {refusal}; raise max_message_size in its rabbitmq.conf, or split it")),
                M::Precondition | M::NotImplemented => (Config, format!("the broker doesn't take messages like this: {refusal}")),
                _ => (Unconfirmed, format!("the broker stopped the publishing: {refusal}")),
            },
            Asked::Declare(queue) if meaning == M::Precondition => (Config, format!(
                "queue {queue:?} exists and is another kind of queue: {refusal}; publish to it without --declare, or name another")),
            Asked::Declare(queue) => return Self::answer(Asked::Queue("declare", queue), refusal, user),
            Asked::Queue(action, queue) => match meaning {
                M::Missing if refusal.code == 404 => {
                    let failure = Failure::new(Config, format!(
                        "there is no queue {queue:?} to {action}: {refusal}; declare it, or check QUEUE and the virtual host"));
                    // Somebody may declare it yet.
                    return Self { transient: true, failure };
                }
                M::QueueDown => (Unavailable, format!("queue {queue:?} is not available now: {refusal}")),
                M::ExclusiveConsumer => (Config, format!(
                    "queue {queue:?} has an exclusive consumer: {refusal}; stop it, or use another queue")),
                M::ExclusiveQueue => (Config, format!(
                    "queue {queue:?} is exclusive to another connection: {refusal}; use another queue")),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not {action} queue {queue:?}: {refusal}; grant it with rabbitmqctl set_permissions")),
                M::Limit if refusal.code == 406 => (Config, format!(
                    "can't {action} queue {queue:?}: {refusal}; raise the limit, or delete queues")),
                M::Limit | M::Other => (Unavailable, format!("can't {action} queue {queue:?} now: {refusal}")),
                _ => (Config, format!("can't {action} queue {queue:?} like this: {refusal}")),
            },
        };
        Failure::new(exit, message).into()
    }
}

/// The end of a run whose next message can't be read: every new connection would get it again.
pub fn unreadable(queue: &str, problem: &str) -> Failure {
    Failure::new(
        Exit::Software,
        format!(
            "the next message in queue {queue:?} can't be read: {problem}; it is requeued, and every worker gets it: remove it, for example with `rabbitmqadmin get queue=NAME ackmode=reject_requeue_false`"
        ),
    )
}

/// An error that isn't a refusal, in words for people.
pub(super) fn described(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::MissingHeartbeatError => {
            "the broker has been silent for two heartbeat intervals: frozen, or cut off from here"
                .to_owned()
        }
        ErrorKind::IOError(error) if closed(error) => {
            "the broker closed the connection without saying why".to_owned()
        }
        ErrorKind::IOError(error) if error.kind() == io::ErrorKind::InvalidData => {
            format!("what the broker sent can't be read: {error}")
        }
        ErrorKind::IOError(error) => format!("the connection broke: {error}"),
        ErrorKind::ParsingError(error) => format!("what the broker sent can't be read: {error}"),
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => {
            "the connection is closed".to_owned()
        }
        _ => error.to_string(),
    }
}

fn closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof
    )
}

#[cfg(test)]
mod tests;
