//! A cluster whose network can be cut.
//!
//! Each node is a container with an address of its own. To drop packets, iptables runs in the node's network namespace,
//! but from outside the container: images need no tool for it, this machine's rules don't change, and the rules
//! disappear with the container. This needs root.

use super::container::{ContainerNode, FOLDER, docker};
use super::settings::{ERL_ARGS, in_folder, write_files};
use super::{Broker, DEFAULT_IMAGE, Source, WRITE_DOWN, install};
use crate::owner::{self, docker_label, is_root};
use anyhow::{Context, Result, ensure};
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::sync::Arc;

/// RFC 2544 reserves 198.18.0.0/15 for tests of networks, so no real address is hidden.
const SUBNET: [u8; 2] = [198, 18];

/// Docker refuses a subnet that another network uses; there are 256 to choose from.
const SUBNET_ATTEMPTS: usize = 20;

/// The last number of the first node's address. Docker's bridge, from which the workers connect, has 1.
const FIRST_NODE: u8 = 11;

const AMQP: u16 = 5672;

/// RabbitMQ recommends `pause_minority` for three nodes (it has no effect with Khepri, which 4.3 always uses).
/// `net_ticktime` defaults to 60 s, with which nodes notice a silent one after 45 to 75 s. With a fifth of that, faults
/// of half a minute show what would otherwise take minutes.
const CONFIG: &str = "listeners.tcp.default = 5672\n\
    loopback_users = none\n\
    log.console = true\n\
    log.console.level = info\n\
    log.file = false\n\
    disk_free_limit.absolute = 50MB\n\
    cluster_partition_handling = pause_minority\n\
    net_ticktime = 12\n\
    cluster_formation.peer_discovery_backend = classic_config\n";

/// Nodes that form one cluster; removed when dropped.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<ClusterNode>,
    /// Declared, and so dropped, after the nodes: they have to be removed first.
    _network: Network,
}

pub(crate) struct ClusterNode {
    /// The Erlang node's name: `rabbit@node1`.
    pub(crate) name: String,
    broker: Broker,
    container: Arc<ContainerNode>,
}

impl Deref for ClusterNode {
    type Target = Broker;

    fn deref(&self) -> &Broker {
        &self.broker
    }
}

struct Network {
    name: String,
    /// The first three numbers of its addresses.
    prefix: [u8; 3],
}

impl Network {
    fn create() -> Result<Self> {
        let label = docker_label()?;
        let name = format!("{}-{:08x}", owner::id(), fastrand::u32(..));
        let mut attempts = 0;
        loop {
            attempts += 1;
            let prefix = [SUBNET[0], SUBNET[1], fastrand::u8(..)];
            let subnet = format!("{}.{}.{}.0/24", prefix[0], prefix[1], prefix[2]);
            let create = ["network", "create", "--internal", "--label", &label];
            match docker(&[&create[..], &["--subnet", &subnet, &name]].concat()) {
                Ok(_) => return Ok(Self { name, prefix }),
                Err(error) if attempts == SUBNET_ATTEMPTS => {
                    return Err(error.context("cannot create a network for a cluster"));
                }
                Err(_) => {}
            }
        }
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [one, two, three] = self.prefix;
        Ipv4Addr::new(one, two, three, last)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = docker(&["network", "rm", &self.name]);
    }
}

