//! A subscription: a consumer on a channel of its own, what it delivers, and how it ends.

use crate::{
    broker::{
        errors::{Asked, ConnectError, DeliveryLost, Meaning},
        reach::connection::OpenConnection,
        topology::{Declare, DeclareStep, NotSubscribed, Plan, Topology},
    },
    clock::or_never,
    report::with_reminders,
};
use lapin::{
    Channel, Event,
    message::Delivery,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::Duration;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::StreamExt;

const CONSUMER_TAG: &str = "qconsume";

/// Longest wait for the number of ready messages: the queue's leader may be gone.
const DEPTH_TIMEOUT: Duration = Duration::from_secs(5);

const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);

/// How [`Settlement::Release`](crate::verdict::Settlement::Release) is sent.
pub(super) const RELEASE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// Empty if the broker is to choose a name.
    pub queue: String,
    pub topology: Topology,
    pub ack_timeout: Option<Duration>,
}

pub(super) struct Subscription {
    pub(super) connection: OpenConnection,
    pub(super) channel: Channel,
    /// `None` once we have cancelled it.
    pub(super) consumer: Option<lapin::Consumer>,
    /// The next delivery, if `settle` has read it ahead.
    read_ahead: Option<Delivery>,
    deliveries_read: u64,
    /// `--ack-timeout`, even if the queue doesn't know it.
    pub(super) ack_timeout: Option<Duration>,
    pub(super) queue: String,
}

impl Subscription {
    /// Gives up at `deadline` or when `give_up` is dropped. `declared`: the queue that this connection has declared.
    pub(super) async fn open(
        mut connection: OpenConnection,
        options: ConsumerOptions,
        plan: Plan,
        declared: Option<String>,
        deadline: Instant,
        give_up: oneshot::Receiver<()>,
    ) -> Result<Self, (OpenConnection, NotSubscribed)> {
        let to_queue = if options.queue.is_empty() { String::new() } else { format!(" to queue {:?}", options.queue) };
        let stage = format!("subscribing{to_queue}");
        let subscribed = with_reminders(&stage, async {
            end_previous_consumer(&mut connection).await?;
            subscribe(&mut connection, &options, plan, declared).await
        });
        let subscribed = tokio::select! {
            biased;
            subscribed = timeout_at(deadline, subscribed) => subscribed.ok(),
            _ = give_up => None,
        };
        match subscribed {
            Some(Ok((queue, channel, consumer))) => Ok(Self {
                connection,
                channel,
                consumer: Some(consumer),
                read_ahead: None,
                deliveries_read: 0,
                ack_timeout: options.ack_timeout,
                queue,
            }),
            Some(Err(why)) => Err((connection, why)),
            None => {
                // If the previous consumer's channel is still there, its channel.close isn't answered, so dropping it
                // sends nothing. Its deliveries are forgotten: `Consumer` would take them for a message that arrived.
                if connection.previous_channel.take().is_some() {
                    connection.observed().forget_consumer();
                }
                Err((connection, ConnectError::no_answer(&stage).into()))
            }
        }
    }

    pub(super) fn into_connection(self) -> OpenConnection {
        let mut connection = self.connection;
        connection.previous_channel = Some(self.channel);
        connection
    }

