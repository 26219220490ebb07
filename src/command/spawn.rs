//! Starts the command. Signals it, and the processes that it leaves behind.

use super::{
    Process, Reaper, Target,
    find::exit_for,
    processes::{CommandProcesses, Strangers},
    reap::Children,
    stat::Stat,
};
use crate::{
    abort,
    exit::{Exit, Failure, is_shortage},
    report::TERMINATION_LOG_VARIABLE,
    variable::Variable,
    verdict::Ended,
};
use nix::{
    errno::Errno,
    libc,
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal, kill},
    },
    unistd::{Pid, getpgid, getpgrp, getpid, getppid},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    future::{Future, poll_fn},
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    pin::Pin,
    process, ptr,
};
use tokio::{sync::oneshot, task::yield_now};

/// In bytes: Linux's execve(2) accepts no longer `NAME=value` with its NUL (`MAX_ARG_STRLEN`).
const VARIABLE_MAX: usize = 128 * 1024;

/// The kernel's `struct sigaction` for `SIG_DFL`: zeroes, enough for every architecture.
const SIG_DFL_ACTION: [u64; 8] = [0; 8];

const KERNEL_SIGSET_BYTES: usize = 8;

#[derive(Debug)]
pub struct RunningCommand {
    pid: Pid,
    started_in_our_group: bool,
    strangers: Strangers,
    ended: oneshot::Receiver<Ended>,
    reaper: Reaper,
}

impl RunningCommand {
    /// Starts the program at `path` in a process group of its own. Only if ours is the foreground group of a terminal,
    /// the command stays in ours, so that it can read from the terminal. Fails with 71, 126 or 127.
    ///
    /// Call this on the main thread: the parent-death signal comes when the thread that started the command ends.
    pub fn start(
        path: &Path,
        command_line: &[OsString],
        variables: &[Variable],
        input: OwnedFd,
        reaper: &Reaper,
    ) -> Result<Self, Failure> {
        let started_in_our_group = Stat::own().is_some_and(|own| own.foreground == own.group);
        let strangers = Strangers::before_start(started_in_our_group, reaper.sweep() != Children::None);
        let mut command = process::Command::new(path);
        command.arg0(&command_line[0]).args(&command_line[1..]);
        command.env_clear().envs(environment(variables));
        command.stdin(input);
        if !started_in_our_group {
            command.process_group(0);
        }
        prepare(&mut command);
        let started = command.spawn().map_err(|error| not_started(path, &error))?;
        abort::note_command_started();
        let pid = Pid::from_raw(started.id().cast_signed());
        Ok(Self { pid, started_in_our_group, strangers, ended: reaper.watch(pid), reaper: reaper.clone() })
    }

    /// If so, it must not be signalled any more: another process may have got its number.
    fn is_reaped(&self) -> bool {
        let is_received = self.ended.is_terminated();
        is_received || !self.ended.is_empty()
    }

    fn processes(&self) -> CommandProcesses {
        // The command and its group are never strangers, even if an older group, now gone, had the same number.
        let is_command_or_in_its_group = |child: &Stat| [child.pid, child.group].contains(&self.pid);
        CommandProcesses::find(|child| is_command_or_in_its_group(child) || !self.strangers.include(child))
    }

    fn processes_in_its_group(&self) -> CommandProcesses {
        let mut found = self.processes();
        let command = found.processes.iter().find(|process| process.pid == self.pid);
        let group = command.map(|command| command.group);
        found.processes.retain(|process| Some(process.group) == group);
        found
    }
}

fn not_started(path: &Path, error: &io::Error) -> Failure {
    let what = format!("the command can't be started: {}", path.display());
    if is_shortage(error) {
        return Failure::system(what, error);
    }
    let exit = exit_for(error);
    let why = match error.raw_os_error() {
        Some(libc::ENOEXEC) => "built for another machine, or a script without a #! line",
        Some(libc::E2BIG) => "its arguments and environment are too long",
        _ if exit == Exit::NotFound => "the file, its interpreter or its dynamic loader isn't there",
        _ if exit == Exit::OsError => "its mount doesn't answer on this node, another try may help",
        _ => "the system refused",
    };
    Failure::new(exit, format!("{what}: {why} ({error})"))
}

impl Process for RunningCommand {
    async fn ended(&mut self) -> Ended {
        // Reaps at each poll: otherwise a signal that comes with the command's end would be seen before the end.
        let ended = poll_fn(|context| {
            self.reaper.sweep();
            Pin::new(&mut self.ended).poll(context)
        });
        match ended.await {
            Ok(ended) => ended,
            // Never: our reaper holds the sender until it has sent.
            Err(_) => std::future::pending().await,
        }
    }

    fn shares_group(&self) -> bool {
        !self.is_reaped() && getpgid(Some(self.pid)) == Ok(getpgrp())
    }

