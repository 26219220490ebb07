//! Finds a source of private nodes on this machine; installs RabbitMQ if necessary.

use super::local::Installation;
use super::{DEFAULT_IMAGE, IMAGE_VARIABLE, Source, container};
use crate::owner::{self, POLICY, find_in_path, is_root};
use crate::ports::lock;
use crate::{eventually, exec};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tempfile::TempPath;

/// Downloading and unpacking Erlang takes a minute or two, or waiting until another process has done it.
const INSTALL_LIMIT: Duration = Duration::from_secs(900);

const NO_BROKER: &str = "no RabbitMQ to work with: set BROKER_URL to one that may be used, or install rabbitmq-server, \
    or start Docker, or run this as root on Debian or Ubuntu";

/// The image with this name, pulled if necessary.
pub(super) fn image(name: &str) -> Result<Source> {
    if !container::docker_works() {
        bail!("containers of {name} need Docker, which doesn't answer");
    }
    container::provide_image(name)?;
    Ok(Source::Image(name.to_owned()))
}

/// The first source that works: see [`super`] for their order.
pub(super) fn find() -> Result<Source> {
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
        match image(DEFAULT_IMAGE) {
            Ok(source) => return Ok(source),
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
    // One process at a time; the others then find the installation.
    let mut turn = None;
    eventually(INSTALL_LIMIT, || {
        turn = turn.take().or_else(|| lock("install"));
        turn.is_some()
    });
    let _turn =
        turn.with_context(|| format!("another test process is still installing packages after {INSTALL_LIMIT:?}"))?;
    if let Some(installation) = Installation::find() {
        return Ok(installation);
    }
    eprintln!("testbed: installing Debian's rabbitmq-server (no service is started)");
    let _policy = start_no_services()?;
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
        exec::run(&mut command, INSTALL_LIMIT)
    };
    // The package lists may be missing or old. If updating them fails, the installation's error says more.
    let updated = apt(&["update"]);
    apt(&["install", "--no-install-recommends", "rabbitmq-server"])
        .or_else(|error| updated.and(Err(error)))
        .context("cannot install rabbitmq-server")?;
    Installation::find().context("rabbitmq-server was installed, but its scripts can't be found")
}

/// Keeps Debian's packages from starting their services, while the returned file exists.
fn start_no_services() -> Result<Option<TempPath>> {
    if Path::new(POLICY).exists() {
        // The machine has a policy already, as containers do: leave it.
        return Ok(None);
    }
    let text = format!("#!/bin/sh\n# {}: temporary\nexit 101\n", owner::id());
    fs::write(POLICY, text)
        .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {POLICY}, which keeps the service from starting"))?;
    Ok(Some(TempPath::try_from_path(POLICY)?))
}
