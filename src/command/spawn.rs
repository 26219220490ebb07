//! Starts the command, signals it, and finds what it has left behind.

use super::{
    Process, Reaper, Target,
    descendants::{Descendants, Stat, Strangers},
    find::exit_of,
    reap::Children,
};
use crate::{
    allocator,
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
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    pin::Pin,
    process, ptr,
};
use tokio::{sync::oneshot, task::yield_now};

/// The longest `NAME=value` with its NUL that Linux's execve(2) accepts, in bytes (`MAX_ARG_STRLEN`).
const VARIABLE_MAX: usize = 128 * 1024;

/// The kernel's `struct sigaction` for `SIG_DFL`: zeroes, at least as many as on any architecture.
const SIG_DFL_ACTION: [u64; 8] = [0; 8];

/// The size of the kernel's signal set, in bytes: a bit for each of 64 signals.
const SIGSET_BYTES: usize = 8;

#[derive(Debug)]
pub struct RunningCommand {
    leader: Pid,
    /// Whether it was started in our own process group instead of one of its own.
    started_in_our_group: bool,
    strangers: Strangers,
    ended: oneshot::Receiver<Ended>,
    reaper: Reaper,
}

impl RunningCommand {
    /// Starts the program at `path`, in a process group of its own, unless we are in the foreground group of a
    /// terminal: only that group may read from it. Fails with 71 if the system is short of something or the program's
    /// mount doesn't answer, with 127 if the program, its interpreter or its loader isn't there, otherwise with 126.
    ///
    /// Call this on the main thread: the parent-death signal comes when the thread that started the command ends.
    pub fn start(
        path: &Path,
        words: &[OsString],
        variables: &[Variable],
        input: OwnedFd,
        reaper: &Reaper,
    ) -> Result<Self, Failure> {
        let started_in_our_group = Stat::own().is_some_and(|own| own.foreground == own.group);
        let strangers = Strangers::find(started_in_our_group, reaper.sweep() != Children::None);
        let mut command = process::Command::new(path);
        command.arg0(&words[0]).args(&words[1..]);
        command.env_clear().envs(environment(variables));
        command.stdin(input);
        if !started_in_our_group {
            command.process_group(0);
        }
        prepare(&mut command);
        let started = command.spawn().map_err(|error| {
            let what = format!("the command can't be started: {}", path.display());
            if is_shortage(&error) {
                return Failure::system(what, &error);
            }
            let exit = exit_of(&error);
            let why = match error.raw_os_error() {
                Some(libc::ENOEXEC) => "built for another machine, or a script without a #! line",
                Some(libc::E2BIG) => "its arguments and environment are too long",
                _ if exit == Exit::NotFound => "the file, its interpreter or its dynamic loader isn't there",
                _ if exit == Exit::OsError => "its mount doesn't answer on this node, another try may help",
                _ => "the system refused",
            };
            Failure::new(exit, format!("{what}: {why} ({error})"))
        })?;
        allocator::note_command_started();
        let leader = Pid::from_raw(started.id().cast_signed());
        Ok(Self { leader, started_in_our_group, strangers, ended: reaper.watch(leader), reaper: reaper.clone() })
    }

    /// Whether the command is reaped. Another process may then get its number, so it must not be signalled any more.
    fn is_reaped(&self) -> bool {
        // The reaper has sent the status, and it is received or not.
        self.ended.is_terminated() || !self.ended.is_empty()
    }

    fn descendants(&self) -> Descendants {
        let is_in_its_group = |child: &Stat| [child.pid, child.group].contains(&self.leader);
        Descendants::find(|child| is_in_its_group(child) || !self.strangers.include(child))
    }
}

/// Returns `false` if there are none, or if the signal was refused for all. Signals groups if possible: a process can
/// escape by a fork, its group can't (Linux's kernel/fork.c delivers pending signals first).
fn signal_all(descendants: &Descendants, signal: Signal) -> bool {
    let target = |process: &Stat| match process.group.as_raw() {
        // kill(2) takes 0 for our own group and -1 for all processes.
        group @ 2.. if descendants.exclusive_groups.contains(&process.group) => Pid::from_raw(-group),
        _ => process.pid,
    };
    let targets: BTreeSet<Pid> = descendants.processes.iter().map(target).collect();
    let (mut any_sent, mut refused) = (false, None);
    for target in targets {
        match kill(target, signal) {
            // ESRCH: it has changed its group or has been reaped, so the caller has to look again.
            Ok(()) | Err(Errno::ESRCH) => any_sent = true,
            Err(error) => refused = refused.or(Some((target, error))),
        }
    }
    if let Some((target, error)) = refused {
        warn(signal, target, error);
    }
    any_sent
}

