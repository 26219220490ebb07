//! The basis of qconsume's tests, demo, soak and benchmark.
//!
//! - [`Broker`] finds or starts a RabbitMQ; private ones can be stopped, killed, frozen and clustered.
//! - [`Client`] and [`Queue`] are the tests' AMQP client.
//! - [`Proxy`] is a proxy between a worker and its broker that can cause faults.
//! - [`peer::Peer`] is a broker that answers as a script says.
//! - [`Program`] runs the binary under test and never hangs.
//! - [`tokens::Issuer`] creates OAuth 2 tokens, and makes a broker trust them.
//! - [`Container`] runs a program as a container's first process.
//! - [`soak`] runs many workers with random faults, and checks what happened to each message.
//! - [`mod@bench`] compares qconsume with amqp-consume.
//! - [`FullBacklog`] is an address that drops packets.
//! - [`Network`] is a network namespace for a test.
//!
//! All functions block, so a test is a plain function; asynchronous code runs on one thread of the testbed.
//! A function that doesn't return a `Result` panics on an error, or if what it waits for doesn't happen in time.
//! Nothing outlives the process that started it, even if that process is killed: see [`owner`].

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

/// How long a test waits for something that should take milliseconds. It is generous, as the machine may be starting
/// several brokers at the same time; only failing tests take that long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Reports that a test's prerequisite (Docker, an image, root, tini) is missing; the test should then return. With
/// `CI=true`, panics instead.
pub fn missing(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "this test needs {what}; with CI=true none may be skipped");
    skipped(&format!("needs {what}"));
}

/// Reports that this version of the broker lacks what a test is about; the test should then return. Doesn't panic with
/// `CI=true`, unlike [`missing`], as CI also tests other versions.
pub fn version_lacks(what: &str) {
    skipped(&format!("this version of the broker lacks {what}"));
}

/// Whether the programs under test run in an emulator (`tests/arm64`). If so, reports that it lacks what a test is
/// about; the test should then return.
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

/// Polls `condition` until it holds or `deadline` has passed; returns whether it held.
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

/// The path of a program in the same folder as this one.
fn beside_this_program(name: &str) -> PathBuf {
    let this = std::env::current_exe().expect("this program has a path");
    this.with_file_name(name)
}
