//! Publishes to one exchange with publisher confirms, many messages in flight.

use super::properties::{Properties, Route};
use crate::{
    broker::{
        errors::{Asked, ConnectError, Meaning},
        reach::connection::OpenConnection,
    },
    clock::sleep_until_or_never,
    exit::{Exit, Failure},
    report::HumanDuration,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, PublisherConfirm,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    protocol::basic,
    types::{AMQPValue, FieldTable},
};
use std::{
    collections::VecDeque,
    future::{Future, pending},
    pin::Pin,
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, timeout},
};

/// What a frame with a content header has beside the properties, in bytes (AMQP 0-9-1, 2.3.5 and 2.3.5.2): type, channel,
/// size; class, weight, size of the body; the frame's end.
const AROUND_PROPERTIES: u64 = 7 + 12 + 1;

/// Messages as they are read, each with its share of what may be in flight.
pub type Messages = mpsc::Receiver<Result<(Vec<u8>, OwnedSemaphorePermit), Failure>>;

/// A message without an answer.
struct InFlight {
    /// `None` while it is being sent.
    confirm: Option<PublisherConfirm>,
    /// The body's size in bytes.
    size: u64,
    /// How many messages were answered when it was sent.
    answered_before: u64,
    _share: OwnedSemaphorePermit,
}

/// Publishes persistent messages over a connection.
pub struct Publisher {
    connection: OpenConnection,
    channel: Option<Channel>,
    /// What is published; there is nothing until somebody sets it.
    pub messages: Messages,
    /// Whether there may be more of them, and more are wanted.
    pub is_reading: bool,
    /// Why the next one can't be read.
    unreadable: Option<Failure>,
    /// Where they go.
    pub route: Route,
    properties: BasicProperties,
    /// Longest wait for the next answer, and when that wait began.
    limit: Duration,
    waiting_since: Instant,
    /// Why the broker takes no messages for now.
    blocked: Option<String>,
    sending: Option<Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send>>>,
    in_flight: VecDeque<InFlight>,
    /// What became of the messages that are answered.
    pub tally: Tally,
}

impl Publisher {
    /// Publishes over this connection; the broker may take `limit` for each answer.
    pub fn new(connection: OpenConnection, route: Route, properties: &Properties, limit: Duration) -> Self {
        Self {
            connection,
            channel: None,
            messages: mpsc::channel(1).1,
            is_reading: true,
            unreadable: None,
            route,
            properties: properties.encode(),
            limit,
            waiting_since: Instant::now(),
            blocked: None,
            sending: None,
            in_flight: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    /// Opens the channel, and declares the queue that the route leads to if `declare` is its type, or `default`. A queue that
    /// exists must be of that type.
    ///
    /// # Errors
    /// When the broker refuses, or doesn't answer, or would refuse every message.
    pub async fn open(&mut self, declare: Option<&str>) -> Result<(), Failure> {
        let lapin = &self.connection.lapin;
        // AMQP divides a body into frames, but not the properties.
        let frame_max = lapin.configuration().frame_max();
        let room = u64::from(frame_max) - AROUND_PROPERTIES;
        let written = basic::gen_properties(&self.properties)(Vec::new().into());
        let size = written.expect("memory takes all of it").position;
        if size > room {
            return Err(Failure::config(format!(
                "properties and headers have {size} bytes, and only {room} fit into a frame of {frame_max} (frame_max); send less in headers, or raise frame_max in the broker's rabbitmq.conf and in the URL"
            )));
        }
        let Route { exchange, routing_key, .. } = &self.route;
        let asked = if declare.is_some() { Asked::Declare(routing_key) } else { Asked::Publish(exchange) };
        let open = async {
            let channel = self.channel.insert(lapin.create_channel().await?);
            if let Some(kind) = declare {
                let mut arguments = FieldTable::default();
                if kind != "default" {
                    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
                }
                let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                channel.queue_declare(routing_key.as_str().into(), durable, arguments).await?;
            }
            channel.confirm_select(ConfirmSelectOptions::default()).await
        };
        match timeout(self.limit, open).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ConnectError::refused(&error, &self.connection, asked).failure),
            Err(_) => {
                let limit = HumanDuration(self.limit);
                let text = format!("no reply from the broker within {limit} (--timeout)");
                Err(Failure::new(Exit::Unavailable, text))
            }
        }
    }

