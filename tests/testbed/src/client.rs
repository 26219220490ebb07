//! The test's own side of AMQP: fills queues and looks into them.
//!
//! [`Client`]'s methods give a `Result`, for the soak, whose broker comes and goes. [`Queue`]'s panic, so that a test reads as a
//! sentence.

use crate::{PATIENCE, block_on, eventually};
use anyhow::{Context, Result, bail};
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::{
    BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Mutex;

/// The longest that any single operation may take; a broker under load on two cores stays far below.
const LIMIT: Duration = Duration::from_secs(30);

/// How long a dropped queue waits for a broker that may be gone or frozen by then.
const DROP_LIMIT: Duration = Duration::from_secs(2);

/// A connection to a broker, opened with the first use and again after the broker was gone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    url: String,
    /// Whether it has declared a quorum queue that nobody has asked about since.
    quorum_declared: AtomicBool,
    connection: Mutex<Option<Connection>>,
}

/// A message, and what became of it, as the broker tells it with the next delivery.
#[derive(Debug)]
pub struct Got(BasicGetMessage);

impl Deref for Got {
    type Target = Delivery;

    fn deref(&self) -> &Delivery {
        &self.0.delivery
    }
}

impl Got {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.data).into_owned()
    }

    /// How many were ready behind it.
    pub fn remaining(&self) -> u32 {
        self.0.message_count
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name)
    }

    /// `x-delivery-count`: how often it came back. Quorum queues only, and absent the first time.
    pub fn delivery_count(&self) -> Option<i64> {
        self.count("x-delivery-count")
    }

    /// `x-acquired-count`: how often it was handed out. Quorum queues of RabbitMQ 4.3 only.
    pub fn acquired_count(&self) -> Option<i64> {
        self.count("x-acquired-count")
    }

    fn count(&self, name: &str) -> Option<i64> {
        match self.header(name)? {
            AMQPValue::LongLongInt(count) => Some(*count),
            other => panic!("{name} is {other:?}"),
        }
    }
}

impl Client {
    /// For the broker at this address; connects when first used.
    pub fn new(url: &str) -> Self {
        Self {
            inner: Arc::new(Inner {
                url: url.to_owned(),
                quorum_declared: AtomicBool::new(false),
                connection: Mutex::new(None),
            }),
        }
    }

    /// Whether this client has declared a quorum queue since it was last asked.
    pub(crate) fn take_quorum_declared(&self) -> bool {
        self.inner.quorum_declared.swap(false, Relaxed)
    }

    /// A channel of its own, for what this client has no method for (with [`block_on`]).
    pub fn channel(&self) -> Result<Channel> {
        block_on(limited(self.open_channel()))
    }

    pub(crate) async fn open_channel(&self) -> Result<Channel> {
        let mut connection = self.inner.connection.lock().await;
        if let Some(open) = connection.as_ref()
            && let Ok(channel) = open.create_channel().await
        {
            return Ok(channel);
        }
        // Never opened, or lost with the broker that was killed a moment ago.
        let properties = ConnectionProperties::default().with_connection_name("testbed".into());
        let opened = Connection::connect(&self.inner.url, properties)
            .await
            .context("the test's own client can't connect to the broker")?;
        let channel = opened.create_channel().await?;
        *connection = Some(opened);
        Ok(channel)
    }

    /// Runs one operation on a channel of its own, because an error closes the channel.
    fn operate<T>(&self, operation: impl AsyncFnOnce(&Channel) -> Result<T>) -> Result<T> {
        block_on(limited(async {
            let channel = self.open_channel().await?;
            let result = operation(&channel).await;
            // With the answer to close, an ack sent before has been processed; after an error it is closed already.
            if result.is_ok() {
                channel.close(200, "".into()).await?;
            }
            result
        }))
    }

    /// Declares a durable classic queue with a name of its own, which starts with `name`.
    #[track_caller]
    pub fn queue(&self, name: &str) -> Queue {
        self.declare(name).create()
    }

