//! From an address to an open connection: look up, dial, TLS, handshake.

use super::{
    address::Address,
    connection::{OpenConnection, ShutdownOnDrop},
    credentials::CredentialsInUse,
    nodes::{Nodes, SecretFile},
    observed::Observed,
    resolve::resolve,
    tap::Tap,
    transport::{Socket, TappedStream, lapin_runtime},
    tries::Tries,
};
use crate::{
    broker::errors::ConnectError,
    exit::Failure,
    report::{HumanDuration, with_reminders},
};
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties,
    types::ShortString,
    uri::{AMQPAuthority, AMQPQueryString, AMQPUri, AMQPUserInfo},
};
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

/// Longest wait for one address to accept: a host that doesn't answer mustn't use up the time of the others.
const TCP_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The least that one try gets of the time that is left.
const TRY_MIN: Duration = Duration::from_secs(5);

/// How long an address may be silent before the next one is dialled, too (RFC 8305's recommendation).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

const DEFAULT_HEARTBEAT_SECONDS: u16 = 10;

/// The kubelet takes up to two minutes to bring a rotated Secret into a pod.
const RETRY_LOGIN_FOR: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `--connect-timeout`: from the first look-up until there is a consumer, or for qpublish a connection.
    pub timeout: Duration,
    /// In seconds.
    pub heartbeat: Option<u16>,
    /// As RabbitMQ's management page shows it.
    pub name: String,
}

/// Connects to the nodes of one cluster, in turn.
#[derive(Debug)]
pub struct Connector {
    nodes: Nodes,
    pub(in crate::broker) options: ConnectOptions,
    /// How many tries there were, over all connections: each takes the next node.
    tries: usize,
    login_refused_since: Option<Instant>,
    /// Why the files couldn't be read the last time, to log each reason once.
    unreadable_files: Option<String>,
    /// What this try is waiting for: if time runs out, the failure says so.
    stage: String,
    address_problems: Vec<String>,
    /// The addresses that have accepted a connection, the latest last.
    accepted: Vec<SocketAddr>,
}

impl Connector {
    #[must_use]
    pub fn new(nodes: Nodes, options: ConnectOptions) -> Self {
        Self {
            nodes,
            options,
            tries: 0,
            login_refused_since: None,
            unreadable_files: None,
            stage: String::new(),
            address_problems: Vec::new(),
            accepted: Vec::new(),
        }
    }

    /// # Errors
    /// A permanent failure, or the last transient one when time is up.
    pub async fn connect(&mut self) -> Result<OpenConnection, Failure> {
        let mut tries = Tries::new(self.options.timeout);
        loop {
            match self.try_to_connect(tries.deadline).await {
                Ok(connection) => return Ok(connection),
                Err(error) => tries.pause_after(error).await?,
            }
        }
    }

    pub(in crate::broker) async fn try_to_connect(
        &mut self,
        deadline: Instant,
    ) -> Result<OpenConnection, ConnectError> {
        if self.tries > 0 && self.nodes.may_change() {
            self.read_files_again();
        }
        let addresses = &self.nodes.addresses;
        let address = addresses[self.tries % addresses.len()].clone();
        self.tries += 1;
        // Half of the time that is left: a node that accepts but never answers mustn't use up all of it.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = (left / 2).max(TRY_MIN).min(left);
        let opened = timeout(share, self.open(&address)).await;
        match opened.unwrap_or_else(|_| Err(ConnectError::no_answer(&self.stage))) {
            Ok(connection) => {
                if !connection.observed().is_another_product {
                    self.login_accepted();
                }
                Ok(connection)
            }
            Err(mut error) => {
                // Before `with_addresses`, as this decides whether the failure is permanent.
                if error.login_refused {
                    self.note_login_refused(&mut error);
                }
                Err(self.with_addresses(error, &address))
            }
        }
    }

    /// If a file can't be used (it may be half written), its old content still counts.
    fn read_files_again(&mut self) {
        let problem = self.nodes.read().err().map(|failure| failure.message);
        if problem != self.unreadable_files
            && let Some(problem) = &problem
        {
            tracing::warn!("{problem}; using its previous content");
        }
        self.unreadable_files = problem;
    }

    fn with_addresses(&self, mut error: ConnectError, address: &Address) -> ConnectError {
        let message = &mut error.failure.message;
        *message = format!("{address}: {message}");
        // A permanent failure has a reason of its own: the other addresses don't matter.
        if error.transient {
            for problem in &self.address_problems {
                *message = format!("{message}; {problem}");
            }
        }
        error
    }

