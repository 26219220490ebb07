//! Publishes to one exchange with publisher confirms, many messages in flight.

use super::{
    confirms::Confirms,
    options::{Properties, Route},
};
use crate::{
    broker::{
        errors::{Asked, ConnectError, Meaning},
        reach::connection::OpenConnection,
    },
    clock::or_never,
    exit::{Exit, Failure},
    report::HumanDuration,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    protocol::basic,
    types::{AMQPValue, FieldTable},
};
use std::{
    collections::VecDeque,
    future::ready,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::{
    sync::{SemaphorePermit, mpsc::UnboundedReceiver},
    time::{Instant, sleep_until, timeout},
};

/// The bytes of a content header's frame that are not properties (AMQP 0-9-1, 2.3.5 and 2.3.5.2): type, channel and
/// size; class, weight and the body's size; the frame's end.
const AROUND_PROPERTIES: u64 = 7 + 12 + 1;

/// A body to publish, and the permit to have it in flight, until its confirm; or why there are no more.
pub type Body = Result<(Vec<u8>, SemaphorePermit<'static>), Failure>;

type ConfirmFuture = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>>>>;

/// Publishes persistent messages over a connection, which the caller closes.
pub struct Publisher<'a> {
    connection: &'a mut OpenConnection,
    channel: Channel,
    route: &'a Route,
    properties: BasicProperties,
    /// Of the encoded properties, in bytes.
    pub properties_size: usize,
    /// Longest wait for the next confirm.
    limit: Duration,
    /// When that wait began.
    waiting_since: Instant,
    /// Why the broker confirms nothing, while it blocks publishers.
    blocked: Option<String>,
    awaited: VecDeque<ConfirmFuture>,
    pub confirms: Confirms,
    /// Why there were no more bodies.
    unreadable: Option<Failure>,
}

impl<'a> Publisher<'a> {
    /// Opens a channel, and declares the queue if the route asks for it.
    ///
    /// # Errors
    /// If the broker refuses, doesn't reply within the limit, or would refuse every message.
    pub async fn open(
        connection: &'a mut OpenConnection,
        route: &'a Route,
        properties: &Properties,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let properties = properties.encode();
        // AMQP splits a body into frames, but not the properties.
        let frame_max = connection.lapin.configuration().frame_max();
        let room = u64::from(frame_max) - AROUND_PROPERTIES;
        let written = basic::gen_properties(&properties)(Vec::new().into());
        let size = written.expect("a Vec takes all of it").position;
        if size > room {
            return Err(Failure::config(format!(
                "properties and headers have {size} bytes, and only {room} fit into a frame of {frame_max} \
                 (frame_max); send less in headers, or raise frame_max in the broker's rabbitmq.conf and in the URL"
            )));
        }
        let open = async {
            let channel = connection.previous_channel.insert(connection.lapin.create_channel().await?);
            if let Some(kind) = &route.declare {
                let mut arguments = FieldTable::default();
                if kind != "default" {
                    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.as_str().into()));
                }
                let durable = QueueDeclareOptions { durable: true, ..Default::default() };
                channel.queue_declare(route.routing_key.as_str().into(), durable, arguments).await?;
            }
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            Ok(channel.clone())
        };
        let opened = timeout(limit, open).await.map_err(|_| {
            let limit = HumanDuration(limit);
            let declare = match route.declare {
                Some(_) => format!(", or declare queue {:?},", route.routing_key),
                None => String::new(),
            };
            let text = format!("the broker didn't open a channel for publishing{declare} within {limit} (--timeout)");
            Failure::new(Exit::Unavailable, text)
        })?;
        let asked = match route.declare {
            Some(_) => Asked::Declare(&route.routing_key),
            None => Asked::Publish(&route.exchange),
        };
        let channel = opened.map_err(|error| ConnectError::after_handshake(&error, connection, asked).failure)?;
        Ok(Self {
            connection,
            channel,
            route,
            properties,
            properties_size: size as usize,
            limit,
            waiting_since: Instant::now(),
            blocked: None,
            awaited: VecDeque::new(),
            confirms: Confirms::default(),
            unreadable: None,
        })
    }

    /// Publishes the bodies, and waits until each message is answered. When they end, one can't be read, or a message is
    /// returned or nacked, `bodies` becomes `None`. Dropping the future loses nothing: a second call goes on. `name` is
    /// what an error calls a message, by its number from 1.
    ///
    /// # Errors
    /// If a body can't be read, no confirm arrives within the limit, or the channel or the connection is lost.
    pub async fn run(
        &mut self,
        bodies: &mut Option<UnboundedReceiver<Body>>,
        name: impl Fn(u64) -> String,
    ) -> Result<(), Failure> {
        let limit = HumanDuration(self.limit);
        while bodies.is_some() || self.confirms.any_in_flight() {
            tokio::select! {
                biased;
                confirmation = or_never(self.awaited.front_mut()) => {
                    self.confirms.count(confirmation.map_err(|error| self.lost(&error, &name))?);
                    self.awaited.pop_front();
                    self.waiting_since = Instant::now();
                    if self.confirms.not_queued.is_some() {
                        *bodies = None;
                    }
                }
                event = self.connection.event() => match event {
                    Event::Error(error) => return Err(self.lost(&error, &name)),
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!("the broker blocks publishers: {reason}; giving up if it confirms nothing for {limit} (--timeout)");
                        self.blocked = Some(format!("blocks publishers: {reason}"));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker takes messages again");
                        self.blocked = None;
                    }
                    _ => {}
                },
                () = sleep_until(self.waiting_since + self.limit), if self.confirms.any_in_flight() => {
                    let why = self.blocked.as_deref().unwrap_or("has confirmed nothing for so long");
                    let text = format!("gave up after {limit} (--timeout): the broker {why}");
                    return Err(Failure::new(Exit::Unconfirmed, text));
                }
                body = or_never(bodies.as_mut().map(UnboundedReceiver::recv)) => match body {
                    Some(Ok((body, permit))) => self.send(body, permit),
                    Some(Err(failure)) => (*bodies, self.unreadable) = (None, Some(failure)),
                    None => *bodies = None,
                },
            }
        }
        self.unreadable.take().map_or(Ok(()), Err)
    }

    fn send(&mut self, body: Vec<u8>, permit: SemaphorePermit<'static>) {
        if !self.confirms.any_in_flight() {
            self.waiting_since = Instant::now();
        }
        self.confirms.sent_one(body.len() as u64);
        let (channel, properties) = (self.channel.clone(), self.properties.clone());
        let (exchange, key) = (self.route.exchange.as_str().into(), self.route.routing_key.as_str().into());
        let options = BasicPublishOptions { mandatory: self.route.mandatory_flag(), ..Default::default() };
        let mut confirm: ConfirmFuture = Box::pin(async move {
            let _permit = permit;
            let confirm = channel.basic_publish(exchange, key, options, &body, properties).await?;
            drop(body);
            confirm.await
        });
        // The first poll queues the message in lapin 4.12, which sends it even without another poll. For small messages
        // this is more than twice as fast as to wait until each is written.
        if let Poll::Ready(result) = confirm.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            confirm = Box::pin(ready(result));
        }
        self.awaited.push_back(confirm);
    }

    fn lost(&self, error: &lapin::Error, name: impl Fn(u64) -> String) -> Failure {
        let failure =
            ConnectError::after_handshake(error, self.connection, Asked::Publish(&self.route.exchange)).failure;
        let refusal = self.connection.observed().refusal(error);
        // "message size 2000 is larger than configured max size 1000": only the size tells which message it was.
        let too_large = refusal.filter(|refusal| refusal.meaning() == Meaning::TooLarge);
        let size = too_large.and_then(|refusal| refusal.text.split(' ').find_map(|word| word.parse().ok()));
        match size.and_then(|size| self.confirms.first_of_size(size)) {
            Some(number) => Failure::new(failure.exit, format!("{}: {failure}", name(number))),
            None => failure,
        }
    }
}
