//! A loopback address that drops packets; needs no root.

use crate::runtime;
use anyhow::{Result, bail};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// If a connection attempt isn't answered within this time, the backlog is full: on loopback an answer takes
/// microseconds, and the kernel repeats a dropped SYN only after a second.
const UNANSWERED: Duration = Duration::from_millis(300);

/// A listener that never accepts and whose backlog is full: the kernel drops every further SYN, as a firewall would.
pub struct FullBacklog {
    listener: TcpListener,
    filling: Vec<TcpStream>,
}

impl FullBacklog {
    /// Listens on a free port and fills the backlog.
    pub fn start() -> Self {
        Self::at(([127, 0, 0, 1], 0).into())
    }

    /// Listens on this address and fills the backlog.
    pub fn at(address: SocketAddr) -> Self {
        runtime::block_on(Self::fill(address)).unwrap_or_else(|error| panic!("{error:#}"))
    }

    async fn fill(address: SocketAddr) -> Result<Self> {
        let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
        socket.bind(address)?;
        let mut full = Self { listener: socket.listen(1)?, filling: Vec::new() };
        while full.filling.len() < 16 {
            match tokio::time::timeout(UNANSWERED, TcpStream::connect(full.addr())).await {
                Ok(stream) => full.filling.push(stream?),
                Err(_) => return Ok(full),
            }
        }
        bail!("a backlog of one isn't full after 16 connections")
    }

    /// Its address.
    pub fn addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("the listener has an address")
    }

    /// Its address for `BROKER_URL`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}", self.addr())
    }
}
