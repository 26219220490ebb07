//! A private node of the `rabbitmq-server` on this machine.

use super::{CTL_LIMIT, Node, Settings};
use crate::owner::{self, find_in_path, is_root};
use crate::{eventually, exec};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where Debian keeps the scripts that its wrappers in /usr/sbin run. The wrappers insist on one user and, for `rabbitmqctl`,
/// one home; the scripts take both as they are.
const DEBIAN_SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

/// It takes milliseconds on an idle machine.
const EPMD_LIMIT: Duration = Duration::from_secs(20);

/// An orderly stop takes two to five seconds.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// RabbitMQ's own scripts on this machine, and the user to run them as.
#[derive(Clone, Debug)]
pub(crate) struct Installation {
    scripts: PathBuf,
    epmd: PathBuf,
    /// Root's nodes run as the user `rabbitmq`, where there is one.
    user: Option<(u32, u32)>,
}

impl Installation {
    /// The `rabbitmq-server` of this machine, if there is one.
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
        Some(Self {
            scripts,
            epmd: find_in_path("epmd")?,
            user: is_root().then(rabbitmq_user).flatten(),
        })
    }

    pub(super) fn start_epmd(&self, port: u16) -> Result<LocalEpmd> {
        // Without -daemon it stays in the foreground, our child.
        let child = owner::command(&self.epmd)
            .args(["-address", "127.0.0.1", "-port", &port.to_string()])
            .spawn()
            .context("cannot run epmd, Erlang's port mapper")?;
        let mut epmd = LocalEpmd(child);
        let answers = || {
            let answer = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
            answer.is_ok() || !matches!(epmd.0.try_wait(), Ok(None))
        };
        let answers = eventually(EPMD_LIMIT, answers);
        if let Some(status) = epmd.0.try_wait()? {
            bail!("epmd on port {port} ended at once ({status}): address already in use?");
        }
        ensure!(answers, "epmd doesn't answer on port {port}");
        Ok(epmd)
    }

    fn chown(&self, path: &Path) -> Result<()> {
        if let Some((uid, gid)) = self.user {
            chown(path, Some(uid), Some(gid))
                .with_context(|| format!("cannot give {} to user rabbitmq", path.display()))?;
        }
        Ok(())
    }
}

/// The user `rabbitmq` from the passwd file itself: a static program had better not ask the name service switch.
fn rabbitmq_user() -> Option<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let mut fields = users
        .lines()
        .find(|line| line.starts_with("rabbitmq:"))?
        .split(':')
        .skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// A port mapper in the foreground.
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
    /// Its home: cookie, configuration, data and log.
    folder: PathBuf,
    /// The emulator itself: every script on the way to it uses `exec`. None while it is down.
    child: Mutex<Option<Child>>,
}

impl LocalNode {
    pub(super) fn launch(installation: &Installation, settings: Settings) -> Result<Self> {
        let folder = owner::temp_folder("node");
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            installation.chown(&path)?;
            Ok(path)
        };
        let cookie = write(".erlang.cookie", &settings.group.cookie)?;
        // Erlang refuses a cookie that others may read.
        fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        let config = settings
            .config
            .replace("$folder", &folder.display().to_string());
        write("rabbitmq.conf", &config)?;
        for (name, content) in &settings.files {
            write(name, content)?;
        }
        write("enabled_plugins", &settings.plugins)?;
        // Instead of the one in /etc, which belongs to the machine's own broker.
        write("rabbitmq-env.conf", "")?;
        write("log", "")?;
        installation.chown(&folder)?;
        let node = Self {
            installation: installation.clone(),
            settings,
            folder,
            child: Mutex::new(None),
        };
        node.start_again()?;
        Ok(node)
    }

    /// One of RabbitMQ's scripts as this node's user and in its environment.
    fn command(&self, script: &str) -> Command {
        let path = |name: &str| self.folder.join(name);
        let mut command = owner::command(self.installation.scripts.join(script));
        command
            .env("HOME", &self.folder)
            .env("RABBITMQ_MNESIA_BASE", path("data"))
            .env("RABBITMQ_LOG_BASE", path("logs"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", path("rabbitmq-env.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins"))
            .env("RABBITMQ_FEATURE_FLAGS_FILE", path("feature_flags"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", path("generated"))
            .env("RABBITMQ_PID_FILE", path("pid"))
            .envs(self.settings.identity())
            .current_dir(&self.folder);
        if let Some((uid, gid)) = self.installation.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node for LocalNode {
    fn folder(&self) -> PathBuf {
        self.folder.clone()
    }

    fn is_running(&self) -> bool {
        let mut child = self.child();
        child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
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
            .append(true)
            .open(self.folder.join("log"))
            .context("cannot open a node's log")?;
        let mut command = self.command("rabbitmq-server");
        command
            // "Allow input" makes the script replace itself with the emulator instead of watching over it in a shell, so that a
            // signal to our child is a signal to the emulator; -noinput then takes the input away again.
            .env("RABBITMQ_ALLOW_INPUT", "true")
            .env("RABBITMQ_SERVER_START_ARGS", "-noinput +B i")
            .stdout(log.try_clone()?)
            .stderr(log);
        *self.child() = Some(command.spawn().context("cannot run rabbitmq-server")?);
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        let Some(mut child) = self.child().take() else {
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
        if let Some(mut child) = self.child().take() {
            child.kill().context("cannot kill a private RabbitMQ")?;
            child.wait()?;
        }
        Ok(())
    }

    fn signal(&self, wanted: Signal) -> Result<()> {
        signal(self.child().as_ref().context("it isn't running")?, wanted)
    }
}

impl Drop for LocalNode {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    // Not reaped yet, so the pid can't be another's.
    kill(Pid::from_raw(child.id().cast_signed()), signal)
        .with_context(|| format!("cannot send {signal} to a private RabbitMQ"))
}
