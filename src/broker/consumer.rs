//! One delivery at a time, and whether it is still ours.

use super::{
    connect::{Attempts, Broker, Link},
    errors::{ConnectError, DeliveryLost, said},
    message::Message,
    topology::{Declare, Topology},
};
use crate::{
    exit::{Exit, Failure},
    report::mentioned,
};
use lapin::{
    Channel, Connection, Event,
    message::Delivery,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    protocol::AMQPErrorKind,
    types::{AMQPValue, DeliveryTag, FieldTable, ShortString},
};
use std::time::Duration;
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::StreamExt;

/// Longest time that giving messages back, or a goodbye, may take when nothing answers. What isn't given back by
/// then goes back by itself when the connection ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// The consumer tag; one channel has one consumer.
const TAG: &str = "qconsume";

/// From this version on a consumer may ask for an acknowledgement timeout of its own.
pub(super) const CONSUMER_TIMEOUT_SINCE: (u32, u32) = (4, 3);

/// What to consume from, and how.
#[derive(Clone, Debug)]
pub struct ConsumeOptions {
    /// The queue's name; empty where the broker is to choose one.
    pub queue: String,
    /// What is made before it is consumed from.
    pub topology: Topology,
    /// `--ack-timeout`: how long the broker is asked to wait for the acknowledgement.
    pub ack_timeout: Option<Duration>,
}

/// How full a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// So many messages wait for a consumer.
    Ready(u32),
    /// The broker knows of no consumer, though there is one here: its figures come from no queue that answers.
    Unknown,
}

/// Takes messages from one queue, one after the other, over as many connections as it needs.
#[derive(Debug)]
pub struct Consumer {
    broker: Broker,
    options: ConsumeOptions,
    registered: Option<Subscription>,
    /// What the queue is called, once it was consumed from.
    known_as: Option<String>,
    /// A registration that was begun: kept, as the broker may have pushed a message before its answer is here.
    registering: Option<JoinHandle<Result<Subscription, (Link, ConnectError)>>>,
}

impl Consumer {
    /// A consumer that isn't registered yet.
    #[must_use]
    pub fn new(broker: Broker, options: ConsumeOptions) -> Self {
        Self {
            broker,
            options,
            registered: None,
            known_as: None,
            registering: None,
        }
    }

    /// The queue's name; empty before the broker has chosen it.
    #[must_use]
    pub fn queue(&self) -> &str {
        self.known_as.as_deref().unwrap_or(&self.options.queue)
    }

