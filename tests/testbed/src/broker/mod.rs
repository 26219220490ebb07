//! Finds or starts a RabbitMQ for tests, demo, soak and benchmark.
//!
//! Tries, in this order: `BROKER_URL`; containers of the image in `QCONSUME_TEST_RABBITMQ`; a private node of this
//! machine's `rabbitmq-server`; a container of [`DEFAULT_IMAGE`]; Debian's package, which it installs as root.
//! Otherwise it fails. A private node has its own port, name, cookie, epmd and data, listens only on loopback, and is
//! removed at the end. A broker on port 5672 is never touched.

mod cluster;
mod container;
mod install;
mod local;
mod options;
mod probe;
mod settings;

pub(crate) use cluster::{Cluster, Leader};
pub use container::{Container, docker, docker_works, image_present};
pub use options::BrokerOptions;

use crate::client::{Client, Queue, QueueBuilder};
use crate::{PATIENCE, Signal, eventually, owner};
use anyhow::{Context, Result, bail, ensure};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use settings::{PORT_MARK, Settings};
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The variable with the image to test with, for example `rabbitmq:4.3-management`.
pub const IMAGE_VARIABLE: &str = "QCONSUME_TEST_RABBITMQ";

/// The image if [`IMAGE_VARIABLE`] is unset and this machine has no `rabbitmq-server`.
pub const DEFAULT_IMAGE: &str = "rabbitmq:4-management";

/// A node needs 5 to 12 seconds on two idle cores; on a busy machine, with several starting at the same time, it was
/// over 90.
const START_LIMIT: Duration = Duration::from_secs(600);

/// A healthy node answers a greeting within this time.
const GREETING: Duration = Duration::from_secs(2);

/// `rabbitmqctl` needs one to two seconds, more while nodes are starting.
const CTL_LIMIT: Duration = Duration::from_secs(180);

/// Makes a node write down its quorum queues. By itself, it does that only after half a second without changes (the
/// auto-save of "dets" tables). If it is killed sooner, the queue never has a leader again (3.10.8), or is created
/// again and empty, despite confirmed messages (4.3.6).
const WRITE_DOWN: &str = "[ok = dets:sync(Table) || Table <- dets:all()]";

/// A broker to test with. A private one is removed with its data when dropped.
pub struct Broker {
    user: String,
    password: String,
    vhost: Option<String>,
    addr: SocketAddr,
    version: OnceLock<(u32, u32, u32)>,
    client: OnceLock<Client>,
    /// `None`: the broker at `BROKER_URL`, which isn't ours.
    node: Option<Arc<dyn Node>>,
}

/// A private node, as a process of this machine or in a container.
trait Node: Send + Sync {
    /// The folder of its files, from its own view.
    fn folder(&self) -> PathBuf;
    fn is_running(&self) -> bool;
    fn log(&self) -> String;
    fn ctl(&self, args: &[&str]) -> Result<String>;
    fn start_again(&self) -> Result<()>;
    fn stop(&self) -> Result<()>;
    fn kill(&self) -> Result<()>;
    /// Sends a signal to the emulator, not to the script around it.
    fn signal(&self, signal: Signal) -> Result<()>;
}

/// Where private nodes come from.
#[derive(Clone)]
pub(crate) enum Source {
    Local(local::Installation),
    Image(String),
}