    /// Dropping the future loses nothing. lapin 4.12 reports the subscription's end among the deliveries, among the
    /// connection's events, or in both.
    pub(super) async fn next_delivery(&mut self) -> Result<Delivery, DeliveryLost> {
        if let Some(delivery) = self.read_ahead.take() {
            return Ok(delivery);
        }
        let delivery = or_never(self.consumer.as_mut().map(StreamExt::next));
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
                self.deliveries_read += 1;
                Ok(delivery)
            }
            Some(Err(error)) => Err(self.delivery_lost(&error)),
            None => Err(DeliveryLost::ended(&self.connection.observed())),
        }
    }

    pub(super) fn put_back(&mut self, delivery: Delivery) {
        self.read_ahead = Some(delivery);
    }

    /// Whether a delivery has come that isn't read, even if it has only begun to arrive, or if lapin drops it: see
    /// [`ObservedConsumer::deliveries`](crate::broker::reach::observed::ObservedConsumer::deliveries).
    pub(super) fn has_unread_delivery(&self) -> bool {
        self.connection.observed().consumer.deliveries > self.deliveries_read
    }

    pub(super) fn delivery_lost(&self, error: &lapin::Error) -> DeliveryLost {
        DeliveryLost::from_error(error, &self.connection)
    }

    /// Why the second barrier got no reply. RabbitMQ 4.3.6 reports the acknowledgement timeout by closing the channel
    /// with 406, and not the connection; lapin may be unable to read that close. So it wasn't the timeout if a close
    /// with another code was read, or if the connection is gone without an unreadable close.
    pub(super) fn second_barrier_failed(&self, error: &lapin::Error) -> DeliveryLost {
        let observed = self.connection.observed();
        let has_another_reason = observed.closed.as_ref().is_some_and(|refusal| refusal.code != 406);
        if !has_another_reason && (self.connection.is_connected() || observed.closed_unreadably) {
            return DeliveryLost::timed_out(&observed);
        }
        drop(observed);
        self.delivery_lost(error)
    }

    /// How many messages are ready, by a passive declare. `None` if there is no reply, or if the reply counts no
    /// consumers although we are one: the queue's leader didn't answer, so the number means nothing.
    pub(super) async fn depth(&self) -> Result<Option<u32>, DeliveryLost> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declare = self.channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default());
        match timeout(DEPTH_TIMEOUT, declare).await {
            Ok(Ok(declared)) => Ok((declared.consumer_count() > 0).then(|| declared.message_count())),
            Ok(Err(error)) => Err(self.delivery_lost(&error)),
            Err(_) => Ok(None),
        }
    }

    pub(super) async fn cancel(&mut self) -> Result<Option<Delivery>, DeliveryLost> {
        if let Some(delivery) = self.read_ahead.take() {
            return Ok(Some(delivery));
        }
        // `self.consumer` stays until its stream has ended, so that `release` can go on if this future is dropped.
        let Some(consumer) = &mut self.consumer else {
            return Ok(None);
        };
        let cancel = BasicCancelOptions::default();
        let last = match timeout(CANCEL_TIMEOUT, self.channel.basic_cancel(CONSUMER_TAG.into(), cancel)).await {
            Ok(Ok(())) => message_before_cancel_ok(consumer).await,
            Ok(Err(error)) => Err(error),
            Err(_) if self.has_unread_delivery() => {
                // The reply comes after the rest of the body. Take the message, and don't wait for the reply.
                let delivery = self.next_delivery().await?;
                self.consumer = None;
                return Ok(Some(delivery));
            }
            // Nothing has begun to arrive. If a message comes now, it is requeued when we close.
            Err(_) => return Ok(None),
        };
        let last = last.map_err(|error| self.delivery_lost(&error))?;
        self.deliveries_read += u64::from(last.is_some());
        self.consumer = None;
        let observed = self.connection.observed();
        if last.is_none() && observed.consumer.cancelled {
            return Err(DeliveryLost::ended(&observed));
        }
        Ok(last)
    }

    pub(super) async fn release(&mut self) -> lapin::Result<()> {
        if let Some(mut consumer) = self.consumer.take() {
            let cancel = BasicCancelOptions::default();
            self.channel.basic_cancel(CONSUMER_TAG.into(), cancel).await?;
            while let Some(delivery) = consumer.next().await {
                let tag = delivery?.delivery_tag;
                self.channel.basic_nack(tag, RELEASE).await?;
            }
        }
        if let Some(delivery) = self.read_ahead.take() {
            self.channel.basic_nack(delivery.delivery_tag, RELEASE).await?;
        }
        self.barrier().await
    }

    /// Its reply confirms all that was sent on this channel before: the broker processes a channel's methods in order,
    /// and stops at an error. A reply to channel.close or connection.close would prove nothing, as it comes despite an
    /// error.
    pub(super) async fn barrier(&self) -> lapin::Result<()> {
        self.channel.basic_qos(1, BasicQosOptions::default()).await
    }
}

