//! Messages in flight to one exchange, and the broker's answer to each.

use super::{
    connect::OpenConnection,
    errors::{protocol, said},
};
use crate::exit::{Exit, Failure};
use lapin::{
    BasicProperties, Channel, Confirmation, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    types::{AMQPValue, FieldTable, LongString, ShortString},
};
use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::time::timeout;
use tokio_stream::StreamExt;

/// Longest time that a goodbye may take: while the broker blocks publishers it isn't even read.
const GOODBYE: Duration = Duration::from_secs(2);

/// The delivery mode that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// Where messages go. Names have 255 bytes at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The exchange; the empty name is the default exchange, which leads to the queue that the routing key names.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
}

impl Route {
    /// Why a message that went there would be returned.
    #[must_use]
    pub fn missing(&self) -> String {
        if self.exchange.is_empty() {
            format!(
                "there is no queue {:?} in this virtual host; create it (--declare --queue NAME), or check the name",
                self.routing_key
            )
        } else {
            format!(
                "no queue is bound to exchange {:?} for routing key {:?}",
                self.exchange, self.routing_key
            )
        }
    }
}

/// The types of queue that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// What the virtual host makes of a queue whose type isn't named.
    Default,
    /// Replicated.
    Quorum,
    /// On one node.
    Classic,
}

/// What every message carries. Texts have 255 bytes at most, but for the values of headers.
#[derive(Clone, Debug, Default)]
pub struct Properties {
    /// `content-type`
    pub content_type: Option<String>,
    /// `content-encoding`
    pub content_encoding: Option<String>,
    /// `reply-to`
    pub reply_to: Option<String>,
    /// `message-id`
    pub message_id: Option<String>,
    /// `correlation-id`
    pub correlation_id: Option<String>,
    /// `priority`
    pub priority: Option<u8>,
    /// `expiration`, in milliseconds
    pub expiration: Option<u32>,
    /// `type`
    pub kind: Option<String>,
    /// `app-id`
    pub app_id: Option<String>,
    /// `headers`
    pub headers: BTreeMap<String, String>,
}

impl Properties {
    fn into_amqp(self) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let texts: [(_, fn(_, _) -> _); 7] = [
            (self.content_type, BasicProperties::with_content_type),
            (
                self.content_encoding,
                BasicProperties::with_content_encoding,
            ),
            (self.reply_to, BasicProperties::with_reply_to),
            (self.message_id, BasicProperties::with_message_id),
            (self.correlation_id, BasicProperties::with_correlation_id),
            (self.kind, BasicProperties::with_type),
            (self.app_id, BasicProperties::with_app_id),
        ];
        for (value, with) in texts {
            if let Some(value) = value {
                properties = with(properties, ShortString::from(value));
            }
        }
        if let Some(priority) = self.priority {
            properties = properties.with_priority(priority);
        }
        if let Some(expiration) = self.expiration {
            properties = properties.with_expiration(expiration.to_string().into());
        }
        if !self.headers.is_empty() {
            let mut table = FieldTable::default();
            for (name, value) in self.headers {
                table.insert(name.into(), AMQPValue::LongString(LongString::from(value)));
            }
            properties = properties.with_headers(table);
        }
        properties
    }
}

/// The broker's answer to a message. Answers come in the order in which the messages were sent.
#[derive(Debug)]
pub enum Answer {
    /// The broker answers for it.
    Acked {
        /// The body of a message that came back, as it fits no queue: not necessarily of this one, as lapin 4.12 hands
        /// what was returned to whichever message is answered next, and answers several in no order.
        returned: Option<Vec<u8>>,
    },
    /// The broker refused it: a queue that is full, or a defect.
    Nacked {
        /// As above.
        returned: Option<Vec<u8>>,
    },
    /// There is none, and won't be: the message may have arrived or not.
    None,
}