impl Cluster {
    /// Starts this many nodes of the image that the tests use, and waits until they form a cluster.
    pub(crate) fn start(size: u8) -> Result<Self> {
        ensure!(is_root(), "a cluster whose network can be cut needs root");
        let image = match install::find()? {
            Source::Image(image) => image,
            Source::Local(_) => DEFAULT_IMAGE.to_owned(),
        };
        install::image(&image)?;
        let network = Network::create()?;
        let cookie = format!("{:016x}", fastrand::u64(..));
        let mut config = CONFIG.to_owned();
        let mut hosts = Vec::new();
        for number in 1..=size {
            config += &format!("cluster_formation.classic_config.nodes.{number} = rabbit@node{number}\n");
            let address = network.address(FIRST_NODE + number - 1);
            // A node that is cut off can't reach Docker's name server.
            hosts.push(format!("--add-host=node{number}:{address}"));
        }
        let nodes = (1..=size).map(|number| {
            let host = format!("node{number}");
            let name = format!("rabbit@{host}");
            let address = network.address(FIRST_NODE + number - 1);
            let files = owner::temp_folder("node");
            write_files(&files, &cookie, &config, "[].\n")?;
            let ip = address.to_string();
            let mut options = vec!["--network", &network.name, "--ip", &ip, "--hostname", &host];
            options.extend(hosts.iter().map(String::as_str));
            let mut environment = in_folder(FOLDER);
            environment.push(("RABBITMQ_NODENAME", name.clone()));
            environment.push((ERL_ARGS.0, ERL_ARGS.1.to_owned()));
            let container = ContainerNode::start(&image, &options, &environment, &files)?;
            let container = Arc::new(container);
            Ok(ClusterNode { name, broker: Broker::on(container.clone(), (address, AMQP).into()), container })
        });
        let cluster = Self { nodes: nodes.collect::<Result<_>>()?, _network: network };
        for node in &cluster.nodes {
            node.await_start()?;
        }
        let version = cluster.nodes[0].version();
        ensure!(
            version >= (4, 0, 0),
            "a cluster whose network can be cut needs RabbitMQ 4.0 or newer, not {version:?}"
        );
        cluster.nodes[0].await_cluster(size.into(), &cluster.all_see_all()).with_context(|| cluster.logs())?;
        Ok(cluster)
    }

    pub(crate) fn logs(&self) -> String {
        let logs = self.nodes.iter();
        let logs = logs.map(|node| format!("the log of {} ends with\n{}", node.name, node.log_tail()));
        logs.collect::<Vec<_>>().join("\n")
    }

    /// Makes every node write down its quorum queues: see [`WRITE_DOWN`].
    pub(crate) fn write_down(&self) -> Result<()> {
        let all = "rabbit_nodes:list_members()";
        let everywhere = format!("[erpc:call(N, fun() -> {WRITE_DOWN} end) || N <- {all}]");
        self.nodes[0].eval(&everywhere)?;
        for node in &self.nodes {
            // So that no node does it again before it is killed.
            node.client().take_quorum_declared();
        }
        Ok(())
    }

    /// An Erlang expression that is true if every node sees all nodes.
    fn all_see_all(&self) -> String {
        let size = self.nodes.len();
        format!(
            "lists:duplicate({size}, {size}) == \
             [catch length(erpc:call(N, rabbit_nodes, list_running, [], 5000)) || N <- rabbit_nodes:list_members()]"
        )
    }

    /// The quorum queue's leader, if every node sees all others and the queue has a leader and all its members.
    pub(crate) fn leader_if_whole(&self, queue: &str) -> Option<Leader> {
        let question = format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
             {{Name, _}} = amqqueue:get_pid(Q), \
             Info = rabbit_quorum_queue:info(Q, [leader, online]), \
             Whole = length(proplists:get_value(online, Info)) == {} andalso {}, \
             Leader = proplists:get_value(leader, Info), \
             case Whole of \
                 true -> [Leader, maps:get(term, ra:key_metrics({{Name, Leader}}))]; \
                 false -> Info \
             end",
            self.nodes.len(),
            self.all_see_all()
        );
        // A node that was just restarted may not listen yet.
        if !self.nodes.iter().all(|node| node.greets()) {
            return None;
        }
        let answer = self.nodes[0].eval(&question).ok()?;
        let answer = answer.strip_prefix('[')?.strip_suffix(']')?;
        let (name, term) = answer.split_once(',')?;
        let node = self.nodes.iter().position(|node| node.name == name)?;
        let term = term.parse().ok()?;
        Some(Leader { node, term })
    }

    /// Gives the quorum queue another leader this many times, with a second in between.
    pub(crate) fn move_leader(&self, queue: &str, times: usize) -> Result<()> {
        // In one call, as starting the tool takes long.
        let moves = format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
             {{Name, _}} = amqqueue:get_pid(Q), \
             Once = fun() -> \
                 case ra:members({{Name, node()}}) of \
                     {{ok, Members, Leader}} -> \
                         Others = Members -- [Leader], \
                         Next = lists:nth(rand:uniform(length(Others)), Others), \
                         ra:transfer_leadership(Leader, Next) == ok; \
                     _ -> false \
                 end \
             end, \
             Move = fun Move(0, _) -> ok; \
                 Move(Left, Attempts) when Attempts > 0 -> \
                     Moved = Once(), \
                     timer:sleep(1000), \
                     Move(case Moved of true -> Left - 1; false -> Left end, Attempts - 1) \
             end, \
             Move({times}, {times} * 6)"
        );
        self.nodes[0].eval(&moves).map(drop)
    }
}

