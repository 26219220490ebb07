//! Publishes to one exchange with publisher confirms, many messages in flight.

use super::options::{Properties, Route};
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
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout},
};

/// The bytes of a content header's frame that are not properties (AMQP 0-9-1, 2.3.5 and 2.3.5.2): type, channel and
/// size; class, weight and the body's size; the frame's end.
const AROUND_PROPERTIES: u64 = 7 + 12 + 1;

/// A message that is sent and not answered: neither confirmed nor refused.
struct InFlight {
    /// `None` until it is written to the socket.
    confirm: Option<PublisherConfirm>,
    /// The body's size in bytes.
    size: u64,
    /// How many messages were answered when it was sent.
    answered_before: u64,
    _permit: OwnedSemaphorePermit,
}

/// Publishes persistent messages over a connection.
pub struct Publisher {
    /// To be closed by the caller, after the last confirm.
    pub connection: OpenConnection,
    channel: Option<Channel>,
    /// Where the messages go.
    pub route: Route,
    properties: BasicProperties,
    /// Longest wait for the next confirm.
    limit: Duration,
    /// When that wait began.
    waiting_since: Instant,
    /// Why the broker blocks publishers, while it does.
    blocked: Option<String>,
    /// The newest message, until it is written to the socket.
    sending: Option<Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send>>>,
    /// In the order of publishing.
    in_flight: VecDeque<InFlight>,
    /// What the broker has answered.
    pub confirms: Confirms,
}

impl Publisher {
    /// Publishes over this connection; the broker may take `limit` for each confirm.
    pub fn new(connection: OpenConnection, route: Route, properties: &Properties, limit: Duration) -> Self {
        Self {
            connection,
            channel: None,
            route,
            properties: properties.encode(),
            limit,
            waiting_since: Instant::now(),
            blocked: None,
            sending: None,
            in_flight: VecDeque::new(),
            confirms: Confirms::default(),
        }
    }

    /// Opens the channel. With `declare`, a queue type or `default`, it declares the queue that the routing key names.
    ///
    /// # Errors
    /// If the broker refuses, doesn't reply within the limit, or would refuse every message.
    pub async fn open(&mut self, declare: Option<&str>) -> Result<(), Failure> {
        let lapin = &self.connection.lapin;
        // AMQP splits a body into frames, but not the properties.
        let frame_max = lapin.configuration().frame_max();
        let room = u64::from(frame_max) - AROUND_PROPERTIES;
        let written = basic::gen_properties(&self.properties)(Vec::new().into());
        let size = written.expect("a Vec takes all of it").position;
        if size > room {
            return Err(Failure::config(format!(
                "properties and headers have {size} bytes, and only {room} fit into a frame of {frame_max} \
                 (frame_max); send less in headers, or raise frame_max in the broker's rabbitmq.conf and in the URL"
            )));
        }
        let Route { exchange, routing_key, .. } = &self.route;
        let open = async {
            let channel = self.channel.insert(lapin.create_channel().await?);
            if let Some(kind) = declare {
                let mut arguments = FieldTable::default();
                if kind != "default" {
                    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
                }
                let durable = QueueDeclareOptions { durable: true, ..Default::default() };
                channel.queue_declare(routing_key.as_str().into(), durable, arguments).await?;
            }
            channel.confirm_select(ConfirmSelectOptions::default()).await
        };
        let limit = HumanDuration(self.limit);
        let no_reply = || format!("no reply from the broker within {limit} (--timeout)");
        let opened = timeout(self.limit, open).await.map_err(|_| Failure::new(Exit::Unavailable, no_reply()))?;
        let asked = if declare.is_some() { Asked::Declare(routing_key) } else { Asked::Publish(exchange) };
        opened.map_err(|error| ConnectError::refused(&error, &self.connection, asked).failure)
    }

    /// Whether the next message may be sent. Only one is being sent at a time, because lapin buffers without limit.
    pub fn is_ready(&self) -> bool {
        self.sending.is_none()
    }

