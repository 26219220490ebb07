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
    BasicProperties, Channel, Event, PublisherConfirm,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    protocol::basic,
    types::{AMQPValue, FieldTable},
};
use std::{collections::VecDeque, future::Future, pin::Pin, time::Duration};
use tokio::{
    sync::{SemaphorePermit, mpsc::Receiver},
    time::{Instant, sleep_until, timeout},
};

/// The bytes of a content header's frame that are not properties (AMQP 0-9-1, 2.3.5 and 2.3.5.2): type, channel and
/// size; class, weight and the body's size; the frame's end.
const AROUND_PROPERTIES: u64 = 7 + 12 + 1;

/// A body to publish, and the permit to have it in flight; or why there is none. Nothing is taken after that.
pub type Body = Result<(Vec<u8>, SemaphorePermit<'static>), Failure>;

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
    /// The newest message, until it is written to the socket. Only one, because lapin buffers without limit.
    sending: Option<Pin<Box<dyn Future<Output = lapin::Result<PublisherConfirm>> + Send>>>,
    /// The confirms to come, of the messages before it.
    awaited: VecDeque<PublisherConfirm>,
    /// What was sent, and what the broker has answered.
    pub confirms: Confirms,
    /// Why there were no more bodies.
    unreadable: Option<Failure>,
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
            awaited: VecDeque::new(),
            confirms: Confirms::default(),
            unreadable: None,
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
        let opened = timeout(self.limit, open).await.map_err(|_| {
            let limit = HumanDuration(self.limit);
            Failure::new(Exit::Unavailable, format!("no reply from the broker within {limit} (--timeout)"))
        })?;
        let asked = if declare.is_some() { Asked::Declare(routing_key) } else { Asked::Publish(exchange) };
        opened.map_err(|error| ConnectError::after_handshake(&error, &self.connection, asked).failure)
    }

    /// Publishes the bodies, and waits until each message is answered. When they end, or a message is returned or
    /// nacked, `bodies` becomes `None`. Dropping the future loses nothing: a second call goes on.
    ///
    /// # Errors
    /// If a body can't be read, no confirm arrives within the limit, or the channel or the connection is lost. `name`
    /// says what to call a message that is too large for the broker, by its number from 1.
    pub async fn run(
        &mut self,
        bodies: &mut Option<Receiver<Body>>,
        name: impl Fn(u64) -> String,
    ) -> Result<(), Failure> {
        let limit = HumanDuration(self.limit);
        while bodies.is_some() || !self.confirms.none_in_flight() {
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
                written = or_never(self.sending.as_mut()) => {
                    self.awaited.push_back(written.map_err(|error| self.lost(&error, &name))?);
                    self.sending = None;
                }
                event = self.connection.event() => match event {
                    Event::Error(error) => return Err(self.lost(&error, &name)),
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
                () = sleep_until(self.waiting_since + self.limit), if !self.confirms.none_in_flight() => {
                    let why = match &self.blocked {
                        Some(reason) => format!("blocks publishers: {reason}"),
                        None => "has confirmed nothing for so long".to_owned(),
                    };
                    let text = format!("gave up after {limit} (--timeout): the broker {why}");
                    return Err(Failure::new(Exit::Unconfirmed, text));
                }
                body = or_never(bodies.as_mut().map(Receiver::recv)), if self.sending.is_none() => match body {
                    Some(Ok((body, permit))) => self.send(body, permit),
                    Some(Err(failure)) => (*bodies, self.unreadable) = (None, Some(failure)),
                    None => *bodies = None,
                },
            }
        }
        self.unreadable.take().map_or(Ok(()), Err)
    }

    fn send(&mut self, body: Vec<u8>, permit: SemaphorePermit<'static>) {
        if self.confirms.none_in_flight() {
            self.waiting_since = Instant::now();
        }
        self.confirms.sent_one(body.len() as u64, permit);
        let channel = self.channel.clone().expect("it is open");
        let (exchange, key) = (self.route.exchange.as_str().into(), self.route.routing_key.as_str().into());
        let options = BasicPublishOptions { mandatory: self.route.mandatory_flag(), ..Default::default() };
        let properties = self.properties.clone();
        let sending = async move { channel.basic_publish(exchange, key, options, &body, properties).await };
        self.sending = Some(Box::pin(sending));
    }

    fn lost(&self, error: &lapin::Error, name: impl Fn(u64) -> String) -> Failure {
        let failure =
            ConnectError::after_handshake(error, &self.connection, Asked::Publish(&self.route.exchange)).failure;
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