    /// Whether another connection would find the queue again.
    ///
    /// # Errors
    /// When the queue was the lost connection's own.
    pub fn survives(&self, why: &str) -> Result<(), Failure> {
        match &self.known_as {
            Some(queue) if self.options.topology.declare == Declare::Exclusive => {
                Err(Failure::new(
                    Exit::Unavailable,
                    format!(
                        "queue {queue:?} is gone, and what was in it: it was the lost connection's own ({why})"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Whether the broker knows of this consumer, as far as we know.
    #[must_use]
    pub fn is_registered(&self) -> bool {
        self.registered
            .as_ref()
            .is_some_and(|subscription| subscription.consumer.is_some())
    }

    /// Connects as often as it needs and registers the consumer, within `--connect-timeout`.
    ///
    /// Dropping the future loses no message: see [`Consumer::give_back`].
    ///
    /// # Errors
    /// The permanent failure, or when time is up the last transient one.
    pub async fn register(&mut self) -> Result<(), Failure> {
        let mut attempts = Attempts::new(self.broker.options.timeout);
        let mut link = match self.registered.take() {
            // Cancelled by us, or by the broker: the connection is good, the channel isn't reused.
            Some(subscription) => subscription.into_link(),
            None => None,
        };
        if link.is_none() {
            self.survives("the connection was lost")?;
        }
        // On a connection that is kept, what was made for it is still there.
        let mut known_as = link.as_ref().and(self.known_as.clone());
        loop {
            let deadline = attempts.deadline;
            let trouble = match link.take() {
                Some(link) => Ok(link),
                None => match timeout_at(deadline, self.broker.open(deadline)).await {
                    Ok(opened) => opened,
                    Err(_) => return Err(attempts.out_of_time(self.broker.stage())),
                },
            };
            let trouble = match trouble {
                Err(trouble) => trouble,
                Ok(opened) => {
                    let task = self.registering.insert(tokio::spawn(Subscription::open(
                        opened,
                        self.options.clone(),
                        known_as.take(),
                    )));
                    let stage = "waiting for the answer to basic.consume";
                    let answer = timeout_at(deadline, mentioned(stage, task)).await;
                    let Ok(answer) = answer else {
                        return Err(attempts.out_of_time(stage));
                    };
                    self.registering = None;
                    match answer.expect("opening a subscription doesn't panic") {
                        Ok(subscription) => {
                            if self.known_as.is_none() && self.options.queue.is_empty() {
                                tracing::info!(
                                    "server provided queue name: {}",
                                    subscription.queue
                                );
                            }
                            self.known_as = Some(subscription.queue.clone());
                            self.registered = Some(subscription);
                            return Ok(());
                        }
                        Err((used, trouble)) => {
                            if trouble.queue_missing {
                                link = Some(used);
                            }
                            trouble
                        }
                    }
                }
            };
            self.survives(&trouble.failure.message)?;
            attempts.failed(trouble).await?;
        }
    }

    /// The next message. Dropping the future loses none.
    ///
    /// # Errors
    /// Why the consumer is no longer registered; nothing was taken.
    pub async fn next(&mut self) -> Result<Message, DeliveryLost> {
        let subscription = self.subscription();
        let next = subscription.next().await;
        if next.is_err() {
            self.registered = None;
        }
        next
    }

    /// Waits until the message that is held isn't ours any more.
    pub async fn lost(&mut self) -> DeliveryLost {
        self.subscription().lost().await
    }

    /// How full the queue is, by a passive declare.
    ///
    /// # Errors
    /// Why the consumer is no longer registered.
    pub async fn depth(&mut self) -> Result<Depth, DeliveryLost> {
        let depth = self.subscription().depth().await;
        if depth.is_err() {
            self.registered = None;
        }
        depth
    }

    /// Cancels the consumer; a message that came before the answer is still ours.
    ///
    /// # Errors
    /// Why the consumer was no longer registered; nothing was taken.
    pub async fn cancel(&mut self) -> Result<Option<Message>, DeliveryLost> {
        let last = self.subscription().cancel().await;
        if last.is_err() {
            self.registered = None;
        }
        last
    }

    /// Gives back whatever may have arrived, before an end without a command; takes two seconds at most.
    pub async fn give_back(&mut self) {
        let work = async {
            if let Some(task) = self.registering.take()
                && let Ok(Ok(subscription)) = task.await
            {
                self.registered = Some(subscription);
            }
            if let Some(subscription) = &mut self.registered {
                subscription.give_back().await?;
            }
            lapin::Result::Ok(())
        };
        match timeout(GOODBYE, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("giving back: {}", said(&error)),
            Err(_) => {
                tracing::debug!("giving back: no answer within {GOODBYE:?}");
                // Who doesn't answer needs no goodbye either.
                self.registered = None;
            }
        }
    }

    /// Says goodbye to the broker; whether it answers changes nothing any more.
    pub async fn close(&mut self) {
        let Some(subscription) = self.registered.take() else {
            return;
        };
        let link = &subscription.link;
        let close = async {
            tokio::select! {
                // lapin would tell of the broker's answer some changes of thread later.
                () = link.seen.closed() => Ok(()),
                closed = link.connection.close(200, "OK".into()) => closed,
            }
        };
        match timeout(GOODBYE, close).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("closing the connection: {}", said(&error)),
            Err(_) => tracing::debug!("closing the connection: no answer within {GOODBYE:?}"),
        }
    }

    pub(super) fn subscription(&mut self) -> &mut Subscription {
        self.registered
            .as_mut()
            .expect("only called while there is a subscription")
    }
}

/// A consumer on a channel of its own, and the message that it holds.
pub(super) struct Subscription {
    pub(super) link: Link,
    pub(super) channel: Channel,
    /// `None` once it is cancelled by us.
    pub(super) consumer: Option<lapin::Consumer>,
    pub(super) held: Option<DeliveryTag>,
    /// When the last message came.
    pub(super) taken: Instant,
    /// The acknowledgement timeout that we have asked for, if the queue has one.
    pub(super) asked_timeout: Option<Duration>,
    queue: String,
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription")
            .field("queue", &self.queue)
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl Subscription {
    /// `known_as`: what the queue is called that was made for this consumer before.
    async fn open(
        mut link: Link,
        options: ConsumeOptions,
        known_as: Option<String>,
    ) -> Result<Self, (Link, ConnectError)> {
        let _opening = link.opening.take();
        let queue = match known_as {
            Some(queue) => queue,
            None => match options
                .topology
                .make(&link.connection, &options.queue)
                .await
            {
                Ok(queue) => queue,
                Err(trouble) => return Err((link, trouble)),
            },
        };
        let mut asks = options
            .ack_timeout
            .filter(|_| link.version() >= Some(CONSUMER_TIMEOUT_SINCE));
        let consumed = match consume(&link.connection, &queue, asks).await {
            // A classic queue has no such timeout, and says so with 406.
            Err(error) if asks.is_some() && refuses_argument(&error) => {
                tracing::debug!(
                    "the queue takes no acknowledgement timeout: {}",
                    said(&error)
                );
                asks = None;
                consume(&link.connection, &queue, None).await
            }
            other => other,
        };
        match consumed {
            Ok((channel, consumer)) => Ok(Self {
                link: link.forget_events().await,
                channel,
                consumer: Some(consumer),
                held: None,
                taken: Instant::now(),
                asked_timeout: asks,
                queue,
            }),
            Err(error) => Err((link, ConnectError::in_consume(&error, &queue))),
        }
    }

    /// The connection, if it is still good.
    fn into_link(self) -> Option<Link> {
        self.link
            .connection
            .status()
            .connected()
            .then_some(self.link)
    }

    /// The body of a delivery, which lapin hasn't; only once.
    fn body(&self, delivery: &Delivery) -> Option<Vec<u8>> {
        let (channel, tag) = (self.channel.id(), delivery.delivery_tag);
        self.link.bodies.take(channel, tag)
    }

    fn take(&mut self, mut delivery: Delivery) -> Message {
        self.held = Some(delivery.delivery_tag);
        if let Some(body) = self.body(&delivery) {
            delivery.data = body;
        }
        self.taken = Instant::now();
        Message::new(delivery, &self.queue)
    }

    async fn next(&mut self) -> Result<Message, DeliveryLost> {
        match self.step().await {
            Ok(delivery) => Ok(self.take(delivery)),
            Err(loss) => Err(loss),
        }
    }

    async fn lost(&mut self) -> DeliveryLost {
        loop {
            match self.step().await {
                Err(loss) => return loss,
                // With a prefetch of one the broker doesn't; if it did, the message would go back with the connection.
                Ok(second) => {
                    drop(self.body(&second));
                    tracing::warn!("the broker pushed a second message; it goes back");
                }
            }
        }
    }

    /// The next thing that happens: a delivery, or the end.
    async fn step(&mut self) -> Result<Delivery, DeliveryLost> {
        let version = self.link.version();
        let channel = &self.channel;
        let events = self.link.events.as_mut();
        let connection = async {
            let mut events = events;
            loop {
                match events.next().await {
                    // Of an earlier channel, which has found no queue: lapin marks a channel as closed first and
                    // tells of it then.
                    Some(Event::Error(error))
                        if is_soft(&error) && channel.status().connected() =>
                    {
                        tracing::debug!("an earlier channel's error: {}", said(&error));
                    }
                    Some(Event::Error(error)) => return error,
                    Some(_) => {}
                    // lapin keeps a sender for as long as the connection is there, and we keep that.
                    None => std::future::pending().await,
                }
            }
        };
        let delivery = async {
            match &mut self.consumer {
                Some(consumer) => consumer.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            next = delivery => match next {
                Some(Ok(delivery)) => Ok(delivery),
                Some(Err(error)) => Err(DeliveryLost::new(&error, version)),
                None => Err(DeliveryLost::cancelled(version)),
            },
            error = connection => Err(DeliveryLost::new(&error, version)),
        }
    }

    async fn depth(&mut self) -> Result<Depth, DeliveryLost> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = self
            .channel
            .queue_declare(self.queue.as_str().into(), passive, FieldTable::default())
            .await
            .map_err(|error| DeliveryLost::new(&error, self.link.version()))?;
        Ok(match declared.consumer_count() {
            0 => Depth::Unknown,
            _ => Depth::Ready(declared.message_count()),
        })
    }

    async fn cancel(&mut self) -> Result<Option<Message>, DeliveryLost> {
        let version = self.link.version();
        // Kept until its stream has ended: should this future be dropped, giving back goes on from here.
        let Some(consumer) = &mut self.consumer else {
            return Ok(None);
        };
        self.channel
            .basic_cancel(TAG.into(), BasicCancelOptions::default())
            .await
            .map_err(|error| DeliveryLost::new(&error, version))?;
        // The answer ends the consumer's stream, behind what came before it.
        let last = consumer.next().await;
        self.consumer = None;
        match last {
            Some(Ok(delivery)) => Ok(Some(self.take(delivery))),
            Some(Err(error)) => Err(DeliveryLost::new(&error, version)),
            None if self.link.seen.cancelled() => Err(DeliveryLost::cancelled(version)),
            None => Ok(None),
        }
    }

    async fn give_back(&mut self) -> lapin::Result<()> {
        let back = BasicNackOptions {
            requeue: true,
            ..BasicNackOptions::default()
        };
        if let Some(mut consumer) = self.consumer.take() {
            self.channel
                .basic_cancel(TAG.into(), BasicCancelOptions::default())
                .await?;
            while let Some(delivery) = consumer.next().await {
                self.channel
                    .basic_nack(delivery?.delivery_tag, back)
                    .await?;
            }
        }
        if let Some(tag) = self.held.take() {
            self.channel.basic_nack(tag, back).await?;
        }
        // Its answer shows that what was sent before has been taken in.
        self.channel.basic_qos(1, BasicQosOptions::default()).await
    }
}

/// A channel with a consumer: prefetch and consume in one flight.
async fn consume(
    connection: &Connection,
    queue: &str,
    ack_timeout: Option<Duration>,
) -> lapin::Result<(Channel, lapin::Consumer)> {
    let channel = connection.create_channel().await?;
    let mut arguments = FieldTable::default();
    if let Some(limit) = ack_timeout {
        let milliseconds = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        arguments.insert(
            ShortString::from("x-consumer-timeout"),
            AMQPValue::LongLongInt(milliseconds),
        );
    }
    let (prefetch, consumer) = tokio::join!(
        biased;
        channel.basic_qos(1, BasicQosOptions::default()),
        channel.basic_consume(
            queue.into(),
            TAG.into(),
            BasicConsumeOptions::default(),
            arguments,
        ),
    );
    // The consumer's error says more: the channel's end answers both.
    let consumer = consumer?;
    prefetch?;
    Ok((channel, consumer))
}

/// Whether an error ends a channel only, not the connection.
fn is_soft(error: &lapin::Error) -> bool {
    matches!(
        super::errors::protocol(error),
        Some((AMQPErrorKind::Soft(_), _))
    )
}

fn refuses_argument(error: &lapin::Error) -> bool {
    super::errors::protocol(error).is_some_and(|(_, text)| text.contains("x-consumer-timeout"))
}