/// What the publisher hears.
#[derive(Debug)]
pub enum Heard {
    /// An answer to the next message.
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

type Confirming = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>;

enum State {
    Waiting(Confirming),
    Done(Box<lapin::Result<Confirmation>>),
}

/// A message that has no answer yet.
struct Flight {
    size: usize,
    state: State,
}

impl Flight {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let State::Waiting(confirming) = &mut self.state {
            match confirming.as_mut().poll(cx) {
                Poll::Ready(result) => self.state = State::Done(Box::new(result)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }
}

/// Publishes persistent, mandatory messages with publisher confirms, many in flight.
pub struct Publisher {
    link: OpenConnection,
    channel: Channel,
    route: Route,
    properties: BasicProperties,
    flight: VecDeque<Flight>,
    answered: u64,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("route", &self.route)
            .field("in_flight", &self.flight.len())
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// Publishes on this connection.
    ///
    /// # Errors
    /// When the broker refuses, or hasn't answered within `limit`.
    pub async fn open(
        link: OpenConnection,
        route: Route,
        properties: Properties,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let open = async {
            let channel = link.connection().create_channel().await?;
            channel
                .confirm_select(ConfirmSelectOptions::default())
                .await?;
            lapin::Result::Ok(channel)
        };
        let channel = within(limit, open)
            .await?
            .map_err(|error| failure(&error, &route))?;
        Ok(Self {
            link,
            channel,
            route,
            properties: properties.into_amqp(),
            flight: VecDeque::new(),
            answered: 0,
        })
    }

    /// Sends a message, or at least lets it queue to be sent.
    pub fn publish(&mut self, body: Vec<u8>) {
        let size = body.len();
        let channel = self.channel.clone();
        let exchange = ShortString::from(self.route.exchange.as_str());
        let routing_key = ShortString::from(self.route.routing_key.as_str());
        let properties = self.properties.clone();
        let confirming = async move {
            let options = BasicPublishOptions {
                mandatory: true,
                ..BasicPublishOptions::default()
            };
            let confirm = channel
                .basic_publish(exchange, routing_key, options, &body, properties)
                .await?;
            drop(body);
            confirm.await
        };
        let mut flight = Flight {
            size,
            state: State::Waiting(Box::pin(confirming)),
        };
        // lapin takes the message in with the first poll: now, so that the order is kept. It isn't awaited before the
        // next one, which would cost a round through lapin's thread for each.
        let _ = flight.poll(&mut Context::from_waker(Waker::noop()));
        self.flight.push_back(flight);
    }

    /// The next thing to happen. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Heard {
        let Self { link, flight, .. } = self;
        let first = std::future::poll_fn(|cx| match flight.front_mut() {
            Some(first) => first.poll(cx),
            None => Poll::Pending,
        });
        let event = async {
            loop {
                match link.events().next().await {
                    Some(Event::ConnectionBlocked(reason)) => return Ok(Heard::Blocked(reason)),
                    Some(Event::ConnectionUnblocked) => return Ok(Heard::Unblocked),
                    Some(Event::Error(error)) => return Err(error),
                    Some(_) => {}
                    // lapin keeps a sender for as long as the connection is there, and we keep that.
                    None => std::future::pending().await,
                }
            }
        };
        let event = tokio::select! {
            biased;
            () = first => None,
            event = event => Some(event),
        };
        match event {
            None => match self.answer() {
                Ok(answer) => Heard::Answer(answer),
                Err(error) => Heard::Lost(self.stop(&error)),
            },
            Some(Ok(heard)) => heard,
            Some(Err(error)) => Heard::Lost(self.stop(&error)),
        }
    }

    /// The next answer, if it is here already.
    pub fn answered(&mut self) -> Option<Answer> {
        let first = self.flight.front_mut()?;
        if first
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
        {
            return None;
        }
        // An error is left to `next`.
        self.answer().ok()
    }

    /// The answers that are here, and none for the rest: for the end.
    pub fn give_up(&mut self) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(self.flight.len());
        while !self.flight.is_empty() {
            answers.push(self.answered().unwrap_or_else(|| {
                self.flight.pop_front();
                self.answered += 1;
                Answer::None
            }));
        }
        answers
    }

    /// Says goodbye to the broker; whether it answers changes nothing any more.
    pub async fn close(&mut self) {
        goodbye(&self.link).await;
    }

    /// The answer to the first message in flight, which is here. With an error the message stays where it is.
    fn answer(&mut self) -> lapin::Result<Answer> {
        if let Some(Flight {
            state: State::Done(result),
            ..
        }) = self.flight.front()
            && let Err(error) = &**result
        {
            return Err(error.clone());
        }
        let confirmation = match self.flight.pop_front().map(|first| first.state) {
            Some(State::Done(result)) => (*result)?,
            _ => Confirmation::NotRequested,
        };
        self.answered += 1;
        Ok(match confirmation {
            Confirmation::Ack(returned) => Answer::Acked {
                returned: returned.map(|returned| returned.delivery.data),
            },
            Confirmation::Nack(returned) => Answer::Nacked {
                returned: returned.map(|returned| returned.delivery.data),
            },
            // Never: it is here, and the channel is in confirm mode.
            Confirmation::NotRequested => Answer::None,
        })
    }

