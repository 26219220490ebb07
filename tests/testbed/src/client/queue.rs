//! A test's own queue.

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
    pub(super) fn new(client: &Client, name: &str) -> Self {
        Self {
            client: client.clone(),
            name: format!("{name}-{:08x}", fastrand::u32(..)),
            options: QueueDeclareOptions { durable: true, ..Default::default() },
            arguments: FieldTable::default(),
        }
    }

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
        let published = self.client.publish(&self.name, [body], properties);
        self.must("publish to", published);
    }

    /// Puts many messages in, all in flight; returns when the broker has confirmed every one.
    #[track_caller]
    pub fn publish_all<B: AsRef<[u8]>>(&self, bodies: impl IntoIterator<Item = B>) {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let published = self.client.publish(&self.name, bodies, properties);
        self.must("publish to", published);
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
        self.wait_count("ready", count, |(ready, _)| ready);
    }

    /// Waits until it has exactly so many consumers.
    #[track_caller]
    pub fn wait_consumers(&self, count: u32) {
        self.wait_count("consumers", count, |(_, consumers)| consumers);
    }

    #[track_caller]
    fn wait_count(&self, what: &str, count: u32, of: fn((u32, u32)) -> u32) {
        let mut seen = Ok(None);
        let reached = eventually(PATIENCE, || {
            // While a quorum queue elects its leader a look fails.
            seen = self.client.counts(&self.name);
            matches!(seen, Ok(Some(counts)) if of(counts) == count)
        });
        assert!(
            reached,
            "queue {}: not {count} {what} after {PATIENCE:?}, but (ready, consumers) of {seen:?}",
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

    /// Looks at the next ready message, and puts it back: for the broker that is one more delivery.
    #[track_caller]
    pub fn peek(&self) -> Option<Got> {
        self.must("get from", self.client.next(&self.name, true))
    }

    /// Consumes from it (one message at a time), like a worker that never ends its first message; `exclusive` lets nobody else.
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

    /// Throws away what is ready.
    #[track_caller]
    pub fn purge(&self) {
        self.operate("purge", async |channel, name| channel.queue_purge(name, Default::default()).await);
    }

    /// Deletes it under its consumers' feet.
    #[track_caller]
    pub fn delete(&self) {
        self.operate("delete", async |channel, name| channel.queue_delete(name, Default::default()).await);
    }

    /// Whether the broker has it.
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

/// A consumer of the test's own; dropping it closes its channel.
pub struct Consumer {
    channel: Channel,
    _deliveries: lapin::Consumer,
}

impl Consumer {
    /// Ends it and waits until the broker has taken note.
    pub fn close(self) -> Result<()> {
        block_on(limited(async { Ok(self.channel.close(200, "".into()).await?) }))
    }
}