impl Broker {
    /// The broker that all tests of this process share; the first call starts it. Don't break it: a test that stops or
    /// freezes a broker has to start one.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Broker> = OnceLock::new();
        SHARED.get_or_init(|| Self::find().unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// The broker at `BROKER_URL` if that is set, or else a new private node.
    pub fn find() -> Result<Self> {
        match std::env::var("BROKER_URL") {
            Ok(url) if !url.is_empty() => Self::external(&url),
            _ => Self::options().start(),
        }
    }

    /// A new private node, which a test may stop, kill or freeze.
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// A private node with more lines in its rabbitmq.conf, such as
    /// `"consumer_timeout = 2000\nchannel_tick_interval = 1000\n"`.
    pub fn with_config(lines: &str) -> Self {
        Self::options().config(lines).start().unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Private nodes that form one cluster.
    pub fn cluster(size: usize) -> Vec<Self> {
        Self::options().cluster(size).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Options of a private node.
    pub fn options() -> BrokerOptions {
        BrokerOptions::default()
    }

    fn external(url: &str) -> Result<Self> {
        let uri: lapin::uri::AMQPUri = url
            .parse()
            // The message must not show the URL, which has a password.
            .map_err(|error| anyhow::anyhow!("BROKER_URL isn't a valid AMQP address: {error}"))?;
        if uri.scheme != lapin::uri::AMQPScheme::AMQP {
            bail!("BROKER_URL: the tests' own connections need amqp://, not amqps://");
        }
        let host = uri.authority.host.trim_matches(['[', ']']).to_owned();
        let port = uri.authority.port;
        let addr = (host.as_str(), port)
            .to_socket_addrs()
            .with_context(|| format!("BROKER_URL: cannot resolve {host}"))?
            .next()
            .with_context(|| format!("BROKER_URL: {host} has no address"))?;
        let broker = Self {
            user: uri.authority.userinfo.username,
            password: uri.authority.userinfo.password,
            vhost: Some(uri.vhost).filter(|vhost| vhost != "/"),
            addr,
            version: OnceLock::new(),
            client: OnceLock::new(),
            node: None,
        };
        let version = probe::probe(addr, Duration::from_secs(10))
            .with_context(|| format!("BROKER_URL: no RabbitMQ answers at {addr}"))?;
        let _ = broker.version.set(version);
        Ok(broker)
    }

    fn launch(source: &Source, settings: Settings) -> Result<Self> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, settings.port.number()));
        let node: Arc<dyn Node> = match source {
            Source::Local(local) => Arc::new(local::LocalNode::launch(local, settings)?),
            Source::Image(image) => Arc::new(container::ContainerNode::launch(image, settings)?),
        };
        Ok(Self::on(node, addr))
    }

    fn on(node: Arc<dyn Node>, addr: SocketAddr) -> Self {
        Self {
            user: "guest".into(),
            password: "guest".into(),
            vhost: None,
            addr,
            version: OnceLock::new(),
            client: OnceLock::new(),
            node: Some(node),
        }
    }

