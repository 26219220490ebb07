//! Runs a tool to its end, within a deadline.

use crate::owner;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How many characters of a command an error shows.
const DESCRIPTION: usize = 100;

/// Runs the command and gives what it wrote to standard output; a failure names the command and what it said.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<String> {
    let line = describe(command);
    let mut child = command
        .env(owner::MARK, &owner::get()?.id)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run {line}"))?;
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let end = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > end {
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            let _ = child.wait();
            bail!("{line} had not ended after {limit:?}, so it was killed");
        }
        thread::sleep(Duration::from_millis(5));
    };
    let (stdout, stderr) = (join(stdout), join(stderr));
    if !status.success() {
        bail!(
            "{line} failed ({status}): {}{}",
            stderr.trim(),
            stdout.trim()
        );
    }
    Ok(stdout)
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn join(reader: thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}

fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        // Enough to know it by; a container's whole configuration is in its arguments.
        if line.len() > DESCRIPTION {
            line.push_str(" …");
            break;
        }
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}
