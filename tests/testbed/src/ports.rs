//! Reserved TCP ports, which no other node, proxy or test process uses.

use anyhow::{Context, Result, bail};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

/// The range of ports to reserve. Below it are most well-known services, RabbitMQ's 5672 and the command line tools'
/// ports (`CLI_PORTS` in broker/settings.rs); above it, from 32768 on, are Linux's ports for outgoing connections.
const PORTS: Range<u16> = 10_000..32_000;

/// A port of 127.0.0.1, reserved until this is dropped.
///
/// Binding port 0 isn't enough: a broker needs its port again after a restart, and meanwhile the kernel may give a port
/// of the ephemeral range to an outgoing connection (a client that keeps trying such a port can even connect to
/// itself). So the port is below that range, and a lock reserves it among test processes. The lock is an abstract
/// socket, which disappears with its owner.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: UnixListener,
}

impl Port {
    /// The port's number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

/// Reserves a free port of 127.0.0.1.
pub fn reserve_port() -> Result<Port> {
    Ok(listen(Ipv4Addr::LOCALHOST.into())?.0)
}

/// Reserves a free port and listens on it.
pub(crate) fn listen(ip: IpAddr) -> Result<(Port, TcpListener)> {
    for _ in 0..1000 {
        let number = fastrand::u16(PORTS);
        let Some(lock) = lock(&format!("port-{number}")) else {
            continue;
        };
        let port = Port { number, _lock: lock };
        match TcpListener::bind((ip, number)) {
            Ok(listener) => return Ok((port, listener)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context(format!("cannot listen on {ip}:{number}")),
        }
    }
    bail!("no free port of {PORTS:?} on {ip} after 1000 attempts")
}

/// A lock between test processes, or `None` if another one holds it. It is released when dropped or when the process
/// ends.
pub(crate) fn lock(name: &str) -> Option<UnixListener> {
    let name = format!("qconsume-testbed-{name}");
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()
}