    /// Publishes until there is nothing more, something can't be read, or a message is in no queue; then waits for what is in
    /// flight. Answers come in the order of the messages. Dropping the future loses nothing.
    ///
    /// # Errors
    /// What can't be read; or that there is no answer within the limit, or no channel or connection any more, with the number
    /// of the message that is to blame, if it is known.
    pub async fn publish(&mut self) -> Result<(), (Failure, Option<u64>)> {
        while self.is_reading || !self.is_idle() {
            let deadline = (!self.is_idle()).then(|| self.waiting_since + self.limit);
            // One at a time is being sent: what lapin queues takes memory.
            let takes_next = self.is_reading && self.sending.is_none();
            let answer = async {
                match self.in_flight.front_mut().and_then(|first| first.confirm.as_mut()) {
                    Some(confirm) => confirm.await,
                    None => pending().await,
                }
            };
            let sent = async {
                match &mut self.sending {
                    Some(sending) => sending.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = answer => self.note(&answer.map_err(|error| self.lost(&error))?),
                sent = sent => {
                    let confirm = sent.map_err(|error| self.lost(&error))?;
                    self.sending = None;
                    self.in_flight.back_mut().expect("it is being sent").confirm = Some(confirm);
                }
                event = self.connection.event() => match event {
                    Event::Error(error) => return Err(self.lost(&error)),
                    Event::ConnectionBlocked(reason) => {
                        let limit = HumanDuration(self.limit);
                        tracing::warn!("the broker blocks publishers: {reason}; waiting for up to {limit} (--timeout)");
                        self.blocked = Some(reason);
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker takes messages again");
                        self.blocked = None;
                    }
                    _ => {}
                },
                () = sleep_until_or_never(deadline) => return Err((self.stalled(), None)),
                message = self.messages.recv(), if takes_next => match message {
                    Some(Ok((body, share))) => self.send(body, share),
                    end => {
                        self.is_reading = false;
                        self.unreadable = end.and_then(Result::err);
                    }
                },
            }
        }
        self.unreadable.take().map_or(Ok(()), |failure| Err((failure, None)))
    }

    fn send(&mut self, body: Vec<u8>, share: OwnedSemaphorePermit) {
        if self.is_idle() {
            self.waiting_since = Instant::now();
        }
        let (size, answered_before) = (body.len() as u64, self.tally.answered);
        self.in_flight.push_back(InFlight { confirm: None, size, answered_before, _share: share });
        let channel = self.channel.clone().expect("it is open");
        let (route, properties) = (&self.route, self.properties.clone());
        let (exchange, key) = (route.exchange.as_str().into(), route.routing_key.as_str().into());
        let options = BasicPublishOptions { mandatory: route.mandatory(), ..BasicPublishOptions::default() };
        let sending = async move { channel.basic_publish(exchange, key, options, &body, properties).await };
        self.sending = Some(Box::pin(sending));
    }

    fn note(&mut self, answer: &Confirmation) {
        let sent = self.sent();
        let message = self.in_flight.pop_front().expect("it is answered");
        self.tally.note(answer, message.size, message.answered_before, sent);
        self.is_reading &= self.tally.gap.is_none();
        self.waiting_since = Instant::now();
    }

    /// How many messages are sent.
    pub fn sent(&self) -> u64 {
        self.tally.answered + self.in_flight.len() as u64
    }

    /// Whether every message that is sent is answered.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Closes the connection politely, within two seconds.
    pub async fn close(&self) {
        self.connection.close().await;
    }

    fn stalled(&self) -> Failure {
        let why = match &self.blocked {
            Some(reason) => format!("the broker blocks publishers: {reason}"),
            None => "the broker has confirmed nothing for so long".to_owned(),
        };
        let limit = HumanDuration(self.limit);
        Failure::new(Exit::Unconfirmed, format!("gave up after {limit} (--timeout): {why}"))
    }

    fn lost(&self, error: &lapin::Error) -> (Failure, Option<u64>) {
        let refusal = self.connection.observed().refusal(error);
        // "message size 2000 is larger than configured max size 1000": it names its message, by the size.
        let too_large = refusal.filter(|refusal| refusal.meaning() == Meaning::TooLarge);
        let size = too_large.and_then(|refusal| refusal.text.split(' ').find_map(|word| word.parse().ok()));
        let place = size.and_then(|size: u64| self.in_flight.iter().position(|message| message.size == size));
        let failure = ConnectError::refused(error, &self.connection, Asked::Publish(&self.route.exchange)).failure;
        (failure, place.map(|place| self.tally.answered + place as u64 + 1))
    }
}

/// What became of the messages that are answered, in the order in which they were sent.
#[derive(Debug, Default)]
pub struct Tally {
    /// How many are answered.
    pub answered: u64,
    /// The size of their bodies together, in bytes.
    pub bytes: u64,
    /// How many were returned (`basic.return`), and how many were refused (`basic.nack`). LavinMQ does both to one.
    failures: u64,
    /// The first that is in no queue.
    pub gap: Option<Gap>,
}

/// A message that is in no queue, counted from 1: one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first that it may be.
    pub first: u64,
    /// The last that it may be.
    pub last: u64,
    /// Whether the broker refused it; otherwise no queue takes it.
    pub refused: bool,
}

