//! What a worker's image grows by.

use super::page::{Row, Unit};
use crate::broker::provide_image;
use crate::owner::temp_folder;
use crate::{docker_label, docker_works, exec};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A worker's usual base.
const BASE: &str = "debian:bookworm-slim";

const INSTALL: &str = "apt-get update && apt-get install -y --no-install-recommends amqp-tools";

/// The published image comes without OpenSSL, which amqp-tools brings along; one that was built by other hands may not.
const BARE: &str = "dpkg --purge ca-certificates openssl libssl3";

/// Takes away what apt-get leaves behind for the next time; the caches aren't there in the published image, which has apt
/// keep none.
const CLEAN: &str = "apt-get clean && rm -rf /var/lib/apt/lists/* /var/cache/apt/*";

/// Lists and packages are downloaded.
const LIMIT: Duration = Duration::from_secs(600);

/// What the binary may have, TLS and all.
const GOAL: f64 = 3e6;

/// The table's last rows, and a line below it.
pub(super) fn bytes(qconsume: &Path) -> Result<(Vec<Row>, String)> {
    let binary = fs::metadata(qconsume)?.len() as f64;
    let mut rows = Vec::new();
    let note = match amqp_tools() {
        Ok(tools) => {
            let added = |what: &str, bytes| Row::single(what, Unit::Size, Some(bytes), binary);
            rows.push(added("bytes added to an image", tools.added_clean));
            rows.push(added("… with apt's lists and caches", tools.added));
            format!("Onto {BASE}, amqp-tools brought {}.", tools.packages)
        }
        Err(error) => format!("What amqp-tools adds to an image wasn't measured: {error:#}."),
    };
    rows.push(Row::single("the binary, with TLS", Unit::Size, None, binary).limit(GOAL));
    Ok((rows, note))
}

struct AmqpTools {
    added: f64,
    added_clean: f64,
    packages: String,
}

fn amqp_tools() -> Result<AmqpTools> {
    ensure!(docker_works(), "Docker doesn't answer");
    provide_image(BASE)?;
    let image = Image::build(INSTALL)?;
    let before = packages(&Image::build(BARE)?.0)?;
    let after = packages(&image.0)?;
    let new: Vec<_> = after.difference(&before).map(String::as_str).collect();
    Ok(AmqpTools {
        added: image.added()?,
        added_clean: Image::build(&format!("{INSTALL} && {CLEAN}"))?.added()?,
        packages: new.join(", "),
    })
}

/// The names of what is installed.
fn packages(image: &str) -> Result<BTreeSet<String>> {
    let label = docker_label()?;
    let query = ["dpkg-query", "-W", "-f", "${Package}\n"];
    let run = ["run", "--rm", "--label", &label, image];
    Ok(docker(&[&run[..], &query].concat())?
        .lines()
        .map(str::to_owned)
        .collect())
}

/// An image of this run; removed when dropped.
struct Image(String);

impl Image {
    fn build(command: &str) -> Result<Self> {
        let folder = temp_folder("image");
        fs::write(
            folder.join("Dockerfile"),
            format!("FROM {BASE}\nRUN {BARE}\nRUN {command}\n"),
        )?;
        let folder = folder.to_str().context("a path in UTF-8")?;
        Ok(Self(
            docker(&["build", "--quiet", "--no-cache", folder])?
                .trim()
                .to_owned(),
        ))
    }

    /// The size of its last layer, not compressed.
    fn added(&self) -> Result<f64> {
        let sizes = docker(&["history", "--human=false", "--format", "{{.Size}}", &self.0])?;
        sizes
            .lines()
            .next()
            .context("it has no layer")?
            .parse()
            .context("no size")
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = docker(&["image", "rm", &self.0]);
    }
}

fn docker(args: &[&str]) -> Result<String> {
    exec::run(Command::new("docker").args(args), LIMIT)
}
