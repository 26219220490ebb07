//! Finds or starts a RabbitMQ: one piece of code for tests, demo, soak and benchmark.
//!
//! In this order: `BROKER_URL`; containers of the image in `QCONSUME_TEST_RABBITMQ`; a private node of the `rabbitmq-server`
//! on this machine; a container of [`DEFAULT_IMAGE`]; Debian's package, installed as root; else one clear line.
//! A private node has its own port, name, cookie, epmd and data, listens on loopback only, and is gone afterwards. The
//! broker that may run on 5672 is never touched.

mod cluster;
mod container;
mod install;
mod local;
mod probe;

pub(crate) use cluster::{Cluster, ClusterNode};
pub use container::{Container, docker, docker_works, image_present};

use crate::client::{Client, Queue, QueueBuilder};
use crate::ports::{Port, reserve_port};
use crate::{PATIENCE, Signal, eventually};
use anyhow::{Context, Result, bail, ensure};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Names the image of the containers to test with, for example `rabbitmq:4.3-management`.
pub const IMAGE_VARIABLE: &str = "QCONSUME_TEST_RABBITMQ";

/// The image when there is neither a `rabbitmq-server` on this machine nor an image asked for.
pub const DEFAULT_IMAGE: &str = "rabbitmq:4-management";

/// A node needs 5 to 12 seconds on two idle cores; with several at a time and much else to do it was over 90.
const START_LIMIT: Duration = Duration::from_secs(240);

/// `rabbitmqctl` needs one to two seconds, more while nodes are starting.
const CTL_LIMIT: Duration = Duration::from_secs(60);

/// Where the command line tools listen; RabbitMQ's default is a range of eleven, too few for tests side by side.
const CLI_PORTS: (u16, u16) = (7000, 9999);

/// One scheduler of each kind is enough for tests, starts faster and leaves the cores to the workers.
const ERL_ARGS: (&str, &str) = (
    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
    "+S 1:1 +SDcpu 1:1 +SDio 2 +sbwt none",
);

/// Has a node write down that it has its quorum queues. By itself it does so only when it was left alone for half a second
/// (a "dets" table's auto-save). Killed sooner, 3.10.8 has the queue without a leader for ever after, and 4.3.6 makes it
/// anew: empty, whatever it had confirmed.
const WRITE_DOWN: &str = "[ok = dets:sync(Table) || Table <- dets:all()].";

/// A broker to test with. Private ones are removed, data and all, when dropped.
pub struct Broker {
    user: String,
    password: String,
    vhost: Option<String>,
    addr: SocketAddr,
    version: OnceLock<(u32, u32, u32)>,
    client: OnceLock<Client>,
    /// None: someone else's broker, named by `BROKER_URL`.
    node: Option<Box<dyn Node>>,
}

/// A private node: a process of this machine, or in a container.
trait Node: Send + Sync {
    /// Where its files are, as it sees them itself.
    fn folder(&self) -> PathBuf;
    fn is_running(&self) -> bool;
    fn log(&self) -> String;
    fn ctl(&self, args: &[&str]) -> Result<String>;
    fn start_again(&self) -> Result<()>;
    fn stop(&self) -> Result<()>;
    fn kill(&self) -> Result<()>;
    /// To the emulator, not to the script around it.
    fn signal(&self, signal: Signal) -> Result<()>;
}

/// Where private nodes come from.
#[derive(Clone)]
pub(crate) enum Source {
    Local(local::Installation),
    Image(String),
}

/// What every node of a cluster has in common (a single node is a cluster of one).
pub(crate) struct Group {
    cookie: String,
    epmd_port: Port,
    /// A port mapper of our own, so that no daemon is left running that a node has started on the way; gone when dropped.
    /// None inside a lone container, which runs its own.
    _epmd: Option<Box<dyn Send + Sync>>,
}

/// One node's identity and settings, the same for a process and a container.
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) port: Port,
    pub(crate) dist_port: Port,
    pub(crate) config: String,
    pub(crate) plugins: String,
    pub(crate) files: Vec<(String, String)>,
    pub(crate) group: Arc<Group>,
}

/// What a private node shall be like.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct BrokerOptions {
    config: String,
    plugins: Vec<String>,
    image: Option<String>,
    files: Vec<(String, String)>,
}

