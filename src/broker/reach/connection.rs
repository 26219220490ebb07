//! An open connection: what the broker has sent on it, and how it is closed.

use super::{
    observed::{Observed, Version},
    token::Login,
};
use crate::broker::errors::{Meaning, described};
use lapin::{Channel, Connection, Event};
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

/// An open connection.
pub struct OpenConnection {
    /// Its credentials. It holds a strong reference to the connection only while it sends a new token.
    pub(in crate::broker) login: Login,
    pub(in crate::broker) lapin: Arc<Connection>,
    /// The only listener: lapin's listeners take events from each other.
    pub(super) events: Pin<Box<dyn Stream<Item = Event> + Send + Sync>>,
    pub(in crate::broker) observed: Arc<Mutex<Observed>>,
    /// The last consumer's channel, kept open until connection.close. If it is dropped, lapin sends channel.close, and
    /// lapin 4.12 ends the connection without a connection.close if the two cross.
    pub(in crate::broker) last_channel: Option<Channel>,
    pub(super) _cutter: Cutter,
}

impl OpenConnection {
    pub(in crate::broker) fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().expect("nobody panics with it")
    }

    pub(in crate::broker) fn version(&self) -> Option<Version> {
        self.observed().version
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

    /// Sends `connection.close` and waits for the reply, two seconds at most.
    pub async fn close(&self) {
        if !self.is_connected() {
            return;
        }
        match timeout(CLOSE_TIMEOUT, self.lapin.close(200, "OK".into())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("closing the connection: {}", described(&error)),
            Err(_) => tracing::debug!("closing the connection: no answer within {CLOSE_TIMEOUT:?}"),
        }
    }
}

/// Shuts the socket down when the connection is dropped. Without that, lapin's thread would keep an attempt that was
/// given up, or a connection to a silent broker, beside the new one.
pub(super) struct Cutter(std::net::TcpStream);

impl Cutter {
    pub(in crate::broker) fn new(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self(socket.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
