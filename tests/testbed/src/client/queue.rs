//! A test's queue.

use super::{Client, Got, last_wish, limited};
use crate::{PATIENCE, block_on, eventually};
use anyhow::Result;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use lapin::{BasicProperties, Channel};
use std::sync::atomic::Ordering::Relaxed;

/// The type of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueKind {
    /// On one node; shows earlier deliveries only by `redelivered`.
    Classic,
    /// Replicated; counts deliveries.
    Quorum,
}

impl QueueKind {
    /// Both types.
    pub const ALL: [Self; 2] = [Self::Classic, Self::Quorum];

    /// The value of the argument `x-queue-type`.
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
    pub(super) fn new(client: &Client, name: &str) -> Self {
        Self {
            client: client.clone(),
            name: format!("{name}-{:08x}", fastrand::u32(..)),
            options: QueueDeclareOptions { durable: true, ..Default::default() },
            arguments: FieldTable::default(),
        }
    }

    /// Sets its type; the default is classic.
    pub fn kind(self, kind: QueueKind) -> Self {
        self.arg("x-queue-type", LongString::from(kind.as_str()))
    }

    /// Makes it a quorum queue.
    pub fn quorum(self) -> Self {
        self.kind(QueueKind::Quorum)
    }

    /// Adds an argument: `x-delivery-limit`, `x-single-active-consumer`, `x-max-priority`, …
    pub fn arg(mut self, name: &str, value: impl Into<AMQPValue>) -> Self {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// Sends its dead letters to another queue.
    pub fn dead_letter_to(self, queue: &Queue) -> Self {
        self.arg("x-dead-letter-exchange", LongString::from(""))
            .arg("x-dead-letter-routing-key", LongString::from(queue.name()))
    }

    /// Gives it exactly this name, instead of a unique one.
    pub fn exact_name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Makes it exclusive to the connection that declares it.
    pub fn exclusive(mut self) -> Self {
        self.options.exclusive = true;
        self
    }

    /// A handle for a queue that isn't declared (yet).
    pub fn absent(self) -> Queue {
        Queue { client: self.client, name: self.name }
    }

    /// Declares it.
    #[track_caller]
    pub fn create(self) -> Queue {
        let (options, arguments) = (self.options, self.arguments.clone());
        let queue = self.absent();
        if arguments.inner().get("x-queue-type") == Some(&LongString::from("quorum").into()) {
            queue.client.inner.quorum_declared.store(true, Relaxed);
        }
        queue.operate("declare", async |channel, name| channel.queue_declare(name, options, arguments).await);
        queue
    }
}

/// A test's queue, deleted when dropped. Its methods panic if the broker fails.
pub struct Queue {
    client: Client,
    name: String,
}

impl Queue {
    /// Its name, for `QUEUE`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its broker's URL, for `BROKER_URL`.
    pub fn url(&self) -> &str {
        &self.client.inner.url
    }

    /// Publishes one message; returns when the broker has confirmed it.
    #[track_caller]
    pub fn publish(&self, body: impl AsRef<[u8]>) {
        self.publish_with(BasicProperties::default().with_delivery_mode(2), body);
    }

    /// Publishes one message with properties and headers.
    #[track_caller]
    pub fn publish_with(&self, properties: BasicProperties, body: impl AsRef<[u8]>) {
        let published = self.client.publish(&self.name, [body], properties);
        self.must("publish to", published);
    }

    /// Publishes many messages; returns when the broker has confirmed all of them.
    #[track_caller]
    pub fn publish_all<B: AsRef<[u8]>>(&self, bodies: impl IntoIterator<Item = B>) {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let published = self.client.publish(&self.name, bodies, properties);
        self.must("publish to", published);
    }

    /// The number of ready messages. A quorum queue's count may be out of date; see [`Queue::wait_ready`].
    #[track_caller]
    pub fn ready(&self) -> u32 {
        self.counts().0
    }

