//! Starts the command: its group, its environment, its standard input.

use super::{
    Process, Reaper, Target,
    find::exit_of,
    left::{Descendants, Stat, Strangers},
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
    unistd::{Pid, getpid, getppid},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process, ptr,
};
use tokio::{sync::oneshot, task::yield_now};

/// Longest `NAME=value` with its NUL that Linux's execve(2) takes: `MAX_ARG_STRLEN`, in bytes.
const VARIABLE_MAX: usize = 128 * 1024;

/// The kernel's `struct sigaction` for `SIG_DFL`: zeroes, and more of them than it has on any machine.
const DEFAULT: [u64; 8] = [0; 8];

/// The size of the kernel's signal set: a bit for each of 64 signals, in bytes.
const SIGSET: usize = 8;

/// A command that runs, and what it has started.
#[derive(Debug)]
pub struct Command {
    leader: Pid,
    /// Whether it is in our own process group, rather than in one of its own.
    shares_group: bool,
    strangers: Strangers,
    ended: oneshot::Receiver<Ended>,
    reaper: Reaper,
}

impl Command {
    /// Starts the program at `path`, called with these words, with this standard input.
    ///
    /// It gets a process group of its own, except where we are in the foreground of a terminal: only processes of the
    /// foreground group may read from it.
    ///
    /// Has to be called on the main thread: the command is to die with the thread that started it.
    ///
    /// # Errors
    /// 71 when the system is short of something for now, 127 when the kernel doesn't find the program, its interpreter or
    /// its loader after all, 126 for anything else.
    pub fn spawn(
        path: &Path,
        words: &[OsString],
        variables: &[Variable],
        input: OwnedFd,
        reaper: &Reaper,
    ) -> Result<Self, Failure> {
        let shares_group = Stat::own().is_some_and(|own| own.foreground == own.group);
        let strangers = Strangers::find(shares_group, reaper.sweep() != Children::None);
        let mut command = process::Command::new(path);
        command.arg0(&words[0]).args(&words[1..]);
        command.env_clear().envs(environment(variables));
        command.stdin(input);
        if !shares_group {
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
        allocator::note_start();
        let leader = Pid::from_raw(started.id().cast_signed());
        Ok(Self { leader, shares_group, strangers, ended: reaper.watch(leader), reaper: reaper.clone() })
    }

    fn descendants(&self) -> Descendants {
        let is_plainly_ours = |child: &Stat| [child.pid, child.group].contains(&self.leader);
        Descendants::find(|child| is_plainly_ours(child) || !self.strangers.include(child))
    }
}

/// Signals all of them, and warns of the first signal that is refused; `false` if nobody is there, or all were refused.
///
/// Where a process forks and exits, and its child does the same, whoever was seen has ended before a signal arrives. The
/// group stays, and no fork escapes a signal to the group (Linux's kernel/fork.c lets a pending one go first). A group that
/// isn't theirs alone can't be used so, and in it such a chain may escape.
fn signal_all(descendants: &Descendants, signal: Signal) -> bool {
    let target = |process: &Stat| match process.group.as_raw() {
        // To kill(2), 0 is our own group and -1 is everybody.
        group @ 2.. if descendants.own_groups.contains(&process.group) => Pid::from_raw(-group),
        _ => process.pid,
    };
    let targets: BTreeSet<Pid> = descendants.processes.iter().map(target).collect();
    let (mut any, mut refused) = (false, None);
    for target in targets {
        match kill(target, signal) {
            // It has moved to another group, or its parent has reaped it: that takes another look.
            Ok(()) | Err(Errno::ESRCH) => any = true,
            Err(error) => refused = refused.or(Some((target, error))),
        }
    }
    if let Some((target, error)) = refused {
        warn_if_refused(signal, target, Err(error));
    }
    any
}

/// Warns of a signal that was refused. One to what is gone already is no loss.
fn warn_if_refused(signal: Signal, target: Pid, sent: nix::Result<()>) {
    if let Err(error) = sent
        && error != Errno::ESRCH
    {
        let kind = if target.as_raw() < 0 { "process group" } else { "process" };
        let number = target.as_raw().abs();
        let hint = match error {
            Errno::EPERM => "; it runs as another user, and qconsume lacks CAP_KILL",
            _ => "",
        };
        tracing::warn!("{signal} can't be sent to the command ({kind} {number}): {}{hint}", error.desc());
    }
}

impl Process for Command {
    async fn ended(&mut self) -> Ended {
        match (&mut self.ended).await {
            Ok(ended) => ended,
            // The reaper lives as long as the runtime, so there is no end to be told of.
            Err(_) => std::future::pending().await,
        }
    }

