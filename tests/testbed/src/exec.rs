//! Runs a tool to its end, with a time limit.

use crate::owner;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// The most characters of a command that an error shows: docker's arguments contain a container's whole configuration.
const DESCRIPTION: usize = 100;

/// Runs a command; returns its standard output. An error has the command line and the command's output.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let line = describe(command);
    let child = command
        .env(owner::MARK, owner::id())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {line}"))?;
    let group = Pid::from_raw(child.id().cast_signed());
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = ended.recv_timeout(limit) else {
        let _ = killpg(group, Signal::SIGKILL);
        bail!("{line} had not ended after {limit:?}, so it was killed");
    };
    let output = output?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{line} failed ({}): {}{}", output.status, stderr.trim(), stdout.trim());
    }
    Ok(stdout)
}

fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line.chars().take(DESCRIPTION).collect()
}
