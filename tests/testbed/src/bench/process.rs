//! Runs a process and says what it has cost.

use crate::Broker;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

/// Between two of many processes' starts, so that the broker's queue of new connections doesn't run over: that would be
/// waiting for the kernel's next attempt, not for either program.
const SPACE: Duration = Duration::from_millis(10);

/// How many of the ticks in /proc/PID/stat are a second: USER_HZ, which Linux keeps the same on all machines that RabbitMQ runs on.
const TICKS: f64 = 100.0;

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
    Ok(Cost { wall: started.elapsed().as_secs_f64(), cpu: children_cpu()? - before })
}

/// What a process had resident, in bytes: itself alone, not what it has started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resident {
    /// At most, all of it.
    pub(super) peak: f64,
    /// At its end, without the pages of files, which all processes share that have the same files open.
    pub(super) own: f64,
}

/// Runs it to its end and gives what it had resident.
///
/// Not `ru_maxrss` of wait4: that begins with what the process had before it became this program, a copy of our own, and
/// counts the largest of what it has started, too. So the process is stopped when it exits, and asked.
pub(super) fn resident(command: Command) -> Result<Resident> {
    let pid = Pid::from_raw(spawn(command)?.id().cast_signed());
    ptrace::seize(pid, Options::PTRACE_O_TRACEEXIT).context("it can't be traced")?;
    let mut resident = None;
    loop {
        match waitpid(pid, None)? {
            WaitStatus::PtraceEvent(_, _, event) => {
                if event == Event::PTRACE_EVENT_EXIT as i32 {
                    let status = format!("/proc/{pid}/status");
                    resident = Some(Resident { peak: kib(&status, "VmHWM:")?, own: kib(&status, "RssAnon:")? });
                }
                ptrace::cont(pid, None)?;
            }
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal)?,
            WaitStatus::Exited(_, 0) => return resident.context("it has exited unseen"),
            status => bail!("{status:?}"),
        }
    }
}

/// Lets this process, and so the broker that it starts, open as many files as the system permits: a thousand workers are as many
/// connections, and the usual limit is 1,024.
pub(super) fn raise_file_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of open files")
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

/// The memory of all, in bytes: what several have in common is counted once. What has ended has none: a broker's helpers come
/// and go.
pub(super) fn memory(pids: &[u32]) -> Result<f64> {
    pids.iter().try_fold(0.0, |sum, pid| {
        let size = kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:");
        let there = || Path::new(&format!("/proc/{pid}")).exists();
        Ok(sum + size.or_else(|error| if there() { Err(error) } else { Ok(0.0) })?)
    })
}

/// The processes of a private broker.
pub(super) fn of_broker(broker: &Broker) -> Result<Vec<u32>> {
    let pids = broker.processes();
    ensure!(!pids.is_empty(), "the broker's processes can't be seen");
    Ok(pids.into_iter().map(i32::cast_unsigned).collect())
}

/// The processor time of a private broker's processes and of those that they have waited for, in seconds.
pub(super) fn broker_cpu(broker: &Broker) -> Result<f64> {
    let stats = of_broker(broker)?.into_iter().filter_map(|pid| {
        // One that is gone was started for a moment, and its time is now that of the one that has waited for it.
        fs::read_to_string(format!("/proc/{pid}/stat")).ok()
    });
    stats.map(|stat| cpu(&stat)).sum()
}

/// From a process's /proc/PID/stat, in seconds.
fn cpu(stat: &str) -> Result<f64> {
    // Behind the name, which may have blanks and brackets in it, utime is the twelfth field.
    let (_, fields) = stat.rsplit_once(')').context("stat has no name")?;
    let times = fields.split_whitespace().skip(11).take(4);
    let ticks: f64 = times.map(str::parse::<f64>).sum::<Result<_, _>>()?;
    Ok(ticks / TICKS)
}

pub(super) fn spawn(mut command: Command) -> Result<Child> {
    command.spawn().context("it can't be run")
}

/// Waits for its end, which must be exit status 0.
pub(super) fn succeeded(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Of all children that were waited for, and theirs.
pub(super) fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let spent = usage.user_time() + usage.system_time();
    Ok(spent.num_microseconds() as f64 / 1e6)
}

/// A value of a file in /proc that gives it in KiB; in bytes.
fn kib(file: &str, name: &str) -> Result<f64> {
    let text = fs::read_to_string(file)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB"));
    let kib: f64 = value.with_context(|| format!("{file} has no {name}"))?.trim().parse()?;
    Ok(kib * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_that_of_the_process_and_of_those_it_has_waited_for() {
        // As proc(5) has it: pid, name, state, ten more fields, then utime, stime, cutime and cstime.
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 11 22 33 44 150 50 25 75 20 0 9 0 555 0 0";
        assert_eq!(cpu(stat).unwrap(), 3.0);
    }
}
