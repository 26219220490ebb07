//! The commit that `--version` shows: QCONSUME_COMMIT if it is set, for builds without a repository (containers,
//! packages). Otherwise git is asked, for release builds only: a debug build would be compiled again after every
//! commit.

use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=QCONSUME_COMMIT");
    let given = env::var("QCONSUME_COMMIT").ok().filter(|commit| !commit.is_empty());
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = given.or_else(|| if release { from_git() } else { None });
    let suffix = commit.map_or_else(String::new, |commit| format!(" ({commit})"));
    println!("cargo::rustc-env=QCONSUME_VERSION={}{suffix}", env!("CARGO_PKG_VERSION"));
}

/// The commit. `None` without git, without a repository, or if the repository belongs to a folder above.
fn from_git() -> Option<String> {
    if !Path::new(".git").exists() {
        return None;
    }
    // Every move of HEAD adds a line to this file. The branch's own file may be missing, which cargo takes for a
    // change.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
