//! Messages in flight to one exchange, and the broker's answer to each.

use super::{
    connection::OpenConnection,
    errors::{ConnectError, Meaning, Refusal, described},
    properties::{Properties, QueueType, Route},
    topology,
};
use crate::{
    exit::{Exit, Failure},
    report::HumanDuration,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, PublisherConfirm,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, LongString, ShortString},
};
use std::{
    collections::VecDeque,
    future::{Future, pending},
    pin::Pin,
    time::Duration,
};
use tokio::time::timeout;
use tokio_stream::StreamExt;

/// The broker's answer to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `basic.ack`: the broker has the message.
    Acked,
    /// `basic.ack`, and a message came back that no queue takes. Not necessarily this one: lapin 4.12 hands what was
    /// returned to whichever message is answered next. It is one that was in flight with it, so one behind the first
    /// `behind` ones.
    AckedWithReturn {
        /// How many messages were answered when this one was sent.
        behind: u64,
    },
    /// `basic.nack`: the broker refused it, as a full queue does.
    Nacked {
        /// Whether a message came back, too, as LavinMQ has it.
        returned: bool,
    },
}

/// What the publisher hears.
#[derive(Debug)]
pub enum Heard {
    /// The message that was being sent is sent.
    Sent,
    /// An answer to the next message; answers come in the order in which the messages were sent.
    Answer(Answer),
    /// The broker takes nothing from publishers for now, for this reason.
    Blocked(String),
    /// It does again.
    Unblocked,
    /// The channel or the connection is gone.
    Lost(PublishError),
}

/// What ended the publishing.
#[derive(Debug)]
pub struct PublishError {
    /// Why.
    pub failure: Failure,
    /// The message that is to blame, if it is known, counted from 1.
    pub message: Option<u64>,
}

type Sending = Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send>>;

/// A message that is being sent, or has no answer yet.
struct InFlight<T> {
    waits_for: T,
    /// Of its body, in bytes.
    size: usize,
    /// How many messages were answered when it was sent.
    behind: u64,
}

/// Publishes persistent, mandatory messages with publisher confirms, many in flight.
pub struct Publisher {
    connection: OpenConnection,
    channel: Channel,
    route: Route,
    properties: BasicProperties,
    sending: Option<InFlight<Sending>>,
    in_flight: VecDeque<InFlight<PublisherConfirm>>,
    answered: u64,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("route", &self.route)
            .field("in_flight", &self.in_flight.len())
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// Publishes on this connection.
    ///
    /// # Errors
    /// When the broker refuses, or hasn't answered within `limit`.
    pub async fn open(
        connection: OpenConnection,
        route: Route,
        properties: Properties,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let open = async {
            let channel = connection.connection().create_channel().await?;
            let confirms = ConfirmSelectOptions::default();
            channel.confirm_select(confirms).await?;
            lapin::Result::Ok(channel)
        };
        match within(limit, open).await? {
            Ok(channel) => Ok(Self {
                connection,
                channel,
                route,
                properties: properties.into_amqp(),
                sending: None,
                in_flight: VecDeque::new(),
                answered: 0,
            }),
            Err(error) => {
                let failure = publish_failure(&error, &connection, &route);
                connection.close().await;
                Err(failure)
            }
        }
    }

    /// Whether a message is still being sent; the next one has to wait.
    #[must_use]
    pub const fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Begins to send a message; [`Self::next`] goes on with it.
    pub fn publish(&mut self, body: Vec<u8>) {
        let size = body.len();
        let channel = self.channel.clone();
        let exchange = ShortString::from(self.route.exchange.as_str());
        let routing_key = ShortString::from(self.route.routing_key.as_str());
        let properties = self.properties.clone();
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        self.sending = Some(InFlight {
            waits_for: Box::pin(async move {
                channel
                    .basic_publish(exchange, routing_key, options, &body, properties)
                    .await
            }),
            size,
            behind: self.answered,
        });
    }