    fn stop(&self, error: &lapin::Error) -> PublishError {
        let mut stop = PublishError {
            failure: failure(error, &self.route),
            message: None,
        };
        // The one error that names its message, though only by its size.
        if let Some((_, text)) = protocol(error)
            && let Some(size) = too_large(&text)
        {
            let place = self.flight.iter().position(|flight| flight.size == size);
            stop.message = place.map(|place| self.answered + place as u64 + 1);
        }
        stop
    }
}

/// Declares a durable queue; one that exists must be like this.
///
/// # Errors
/// When the broker refuses, or hasn't answered within `limit`.
pub async fn declare(
    link: &OpenConnection,
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
        arguments.insert(
            ShortString::from("x-queue-type"),
            AMQPValue::LongString(LongString::from(kind)),
        );
    }
    let declare = async {
        // A channel of its own: a refusal ends it.
        let channel = link.connection().create_channel().await?;
        let durable = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        channel
            .queue_declare(queue.into(), durable, arguments)
            .await?;
        channel.close(200, "OK".into()).await
    };
    within(limit, declare)
        .await?
        .map_err(|error| match protocol(&error) {
            Some((AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), text)) => Failure::new(
                Exit::Config,
                format!("queue {queue:?} exists and is another kind of queue: {text}; publish to it without --declare, or name another"),
            ),
            Some((AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED), text)) => Failure::new(
                Exit::Config,
                format!("queue {queue:?} is exclusive to another connection: {text}"),
            ),
            Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) => Failure::new(
                Exit::NoPermission,
                format!("the broker refused to let this user declare queue {queue:?}: {text}"),
            ),
            Some((_, text)) => Failure::new(
                Exit::Unavailable,
                format!("the broker couldn't declare queue {queue:?}: {text}"),
            ),
            None => Failure::new(
                Exit::Unavailable,
                format!("the connection failed while queue {queue:?} was declared: {}", said(&error)),
            ),
        })
}

/// Says goodbye to the broker; whether it answers changes nothing any more.
pub async fn goodbye(link: &OpenConnection) {
    match timeout(GOODBYE, link.connection().close(200, "OK".into())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("closing the connection: {}", said(&error)),
        Err(_) => tracing::debug!("closing the connection: no answer within {GOODBYE:?}"),
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, Failure> {
    timeout(limit, work).await.map_err(|_| {
        Failure::new(
            Exit::Unavailable,
            format!(
                "no answer from the broker within {} (--timeout)",
                crate::report::HumanDuration(limit)
            ),
        )
    })
}

/// What an error to `basic.publish` means.
fn failure(error: &lapin::Error, route: &Route) -> Failure {
    let exchange = &route.exchange;
    match protocol(error) {
        Some((AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND), text)) => Failure::new(
            Exit::Config,
            format!("there is no exchange {exchange:?} in this virtual host: {text}"),
        ),
        Some((AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED), text)) => Failure::new(
            Exit::NoPermission,
            format!("the broker refused to let this user publish here: {text}"),
        ),
        Some((AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED), text))
            if too_large(&text).is_some() =>
        {
            Failure::new(
                Exit::Config,
                format!(
                    "too large for this broker: {text}; raise max_message_size in its rabbitmq.conf, or split it"
                ),
            )
        }
        Some((AMQPErrorKind::Soft(_), text))
        | Some((AMQPErrorKind::Hard(AMQPHardError::NOTIMPLEMENTED), text)) => Failure::new(
            Exit::Config,
            format!("the broker doesn't take messages like this: {text}"),
        ),
        Some((_, text)) => Failure::new(
            Exit::Lost,
            format!("the broker closed the connection: {text}"),
        ),
        None => Failure::new(Exit::Lost, said(error)),
    }
}

/// The size of the message that a refusal for its size is about.
fn too_large(text: &str) -> Option<usize> {
    // "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000" (3.10 to 4.3)
    let (_, rest) = text.split_once("message size ")?;
    let (size, rest) = rest.split_once(' ')?;
    rest.starts_with("is larger").then(|| size.parse().ok())?
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
