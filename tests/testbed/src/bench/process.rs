//! Runs a process and measures its cost.

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

/// Between the starts of many processes. Otherwise the broker's backlog of connections may overflow, and the kernel's
/// retries would be measured.
const SPACE: Duration = Duration::from_millis(10);

/// The ticks of /proc/PID/stat in a second: USER_HZ, which is the same on all architectures that RabbitMQ runs on.
const TICKS: f64 = 100.0;

/// The cost of a run, in seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) wall: f64,
    /// Processor time, including that of children that it has waited for.
    pub(super) cpu: f64,
}

/// Runs a command to its end; it must exit with 0.
pub(super) fn cost(command: Command) -> Result<Cost> {
    let before = children_cpu()?;
    let started = Instant::now();
    succeeded(spawn(command)?)?;
    Ok(Cost { wall: started.elapsed().as_secs_f64(), cpu: children_cpu()? - before })
}

/// A process's resident memory, in bytes, without its children's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resident {
    pub(super) peak: f64,
    /// At its end, without the pages of files, which processes share.
    pub(super) own: f64,
}

/// Runs a command to its end; returns its resident memory.
///
/// Doesn't use `ru_maxrss` of wait4: that includes the memory from before execve(2), which is a copy of ours, and the
/// largest child. Instead, ptrace stops the process when it exits, and /proc is read then.
pub(super) fn resident(command: Command) -> Result<Resident> {
    let pid = Pid::from_raw(spawn(command)?.id().cast_signed());
    ptrace::seize(pid, Options::PTRACE_O_TRACEEXIT).context("the process can't be traced")?;
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
            WaitStatus::Exited(_, 0) => return resident.context("the process has exited without being stopped"),
            status => bail!("{status:?}"),
        }
    }
}

/// Raises the limit of open files for this process and the broker that it starts: a thousand workers have a thousand
/// connections, and the usual limit is 1,024.
pub(super) fn raise_file_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of open files")
}

pub(super) fn crowd(size: usize, command: impl Fn() -> Command) -> Result<Vec<Child>> {
    (0..size)
        .map(|_| {
            thread::sleep(SPACE);
            spawn(command())
        })
        .collect()
}

/// The memory of these processes, in bytes; shared memory counts once. Processes that have ended count as 0, as a
/// broker's helpers come and go.
pub(super) fn memory(pids: &[u32]) -> Result<f64> {
    pids.iter().try_fold(0.0, |sum, pid| {
        let size = kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:");
        let there = || Path::new(&format!("/proc/{pid}")).exists();
        Ok(sum + size.or_else(|error| if there() { Err(error) } else { Ok(0.0) })?)
    })
}

pub(super) fn of_broker(broker: &Broker) -> Result<Vec<u32>> {
    let pids = broker.processes();
    ensure!(!pids.is_empty(), "no process of the broker was found");
    Ok(pids.into_iter().map(i32::cast_unsigned).collect())
}

/// The processor time of a private broker's processes and of the children that they have waited for, in seconds.
pub(super) fn broker_cpu(broker: &Broker) -> Result<f64> {
    let stats = of_broker(broker)?.into_iter().filter_map(|pid| {
        // A process that is gone was short-lived; its time is in that of the parent that has waited for it.
        fs::read_to_string(format!("/proc/{pid}/stat")).ok()
    });
    stats.map(|stat| cpu(&stat)).sum()
}

/// The processor time in a /proc/PID/stat, in seconds.
fn cpu(stat: &str) -> Result<f64> {
    // The name may contain spaces and parentheses. After it, utime is the twelfth field.
    let (_, fields) = stat.rsplit_once(')').context("stat has no name")?;
    let times = fields.split_whitespace().skip(11).take(4);
    let ticks: f64 = times.map(str::parse::<f64>).sum::<Result<_, _>>()?;
    Ok(ticks / TICKS)
}

pub(super) fn spawn(mut command: Command) -> Result<Child> {
    command.spawn().context("the program can't be run")
}

/// Waits for a process's end; it must exit with 0.
pub(super) fn succeeded(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// The processor time of all children that were waited for, and theirs, in seconds.
pub(super) fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let spent = usage.user_time() + usage.system_time();
    Ok(spent.num_microseconds() as f64 / 1e6)
}

/// A value that a file in /proc gives in KiB; returned in bytes.
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
        // By proc(5): pid, name, state, ten more fields, then utime, stime, cutime and cstime.
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 11 22 33 44 150 50 25 75 20 0 9 0 555 0 0";
        assert_eq!(cpu(stat).unwrap(), 3.0);
    }
}