    /// The next thing to happen. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Heard {
        let answer = async {
            match self.in_flight.front_mut() {
                Some(first) => (&mut first.waits_for).await,
                None => pending().await,
            }
        };
        let sent = async {
            match &mut self.sending {
                Some(sending) => sending.waits_for.as_mut().await,
                None => pending().await,
            }
        };
        let events = &mut self.connection.events;
        let event = async {
            loop {
                match events.next().await {
                    Some(Event::ConnectionBlocked(reason)) => return Ok(Heard::Blocked(reason)),
                    Some(Event::ConnectionUnblocked) => return Ok(Heard::Unblocked),
                    Some(Event::Error(error)) => return Err(error),
                    Some(_) => {}
                    // lapin keeps a sender for as long as the connection is there, and we keep that.
                    None => pending().await,
                }
            }
        };
        let heard = tokio::select! {
            biased;
            answer = answer => answer.map(|confirmation| Heard::Answer(self.note(&confirmation))),
            sent = sent => sent.map(|confirm| {
                if let Some(sent) = self.sending.take() {
                    let (size, behind) = (sent.size, sent.behind);
                    self.in_flight.push_back(InFlight { waits_for: confirm, size, behind });
                }
                Heard::Sent
            }),
            event = event => event,
        };
        heard.unwrap_or_else(|error| Heard::Lost(self.lost(&error)))
    }

    fn note(&mut self, confirmation: &Confirmation) -> Answer {
        let behind = self.in_flight.pop_front().map_or(0, |first| first.behind);
        self.answered += 1;
        match confirmation {
            Confirmation::Ack(Some(_)) => Answer::AckedWithReturn { behind },
            Confirmation::Nack(returned) => Answer::Nacked {
                returned: returned.is_some(),
            },
            // NotRequested never comes: the channel is in confirm mode.
            Confirmation::Ack(None) | Confirmation::NotRequested => Answer::Acked,
        }
    }

    /// Closes the connection politely, within two seconds.
    pub async fn close(&self) {
        self.connection.close().await;
    }

    fn lost(&self, error: &lapin::Error) -> PublishError {
        let refusal = Refusal::of(error, &self.connection.observed());
        // The one error that names its message, though only by its size.
        let size = refusal.and_then(|refusal| too_large(&refusal.text));
        let sending = self.sending.iter().map(|sending| sending.size);
        let mut sizes = self.in_flight.iter().map(|sent| sent.size).chain(sending);
        let place = size.and_then(|size| sizes.position(|other| other == size));
        PublishError {
            failure: publish_failure(error, &self.connection, &self.route),
            message: place.map(|place| self.answered + place as u64 + 1),
        }
    }
}

/// Declares a durable queue; one that exists must be like this.
///
/// # Errors
/// When the broker refuses, or hasn't answered within `limit`.
pub async fn declare(
    connection: &OpenConnection,
    queue: &str,
    kind: QueueType,
    limit: Duration,
) -> Result<(), Failure> {
    let mut arguments = FieldTable::default();
    let kind = match kind {
        QueueType::Default => None,
        QueueType::Quorum => Some("quorum"),
        QueueType::Classic => Some("classic"),
    };
    if let Some(kind) = kind {
        let value = AMQPValue::LongString(LongString::from(kind));
        arguments.insert(ShortString::from("x-queue-type"), value);
    }
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let declare = topology::declare(connection.connection(), queue, durable, arguments);
    let Err(error) = within(limit, declare).await? else {
        return Ok(());
    };
    let refusal = Refusal::of(&error, &connection.observed());
    if let Some(refusal) = refusal.filter(|refusal| refusal.meaning() == Meaning::Precondition) {
        return Err(Failure::new(
            Exit::Config,
            format!(
                "queue {queue:?} exists and is another kind of queue: {refusal}; publish to it without --declare, or name another"
            ),
        ));
    }
    Err(ConnectError::refused(&error, connection, "declare", queue).failure)
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Failure> {
    timeout(limit, work).await.map_err(|_| {
        Failure::new(
            Exit::Unavailable,
            format!(
                "no reply from the broker within {} (--timeout)",
                HumanDuration(limit)
            ),
        )
    })
}

/// What an error to `basic.publish` means.
fn publish_failure(error: &lapin::Error, connection: &OpenConnection, route: &Route) -> Failure {
    let exchange = &route.exchange;
    let user = connection.username();
    let Some(refusal) = Refusal::of(error, &connection.observed()) else {
        return Failure::new(Exit::Lost, described(error));
    };
    match refusal.meaning() {
        Meaning::Missing => Failure::new(
            Exit::Config,
            format!(
                "there is no exchange {exchange:?} in this virtual host: {refusal}; declare it, or check the name"
            ),
        ),
        Meaning::NotPermitted => Failure::new(
            Exit::NoPermission,
            format!(
                "user {user:?} may not publish here: {refusal}; grant it with rabbitmqctl set_permissions"
            ),
        ),
        Meaning::TooLarge => Failure::new(
            Exit::Config,
            format!(
                "too large for this broker: {refusal}; raise max_message_size in its rabbitmq.conf, or split it"
            ),
        ),
        Meaning::Precondition | Meaning::NotImplemented => Failure::new(
            Exit::Config,
            format!("the broker doesn't take messages like this: {refusal}"),
        ),
        _ => Failure::new(
            Exit::Lost,
            format!("the broker stopped the publishing: {refusal}"),
        ),
    }
}

/// The size of the message that a refusal for its size is about.
fn too_large(text: &str) -> Option<usize> {
    // "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000" (RabbitMQ 3.10 to 4.3)
    let (_, rest) = text.split_once("message size ")?;
    let (size, rest) = rest.split_once(' ')?;
    (rest.starts_with("is larger") || rest.starts_with("larger")).then(|| size.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_for_its_size_tells_the_size() {
        let text =
            "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000";
        assert_eq!(too_large(text), Some(2000));
        assert_eq!(too_large("PRECONDITION_FAILED - invalid expiration"), None);
    }
}
