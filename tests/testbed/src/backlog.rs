//! An address on loopback that swallows packets, without root.

use crate::runtime;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// An attempt to connect that isn't answered within this time has met a full backlog; on loopback an answer takes microseconds,
/// and the kernel repeats a dropped SYN only after a second.
const UNANSWERED: Duration = Duration::from_millis(300);

/// A listener that never accepts and whose backlog is full: the kernel drops every further SYN, as a firewall would.
pub struct FullBacklog {
    addr: SocketAddr,
    _listener: TcpListener,
    _filling: Vec<TcpStream>,
}

impl FullBacklog {
    /// Listens and fills the backlog.
    ///
    /// # Panics
    /// When that doesn't work.
    pub fn new() -> Self {
        runtime::block_on(Self::fill()).unwrap_or_else(|error| panic!("{error:#}"))
    }

    async fn fill() -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let listener = socket.listen(1).context("cannot listen on 127.0.0.1")?;
        let addr = listener.local_addr()?;
        let mut filling = Vec::new();
        for _ in 0..16 {
            match tokio::time::timeout(UNANSWERED, TcpStream::connect(addr)).await {
                Ok(stream) => filling.push(stream?),
                Err(_) => {
                    return Ok(Self {
                        addr,
                        _listener: listener,
                        _filling: filling,
                    });
                }
            }
        }
        bail!(
            "a backlog of one still took connections after {} of them",
            filling.len()
        )
    }

    /// Its address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its address for `BROKER_URL`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.addr)
    }
}

impl Default for FullBacklog {
    fn default() -> Self {
        Self::new()
    }
}