    /// Sends a message. The permit to have it in flight is given back when it is answered.
    pub fn send(&mut self, body: Vec<u8>, permit: OwnedSemaphorePermit) {
        if self.none_in_flight() {
            self.waiting_since = Instant::now();
        }
        let (size, answered_before) = (body.len() as u64, self.confirms.answered);
        self.in_flight.push_back(InFlight { confirm: None, size, answered_before, _permit: permit });
        let channel = self.channel.clone().expect("it is open");
        let (exchange, key) = (self.route.exchange.as_str().into(), self.route.routing_key.as_str().into());
        let options = BasicPublishOptions { mandatory: self.route.mandatory_flag(), ..Default::default() };
        let properties = self.properties.clone();
        let sending = async move { channel.basic_publish(exchange, key, options, &body, properties).await };
        self.sending = Some(Box::pin(sending));
    }

    /// Waits for the next thing to happen, such as a confirm, which it counts. Dropping the future loses nothing.
    ///
    /// # Errors
    /// If no confirm arrives within the limit, or the channel or the connection is lost. The number is that of the
    /// message that the broker refused, from 1, if its text tells which. The failure's text then goes on after "MESSAGE
    /// is".
    pub async fn next(&mut self) -> Result<(), (Failure, Option<u64>)> {
        let deadline = (!self.none_in_flight()).then(|| self.waiting_since + self.limit);
        let confirm = self.in_flight.front_mut().and_then(|first| first.confirm.as_mut());
        let limit = HumanDuration(self.limit);
        tokio::select! {
            biased;
            confirmation = or_never(confirm) => {
                let confirmation = confirmation.map_err(|error| self.lost(&error))?;
                let sent = self.sent();
                let message = self.in_flight.pop_front().expect("it is confirmed");
                self.confirms.count(confirmation, message.size, message.answered_before, sent);
                self.waiting_since = Instant::now();
            }
            sent = or_never(self.sending.as_mut()) => {
                let confirm = sent.map_err(|error| self.lost(&error))?;
                self.sending = None;
                self.in_flight.back_mut().expect("it is being sent").confirm = Some(confirm);
            }
            event = self.connection.event() => match event {
                Event::Error(error) => return Err(self.lost(&error)),
                Event::ConnectionBlocked(reason) => {
                    tracing::warn!("the broker blocks publishers: {reason}; waiting for up to {limit} (--timeout)");
                    self.blocked = Some(reason);
                }
                Event::ConnectionUnblocked => {
                    tracing::info!("the broker takes messages again");
                    self.blocked = None;
                }
                _ => {}
            },
            () = sleep_until_or_never(deadline) => {
                let why = match &self.blocked {
                    Some(reason) => format!("blocks publishers: {reason}"),
                    None => "has confirmed nothing for so long".to_owned(),
                };
                let text = format!("gave up after {limit} (--timeout): the broker {why}");
                return Err((Failure::new(Exit::Unconfirmed, text), None));
            }
        }
        Ok(())
    }

    fn lost(&self, error: &lapin::Error) -> (Failure, Option<u64>) {
        let refusal = self.connection.observed().refusal(error);
        // "message size 2000 is larger than configured max size 1000": only the size tells which message it was.
        let too_large = refusal.filter(|refusal| refusal.meaning() == Meaning::TooLarge);
        let size = too_large.and_then(|refusal| refusal.text.split(' ').find_map(|word| word.parse().ok()));
        let place = size.and_then(|size: u64| self.in_flight.iter().position(|message| message.size == size));
        let failure = ConnectError::refused(error, &self.connection, Asked::Publish(&self.route.exchange)).failure;
        (failure, place.map(|place| self.confirms.answered + place as u64 + 1))
    }

