//! A private node of this machine's `rabbitmq-server`.

use super::settings::Settings;
use super::{CTL_LIMIT, Node};
use crate::owner::{self, find_in_path};
use crate::{eventually, exec};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// The folder of the scripts that Debian's wrappers in /usr/sbin call. The wrappers switch to a fixed user and, for
/// `rabbitmqctl`, a fixed home; the scripts don't.
const DEBIAN_SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

/// epmd starts within milliseconds on an idle machine.
const EPMD_LIMIT: Duration = Duration::from_secs(120);

/// An orderly stop takes two to five seconds.
const STOP_LIMIT: Duration = Duration::from_secs(240);

/// RabbitMQ's own scripts on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    scripts: PathBuf,
    epmd: PathBuf,
}

impl Installation {
    /// This machine's `rabbitmq-server`, if there is one.
    pub(crate) fn find() -> Option<Self> {
        let debian = Path::new(DEBIAN_SCRIPTS);
        let scripts = if debian.join("rabbitmq-server").exists() {
            debian.to_owned()
        } else {
            let server = fs::canonicalize(find_in_path("rabbitmq-server")?).ok()?;
            server.parent()?.to_owned()
        };
        if !scripts.join("rabbitmqctl").exists() {
            return None;
        }
        Some(Self { scripts, epmd: find_in_path("epmd")? })
    }

    pub(super) fn start_epmd(&self, port: u16) -> Result<LocalEpmd> {
        // Without -daemon it stays in the foreground, as our child.
        let child = owner::command(&self.epmd)
            .args(["-address", "127.0.0.1", "-port", &port.to_string()])
            .spawn()
            .context("cannot run epmd, Erlang's port mapper")?;
        let epmd = LocalEpmd(child);
        let answers = || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
        ensure!(eventually(EPMD_LIMIT, answers), "epmd doesn't answer on port {port}");
        Ok(epmd)
    }
}

pub(super) struct LocalEpmd(Child);

impl Drop for LocalEpmd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node as a child process.
pub(super) struct LocalNode {
    installation: Installation,
    settings: Settings,
    /// Its home, with cookie, configuration, data and log.
    folder: PathBuf,
    /// The emulator itself, as every script on the way to it uses `exec`. `None` while the node is down.
    child: Mutex<Option<Child>>,
}

impl LocalNode {
    pub(super) fn launch(installation: &Installation, settings: Settings) -> Result<Self> {
        let folder = owner::temp_folder("node");
        settings.write_files(&folder, &folder.display().to_string())?;
        let node = Self { installation: installation.clone(), settings, folder, child: Mutex::new(None) };
        node.start_again()?;
        Ok(node)
    }

    /// One of RabbitMQ's scripts, with this node's environment.
    fn command(&self, script: &str) -> Command {
        let mut command = owner::command(self.installation.scripts.join(script));
        command.envs(self.settings.environment(&self.folder.display().to_string())).current_dir(&self.folder);
        command
    }
}

impl Node for LocalNode {
    fn folder(&self) -> PathBuf {
        self.folder.clone()
    }

    fn is_running(&self) -> bool {
        let mut child = self.child.lock();
        child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn log(&self) -> String {
        let bytes = fs::read(self.folder.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command("rabbitmqctl");
        exec::run(command.arg("-q").args(args), CTL_LIMIT)
    }

    fn start_again(&self) -> Result<()> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))
            .context("cannot open a node's log")?;
        let mut command = self.command("rabbitmq-server");
        command
            // With this the script executes the emulator, which then gets our signals, instead of starting a child.
            .env("RABBITMQ_ALLOW_INPUT", "true")
            .env("RABBITMQ_SERVER_START_ARGS", "-noinput +B i")
            .stdout(log.try_clone()?)
            .stderr(log);
        *self.child.lock() = Some(command.spawn().context("cannot run rabbitmq-server")?);
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        let Some(mut child) = self.child.lock().take() else {
            return Ok(());
        };
        signal(&child, Signal::SIGTERM)?;
        if !eventually(STOP_LIMIT, || !matches!(child.try_wait(), Ok(None))) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("a private RabbitMQ hadn't stopped after {STOP_LIMIT:?}");
        }
        Ok(())
    }

    fn kill(&self) -> Result<()> {
        if let Some(mut child) = self.child.lock().take() {
            child.kill().context("cannot kill a private RabbitMQ")?;
            child.wait()?;
        }
        Ok(())
    }

    fn signal(&self, wanted: Signal) -> Result<()> {
        signal(self.child.lock().as_ref().context("the node isn't running")?, wanted)
    }
}

impl Drop for LocalNode {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    // The child isn't reaped yet, so no other process can have its pid.
    kill(Pid::from_raw(child.id().cast_signed()), signal)
        .with_context(|| format!("cannot send {signal} to a private RabbitMQ"))
}
