//! What the broker's refusals mean, by reply code and the fixed parts of the text; refused.rs says what each leads to.
use crate::exit::{Exit, Failure};
use lapin::ErrorKind;
use std::{fmt, io};

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
    /// The token that the user is logged in with has expired.
    TokenExpired,
    /// The token that was to take its place is refused.
    NewTokenRefused,
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
            403 if token_expired(text) => M::TokenExpired,
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
            320 if text == "credential expired" => M::TokenExpired,
            311 => M::TooLarge,
            530 if starts("number of channels opened") => M::Limit,
            530 if starts("Connection refused for user '") => M::Limit,
            530 if starts("New secret was refused") => M::NewTokenRefused,
            530 if starts("vhost ") => M::Missing,
            530 if ends(") is reached") => M::Limit,
            530 if ends("not found") || ends("doesn't exist") => M::Missing,
            530 => M::NotPermitted,
            540 => M::NotImplemented,
            _ => M::Other,
        }
    }
}

/// Whether a text ends as the OAuth 2 plugin's does (seen with RabbitMQ 3.10 and 4.0): `… "Provided JWT token has expired
/// at timestamp 1796065016 (validated at 1796065021)"`. Names stand before that.
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
            text if self.code < 200 => write!(f, "{text} (reply code {})", self.code),
            text => f.write_str(text),
        }
    }
}

/// An attempt that failed: whether another one may help, and how the run ends if none does.
#[derive(Debug)]
pub struct ConnectError {
    /// It may pass by itself.
    pub transient: bool,
    /// What the run ends with when it doesn't.
    pub failure: Failure,
    /// The broker refused the user and the password.
    pub(super) login_refused: bool,
}

/// Where the status says that the broker is not reachable, another attempt may help.
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

    /// What an error of a system call on the way to the broker means; a shortage here is none of the broker's.
    pub(super) fn of_system(what: impl fmt::Display, error: &io::Error) -> Self {
        if crate::exit::is_shortage(error) {
            Failure::system(what, error).into()
        } else {
            Self::transient(format!("{what}: {error}"))
        }
    }
}

/// The end of a run whose next message can't be read: every new connection would get it again.
pub(super) fn unreadable(queue: &str, problem: &str) -> Failure {
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
            "the broker has been silent for two heartbeat intervals: frozen, or cut off from here".to_owned()
        }
        ErrorKind::IOError(error) if closed(error) => "the broker closed the connection without saying why".to_owned(),
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

pub(super) fn closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

#[cfg(test)]
mod tests;