    /// Whether every message that was sent is answered.
    pub fn none_in_flight(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// How many messages are sent or being sent.
    pub fn sent(&self) -> u64 {
        self.confirms.answered + self.in_flight.len() as u64
    }
}

async fn or_never<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// What the broker has answered, in the order of publishing.
#[derive(Debug, Default)]
pub struct Confirms {
    /// How many confirms were received: `basic.ack` and `basic.nack`, one for each message.
    pub answered: u64,
    /// The size of the answered messages' bodies together, in bytes.
    pub bytes: u64,
    /// How many `basic.return` and `basic.nack` were received. LavinMQ sends both for the same message.
    failures: u64,
    /// The first message that was returned or nacked, or the range that it is in.
    pub not_queued: Option<NotQueued>,
}

/// A message that was returned or nacked: one of the messages `first` to `last`, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotQueued {
    /// The first that it can be.
    pub first: u64,
    /// The last that it can be.
    pub last: u64,
    /// Whether it was nacked; otherwise it was returned.
    pub nacked: bool,
}

impl Confirms {
    /// Counts the confirm of the next message, which was sent after `answered_before` confirms; `sent` are sent by now.
    fn count(&mut self, confirmation: Confirmation, size: u64, answered_before: u64, sent: u64) {
        self.answered += 1;
        self.bytes += size;
        let (nacked, returned) = (confirmation.is_nack(), confirmation.take_message().is_some());
        self.failures += u64::from(nacked) + u64::from(returned);
        // lapin 4.12 adds a return to whichever confirm it handles next, in no order if one frame confirms several. So
        // the message that was returned is this one, or was in flight together with it.
        let first = if returned { answered_before + 1 } else { self.answered };
        let last = if nacked { self.answered } else { sent };
        if (nacked || returned) && self.not_queued.is_none_or(|earlier| first < earlier.first) {
            self.not_queued = Some(NotQueued { first, last, nacked });
        }
    }

    /// How many messages are confirmed without a gap, from the first one.
    pub fn without_gap(&self) -> u64 {
        self.not_queued.map_or(self.answered, |message| message.first - 1)
    }

    /// How many messages were neither returned nor nacked. With LavinMQ, which does both, this may be too low.
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
    fn a_returned_or_nacked_message_is_never_placed_too_late() {
        let returned = || {
            let delivery = lapin::message::Delivery::mock(0, "".into(), "".into(), false, Vec::new());
            Some(BasicReturnMessage { delivery, reply_code: 312, reply_text: "NO_ROUTE".into() })
        };
        let acked = || (Ack(None), 0);
        let back = |answered_before| (Ack(returned()), answered_before);
        let nacked = || (Nack(None), 0);
        let both = |answered_before| (Nack(returned()), answered_before);
        let one_of = |first, last, nacked| Some(NotQueued { first, last, nacked });
        for (sent, answers, confirmed, expected) in [
            (3, vec![acked(), acked(), acked()], 3, None),
            (3, vec![acked()], 1, None),
            (4, vec![acked(), acked(), nacked(), acked()], 3, one_of(3, 3, true)),
            // The return came with the confirm of the third, and may be that of the second.
            (4, vec![acked(), acked(), back(1), acked()], 3, one_of(2, 4, false)),
            (3, vec![acked(), acked(), back(2)], 2, one_of(3, 3, false)),
            (4, vec![back(0), acked(), back(0), back(0)], 1, one_of(1, 4, false)),
            // A nack that brings the return of an earlier message.
            (3, vec![acked(), acked(), both(1)], 1, one_of(2, 3, true)),
            // LavinMQ returns and nacks a message that a full queue rejects.
            (3, vec![acked(), both(1), both(2)], 1, one_of(2, 2, true)),
            (3, vec![nacked(), back(0), acked()], 1, one_of(1, 1, true)),
        ] {
            let mut confirms = Confirms::default();
            let (count, shown) = (answers.len() as u64, format!("{answers:?}"));
            for (confirmation, answered_before) in answers {
                confirms.count(confirmation, 1, answered_before, sent);
            }
            assert_eq!((confirms.confirmed(), confirms.not_queued), (confirmed, expected), "{shown}");
            assert_eq!(confirms.without_gap(), expected.map_or(count, |message| message.first - 1));
        }
    }
}
