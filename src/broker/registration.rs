//! A consumer on a channel of its own: how it is registered, what comes of it, how it is cancelled.

use super::{
    connection::OpenConnection,
    consumer::ConsumerOptions,
    errors::{ConnectError, Meaning, Refusal},
    lost::DeliveryLost,
    topology::Incomplete,
};
use lapin::{
    Channel, Event,
    message::Delivery,
    options::{
        BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, DeliveryTag, FieldTable, ShortString},
};
use std::time::Duration;
use tokio_stream::StreamExt;

/// The consumer tag; one channel has one consumer.
const TAG: &str = "qconsume";

/// From this version on a consumer may ask for an acknowledgement timeout of its own, and the queue watches it.
pub(super) const CONSUMER_TIMEOUT_SINCE: (u32, u32) = (4, 3);

/// How full a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// So many messages are ready for a consumer.
    Ready(u32),
    /// The broker knows of no consumer, though there is one here: its figures come from no queue that answers.
    Unknown,
}

/// A consumer on a channel of its own.
pub(super) struct Registration {
    pub(super) connection: OpenConnection,
    pub(super) channel: Channel,
    /// `None` once it is cancelled by us.
    pub(super) consumer: Option<lapin::Consumer>,
    /// The acknowledgement timeout that the queue has taken from us.
    pub(super) ack_timeout: Option<Duration>,
    pub(super) queue: String,
}

/// Why a registration failed.
#[derive(Debug)]
pub(super) enum NotRegistered {
    /// The queue is to be created first, or (`false`) is there after all.
    Create(bool),
    /// A classic queue has no acknowledgement timeout, and refuses to be asked for one.
    NoAckTimeout,
    Failed(ConnectError),
}

/// What is asked of the broker, which the refusals of earlier attempts may have changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) create: bool,
    pub(super) ack_timeout: bool,
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration")
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl Registration {
    /// `declared`: what the queue is called that was declared on this connection before.
    pub(super) async fn open(
        mut connection: OpenConnection,
        options: ConsumerOptions,
        ask: Ask,
        declared: Option<String>,
    ) -> Result<Self, (OpenConnection, NotRegistered)> {
        if let Some(channel) = connection.last_channel.take() {
            // Should that fail, so does the next channel.
            let _ = channel.close(200, "OK".into()).await;
        }
        let queue = match declared {
            Some(queue) => Ok(queue),
            None => {
                let set_up = options
                    .topology
                    .set_up(&connection, &options.queue, ask.create);
                set_up.await.map_err(|incomplete| match incomplete {
                    Incomplete::NotThere => NotRegistered::Create(true),
                    Incomplete::Raced => NotRegistered::Create(false),
                    Incomplete::Failed(error) => NotRegistered::Failed(error),
                })
            }
        };
        let queue = match queue {
            Ok(queue) => queue,
            Err(why) => return Err((connection, why)),
        };
        let ack_timeout = options
            .ack_timeout
            .filter(|_| ask.ack_timeout && connection.version() >= Some(CONSUMER_TIMEOUT_SINCE));
        connection.observed().cancelled = false;
        match consume(&connection, &queue, ack_timeout).await {
            Ok((channel, consumer)) => Ok(Self {
                connection,
                channel,
                consumer: Some(consumer),
                ack_timeout,
                queue,
            }),
            Err(error) => {
                let refusal = Refusal::of(&error, &connection.observed());
                let refused_timeout = ack_timeout.is_some()
                    && refusal.is_some_and(|it| it.meaning() == Meaning::Precondition);
                let why = if refused_timeout {
                    tracing::debug!("the queue takes no x-consumer-timeout: {error}");
                    NotRegistered::NoAckTimeout
                } else {
                    NotRegistered::Failed(ConnectError::refused(
                        &error,
                        &connection,
                        "consume from",
                        &queue,
                    ))
                };
                Err((connection, why))
            }
        }
    }

    /// Gives the connection back, for another consumer or to be closed.
    pub(super) fn end(self) -> OpenConnection {
        let mut connection = self.connection;
        connection.last_channel = Some(self.channel);
        connection
    }

    /// The next thing that happens: a delivery, or the end. A loss may show in either stream, or in both.
    pub(super) async fn step(&mut self) -> Result<Delivery, DeliveryLost> {
        let delivery = async {
            match &mut self.consumer {
                Some(consumer) => consumer.next().await,
                None => std::future::pending().await,
            }
        };
        let events = self.connection.events.as_mut();
        let connection_error = async {
            let mut events = events;
            loop {
                match events.next().await {
                    Some(Event::Error(error)) => return error,
                    Some(_) => {}
                    // lapin keeps a sender for as long as the connection is there, and we keep that.
                    None => std::future::pending().await,
                }
            }
        };
        let next = tokio::select! {
            biased;
            next = delivery => next,
            error = connection_error => Some(Err(error)),
        };
        match next {
            Some(Ok(delivery)) => Ok(delivery),
            Some(Err(error)) => Err(self.delivery_lost(&error)),
            None => Err(DeliveryLost::ended(&self.connection.observed())),
        }
    }

    pub(super) fn delivery_lost(&self, error: &lapin::Error) -> DeliveryLost {
        DeliveryLost::new(error, &self.connection.observed())
    }

    pub(super) async fn depth(&mut self) -> Result<Depth, DeliveryLost> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = self
            .channel
            .queue_declare(self.queue.as_str().into(), passive, FieldTable::default())
            .await
            .map_err(|error| self.delivery_lost(&error))?;
        Ok(match declared.consumer_count() {
            0 => Depth::Unknown,
            _ => Depth::Ready(declared.message_count()),
        })
    }

    pub(super) async fn cancel(&mut self) -> Result<Option<Delivery>, DeliveryLost> {
        // Kept until its stream has ended: should this future be dropped, releasing goes on from here.
        let Some(consumer) = &mut self.consumer else {
            return Ok(None);
        };
        let cancelled = self
            .channel
            .basic_cancel(TAG.into(), BasicCancelOptions::default())
            .await;
        // The reply ends the consumer's stream, behind what came before it.
        let last = match cancelled {
            Ok(()) => consumer.next().await.transpose(),
            Err(error) => Err(error),
        };
        let last = last.map_err(|error| self.delivery_lost(&error))?;
        self.consumer = None;
        if last.is_none() && self.connection.observed().cancelled {
            return Err(DeliveryLost::cancelled(self.connection.version()));
        }
        Ok(last)
    }

    pub(super) async fn release(&mut self, held: Option<DeliveryTag>) -> lapin::Result<()> {
        let requeue = BasicNackOptions {
            requeue: true,
            ..BasicNackOptions::default()
        };
        if let Some(mut consumer) = self.consumer.take() {
            self.channel
                .basic_cancel(TAG.into(), BasicCancelOptions::default())
                .await?;
            while let Some(delivery) = consumer.next().await {
                let tag = delivery?.delivery_tag;
                self.channel.basic_nack(tag, requeue).await?;
            }
        }
        if let Some(tag) = held {
            self.channel.basic_nack(tag, requeue).await?;
        }
        // The reply shows that the channel has processed what was sent before.
        self.channel.basic_qos(1, BasicQosOptions::default()).await
    }
}

/// A channel with a consumer: prefetch and consume in one flight, which saves a round trip.
async fn consume(
    connection: &OpenConnection,
    queue: &str,
    ack_timeout: Option<Duration>,
) -> lapin::Result<(Channel, lapin::Consumer)> {
    let channel = connection.connection().create_channel().await?;
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
