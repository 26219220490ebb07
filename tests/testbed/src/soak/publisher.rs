//! Fills the queue, and records what the broker has confirmed.

use super::{Soak, command};
use crate::{Client, block_on};
use anyhow::Result;
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Messages to publish together, if fewer than [`HUNGRY`] are ready.
const BATCH: u64 = 50;
const HUNGRY: u32 = 200;

/// The same in a cluster, where a fault may delay the publisher; the workers must not run out of messages meanwhile.
const HUNGRY_CLUSTER: u32 = 1000;

/// How long to wait for their confirmation; the broker may be frozen.
const CONFIRMED: Duration = Duration::from_secs(10);

/// How long to wait for the number of ready messages before another node is asked.
const ANSWERED: Duration = Duration::from_secs(3);

impl Soak<'_> {
    /// Keeps the queue filled, and publishes at least `--messages`.
    pub(super) fn publish(&self, mut random: fastrand::Rng, faults_over: &AtomicBool) {
        let hungry = match self.options.cluster {
            Some(_) => HUNGRY_CLUSTER,
            None => HUNGRY,
        };
        let mut clients = self.clients.iter().cycle();
        let Some(mut client) = clients.next() else {
            return;
        };
        loop {
            let enough = self.note(|books| books.confirmed.len()) as u64 >= self.options.messages;
            if (enough && faults_over.load(Relaxed)) || self.out_of_time() {
                return;
            }
            let ready = self.ready(client);
            let well = match block_on(async { tokio::time::timeout(ANSWERED, ready).await }) {
                Ok(Ok(ready)) if ready < hungry => {
                    let batch = self.publish_batch(client, &mut random);
                    let done = block_on(async { tokio::time::timeout(CONFIRMED, batch).await });
                    matches!(done, Ok(Ok(())))
                }
                Ok(Ok(_)) => {
                    self.pause(Duration::from_millis(200));
                    true
                }
                _ => {
                    self.pause(Duration::from_millis(200));
                    false
                }
            };
            if !well {
                client = clients.next().unwrap_or(client);
            }
        }
    }

    async fn ready(&self, client: &Client) -> Result<u32> {
        let channel = client.open_channel().await?;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.queue.as_str().into();
        let declared = channel.queue_declare(queue, options, Default::default());
        let ready = declared.await?.message_count();
        channel.close(200, "".into()).await?;
        Ok(ready)
    }

    /// Publishes a batch of messages, and records those that the broker confirms.
    async fn publish_batch(&self, client: &Client, random: &mut fastrand::Rng) -> Result<()> {
        let channel = client.open_channel().await?;
        channel.confirm_select(Default::default()).await?;
        let first = self.note(|books| books.published) + 1;
        let mut pending = Vec::new();
        for message in first..first + BATCH {
            // Most messages are small; some need several frames.
            let filler = match random.u32(0..20) {
                0 => random.usize(100_000..300_000),
                _ => random.usize(0..2000),
            };
            let body = command::body(message, filler);
            let properties =
                BasicProperties::default().with_delivery_mode(2).with_message_id(message.to_string().into());
            let (options, queue) = (Default::default(), self.queue.as_str().into());
            self.note(|books| books.published = message);
            let confirm = channel.basic_publish("".into(), queue, options, &body, properties);
            pending.push((message, confirm.await?));
        }
        for (message, confirm) in pending {
            if confirm.await?.is_ack() {
                self.note(|books| books.confirmed.insert(message));
            }
        }
        Ok(channel.close(200, "".into()).await?)
    }
}
