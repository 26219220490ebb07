//! A connection that is open: what it was seen to say, and how it ends.

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

/// Longest time that closing a connection politely may take: a broker that is frozen, or blocks publishers, doesn't
/// answer, and the process ends all the same.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// An open connection.
pub struct OpenConnection {
    /// What it is logged in with. It has a share of the connection only while the broker is told of a new token.
    pub(in crate::broker) login: Login,
    pub(in crate::broker) lapin: Arc<Connection>,
    /// There is one listener only, as lapin's listeners take from each other.
    pub(super) events: Pin<Box<dyn Stream<Item = Event> + Send + Sync>>,
    pub(in crate::broker) observed: Arc<Mutex<Observed>>,
    /// The channel of a consumer that is no more. Dropping it would send a channel.close that fails when it meets our
    /// connection.close, and lapin 4.12 then ends the connection without a close.
    pub(in crate::broker) last_channel: Option<Channel>,
    pub(super) _cutter: Cutter,
}

impl OpenConnection {
    /// What the broker has sent so far.
    pub(in crate::broker) fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().expect("nobody panics with it")
    }

    pub(in crate::broker) fn version(&self) -> Option<Version> {
        self.observed().version
    }

    /// What a refusal means, if this is one.
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
            // lapin keeps a sender for as long as the connection is there, and we keep that.
            None => pending().await,
        }
    }

    /// Closes the connection politely (`connection.close`), within two seconds; whether the broker answers changes
    /// nothing any more.
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

/// Shuts the socket down when the connection is dropped: lapin's thread would go on with an attempt that was given up,
/// or with a broker that doesn't answer, beside its successor.
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
