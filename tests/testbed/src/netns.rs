//! A network namespace of the tests' own, whose only link can be made to swallow packets.

use crate::exec;
use crate::owner::{self, find_in_path, is_root};
use crate::ports::{lock, random};
use crate::program::Program;
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

/// `ip` answers in milliseconds.
const LIMIT: Duration = Duration::from_secs(20);

/// A link-layer address that nobody has: packets sent to it are ignored by who receives them.
const NOBODY: &str = "02:00:00:00:00:01";

/// A network namespace with one link to this machine, removed when dropped.
///
/// A program inside reaches what listens on [`Netns::host_ip`]: a [`crate::Proxy`] with a private broker behind it.
pub struct Netns {
    name: String,
    outer: String,
    inner_ip: Ipv4Addr,
    outer_ip: Ipv4Addr,
    _network: UnixListener,
}

impl Netns {
    /// Whether this process may create one; otherwise a test says [`crate::missing`].
    pub fn available() -> bool {
        is_root() && find_in_path("ip").is_some() && Self::try_new().is_ok()
    }

    /// Creates one.
    ///
    /// # Panics
    /// When that doesn't work.
    pub fn new() -> Self {
        Self::try_new().unwrap_or_else(|error| panic!("{error:#}"))
    }

    fn try_new() -> Result<Self> {
        let owner = owner::get()?;
        owner.uses_netns()?;
        let (network, third) = free_network()?;
        let suffix = format!("{:04x}", random() as u16);
        let netns = Self {
            name: format!("{}-{suffix}", owner.id),
            // At most 15 characters; the namespace's name has the owner's prefix, and the link goes with the namespace.
            outer: format!("{}{suffix}o", owner.id),
            inner_ip: Ipv4Addr::new(10, 213, third, 2),
            outer_ip: Ipv4Addr::new(10, 213, third, 1),
            _network: network,
        };
        let (name, outer) = (netns.name.as_str(), netns.outer.as_str());
        ip(&["netns", "add", name]).context("a network namespace needs root")?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&[
            "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name,
        ])?;
        ip(&[
            "address",
            "add",
            &format!("{}/30", netns.outer_ip),
            "dev",
            outer,
        ])?;
        ip(&["link", "set", outer, "up"])?;
        ip(&[
            "-n",
            name,
            "address",
            "add",
            &format!("{}/30", netns.inner_ip),
            "dev",
            "eth0",
        ])?;
        ip(&["-n", name, "link", "set", "eth0", "up"])?;
        ip(&[
            "-n",
            name,
            "route",
            "add",
            "default",
            "via",
            &netns.outer_ip.to_string(),
        ])?;
        Ok(netns)
    }

    /// The name for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This machine's address as the namespace sees it.
    pub fn host_ip(&self) -> Ipv4Addr {
        self.outer_ip
    }

    /// The namespace's own address.
    pub fn ip(&self) -> Ipv4Addr {
        self.inner_ip
    }

    /// Makes the program run inside. `ip netns exec` replaces itself with it, so signals and status are the program's.
    pub fn enter(&self, program: Program) -> Program {
        program.through(["ip", "netns", "exec", &self.name])
    }

    /// Lets every packet disappear, both ways, without anybody being told: each side is given a wrong link-layer address for the
    /// other. That needs no firewall, which many test machines lack.
    ///
    /// # Panics
    /// When that doesn't work.
    pub fn drop_packets(&self) {
        let inner = self.outer_ip.to_string();
        let outer = self.inner_ip.to_string();
        let result = ip(&[
            "-n",
            &self.name,
            "neigh",
            "replace",
            &inner,
            "lladdr",
            NOBODY,
            "nud",
            "permanent",
            "dev",
            "eth0",
        ])
        .and_then(|_| {
            ip(&[
                "neigh",
                "replace",
                &outer,
                "lladdr",
                NOBODY,
                "nud",
                "permanent",
                "dev",
                &self.outer,
            ])
        });
        result.unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Ends that.
    ///
    /// # Panics
    /// When that doesn't work.
    pub fn pass_packets(&self) {
        let result = ip(&[
            "-n",
            &self.name,
            "neigh",
            "del",
            &self.outer_ip.to_string(),
            "dev",
            "eth0",
        ])
        .and_then(|_| {
            ip(&[
                "neigh",
                "del",
                &self.inner_ip.to_string(),
                "dev",
                &self.outer,
            ])
        });
        result.unwrap_or_else(|error| panic!("{error:#}"));
    }
}

impl Default for Netns {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // A program still inside would keep the namespace, and with it the link, alive.
        let _ = ip(&["link", "delete", &self.outer]);
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

/// One of the networks 10.213.N.0/30 that no other test process uses.
fn free_network() -> Result<(UnixListener, u8)> {
    for _ in 0..1000 {
        let third = random() as u8;
        if let Some(lock) = lock(&format!("network-{third}")) {
            return Ok((lock, third));
        }
    }
    bail!("all of the tests' networks below 10.213.0.0/16 are in use")
}

fn ip(args: &[&str]) -> Result<String> {
    exec::run(Command::new("ip").args(args), LIMIT)
}
