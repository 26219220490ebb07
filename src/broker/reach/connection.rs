//! An open connection: what the broker has sent on it, and how it is closed.

use super::{credentials::CredentialsInUse, observed::Observed};
use crate::broker::errors::{Meaning, described};
use lapin::{Channel, Connection, Event, options::QueueDeleteOptions};
use std::{
    future::pending,
    io,
    net::Shutdown,
    os::fd::AsFd,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_stream::{Stream, StreamExt};

/// Longest wait for the reply to `connection.close`: a broker that is frozen or blocks publishers doesn't send it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

const DELETE_TIMEOUT: Duration = Duration::from_secs(1);

pub struct OpenConnection {
    pub(in crate::broker) credentials: CredentialsInUse,
    pub(in crate::broker) lapin: Arc<Connection>,
    /// The only listener: lapin's listeners take events from each other.
    pub(super) events: Pin<Box<dyn Stream<Item = Event> + Send + Sync>>,
    pub(in crate::broker) observed: Arc<Mutex<Observed>>,
    /// The channel of the previous consumer, or of the publisher. Kept until it is closed, or until connection.close.
    /// If it is dropped before, lapin 4.12 sends channel.close, and ends the connection without a goodbye when the two
    /// cross.
    pub(in crate::broker) previous_channel: Option<Channel>,
    /// An exclusive queue that we delete before the connection is closed, because the broker may keep it.
    pub(in crate::broker) exclusive_queue: Option<(String, QueueDeleteOptions)>,
    pub(super) _shutdown: ShutdownOnDrop,
}

impl OpenConnection {
    pub(in crate::broker) fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().expect("nobody panics with it")
    }

    pub(in crate::broker) fn meaning(&self, error: &lapin::Error) -> Option<Meaning> {
        let refusal = self.observed().refusal(error)?;
        Some(refusal.meaning())
    }

    pub(in crate::broker) fn is_connected(&self) -> bool {
        self.lapin.status().connected()
    }

    /// The next event. Dropping the future loses none.
    pub(in crate::broker) async fn event(&mut self) -> Event {
        match self.events.next().await {
            Some(event) => event,
            // It doesn't end: the connection, which we hold, has a sender.
            None => pending().await,
        }
    }

    pub async fn close(&self) {
        if !self.is_connected() {
            return;
        }
        if let Some((queue, options)) = &self.exclusive_queue {
            match timeout(DELETE_TIMEOUT, self.delete(queue, *options)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("deleting queue {queue:?}: {}", described(&error)),
                Err(_) => tracing::debug!("deleting queue {queue:?}: no answer within {DELETE_TIMEOUT:?}"),
            }
        }
        match timeout(CLOSE_TIMEOUT, self.lapin.close(200, "OK".into())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("closing the connection: {}", described(&error)),
            Err(_) => tracing::debug!("closing the connection: no answer within {CLOSE_TIMEOUT:?}"),
        }
    }

    async fn delete(&self, queue: &str, options: QueueDeleteOptions) -> lapin::Result<()> {
        if let Some(channel) = &self.previous_channel {
            // Our consumer leaves with its channel, which the broker may have closed already.
            let _ = channel.close(200, "OK".into()).await;
        }
        let channel = self.lapin.create_channel().await?;
        channel.queue_delete(queue.into(), options).await?;
        channel.close(200, "OK".into()).await
    }
}

/// Ends a connection that is dropped without being closed: lapin's thread would keep it, beside the next one.
pub(super) struct ShutdownOnDrop(std::net::TcpStream);

impl ShutdownOnDrop {
    pub(in crate::broker) fn new(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self(socket.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for ShutdownOnDrop {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