impl BrokerOptions {
    /// Adds lines to the node's rabbitmq.conf.
    pub fn config(mut self, lines: &str) -> Self {
        self.config.push_str(lines);
        self.config.push('\n');
        self
    }

    /// Enables a plugin, such as `rabbitmq_management`; none are unless asked for, because they slow the start down.
    pub fn plugin(mut self, name: &str) -> Self {
        self.plugins.push(name.to_owned());
        self
    }

    /// Puts a file into the node's folder, which the configuration calls `$folder`:
    /// `.config("ssl_options.certfile = $folder/cert.pem").file("cert.pem", &pem)`.
    pub fn file(mut self, name: &str, content: &str) -> Self {
        self.files.push((name.to_owned(), content.to_owned()));
        self
    }

    /// Asks for containers of this image, whatever else is there.
    pub fn image(mut self, image: &str) -> Self {
        self.image = Some(image.to_owned());
        self
    }

    /// Starts a private node and waits until it answers.
    pub fn start(&self) -> Result<Broker> {
        Ok(self.cluster(1)?.remove(0))
    }

    /// Starts private nodes that form one cluster, and waits until they do.
    pub fn cluster(&self, size: usize) -> Result<Vec<Broker>> {
        let source = self.source()?;
        let group = Group::start(&source, size > 1)?;
        let settings = (0..size).map(|_| self.settings(&group));
        let mut settings = settings.collect::<Result<Vec<_>>>()?;
        let mut peers = String::from("cluster_formation.peer_discovery_backend = classic_config\n");
        for (index, node) in settings.iter().enumerate() {
            peers += &format!(
                "cluster_formation.classic_config.nodes.{} = {}\n",
                index + 1,
                node.name
            );
        }
        if size > 1 {
            for node in &mut settings {
                node.config.push_str(&peers);
            }
        }
        let brokers = settings.into_iter();
        let brokers = brokers.map(|node| Broker::launch(&source, node));
        let brokers = brokers.collect::<Result<Vec<_>>>()?;
        for broker in &brokers {
            broker.await_start()?;
        }
        if size > 1 {
            for broker in &brokers {
                broker.await_cluster(size)?;
            }
        }
        Ok(brokers)
    }

    fn source(&self) -> Result<Source> {
        match &self.image {
            Some(image) => install::image(image),
            None => install::find(),
        }
    }

    fn settings(&self, group: &Arc<Group>) -> Result<Settings> {
        let port = reserve_port()?;
        let dist_port = reserve_port()?;
        let name = format!("qc{:08x}@localhost", fastrand::u32(..));
        let mut config = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\n\
             # A worker in a network namespace of the tests' own reaches us through a proxy, so from loopback too; a container's\n\
             # image may say otherwise, and then this makes the versions alike.\n\
             loopback_users = none\n\
             log.console = true\n\
             log.console.level = info\n\
             log.file = false\n\
             disk_free_limit.absolute = 50MB\n",
            port.number()
        );
        config.push_str(&self.config);
        Ok(Settings {
            name,
            port,
            dist_port,
            config,
            plugins: format!("[{}].\n", self.plugins.join(",")),
            files: self.files.clone(),
            group: group.clone(),
        })
    }
}

impl Group {
    fn start(source: &Source, several: bool) -> Result<Arc<Self>> {
        let epmd_port = reserve_port()?;
        let port = epmd_port.number();
        let epmd: Option<Box<dyn Send + Sync>> = match source {
            Source::Local(installation) => Some(Box::new(installation.start_epmd(port)?)),
            Source::Image(image) if several => Some(Box::new(container::start_epmd(image, port)?)),
            Source::Image(_) => None,
        };
        Ok(Arc::new(Self {
            cookie: format!("{:016x}", fastrand::u64(..)),
            epmd_port,
            _epmd: epmd,
        }))
    }
}

impl Settings {
    /// Writes the node's files into a folder that the node itself knows as `home`.
    fn write_files(&self, folder: &Path, home: &str) -> Result<()> {
        let config = self.config.replace("$folder", home);
        write_files(folder, &self.group.cookie, &config, &self.plugins)?;
        for (name, content) in &self.files {
            write_file(folder, name, content)?;
        }
        Ok(())
    }