    /// Declares a queue with a type and arguments.
    pub fn declare(&self, name: &str) -> QueueBuilder {
        QueueBuilder {
            client: self.clone(),
            name: format!("{name}-{:08x}", fastrand::u32(..)),
            options: QueueDeclareOptions {
                durable: true,
                ..Default::default()
            },
            arguments: FieldTable::default(),
        }
    }

    /// Ready messages and consumers of a queue; None if there is no such queue.
    pub fn counts(&self, queue: &str) -> Result<Option<(u32, u32)>> {
        self.operate(async |channel| {
            let options = QueueDeclareOptions {
                passive: true,
                ..Default::default()
            };
            let declared = channel.queue_declare(queue.into(), options, Default::default());
            Ok(declared.await?)
        })
        .map(|queue| Some((queue.message_count(), queue.consumer_count())))
        .or_else(|error| match error.downcast_ref() {
            Some(error) if is_not_found(error) => Ok(None),
            _ => Err(error),
        })
    }

    /// Publishes messages to a queue, all in flight, and waits until the broker has confirmed every one.
    pub fn publish<B: AsRef<[u8]>>(
        &self,
        queue: &str,
        bodies: impl IntoIterator<Item = B>,
        properties: BasicProperties,
    ) -> Result<()> {
        self.operate(async |channel| {
            channel.confirm_select(Default::default()).await?;
            let options = BasicPublishOptions {
                mandatory: true,
                ..Default::default()
            };
            let mut confirms = Vec::new();
            for body in bodies {
                let (body, properties) = (body.as_ref(), properties.clone());
                let publish =
                    channel.basic_publish("".into(), queue.into(), options, body, properties);
                confirms.push(publish.await?);
            }
            for confirm in confirms {
                let confirmation = confirm.await?;
                if !confirmation.is_ack() || confirmation.take_message().is_some() {
                    bail!("the broker refused or returned a message for queue {queue}");
                }
            }
            Ok(())
        })
    }

    /// Takes the next ready message out of a queue for good.
    pub fn get(&self, queue: &str) -> Result<Option<Got>> {
        self.operate(async |channel| {
            let got = channel.basic_get(queue.into(), Default::default()).await?;
            if let Some(got) = &got {
                let tag = got.delivery.delivery_tag;
                channel.basic_ack(tag, Default::default()).await?;
            }
            Ok(got.map(Got))
        })
    }

    /// Closes the connection; the next use opens a new one.
    pub fn disconnect(&self) {
        last_wish(async {
            if let Some(connection) = self.inner.connection.lock().await.take() {
                connection.close(200, "".into()).await?;
            }
            Ok(())
        });
    }
}

async fn limited<T>(operation: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, operation)
        .await
        .unwrap_or_else(|_| {
            bail!("the broker didn't answer the test's own client within {LIMIT:?}")
        })
}

/// For what is dropped: the broker may be gone or frozen by then, and then nothing more needs to be done.
fn last_wish(operation: impl Future<Output = Result<()>>) {
    // Within an async block, because the timer needs the runtime's context from the start.
    let _ = block_on(async { tokio::time::timeout(DROP_LIMIT, operation).await });
}

fn is_not_found(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
                // A classic queue whose home node is down is answered with the same code.
                && error.get_message().as_str().contains("no queue")
        }
        _ => false,
    }
}

/// The type of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueKind {
    /// On one node; tells about earlier deliveries only by `redelivered`.
    Classic,
    /// Replicated; counts deliveries.
    Quorum,
}

impl QueueKind {
    /// Both, for a test that loops over them.
    pub const ALL: [Self; 2] = [Self::Classic, Self::Quorum];

    /// As in the argument `x-queue-type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// A queue about to be declared.
#[must_use]
pub struct QueueBuilder {
    client: Client,
    name: String,
    options: QueueDeclareOptions,
    arguments: FieldTable,
}

impl QueueBuilder {
    /// Its type; classic unless set.
    pub fn kind(self, kind: QueueKind) -> Self {
        self.arg("x-queue-type", LongString::from(kind.as_str()))
    }

