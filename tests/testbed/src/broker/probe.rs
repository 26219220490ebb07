//! Finds out whether a RabbitMQ answers, and its version.

use crate::proxy::frames::{self, Method};
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The key of the version in the server properties of connection.start: a short string, then the tag of a long string.
const VERSION_KEY: &[u8] = b"\x07versionS";

/// Sends the protocol header, and reads the version from connection.start, the broker's first frame.
pub(super) fn probe(addr: SocketAddr, limit: Duration) -> Result<(u32, u32, u32)> {
    let mut stream = TcpStream::connect_timeout(&addr, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"AMQP\x00\x00\x09\x01")?;
    let (_, method, start) = frames::read(&mut stream)?;
    ensure!(method == Method::CONNECTION_START, "its answer is {method:?}");
    parse_version(&start).context("the broker doesn't tell its version")
}

fn parse_version(start: &[u8]) -> Option<(u32, u32, u32)> {
    let key = start.windows(VERSION_KEY.len()).position(|window| window == VERSION_KEY)?;
    let rest = &start[key + VERSION_KEY.len()..];
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let text = std::str::from_utf8(rest.get(..u32::from_be_bytes(*length) as usize)?).ok()?;
    // A pre-release is, for example, 4.3.0-rc.1.
    let mut numbers = text.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
    Some((numbers.next()?, numbers.next()?, numbers.next().unwrap_or(0)))
}