    /// What tells this node apart from every other, and keeps it in its folder.
    fn environment(&self, home: &str) -> Vec<(&'static str, String)> {
        let loopback = "-kernel inet_dist_use_interface {127,0,0,1}";
        let mut environment = in_folder(home);
        environment.extend([
            ("ERL_EPMD_PORT", self.group.epmd_port.number().to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".into()),
            ("RABBITMQ_NODENAME", self.name.clone()),
            ("RABBITMQ_DIST_PORT", self.dist_port.number().to_string()),
            ("RABBITMQ_CTL_DIST_PORT_MIN", CLI_PORTS.0.to_string()),
            ("RABBITMQ_CTL_DIST_PORT_MAX", CLI_PORTS.1.to_string()),
            ("RABBITMQ_CTL_ERL_ARGS", loopback.into()),
            (ERL_ARGS.0, format!("{loopback} {}", ERL_ARGS.1)),
        ]);
        environment
    }
}

/// Writes what every node has into its folder.
fn write_files(folder: &Path, cookie: &str, config: &str, plugins: &str) -> Result<()> {
    write_file(folder, ".erlang.cookie", cookie)?;
    // Erlang refuses a cookie that others may read.
    let private = fs::Permissions::from_mode(0o400);
    fs::set_permissions(folder.join(".erlang.cookie"), private)?;
    write_file(folder, "rabbitmq.conf", config)?;
    write_file(folder, "enabled_plugins", plugins)?;
    // Instead of the one in /etc, which belongs to the machine's own broker.
    write_file(folder, "rabbitmq-env.conf", "")
}

fn write_file(folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// What keeps a node in its folder.
fn in_folder(home: &str) -> Vec<(&'static str, String)> {
    let path = |name: &str| format!("{home}/{name}");
    vec![
        ("HOME", home.into()),
        ("LANG", "C.UTF-8".into()),
        ("LC_ALL", "C.UTF-8".into()),
        ("ERL_CRASH_DUMP_BYTES", "0".into()),
        ("RABBITMQ_MNESIA_BASE", path("data")),
        ("RABBITMQ_LOG_BASE", path("logs")),
        ("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf")),
        // An image's own drop-in files would apply beside ours.
        ("RABBITMQ_CONFIG_FILES", path("conf.d")),
        ("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config")),
        ("RABBITMQ_CONF_ENV_FILE", path("rabbitmq-env.conf")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins")),
        ("RABBITMQ_FEATURE_FLAGS_FILE", path("feature_flags")),
        ("RABBITMQ_GENERATED_CONFIG_DIR", path("generated")),
        ("RABBITMQ_PID_FILE", path("pid")),
    ]
}

impl Broker {
    /// The broker that all tests of this process share, started with the first call. Don't break it: a test that stops
    /// or freezes a broker starts its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Broker> = OnceLock::new();
        SHARED.get_or_init(|| Self::find().unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// The broker at `BROKER_URL` if that is set, else a new private node.
    pub fn find() -> Result<Self> {
        match std::env::var("BROKER_URL") {
            Ok(url) if !url.is_empty() => Self::external(&url),
            _ => Self::options().start(),
        }
    }

    /// A private node of this test's own, to be stopped, killed or frozen.
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// A private node with more lines in its rabbitmq.conf, such as
    /// `"consumer_timeout = 2000\nchannel_tick_interval = 1000\n"`.
    pub fn with_config(lines: &str) -> Self {
        Self::options()
            .config(lines)
            .start()
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// Private nodes that form one cluster.
    pub fn cluster(size: usize) -> Vec<Self> {
        Self::options()
            .cluster(size)
            .unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// For a private node with more than a few lines of configuration.
    pub fn options() -> BrokerOptions {
        BrokerOptions::default()
    }

    fn external(url: &str) -> Result<Self> {
        let uri: lapin::uri::AMQPUri = url
            .parse()
            // Without the URL: it has a password in it.
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
        let node: Box<dyn Node> = match source {
            Source::Local(local) => Box::new(local::LocalNode::launch(local, settings)?),
            Source::Image(image) => Box::new(container::ContainerNode::launch(image, settings)?),
        };
        Ok(Self {
            user: "guest".into(),
            password: "guest".into(),
            vhost: None,
            addr,
            version: OnceLock::new(),
            client: OnceLock::new(),
            node: Some(node),
        })
    }

    /// Waits until the node greets a client. Its listeners are the last thing it starts.
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
            "a private RabbitMQ on port {} ended while starting, or hadn't started after {START_LIMIT:?}; its log ends with\n{}",
            self.port(),
            self.log_tail()
        )
    }

    fn await_cluster(&self, size: usize) -> Result<()> {
        // Visible nodes only: the asking tool is a hidden one.
        let all = format!("length(nodes()) == {}.", size - 1);
        let joined = || {
            self.ctl(&["eval", &all])
                .is_ok_and(|answer| answer.trim() == "true")
        };
        ensure!(
            eventually(START_LIMIT, joined),
            "{size} nodes hadn't formed a cluster after {START_LIMIT:?}; the log ends with\n{}",
            self.log_tail()
        );
        Ok(())
    }

    fn private(&self) -> Result<&dyn Node> {
        self.node.as_deref().context(
            "the broker at BROKER_URL is not the tests' to control; start a private one with Broker::start()",
        )
    }

    /// Whether the testbed started this broker, and so may stop it and use [`Broker::ctl`].
    pub fn is_private(&self) -> bool {
        self.node.is_some()
    }

    /// The address for `BROKER_URL`, with the credentials of an administrator.
    pub fn url(&self) -> String {
        self.url_at(self.addr)
    }

    /// The same credentials and virtual host at another address: a proxy's, for example.
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

    /// The address for another user and virtual host.
    pub fn url_for(&self, user: &str, password: &str, vhost: &str) -> String {
        format!(
            "amqp://{}:{}@{}/{}",
            percent_encode(user),
            percent_encode(password),
            self.addr,
            percent_encode(vhost)
        )
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
        // Set by the handshake that found the broker ready, before anyone gets hold of it.
        self.version.get().copied().unwrap_or_default()
    }

    /// The folder with its files ([`BrokerOptions::file`]), as the node itself sees it.
    pub fn folder(&self) -> Option<PathBuf> {
        Some(self.node.as_ref()?.folder())
    }

    /// Runs `rabbitmqctl` on it: `ctl(&["add_vhost", "other"])`. Gives what it printed.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let node = self.private()?;
        let end = Instant::now() + PATIENCE;
        loop {
            match node.ctl(args) {
                // Its port is open a moment before it has started altogether.
                Err(error)
                    if format!("{error:#}").contains("requires the 'rabbit' app to be running")
                        && Instant::now() < end => {}
                done => return done,
            }
        }
    }