    /// A quorum queue.
    pub fn quorum(self) -> Self {
        self.kind(QueueKind::Quorum)
    }

    /// Any argument: `x-delivery-limit`, `x-single-active-consumer`, `x-max-priority`, …
    pub fn arg(mut self, name: &str, value: impl Into<AMQPValue>) -> Self {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// Where a rejected message goes: another queue of the test's.
    pub fn dead_letter_to(self, queue: &Queue) -> Self {
        self.arg("x-dead-letter-exchange", LongString::from(""))
            .arg("x-dead-letter-routing-key", LongString::from(queue.name()))
    }

    /// Exactly this name instead of one that is made unique.
    pub fn exact_name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Only for the connection that declares it.
    pub fn exclusive(mut self) -> Self {
        self.options.exclusive = true;
        self
    }

    /// The handle of a queue with this name that is not declared (yet).
    pub fn absent(self) -> Queue {
        Queue {
            client: self.client,
            name: self.name,
        }
    }

    /// Declares it.
    #[track_caller]
    pub fn create(self) -> Queue {
        let queue = Queue {
            client: self.client,
            name: self.name,
        };
        if self.arguments.inner().get("x-queue-type") == Some(&LongString::from("quorum").into()) {
            queue.client.inner.quorum_declared.store(true, Relaxed);
        }
        let declared = queue.client.operate(async |channel| {
            let name = queue.name.as_str().into();
            Ok(channel
                .queue_declare(name, self.options, self.arguments)
                .await?)
        });
        queue.must("declare", declared);
        queue
    }
}

/// A queue of a test's own, deleted when dropped. Every method panics when the broker fails it.
pub struct Queue {
    client: Client,
    name: String,
}

impl Queue {
    /// Its name, for `QUEUE`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its broker's address, for `BROKER_URL`.
    pub fn url(&self) -> &str {
        &self.client.inner.url
    }

    /// Puts one message in; returns when the broker has confirmed it.
    #[track_caller]
    pub fn publish(&self, body: impl AsRef<[u8]>) {
        self.publish_with(BasicProperties::default().with_delivery_mode(2), body);
    }

    /// Puts one message in, with properties and headers.
    #[track_caller]
    pub fn publish_with(&self, properties: BasicProperties, body: impl AsRef<[u8]>) {
        self.must(
            "publish to",
            self.client.publish(&self.name, [body], properties),
        );
    }

    /// Puts many messages in, all in flight; returns when the broker has confirmed every one.
    #[track_caller]
    pub fn publish_all<B: AsRef<[u8]>>(&self, bodies: impl IntoIterator<Item = B>) {
        let properties = BasicProperties::default().with_delivery_mode(2);
        self.must(
            "publish to",
            self.client.publish(&self.name, bodies, properties),
        );
    }

    /// How many messages are ready. A quorum queue's count lags behind; see [`Queue::wait_ready`].
    #[track_caller]
    pub fn ready(&self) -> u32 {
        self.counts().0
    }

    /// How many consumers it has.
    #[track_caller]
    pub fn consumers(&self) -> u32 {
        self.counts().1
    }

    #[track_caller]
    fn counts(&self) -> (u32, u32) {
        let counts = self.must("look at", self.client.counts(&self.name));
        counts.unwrap_or_else(|| panic!("queue {} is not there", self.name))
    }

    /// Waits until exactly so many messages are ready.
    #[track_caller]
    pub fn wait_ready(&self, count: u32) {
        self.wait_count("ready", count, Self::ready);
    }

    /// Waits until it has exactly so many consumers.
    #[track_caller]
    pub fn wait_consumers(&self, count: u32) {
        self.wait_count("consumers", count, Self::consumers);
    }

    #[track_caller]
    fn wait_count(&self, what: &str, count: u32, look: fn(&Self) -> u32) {
        let mut seen = 0;
        let reached = eventually(PATIENCE, || {
            seen = look(self);
            seen == count
        });
        assert!(
            reached,
            "queue {}: {seen} {what} instead of {count} after {PATIENCE:?}",
            self.name
        );
    }