/// The leader of a quorum queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leader {
    /// The index of its node.
    pub(crate) node: usize,
    /// The term in the Raft protocol: each election begins a new one.
    pub(crate) term: u64,
}

impl ClusterNode {
    /// Puts it into maintenance mode: it closes its connections, accepts no new ones, and gives up the leadership of
    /// its queues.
    pub(crate) fn drain(&self) -> Result<()> {
        self.container.tool("rabbitmq-upgrade", &["drain"]).map(drop)
    }

    pub(crate) fn revive(&self) -> Result<()> {
        self.container.tool("rabbitmq-upgrade", &["revive"]).map(drop)
    }

    pub(crate) fn hear_nothing_from(&self, others: &[&Self]) -> Result<()> {
        self.drop_packets("INPUT", &["--source", &addresses(others)])
    }

    /// Drops all packets between it and these nodes.
    pub(crate) fn cut_off_from(&self, others: &[&Self]) -> Result<()> {
        self.hear_nothing_from(others)?;
        self.drop_packets("OUTPUT", &["--destination", &addresses(others)])
    }

    /// Drops all packets between it and its clients. Other nodes never use the port.
    pub(crate) fn cut_off_from_clients(&self) -> Result<()> {
        let port = AMQP.to_string();
        self.drop_packets("INPUT", &["--protocol", "tcp", "--dport", &port])?;
        self.drop_packets("OUTPUT", &["--protocol", "tcp", "--sport", &port])
    }

    fn drop_packets(&self, chain: &str, which: &[&str]) -> Result<()> {
        self.iptables(&[&["--append", chain], which, &["--jump", "DROP"]].concat()).map(drop)
    }

    fn iptables(&self, arguments: &[&str]) -> Result<String> {
        self.container
            .in_its_network(&[&["iptables", "--wait"], arguments].concat())
            .with_context(|| format!("iptables failed for {}", self.name))
    }

    /// Lets all packets pass again; fails if the cut has dropped none.
    pub(crate) fn heal_cut(&self) -> Result<()> {
        let rules = self.iptables(&["--list", "--numeric", "--exact", "--verbose"])?;
        let dropped = rules.lines().filter(|line| line.contains(" DROP "));
        let packets = |line: &str| line.split_whitespace().next()?.parse::<u64>().ok();
        let dropped: u64 = dropped.filter_map(packets).sum();
        ensure!(dropped > 0, "the cut has dropped no packet:\n{rules}");
        self.heal()
    }

    pub(crate) fn heal(&self) -> Result<()> {
        self.iptables(&["--flush"]).map(drop)
    }
}

/// A list of addresses for iptables.
fn addresses(nodes: &[&ClusterNode]) -> String {
    let addresses: Vec<_> = nodes.iter().map(|it| it.addr().ip().to_string()).collect();
    addresses.join(",")
}
