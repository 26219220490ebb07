//! What the broker's errors mean: which pass by themselves, which exit status they have, what to do about them.

use super::{
    address::{Address, AuthMechanism},
    frames::Version,
    tls,
};
use crate::exit::{Exit, Failure};
use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};
use std::{fmt, io};

/// An attempt that failed: whether another one may help, and how the run ends if none does.
#[derive(Debug)]
pub struct ConnectError {
    /// It may pass by itself.
    pub transient: bool,
    /// What the run ends with when it doesn't.
    pub failure: Failure,
    /// The queue isn't there: the connection is good, so only the channel is opened anew.
    pub queue_missing: bool,
}

impl ConnectError {
    pub(super) fn transient(message: impl Into<String>) -> Self {
        Self {
            transient: true,
            failure: Failure::new(Exit::Unavailable, message),
            queue_missing: false,
        }
    }

    pub(super) fn permanent(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            transient: false,
            failure: Failure::new(exit, message),
            queue_missing: false,
        }
    }

    fn queue_missing(message: impl Into<String>) -> Self {
        Self {
            transient: true,
            failure: Failure::new(Exit::Config, message),
            queue_missing: true,
        }
    }

    /// What an error during the AMQP handshake, up to `connection.open-ok`, means.
    pub(super) fn in_handshake(error: &lapin::Error, address: &Address) -> Self {
        if let ErrorKind::IOError(error) = error.kind()
            && let Some(refusal) = tls::refusal(error, address)
        {
            return refusal;
        }
        let (user, vhost) = (&address.username, &address.virtual_host);
        let external = address.parameters.auth_mechanism == Some(AuthMechanism::External);
        match protocol(error) {
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) if external => {
                Self::permanent(
                    Exit::NoPermission,
                    format!(
                        "the broker refused the login by client certificate (EXTERNAL): {text}; a user of the certificate's name has to be there, or give a password"
                    ),
                )
            }
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) => Self::permanent(
                Exit::NoPermission,
                format!(
                    "the broker refused the login of user {user:?}: {text}; check the user and the password"
                ),
            ),
            // The only NOT_ALLOWED that passes by itself is a limit: of connections per virtual host, user or node.
            Some((AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED), text))
                if !text.contains("limit") =>
            {
                if text.contains("not found") {
                    Self::permanent(
                        Exit::Config,
                        format!("the broker has no virtual host {vhost:?}: {text}"),
                    )
                } else {
                    Self::permanent(
                        Exit::NoPermission,
                        format!("user {user:?} may not use virtual host {vhost:?}: {text}"),
                    )
                }
            }
            Some((_, text)) => Self::transient(format!("the broker closed the connection: {text}")),
            None => match error.kind() {
                ErrorKind::IOError(error) if closed(error) => Self::transient(
                    "the connection was closed during the AMQP handshake; is this an AMQP port, and not one for TLS?",
                ),
                ErrorKind::InvalidProtocolVersion(version) => Self::permanent(
                    Exit::Config,
                    format!("the broker speaks AMQP {version} here, not 0-9-1"),
                ),
                ErrorKind::ParsingError(_) => Self::permanent(
                    Exit::Config,
                    "what answers isn't AMQP; is the port right, and if it is one for TLS, does the URL begin with amqps://?",
                ),
                _ => Self::transient(format!("the AMQP handshake failed: {error}")),
            },
        }
    }

    /// What an error while something is made for the consumer means.
    pub(super) fn in_setup(error: &lapin::Error, what: &str, queue: &str) -> Self {
        match protocol(error) {
            Some((AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND), text)) => {
                Self::queue_missing(format!(
                    "can't {what} queue {queue:?}: {text}; declare it, or check the name and the virtual host"
                ))
            }
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) => Self::permanent(
                Exit::NoPermission,
                format!("the broker refused to let this user {what} queue {queue:?}: {text}"),
            ),
            Some((AMQPErrorKind::Soft(_), text))
            | Some((
                AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED | AMQPHardError::NOTIMPLEMENTED),
                text,
            )) => Self::permanent(
                Exit::Config,
                format!("can't {what} queue {queue:?}: {text}"),
            ),
            Some((_, text)) => Self::transient(format!("can't {what} queue {queue:?} now: {text}")),
            None => Self::transient(format!("the connection failed: {}", said(error))),
        }
    }

    /// What an error from `channel.open` or to `basic.consume` means.
    pub(super) fn in_consume(error: &lapin::Error, queue: &str) -> Self {
        match protocol(error) {
            Some((AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND), text)) => {
                if text.contains("down or inaccessible") || text.contains("stopped by supervisor") {
                    Self::transient(format!("queue {queue:?} is not available now: {text}"))
                } else {
                    Self::queue_missing(format!(
                        "there is no queue {queue:?}: {text}; declare it, or check QUEUE and the virtual host"
                    ))
                }
            }
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text))
                if text.contains("exclusive use") =>
            {
                Self::permanent(
                    Exit::Config,
                    format!("queue {queue:?} has an exclusive consumer: {text}"),
                )
            }
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) => Self::permanent(
                Exit::NoPermission,
                format!("the broker refused to let this user read from queue {queue:?}: {text}"),
            ),
            Some((AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED), text)) => Self::permanent(
                Exit::Config,
                format!("queue {queue:?} is exclusive to another connection: {text}"),
            ),
            Some((AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), text)) => {
                Self::permanent(
                    Exit::Config,
                    format!("queue {queue:?} can't be consumed from like this: {text}"),
                )
            }
            Some((AMQPErrorKind::Hard(AMQPHardError::NOTIMPLEMENTED), text)) => Self::permanent(
                Exit::Config,
                format!("queue {queue:?} can't be consumed from like this: {text}"),
            ),
            Some((_, text)) => Self::transient(format!(
                "the broker refused to let queue {queue:?} be consumed from: {text}"
            )),
            None => Self::transient(format!("the connection failed: {}", said(error))),
        }
    }
}