fn send(signal: Signal, target: Pid) {
    if let Err(error) = kill(target, signal)
        && error != Errno::ESRCH
    {
        warn(signal, target, error);
    }
}

fn warn(signal: Signal, target: Pid, error: Errno) {
    let kind = if target.as_raw() < 0 { "process group" } else { "process" };
    let number = target.as_raw().abs();
    let hint = match error {
        Errno::EPERM => "; it runs as another user, and qconsume lacks CAP_KILL",
        _ => "",
    };
    tracing::warn!("{signal} can't be sent to the command ({kind} {number}): {}{hint}", error.desc());
}

impl Process for RunningCommand {
    async fn ended(&mut self) -> Ended {
        // Reaps at each look: otherwise a signal that comes with the command's end would be seen before the end.
        let ended = poll_fn(|context| {
            self.reaper.sweep();
            Pin::new(&mut self.ended).poll(context)
        });
        match ended.await {
            Ok(ended) => ended,
            // The reaper is gone, so the runtime is ending.
            Err(_) => std::future::pending().await,
        }
    }

    fn shares_group(&self) -> bool {
        !self.is_reaped() && getpgid(Some(self.leader)) == Ok(getpgrp())
    }

    fn signal(&self, target: Target, signal: Signal) {
        match target {
            Target::Leader | Target::Group if self.is_reaped() => {}
            Target::Leader => send(signal, self.leader),
            Target::Group if !self.started_in_our_group => send(signal, Pid::from_raw(-self.leader.as_raw())),
            Target::Group => {
                // Our group includes ourselves and the rest of a shell's pipeline, so signal each process.
                let mut found = self.descendants();
                let mut all = found.processes.iter();
                let leader = all.find(|process| process.pid == self.leader);
                let group = leader.map(|leader| leader.group);
                found.processes.retain(|process| Some(process.group) == group);
                signal_all(&found, signal);
            }
            Target::Descendants => {
                signal_all(&self.descendants(), signal);
            }
            Target::DescendantsElsewhere => {
                let (mut found, ours) = (self.descendants(), getpgrp());
                found.processes.retain(|process| process.group != ours);
                signal_all(&found, signal);
            }
        }
    }

    fn count_descendants(&self) -> usize {
        self.descendants().processes.iter().filter(|process| !process.is_zombie).count()
    }

    fn kill_descendants(&self) -> bool {
        signal_all(&self.descendants(), Signal::SIGKILL)
    }

    async fn descendants_ended(&mut self) {
        loop {
            match self.reaper.sweep() {
                // No child means no descendant: as the subreaper we become the parent of every orphan.
                Children::None => return,
                Children::Running if self.descendants().processes.is_empty() => return,
                Children::Running => self.reaper.reaped().await,
                Children::LimitReached => {}
            }
            // If children end faster than they are reaped, nothing above waits: give signals and heartbeats a turn.
            yield_now().await;
        }
    }
}

/// The command's environment: ours, with these variables set or removed.
pub fn environment(variables: &[Variable]) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<_, _> = std::env::vars_os().collect();
    // Only the outermost program writes the termination message, not a qpublish or qconsume that the command calls.
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
            // The kernel's own call: libc's refuses signals 32 and 33, which glibc's posix_spawn(3) leaves ignored.
            let (new, old) = (SIG_DFL_ACTION.as_ptr(), ptr::null_mut::<u64>());
            // SAFETY: the system call only reads `SIG_DFL_ACTION`.
            unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, SIGSET_BYTES) };
        }
        // Comes last: a signal that is pending since the fork must meet its default disposition.
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: between fork(2) and execve(2), the closure only makes system calls: no allocation, no lock, no panic.
    unsafe { command.pre_exec(in_child) };
}
