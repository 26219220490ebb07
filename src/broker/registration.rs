//! A consumer on a channel of its own: how it is registered, what comes of it, how it is cancelled.

use super::{
    connection::OpenConnection,
    errors::{ConnectError, Meaning},
    lost::DeliveryLost,
    refused::Asked,
    topology::{Ask, Declare, NotRegistered, Topology},
};
use lapin::{
    Channel, Event,
    message::Delivery,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions},
    types::{AMQPValue, DeliveryTag, FieldTable},
};
use std::{future::pending, time::Duration};
use tokio_stream::StreamExt;

/// The consumer tag; one channel has one consumer.
const TAG: &str = "qconsume";

/// From this version on a consumer may ask for an acknowledgement timeout of its own, and the queue watches it.
pub(super) const CONSUMER_TIMEOUT_SINCE: (u32, u32) = (4, 3);

/// `basic.nack` with requeue releases a message; quorum queues from RabbitMQ 4.3 on don't count it.
pub(super) const RELEASE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

/// What to consume from, and how.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// The queue's name; empty where the broker is to choose one.
    pub queue: String,
    /// What is declared before it is consumed from.
    pub topology: Topology,
    /// `--ack-timeout`: how long the broker is asked to wait for the acknowledgement.
    pub ack_timeout: Option<Duration>,
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
        match register(&connection, &options, ask, declared).await {
            Ok((queue, ack_timeout, channel, consumer)) => {
                Ok(Self { connection, channel, consumer: Some(consumer), ack_timeout, queue })
            }
            Err(why) => Err((connection, why)),
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
                None => pending().await,
            }
        };
        let connection = &mut self.connection;
        let connection_error = async {
            loop {
                if let Event::Error(error) = connection.event().await {
                    return error;
                }
            }
        };
        let next = tokio::select! {
            biased;
            next = delivery => next,
            error = connection_error => Some(Err(error)),
        };
        match next {
            Some(delivery) => delivery.map_err(|error| self.delivery_lost(&error)),
            None => Err(DeliveryLost::ended(&self.connection.observed())),
        }
    }

    pub(super) fn delivery_lost(&self, error: &lapin::Error) -> DeliveryLost {
        DeliveryLost::new(error, &self.connection.observed())
    }

    pub(super) async fn cancel(&mut self) -> Result<Option<Delivery>, DeliveryLost> {
        // Kept until its stream has ended: should this future be dropped, releasing goes on from here.
        let Some(consumer) = &mut self.consumer else {
            return Ok(None);
        };
        let cancel = BasicCancelOptions::default();
        // The reply ends the consumer's stream, behind what came before it.
        let last = match self.channel.basic_cancel(TAG.into(), cancel).await {
            Ok(()) => consumer.next().await.transpose(),
            Err(error) => Err(error),
        };
        let last = last.map_err(|error| self.delivery_lost(&error))?;
        self.consumer = None;
        let observed = self.connection.observed();
        if last.is_none() && observed.cancelled {
            return Err(DeliveryLost::ended(&observed));
        }
        Ok(last)
    }

    pub(super) async fn release(&mut self, held: Option<DeliveryTag>) -> lapin::Result<()> {
        if let Some(mut consumer) = self.consumer.take() {
            let cancel = BasicCancelOptions::default();
            self.channel.basic_cancel(TAG.into(), cancel).await?;
            while let Some(delivery) = consumer.next().await {
                let tag = delivery?.delivery_tag;
                self.channel.basic_nack(tag, RELEASE).await?;
            }
        }
        if let Some(tag) = held {
            self.channel.basic_nack(tag, RELEASE).await?;
        }
        self.barrier().await
    }

    /// Confirms all that was sent before on this channel: a channel processes its methods in order, and unlike channel.close and
    /// connection.close, which are answered even in a race with a channel error, qos is answered only when all went well before.
    pub(super) async fn barrier(&self) -> lapin::Result<()> {
        self.channel.basic_qos(1, BasicQosOptions::default()).await
    }
}

/// The queue's name, the acknowledgement timeout that it has taken, and its consumer on a channel.
type Registered = (String, Option<Duration>, Channel, lapin::Consumer);

async fn register(
    connection: &OpenConnection,
    options: &ConsumerOptions,
    ask: Ask,
    declared: Option<String>,
) -> Result<Registered, NotRegistered> {
    let queue = match declared {
        Some(queue) => queue,
        None => {
            let topology = &options.topology;
            topology.set_up(connection, &options.queue, ask).await?
        }
    };
    // An exclusive queue is a classic one, which refuses: a refusal costs the connection, and with it the queue.
    let may_ask = ask.ack_timeout
        && options.topology.declare != Declare::Exclusive
        && connection.version() >= Some(CONSUMER_TIMEOUT_SINCE);
    let ack_timeout = options.ack_timeout.filter(|_| may_ask);
    connection.observed().cancelled = false;
    match consume(connection, &queue, ack_timeout).await {
        Ok((channel, consumer)) => Ok((queue, ack_timeout, channel, consumer)),
        // A classic queue has no acknowledgement timeout, and refuses to be asked for one.
        Err(error) if ack_timeout.is_some() && connection.meaning(&error) == Some(Meaning::Precondition) => {
            tracing::debug!("the queue takes no x-consumer-timeout: {error}");
            // What was to be created is there by now.
            Err(NotRegistered::RetryWith(Ask { create: false, ack_timeout: false }))
        }
        Err(error) => {
            let asked = Asked::Queue("consume from", &queue);
            Err(ConnectError::refused(&error, connection, asked).into())
        }
    }
}

/// A channel with a consumer: prefetch and consume in one flight, which saves a round trip.
async fn consume(
    connection: &OpenConnection,
    queue: &str,
    ack_timeout: Option<Duration>,
) -> lapin::Result<(Channel, lapin::Consumer)> {
    let channel = connection.lapin.create_channel().await?;
    let mut arguments = FieldTable::default();
    if let Some(limit) = ack_timeout {
        let milliseconds = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let limit = AMQPValue::LongLongInt(milliseconds);
        arguments.insert("x-consumer-timeout".into(), limit);
    }
    let options = BasicConsumeOptions::default();
    let (prefetch, consumer) = tokio::join!(
        biased;
        channel.basic_qos(1, BasicQosOptions::default()),
        channel.basic_consume(queue.into(), TAG.into(), options, arguments),
    );
    // The consumer's error says more: the channel's end answers both.
    let consumer = consumer?;
    prefetch?;
    Ok((channel, consumer))
}
