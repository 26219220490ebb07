//! A consumer on a channel of its own: how it is made, what comes of it, how it is cancelled.

use crate::{
    broker::{
        errors::{Asked, ConnectError, DeliveryLost, Meaning},
        reach::connection::OpenConnection,
        topology::{Create, Declare, NotSubscribed, Request, Topology},
    },
    report::with_reminders,
};
use lapin::{
    Channel, Event,
    message::Delivery,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, DeliveryTag, FieldTable},
};
use std::{future::pending, time::Duration};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::StreamExt;

/// The consumer tag; one channel has one consumer.
const TAG: &str = "qconsume";

/// From this version on a consumer may ask for an acknowledgement timeout of its own, and the queue watches it.
const CONSUMER_TIMEOUT_SINCE: (u32, u32) = (4, 3);

/// Longest wait for a queue to say how many messages it has: its leader may be gone.
const DEPTH_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the reply to a cancel when nothing was delivered.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// `basic.nack` with requeue releases a message; quorum queues from RabbitMQ 4.3 on don't count it.
pub(super) const RELEASE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

/// What to consume from, and how.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// The queue's name; empty if the broker is to choose one.
    pub queue: String,
    /// What is declared before it is consumed from.
    pub topology: Topology,
    /// `--ack-timeout`: how long the broker is asked to wait for the acknowledgement.
    pub ack_timeout: Option<Duration>,
}

/// A consumer on a channel of its own.
pub(super) struct Subscription {
    pub(super) connection: OpenConnection,
    pub(super) channel: Channel,
    /// `None` once it is cancelled by us.
    pub(super) consumer: Option<lapin::Consumer>,
    /// A message that `settle` has looked at, and that is the next one.
    next: Option<Delivery>,
    /// How many deliveries have been handed out, or dropped.
    taken: u64,
    /// `--ack-timeout`, whether or not the queue knows of it.
    pub(super) ack_timeout: Option<Duration>,
    pub(super) queue: String,
}

impl Subscription {
    /// Subscribes until `deadline`, or until `give_up` is dropped or sent.
    ///
    /// `declared`: the name of the queue that was declared on this connection before.
    pub(super) async fn open(
        mut connection: OpenConnection,
        options: ConsumerOptions,
        request: Request,
        declared: Option<String>,
        deadline: Instant,
        give_up: oneshot::Receiver<()>,
    ) -> Result<Self, (OpenConnection, NotSubscribed)> {
        const STAGE: &str = "waiting for the reply to basic.consume";
        {
            // Those of an earlier consumer are not ours.
            let mut observed = connection.observed();
            (observed.cancelled, observed.deliveries) = (false, 0);
        }
        let last_channel = connection.last_channel.take();
        let reply = async {
            if let Some(channel) = last_channel {
                // Should that fail, so does the next channel.
                let _ = channel.close(200, "OK".into()).await;
            }
            subscribe(&connection, &options, request, declared).await
        };
        let reply = with_reminders(STAGE, reply);
        let subscribed = tokio::select! {
            biased;
            subscribed = timeout_at(deadline, reply) => subscribed.ok(),
            _ = give_up => None,
        };
        match subscribed {
            Some(Ok((queue, channel, consumer))) => {
                let ack_timeout = options.ack_timeout;
                Ok(Self { connection, channel, consumer: Some(consumer), next: None, taken: 0, ack_timeout, queue })
            }
            Some(Err(why)) => Err((connection, why)),
            None => Err((connection, ConnectError::no_answer(STAGE).into())),
        }
    }

    /// Gives the connection back, for another consumer or to be closed.
    pub(super) fn end(self) -> OpenConnection {
        let mut connection = self.connection;
        connection.last_channel = Some(self.channel);
        connection
    }

