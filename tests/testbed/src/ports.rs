//! TCP ports that no other node, proxy or test process takes while we hold them.

use anyhow::{Context, Result, bail};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

/// The ports considered. Below lie most well-known services, RabbitMQ's own 5672 and the command line tools' range (see
/// `CLI_PORTS` of the broker); above, from 32768 on, Linux's range for outgoing connections.
const PORTS: Range<u16> = 10_000..32_000;

/// A port of 127.0.0.1 that is ours until this is dropped.
///
/// Binding port 0 isn't enough: a broker needs its port again after a restart, and the kernel hands ports of the ephemeral
/// range out to outgoing connections meanwhile (a client that keeps trying such a port can even end up connected to
/// itself). So the port comes from below that range, and a lock keeps other test processes off it. The lock is a
/// socket in the abstract name space, which leaves nothing behind whatever happens to its owner.
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

/// A lock between test processes, or nothing if another holds it. It is freed when dropped, or when the process ends.
pub(crate) fn lock(name: &str) -> Option<UnixListener> {
    let name = format!("qconsume-testbed-{name}");
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()
}
