//! A network for a test, with only loopback and the test's own names.

use crate::owner::{find_in_path, temp_folder};
use crate::{PATIENCE, exec, runtime};
use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns, unshare};
use std::ffi::OsString;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

/// A network namespace with only loopback: every address of 127.0.0.0/8 and every port is free, and no packet leaves
/// it. It is gone when this is dropped and all processes in it have ended.
pub struct Network {
    namespace: File,
    hosts: PathBuf,
}

impl Network {
    /// Creates a network.
    ///
    /// # Errors
    /// If root, the right to create network namespaces, `ip` (iproute2), `nsenter` or `unshare` is missing.
    pub fn new() -> Result<Self> {
        for tool in ["nsenter", "unshare"] {
            find_in_path(tool).with_context(|| format!("{tool} isn't installed"))?;
        }
        let ip = find_in_path("ip").context("ip isn't installed")?;
        // Start these here: if the thread below used them first, the watchdog and the runtime would be in the
        // namespace.
        let hosts = temp_folder("network").join("hosts");
        runtime::handle();
        let namespace = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot create a network namespace")?;
            exec::run(Command::new(ip).args(["link", "set", "lo", "up"]), PATIENCE)?;
            File::open("/proc/thread-self/ns/net").context("cannot open the network namespace")
        });
        let namespace = namespace.join().expect("the thread doesn't panic")?;
        Ok(Self { namespace, hosts })
    }

    /// Runs something in this network. Sockets that it opens belong to this network for ever, but the process may pass
    /// their data on to the outside: so a [`crate::Proxy`] leads from this network to a broker.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter = || setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("the right to enter the namespace");
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Makes this the only name, with these addresses, for programs that are started afterwards.
    pub fn name(&self, name: &str, addresses: &[IpAddr]) {
        let lines: String = addresses.iter().map(|address| format!("{address} {name}\n")).collect();
        fs::write(&self.hosts, lines).expect("a file for the names");
    }

    /// A prefix for [`crate::Program::through`] that runs a program in this network, with its names.
    pub fn prefix(&self) -> Vec<OsString> {
        let namespace = format!("--net=/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        let mount = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        let words = ["nsenter", &namespace, "unshare", "--mount", "sh", "-c", mount];
        words.into_iter().map(OsString::from).chain([self.hosts.clone().into()]).collect()
    }
}
