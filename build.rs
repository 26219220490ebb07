//! `--version` names the commit: QCONSUME_COMMIT where there is no repository (a container's build, a package), and
//! otherwise git's word, for release builds only, as a debug build would be compiled anew with every commit.

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

/// The commit, unless there is no git, no repository, or only one that these sources just happen to lie in.
fn from_git() -> Option<String> {
    if !Path::new(".git").exists() {
        return None;
    }
    // Grows with whatever moves HEAD; the branch's own file may not be there, and cargo takes that for a change.
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