    /// Shuts it down in an orderly way and waits until it has ended.
    pub fn stop(&self) -> Result<()> {
        self.private()?.stop()
    }

    /// Kills it with SIGKILL, as a crash or a power failure would.
    ///
    /// A quorum queue that [`Broker::client`] has declared is written down before.
    pub fn kill(&self) -> Result<()> {
        if self.client.get().is_some_and(Client::take_quorum_declared) {
            self.ctl(&["eval", WRITE_DOWN])?;
        }
        self.private()?.kill()
    }

    /// Stops its processes with SIGSTOP: its connections stay open, and nothing is answered.
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

    /// Stops it in an orderly way and starts it again.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    /// The last lines of its log, which say why it didn't start.
    pub fn log_tail(&self) -> String {
        let log = self.node.as_ref().map(|node| node.log());
        let log = log.unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// The tests' own connection to it.
    pub fn client(&self) -> &Client {
        self.client.get_or_init(|| Client::new(&self.url()))
    }

    /// Declares a durable classic queue of its own for a test; see [`Client::declare`] for more.
    pub fn queue(&self, name: &str) -> Queue {
        self.client().queue(name)
    }

    /// Declares a queue with a type and arguments.
    pub fn declare(&self, name: &str) -> QueueBuilder {
        self.client().declare(name)
    }
}

/// What is plainly allowed in every part of a URL needs no encoding.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

fn percent_encode(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, ENCODED)
}
