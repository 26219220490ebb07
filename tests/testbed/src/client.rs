//! The tests' AMQP client: fills and inspects queues.
//!
//! [`Client`]'s methods return a `Result`, for the soak, whose broker comes and goes. [`Queue`]'s methods panic, which
//! keeps tests short.

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

/// How long an operation waits for its answer. If the broker's death has lost the answer, polling callers try again.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How long a dropped queue or client waits for a broker that may be gone or frozen.
const DROP_LIMIT: Duration = Duration::from_secs(2);

/// A connection to a broker; opened at the first use, and again after it was lost.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    url: String,
    /// Whether it has declared a quorum queue since [`Client::take_quorum_declared`] was last called.
    quorum_declared: AtomicBool,
    connection: Mutex<Option<Connection>>,
}

/// A message that was taken from a queue.
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

    /// How many more were ready.
    pub fn remaining(&self) -> u32 {
        self.0.message_count
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name)
    }

    /// `x-delivery-count`: how often it was requeued. Only from quorum queues, and not at the first delivery.
    pub fn delivery_count(&self) -> Option<i64> {
        self.count("x-delivery-count")
    }

    /// `x-acquired-count`: how often it was delivered before. Only from quorum queues of RabbitMQ 4.3.
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
    /// A client of the broker at this URL; connects at the first use.
    pub fn new(url: &str) -> Self {
        Self {
            inner: Arc::new(Inner {
                url: url.to_owned(),
                quorum_declared: AtomicBool::new(false),
                connection: Mutex::new(None),
            }),
        }
    }

    /// Whether this client has declared a quorum queue since the last call.
    pub(crate) fn take_quorum_declared(&self) -> bool {
        self.inner.quorum_declared.swap(false, Relaxed)
    }

    /// A new channel, for operations that this client doesn't have (use [`block_on`]).
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
        // Not opened yet, or lost.
        let properties = ConnectionProperties::default().with_connection_name("testbed".into());
        let opened = Connection::connect(&self.inner.url, properties)
            .await
            .context("the tests' client can't connect to the broker")?;
        let channel = opened.create_channel().await?;
        *connection = Some(opened);
        Ok(channel)
    }

    /// Runs one operation on a new channel, because an error closes the channel.
    fn operate<T>(&self, operation: impl AsyncFnOnce(&Channel) -> Result<T>) -> Result<T> {
        block_on(limited(async {
            let channel = self.open_channel().await?;
            let result = operation(&channel).await;
            // When channel.close is answered, earlier acks are processed. After an error the channel is closed already.
            if result.is_ok() {
                channel.close(200, "".into()).await?;
            }
            result
        }))
    }

    /// Declares a durable classic queue with a unique name that starts with `name`.
    #[track_caller]
    pub fn queue(&self, name: &str) -> Queue {
        self.declare(name).create()
    }

    /// Declares a queue with a type and arguments.
    pub fn declare(&self, name: &str) -> QueueBuilder {
        QueueBuilder::new(self, name)
    }

    /// The numbers of a queue's ready messages and consumers; `None` if the queue doesn't exist.
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

    /// Publishes messages to a queue, and then waits until the broker has confirmed all of them.
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

    /// Takes the next ready message from a queue, and acknowledges it.
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
        .unwrap_or_else(|_| bail!("the broker didn't answer the tests' client within {ANSWER_LIMIT:?}"))
}

/// Cleans up when something is dropped. Errors don't matter, as the broker may be gone or frozen.
fn last_wish(operation: impl Future<Output = Result<()>>) {
    // In an async block, because creating the timer needs the runtime's context.
    let _ = block_on(async { tokio::time::timeout(DROP_LIMIT, operation).await });
}

fn is_not_found(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
                // The code is the same for a classic queue whose home node is down.
                && error.get_message().as_str().contains("no queue")
        }
        _ => false,
    }
}
