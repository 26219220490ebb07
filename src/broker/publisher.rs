//! Messages in flight to one exchange, and the broker's answer to each.

use super::{
    connection::OpenConnection,
    errors::ConnectError,
    properties::{Properties, QueueType, Route},
    refused::Asked,
};
use crate::{
    exit::{Exit, Failure},
    report::HumanDuration,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, PublisherConfirm,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    protocol::basic,
    types::ShortString,
};
use std::{
    collections::VecDeque,
    future::{Future, pending},
    pin::Pin,
    time::Duration,
};
use tokio::time::timeout;

/// What a frame with a content header has beside the properties, in bytes (AMQP 0-9-1, 2.3.5 and 2.3.5.2): type, channel,
/// size; class, weight, size of the body; the frame's end.
const AROUND_PROPERTIES: u64 = 7 + 12 + 1;

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

/// Publishes persistent, mandatory messages with publisher confirms, many in flight.
pub struct Publisher {
    connection: OpenConnection,
    channel: Channel,
    route: Route,
    properties: BasicProperties,
    sending: Option<Sending>,
    confirms: VecDeque<PublisherConfirm>,
    /// Of each message without an answer, the one that is being sent included: the size of its body, in bytes, and how
    /// many messages were answered when it was sent.
    unanswered: VecDeque<(usize, u64)>,
    answered: u64,
}

impl Publisher {
    /// Opens a channel, the only one, and declares the queue that `route` leads to if `declare` is its type. A queue that
    /// exists must be of that type.
    ///
    /// # Errors
    /// When the broker refuses, or hasn't answered within `limit`.
    pub async fn open(
        connection: OpenConnection,
        declare: Option<QueueType>,
        route: Route,
        properties: Properties,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let properties = properties.into_amqp();
        if let Err(failure) = check_size(&properties, connection.lapin.configuration().frame_max()) {
            connection.close().await;
            return Err(failure);
        }
        // Kept until the connection is closed, for the reason that `OpenConnection::last_channel` has.
        let mut channel = None;
        let mut asked = Asked::Publish(&route.exchange);
        let open = async {
            let channel = channel.insert(connection.lapin.create_channel().await?);
            if let Some(kind) = declare {
                asked = Asked::Declare(&route.routing_key);
                let queue = route.routing_key.as_str().into();
                let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                channel.queue_declare(queue, durable, kind.arguments()).await?;
            }
            asked = Asked::Publish(&route.exchange);
            channel.confirm_select(ConfirmSelectOptions::default()).await
        };
        let opened = match timeout(limit, open).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ConnectError::refused(&error, &connection, asked).failure),
            Err(_) => Err(Failure::new(
                Exit::Unavailable,
                format!("no reply from the broker within {} (--timeout)", HumanDuration(limit)),
            )),
        };
        if let Err(failure) = opened {
            connection.close().await;
            return Err(failure);
        }
        Ok(Self {
            connection,
            channel: channel.expect("it was opened"),
            route,
            properties,
            sending: None,
            confirms: VecDeque::new(),
            unanswered: VecDeque::new(),
            answered: 0,
        })
    }

    /// Whether a message is still being sent; the next one has to wait.
    #[must_use]
    pub const fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Begins to send a message; [`Self::next`] goes on with it.
    pub fn publish(&mut self, body: Vec<u8>) {
        self.unanswered.push_back((body.len(), self.answered));
        let channel = self.channel.clone();
        let exchange = ShortString::from(self.route.exchange.as_str());
        let key = ShortString::from(self.route.routing_key.as_str());
        let properties = self.properties.clone();
        let options = BasicPublishOptions { mandatory: self.route.mandatory(), ..BasicPublishOptions::default() };
        self.sending = Some(Box::pin(async move {
            let sent = channel.basic_publish(exchange, key, options, &body, properties);
            sent.await
        }));
    }

    /// The next thing to happen. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Heard {
        let answer = async {
            match self.confirms.front_mut() {
                Some(first) => first.await,
                None => pending().await,
            }
        };
        let sent = async {
            match &mut self.sending {
                Some(sending) => sending.await,
                None => pending().await,
            }
        };
        let connection = &mut self.connection;
        let event = async {
            loop {
                match connection.event().await {
                    Event::ConnectionBlocked(reason) => return Ok(Heard::Blocked(reason)),
                    Event::ConnectionUnblocked => return Ok(Heard::Unblocked),
                    Event::Error(error) => return Err(error),
                    _ => {}
                }
            }
        };
        let heard = tokio::select! {
            biased;
            answer = answer => answer.map(|confirmation| Heard::Answer(self.note(&confirmation))),
            sent = sent => sent.map(|confirm| {
                self.sending = None;
                self.confirms.push_back(confirm);
                Heard::Sent
            }),
            event = event => event,
        };
        heard.unwrap_or_else(|error| Heard::Lost(self.lost(&error)))
    }

    fn note(&mut self, confirmation: &Confirmation) -> Answer {
        self.confirms.pop_front();
        let behind = self.unanswered.pop_front().map_or(0, |(_, behind)| behind);
        self.answered += 1;
        match confirmation {
            Confirmation::Ack(Some(_)) => Answer::AckedWithReturn { behind },
            Confirmation::Nack(returned) => Answer::Nacked { returned: returned.is_some() },
            // NotRequested never comes: the channel is in confirm mode.
            Confirmation::Ack(None) | Confirmation::NotRequested => Answer::Acked,
        }
    }

    /// Closes the connection politely, within two seconds.
    pub async fn close(&self) {
        self.connection.close().await;
    }

    fn lost(&self, error: &lapin::Error) -> PublishError {
        let refusal = self.connection.observed().refusal(error);
        // The one error that names its message, though only by its size.
        let size = refusal.and_then(|refusal| too_large(&refusal.text));
        let mut sizes = self.unanswered.iter().map(|(size, _)| *size);
        let place = size.and_then(|size| sizes.position(|other| other == size));
        let asked = Asked::Publish(&self.route.exchange);
        PublishError {
            failure: ConnectError::refused(error, &self.connection, asked).failure,
            message: place.map(|place| self.answered + place as u64 + 1),
        }
    }
}

/// Checks that the properties, headers included, fit into a frame of `frame_max` bytes: AMQP doesn't divide them.
fn check_size(properties: &BasicProperties, frame_max: u32) -> Result<(), Failure> {
    let written = basic::gen_properties(properties)(Vec::new().into()).expect("memory takes all of it");
    let (size, limit) = (written.position, u64::from(frame_max) - AROUND_PROPERTIES);
    if size <= limit {
        return Ok(());
    }
    Err(Failure::config(format!(
        "properties and headers have {size} bytes, and only {limit} fit into a frame of {frame_max} (frame_max); send less in headers, or raise frame_max in the broker's rabbitmq.conf and in the URL"
    )))
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
        let text = "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000";
        assert_eq!(too_large(text), Some(2000));
        assert_eq!(too_large("PRECONDITION_FAILED - invalid expiration"), None);
    }
}
