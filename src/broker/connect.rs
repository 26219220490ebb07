//! From an address to an open connection: look up, dial, TLS, handshake.

use super::{
    address::{Address, AuthMechanism},
    errors::ConnectError,
    frames::{Seen, Version},
    incoming::{Bodies, Incoming},
    one_cpu::{IoThread, OneCpu},
    resolve::resolve,
    tls::Tls,
    transport::{Kit, Stream},
};
use crate::{
    exit::{Exit, Failure},
    report::mentioned,
};
use async_rs::Runtime;
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties, Event,
    types::ShortString,
    uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism},
};
use std::{
    future::poll_fn,
    io,
    net::{Shutdown, SocketAddr},
    os::fd::AsFd,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_stream::Stream as TokioStream;

/// Longest wait for one address to accept: a host that is gone without a word mustn't use up the time of the others.
const TCP_CONNECT: Duration = Duration::from_secs(5);

/// Largest frame asked for, in bytes: RabbitMQ's default. Without a preset lapin makes its buffers twice, the second time
/// with every page touched. Less would be quicker with large bodies, but all headers of a message are one frame.
const FRAME_MAX: u32 = 131_072;

/// Heartbeat interval asked for where nobody says otherwise, in seconds: a frozen broker is noticed after
/// 2 to 2.5 of them.
const HEARTBEAT: u16 = 10;

/// Pauses between attempts: from the first on they double up to the longest, each shortened by up to a half at
/// random, so that a thousand pods don't come back as one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `--connect-timeout`: for everything from the first look-up until a consumer is registered.
    pub timeout: Duration,
    /// `--heartbeat`, in seconds; without it the address's own parameter, and then 10, is asked for.
    pub heartbeat: Option<u16>,
    /// What RabbitMQ's management page shows.
    pub name: String,
    /// For `amqps`.
    pub tls: Tls,
}

/// The nodes of one cluster, tried in turn.
#[derive(Debug)]
pub struct Broker {
    nodes: Vec<Address>,
    next: usize,
    pub(super) options: ConnectOptions,
    /// What is under way, for the message when time runs out in the middle of it.
    stage: String,
}

impl Broker {
    /// A broker at these addresses, of which there is at least one.
    #[must_use]
    pub fn new(nodes: Vec<Address>, options: ConnectOptions) -> Self {
        Self {
            nodes,
            next: 0,
            options,
            stage: String::new(),
        }
    }

    pub(super) fn stage(&self) -> &str {
        &self.stage
    }

    /// A connection, from as many attempts as it needs within `--connect-timeout`.
    ///
    /// # Errors
    /// The permanent failure, or when time is up the last transient one.
    pub async fn connect(&mut self) -> Result<Link, Failure> {
        let mut attempts = Attempts::new(self.options.timeout);
        loop {
            let limit = attempts.deadline;
            match timeout_at(limit, self.open(limit)).await {
                Ok(Ok(mut link)) => {
                    link.opening = None;
                    return Ok(link);
                }
                Ok(Err(trouble)) => attempts.failed(trouble).await?,
                Err(_) => return Err(attempts.out_of_time(&self.stage)),
            }
        }
    }

    /// One attempt at the next node.
    pub(super) async fn open(&mut self, deadline: Instant) -> Result<Link, ConnectError> {
        let node = self.next % self.nodes.len();
        let address = self.nodes[node].clone();
        // Should this one fail, the next attempt is the next node's.
        self.next = node + 1;
        // One that accepts and then says nothing mustn't use up all the time: its successor at the same address, or
        // the next node, gets what it leaves.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = (left / 2).max(TCP_CONNECT).min(left);
        let link = match timeout(share, self.open_node(&address)).await {
            Ok(Ok(link)) => link,
            Ok(Err(mut trouble)) => {
                trouble.failure.message = format!("{address}: {}", trouble.failure.message);
                return Err(trouble);
            }
            Err(_) => {
                return Err(ConnectError::transient(no_answer(&self.stage)));
            }
        };
        // It was good: after a loss it is asked first again only where it is the only one.
        Ok(link)
    }

