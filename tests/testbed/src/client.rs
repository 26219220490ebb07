//! The test's own side of AMQP: fills queues and looks into them.
//!
//! [`Client`]'s methods give a `Result`, for the soak, whose broker comes and goes. [`Queue`]'s panic, so that a test reads as a
//! sentence.

mod queue;

pub use queue::{Consumer, Queue, QueueBuilder, QueueKind};

use crate::block_on;
use anyhow::{Context, Result, bail};
use lapin::message::{BasicGetMessage, Delivery};
use lapin::options::{BasicNackOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::AMQPValue;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ErrorKind};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::Mutex;

/// How long an operation waits for its answer: one that the broker's death has swallowed is asked again by whoever polls.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

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
        QueueBuilder::new(self, name)
    }

    /// Ready messages and consumers of a queue; None if there is no such queue.
    pub fn counts(&self, queue: &str) -> Result<Option<(u32, u32)>> {
        self.operate(async |channel| {
            let options = QueueDeclareOptions { passive: true, ..Default::default() };
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
            let options = BasicPublishOptions { mandatory: true, ..Default::default() };
            let mut confirms = Vec::new();
            for body in bodies {
                let (body, properties) = (body.as_ref(), properties.clone());
                let publish = channel.basic_publish("".into(), queue.into(), options, body, properties);
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
        self.next(queue, false)
    }

    fn next(&self, queue: &str, requeue: bool) -> Result<Option<Got>> {
        self.operate(async |channel| {
            let got = channel.basic_get(queue.into(), Default::default()).await?;
            match &got {
                Some(got) if requeue => {
                    let options = BasicNackOptions { requeue, ..Default::default() };
                    got.nack(options).await?;
                }
                Some(got) => {
                    got.ack(Default::default()).await?;
                }
                None => {}
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
    tokio::time::timeout(ANSWER_LIMIT, operation)
        .await
        .unwrap_or_else(|_| bail!("the broker didn't answer the test's own client within {ANSWER_LIMIT:?}"))
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