    fn shares_group(&self) -> bool {
        self.shares_group
    }

    fn signal(&self, target: Target, signal: Signal) {
        // Once it is reaped its number may be another's.
        let reaped = self.ended.is_terminated() || !self.ended.is_empty();
        if target != Target::Left && reaped {
            return;
        }
        match target {
            Target::Leader => warn_if_refused(signal, self.leader, kill(self.leader, signal)),
            Target::Group if !self.shares_group => {
                let group = Pid::from_raw(-self.leader.as_raw());
                warn_if_refused(signal, group, kill(group, signal));
            }
            Target::Group => {
                // Our group has ourselves in it, and the rest of a shell's pipeline.
                let mut found = self.descendants();
                let mut all = found.processes.iter();
                let leader = all.find(|process| process.pid == self.leader);
                let ours = leader.map(|leader| leader.group);
                found.processes.retain(|process| Some(process.group) == ours);
                signal_all(&found, signal);
            }
            Target::Left => {
                signal_all(&self.descendants(), signal);
            }
        }
    }

    fn left(&self) -> usize {
        let left = self.descendants().processes;
        left.iter().filter(|process| !process.is_zombie).count()
    }

    fn kill_left(&self) -> bool {
        signal_all(&self.descendants(), Signal::SIGKILL)
    }

    async fn none_left(&mut self) {
        loop {
            match self.reaper.sweep() {
                // Every descendant is a child of ours, or has an ancestor that is: we are the subreaper.
                Children::None => return,
                Children::Running if self.descendants().processes.is_empty() => return,
                Children::Running => self.reaper.reaped().await,
                Children::MoreEnded => {}
            }
            // Where children end faster than they are looked at, nothing above ever waits; timers, signals and heartbeats need
            // a turn all the same.
            yield_now().await;
        }
    }
}

/// The environment of the command: ours, with these variables set or removed.
pub fn environment(variables: &[Variable]) -> BTreeMap<OsString, OsString> {
    let mut environment: BTreeMap<_, _> = std::env::vars_os().collect();
    // The termination message is the outermost program's: a qpublish or qconsume that the command calls leaves none.
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
    !value.contains(&0) && name.len() + value.len() + 2 <= VARIABLE_MAX
}

/// Has the child die with us, and start with default signal dispositions and no signal blocked, whatever we were started
/// with.
#[allow(unsafe_code)]
fn prepare(command: &mut process::Command) {
    let parent = getpid();
    let in_child = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the death signal was asked for.
        if getppid() != parent {
            return Err(Errno::ESRCH.into());
        }
        for signal in 1..=libc::SIGRTMAX() {
            // The kernel's own call: libc's refuses 32 and 33, which glibc's posix_spawn(3) leaves ignored.
            let (new, old) = (DEFAULT.as_ptr(), ptr::null_mut::<u64>());
            // SAFETY: a system call that reads memory that is there.
            unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, SIGSET) };
        }
        // Last: a signal that has come since the fork is pending, and meets its default disposition now.
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: between fork(2) and execve(2) the closure makes system calls only: it allocates nothing, takes no lock and
    // doesn't panic.
    unsafe { command.pre_exec(in_child) };
}