    async fn open_node(&mut self, address: &Address) -> Result<Link, ConnectError> {
        self.stage = format!("looking up {}", address.host);
        let found = mentioned(&self.stage, resolve(&address.host, address.port))
            .await
            .map_err(|error| {
                ConnectError::transient(format!(
                    "the name {:?} can't be looked up: {error}",
                    address.host
                ))
            })?;
        let socket = self.dial(address, &found).await?;
        let cutter =
            Cutter::new(&socket).map_err(|error| ConnectError::transient(error.to_string()))?;
        let seen = Arc::new(Seen::default());
        let bodies = Arc::new(Bodies::default());
        let incoming = Incoming::new(
            // The greeting comes before a smaller one is agreed on.
            frame_max(address).max(FRAME_MAX),
            Arc::clone(&seen),
            Arc::clone(&bodies),
        );
        let stream = if address.tls {
            self.stage = format!("waiting for the TLS handshake with {address}");
            let handshake = self.options.tls.handshake(socket, address);
            Stream::tls(mentioned(&self.stage, handshake).await?, incoming)
        } else {
            Stream::plain(socket, incoming)
        };
        self.stage = format!("waiting for the AMQP handshake with {address}");
        let io_thread = IoThread::default();
        let opening = OneCpu::begin(io_thread.clone());
        let handshake = Connection::connector(
            uri(address, self.options.heartbeat),
            Runtime::new(Kit::current()),
            hand_over(stream, io_thread),
            properties(&self.options.name),
        );
        let connection = mentioned(&self.stage, handshake).await.map_err(|error| {
            let external = address.parameters.auth_mechanism == Some(AuthMechanism::External);
            if external && seen.without_external() {
                ConnectError::permanent(
                    Exit::Config,
                    "the broker doesn't offer the login by client certificate (EXTERNAL): enable its plugin rabbitmq_auth_mechanism_ssl and list EXTERNAL in auth_mechanisms, or give a password",
                )
            } else {
                ConnectError::in_handshake(&error, address)
            }
        })?;
        tracing::debug!("connected to {address}");
        let events = Box::pin(connection.events_listener());
        Ok(Link {
            connection,
            events,
            seen,
            bodies,
            opening,
            _cutter: cutter,
        })
    }