    /// The next thing that happens: a delivery, or the end. A loss may show in either stream, or in both. Dropping the future
    /// loses nothing.
    pub(super) async fn step(&mut self) -> Result<Delivery, DeliveryLost> {
        if let Some(delivery) = self.next.take() {
            return Ok(delivery);
        }
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
            Some(Ok(delivery)) => {
                self.taken += 1;
                Ok(delivery)
            }
            Some(Err(error)) => Err(self.delivery_lost(&error)),
            None => Err(DeliveryLost::ended(&self.connection.observed())),
        }
    }

    /// Puts a delivery back, to be the next one.
    pub(super) fn put_back(&mut self, delivery: Delivery) {
        self.next = Some(delivery);
    }

    /// Whether the broker has delivered more than was taken. By the tap: lapin knows nothing of what comes to a consumer that it
    /// has cancelled without waiting.
    pub(super) fn has_another(&self) -> bool {
        self.connection.observed().deliveries > self.taken
    }

    pub(super) fn delivery_lost(&self, error: &lapin::Error) -> DeliveryLost {
        DeliveryLost::new(error, &self.connection)
    }

    /// Why a second barrier has got no answer. If only the channel is gone, or lapin can't read why, it is the acknowledgement
    /// timeout, see `Settling::asks_twice`.
    pub(super) fn unconfirmed_again(&self, error: &lapin::Error) -> DeliveryLost {
        if self.connection.is_connected() || self.connection.observed().closed_unreadably {
            return DeliveryLost::timed_out(self.connection.version());
        }
        self.delivery_lost(error)
    }

    /// How many messages are ready, by a passive declare. `None` if the reply lists no consumers although we are one, or if
    /// there is no reply: the queue's leader doesn't answer, so the count means nothing.
    pub(super) async fn depth(&self) -> Result<Option<u32>, DeliveryLost> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declare = self.channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default());
        match timeout(DEPTH_TIMEOUT, declare).await {
            Ok(Ok(declared)) => Ok((declared.consumer_count() > 0).then(|| declared.message_count())),
            Ok(Err(error)) => Err(self.delivery_lost(&error)),
            Err(_) => Ok(None),
        }
    }

    /// Cancels the consumer, and returns the message that has arrived before the reply, or has begun to.
    pub(super) async fn cancel(&mut self) -> Result<Option<Delivery>, DeliveryLost> {
        if let Some(delivery) = self.next.take() {
            return Ok(Some(delivery));
        }
        // Kept until its stream has ended: should this future be dropped, releasing goes on from here.
        let Some(consumer) = &mut self.consumer else {
            return Ok(None);
        };
        let cancel = BasicCancelOptions::default();
        let last = match timeout(CANCEL_TIMEOUT, self.channel.basic_cancel(TAG.into(), cancel)).await {
            Ok(Ok(())) => last_of(consumer).await,
            Ok(Err(error)) => Err(error),
            Err(_) if self.has_another() => {
                // The reply stands behind the rest of its body, and ends the stream that is read no further.
                let delivery = self.step().await?;
                self.consumer = None;
                return Ok(Some(delivery));
            }
            Err(_) => return Ok(None),
        };
        let last = last.map_err(|error| self.delivery_lost(&error))?;
        self.taken += u64::from(last.is_some());
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
        let put_back = self.next.take().map(|delivery| delivery.delivery_tag);
        for tag in held.into_iter().chain(put_back) {
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

/// What has come to a consumer before the reply to its cancel, which ends its stream.
///
/// All of it is here when the reply is, so dropping the future loses nothing. lapin 4.12 takes the end of the channel or of the
/// connection for a reply, too: then the stream ends with the error, and what came is requeued.
async fn last_of(consumer: &mut lapin::Consumer) -> lapin::Result<Option<Delivery>> {
    let mut last = None;
    while let Some(next) = consumer.next().await {
        last.get_or_insert(next?);
    }
    Ok(last)
}

/// The queue's name, and its consumer on a channel.
type Subscribed = (String, Channel, lapin::Consumer);

async fn subscribe(
    connection: &OpenConnection,
    options: &ConsumerOptions,
    request: Request,
    declared: Option<String>,
) -> Result<Subscribed, NotSubscribed> {
    let ask_for_timeout = request.ack_timeout;
    let queue = match declared {
        Some(queue) => queue,
        None => options.topology.set_up(connection, &options.queue, request).await?,
    };
    // An exclusive queue is a classic one, which refuses: a refusal costs the connection, and with it the queue.
    let may_ask = ask_for_timeout
        && options.topology.declare != Declare::Exclusive
        && connection.version() >= Some(CONSUMER_TIMEOUT_SINCE);
    let ack_timeout = options.ack_timeout.filter(|_| may_ask);
    match consume(connection, &queue, ack_timeout).await {
        Ok((channel, consumer)) => Ok((queue, channel, consumer)),
        // A classic queue has no acknowledgement timeout, and refuses to be asked for one.
        Err(error) if ack_timeout.is_some() && connection.meaning(&error) == Some(Meaning::Precondition) => {
            tracing::debug!("the queue takes no x-consumer-timeout: {error}");
            // The queue is there by now.
            Err(NotSubscribed::RetryWith(Request { create: Create::IfMissing, ack_timeout: false }))
        }
        Err(error) => {
            Err(ConnectError::refused(&error, connection, Asked::Queue { action: "consume from", queue: &queue })
                .into())
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
    // 0 is the default. Only streams refuse the argument: their messages can't be settled, and an idle one looks like any queue
    // (seen with RabbitMQ 3.10 and 4.3; LavinMQ's refuse it too).
    arguments.insert("x-priority".into(), AMQPValue::LongInt(0));
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