    /// Takes the next ready message out for good.
    #[track_caller]
    pub fn get(&self) -> Option<Got> {
        self.must("get from", self.client.get(&self.name))
    }

    /// The same, waiting for a message that is on its way back.
    #[track_caller]
    pub fn wait_get(&self) -> Got {
        let mut got = None;
        let came = eventually(PATIENCE, || {
            got = self.get();
            got.is_some()
        });
        assert!(came, "no message in queue {} after {PATIENCE:?}", self.name);
        got.expect("it came")
    }

    /// Takes the next ready message and keeps it unacknowledged until told otherwise.
    #[track_caller]
    pub fn hold(&self) -> Option<Held> {
        let held = block_on(limited(async {
            let channel = self.client.open_channel().await?;
            let queue = self.name.as_str().into();
            let got = channel.basic_get(queue, Default::default()).await?;
            Ok(got.map(|got| Held {
                got: Got(got),
                channel,
            }))
        }));
        self.must("get from", held)
    }

    /// Consumes from it (one message at a time), like a worker that never ends its first message; `exclusive` lets nobody else.
    #[track_caller]
    pub fn consume(&self, exclusive: bool) -> Consumer {
        let consumer = block_on(limited(async {
            let channel = self.client.open_channel().await?;
            channel.basic_qos(1, Default::default()).await?;
            let options = BasicConsumeOptions {
                exclusive,
                ..Default::default()
            };
            let queue = self.name.as_str().into();
            let deliveries = channel.basic_consume(queue, "".into(), options, Default::default());
            Ok(Consumer {
                _deliveries: deliveries.await?,
                channel,
            })
        }));
        self.must("consume from", consumer)
    }

    /// Throws away what is ready.
    #[track_caller]
    pub fn purge(&self) {
        let purged = self.client.operate(async |channel| {
            let queue = self.name.as_str().into();
            Ok(channel.queue_purge(queue, Default::default()).await?)
        });
        self.must("purge", purged);
    }

    /// Deletes it under its consumers' feet.
    #[track_caller]
    pub fn delete(&self) {
        let deleted = self.client.operate(async |channel| {
            let queue = self.name.as_str().into();
            Ok(channel.queue_delete(queue, Default::default()).await?)
        });
        self.must("delete", deleted);
    }

    /// Whether the broker has it.
    #[track_caller]
    pub fn exists(&self) -> bool {
        self.must("look at", self.client.counts(&self.name))
            .is_some()
    }

    #[track_caller]
    fn must<T>(&self, what: &str, result: Result<T>) -> T {
        match result {
            Ok(value) => value,
            Err(error) => panic!("cannot {what} queue {}: {error:#}", self.name),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        last_wish(async {
            let channel = self.client.open_channel().await?;
            let queue = self.name.as_str().into();
            channel.queue_delete(queue, Default::default()).await?;
            Ok(channel.close(200, "".into()).await?)
        });
    }
}

/// A message that is kept unacknowledged. Dropping it without a word closes its channel, and the broker requeues it.
pub struct Held {
    /// The message.
    pub got: Got,
    channel: Channel,
}

impl Held {
    /// Puts it back.
    pub fn requeue(self) -> Result<()> {
        let options = BasicNackOptions {
            requeue: true,
            ..Default::default()
        };
        block_on(limited(async {
            self.got.nack(options).await?;
            Ok(self.channel.close(200, "".into()).await?)
        }))
    }
}

/// A consumer of the test's own; dropping it closes its channel.
pub struct Consumer {
    channel: Channel,
    _deliveries: lapin::Consumer,
}

impl Consumer {
    /// Ends it and waits until the broker has taken note.
    pub fn close(self) -> Result<()> {
        block_on(limited(async {
            Ok(self.channel.close(200, "".into()).await?)
        }))
    }
}