    /// A proxy logs in to the broker only when a channel is opened: then `Consumer` calls this.
    pub(in crate::broker) fn login_accepted(&mut self) {
        self.login_refused_since = None;
    }

    /// Makes the error transient for [`RETRY_LOGIN_FOR`], but at most for `--connect-timeout`, if the password may come
    /// from a file.
    pub(in crate::broker) fn note_login_refused(&mut self, error: &mut ConnectError) {
        let Some(file) = self.nodes.file_with_password() else {
            return;
        };
        let file = file.path().display();
        if self.login_refused_since.is_none() {
            tracing::info!("the login is refused: reading {file} again before each new connection");
        }
        let refused_for = self.login_refused_since.get_or_insert_with(Instant::now).elapsed();
        error.transient = refused_for < RETRY_LOGIN_FOR;
        if !error.transient {
            error.failure.message += &format!("; {file} was read again for {}", HumanDuration(refused_for));
        }
    }

    async fn open(&mut self, address: &Address) -> Result<OpenConnection, ConnectError> {
        let wanted = self.options.heartbeat.or(address.parameters.heartbeat);
        let heartbeat = wanted.unwrap_or(DEFAULT_HEARTBEAT_SECONDS);
        let opened = self.open_with(address, heartbeat).await?;
        // A broker that proposes 0 wants no heartbeats. amqproxy 3.1 does that, and sends heartbeats only to clients
        // that send nothing themselves. lapin 4.12 obeys only if we propose 0, too.
        if heartbeat != 0 && opened.observed().heartbeat == Some(0) {
            tracing::debug!("{address} wants no heartbeats: connecting again without");
            opened.close().await;
            return self.open_with(address, 0).await;
        }
        Ok(opened)
    }

    async fn open_with(&mut self, address: &Address, heartbeat: u16) -> Result<OpenConnection, ConnectError> {
        self.address_problems.clear();
        let found = self.look_up(address).await?;
        let (target, socket) = self.dial(address, found).await?;
        let shutdown = ShutdownOnDrop::new(&socket)
            .map_err(|error| ConnectError::of_system("can't duplicate the socket's descriptor", &error))?;
        let socket: Box<dyn Socket> = if address.tls {
            self.stage = format!("waiting for the TLS handshake with {target}");
            let handshake = self.nodes.tls.handshake(socket, address);
            Box::new(with_reminders(&self.stage, handshake).await?)
        } else {
            Box::new(socket)
        };
        self.stage = format!("waiting for the AMQP handshake with {target}");
        let (lapin, observed) = self.amqp_handshake(address, heartbeat, socket).await?;
        tracing::debug!("connected to {address} at {target}");
        Ok(OpenConnection {
            credentials: CredentialsInUse::new(&lapin, address, &self.nodes),
            events: Box::pin(lapin.events_listener()),
            lapin,
            observed,
            previous_channel: None,
            exclusive_queue: None,
            _shutdown: shutdown,
        })
    }

    async fn look_up(&mut self, address: &Address) -> Result<Vec<SocketAddr>, ConnectError> {
        self.stage = format!("looking up {}", address.host);
        let mut found = with_reminders(&self.stage, resolve(&address.host, address.port)).await.map_err(|error| {
            let what = format!("the name {:?} can't be looked up", address.host);
            ConnectError::of_system(what, &error)
        })?;
        // Addresses that accepted before come last: that connection failed, was lost, or is made again without
        // heartbeats.
        found.sort_by_key(|target| self.accepted.iter().position(|accepted| accepted == target));
        Ok(found)
    }

