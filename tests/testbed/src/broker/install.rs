//! Where private nodes come from on this machine, installing RabbitMQ if need be.

use super::local::Installation;
use super::{DEFAULT_IMAGE, IMAGE_VARIABLE, Source, container};
use crate::exec;
use crate::owner::{self, POLICY, find_in_path, is_root};
use crate::ports::lock;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Downloading and unpacking Erlang takes a minute or two; so may waiting for another process that does it.
const INSTALL_LIMIT: Duration = Duration::from_secs(900);

/// The one clear line.
const NO_BROKER: &str = "no RabbitMQ to work with: set BROKER_URL to one that may be used, or install rabbitmq-server, \
    or start Docker, or run this as root on Debian or Ubuntu";

/// The first source there is, found once a process.
pub(super) fn find() -> Result<Source> {
    static FOUND: Mutex<Option<Source>> = Mutex::new(None);
    let mut found = FOUND
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(source) = found.as_ref() {
        return Ok(source.clone());
    }
    let source = search()?;
    *found = Some(source.clone());
    Ok(source)
}

/// An image that was asked for by name.
pub(super) fn image(name: &str) -> Result<Source> {
    if !container::docker_works() {
        bail!("containers of {name} need Docker, which doesn't answer");
    }
    container::provide_image(name)?;
    Ok(Source::Image(name.to_owned()))
}

fn search() -> Result<Source> {
    if let Ok(name) = std::env::var(IMAGE_VARIABLE)
        && !name.is_empty()
    {
        return image(&name).with_context(|| format!("{IMAGE_VARIABLE} asks for {name}"));
    }
    if let Some(installation) = Installation::find() {
        return Ok(Source::Local(installation));
    }
    let mut problem = None;
    if container::docker_works() {
        match container::provide_image(DEFAULT_IMAGE) {
            Ok(()) => return Ok(Source::Image(DEFAULT_IMAGE.to_owned())),
            Err(error) => problem = Some(error),
        }
    }
    if is_root() && find_in_path("apt-get").is_some() {
        match install() {
            Ok(installation) => return Ok(Source::Local(installation)),
            Err(error) => problem = Some(error),
        }
    }
    match problem {
        Some(error) => Err(error.context(NO_BROKER)),
        None => bail!(NO_BROKER),
    }
}

/// Installs Debian's package without letting its service start.
fn install() -> Result<Installation> {
    // One process at a time; the others then find what it has installed.
    let end = Instant::now() + INSTALL_LIMIT;
    let _lock = loop {
        if let Some(lock) = lock("install") {
            break lock;
        }
        if Instant::now() > end {
            bail!("another test process is still installing packages after {INSTALL_LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    if let Some(installation) = Installation::find() {
        return Ok(installation);
    }
    eprintln!("testbed: installing Debian's rabbitmq-server (no service is started)");
    let _policy = NoServices::establish()?;
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive");
        exec::run(&mut command, INSTALL_LIMIT)
    };
    // The lists may be absent or old; if they can't be had the installation's own error says more.
    let updated = apt(&["update"]);
    apt(&["install", "--no-install-recommends", "rabbitmq-server"])
        .or_else(|error| updated.and(Err(error)))
        .context("cannot install rabbitmq-server")?;
    Installation::find().context("rabbitmq-server was installed, but its scripts can't be found")
}

/// Debian's way of installing a service without starting it, for as long as this lives.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn establish() -> Result<Self> {
        if Path::new(POLICY).exists() {
            // The machine has a policy, as containers do; it is not ours to change.
            return Ok(Self { ours: false });
        }
        let text = format!("#!/bin/sh\n# {}: temporary\nexit 101\n", owner::get()?.id);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(POLICY)
            .and_then(|mut file| {
                // Whatever the umask is.
                file.set_permissions(fs::Permissions::from_mode(0o755))?;
                std::io::Write::write_all(&mut file, text.as_bytes())
            })
            .with_context(|| {
                format!("cannot write {POLICY}, which keeps the service from starting")
            })?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(POLICY);
        }
    }
}
