//! A private node of the `rabbitmq-server` on this machine.

use super::{CTL_LIMIT, Node, Settings};
use crate::exec;
use crate::owner::{self, find_in_path, is_root};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Where Debian keeps the scripts that its wrappers in /usr/sbin run. The wrappers insist on one user and, for `rabbitmqctl`,
/// one home; the scripts take both as they are.
const DEBIAN_SCRIPTS: &str = "/usr/lib/rabbitmq/bin";

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
        let child = Command::new(&self.epmd)
            .args(["-address", "127.0.0.1", "-port", &port.to_string()])
            .env(owner::MARK, &owner::get()?.id)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot run epmd, Erlang's port mapper")?;
        let mut epmd = LocalEpmd { child };
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if let Some(status) = epmd.child.try_wait()? {
                bail!("epmd on port {port} ended at once ({status}): address already in use?");
            }
            if Instant::now() > end {
                bail!("epmd, Erlang's port mapper, doesn't answer on port {port}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
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
pub(crate) struct LocalEpmd {
    child: Child,
}

impl Drop for LocalEpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
        let folder = owner::get()?.create_folder("node")?;
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
    fn command(&self, script: &str) -> Result<Command> {
        let path = |name: &str| self.folder.join(name);
        let mut command = Command::new(self.installation.scripts.join(script));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env(owner::MARK, &owner::get()?.id)
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
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .process_group(0);
        if let Some((uid, gid)) = self.installation.user {
            command.uid(uid).gid(gid);
        }
        Ok(command)
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.child
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
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
        let mut command = self.command("rabbitmqctl")?;
        exec::run(command.arg("-q").args(args), CTL_LIMIT)
    }

    fn start_again(&self) -> Result<()> {
        let mut child = self.child();
        if let Some(running) = child.as_mut()
            && running.try_wait()?.is_none()
        {
            bail!(
                "the broker on port {} is running already",
                self.settings.port.number()
            );
        }
        let log = fs::OpenOptions::new()
            .append(true)
            .open(self.folder.join("log"))
            .context("cannot open a node's log")?;
        let mut command = self.command("rabbitmq-server")?;
        command
            // "Allow input" makes the script replace itself with the emulator instead of watching over it in a shell, so that a
            // signal to our child is a signal to the emulator; -noinput then takes the input away again.
            .env("RABBITMQ_ALLOW_INPUT", "true")
            .env("RABBITMQ_SERVER_START_ARGS", "-noinput +B i")
            .stdout(log.try_clone()?)
            .stderr(log);
        *child = Some(command.spawn().context("cannot run rabbitmq-server")?);
        Ok(())
    }

    fn stop(&self) -> Result<()> {
        let Some(mut child) = self.child().take() else {
            return Ok(());
        };
        signal(&child, Signal::SIGTERM)?;
        let end = Instant::now() + STOP_LIMIT;
        while child.try_wait()?.is_none() {
            if Instant::now() > end {
                let _ = child.kill();
                let _ = child.wait();
                bail!(
                    "a private RabbitMQ hadn't stopped after {STOP_LIMIT:?}; its log ends with\n{}",
                    self.log()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
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
        match self.child().as_ref() {
            Some(child) => signal(child, wanted),
            None => bail!(
                "the broker on port {} is not running",
                self.settings.port.number()
            ),
        }
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
    kill(Pid::from_raw(child.id() as i32), signal)
        .with_context(|| format!("cannot send {signal} to a private RabbitMQ"))
}