/// Why a delivery, or the consumer that waits for one, isn't ours any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryLost {
    text: String,
    /// What the broker sent can't be read, so that it would come again over every new connection.
    pub unreadable: bool,
}

impl DeliveryLost {
    pub(super) fn new(error: &lapin::Error, version: Option<Version>) -> Self {
        let text = match protocol(error) {
            Some((AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), text))
                if text.contains("timed out") =>
            {
                format!(
                    "acknowledgement timeout: {text}; {}",
                    what_to_raise(version)
                )
            }
            Some((AMQPErrorKind::Soft(_), text)) => {
                format!("the broker closed the channel: {text}")
            }
            Some((AMQPErrorKind::Hard(_), text)) => {
                format!("the broker closed the connection: {text}")
            }
            None => said(error),
        };
        Self {
            text,
            unreadable: matches!(error.kind(), ErrorKind::ParsingError(_)),
        }
    }

    /// The broker has closed the channel because of the acknowledgement timeout, which lapin forgets to tell.
    pub(super) fn timed_out(version: Option<Version>) -> Self {
        Self {
            text: format!("acknowledgement timeout: {}", what_to_raise(version)),
            unreadable: false,
        }
    }

    /// The broker ended the consumer without a word about why.
    pub(super) fn cancelled(version: Option<Version>) -> Self {
        let mut text =
            "the broker cancelled the consumer: the queue was deleted or has moved".to_owned();
        if version >= Some((4, 3)) {
            text += ", or its acknowledgement timeout has passed (";
            text += what_to_raise(version);
            text += ")";
        }
        Self {
            text,
            unreadable: false,
        }
    }
}

impl fmt::Display for DeliveryLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The setting behind the acknowledgement timeout, which has moved with the versions.
fn what_to_raise(version: Option<Version>) -> &'static str {
    match version {
        Some(version) if version >= (4, 3) => {
            "raise --ack-timeout, the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"
        }
        Some(version) if version >= (3, 12) => {
            "raise the queue's x-consumer-timeout or consumer-timeout policy, or consumer_timeout in rabbitmq.conf"
        }
        _ => "raise consumer_timeout in the broker's rabbitmq.conf",
    }
}

/// The broker's own words, when it is the broker that speaks.
pub(super) fn protocol(error: &lapin::Error) -> Option<(&AMQPErrorKind, String)> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some((error.kind(), error.get_message().to_string())),
        _ => None,
    }
}

/// lapin's errors that don't come from the broker, in words for people.
pub(super) fn said(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::MissingHeartbeatError => {
            "the broker has been silent for two heartbeat intervals: frozen, or cut off from here"
                .to_owned()
        }
        ErrorKind::IOError(error) if closed(error) => {
            "the broker closed the connection without a word".to_owned()
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
        io::ErrorKind::ConnectionAborted | io::ErrorKind::UnexpectedEof
    )
}