    /// Dials the next address as soon as one fails, or after [`NEXT_ADDRESS_AFTER`] if it is silent.
    async fn dial(
        &mut self,
        address: &Address,
        found: Vec<SocketAddr>,
    ) -> Result<(SocketAddr, TcpStream), ConnectError> {
        let limit = address.parameters.connection_timeout.unwrap_or(TCP_CONNECT_TIMEOUT);
        // Shorter if there are many addresses: all of them are dialled within a quarter of the time.
        let pause = NEXT_ADDRESS_AFTER.min(self.options.timeout.div_f64(4.0 * found.len().max(1) as f64));
        let mut untried = found.into_iter();
        let mut silent = Vec::new();
        let mut dialling = JoinSet::new();
        loop {
            if let Some(target) = untried.next() {
                silent.push(target);
                dialling.spawn(async move { (target, timeout(limit, TcpStream::connect(target)).await) });
            }
            let names: Vec<_> = silent.iter().map(SocketAddr::to_string).collect();
            self.stage = format!("connecting to {}", names.join(", "));
            let (target, dialled) = match timeout(pause, dialling.join_next()).await {
                Ok(Some(ended)) => ended.expect("dialling doesn't panic"),
                Ok(None) => break,
                Err(_) => continue,
            };
            silent.retain(|other| *other != target);
            let problem = match dialled {
                Ok(Ok(socket)) => {
                    let _ = socket.set_nodelay(true);
                    self.address_problems.extend(silent.iter().map(|other| format!("{other}: no answer")));
                    self.accepted.retain(|other| *other != target);
                    self.accepted.push(target);
                    return Ok((target, socket));
                }
                Ok(Err(error)) if crate::exit::is_shortage(&error) => {
                    return Err(ConnectError::of_system("can't open a socket", &error));
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {limit:?}"),
            };
            self.address_problems.push(format!("{target}: {problem}"));
        }
        let problems = std::mem::take(&mut self.address_problems).join("; ");
        Err(ConnectError::transient(format!("can't connect: {problems}")))
    }

    async fn amqp_handshake(
        &self,
        address: &Address,
        heartbeat: u16,
        socket: Box<dyn Socket>,
    ) -> Result<(Arc<Connection>, Arc<Mutex<Observed>>), ConnectError> {
        let observed = Arc::default();
        let tap = Tap::new(address.frame_max(), Arc::clone(&observed));
        let stream = Mutex::new(Some(TappedStream { socket, tap }));
        // lapin wants a closure that it can call again to reconnect. We reconnect ourselves, so it is called once.
        let dial_for_lapin = async move |_, _| {
            let stream = stream.lock().expect("nobody panics with it").take();
            Ok(AsyncTcpStream::Plain(stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?))
        };
        let (uri, properties) = (uri(address, heartbeat), properties(&self.options.name));
        let handshake = Connection::connector(uri, lapin_runtime(), dial_for_lapin, properties);
        match with_reminders(&self.stage, handshake).await {
            Ok(lapin) => Ok((Arc::new(lapin), observed)),
            Err(error) => {
                let observed = observed.lock().expect("nobody panics with it");
                let file = self.nodes.file_with_password().map(SecretFile::path);
                Err(ConnectError::in_handshake(&error, &observed, address, file))
            }
        }
    }
}

/// lapin's URI, without host and port: we dial ourselves.
fn uri(address: &Address, heartbeat: u16) -> AMQPUri {
    AMQPUri {
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo {
                username: address.username.clone(),
                password: address.password.expose().to_owned(),
            },
            ..AMQPAuthority::default()
        },
        vhost: address.virtual_host.clone(),
        query: AMQPQueryString {
            frame_max: Some(address.frame_max()),
            channel_max: address.parameters.channel_max,
            heartbeat: Some(heartbeat),
            auth_mechanism: address.parameters.auth_mechanism,
            ..AMQPQueryString::default()
        },
        ..AMQPUri::default()
    }
}

fn properties(name: &str) -> ConnectionProperties {
    let property = |name: &str| ShortString::from(name);
    ConnectionProperties::default()
        .with_connection_name(name.into())
        .with_client_property(property("product"), env!("CARGO_PKG_NAME").into())
        .with_client_property(property("version"), env!("CARGO_PKG_VERSION").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use tokio::time::advance;

    fn refused() -> ConnectError {
        ConnectError { transient: false, failure: Failure::new(Exit::NoPermission, "refused"), login_refused: true }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_login_is_tried_again_for_two_minutes_if_a_file_is_behind_it() {
        let options = ConnectOptions { timeout: Duration::MAX, heartbeat: None, name: String::new() };
        let mut broker = Connector::new(Nodes::default(), options);
        let retried = |broker: &mut Connector| {
            let mut error = refused();
            broker.note_login_refused(&mut error);
            (error.transient, error.failure.message)
        };
        assert!(!retried(&mut broker).0);
        broker.nodes.password_file = Some(SecretFile::new("/run/token".into(), "--password-file".into()));
        for _ in 0..2 {
            for _ in 0..12 {
                assert!(retried(&mut broker).0);
                advance(Duration::from_secs(10)).await;
            }
            let gave_up = (false, "refused; /run/token was read again for 2m".to_owned());
            assert_eq!(retried(&mut broker), gave_up);
            broker.login_refused_since = None;
        }
    }
}