    fn signal(&self, target: Target, signal: Signal) {
        match target {
            Target::Command | Target::CommandGroup if self.is_reaped() => {}
            Target::Command => send(signal, self.pid),
            // Our own group also contains us, and the rest of a shell's pipeline. So signal each process.
            Target::CommandGroup if self.started_in_our_group => {
                send_to_all(&self.processes_in_its_group(), signal);
            }
            Target::CommandGroup => send(signal, Pid::from_raw(-self.pid.as_raw())),
            Target::LeftBehind => {
                send_to_all(&self.processes(), signal);
            }
            Target::LeftBehindElsewhere => {
                let (mut found, ours) = (self.processes(), getpgrp());
                found.processes.retain(|process| process.group != ours);
                send_to_all(&found, signal);
            }
        }
    }

    fn count_left_behind(&self) -> usize {
        self.processes().processes.iter().filter(|process| !process.is_zombie).count()
    }

    fn kill_left_behind(&self) -> bool {
        send_to_all(&self.processes(), Signal::SIGKILL)
    }

    async fn left_behind_ended(&mut self) {
        loop {
            match self.reaper.sweep() {
                // Without a child there is no descendant either, as orphans become our children.
                Children::None => return,
                Children::Running if self.processes().processes.is_empty() => return,
                Children::Running => self.reaper.reaped().await,
                Children::LimitReached => {}
            }
            // If children end faster than they are reaped, nothing above waits. Give signals and heartbeats a turn.
            yield_now().await;
        }
    }
}

/// Signals whole groups if possible: a process can escape by a fork, a group can't (Linux's kernel/fork.c delivers
/// pending signals first). `false` if there are no processes, or none that we may signal.
fn send_to_all(found: &CommandProcesses, signal: Signal) -> bool {
    let target = |process: &Stat| match process.group.as_raw() {
        // kill(2) takes 0 for our own group and -1 for all processes.
        group @ 2.. if found.exclusive_groups.contains(&process.group) => Pid::from_raw(-group),
        _ => process.pid,
    };
    let targets: BTreeSet<Pid> = found.processes.iter().map(target).collect();
    let (mut any_sent, mut refused) = (false, None);
    for target in targets {
        match kill(target, signal) {
            // ESRCH: the process has ended, or its group. There may be others now, so the caller has to look again.
            Ok(()) | Err(Errno::ESRCH) => any_sent = true,
            Err(error) => refused = refused.or(Some((target, error))),
        }
    }
    if let Some((target, error)) = refused {
        warn_not_sent(signal, target, error);
    }
    any_sent
}

fn send(signal: Signal, target: Pid) {
    if let Err(error) = kill(target, signal)
        && error != Errno::ESRCH
    {
        warn_not_sent(signal, target, error);
    }
}

fn warn_not_sent(signal: Signal, target: Pid, error: Errno) {
    let kind = if target.as_raw() < 0 { "process group" } else { "process" };
    let number = target.as_raw().abs();
    let hint = match error {
        Errno::EPERM => "; it runs as another user, and qconsume lacks CAP_KILL",
        _ => "",
    };
    tracing::warn!("{signal} can't be sent to the command's {kind} {number}: {}{hint}", error.desc());
}

pub fn environment(variables: &[Variable]) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<_, _> = std::env::vars_os().collect();
    // Only the outermost program writes the termination message: not a qpublish or qconsume that the command calls.
    environment.insert(TERMINATION_LOG_VARIABLE.into(), OsString::new());
    for Variable { name, value } in variables {
        environment.remove(OsStr::new(name));
        match value {
            Some(value) if fits(name, value) => {
                environment.insert(name.into(), value.clone());
            }
            Some(_) => tracing::warn!(
                "{name} is left out of the command's environment: its value contains a NUL or is over 128 KiB"
            ),
            None => {}
        }
    }
    environment
}

fn fits(name: &str, value: &OsStr) -> bool {
    let value = value.as_encoded_bytes();
    let size = name.len() + "=".len() + value.len() + "\0".len();
    !value.contains(&0) && size <= VARIABLE_MAX
}

/// Makes the child die with us, and start with default signal dispositions and no blocked signals.
#[allow(unsafe_code)]
fn prepare(command: &mut process::Command) {
    let parent = getpid();
    let in_child = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before prctl(2).
        if getppid() != parent {
            return Err(Errno::ESRCH.into());
        }
        for signal in 1..=libc::SIGRTMAX() {
            // libc's sigaction(3) refuses signals 32 and 33, which glibc's posix_spawn(3) leaves ignored.
            let (new, old) = (SIG_DFL_ACTION.as_ptr(), ptr::null_mut::<u64>());
            // SAFETY: the system call only reads `SIG_DFL_ACTION`.
            unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, KERNEL_SIGSET_BYTES) };
        }
        // Comes last: signals that are pending since the fork must meet their default dispositions.
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: as required between fork(2) and execve(2), the closure only makes system calls: no allocation, no lock.
    unsafe { command.pre_exec(in_child) };
}