/// Call this once the reply to the cancel is here. The message is here then, too, so dropping the future loses nothing.
/// lapin 4.12 takes the end of the channel or of the connection for a reply, too: then the stream ends with an error,
/// and the broker requeues the message.
async fn message_before_cancel_ok(consumer: &mut lapin::Consumer) -> lapin::Result<Option<Delivery>> {
    let mut message = None;
    while let Some(next) = consumer.next().await {
        message.get_or_insert(next?);
    }
    Ok(message)
}

async fn end_previous_consumer(connection: &mut OpenConnection) -> Result<(), NotSubscribed> {
    if let Some(channel) = &connection.previous_channel {
        // A failure shows below if the broker has closed the channel, and otherwise when the next one is opened.
        let _ = channel.close(200, "OK".into()).await;
    }
    connection.previous_channel = None;
    // Only now, as the broker may have cancelled that consumer, or closed its channel, until it got our close.
    connection.observed().forget_consumer();
    match connection.observed().closed.clone() {
        // The next try takes a new connection: see Consumer::close_after.
        Some(refusal) => {
            let problem =
                format!("the broker closed the channel of the previous message, or the connection: {refusal}");
            Err(ConnectError::transient(problem).into())
        }
        None => Ok(()),
    }
}

/// The queue's name, and its consumer on a channel.
type Subscribed = (String, Channel, lapin::Consumer);

async fn subscribe(
    connection: &mut OpenConnection,
    options: &ConsumerOptions,
    plan: Plan,
    declared: Option<String>,
) -> Result<Subscribed, NotSubscribed> {
    let asks_for_ack_timeout = plan.asks_for_ack_timeout;
    let queue = match declared {
        Some(queue) => queue,
        None => options.topology.set_up(connection, &options.queue, plan).await?,
    };
    // An exclusive queue is classic: it would refuse the argument, and a refusal costs the connection and the queue.
    let may_ask = asks_for_ack_timeout
        && options.topology.declare != Declare::Exclusive
        && connection.observed().may_know_ack_timeout();
    let ack_timeout = options.ack_timeout.filter(|_| may_ask);
    match consume(connection, &queue, ack_timeout).await {
        Ok((channel, consumer)) => Ok((queue, channel, consumer)),
        Err(error) if ack_timeout.is_some() && connection.meaning(&error) == Some(Meaning::Precondition) => {
            tracing::debug!("the queue takes no x-consumer-timeout: {error}");
            // The queue exists now, so it is declared passively.
            Err(NotSubscribed::RetryWith(Plan { step: DeclareStep::Passive, asks_for_ack_timeout: false }))
        }
        Err(error) => Err(ConnectError::after_handshake(
            &error,
            connection,
            Asked::Queue { action: "consume from", queue: &queue },
        )
        .into()),
    }
}

/// Sends qos and consume at once, which saves a round trip.
async fn consume(
    connection: &OpenConnection,
    queue: &str,
    ack_timeout: Option<Duration>,
) -> lapin::Result<(Channel, lapin::Consumer)> {
    let channel = connection.lapin.create_channel().await?;
    let mut arguments = FieldTable::default();
    // The messages of a stream can't be settled. Streams refuse a priority (seen with RabbitMQ 3.10 and 4.3, and
    // LavinMQ).
    if connection.observed().priority_excludes_streams {
        arguments.insert("x-priority".into(), AMQPValue::LongInt(0));
    }
    if let Some(limit) = ack_timeout {
        let milliseconds = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let limit = AMQPValue::LongLongInt(milliseconds);
        arguments.insert("x-consumer-timeout".into(), limit);
    }
    let options = BasicConsumeOptions::default();
    let (prefetch, consumer) = tokio::join!(
        biased;
        channel.basic_qos(1, BasicQosOptions::default()),
        channel.basic_consume(queue.into(), CONSUMER_TAG.into(), options, arguments),
    );
    // If the channel is closed, both fail; the consumer's error says more.
    let consumer = consumer?;
    prefetch?;
    Ok((channel, consumer))
}