    /// The number of its consumers.
    #[track_caller]
    pub fn consumers(&self) -> u32 {
        self.counts().1
    }

    #[track_caller]
    fn counts(&self) -> (u32, u32) {
        let counts = self.must("look at", self.client.counts(&self.name));
        counts.unwrap_or_else(|| panic!("queue {} doesn't exist", self.name))
    }

    /// Waits until exactly this many messages are ready.
    #[track_caller]
    pub fn wait_ready(&self, count: u32) {
        self.wait_count("ready", count, |(ready, _)| ready);
    }

    /// Waits until it has exactly this many consumers.
    #[track_caller]
    pub fn wait_consumers(&self, count: u32) {
        self.wait_count("consumers", count, |(_, consumers)| consumers);
    }

    #[track_caller]
    fn wait_count(&self, what: &str, count: u32, of: fn((u32, u32)) -> u32) {
        let mut seen = Ok(None);
        let reached = eventually(PATIENCE, || {
            // This fails while a quorum queue elects its leader.
            seen = self.client.counts(&self.name);
            matches!(seen, Ok(Some(counts)) if of(counts) == count)
        });
        assert!(
            reached,
            "queue {}: not {count} {what} after {PATIENCE:?}, but (ready, consumers) of {seen:?}",
            self.name
        );
    }

    /// Takes the next ready message, and acknowledges it.
    #[track_caller]
    pub fn get(&self) -> Option<Got> {
        self.must("get from", self.client.get(&self.name))
    }

    /// The same, but waits for a message, for example one that is being requeued.
    #[track_caller]
    pub fn wait_get(&self) -> Got {
        let mut got = None;
        let came = eventually(PATIENCE, || {
            got = self.get();
            got.is_some()
        });
        assert!(came, "no message in queue {} after {PATIENCE:?}", self.name);
        got.expect("a message")
    }

    /// Takes the next ready message and requeues it; the broker counts this delivery.
    #[track_caller]
    pub fn peek(&self) -> Option<Got> {
        self.must("get from", self.client.next(&self.name, true))
    }

    /// Subscribes with a prefetch of one, like a worker that never settles its first message; `exclusive` excludes
    /// other consumers.
    #[track_caller]
    pub fn consume(&self, exclusive: bool) -> Consumer {
        let consumer = block_on(limited(async {
            let channel = self.client.open_channel().await?;
            channel.basic_qos(1, Default::default()).await?;
            let options = BasicConsumeOptions { exclusive, ..Default::default() };
            let queue = self.name.as_str().into();
            let deliveries = channel.basic_consume(queue, "".into(), options, Default::default());
            Ok(Consumer { _deliveries: deliveries.await?, channel })
        }));
        self.must("consume from", consumer)
    }

    /// Drops the ready messages.
    #[track_caller]
    pub fn purge(&self) {
        self.operate("purge", async |channel, name| channel.queue_purge(name, Default::default()).await);
    }

    /// Deletes it, even if it has consumers.
    #[track_caller]
    pub fn delete(&self) {
        self.operate("delete", async |channel, name| channel.queue_delete(name, Default::default()).await);
    }

    /// Whether it exists.
    #[track_caller]
    pub fn exists(&self) -> bool {
        self.must("look at", self.client.counts(&self.name)).is_some()
    }

    #[track_caller]
    fn operate<T>(&self, what: &str, operation: impl AsyncFnOnce(&Channel, ShortString) -> lapin::Result<T>) -> T {
        let name = self.name.as_str().into();
        let done = self.client.operate(async |channel| Ok(operation(channel, name).await?));
        self.must(what, done)
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

/// A test's consumer; dropping it closes its channel.
pub struct Consumer {
    channel: Channel,
    _deliveries: lapin::Consumer,
}

impl Consumer {
    /// Ends it, and waits until the broker has confirmed that.
    pub fn close(self) -> Result<()> {
        block_on(limited(async { Ok(self.channel.close(200, "".into()).await?) }))
    }
}