    async fn dial(
        &mut self,
        address: &Address,
        found: &[SocketAddr],
    ) -> Result<TcpStream, ConnectError> {
        let limit = address.parameters.connection_timeout.unwrap_or(TCP_CONNECT);
        let mut problems = Vec::new();
        for target in found {
            self.stage = format!("connecting to {target}");
            let problem = match timeout(limit, TcpStream::connect(target)).await {
                Ok(Ok(socket)) => {
                    // Small methods go out at once; refusing that is no reason to fail.
                    let _ = socket.set_nodelay(true);
                    return Ok(socket);
                }
                Ok(Err(error)) => format!("{target}: {error}"),
                Err(_) => format!("{target}: no answer within {limit:?}"),
            };
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        let unnamed = if address.host_given {
            ""
        } else {
            " (the URL names no host)"
        };
        Err(ConnectError::transient(format!(
            "can't connect{unnamed}: {}",
            problems.join("; ")
        )))
    }
}

/// An open connection.
pub struct Link {
    pub(super) connection: Connection,
    pub(super) events: Pin<Box<dyn TokioStream<Item = Event> + Send>>,
    pub(super) seen: Arc<Seen>,
    pub(super) bodies: Arc<Bodies>,
    /// Until it has been put to its first use.
    pub(super) opening: Option<OneCpu>,
    _cutter: Cutter,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl Link {
    /// The connection, for what has no need of a consumer.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The connection's events; there is one listener only, as lapin's listeners take from each other.
    pub fn events(&mut self) -> Pin<&mut (dyn TokioStream<Item = Event> + Send)> {
        self.events.as_mut()
    }

    pub(super) fn version(&self) -> Option<Version> {
        self.seen.version()
    }

    /// Forgets the events so far: the end of an earlier channel, a refused one for example, is no loss to the next.
    pub(super) async fn forget_events(mut self) -> Self {
        poll_fn(|cx| {
            while let Poll::Ready(Some(_)) = self.events.as_mut().poll_next(cx) {}
            Poll::Ready(())
        })
        .await;
        self
    }
}

/// Ends the connection at once, without a word, when the link is dropped: an attempt that was given up, or a
/// broker that doesn't answer, mustn't go on beside its successor.
struct Cutter(std::net::TcpStream);

impl Cutter {
    fn new(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self(socket.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// The attempts within one `--connect-timeout`.
pub(super) struct Attempts {
    pub(super) deadline: Instant,
    limit: Duration,
    pause: Duration,
    last: Option<Failure>,
    said: crate::report::Patience,
}

impl Attempts {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            deadline: Instant::now() + limit,
            limit,
            pause: FIRST_PAUSE,
            last: None,
            said: crate::report::Patience::new(Duration::ZERO),
        }
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The failure, when it is permanent or time is up.
    pub(super) async fn failed(&mut self, trouble: ConnectError) -> Result<(), Failure> {
        if !trouble.transient {
            return Err(trouble.failure);
        }
        if Instant::now() >= self.deadline {
            self.last = Some(trouble.failure);
            return Err(self.out_of_time("trying again"));
        }
        if self.said.is_due() {
            tracing::warn!(
                "{}; trying again for up to {}",
                trouble.failure,
                crate::report::Span(self.deadline.saturating_duration_since(Instant::now()))
            );
        } else {
            tracing::debug!("{}; trying again", trouble.failure);
        }
        self.last = Some(trouble.failure);
        let wake = Instant::now() + self.pause.mul_f64(1.0 - fastrand::f64() / 2.0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        sleep_until(wake.min(self.deadline)).await;
        if Instant::now() >= self.deadline {
            return Err(self.out_of_time("trying again"));
        }
        Ok(())
    }

    /// What the run ends with when the time is up while `stage` is under way.
    pub(super) fn out_of_time(&mut self, stage: &str) -> Failure {
        let mut failure = self
            .last
            .take()
            .unwrap_or_else(|| ConnectError::transient(no_answer(stage)).failure);
        failure.message = format!(
            "gave up after {} (--connect-timeout): {}",
            crate::report::Span(self.limit),
            failure.message
        );
        failure
    }
}

fn no_answer(stage: &str) -> String {
    format!("no answer while {stage}")
}

/// lapin's thread dials by calling this, once; a second call would be a reconnection, which is ours to do.
fn hand_over(
    stream: Stream,
    io_thread: IoThread,
) -> impl AsyncFn(AMQPUri, Runtime<Kit>) -> lapin::Result<AsyncTcpStream<Stream>> + Send + Sync + 'static
{
    let stream = Mutex::new(Some(stream));
    async move |_, _| {
        io_thread.is_this();
        stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .map(AsyncTcpStream::Plain)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected).into())
    }
}

fn uri(address: &Address, heartbeat: Option<u16>) -> AMQPUri {
    let parameters = &address.parameters;
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: address.username.clone(),
                password: address.password.expose().to_owned(),
            },
            host: address.host.clone(),
            port: address.port,
        },
        vhost: address.virtual_host.clone(),
        query: AMQPQueryString {
            frame_max: Some(frame_max(address)),
            channel_max: parameters.channel_max,
            heartbeat: heartbeat.or(parameters.heartbeat).or(Some(HEARTBEAT)),
            connection_timeout: None,
            auth_mechanism: parameters.auth_mechanism.map(mechanism),
        },
    }
}

/// The largest frame to ask for, in bytes.
fn frame_max(address: &Address) -> u32 {
    match address.parameters.frame_max {
        None | Some(0) => FRAME_MAX,
        Some(bytes) => bytes,
    }
}

fn mechanism(wanted: AuthMechanism) -> SASLMechanism {
    match wanted {
        AuthMechanism::Plain => SASLMechanism::Plain,
        AuthMechanism::AmqPlain => SASLMechanism::AMQPlain,
        AuthMechanism::External => SASLMechanism::External,
    }
}

fn properties(name: &str) -> ConnectionProperties {
    let property = |name: &str| ShortString::from(name);
    ConnectionProperties::default()
        .with_connection_name(name.into())
        .with_client_property(property("product"), env!("CARGO_PKG_NAME").into())
        .with_client_property(property("version"), env!("CARGO_PKG_VERSION").into())
}
