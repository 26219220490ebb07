//! Runs a process and says what it has cost.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

/// Between two of many processes' starts, so that the broker's queue of new connections doesn't run over: that would be
/// waiting for the kernel's next attempt, not for either program.
const SPACE: Duration = Duration::from_millis(10);

/// What a run has cost, in seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) wall: f64,
    /// Processor time, with that of what it has started and waited for.
    pub(super) cpu: f64,
}

/// Runs it to its end, which must be exit status 0.
pub(super) fn cost(command: Command) -> Result<Cost> {
    let before = children_cpu()?;
    let started = Instant::now();
    succeeded(spawn(command)?)?;
    Ok(Cost {
        wall: started.elapsed().as_secs_f64(),
        cpu: children_cpu()? - before,
    })
}

/// Runs it to its end and gives what it had resident at most, in bytes: itself alone, not what it has started.
///
/// Not `ru_maxrss` of wait4: that begins with what the process had before it became this program, a copy of our own, and
/// counts the largest of what it has started, too. So the process is stopped when it exits, and asked.
pub(super) fn peak(command: Command) -> Result<f64> {
    let pid = Pid::from_raw(spawn(command)?.id().cast_signed());
    ptrace::seize(pid, Options::PTRACE_O_TRACEEXIT).context("it can't be traced")?;
    let mut peak = None;
    loop {
        match waitpid(pid, None)? {
            WaitStatus::PtraceEvent(_, _, event) => {
                if event == Event::PTRACE_EVENT_EXIT as i32 {
                    peak = Some(kib(&format!("/proc/{pid}/status"), "VmHWM:")?);
                }
                ptrace::cont(pid, None)?;
            }
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal)?,
            WaitStatus::Exited(_, 0) => return peak.context("it has exited unseen"),
            status => bail!("{status:?}"),
        }
    }
}

/// Starts many processes of one program.
pub(super) fn crowd(size: usize, command: impl Fn() -> Command) -> Result<Vec<Child>> {
    (0..size)
        .map(|_| {
            thread::sleep(SPACE);
            spawn(command())
        })
        .collect()
}

/// The memory of all, in bytes: what several have in common is counted once.
pub(super) fn memory(crowd: &[Child]) -> Result<f64> {
    crowd
        .iter()
        .map(|child| kib(&format!("/proc/{}/smaps_rollup", child.id()), "Pss:"))
        .sum()
}

fn spawn(mut command: Command) -> Result<Child> {
    command.spawn().context("it can't be run")
}

/// Waits for its end, which must be exit status 0.
pub(super) fn succeeded(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Of all children that were waited for, and theirs.
fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let spent = usage.user_time() + usage.system_time();
    Ok(spent.num_microseconds() as f64 / 1e6)
}

/// A value of a file in /proc that gives it in KiB; in bytes.
fn kib(file: &str, name: &str) -> Result<f64> {
    let text = fs::read_to_string(file)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB"));
    let kib: f64 = value
        .with_context(|| format!("{file} has no {name}"))?
        .trim()
        .parse()?;
    Ok(kib * 1024.0)
}