    /// Waits until the node greets a client. It starts its listeners last.
    fn await_start(&self) -> Result<()> {
        let node = self.private()?;
        let end = Instant::now() + START_LIMIT;
        while node.is_running() && Instant::now() < end {
            if let Ok(version) = probe::probe(self.addr, Duration::from_secs(5)) {
                let _ = self.version.set(version);
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!(
            "a private RabbitMQ at {} ended while starting, or hadn't started after {START_LIMIT:?}; its log ends with\n{}",
            self.addr,
            self.log_tail()
        )
    }

    /// Waits until this Erlang expression is true.
    fn await_cluster(&self, size: usize, formed: &str) -> Result<()> {
        let joined = || self.eval(formed).is_ok_and(|answer| answer == "true");
        ensure!(
            eventually(START_LIMIT, joined),
            "{size} nodes hadn't formed a cluster after {START_LIMIT:?}; the log ends with\n{}",
            self.log_tail()
        );
        Ok(())
    }

    fn private(&self) -> Result<&dyn Node> {
        self.node
            .as_deref()
            .context("the tests may not control the broker at BROKER_URL; start a private one with Broker::start()")
    }

    /// Whether the testbed started this broker, so that tests may stop it and use [`Broker::ctl`].
    pub fn is_private(&self) -> bool {
        self.node.is_some()
    }

    /// The address for `BROKER_URL`, with the credentials of an administrator.
    pub fn url(&self) -> String {
        self.url_at(self.addr)
    }

    /// The URL with another address, for example a proxy's.
    pub fn url_at(&self, addr: SocketAddr) -> String {
        let vhost = self.vhost.as_deref();
        let vhost = vhost.map(|vhost| format!("/{}", percent_encode(vhost)));
        format!(
            "amqp://{}:{}@{addr}{}",
            percent_encode(&self.user),
            percent_encode(&self.password),
            vhost.unwrap_or_default()
        )
    }

    /// The URL for another user and virtual host.
    pub fn url_for(&self, user: &str, password: &str, vhost: &str) -> String {
        format!("amqp://{}:{}@{}/{}", percent_encode(user), percent_encode(password), self.addr, percent_encode(vhost))
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The port on which it listens.
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// RabbitMQ's version: `broker.version() >= (4, 3, 0)`.
    pub fn version(&self) -> (u32, u32, u32) {
        // The handshake that found the broker ready has set it.
        self.version.get().copied().unwrap_or_default()
    }

    /// The folder with its files ([`BrokerOptions::file`]), from the node's own view.
    pub fn folder(&self) -> Option<PathBuf> {
        Some(self.node.as_ref()?.folder())
    }

    /// The pids of a private node's processes.
    pub fn processes(&self) -> Vec<i32> {
        owner::processes_with(PORT_MARK, &self.port().to_string())
    }

    /// Runs `rabbitmqctl` on it, for example `ctl(&["add_vhost", "other"])`; returns its output.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let node = self.private()?;
        let end = Instant::now() + PATIENCE;
        loop {
            match node.ctl(args) {
                // The node's port is open a moment before its start is complete.
                Err(error)
                    if format!("{error:#}").contains("requires the 'rabbit' app to be running")
                        && Instant::now() < end => {}
                done => return done,
            }
        }
    }

    /// Evaluates an Erlang expression on it; returns the value as text.
    pub(crate) fn eval(&self, expression: &str) -> Result<String> {
        let value = self.ctl(&["eval", &format!("{expression}.")])?;
        Ok(value.trim().to_owned())
    }

    /// Whether it answers a client's greeting.
    pub(crate) fn greets(&self) -> bool {
        probe::probe(self.addr, GREETING).is_ok()
    }

    /// Shuts it down gracefully, and waits until it has ended.
    pub fn stop(&self) -> Result<()> {
        self.private()?.stop()
    }

    /// Kills it with SIGKILL, as a crash or a power failure would.
    ///
    /// Before that, makes it write down the quorum queues that [`Broker::client`] has declared.
    pub fn kill(&self) -> Result<()> {
        if self.client.get().is_some_and(Client::take_quorum_declared) {
            self.eval(WRITE_DOWN)?;
        }
        self.private()?.kill()
    }

    /// Stops its processes with SIGSTOP: its connections stay open, but nothing is answered.
    pub fn freeze(&self) -> Result<()> {
        self.private()?.signal(Signal::SIGSTOP)
    }

    /// Lets a frozen broker go on.
    pub fn thaw(&self) -> Result<()> {
        self.private()?.signal(Signal::SIGCONT)
    }

    /// Starts a stopped or killed broker with the same data on the same port, and waits until it answers.
    pub fn start_again(&self) -> Result<()> {
        let node = self.private()?;
        ensure!(!node.is_running(), "the broker is running already");
        node.start_again()?;
        self.await_start()
    }

    /// Stops it gracefully and starts it again.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    /// Its log so far; empty if the broker isn't private.
    pub fn log(&self) -> String {
        let log = self.node.as_ref().map(|node| node.log());
        log.unwrap_or_default()
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// The tests' connection to it.
    pub fn client(&self) -> &Client {
        self.client.get_or_init(|| Client::new(&self.url()))
    }

    /// Declares a durable classic queue for a test; see [`Client::queue`].
    pub fn queue(&self, name: &str) -> Queue {
        self.client().queue(name)
    }

    /// Declares a queue with a type and arguments.
    pub fn declare(&self, name: &str) -> QueueBuilder {
        self.client().declare(name)
    }
}

/// The characters to encode: all except those that are allowed in every part of a URL.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

fn percent_encode(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, ENCODED)
}