impl Tally {
    /// Takes note of the next answer, to a message that was sent after `answered_before` answers; `sent` are sent by now.
    fn note(&mut self, confirmation: &Confirmation, size: u64, answered_before: u64, sent: u64) {
        self.answered += 1;
        self.bytes += size;
        let (refused, returned) = match confirmation {
            Confirmation::Ack(returned) => (false, returned.is_some()),
            Confirmation::Nack(returned) => (true, returned.is_some()),
            Confirmation::NotRequested => (false, false),
        };
        self.failures += u64::from(refused) + u64::from(returned);
        // lapin 4.12 hands what was returned to whichever message is answered next: one that was in flight with it.
        let first = if returned { answered_before + 1 } else { self.answered };
        let last = if refused { self.answered } else { sent };
        if (refused || returned) && self.gap.is_none_or(|gap| first < gap.first) {
            self.gap = Some(Gap { first, last, refused });
        }
    }

    /// How many messages are confirmed from the first on.
    pub fn without_gap(&self) -> u64 {
        self.gap.map_or(self.answered, |gap| gap.first - 1)
    }

    /// How many messages are confirmed; with LavinMQ it may be more.
    pub fn confirmed(&self) -> u64 {
        self.answered.saturating_sub(self.failures).max(self.without_gap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Confirmation::{Ack, Nack};
    use lapin::message::BasicReturnMessage;

    #[test]
    fn a_gap_is_never_placed_too_late() {
        let returned = || {
            let delivery = lapin::message::Delivery::mock(0, "".into(), "".into(), false, Vec::new());
            Some(BasicReturnMessage { delivery, reply_code: 312, reply_text: "NO_ROUTE".into() })
        };
        let acked = || (Ack(None), 0);
        let back = |answered_before| (Ack(returned()), answered_before);
        let refused = || (Nack(None), 0);
        let both = |answered_before| (Nack(returned()), answered_before);
        let gap = |first, last, refused| Some(Gap { first, last, refused });
        for (sent, answers, confirmed, expected) in [
            (3, vec![acked(), acked(), acked()], 3, None),
            (3, vec![acked()], 1, None),
            (4, vec![acked(), acked(), refused(), acked()], 3, gap(3, 3, true)),
            // The second may be the one that was returned, though the third brought it.
            (4, vec![acked(), acked(), back(1), acked()], 3, gap(2, 4, false)),
            (3, vec![acked(), acked(), back(2)], 2, gap(3, 3, false)),
            (4, vec![back(0), acked(), back(0), back(0)], 1, gap(1, 4, false)),
            // A refusal that brought what was returned before it.
            (3, vec![acked(), acked(), both(1)], 1, gap(2, 3, true)),
            // LavinMQ returns and refuses one that a full queue doesn't take.
            (3, vec![acked(), both(1), both(2)], 1, gap(2, 2, true)),
            (3, vec![refused(), back(0), acked()], 1, gap(1, 1, true)),
        ] {
            let mut tally = Tally::default();
            for (confirmation, answered_before) in &answers {
                tally.note(confirmation, 1, *answered_before, sent);
            }
            assert_eq!((tally.confirmed(), tally.gap), (confirmed, expected), "{answers:?}");
            assert_eq!(tally.without_gap(), expected.map_or(answers.len() as u64, |gap| gap.first - 1));
        }
    }
}
