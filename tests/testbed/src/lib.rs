//! What qconsume's tests, demo, soak and benchmark stand on.
//!
//! - [`Broker`] finds or starts a RabbitMQ; private ones can be stopped, killed, frozen and clustered.
//! - [`Client`] and [`Queue`] are the test's own side of AMQP.
//! - [`Proxy`] stands between a worker and its broker and misbehaves on demand.
//! - [`peer::Peer`] is a broker that answers by a script.
//! - [`Program`] runs the binary under test and never hangs.
//! - [`tokens::Issuer`] makes OAuth 2 tokens, and a broker trust them.
//! - [`Container`] runs it as a container's first process.
//! - [`soak`] puts all of it together, at random, and keeps the books.
//! - [`mod@bench`] compares qconsume with what it replaces.
//! - [`FullBacklog`] is an address that swallows packets.
//! - [`Network`] is a network namespace of a test's own.
//!
//! Everything blocks, so a test is a plain function; what is asynchronous inside runs on one thread of the testbed's own.
//! What gives no `Result` panics where it fails, or where what it waits for doesn't come within its limit.
//! Nothing outlives the process that started it, not even when that process is killed: see [`owner`].

#![forbid(unsafe_code)]

mod backlog;
pub mod bench;
mod broker;
pub mod certificates;
mod client;
mod exec;
mod network;
pub mod owner;
pub mod peer;
mod ports;
mod program;
mod proxy;
mod runtime;
pub mod soak;
pub mod tokens;

pub use backlog::FullBacklog;
pub use broker::{Broker, BrokerOptions, Container, docker, docker_works, image_present};
pub use client::{Client, Consumer, Got, Queue, QueueBuilder, QueueKind};
pub use lapin::{self, BasicProperties, types};
pub use network::Network;
pub use nix::sys::signal::Signal;

pub use ports::{Port, reserve_port};
pub use program::{Finished, Program, Running};
pub use proxy::{Action, Direction, Method, Proxy, frames};
pub use rcgen;
pub use runtime::block_on;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a test waits for something that should take milliseconds. Generous, because two cores may be starting
/// several brokers at the same time; it is only ever reached by a failing test.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Reports that a test's optional ingredient (Docker, an image, root, tini) is absent; the test should then return.
pub fn missing(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "this needs {what}, and with CI=true nothing may be skipped");
    skipped(&format!("needs {what}"));
}

/// Reports that this version of the broker lacks what a test is about; the test should then return. Unlike with
/// [`missing`], that is no gap in a pipeline, which has the other versions, too.
pub fn version_lacks(what: &str) {
    skipped(&format!("this version of the broker lacks {what}"));
}

/// Whether the programs under test run in an emulator (`tests/arm64`); then it reports that the emulator lacks what a test is
/// about, and the test should return.
pub fn emulator_lacks(what: &str) -> bool {
    let emulator = std::env::var("QCONSUME_TEST_EMULATOR").unwrap_or_default();
    if !emulator.is_empty() {
        skipped(&format!("{emulator} lacks {what}"));
    }
    !emulator.is_empty()
}

fn skipped(why: &str) {
    let thread = std::thread::current();
    eprintln!("{} skipped: {why}", thread.name().unwrap_or("test"));
}

/// Polls `condition` until it holds or `deadline` has passed; says whether it held.
pub fn eventually(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A program that cargo has put where this one is.
fn beside_this_program(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("this program has a path");
    this.with_file_name(name)
}
