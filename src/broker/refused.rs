//! What is said, and done, when the broker refuses: by what it was asked for, and what its refusal means.

use super::errors::{ConnectError, Meaning, Refusal, closed, described, unreadable};
use super::reach::{
    address::Address,
    connection::OpenConnection,
    observed::Observed,
    tls_errors,
    token::{Credentials, Token},
};
use crate::exit::{Exit, Failure};
use lapin::ErrorKind;
use std::{io, path::Path};

/// Largest `connection.start-ok` frame, in bytes, that RabbitMQ takes before and since 4.0: with a longer one it ends
/// the connection without a word (seen with 3.10 and 4.3).
const HANDSHAKE_FRAME_MAX: usize = 4096;
const HANDSHAKE_FRAME_MAX_SINCE_4: usize = 8192;
/// What that frame holds besides the credentials: the client's properties, at most.
const START_OK_REST: usize = 1024;

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

impl ConnectError {
    /// What an error during the AMQP handshake, up to `connection.open-ok`, means.
    pub(super) fn in_handshake(
        error: &lapin::Error,
        observed: &Observed,
        address: &Address,
        file: Option<&Path>,
    ) -> Self {
        if let Some(refusal) = observed.refusal(error) {
            let token = Token::parse(address.password.expose());
            let credentials = Credentials { user: &address.username, token, file };
            return Self::answer(Asked::Login(address), &refusal, credentials);
        }
        let offered = observed.mechanisms.as_deref();
        match error.kind() {
            // Who asks for a mechanism that isn't offered is cut off without a word (seen with RabbitMQ 3.10 and 4.3).
            _ if address.logs_in_by_certificate()
                && offered.is_some_and(|names| !names.split(' ').any(|name| name == "EXTERNAL")) =>
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
        if let Some(refusal) = tls_errors::refusal(error, address) {
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
            (true, _) => "the broker closed the connection during the AMQP handshake without saying why; its log may",
            (false, true) => "the connection was closed during the AMQP handshake; is this an AMQP port?",
            (false, false) => {
                "the connection was closed during the AMQP handshake; is this an AMQP port, and not one for TLS?"
            }
        })
    }

    /// What an error from `channel.open` on means.
    pub(super) fn refused(error: &lapin::Error, connection: &OpenConnection, asked: Asked<'_>) -> Self {
        let observed = connection.observed();
        match (observed.refusal(error), &observed.unreadable, asked) {
            (_, Some(problem), Asked::Queue(_, queue)) => unreadable(queue, problem).into(),
            (Some(refusal), ..) => Self::answer(asked, &refusal, connection.login.credentials()),
            (None, _, Asked::Publish(_)) => Failure::new(Exit::Unconfirmed, described(error)).into(),
            (None, ..) => Self::transient(format!("the connection failed: {}", described(error))),
        }
    }

    /// What a refusal leads to, by what was asked for and what it means.
    #[rustfmt::skip]
    pub(super) fn answer(asked: Asked<'_>, refusal: &Refusal, credentials: Credentials<'_>) -> Self {
        use {Exit::{Config, NoPermission, Unavailable, Unconfirmed}, Meaning as M};
        let (meaning, user, grant) = (refusal.meaning(), credentials.user, credentials.how_to_grant());
        let (exit, message) = match asked {
            // Before connection.open-ok a 403 is always the login; one for the virtual host is 530.
            Asked::Login(address) => match meaning {
                _ if refusal.code == 403 && address.logs_in_by_certificate() => (NoPermission, format!(
                    "the broker refused the login by client certificate (EXTERNAL): {refusal}; create a user of the certificate's name, or give a password")),
                _ if refusal.code == 403 => {
                    let failure = Failure::new(NoPermission, format!(
                        "the broker refused the login of user {user:?}: {refusal}; {}", credentials.advice_on_login()));
                    return Self { transient: false, failure, login_refused: true };
                }
                M::Missing => (Config, format!(
                    "the broker has no virtual host {:?}: {refusal}; create it, or correct the URL's path", address.virtual_host)),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not use virtual host {:?}: {refusal}; {grant}", address.virtual_host)),
                _ => (Unavailable, format!("the broker closed the connection: {refusal}")),
            },
            _ if let Some(problem) = credentials.problem(refusal) => {
                let renewed = credentials.file.is_some();
                let exit = if renewed && matches!(asked, Asked::Publish(_)) { Unconfirmed } else { NoPermission };
                let failure = Failure::new(exit, problem);
                // Another connection logs in with what the file has then.
                return Self { transient: renewed, failure, login_refused: false };
            }
            Asked::Publish(exchange) => match meaning {
                M::Missing => (Config, format!(
                    "there is no exchange {exchange:?} in this virtual host: {refusal}; declare it, or check the name")),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not publish here: {refusal}; {grant}")),
                M::TooLarge => (Config, format!(
                    "too large for this broker: {refusal}; raise max_message_size in its rabbitmq.conf, or split it")),
                M::Precondition | M::NotImplemented => (Config, format!("the broker doesn't take messages like this: {refusal}")),
                _ => (Unconfirmed, format!("the broker stopped the publishing: {refusal}")),
            },
            Asked::Declare(queue) if meaning == M::Precondition => (Config, format!(
                "queue {queue:?} exists and is another kind of queue: {refusal}; publish to it without --declare, or name another")),
            Asked::Declare(queue) => return Self::answer(Asked::Queue("declare", queue), refusal, credentials),
            Asked::Queue(action, queue) => match meaning {
                M::Missing if refusal.code == 404 => {
                    let failure = Failure::new(Config, format!(
                        "there is no queue {queue:?} to {action}: {refusal}; declare it, or check QUEUE and the virtual host"));
                    // Somebody may declare it yet.
                    return Self { transient: true, failure, login_refused: false };
                }
                M::QueueDown => (Unavailable, format!("queue {queue:?} is not available now: {refusal}")),
                M::ExclusiveConsumer => (Config, format!(
                    "queue {queue:?} has an exclusive consumer: {refusal}; stop it, or use another queue")),
                M::ExclusiveQueue => (Config, format!(
                    "queue {queue:?} is exclusive to another connection: {refusal}; use another queue")),
                M::NotPermitted => (NoPermission, format!(
                    "user {user:?} may not {action} queue {queue:?}: {refusal}; {grant}")),
                M::Limit if refusal.code == 406 => (Config, format!(
                    "can't {action} queue {queue:?}: {refusal}; raise the limit, or delete queues")),
                M::Limit | M::Other => (Unavailable, format!("can't {action} queue {queue:?} now: {refusal}")),
                _ => (Config, format!("can't {action} queue {queue:?} like this: {refusal}")),
            },
        };
        Failure::new(exit, message).into()
    }
}
